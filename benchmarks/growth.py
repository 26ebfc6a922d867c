# SPDX-License-Identifier: AGPL-3.0-or-later
"""What it costs that there are many sticky events elsewhere: servers of different sizes."""

import base64
import contextlib
import hashlib
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import attr

from benchmarks.measure import Scenario
from benchmarks.scenarios import IdleSync, Sync
from benchmarks.server import STICKY, Server
from benchmarks.world import World, copy_server
from synapse_sticky.storage.rows import EventChange

ROOMS: Final = 1_000
"""In how many rooms the events are. No user of ours is in any of them."""
_LIFETIME_MS: Final = 3_600_000
_FIRST_STREAM_ORDERING: Final = 10_000


def seed_changes(count: int, now_ts: int) -> Iterator[EventChange]:
    """Sticky events that look like real ones. Each has a sender of its own.

    That is what calls look like: every participant has one sticky event.
    """
    for number in range(count):
        yield EventChange(
            event_id=f"${_digest('event', number)}",
            room_id=f"!{_digest('room', number % ROOMS)}",
            sender=f"@participant-{number:06}:elsewhere.example.org",
            position=now_ts - count + number,
            expires_ts=now_ts + _LIFETIME_MS + number,
            stream_ordering=_FIRST_STREAM_ORDERING + number,
        )


def _digest(kind: str, number: int) -> str:
    digest = hashlib.sha256(f"{kind} {number}".encode()).digest()
    return base64.urlsafe_b64encode(digest).decode().rstrip("=")


def seed(server: Server, count: int) -> None:
    """Put sticky events into the database of a server that is stopped."""
    now_ts = int(time.time() * 1000)
    with contextlib.closing(sqlite3.connect(server.directory / "homeserver.db")) as connection:
        columns = [field.name for field in attr.fields(EventChange)] + ["revision"]
        connection.executemany(
            f"INSERT INTO synapse_sticky_events ({', '.join(columns)}) "
            f"VALUES ({', '.join('?' * len(columns))})",
            ((*attr.astuple(change), change.position) for change in seed_changes(count, now_ts)),
        )
        connection.execute("UPDATE synapse_sticky_progress SET last_position = ?", (now_ts,))
        connection.commit()


def growing_servers(world: World, directory: Path, sizes: list[int]) -> dict[int, Server]:
    """One server for each size, running."""
    # Once without seed, so that the tables are there.
    empty = copy_server(world.directory, "empty", STICKY, directory / "empty")
    try:
        empty.start()
        _wait_for_progress(empty)
    finally:
        empty.close()
    servers = {
        size: copy_server(empty.directory, str(size), STICKY, directory / str(size))
        for size in sizes
    }
    for size, server in servers.items():
        seed(server, size)
        server.start()
    return servers


def _wait_for_progress(server: Server) -> None:
    while not server.query("SELECT last_position FROM synapse_sticky_progress"):
        time.sleep(0.1)


class SyncFromBefore(Sync):
    """Syncs from before all of the sticky events, none of which is the user's."""

    def begin(self, server: Server) -> None:
        """Sync from a token without a position, as Synapse without the module writes them."""
        super().begin(server)
        parts = self.since[server.name].split("_")
        parts[_POSITION_IN_TOKEN] = "0"
        self.since[server.name] = "_".join(parts)

    def check(self, server: Server, body: bytes) -> None:
        """Nothing was new. Sync from the same token again."""
        assert b"msc4354_sticky" not in body


_POSITION_IN_TOKEN: Final = 8


class SendAndSync(IdleSync):
    """A plain event is sent, and synced."""

    def request(self, server: Server) -> bytes:
        server.send(self.world.writer, self.world.small_room)
        return super().request(server)

    def check_rooms(self, server: Server, rooms: Any) -> None:
        assert list(rooms) == [self.world.small_room]


def growth_scenarios(world: World) -> list[Scenario]:
    """All scenarios that compare the sizes."""
    return [
        IdleSync(world, "growth_idle_sync", "`/sync` with nothing new"),
        SyncFromBefore(
            world, "growth_old_sync", "`/sync` from before all of the sticky events were sent"
        ),
        SendAndSync(world, "growth_send_sync", "Plain send, and the `/sync` that shows it"),
    ]
