# SPDX-License-Identifier: AGPL-3.0-or-later
"""The ephemeral map of MSC4354 ("Implementing an ephemeral map"), for bots and for servers.

Sticky events of one sender and type that carry the same sticky key replace each
other: the one that ends last is the value. This file needs neither Synapse nor
a clock, and does no I/O: give an :class:`EphemeralMap` the events that a client
gets, in any order and as often as they come, and read the values.
``docs/ephemeral-map.md`` is a guide with examples.

The map is a function of the events that were added and have neither expired nor
been redacted. So it keeps all of these, not only the values: an event that was
replaced is the value again if the one that replaced it is redacted, as it is
for a client that came later, and an older event that arrives late changes
nothing.

Times (``_ts``) are milliseconds since the epoch, durations (``_ms``) are
milliseconds.
"""

import heapq
import itertools
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Final, TypeAlias

import attr

from synapse_sticky.protocol import DURATION_KEY, EVENT_KEY, MAP_KEY, REMAINING_KEY
from synapse_sticky.stickiness import MAX_DURATION_MS, effective_duration_ms, expires_ts

MAX_REDACTED: Final = 10_000
"""The most redactions to remember, each for an hour, in case that the event comes after them."""

_ENCRYPTED: Final = "m.room.encrypted"
_REDACTION: Final = "m.room.redaction"


@attr.s(slots=True, frozen=True, auto_attribs=True)
class Entry:
    """A value of the map: one sticky event."""

    room_id: str
    sender: str
    type: str
    """The event's type, ``m.room.encrypted`` if it could not be decrypted so far."""
    sticky_key: str | None
    """None if the event has no text there, or is opaque: then it stands alone."""
    event_id: str
    event: Mapping[str, Any] = attr.ib(eq=False, repr=False)
    """The event as it was added; it is neither copied nor changed."""
    content: Mapping[str, Any] = attr.ib(eq=False, repr=False)
    """The content, decrypted if it could be."""
    encrypted: bool
    """Whether the event was sent encrypted."""
    ends_ts: int
    """``origin_server_ts + duration_ms`` as the sender wrote them; the latest is the value."""
    expires_ts: int
    """When the event stops being sticky here, and leaves the map."""
    expiry_is_told: bool
    """Whether the server told this. Otherwise it was worked out from the event's own time."""

    @property
    def opaque(self) -> bool:
        """Whether the event is encrypted still, so that its type and sticky key are unknown."""
        return self.type == _ENCRYPTED


@attr.s(slots=True, frozen=True, auto_attribs=True)
class Change:
    """One place in the map has another value than before. One of the two may be None."""

    previous: Entry | None
    current: Entry | None


# The sender, the type, the sticky key, and for an event that stands alone its own ID.
_Key: TypeAlias = tuple[str, str, str | None, str | None]


@attr.s(slots=True, auto_attribs=True)
class _Place:
    """The events with one key."""

    events: dict[str, Entry] = attr.Factory(dict)
    # The one that counts, or None while that has to be worked out.
    last: Entry | None = None


