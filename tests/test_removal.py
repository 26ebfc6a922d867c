"""Taking the module out, and putting it back: clients go on with the tokens they have."""

from dataclasses import dataclass, replace

import pytest

from harness.client import Client, JsonDict, MatrixError, quote
from harness.homeserver import Homeserver
from harness.wait import eventually
from tests.sliding import Connection, drained, send_known, subscription, window
from tests.support import (
    HOUR_MS,
    REMAINING_KEY,
    SYNC_SECTION,
    VERSIONS_FLAG,
    MakeHomeserver,
    drop_tables,
    follow_until_seen,
    ids,
    joined_room,
    our_tables,
    timeline_in,
)

SHORT = {"room": {"timeline": {"limit": 1}}}


@dataclass
class Held:
    """What a client holds of one server: every kind of token there is.

    Attributes:
        older: the room that all of the tokens are about, and rooms that the Sliding Sync
            connection `narrow` was not asked for, with their sticky events.
    """

    room_id: str
    older: dict[str, list[str]]
    since: str
    prev_batch: str
    end: str
    narrow: Connection
    wide: Connection

    @property
    def left_behind(self) -> list[str]:
        """The rooms that `narrow` was not asked for."""
        return [room_id for room_id in self.older if room_id != self.room_id]


def fill(client: Client, sender: Client, left_behind: int = 3) -> Held:
    """Make rooms with sticky events, and read them in all ways."""
    older = {}
    for _ in range(left_behind + 1):
        room_id = sender.create_room(preset="public_chat")
        client.join(room_id)
        older[room_id] = send_known(sender, room_id, 2)
    room_id = next(iter(older))
    narrow = Connection(client, {}, {room_id: subscription(timeline_limit=1)})
    narrow.drain()
    assert set(narrow.seen(room_id)) == set(older[room_id])
    wide = Connection(client, {"all": window(timeline_limit=1)})
    wide.drain()
    followed = follow_until_seen(client, room_id, older[room_id])
    assert followed.next_batch is not None
    return Held(
        room_id,
        older,
        followed.next_batch,
        joined_room(client.sync(filter=SHORT), room_id)["timeline"]["prev_batch"],
        client.messages(room_id, limit=2)["end"],
        narrow,
        wide,
    )


def pages(client: Client, held: Held) -> list[list[str]]:
    """What the tokens that point into the past lead to, in all ways."""
    room_id = held.room_id
    path = f"/_matrix/client/v3/rooms/{quote(room_id)}/members"
    members = [
        client.request("GET", path, params={"at": token})["chunk"]
        for token in (held.since, held.prev_batch)
    ]
    return [
        ids(client.messages(room_id, limit=4, **{"from": held.prev_batch})["chunk"]),
        ids(client.messages(room_id, limit=4, **{"from": held.end})["chunk"]),
        ids(client.messages(room_id, limit=4, **{"from": held.since})["chunk"]),
        ids(client.messages(room_id, limit=4, **{"from": held.since, "to": held.end})["chunk"]),
        *map(ids, members),
    ]


def key_changes(client: Client, first: str, second: str) -> JsonDict:
    """Whose keys changed between two tokens."""
    params = {"from": first, "to": second}
    return client.request("GET", "/_matrix/client/v3/keys/changes", params=params)


def restart_with(homeserver: Homeserver, *, module: bool) -> None:
    """Take the module out, or put it back."""
    homeserver.stop()
    homeserver.reconfigure(module=module)
    homeserver.start()


def timeline_after(client: Client, since: str, room_id: str) -> list[str]:
    """What `/sync` has in a room's timeline after a token."""
    return ids(timeline_in(client.sync(since), room_id))


