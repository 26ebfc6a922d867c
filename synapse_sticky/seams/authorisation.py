# SPDX-License-Identifier: AGPL-3.0-or-later
"""Whether a room's current state authorises an event, as for soft failure."""

import itertools
import logging
from collections.abc import Collection, Mapping
from typing import Any

from synapse import event_auth
from synapse.api.errors import AuthError
from synapse.event_auth import auth_types_for_event, check_state_dependent_auth_rules
from synapse.events import EventBase
from synapse.server import HomeServer
from synapse.types import StateMap
from synapse.types.state import StateFilter

from synapse_sticky.seams.checks import require

logger = logging.getLogger(__name__)


class CurrentStateCheck:
    """Check events against the current state of their rooms."""

    def __init__(self, hs: HomeServer) -> None:
        require(event_auth, "auth_types_for_event", "room_version", "event")
        require(event_auth, "check_state_dependent_auth_rules", "event", "auth_events")
        self._store: Any = hs.get_datastores().main
        for method in ("is_partial_state_room", "get_events"):
            require(self._store, method)
        require(self._store, "get_partial_filtered_current_state_ids", "room_id", "state_filter")

    async def has_partial_state(self, room_id: str) -> bool:
        """Whether a faster join to this room is still under way."""
        return bool(await self._store.is_partial_state_room(room_id))

    async def authorised_by(
        self, event_ids: Collection[str]
    ) -> dict[str, frozenset[tuple[str, str]]]:
        """Return the types and state keys that decide whether each event is authorised.

        An event that was rejected, or cannot be found or read, is left out.
        """
        events = await self._read(event_ids)
        return {event_id: _auth_types(event) for event_id, event in events.items()}

    async def allowed(self, event_ids: Collection[str]) -> set[str]:
        """Return those of some events of a room that would be authorised if they were sent now.

        Without one that was rejected, or cannot be found or read. What the current
        state does not know (a membership, in a room with partial state) is taken
        from the event's own auth events. Does not wait for a join under way.
        """
        events = await self._read(event_ids)
        types = {event_id: _auth_types(event) for event_id, event in events.items()}
        all_types = frozenset(itertools.chain.from_iterable(types.values()))
        if not all_types:
            return set()
        room_id = next(iter(events.values())).room_id
        current = await self._store.get_partial_filtered_current_state_ids(
            room_id, StateFilter.from_types(all_types)
        )
        known = _by_key(await self._read([*current.values()]))
        is_partial = await self.has_partial_state(room_id)
        allowed = set()
        for event_id, event in events.items():
            claimed = await self._read(event.auth_event_ids()) if is_partial else {}
            if _allows(event, types[event_id], {**_by_key(claimed), **known}):
                allowed.add(event_id)
        return allowed

    async def _read(self, event_ids: Collection[str]) -> dict[str, EventBase]:
        try:
            events: dict[str, EventBase] = await self._store.get_events(event_ids)
            return events
        except self._store.database_engine.module.Error:
            # That is the database, not an event: try again later.
            raise
        except Exception as error:
            if len(event_ids) == 1:
                logger.warning("Cannot read event %r: %s", *event_ids, type(error).__name__)
                return {}
        # One event that Synapse cannot read must not keep us from all others.
        found: dict[str, EventBase] = {}
        for event_id in event_ids:
            found.update(await self._read([event_id]))
        return found


def _by_key(events: Mapping[str, EventBase]) -> StateMap[EventBase]:
    return {(e.type, e.state_key): e for e in events.values() if e.is_state()}


def _allows(
    event: EventBase, types: Collection[tuple[str, str]], state: StateMap[EventBase]
) -> bool:
    if not types:
        return False
    try:
        check_state_dependent_auth_rules(event, [state[key] for key in types if key in state])
    except Exception as error:
        if not isinstance(error, AuthError):
            logger.info("Event %r cannot be authorised: %s", event.event_id, type(error).__name__)
        return False
    return True


def _auth_types(event: EventBase) -> frozenset[tuple[str, str]]:
    try:
        return frozenset(auth_types_for_event(event.room_version, event))
    except Exception:
        # Only nonsense in the event itself gets here. Nothing authorises it.
        return frozenset()
