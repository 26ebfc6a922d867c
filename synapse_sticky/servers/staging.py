# SPDX-License-Identifier: AGPL-3.0-or-later
"""Whether a server may have thrown away what it has just taken. No Synapse, no clock.

A receiving Synapse stages what it is sent, in each room, and reads it afterwards.
Once a hundred events are staged in a room it throws away all but the newest, and
has said by then that it took them. So what it says is believed only as long as few
events can be staged; else it is sent what is sticky once more when it has read the rest.
"""

from typing import Final

import attr

_BELIEVED: Final = 40
"""Up to how many staged events, as we count them: others send to the server as well."""

_READ_PER_S: Final = 20
"""How many events of a room a server reads in a second, however slow it is."""


@attr.s(slots=True, auto_attribs=True)
class _Room:
    staged: float
    since_ts: int
    newest_id: str
    # What was asked for last, and how much was staged up to then.
    asked_id: str = ""
    asked_staged: float = 0

    def left(self, now_ts: int) -> float:
        return max(0, self.staged - (now_ts - self.since_ts) * _READ_PER_S / 1000)


class Staging:
    """What may still be staged at each server, by room."""

    def __init__(self) -> None:
        self._rooms: dict[tuple[str, str], _Room] = {}

    def add(self, server_name: str, room_id: str, count: int, newest_id: str, now_ts: int) -> None:
        """The server took that many events of a room, the last of which is this one."""
        room = self._rooms.setdefault((server_name, room_id), _Room(0, now_ts, newest_id))
        room.staged, room.since_ts = room.left(now_ts) + count, now_ts
        room.newest_id = newest_id

    def newest_unread(self, server_name: str, room_id: str, now_ts: int) -> str | None:
        """None if what the server says can be believed; else which event it reads last."""
        room = self._rooms.get((server_name, room_id))
        if room is None or room.left(now_ts) <= _BELIEVED:
            return None
        return room.newest_id

    def ask(self, server_name: str, room_id: str, now_ts: int) -> None:
        """The server is asked now whether it has read the newest event."""
        room = self._rooms.get((server_name, room_id))
        if room is not None:
            room.asked_id, room.asked_staged = room.newest_id, room.left(now_ts)

    def has_read(self, server_name: str, room_id: str, event_id: str, now_ts: int) -> None:
        """The server has read everything of this room up to this event."""
        room = self._rooms.get((server_name, room_id))
        if room is None:
            return
        if room.newest_id == event_id:
            del self._rooms[server_name, room_id]
        elif room.asked_id == event_id:
            room.staged = max(0, room.left(now_ts) - room.asked_staged)
            room.since_ts, room.asked_staged = now_ts, 0

    def expire(self, now_ts: int) -> None:
        """Forgets what must have been read."""
        for key in [key for key, room in self._rooms.items() if not room.left(now_ts)]:
            del self._rooms[key]
