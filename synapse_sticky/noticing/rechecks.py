# SPDX-License-Identifier: AGPL-3.0-or-later
"""Which soft-failed events are to be checked again, and when (MSC4354, soft failure).

A soft-failed sticky event is checked again whenever something changes in the
room's current state that its authorisation depends on. Other changes of state
cost nothing, and neither do rooms without such events. The events themselves are
not in memory, only their senders: a server may send many.
"""

import itertools
from collections.abc import Awaitable, Callable, Iterable, Set
from typing import Final

import attr

from synapse_sticky.seams.authorisation import CurrentStateCheck
from synapse_sticky.seams.contents import StateChange
from synapse_sticky.storage.rows import RecordedEvent

_SLICE: Final = 200
_FIRST: Final = -(2**63)

StateKey = tuple[str, str]
"""A type of state, and a state key."""

Find = Callable[[str, int, int], Awaitable[list[RecordedEvent]]]
"""The soft-failed events of a room after a stream ordering, in order, as many at most."""


@attr.s(slots=True, auto_attribs=True)
class _Due:
    """Whose events in a room are due, and the stream ordering up to which that is done."""

    senders: set[str] = attr.Factory(set)
    done: int = _FIRST


class Rechecks:
    """Knows on which state soft-failed events depend, and which are due for a check."""

    def __init__(self, check: CurrentStateCheck) -> None:
        self._check = check
        # Who has sent events that depend on it, and when the last of these expires.
        self._watched: dict[str, dict[StateKey, dict[str, int]]] = {}
        self._new: dict[str, RecordedEvent] = {}
        self._due: dict[str, _Due] = {}

    def __bool__(self) -> bool:
        return bool(self._new or self._due)

    @property
    def rooms(self) -> Set[str]:
        """The rooms whose changes of state may matter."""
        return self._watched.keys()

    def add(self, soft_failed: Iterable[RecordedEvent]) -> None:
        """Check these events, and watch them.

        The state may have changed since Synapse looked at it, and that change may have been
        read already.
        """
        self._new.update((event.event_id, event) for event in soft_failed)

    def clear(self) -> None:
        """Forget all events."""
        self._watched.clear()
        self._new.clear()
        self._due.clear()

    def on_changes(self, changes: Iterable[StateChange]) -> None:
        """The current state of rooms has changed."""
        for change in changes:
            senders = self._watched.get(change.room_id, {}).get((change.type, change.state_key))
            if senders:
                due = self._due.setdefault(change.room_id, _Due())
                due.senders.update(senders)
                due.done = _FIRST

    async def take_passing(self, find: Find) -> list[RecordedEvent]:
        """Check some of the events that are due, and return those that pass, in order.

        An event that is not there any more is let go.
        """
        taken = self._take_new() or await self._take_due(find)
        types = await self._check.authorised_by([event.event_id for event in taken])
        by_room: dict[str, list[str]] = {}
        for event in taken:
            if event.event_id in types:
                self._watch(event, types[event.event_id])
                by_room.setdefault(event.room_id, []).append(event.event_id)
        passing: set[str] = set()
        for event_ids in by_room.values():
            passing |= await self._check.allowed(event_ids)
        return [event for event in taken if event.event_id in passing]

    def expire(self, now_ts: int) -> None:
        """Forget the events that have expired."""
        for room_id, keys in [*self._watched.items()]:
            left = {
                key: kept
                for key, senders in keys.items()
                if (kept := {sender: ts for sender, ts in senders.items() if ts > now_ts})
            }
            if left:
                self._watched[room_id] = left
            else:
                del self._watched[room_id]

    def _take_new(self) -> list[RecordedEvent]:
        event_ids = [*itertools.islice(self._new, _SLICE)]
        return [self._new.pop(event_id) for event_id in event_ids]

    async def _take_due(self, find: Find) -> list[RecordedEvent]:
        room_id, due = next(iter(self._due.items()))
        found = await find(room_id, due.done, _SLICE)
        if len(found) < _SLICE:
            del self._due[room_id]
        else:
            due.done = found[-1].stream_ordering
            # The others have their turn before this one has it again.
            self._due[room_id] = self._due.pop(room_id)
        return [event for event in found if event.sender in due.senders]

    def _watch(self, event: RecordedEvent, types: Iterable[StateKey]) -> None:
        keys = self._watched.setdefault(event.room_id, {})
        for key in types:
            senders = keys.setdefault(key, {})
            senders[event.sender] = max(senders.get(event.sender, 0), event.expires_ts)
