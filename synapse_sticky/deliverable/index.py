# SPDX-License-Identifier: AGPL-3.0-or-later
"""The deliverable, unexpired sticky events, in memory. No Synapse, no clock.

Every process keeps one. It answers what a client has not seen yet in time
proportional to that answer: it costs nothing to have many sticky events in
rooms that a user is not in, nor to be in many rooms.
"""

import hashlib
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from typing import Final

import attr

from synapse_sticky.seams.bounds import NOTHING_READ, Bounds
from synapse_sticky.storage.rows import EventChange, JoinChange

_EXPIRY_BUCKET_MS: Final = 10_000


LiveAmong = Callable[[Iterable[str]], set[str]]
"""Returns those of these event IDs whose events are deliverable and unexpired."""


@attr.s(slots=True, frozen=True, auto_attribs=True, eq=False)
class StickyEvent:
    """A deliverable sticky event.

    Attributes:
        sender_hash: the :func:`hash_of_sender`, which takes a quarter of the memory of
            the user ID; most senders have one sticky event.
        position: its place in the order in which events became deliverable
            here; the larger, the later.
        expires_ts: when it stops being sticky, in ms since the epoch.
        stream_ordering: where Synapse has put it when it was stored.
        owed: whether the other servers in its room are owed it by this one.
    """

    event_id: str
    room_id: str
    sender_hash: int
    position: int
    expires_ts: int
    stream_ordering: int
    owed: bool


@attr.s(slots=True, frozen=True, auto_attribs=True)
class Due:
    """An event that a client has not seen, and the position at which it is due."""

    position: int
    event: StickyEvent


def hash_of_sender(user_id: str) -> int:
    """Return 64 bits that stand for a user ID, the same in every process."""
    return int.from_bytes(hashlib.blake2b(user_id.encode(), digest_size=8).digest(), "big")


def _position(event: StickyEvent) -> int:
    return event.position


