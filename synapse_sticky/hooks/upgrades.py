# SPDX-License-Identifier: AGPL-3.0-or-later
"""Takes the decisions on a room along when it is upgraded.

Synapse copies a fixed list of state into a room that it upgrades, and asks no module. It
also notices when it joins a room that another server has upgraded.
"""

from contextvars import ContextVar
from typing import Any

from synapse.handlers.room import RoomCreationHandler
from synapse.handlers.room_member import RoomMemberHandler
from synapse.server import HomeServer

from synapse_sticky.control.settings import Settings
from synapse_sticky.hooks.sharing import synapses, wrap_for
from synapse_sticky.room_settings import SETTINGS_TYPE, settings_content
from synapse_sticky.seams.failures import shielded

# What the settings of the room say that is being upgraded.
_enabled: ContextVar[bool | None] = ContextVar("synapse_sticky_upgrade", default=None)


def follow_upgrades(hs: HomeServer, settings: Settings) -> None:
    """Give a room that is upgraded the old room's settings, and the admin's override of it."""
    _copy_settings(hs, settings)
    transfer = synapses(RoomMemberHandler, "transfer_room_state_on_room_upgrade")

    async def transfer_room_state_on_room_upgrade(
        self: Any, old_room_id: str, room_id: str
    ) -> None:
        with shielded("Cannot keep the server admin's override of a room that is upgraded"):
            await settings.follow_upgrade(old_room_id, room_id)
        await transfer(self, old_room_id, room_id)

    wrap_for(
        hs,
        RoomMemberHandler,
        "transfer_room_state_on_room_upgrade",
        transfer_room_state_on_room_upgrade,
        "old_room_id",
        "room_id",
    )


def _copy_settings(hs: HomeServer, settings: Settings) -> None:
    clone = synapses(RoomCreationHandler, "clone_existing_room")
    send_events = synapses(RoomCreationHandler, "_send_events_for_new_room")

    async def clone_existing_room(
        self: Any, requester: Any, old_room_id: str, *args: Any, **kwargs: Any
    ) -> None:
        enabled = None
        with shielded("Cannot read a room's sticky event settings: its upgrade goes without them"):
            enabled = await settings.decided_in_room(old_room_id)
        token = _enabled.set(enabled)
        try:
            await clone(self, requester, old_room_id, *args, **kwargs)
        finally:
            _enabled.reset(token)

    async def send_events_for_new_room(self: Any, *args: Any, **kwargs: Any) -> Any:
        enabled = _enabled.get()
        if enabled is not None and "initial_state" in kwargs:
            kwargs["initial_state"][(SETTINGS_TYPE, "")] = settings_content(enabled)
        return await send_events(self, *args, **kwargs)

    names = ("requester", "old_room_id")
    wrap_for(hs, RoomCreationHandler, "clone_existing_room", clone_existing_room, *names)
    wrap_for(
        hs,
        RoomCreationHandler,
        "_send_events_for_new_room",
        send_events_for_new_room,
        "initial_state",
    )
