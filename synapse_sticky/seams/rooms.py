# SPDX-License-Identifier: AGPL-3.0-or-later
"""Which rooms Synapse knows, and of which types its events are."""

from collections.abc import Collection
from typing import Any

from synapse.api.errors import NotFoundError
from synapse.server import HomeServer

from synapse_sticky.seams.checks import require


class Rooms:
    """Answers from Synapse's own caches, or its database."""

    def __init__(self, hs: HomeServer) -> None:
        self._store: Any = hs.get_datastores().main
        require(self._store, "get_room_version_id", "room_id")
        require(self._store, "get_events", "event_ids", "allow_rejected")

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
