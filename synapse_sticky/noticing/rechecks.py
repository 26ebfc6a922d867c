# SPDX-License-Identifier: AGPL-3.0-or-later
"""Which soft-failed events are to be checked again, and when (MSC4354, soft failure).

A soft-failed sticky event is checked again whenever something changes in the
room's current state that its authorisation depends on. Other changes of state
cost nothing, and neither do rooms without such events.
"""

from collections.abc import Iterable, Set

import attr

from synapse_sticky.seams.authorisation import CurrentStateCheck
from synapse_sticky.seams.contents import StateChange
from synapse_sticky.storage.rows import RecordedEvent


class Rechecks:
    """The soft-failed events, and the state that authorises each."""

    def __init__(self, check: CurrentStateCheck) -> None:
        self._check = check
        self._by_room: dict[str, dict[str, _Watched]] = {}

    @property
    def rooms(self) -> Set[str]:
        """The rooms that have any."""
        return self._by_room.keys()

    async def watch(self, held: Iterable[RecordedEvent]) -> None:
        """Watch these events too."""
        for item in held:
            types = await self._check.authorised_by(item.event_id)
            self._by_room.setdefault(item.room_id, {})[item.event_id] = _Watched(item, types)

    def clear(self) -> None:
        """Forget all events."""
        self._by_room.clear()

    def affected(self, changes: Iterable[StateChange]) -> list[RecordedEvent]:
        """Return the events that any of these changes may authorise, in order of arrival."""
        found: dict[str, RecordedEvent] = {}
        for change in changes:
            for event_id, watched in self._by_room.get(change.room_id, {}).items():
                if (change.type, change.state_key) in watched.types:
                    found[event_id] = watched.held
        return sorted(found.values(), key=lambda held: held.stream_ordering)

    async def passing(self, held: Iterable[RecordedEvent]) -> list[RecordedEvent]:
        """Return those of these events that the current state authorises now."""
        return [item for item in held if await self._check.allows(item.event_id)]

    def forget(self, held: Iterable[RecordedEvent]) -> None:
        """Stop watching these events: they are no longer soft-failed."""
        for item in held:
            self._forget(item)

    def expire(self, now_ts: int) -> None:
        """Forget the events that have expired."""
        for watched in [w for room in self._by_room.values() for w in room.values()]:
            if watched.held.expires_ts <= now_ts:
                self._forget(watched.held)

    def _forget(self, held: RecordedEvent) -> None:
        in_room = self._by_room.get(held.room_id, {})
        in_room.pop(held.event_id, None)
        if not in_room:
            self._by_room.pop(held.room_id, None)


@attr.s(slots=True, frozen=True, auto_attribs=True)
class _Watched:
    held: RecordedEvent
    types: frozenset[tuple[str, str]]
