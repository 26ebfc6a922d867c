# SPDX-License-Identifier: AGPL-3.0-or-later
"""What the current state of a room says of sticky events."""

from collections.abc import Iterable
from typing import Any, Final

import attr
from synapse.api.constants import EventTypes, JoinRules
from synapse.server import HomeServer
from synapse.types.state import StateFilter

from synapse_sticky.room_settings import SETTINGS_TYPE, enabled_of
from synapse_sticky.seams.checks import require

_KEYS: Final = ((SETTINGS_TYPE, ""), (EventTypes.JoinRules, ""))
STATE_TYPES: Final = tuple(kind for kind, _ in _KEYS)
"""The types of the state that counts."""

_MAX_ROOMS: Final = 10_000
_NOTHING_KNOWN: Final[tuple[int, dict[tuple[str, str], str]]] = (0, {})


@attr.s(slots=True, frozen=True, auto_attribs=True)
class StateOfRoom:
    """What counts of a room's current state.

    Attributes:
        enabled: what the room's own settings say; None if there are none, or none that
            can be read.
        is_public: whether anybody may join.
    """

    enabled: bool | None
    is_public: bool


class RoomState:
    """Reads the current state of rooms by key, and remembers which events that is."""

    def __init__(self, hs: HomeServer) -> None:
        self._store: Any = hs.get_datastores().main
        require(self._store, "get_partial_filtered_current_state_ids", "room_id", "state_filter")
        require(self._store, "get_events", "event_ids")
        require(self._store, "get_room_max_stream_ordering")
        require(self._store, "_curr_state_delta_stream_cache")
        self._changes = self._store._curr_state_delta_stream_cache
        require(self._changes, "has_entity_changed", "entity", "stream_pos")
        # By room: up to where its state was read, and the IDs of the events.
        self._known: dict[str, tuple[int, dict[tuple[str, str], str]]] = {}

    async def read(self, room_id: str) -> StateOfRoom:
        """Return what counts in a room now; nothing of a room that is not known."""
        event_ids = await self._event_ids(room_id)
        # Not remembered: an event may be redacted, which changes no state.
        events = await self._store.get_events(event_ids.values())
        settings = events.get(event_ids.get((SETTINGS_TYPE, "")))
        join_rules = events.get(event_ids.get((EventTypes.JoinRules, "")))
        return StateOfRoom(
            enabled_of(settings.content) if settings is not None else None,
            join_rules is not None and join_rules.content.get("join_rule") == JoinRules.PUBLIC,
        )

    def known_settings(self, room_ids: Iterable[str]) -> dict[str, str]:
        """Return the events with the settings of those of these rooms that were read.

        Returns:
            The room of each, by the ID of the event.
        """
        found = {}
        for room_id in room_ids:
            _, event_ids = self._known.get(room_id, _NOTHING_KNOWN)
            if (SETTINGS_TYPE, "") in event_ids:
                found[event_ids[SETTINGS_TYPE, ""]] = room_id
        return found

    async def _event_ids(self, room_id: str) -> dict[tuple[str, str], str]:
        known = self._known.get(room_id)
        if known is not None and not self._changes.has_entity_changed(room_id, known[0]):
            return known[1]
        read_up_to = self._store.get_room_max_stream_ordering()
        found = await self._store.get_partial_filtered_current_state_ids(
            room_id, StateFilter.from_types(_KEYS)
        )
        if len(self._known) >= _MAX_ROOMS:
            self._known.clear()
        event_ids = {key: event_id for key, event_id in found.items() if key in _KEYS}
        self._known[room_id] = (read_up_to, event_ids)
        return event_ids