class StickyIndex:
    """The events, by ID, by room and by position.

    Attributes:
        position: the largest position that this process knows of.
        read: how far Synapse's streams were read for what is here. A sticky event or a
            join within these bounds that is not here does not matter, or not any more.
    """

    def __init__(self) -> None:
        self.position = 0
        self.read = NOTHING_READ
        self._events: dict[str, StickyEvent] = {}
        self._held: dict[str, int] = {}
        self._released: set[str] = set()
        self._by_room: dict[str, list[StickyEvent]] = {}
        # Everything by position. What has expired or moved stays until the next
        # clean-up and is recognised by not being in `_events` any more.
        self._log: list[StickyEvent] = []
        self._joins: dict[str, dict[str, JoinChange]] = {}
        self._expiring: dict[int, list[str]] = {}

    def __len__(self) -> int:
        return len(self._events)

    @property
    def held_count(self) -> int:
        """How many recorded, unexpired events are held back."""
        return len(self._held)

    @property
    def rooms(self) -> Mapping[str, object]:
        """The rooms that have deliverable events, as keys."""
        return self._by_room

    def get(self, event_id: str) -> StickyEvent | None:
        """The deliverable event of this ID. It may have expired a moment ago."""
        return self._events.get(event_id)

    def live_among(self, event_ids: Iterable[str], now_ts: int) -> set[str]:
        """Return those of these IDs whose events are deliverable and unexpired."""
        events = self._events
        return {
            event_id
            for event_id in event_ids
            if (event := events.get(event_id)) is not None and event.expires_ts > now_ts
        }

    def knows(self, event_id: str) -> bool:
        """Whether the event was noticed, be it deliverable or held."""
        return event_id in self._events or event_id in self._held

    def was_held(self, event_id: str) -> bool:
        """Whether a deliverable event was held at first."""
        return event_id in self._released

    def sticky_until_ts(self, event_id: str) -> int | None:
        """Until when a noticed event is sticky, in ms since the epoch.

        0 while it is held: then it is an ordinary event. None if it was not noticed.
        """
        event = self._events.get(event_id)
        if event is not None:
            return event.expires_ts
        return 0 if event_id in self._held else None

    def join(self, member: str, room_id: str) -> JoinChange | None:
        """This member's newest join to the room, None if it does not matter (any more)."""
        return self._joins.get(member, {}).get(room_id)

    @property
    def joins(self) -> Iterator[JoinChange]:
        """All newest joins that matter."""
        return (join for joins in self._joins.values() for join in joins.values())

    def joins_after(self, member: str, position: int) -> list[JoinChange]:
        """This member's joins after a position that matter, oldest first."""
        joins = (j for j in self._joins.get(member, {}).values() if j.position > position)
        return sorted(joins, key=lambda join: join.position)

    def apply(
        self,
        events: Iterable[EventChange],
        joins: Iterable[JoinChange],
        position: int,
        read: Bounds = NOTHING_READ,
    ) -> None:
        """Take over what the store says, oldest first, and how far that goes."""
        moved: set[str] = set()
        for change in events:
            known = self._events.get(change.event_id)
            if known is not None and known.position == change.position:
                # Read once more: the log must stay in order.
                continue
            expires_ts = self._held.get(change.event_id) if known is None else known.expires_ts
            if expires_ts != change.expires_ts:
                bucket = change.expires_ts // _EXPIRY_BUCKET_MS
                self._expiring.setdefault(bucket, []).append(change.event_id)
            self._held.pop(change.event_id, None)
            self._released.discard(change.event_id)
            if known is not None:
                del self._events[change.event_id]
                moved.add(known.room_id)
            if change.position is None:
                self._held[change.event_id] = change.expires_ts
                continue
            event = StickyEvent(
                change.event_id,
                sys.intern(change.room_id),
                hash_of_sender(change.sender),
                change.position,
                change.expires_ts,
                change.stream_ordering,
                bool(change.owed),
            )
            self._events[event.event_id] = event
            if change.held_reason:
                self._released.add(event.event_id)
            self._by_room.setdefault(event.room_id, []).append(event)
            self._log.append(event)
        # Once for each room: many of its events may have moved, when it was switched off.
        for room_id in moved:
            self._keep_live(room_id)
        for join in joins:
            self._joins.setdefault(sys.intern(join.member), {})[sys.intern(join.room_id)] = join
        self.position = max(self.position, position)
        self.note_read(read)

    def has_passed(self, instance_name: str | None, stream_ordering: int) -> bool:
        """Whether Synapse's streams were read beyond an event that was written there."""
        return self.read.cover(instance_name, stream_ordering)

    def note_read(self, read: Bounds) -> None:
        """Synapse's streams were read as far as that, and what matters of it is here."""
        self.read = self.read.joined(read)

    def after(self, position: int) -> list[StickyEvent]:
        """All events that became deliverable after a position, oldest first."""
        return self._log[bisect_right(self._log, position, key=_position) :]

    def due(self, user_id: str | None, rooms: Set[str], since: int, now_ts: int) -> list[Due]:
        """What a client has not seen, in the order in which to deliver it.

        Args:
            user_id: then an event is due at its position, or where this user
                joined its room if that is later: the client's position alone
                says what it has seen. None to leave joins out of account.
            rooms: the joined rooms to look into.
            since: the position that the client has read up to.
        """
        joins = self.joins_after(user_id, since) if user_id is not None else []
        joined_since = {join.room_id: join.position for join in joins if join.room_id in rooms}
        first = bisect_right(self._log, since, key=_position)
        if len(self._log) - first <= len(rooms):
            found = [
                Due(event.position, event)
                for event in self._log[first:]
                if event.room_id in rooms
                and event.room_id not in joined_since
                and self._is_live(event, now_ts)
            ]
        else:
            smaller, larger = sorted((self._by_room.keys(), rooms), key=len)
            found = [
                Due(event.position, event)
                for room_id in smaller
                if room_id in larger and room_id not in joined_since
                for event in self._room_after(room_id, since)
                if self._is_live(event, now_ts)
            ]
        for room_id, join_position in joined_since.items():
            found += [
                Due(max(event.position, join_position), event)
                for event in self.in_room(room_id, now_ts)
            ]
        found.sort(key=lambda due: (due.position, due.event.position))
        return found

    def in_room(self, room_id: str, now_ts: int) -> list[StickyEvent]:
        """All deliverable, unexpired events of a room, oldest first."""
        return [e for e in self._by_room.get(room_id, ()) if self._is_live(e, now_ts)]

    def owed_after(self, room_id: str, position: int, now_ts: int) -> Iterator[StickyEvent]:
        """What the servers in a room are owed after a position, oldest first.

        To be used up before the index changes.
        """
        events = self._by_room.get(room_id, ())
        for number in range(bisect_right(events, position, key=_position), len(events)):
            event = events[number]
            if event.owed and self._is_live(event, now_ts):
                yield event

    def expire(self, now_ts: int) -> None:
        """Forgets what has expired, in time proportional to how much that is."""
        touched: set[str] = set()
        for bucket in [b for b in self._expiring if (b + 1) * _EXPIRY_BUCKET_MS <= now_ts]:
            for event_id in self._expiring.pop(bucket):
                event = self._events.get(event_id)
                # An event of this ID may have been recorded anew, to expire later.
                if event is not None and event.expires_ts <= now_ts:
                    del self._events[event_id]
                    self._released.discard(event_id)
                    touched.add(event.room_id)
                elif self._held.get(event_id, now_ts + 1) <= now_ts:
                    del self._held[event_id]
        for room_id in touched:
            self._keep_live(room_id)
        if len(self._log) > 2 * len(self._events):
            self._log = [e for e in self._log if self._events.get(e.event_id) is e]
        for member in [m for m, joins in self._joins.items() if _any_expired(joins, now_ts)]:
            joins = {r: j for r, j in self._joins[member].items() if j.expires_ts > now_ts}
            if joins:
                self._joins[member] = joins
            else:
                del self._joins[member]

    def _is_live(self, event: StickyEvent, now_ts: int) -> bool:
        return event.expires_ts > now_ts and self._events.get(event.event_id) is event

    def _room_after(self, room_id: str, since: int) -> list[StickyEvent]:
        events = self._by_room[room_id]
        return events[bisect_right(events, since, key=_position) :]

    def _keep_live(self, room_id: str) -> None:
        events = [e for e in self._by_room[room_id] if self._events.get(e.event_id) is e]
        if events:
            self._by_room[room_id] = events
        else:
            del self._by_room[room_id]


def _any_expired(joins: Mapping[str, JoinChange], now_ts: int) -> bool:
    return any(join.expires_ts <= now_ts for join in joins.values())
