# SPDX-License-Identifier: AGPL-3.0-or-later
"""Whether a room's current state authorises an event, as for soft failure."""

import logging
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
        for method in ("is_partial_state_room", "get_event", "get_events"):
            require(self._store, method)
        require(self._store, "get_partial_filtered_current_state_ids", "room_id", "state_filter")

    async def has_partial_state(self, room_id: str) -> bool:
        """Whether a faster join to this room is still under way."""
        return bool(await self._store.is_partial_state_room(room_id))

    async def authorised_by(self, event_id: str) -> frozenset[tuple[str, str]]:
        """The types and state keys that decide whether an event is authorised."""
        try:
            event = await self._store.get_event(event_id, allow_none=True)
        except Exception as error:
            self._pass_over(event_id, error)
            return frozenset()
        return _auth_types(event) if event is not None else frozenset()

    async def allows(self, event_id: str) -> bool:
        """Whether the event would be authorised if it were sent now.

        False as well if it was rejected, or cannot be found or read. What the current
        state does not know (a membership, in a room with partial state) is taken
        from the event's own auth events. Does not wait for a join under way.
        """
        try:
            return await self._allows(event_id)
        except Exception as error:
            self._pass_over(event_id, error)
            return False

    def _pass_over(self, event_id: str, error: Exception) -> None:
        """Let one event that Synapse cannot read not keep us from all others."""
        if isinstance(error, self._store.database_engine.module.Error):
            # That is the database, not the event: try again later.
            raise error
        logger.warning("Cannot read event %r: %s; it stays held", event_id, type(error).__name__)

    async def _allows(self, event_id: str) -> bool:
        event = await self._store.get_event(event_id, allow_none=True)
        if event is None or event.rejected_reason is not None:
            return False
        types = _auth_types(event)
        if not types:
            return False
        current = await self._store.get_partial_filtered_current_state_ids(
            event.room_id, StateFilter.from_types(types)
        )
        known: StateMap[EventBase] = {}
        if await self.has_partial_state(event.room_id):
            claimed = await self._store.get_events(event.auth_event_ids())
            known = {(e.type, e.state_key): e for e in claimed.values() if e.is_state()}
        state = await self._store.get_events(current.values())
        known = {**known, **{(e.type, e.state_key): e for e in state.values()}}
        try:
            check_state_dependent_auth_rules(event, [known[key] for key in types if key in known])
        except Exception as error:
            if not isinstance(error, AuthError):
                logger.info("Event %r cannot be authorised: %s", event_id, type(error).__name__)
            return False
        return True


def _auth_types(event: EventBase) -> frozenset[tuple[str, str]]:
    try:
        return frozenset(auth_types_for_event(event.room_version, event))
    except Exception:
        # Only nonsense in the event itself gets here. Nothing authorises it.
        return frozenset()
