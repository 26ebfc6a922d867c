# SPDX-License-Identifier: AGPL-3.0-or-later
"""The rooms that Synapse knows, their names, and the contents of their events."""

from collections.abc import Collection
from typing import Any, Final

import attr
from synapse.api.constants import EventTypes
from synapse.api.errors import NotFoundError
from synapse.server import HomeServer
from synapse.types import JsonDict

from synapse_sticky.seams.checks import require
from synapse_sticky.seams.events import keeps_stickiness
from synapse_sticky.seams.tables import SynapseTables

# The state that names a room, and the field of its content.
_NAME: Final = (EventTypes.Name, "")
_ALIAS: Final = (EventTypes.CanonicalAlias, "")
_FIELDS: Final = {EventTypes.Name: "name", EventTypes.CanonicalAlias: "alias"}


@attr.s(slots=True, auto_attribs=True)
class RoomNames:
    """What a room is called, as its own admins say it: texts of any kind, or nothing."""

    name: str | None = None
    alias: str | None = None


class Rooms:
    """Answers from Synapse's own caches, or its database."""

    def __init__(self, hs: HomeServer, tables: SynapseTables) -> None:
        self._tables = tables
        self._store: Any = hs.get_datastores().main
        require(self._store, "get_room_version_id", "room_id")
        require(self._store, "get_events", "event_ids", "allow_rejected")
        require(self._store, "get_events_as_list", "event_ids")
        require(self._store, "are_users_erased", "user_ids")

    async def is_known(self, room_id: str) -> bool:
        """Whether this server is in a room, or was."""
        try:
            await self._store.get_room_version_id(room_id)
        except NotFoundError:
            return False
        return True

    async def names_of(self, room_ids: Collection[str]) -> dict[str, RoomNames]:
        """Return the names and aliases of rooms, those without any included."""
        names = {room_id: RoomNames() for room_id in room_ids}
        state = await self._tables.get_state_of_rooms(room_ids, (_NAME, _ALIAS))
        events = await self._store.get_events([event_id for _, _, event_id in state])
        for room_id, event_type, event_id in state:
            event = events.get(event_id)
            text = None if event is None else event.content.get(_FIELDS[event_type])
            if isinstance(text, str) and text.strip():
                setattr(names[room_id], _FIELDS[event_type], text)
        return names

    async def types_of(self, event_ids: Collection[str]) -> dict[str, str]:
        """Return the types of events by their IDs, without those that were purged."""
        events = await self._store.get_events(event_ids, allow_rejected=True)
        return {event_id: event.type for event_id, event in events.items()}

    async def contents_of(self, event_ids: Collection[str]) -> list[JsonDict]:
        """Return events with all that is in them.

        Leave out the events that clients are not shown: those that were redacted, rejected or
        purged, redactions that do not count, and events of senders who were erased.
        """
        events = [
            event
            for event in await self._store.get_events_as_list(event_ids)
            if keeps_stickiness(event)
        ]
        erased = await self._store.are_users_erased({event.sender for event in events})
        return [
            {**event.get_dict(), "event_id": event.event_id}
            for event in events
            if not erased.get(event.sender)
        ]
