# SPDX-License-Identifier: AGPL-3.0-or-later
"""After an outage: which rooms to ask about, when, and which servers. No Synapse, no clock.

Times in ms are those of any clock that never jumps.
"""

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Final

import attr

# When to try again if no server of a room has answered. After an hour nothing is sticky any more.
_RETRY_AFTER_MS: Final = (60_000, 300_000, 900_000)
# A server that has failed is not tried for another room meanwhile. Shorter than the above.
_AVOID_MS: Final = 50_000
# Nor one that has failed again, as soon as it could be tried: it may hang for long.
_AVOID_AGAIN_MS: Final = 290_000
# Nor sooner than that if it is back in the meantime: it may come and go all the time.
_AVOID_BACK_MS: Final = 10_000
# A room is asked about again after that time at the earliest, however often servers come and go.
_REST_MS: Final = 600_000


@attr.s(slots=True, auto_attribs=True)
class _Room:
    # Since when it waits.
    added_ms: int
    due_ms: int
    # When the next try comes by itself. One for a server that is back may come sooner.
    retry_ms: int
    tries: int = 0
    is_asked: bool = False
    # The servers that have not answered in any of the tries.
    failed: set[str] = attr.Factory(set)


@attr.s(slots=True, frozen=True, auto_attribs=True)
class _Failure:
    at_ms: int
    avoided_until_ms: int


