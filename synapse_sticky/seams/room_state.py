# SPDX-License-Identifier: AGPL-3.0-or-later
"""What the current state of a room says of sticky events."""

from collections.abc import Iterable
from typing import Any, Final

from synapse.api.constants import EventTypes, JoinRules
from synapse.events import EventBase
from synapse.server import HomeServer

from synapse_sticky.room_settings import SETTINGS_TYPE, enabled_of
from synapse_sticky.seams.checks import require
from synapse_sticky.seams.tables import SynapseTables

_SETTINGS: Final = (SETTINGS_TYPE, "")
_JOIN_RULES: Final = (EventTypes.JoinRules, "")
_KEYS: Final = (_SETTINGS, _JOIN_RULES)
STATE_TYPES: Final = tuple(kind for kind, _ in _KEYS)
"""The types of the state that counts."""

_MAX_ROOMS: Final = 10_000


class RoomState:
    """Reads the current state of rooms by key, and remembers which events that is.

    Attributes:
        has_seen_settings: whether any of the rooms that were read had settings.
    """

    def __init__(self, hs: HomeServer, tables: SynapseTables) -> None:
        self._tables = tables
        self._store: Any = hs.get_datastores().main
        require(self._store, "get_events", "event_ids")
        require(self._store, "get_room_max_stream_ordering")
        require(self._store, "_invalidate_local_get_event_cache", "event_id")
        require(self._store, "_curr_state_delta_stream_cache")
        self._changes = self._store._curr_state_delta_stream_cache
        require(self._changes, "has_entity_changed", "entity", "stream_pos")
        self.has_seen_settings = False
        # By room: up to where its state was read, and the IDs of the events.
        self._known: dict[str, tuple[int, dict[tuple[str, str], str]]] = {}

    async def enabled(self, room_id: str) -> bool | None:
        """Return what a room's own settings say now, None if nothing that can be read."""
        settings = await self._event(room_id, _SETTINGS)
        return enabled_of(settings.content) if settings is not None else None

    async def is_public(self, room_id: str) -> bool:
        """Whether anybody may join a room now. Nobody may join one that is not known."""
        rules = await self._event(room_id, _JOIN_RULES)
        return rules is not None and rules.content.get("join_rule") == JoinRules.PUBLIC

    async def successor(self, room_id: str) -> str | None:
        """Return the room that replaces a room, as its tombstone says; None if there is none."""
        key = (EventTypes.Tombstone, "")
        event_ids = await self._tables.get_state_ids(room_id, [key])
        events = await self._store.get_events(event_ids.values())
        tombstone = events.get(event_ids.get(key, ""))
        return None if tombstone is None else tombstone.content.get("replacement_room")

    def forget(self, room_ids: Iterable[str], event_ids: Iterable[str]) -> None:
        """What is known of these rooms and events is out of date."""
        for room_id in room_ids:
            self._known.pop(room_id, None)
        for event_id in event_ids:
            self._store._invalidate_local_get_event_cache(event_id)

    async def _event(self, room_id: str, key: tuple[str, str]) -> EventBase | None:
        event_id = (await self._event_ids(room_id)).get(key)
        if event_id is None:
            return None
        # Not remembered: an event may be redacted, which changes no state.
        events: dict[str, EventBase] = await self._store.get_events([event_id])
        return events.get(event_id)

    async def _event_ids(self, room_id: str) -> dict[tuple[str, str], str]:
        known = self._known.get(room_id)
        if known is not None and not self._changes.has_entity_changed(room_id, known[0]):
            return known[1]
        read_up_to = self._store.get_room_max_stream_ordering()
        # Not from Synapse's cache: news of the state come before it is told to forget.
        event_ids = await self._tables.get_state_ids(room_id, _KEYS)
        if len(self._known) >= _MAX_ROOMS:
            self._known.clear()
        self.has_seen_settings = self.has_seen_settings or _SETTINGS in event_ids
        self._known[room_id] = (read_up_to, event_ids)
        return event_ids
