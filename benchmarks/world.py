# SPDX-License-Identifier: AGPL-3.0-or-later
"""The users and rooms that the measurements work with: the same on every server."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.server import PLAIN, Server
from harness.client import Client


@dataclass(frozen=True)
class World:
    """Users and rooms.

    Attributes:
        directory: of a server that is stopped, to be copied.
        reader: a user in many rooms.
        writer: another one, in the rooms named here.
        small_room: these two are its members.
        large_room: with many local members, the reader not among them.
        gap_room: another one of these two alone.
        ten_events: the reader's filter for timelines of at most 10 events.
    """

    directory: Path
    reader: Client
    writer: Client
    small_room: str
    large_room: str
    gap_room: str
    ten_events: str


def build_world(
    directory: Path, rooms: int, members: int, progress: Callable[[str], None]
) -> World:
    """Make the users and rooms on a server of their own, and stop it.

    Args:
        rooms: how many the reader is in.
        members: of the large room.
        progress: told from time to time.
    """
    server = Server("template", PLAIN, directory)
    try:
        server.start()
        reader, writer = server.register("reader"), server.register("writer")
        small_room, gap_room = (_room_of_two(reader, writer) for _ in range(2))
        for number in range(rooms - 2):
            reader.create_room(preset="public_chat", name=f"Room {number}")
            if (number + 1) % 50 == 0:
                progress(f"{number + 1} rooms made")
        large_room = writer.create_room(preset="public_chat")
        for number in range(members - 1):
            server.register(f"member{number}").join(large_room)
            if (number + 1) % 50 == 0:
                progress(f"{number + 1} members joined")
        ten_events = reader.request(
            "POST",
            f"/_matrix/client/v3/user/{reader.user_id}/filter",
            json={"room": {"timeline": {"limit": 10}}},
        )["filter_id"]
    finally:
        server.close()
    return World(directory, reader, writer, small_room, large_room, gap_room, ten_events)


def copy_server(origin: Path, name: str, kind: str, directory: Path, **options: Any) -> Server:
    """Make a server, not started yet, that has the users and rooms of a stopped one.

    Args:
        options: of the server.
    """
    directory.mkdir(parents=True)
    for path in [*origin.glob("homeserver.db*"), origin / "signing.key"]:
        shutil.copy(path, directory)
    return Server(name, kind, directory, **options)


def _room_of_two(reader: Client, writer: Client) -> str:
    room_id = reader.create_room(preset="public_chat")
    writer.join(room_id)
    return room_id