class EphemeralMap:
    """The ephemeral maps of any number of rooms.

    Nothing that a sender puts into an event raises: a malformed event is not
    sticky, and changes nothing. Every method that changes the map first drops
    what has expired by then, and returns how the values changed.

    Args:
        prefer_encrypted: whether an event that was not encrypted never replaces
            one that was. MatrixRTC clients have the server send their leave
            events, after a delay and not encrypted: for them leave it False.
    """

    def __init__(self, *, prefer_encrypted: bool = False) -> None:
        self._prefer_encrypted = prefer_encrypted
        # The events that have not expired, by room and event ID.
        self._events: dict[tuple[str, str], Entry] = {}
        # The same events, by room and key.
        self._places: dict[str, dict[_Key, _Place]] = {}
        # When to forget that events were redacted, by room and event ID, oldest first.
        self._redacted: OrderedDict[tuple[str, str], int] = OrderedDict()
        # A heap of the times at which events expire, with room and event ID. An event may have
        # expired earlier, or be gone.
        self._deadlines: list[tuple[int, tuple[str, str]]] = []

    def add(
        self,
        room_id: str,
        event: object,
        now_ts: int,
        *,
        was_encrypted: bool = False,
        expires_ts: int | None = None,
    ) -> list[Change]:
        """Take in an event of a room, sticky or not, from a timeline or a section of its own.

        Args:
            room_id: the room, which events in sync responses do not name.
            event: the event as it came from the server just now, in the format
                of the client-server API. A redaction is applied.
            now_ts: the time.
            was_encrypted: whether its type and content have been decrypted. To
                decrypt an event that was added before, call :meth:`decrypt`.
            expires_ts: when the event expires, for callers who know (a server).
                Otherwise the remaining time in the event says it, and without
                that the times that the sender wrote.
        """
        changes = self.expire(now_ts)
        if not isinstance(event, Mapping):
            return changes
        if (redacted := _redacted_by(event)) is not None:
            changes += self.redact(room_id, redacted, now_ts)
        entry = _parse(room_id, event, now_ts, was_encrypted, expires_ts)
        if entry is None or (room_id, entry.event_id) in self._redacted:
            return changes
        known = self._events.get((room_id, entry.event_id))
        if known is not None:
            entry = _merge(known, entry)
        if entry == known:
            return changes
        gone = [known] if known is not None else []
        return changes + self._swap(gone, [entry] if entry.expires_ts > now_ts else [])

    def decrypt(
        self, room_id: str, event_id: str, type: object, content: object, now_ts: int
    ) -> list[Change]:
        """Give an opaque event the type and the content that it turns out to have.

        Nothing happens if the event is not there, for example because it has
        expired, or if the type is no text or the content no object.
        """
        changes = self.expire(now_ts)
        known = self._events.get((room_id, event_id))
        if known is None or not known.opaque:
            return changes
        if not isinstance(type, str) or not isinstance(content, Mapping):
            return changes
        sticky_key = _sticky_key(type, content)
        clear = attr.evolve(known, type=type, content=content, sticky_key=sticky_key)
        return changes + self._swap([known], [clear])

    def redact(self, room_id: str, event_id: str, now_ts: int) -> list[Change]:
        """Take an event out that was redacted, also if it arrives only later."""
        changes = self.expire(now_ts)
        id_ = (room_id, event_id)
        if id_ not in self._redacted:
            # An event that the server received before the redaction has expired by then.
            self._redacted[id_] = now_ts + MAX_DURATION_MS
            if len(self._redacted) > MAX_REDACTED:
                self._redacted.popitem(last=False)
        known = self._events.get(id_)
        return changes + self._swap([known] if known is not None else [], [])

    def expire(self, now_ts: int) -> list[Change]:
        """Drop the events that have expired."""
        # By ID, because an event has a deadline for each copy that changed it.
        expired = {}
        while self._deadlines and self._deadlines[0][0] <= now_ts:
            _, id_ = heapq.heappop(self._deadlines)
            if id_ in self._events and self._events[id_].expires_ts <= now_ts:
                expired[id_] = self._events[id_]
        while self._redacted and next(iter(self._redacted.values())) <= now_ts:
            self._redacted.popitem(last=False)
        return self._swap(list(expired.values()), [])

    @property
    def next_expiry_ts(self) -> int | None:
        """Before this, :meth:`expire` has nothing to do; None if nothing is there to expire."""
        first_event = [ts for ts, _ in self._deadlines[:1]]
        first_redaction = itertools.islice(self._redacted.values(), 1)
        return min([*first_event, *first_redaction], default=None)

    def entries(self, room_id: str, now_ts: int, type: str | None = None) -> list[Entry]:
        """Return the values in a room, or those of one type, in a fixed order.

        Undecrypted events are among them, as entries of the type ``m.room.encrypted``.
        """
        values = [
            self._value(place, now_ts)
            for key, place in sorted(self._places.get(room_id, {}).items(), key=_in_order)
            if type is None or key[1] == type
        ]
        return [value for value in values if value is not None]

    def get(
        self, room_id: str, sender: str, type: str, sticky_key: str, now_ts: int
    ) -> Entry | None:
        """Return the value under one sticky key."""
        place = self._places.get(room_id, {}).get((sender, type, sticky_key, None))
        return None if place is None else self._value(place, now_ts)

    def _value(self, place: _Place, now_ts: int) -> Entry | None:
        last = place.last
        if last is not None and last.expires_ts <= now_ts:
            live = (event for event in place.events.values() if event.expires_ts > now_ts)
            last = max(live, key=self._rank, default=None)
        return _shown(last)

    def _rank(self, entry: Entry) -> tuple[bool, int, str]:
        return (self._prefer_encrypted and entry.encrypted, entry.ends_ts, entry.event_id)

    def _swap(self, gone: list[Entry], new: list[Entry]) -> list[Change]:
        """Take events out and put others in, and return how the values changed."""
        keys = dict.fromkeys((entry.room_id, _key(entry)) for entry in gone + new)
        places = [self._places.setdefault(room, {}).setdefault(key, _Place()) for room, key in keys]
        before = [place.last for place in places]
        for entry in gone:
            self._take_out(entry)
        for entry in new:
            self._put_in(entry)
        for (room_id, key), place in zip(keys, places, strict=True):
            if not place.events:
                del self._places[room_id][key]
            elif place.last is None:
                place.last = max(place.events.values(), key=self._rank)
            if not self._places[room_id]:
                del self._places[room_id]
        changes = [
            Change(_shown(last), _shown(place.last))
            for last, place in zip(before, places, strict=True)
        ]
        return [change for change in changes if _id(change.previous) != _id(change.current)]

    def _take_out(self, entry: Entry) -> None:
        del self._events[entry.room_id, entry.event_id]
        place = self._places[entry.room_id][_key(entry)]
        del place.events[entry.event_id]
        if place.last is entry:
            place.last = None

    def _put_in(self, entry: Entry) -> None:
        id_ = (entry.room_id, entry.event_id)
        self._events[id_] = entry
        heapq.heappush(self._deadlines, (entry.expires_ts, id_))
        place = self._places[entry.room_id][_key(entry)]
        place.events[entry.event_id] = entry
        if place.last is not None:
            place.last = max(place.last, entry, key=self._rank)


