"""Who sent the events of a section, to clients that load the members of rooms lazily."""

from typing import Any

import pytest

from harness.client import Client, JsonDict, quote
from harness.homeserver import Homeserver
from tests.sliding import until_known
from tests.support import (
    EVENT_KEY,
    MakeHomeserver,
    follow_until_seen,
    ids,
    joined_room,
    send_plain,
    send_sticky,
    sticky_in,
    timeline_in,
    wait_for_readers,
)

# What differs between deployments differs on workers too.
pytestmark = pytest.mark.repeats("postgres")


def lazy(timeline: JsonDict | None = None, **state: Any) -> JsonDict:
    """A filter that loads members lazily, and by default shows no room events in timelines."""
    return {
        "room": {
            "state": {"lazy_load_members": True, **state},
            "timeline": timeline or {"types": ["org.example.*"]},
        }
    }


# Memberships do appear in timelines.
MEMBERS = {"types": ["m.room.member"]}


@pytest.fixture
def carol(homeserver: Homeserver, alice: Client, room: str) -> Client:
    """Another member of the room."""
    carol = homeserver.register()
    carol.join(room)
    # If the newest event is a membership, Synapse sends it to everybody.
    alice.send(room)
    return carol


@pytest.fixture
def room(homeserver: Homeserver, alice: Client, bob: Client) -> str:
    """A public room with members that nobody tells a lazy client of, unless they send something.

    It has a name: of a room that has none, some members are always sent.
    """
    room_id = alice.create_room(preset="public_chat", name="Sticky")
    for member in (bob, homeserver.register()):
        member.join(room_id)
    return room_id


class Reader:
    """A new device of a user, whose requests all go to one process: it has the memory."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._watcher = client.second_device()
        self.device = client.second_device().via(client.homeserver.client_urls[0])

    def sync(
        self, room_id: str, sent: list[str], since: str | None = None, **arguments: Any
    ) -> JsonDict:
        """One answer of `/sync`, once all these events can be in it."""
        if sent:
            self.wait(room_id, sent)
        arguments.setdefault("filter", lazy())
        return self.device.sync(since, **arguments)

    def wait(self, room_id: str, sent: list[str]) -> None:
        """Wait until every reader has these events, and can hand out those that are sticky."""
        everything = {"room": {"timeline": {"limit": 100}}}
        followed = follow_until_seen(self._watcher, room_id, sent, filter=everything)
        wait_for_readers(self._client, room_id, sent[-1])
        shown = [
            e for a in followed.answers for e in sticky_in(a, room_id) + timeline_in(a, room_id)
        ]
        stickies = [e["event_id"] for e in shown if EVENT_KEY in e and e["event_id"] in sent]
        until_known(self._watcher, room_id, stickies)


@pytest.fixture
def reader(bob: Client, room: str) -> Reader:
    """A device of bob's that has seen nothing yet."""
    return Reader(bob)


def members(answer: JsonDict, room_id: str, section: str = "state") -> list[str]:
    """The members whose membership is in a room's state."""
    events = joined_room(answer, room_id).get(section, {}).get("events", [])
    return sorted(e["state_key"] for e in events if e["type"] == "m.room.member")


def test_initial_sync(carol: Client, bob: Client, room: str, reader: Reader) -> None:
    # C12
    sent = send_sticky(carol, room)
    answer = reader.sync(room, sent)
    assert ids(sticky_in(answer, room)) == sent
    # A client always gets its own.
    assert members(answer, room) == sorted([bob.user_id, carol.user_id])
    # The state is what it is otherwise, and nobody else's answer is changed.
    types = {event["type"] for event in joined_room(answer, room)["state"]["events"]}
    assert types >= {"m.room.create", "m.room.power_levels", "m.room.name"}
    again = reader.sync(room, [], answer["next_batch"])
    assert joined_room(again, room) == {}