@pytest.mark.slow
def test_tokens_outlive_the_module(make_homeserver: MakeHomeserver) -> None:
    """Without the module every token leads on from where it was, and with it again, too."""
    # C9, X5
    homeserver = make_homeserver()
    homeserver.start()
    alice, bob = homeserver.register(), homeserver.register()
    held = fill(bob, alice)
    room = held.room_id
    everything = held.older[room]
    before = pages(bob, held)
    assert all(before)
    # It remembers rooms, and so is no plain number of a stream.
    assert held.narrow.since is not None
    assert len(held.narrow.since) > 40

    restart_with(homeserver, module=False)
    assert not bob.request("GET", "/_matrix/client/versions")["unstable_features"][VERSIONS_FLAG]
    plain = alice.send(room)
    answer = bob.sync(held.since)
    assert ids(timeline_in(answer, room)) == [plain]
    assert list(answer["rooms"]["join"]) == [room]
    assert SYNC_SECTION not in joined_room(answer, room)
    between = answer["next_batch"]
    assert "rooms" not in bob.sync(between, timeout_ms=200)
    for connection in (held.narrow, held.wide):
        sliding = connection.ask()
        assert sliding.timeline(room) == [plain]
        assert sliding.extension is None
    # Goes on, rather than beginning anew.
    assert "initial" not in held.narrow.answers[-1].body["rooms"][room]
    assert "initial" in held.narrow.without_pos().ask().body["rooms"][room]
    assert pages(bob, held) == before
    key_changes(bob, held.since, between)
    assert REMAINING_KEY not in bob.event(room, everything[0])["unsigned"]

    restart_with(homeserver, module=True)
    assert pages(bob, held) == before
    key_changes(bob, held.since, between)
    new = send_known(alice, room, 2)
    # From before, when it was known what the client had.
    followed = follow_until_seen(bob, room, new, held.since, filter=SHORT)
    assert followed.seen(room) == new or followed.sticky(room) + followed.timeline(room) == new
    # From in between, when nobody knew: rather twice than never.
    followed = follow_until_seen(bob, room, [*everything, *new], between, filter=SHORT)
    assert sorted(followed.seen(room)) == sorted([*everything, *new])
    for connection in (held.narrow, held.wide):
        so_far = len(connection.answers)
        connection.drain()
        seen = [
            name
            for answer in connection.answers[so_far:]
            for name in answer.sticky(room) + answer.timeline(room)
        ]
        assert sorted(seen) == sorted(new)
    # What was left behind before the module went is not forgotten.
    for room_id in held.left_behind:
        held.narrow.subscriptions = {**held.narrow.subscriptions, room_id: subscription()}
        assert drained(held.narrow.drain(), room_id) == held.older[room_id]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_dropped_tables(make_homeserver: MakeHomeserver, kind: str) -> None:
    """If somebody cleaned up meanwhile, everything unexpired comes again and nothing breaks."""
    # C9, X5
    homeserver = make_homeserver(kind)
    homeserver.start()
    alice, bob = homeserver.register(), homeserver.register()
    held = fill(bob, alice)
    room = held.room_id
    before = pages(bob, held)
    homeserver.stop()
    homeserver.reconfigure(module=False)
    homeserver.start()
    drop_tables(homeserver, kind)
    between = bob.sync(held.since)["next_batch"]
    homeserver.stop()

    homeserver.reconfigure(module=True)
    position = homeserver.log_position()
    homeserver.start()
    assert our_tables(homeserver, kind)
    new = send_known(alice, room, 1)
    everything = [*held.older[room], *new]
    for token in (held.since, between, None):
        followed = follow_until_seen(bob, room, everything, token, filter=SHORT)
        assert sorted(followed.seen(room)) == sorted(everything)
    for connection in (held.narrow, held.wide):
        for begun in (connection.without_pos(), connection):
            answers = begun.collect(room, held.older[room])
            assert drained(answers, room)[:2] == held.older[room]
    for room_id in held.left_behind:
        held.narrow.subscriptions = {**held.narrow.subscriptions, room_id: subscription()}
        assert drained(held.narrow.drain(), room_id) == held.older[room_id]
    assert pages(bob, held) == before
    assert homeserver.problems_since(position) == ""


@pytest.mark.slow
def test_synapses_own_sticky_events_instead(make_homeserver: MakeHomeserver) -> None:
    """Where Synapse's own implementation takes over, clients go on with what they have."""
    # C9
    homeserver = make_homeserver()
    homeserver.start()
    alice, bob = homeserver.register(), homeserver.register()
    held = fill(bob, alice)
    room = held.room_id
    before = pages(bob, held)
    homeserver.stop()

    own = {"experimental_features": {"msc4354_enabled": True}}
    homeserver.reconfigure(module=False, extra_config=own)
    position = homeserver.log_position()
    homeserver.start()
    assert bob.request("GET", "/_matrix/client/versions")["unstable_features"][VERSIONS_FLAG]
    (new,) = [alice.send(room, sticky_ms=HOUR_MS)]
    eventually(lambda: new in timeline_after(bob, held.since, room), what="the new event in /sync")
    assert pages(bob, held) == before
    homeserver.stop()
    assert homeserver.problems_since(position) == ""

    # And back. Synapse's own tokens are nothing special either.
    homeserver.start()
    between = bob.sync(held.since)["next_batch"]
    homeserver.stop()
    homeserver.reconfigure(module=True, extra_config={})
    homeserver.start()
    everything = [*held.older[room], new]
    followed = follow_until_seen(bob, room, everything, between, filter=SHORT)
    assert sorted(followed.seen(room)) == sorted(everything)
    # A connection that begins is sent its rooms as new ones, with everything that is live.
    sections = Connection(bob, since=held.wide.since)
    assert drained(sections.collect(room, [new]), room) == everything


@pytest.mark.slow
def test_sliding_sync_of_synapse_itself(make_homeserver: MakeHomeserver) -> None:
    """With Synapse's own extension instead, a Sliding Sync client must begin anew.

    Not only without `pos`, as that tells it, but without `since` too: Synapse counts from 1, so
    ours is from the future for it. docs/compatibility.md tells admins so.
    """
    # C9
    homeserver = make_homeserver()
    homeserver.start()
    alice, bob = homeserver.register(), homeserver.register()
    held = fill(bob, alice)
    homeserver.stop()
    own = {"experimental_features": {"msc4354_enabled": True}}
    homeserver.reconfigure(module=False, extra_config=own)
    homeserver.start()
    new = alice.send(held.room_id, sticky_ms=HOUR_MS)
    for connection in (held.narrow, held.wide):
        try:
            answer = connection.ask()
        except MatrixError as error:
            if error.errcode != "M_UNKNOWN_POS":
                raise
            answer = replace(connection.without_pos(), since=None).ask()
        assert new in answer.timeline(held.room_id)
