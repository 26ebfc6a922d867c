"""From Synapse's own sticky events to the module, back, and again: clients go on as they were."""

from dataclasses import dataclass, replace

import pytest
import synapse.types.rest.client as rest_types
from synapse.handlers.sync import JoinedSyncResult

from harness.client import Client, MatrixError
from harness.homeserver import PERSISTERS, READERS
from harness.wait import eventually
from tests.sliding import Connection, subscription
from tests.support import (
    NO_TIMELINE,
    MakeHomeserver,
    ids,
    section_ids,
    send_plain,
    send_sticky,
    serious_problems,
    sticky_in,
    timeline_in,
)

pytestmark = pytest.mark.slow

ALL = {"room": {"timeline": {"limit": 50}}}
OWN = {"experimental_features": {"msc4354_enabled": True}}

# What Synapse's own implementation hands out, in this release.
OWN_TOKEN = getattr(rest_types, "SlidingSyncStickyEventsToken", None)
OWN_HAS_SECTION = "sticky" in JoinedSyncResult.__annotations__
OWN_HAS_EXTENSION = OWN_TOKEN is not None
# From 1.163, where several writers made its tokens longer.
OWN_TAKES_OURS = OWN_TOKEN is not None and OWN_TOKEN.PATTERN.match("sticky_m0~1.2~1.1")


@dataclass
class Reader:
    """A client that reads one room in all ways, and goes on in each from where it was."""

    client: Client
    room_id: str

    def __post_init__(self) -> None:
        self.tokens: dict[str, str | None] = {"timeline": None, "section": None}
        self.connections = {
            name: Connection(self.client, {}, {self.room_id: subscription(timeline_limit=limit)})
            for name, limit in (("sliding timeline", 50), ("sliding section", 0))
        }

    def use(self, client: Client) -> None:
        """Read by another process from now on."""
        self.client = client
        for connection in self.connections.values():
            connection.client = client

    def go_on(self) -> dict[str, set[str]]:
        """Read on in all ways, once, and return what came."""
        came: dict[str, set[str]] = {}
        for name, filter_json in (("timeline", ALL), ("section", NO_TIMELINE)):
            answer = self.client.sync(self.tokens[name], filter=filter_json)
            self.tokens[name] = answer["next_batch"]
            came[name] = {
                *ids(sticky_in(answer, self.room_id)),
                *ids(timeline_in(answer, self.room_id)),
            }
        for name, connection in self.connections.items():
            sliding = connection.ask()
            came[name] = {*sliding.sticky(self.room_id), *sliding.timeline(self.room_id)}
        return came

    def read(self, timelines: list[str], section: list[str], sliding: list[str]) -> None:
        """Read on until these have come in timelines, in `/sync`'s section, and in the other."""
        missing = {
            "timeline": set(timelines),
            "section": set(section),
            "sliding timeline": set(timelines),
            "sliding section": set(sliding),
        }

        def complete() -> bool:
            for name, events in self.go_on().items():
                missing[name] -= events
            assert not any(missing.values()), missing
            return True

        eventually(complete, what="everything that was sent")

    def is_locked_out(self) -> bool:
        """Whether Sliding Sync refuses what the client holds, also if it begins anew."""
        refusals = []
        for connection in self.connections.values():
            for attempt in (connection, connection.without_pos()):
                try:
                    attempt.peek()
                except MatrixError as error:
                    refusals.append((error.status, error.errcode))
        assert set(refusals) <= {(400, "M_UNKNOWN_POS")}
        assert len(refusals) in (0, 4)
        return refusals != []

    def forget_since(self) -> None:
        """Begin anew in Sliding Sync, as a client does that is started again."""
        for name, connection in self.connections.items():
            self.connections[name] = replace(connection.anew(), since=None)


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_clients_go_on_in_both_directions(make_homeserver: MakeHomeserver, kind: str) -> None:
    """No error, no plain event lost, and no sticky one that Synapse's own could know of."""
    # C1, C9, X5, O4
    homeserver = make_homeserver(kind, module=False, extra_config=OWN)
    homeserver.start()
    alice, bob = homeserver.register(), homeserver.register()
    room = alice.create_room(preset="public_chat")
    bob.join(room)
    reader = Reader(bob, room)
    sticky = send_sticky(alice, room)
    reader.read(sticky, sticky if OWN_HAS_SECTION else [], sticky if OWN_HAS_EXTENSION else [])

    def switch(module: bool) -> tuple[list[str], list[str], list[str]]:
        """What was sent before, and after: the sticky of both, and the plain."""
        before, plain = send_sticky(alice, room, 2), send_plain(alice, room, 2)
        homeserver.stop()
        homeserver.reconfigure(module=module)
        homeserver.start()
        return before, send_sticky(alice, room, 2), plain + send_plain(alice, room, 2)

    before, after, plain = switch(module=True)
    sticky += before + after
    reader.read(before + after + plain, sticky, sticky)

    before, after, plain = switch(module=False)
    locked_out = reader.is_locked_out()
    assert locked_out == (OWN_HAS_EXTENSION and not (OWN_TAKES_OURS and kind == "postgres"))
    if locked_out:
        reader.forget_since()
    # What was sent under the module is no sticky event for Synapse's own.
    reader.read(
        before + after + plain,
        after if OWN_HAS_SECTION else [],
        after if OWN_HAS_EXTENSION else [],
    )
    sticky += before + after

    before, after, plain = switch(module=True)
    # And it is again for the module, which delivers all of it to who has read Synapse's own.
    sticky += before + after
    unread = sticky if OWN_HAS_EXTENSION else sticky[-8:]
    reader.read(before + after + plain, sticky, unread)