def test_they_come_once(carol: Client, bob: Client, room: str, reader: Reader) -> None:
    # C12
    since = reader.sync(room, [])["next_batch"]
    for expected in ([carol.user_id], []):
        sent = send_sticky(carol, room)
        answer = reader.sync(room, sent, since)
        since = answer["next_batch"]
        assert ids(sticky_in(answer, room)) == sent
        assert members(answer, room) == expected
    # A timeline counts as a section does.
    sent = [carol.send(room, type="org.example.plain")]
    answer = reader.sync(room, sent, since)
    assert ids(timeline_in(answer, room)) == sent
    assert members(answer, room) == []
    # Another device has its own memory.
    assert members(Reader(bob).sync(room, sent), room) == sorted([bob.user_id, carol.user_id])


@pytest.mark.repeats("workers")
def test_who_was_in_a_timeline(carol: Client, room: str, reader: Reader) -> None:
    # C12
    since = reader.sync(room, [])["next_batch"]
    plain = [carol.send(room, type="org.example.plain")]
    answer = reader.sync(room, plain, since)
    assert members(answer, room) == [carol.user_id]
    sent = send_sticky(carol, room)
    answer = reader.sync(room, sent, answer["next_batch"])
    assert ids(sticky_in(answer, room)) == sent
    assert members(answer, room) == []


@pytest.mark.repeats("workers")
def test_redundant_members(carol: Client, room: str, reader: Reader) -> None:
    # C12
    filter_json = lazy(include_redundant_members=True)
    since = reader.sync(room, [], filter=filter_json)["next_batch"]
    for _ in range(2):
        sent = send_sticky(carol, room)
        answer = reader.sync(room, sent, since, filter=filter_json)
        since = answer["next_batch"]
        assert ids(sticky_in(answer, room)) == sent
        assert members(answer, room) == [carol.user_id]


@pytest.mark.repeats("workers")
def test_a_gap(alice: Client, carol: Client, room: str, reader: Reader) -> None:
    # C12
    since = reader.sync(room, [])["next_batch"]
    sent = send_sticky(carol, room)
    plain = send_plain(alice, room, 3)
    for token in (since, None):
        answer = reader.sync(room, [*sent, plain[-1]], token, filter=lazy({"limit": 1}))
        entry = joined_room(answer, room)
        assert entry["timeline"]["limited"]
        assert ids(entry["timeline"]["events"]) == plain[-1:]
        assert ids(sticky_in(answer, room)) == sent
        assert {alice.user_id, carol.user_id} <= set(members(answer, room))


@pytest.mark.repeats("workers")
def test_the_filter_of_the_state(carol: Client, room: str, reader: Reader) -> None:
    # C12
    sent = send_sticky(carol, room)
    filters: list[JsonDict] = [
        {"types": ["m.room.name"]},
        {"not_types": ["m.room.member"]},
        {"not_senders": [carol.user_id]},
        {"not_rooms": [room]},
    ]
    for state in filters:
        answer = reader.sync(room, sent, filter=lazy(**state))
        assert ids(sticky_in(answer, room)) == sent
        assert carol.user_id not in members(answer, room), state


@pytest.mark.repeats("workers")
def test_who_loads_all_members(carol: Client, room: str, reader: Reader) -> None:
    # C12
    filter_json = {"room": {"timeline": {"types": ["org.example.*"]}}}
    since = reader.sync(room, [], filter=filter_json)["next_batch"]
    sent = send_sticky(carol, room)
    answer = reader.sync(room, sent, since, filter=filter_json)
    assert ids(sticky_in(answer, room)) == sent
    assert members(answer, room) == []


@pytest.mark.repeats("workers")
def test_full_state(carol: Client, room: str, reader: Reader) -> None:
    # C12
    since = reader.sync(room, [])["next_batch"]
    sent = send_sticky(carol, room)
    answer = reader.sync(room, sent, since, full_state="true")
    assert ids(sticky_in(answer, room)) == sent
    # It has had its own.
    assert members(answer, room) == [carol.user_id]


@pytest.mark.repeats("workers")
def test_a_membership_in_the_timeline(
    alice: Client, carol: Client, room: str, reader: Reader
) -> None:
    # C12: the state is that before the timeline
    since = reader.sync(room, [])["next_batch"]
    plain = alice.send(room, type="org.example.plain")
    member = {"membership": "join", "displayname": "Carol"}
    renamed = carol.send_state(room, "m.room.member", member, carol.user_id)
    sent = send_sticky(carol, room)
    filter_json = lazy({"types": ["m.room.member", "org.example.*"]})
    answer = reader.sync(room, [renamed, *sent], since, filter=filter_json)
    assert ids(timeline_in(answer, room)) == [plain, renamed]
    assert ids(sticky_in(answer, room)) == sent
    assert renamed not in ids(joined_room(answer, room)["state"]["events"])
    # And it is known from there.
    sent = send_sticky(carol, room)
    answer = reader.sync(room, sent, answer["next_batch"])
    assert members(answer, room) == []


