# SPDX-License-Identifier: AGPL-3.0-or-later
"""The rooms that Synapse knows, and the contents of their events."""

from collections.abc import Collection
from typing import Any

from synapse.api.errors import NotFoundError
from synapse.server import HomeServer
from synapse.types import JsonDict

from synapse_sticky.seams.checks import require
from synapse_sticky.seams.events import keeps_stickiness


class Rooms:
    """Answers from Synapse's own caches, or its database."""

    def __init__(self, hs: HomeServer) -> None:
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