class Outages:
    """The rooms that servers are to be asked about, and the servers that do not answer.

    Args:
        max_rooms: how many rooms wait at most, beside those that rest since they were asked about
            a moment ago. Those that come later are passed over.
    """

    def __init__(self, max_rooms: int) -> None:
        self._max_rooms = max_rooms
        self._rooms: dict[str, _Room] = {}
        self._rests_until_ms: dict[str, int] = {}
        self._failures: dict[str, _Failure] = {}

    def add(self, room_ids: Iterable[str], due_ms: int) -> None:
        """Let these rooms be asked about, the most important first."""
        _drop_past(self._rests_until_ms, due_ms)
        waiting = len(self._rooms.keys() - self._rests_until_ms.keys())
        for room_id in room_ids:
            begins_ms = self._rests_until_ms.get(room_id, due_ms)
            if room_id in self._rooms or (begins_ms == due_ms and waiting >= self._max_rooms):
                continue
            self._rooms[room_id] = _Room(due_ms, begins_ms, begins_ms)
            waiting += begins_ms == due_ms

    def add_gaps(self, gaps: Mapping[str, int], now_ms: int) -> None:
        """Let rooms be asked about in which events are missing before a new one.

        Args:
            gaps: when the last of those new ones came, by room. Where a room was asked about
                later, that has found out what it could.
        """
        _drop_past(self._rests_until_ms, now_ms)
        asked_ms = {room_id: ms - _REST_MS for room_id, ms in self._rests_until_ms.items()}
        self.add([r for r, ms in gaps.items() if ms > asked_ms.get(r, ms - 1)], now_ms)

    def on_back(self, server_names: Iterable[str], now_ms: int) -> None:
        """Servers are back: try again soon the rooms in which one of them has failed."""
        back_ms = {}
        for server_name in server_names:
            failure = self._failures.pop(server_name, _Failure(now_ms - _AVOID_BACK_MS, now_ms))
            back_ms[server_name] = max(now_ms, failure.at_ms + _AVOID_BACK_MS)
            if back_ms[server_name] > now_ms:
                self._failures[server_name] = _Failure(failure.at_ms, back_ms[server_name])
        for room in self._rooms.values():
            soonest_ms = [back_ms[name] for name in room.failed if name in back_ms]
            room.due_ms = min([room.due_ms, *soonest_ms])
            room.failed.difference_update(back_ms)

    def due(self, now_ms: int) -> str | None:
        """Return the room to ask about now, if there is any, until :meth:`ended`."""
        waiting = {room_id: room for room_id, room in self._rooms.items() if not room.is_asked}
        room_id = min(waiting, key=lambda room_id: waiting[room_id].due_ms, default=None)
        if room_id is None or waiting[room_id].due_ms > now_ms:
            return None
        waiting[room_id].is_asked = True
        return room_id

    def waits_since_ms(self, room_id: str) -> int:
        """Return when a room that is asked about was added."""
        return self._rooms[room_id].added_ms

    @property
    def next_ms(self) -> int | None:
        """When the next room is due, None if there is none."""
        due = (room.due_ms for room in self._rooms.values() if not room.is_asked)
        return min(due, default=None)

    def failed_last(self, room_id: str, server_names: Iterable[str]) -> list[str]:
        """Put servers last that have failed in a room, so that each try gets on to others."""
        return sorted(server_names, key=self._rooms[room_id].failed.__contains__)

    def ended(
        self, room_id: str, was_answered: bool, now_ms: int, failed: Collection[str] = ()
    ) -> None:
        """Take note of the end of a try.

        Args:
            failed: the servers that have not answered.
        """
        room = self._rooms[room_id]
        room.is_asked = False
        room.failed.update(failed)
        if was_answered:
            del self._rooms[room_id]
            self._rests_until_ms[room_id] = now_ms + _REST_MS
        elif now_ms < room.retry_ms:
            room.due_ms = room.retry_ms
        elif room.tries < len(_RETRY_AFTER_MS):
            room.due_ms = room.retry_ms = now_ms + _RETRY_AFTER_MS[room.tries]
            room.tries += 1
        else:
            del self._rooms[room_id]

    def avoid(self, server_name: str, now_ms: int, has_failed: bool = True) -> None:
        """Take note of a server that has failed, or was slow."""
        self._failures = {
            name: failure
            for name, failure in self._failures.items()
            if failure.avoided_until_ms + _AVOID_AGAIN_MS > now_ms
        }
        until_ms = now_ms + _AVOID_MS
        failure = self._failures.get(server_name)
        if failure is not None and failure.avoided_until_ms > now_ms:
            # In several rooms at the same time.
            until_ms = max(until_ms, failure.avoided_until_ms)
        elif failure is not None and has_failed:
            until_ms = now_ms + _AVOID_AGAIN_MS
        self._failures[server_name] = _Failure(now_ms, until_ms)

    def avoids(self, server_name: str, now_ms: int) -> bool:
        """Whether a server has failed a moment ago."""
        failure = self._failures.get(server_name)
        return failure is not None and failure.avoided_until_ms > now_ms


def _drop_past(times: dict[str, int], now_ms: int) -> None:
    for name in [name for name, until_ts in times.items() if until_ts <= now_ms]:
        del times[name]


def rooms_by_importance(
    configured: Sequence[str], live_until: Mapping[tuple[str, str], int]
) -> list[str]:
    """Return the configured rooms, and those with sticky events, the longest-lived first.

    Args:
        live_until: when the last sticky event of a server in a room expires or has expired,
            by room and server.
    """
    latest: dict[str, int] = {}
    for (room_id, _), until_ts in live_until.items():
        latest[room_id] = max(until_ts, latest.get(room_id, until_ts))
    return list(dict.fromkeys([*configured, *sorted(latest, key=lambda r: (-latest[r], r))]))


def servers_to_ask(
    room_id: str, in_room: Collection[str], live_until: Mapping[tuple[str, str], int]
) -> list[str]:
    """Return the servers of a room in the order in which to ask them.

    By turns those whose sticky events live longest there, which have most likely sent more, and
    those that are first in the given order: no server can put itself before all others.
    """
    liveliest = sorted(in_room, key=lambda server: -live_until.get((room_id, server), 0))
    by_turns = zip(liveliest, in_room, strict=True)
    return list(dict.fromkeys(itertools.chain.from_iterable(by_turns)))
