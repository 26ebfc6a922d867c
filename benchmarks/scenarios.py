# SPDX-License-Identifier: AGPL-3.0-or-later
"""What is measured on the three servers: without sticky events, Synapse's own, and ours."""

from typing import Any, Final

from benchmarks.measure import Scenario
from benchmarks.server import Server, parsed
from benchmarks.world import World

STICKY_MS: Final = 3_600_000
GAP: Final = 30
"""How many sticky events, and then as many plain ones, a gap consists of."""


class Send(Scenario):
    """Sends to a room."""

    def __init__(
        self,
        world: World,
        key: str,
        title: str,
        room_id: str,
        *,
        sticky: bool = False,
        burst: int = 1,
    ) -> None:
        self.key = key
        self.title = title
        self.burst = burst
        self._world = world
        self._room_id = room_id
        self._sticky = sticky

    def request(self, server: Server) -> bytes:
        """Send, without the parameter where nobody knows it."""
        sticky_ms = STICKY_MS if self._sticky and server.has_sticky_events else None
        return server.send(self._world.writer, self._room_id, sticky_ms)


class Sync(Scenario):
    """Syncs a user of many rooms, incrementally."""

    def __init__(self, world: World, key: str, title: str) -> None:
        self.key = key
        self.title = title
        self.world = world
        self.since: dict[str, str] = {}

    def begin(self, server: Server) -> None:
        """Note where to sync from."""
        self.since[server.name] = server.current_token(self.world.reader)

    def request(self, server: Server) -> bytes:
        """Sync from where the last one ended."""
        return server.sync(self.world.reader, self.since[server.name])

    def check(self, server: Server, body: bytes) -> None:
        """Go on from this answer next time."""
        answer = parsed(body)
        self.check_rooms(server, answer.get("rooms", {}).get("join", {}))
        self.since[server.name] = answer["next_batch"]

    def check_rooms(self, server: Server, rooms: Any) -> None:
        """Look at the joined rooms of the answer."""
        raise NotImplementedError


class IdleSync(Sync):
    """Nothing is new."""

    def check_rooms(self, server: Server, rooms: Any) -> None:
        assert rooms == {}, f"{server.name}: nothing was to be new, but there is {rooms}"


class SyncOfOneEvent(Sync):
    """One plain event is new."""

    prepares = True

    def prepare(self, server: Server) -> None:
        server.send(self.world.writer, self.world.small_room)

    def check_rooms(self, server: Server, rooms: Any) -> None:
        (room_id,) = rooms
        assert room_id == self.world.small_room
        assert len(rooms[room_id]["timeline"]["events"]) == 1


class GappySync(Sync):
    """Many events are new, more than the timeline shows, and the older ones are sticky.

    Every request of a round reads the same gap.
    """

    patience = 2

    def prepare_round(self, server: Server) -> None:
        self.since[server.name] = server.current_token(self.world.reader)
        for number in range(2 * GAP):
            sticky_ms = STICKY_MS if server.has_sticky_events and number < GAP else None
            server.send(self.world.writer, self.world.gap_room, sticky_ms)

    def request(self, server: Server) -> bytes:
        since, ten_events = self.since[server.name], self.world.ten_events
        return server.sync(self.world.reader, since, ten_events)

    def check(self, server: Server, body: bytes) -> None:
        answer = parsed(body)
        (room,) = answer["rooms"]["join"].values()
        assert len(room["timeline"]["events"]) == 10
        sticky = len(room.get("msc4354_sticky", {}).get("events", ()))
        assert sticky == (GAP if server.has_sticky_events else 0), f"{server.name}: {sticky}"


def comparisons(world: World, rooms: int, members: int) -> list[Scenario]:
    """All scenarios that compare the three servers, in the order to run them in."""
    return [
        IdleSync(world, "idle_sync", f"`/sync` with nothing new, user in {rooms} rooms"),
        SyncOfOneEvent(
            world, "sync_one_event", f"`/sync` with one new plain event, user in {rooms} rooms"
        ),
        Send(world, "send_small", "Plain send to a room with 2 members", world.small_room),
        Send(world, "send_large", f"Plain send to a room with {members} members", world.large_room),
        Send(
            world,
            "send_burst",
            "Plain sends, 10 right after each other, room with 2 members",
            world.small_room,
            burst=10,
        ),
        GappySync(
            world, "gappy_sync", f"`/sync` over a gap of {GAP} sticky and {GAP} plain events"
        ),
        Send(
            world,
            "sticky_send",
            "Sticky send to a room with 2 members (without: a plain one)",
            world.small_room,
            sticky=True,
        ),
    ]