@pytest.mark.repeats("workers")
def test_who_has_left(alice: Client, carol: Client, room: str, reader: Reader) -> None:
    # C12
    sent = send_sticky(carol, room)
    reader.wait(room, sent)
    carol.leave(room)
    answer = reader.sync(room, send_plain(alice, room, 1))
    assert ids(sticky_in(answer, room)) == sent
    assert carol.user_id in members(answer, room)


def state_after_names(homeserver: Homeserver, user: Client) -> dict[str, str]:
    """Which parameters ask for the state after the timeline, and where it is then.

    Until 1.163 there is one, and who may use it is set by an admin.
    """
    names = {"org.matrix.msc4222.use_state_after": "org.matrix.msc4222.state_after"}
    room_id = user.create_room()
    if "state_after" in joined_room(user.sync(use_state_after="true"), room_id):
        return {**names, "use_state_after": "state_after"}
    homeserver.register(admin=True).request(
        "PUT",
        f"/_synapse/admin/v1/experimental_features/{quote(user.user_id)}",
        json={"features": {"msc4222": True}},
    )
    return names


@pytest.mark.repeats("workers")
def test_state_after(
    homeserver: Homeserver, bob: Client, carol: Client, room: str, reader: Reader
) -> None:
    # C12
    for parameter, section in state_after_names(homeserver, bob).items():
        reader = Reader(bob)
        arguments = {parameter: "true"}
        answer = reader.sync(room, [], **arguments)
        # A membership that the timeline shows too.
        member = {"membership": "join", "displayname": f"Carol {parameter}"}
        renamed = carol.send_state(room, "m.room.member", member, carol.user_id)
        sent = send_sticky(carol, room)
        answer = reader.sync(
            room, [renamed, *sent], answer["next_batch"], filter=lazy(MEMBERS), **arguments
        )
        assert ids(timeline_in(answer, room)) == [renamed]
        assert ids(sticky_in(answer, room)) == sent
        assert renamed in ids(joined_room(answer, room)[section]["events"])
        sent = send_sticky(carol, room)
        answer = reader.sync(room, sent, answer["next_batch"], **arguments)
        assert ids(sticky_in(answer, room)) == sent
        assert members(answer, room, section) == []
        # From the start, with the membership in the timeline or not.
        for timeline in (None, MEMBERS):
            answer = reader.sync(room, sent, filter=lazy(timeline), **arguments)
            assert sent[-1] in ids(sticky_in(answer, room))
            assert {bob.user_id, carol.user_id} <= set(members(answer, room, section))


# C3, C12
def test_a_lost_page_brings_its_members_again(make_homeserver: MakeHomeserver) -> None:
    """Nothing but the section moved: Synapse cannot tell that response from the one before."""
    homeserver = make_homeserver(module_config={"max_events_per_sync": 1})
    homeserver.start()
    alice, bob, carol, reader = (homeserver.register() for _ in range(4))
    room = alice.create_room(preset="public_chat", name="Sticky")
    for member in (bob, carol, reader):
        member.join(room)
    alice.send(room)
    since = reader.sync(filter=lazy())["next_batch"]
    event_ids = send_sticky(bob, room) + send_sticky(carol, room)
    followed = follow_until_seen(reader, room, event_ids, since, filter=lazy())
    last_page = [n for n, a in enumerate(followed.answers) if sticky_in(a, room)][-1]
    token = followed.answers[last_page - 1]["next_batch"]
    # With another timeout Synapse does not answer from its cache of responses.
    for timeout_ms in (1, 2):
        again = reader.sync(token, filter=lazy(), timeout_ms=timeout_ms)
        assert ids(sticky_in(again, room)) == event_ids[1:]
        state = joined_room(again, room)["state"]["events"]
        assert carol.user_id in [event["state_key"] for event in state]