def _parse(
    room_id: str,
    event: Mapping[Any, Any],
    now_ts: int,
    was_encrypted: bool,
    told_ts: int | None,
) -> Entry | None:
    """Return the entry for an event, or None if it is not sticky or malformed."""
    sticky = event.get(EVENT_KEY)
    duration_ms = effective_duration_ms(sticky)
    origin_server_ts = event.get("origin_server_ts")
    content = event.get("content")
    sender, type_, event_id = (event.get(key) for key in ("sender", "type", "event_id"))
    if (
        duration_ms is None
        or type(origin_server_ts) is not int
        or not isinstance(content, Mapping)
        or not isinstance(sender, str)
        or not isinstance(type_, str)
        or not isinstance(event_id, str)
    ):
        return None
    assert isinstance(sticky, Mapping)
    told_ts = _told_expiry(event, duration_ms, now_ts) if told_ts is None else told_ts
    computed_ts = expires_ts(duration_ms, now_ts, origin_server_ts)
    return Entry(
        room_id=room_id,
        sender=sender,
        type=type_,
        sticky_key=_sticky_key(type_, content),
        event_id=event_id,
        event=event,
        content=content,
        encrypted=was_encrypted or type_ == _ENCRYPTED,
        ends_ts=origin_server_ts + sticky[DURATION_KEY],
        expires_ts=computed_ts if told_ts is None else told_ts,
        expiry_is_told=told_ts is not None,
    )


def _sticky_key(type_: str, content: Mapping[Any, Any]) -> str | None:
    """Return the sticky key of an event if it is known and a text."""
    sticky_key = content.get(MAP_KEY)
    # The real one of an encrypted event is encrypted, whatever stands beside it.
    return sticky_key if isinstance(sticky_key, str) and type_ != _ENCRYPTED else None


def _told_expiry(event: Mapping[Any, Any], duration_ms: int, now_ts: int) -> int | None:
    """Return when an event expires by the remaining time that the server sent with it."""
    unsigned = event.get("unsigned")
    remaining_ms = unsigned.get(REMAINING_KEY) if isinstance(unsigned, Mapping) else None
    return now_ts + min(remaining_ms, duration_ms) if type(remaining_ms) is int else None


def _merge(known: Entry, entry: Entry) -> Entry:
    """Combine two copies of an event, with the same result in either order."""
    # An event dated in the future counts from when it was first received.
    expiry = min(known, entry, key=lambda copy: (not copy.expiry_is_told, copy.expires_ts))
    return attr.evolve(
        entry if known.opaque else known,
        encrypted=known.encrypted or entry.encrypted,
        expires_ts=expiry.expires_ts,
        expiry_is_told=expiry.expiry_is_told,
    )


def _redacted_by(event: Mapping[Any, Any]) -> str | None:
    """Return the ID of the event that an event redacts, or its own if it is redacted itself."""
    unsigned = event.get("unsigned")
    if isinstance(unsigned, Mapping) and "redacted_because" in unsigned:
        redacts = event.get("event_id")
    elif event.get("type") == _REDACTION:
        content = event.get("content")
        # Up to room version 10 it stands at the top level.
        redacts = event.get("redacts") or (
            content.get("redacts") if isinstance(content, Mapping) else None
        )
    else:
        return None
    return redacts if isinstance(redacts, str) else None


def _shown(last: Entry | None) -> Entry | None:
    """Return the value if this event counts: none if its content is the sticky key alone."""
    if last is None or (last.sticky_key is not None and len(last.content) == 1):
        return None
    return last


def _key(entry: Entry) -> _Key:
    alone = entry.event_id if entry.sticky_key is None else None
    return (entry.sender, entry.type, entry.sticky_key, alone)


def _in_order(item: tuple[_Key, object]) -> tuple[str, ...]:
    """Return a key to sort by, in which None comes before all texts."""
    sender, type_, sticky_key, alone = item[0]
    return (sender, type_, sticky_key or "", alone or "")


def _id(entry: Entry | None) -> str | None:
    return None if entry is None else entry.event_id
