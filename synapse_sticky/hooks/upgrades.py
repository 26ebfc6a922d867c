# SPDX-License-Identifier: AGPL-3.0-or-later
"""Takes the decisions on a room along when it is upgraded on this server.

Synapse copies a fixed list of state into the new room, and asks no module.
"""

from contextvars import ContextVar
from typing import Any

from synapse.handlers.room import RoomCreationHandler

from synapse_sticky.control.overrides import Kind
from synapse_sticky.control.settings import Settings
from synapse_sticky.hooks.guard import shielded, wrap
from synapse_sticky.room_settings import SETTINGS_TYPE, settings_content

# What the settings of the room say that is being upgraded.
_enabled: ContextVar[bool | None] = ContextVar("synapse_sticky_upgrade", default=None)


def follow_upgrades(settings: Settings) -> None:
    """Give an upgraded room the old room's settings, and what the server's admin decided."""
    clone, send_events = (
        RoomCreationHandler.clone_existing_room,
        RoomCreationHandler._send_events_for_new_room,
    )

    async def clone_existing_room(
        self: Any, requester: Any, old_room_id: str, new_room_id: str, *args: Any, **kwargs: Any
    ) -> None:
        enabled = None
        with shielded("Cannot read a room's sticky event settings: its upgrade goes without them"):
            enabled = await settings.decided_in_room(old_room_id)
        token = _enabled.set(enabled)
        try:
            await clone(self, requester, old_room_id, new_room_id, *args, **kwargs)
        finally:
            _enabled.reset(token)
        # The old room's tombstone, which leads users here, comes after this.
        with shielded("Cannot keep the server admin's decision on a room that is upgraded"):
            override = settings.overrides.get(Kind.ROOM, old_room_id)
            if override is not None:
                await settings.overrides.decide(Kind.ROOM, new_room_id, override)

    async def send_events_for_new_room(self: Any, *args: Any, **kwargs: Any) -> Any:
        enabled = _enabled.get()
        if enabled is not None and "initial_state" in kwargs:
            kwargs["initial_state"][(SETTINGS_TYPE, "")] = settings_content(enabled)
        return await send_events(self, *args, **kwargs)

    wrap(
        RoomCreationHandler,
        "clone_existing_room",
        clone_existing_room,
        "requester",
        "old_room_id",
        "new_room_id",
    )
    wrap(
        RoomCreationHandler, "_send_events_for_new_room", send_events_for_new_room, "initial_state"
    )