def test_workers_that_lack_the_module(make_homeserver: MakeHomeserver) -> None:
    """They have Synapse's own instead. No error, and nothing lost: it may come more than once."""
    # C1, C9, O4
    lacking = (READERS[1], PERSISTERS[1])
    homeserver = make_homeserver("workers", own_flag=True, lacking=lacking)
    homeserver.start()
    alice, bob = homeserver.register(), homeserver.register()
    with_module, without = (bob.via(url) for url in homeserver.client_urls)
    written_by: set[str] = set()
    # As many rooms as it takes until both have written one.
    while written_by != set(PERSISTERS):
        room = alice.create_room(preset="public_chat")
        bob.join(room)
        sticky, plain = send_sticky(alice, room, 2), send_plain(alice, room, 2)
        query = "SELECT instance_name FROM events WHERE event_id = ?"
        written_by.update(name for (name,) in homeserver.query(query, plain[0]))
        until_seen(with_module, room, sticky + plain)
        eventually(lambda r=room: len(section_ids(with_module, r)) == 2, what="the section")  # type: ignore[misc]
        until_seen(without, room, plain)
        reader = Reader(bob, room)
        timeline: list[str] = []
        sections: dict[str, set[str]] = {"section": set(), "sliding section": set()}
        for client in (with_module, without, with_module, without, with_module):
            reader.use(client)
            came = reader.go_on()
            timeline += came["timeline"]
            if client is with_module:
                sections = {name: sections[name] | came[name] for name in sections}
        assert set(timeline) >= {*sticky, *plain}
        assert all(timeline.count(name) == 1 for name in plain)
        assert all(events >= set(sticky) for events in sections.values())
    assert serious_problems(homeserver.problems_since({})) == []


def until_seen(client: Client, room_id: str, event_ids: list[str]) -> None:
    """Wait until the process that answers this client has these."""

    def seen() -> bool:
        answer = client.sync(filter=ALL)
        found = {*ids(sticky_in(answer, room_id)), *ids(timeline_in(answer, room_id))}
        return found >= set(event_ids)

    eventually(seen, what="the events")
