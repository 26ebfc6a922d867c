# SPDX-License-Identifier: AGPL-3.0-or-later
"""Whether sticky events are on in a room, and who decided that; who is blocked.

The server's admin comes first, then the room's own settings, then the configured default.
"""

import enum

import attr

from synapse_sticky.config import Default
from synapse_sticky.control.overrides import Kind, Override, Overrides
from synapse_sticky.seams.room_state import RoomState


class DecidedBy(enum.Enum):
    """Who has decided. The values are those of the admin API."""

    ADMIN = "admin"
    ROOM = "room"
    DEFAULT = "default"


@attr.s(slots=True, frozen=True, auto_attribs=True)
class RoomSettings:
    """Whether sticky events are on in a room, and who decided that."""

    enabled: bool
    enabled_by: DecidedBy


class Settings:
    """Decides for rooms, users and servers."""

    def __init__(self, overrides: Overrides, rooms: RoomState, default: Default) -> None:
        self.overrides = overrides
        self.default = default
        self._rooms = rooms

    async def of_room(self, room_id: str) -> RoomSettings:
        """Return the settings of a room that count now. It need not be known here."""
        override = self.overrides.get(Kind.ROOM, room_id)
        if override is not None:
            return RoomSettings(override.enabled, DecidedBy.ADMIN)
        enabled = await self._rooms.enabled(room_id)
        if enabled is not None:
            return RoomSettings(enabled, DecidedBy.ROOM)
        if self.default is Default.PRIVATE_ROOMS:
            is_private = not await self._rooms.is_public(room_id)
            return RoomSettings(is_private, DecidedBy.DEFAULT)
        return RoomSettings(self.default is Default.ALL, DecidedBy.DEFAULT)

    async def decided_in_room(self, room_id: str) -> bool | None:
        """Return what the room's own settings say, None if nothing."""
        return await self._rooms.enabled(room_id)

    async def follow_upgrade(self, old_room_id: str, new_room_id: str) -> None:
        """Let an override of a room count for the room that replaces it.

        Args:
            new_room_id: a room that says it replaces the old one. The old one must say so too,
                or anybody could get an override for a room of theirs.
        """
        override = self.overrides.get(Kind.ROOM, old_room_id)
        if override is None or self.overrides.get(Kind.ROOM, new_room_id) is not None:
            return
        if await self._rooms.successor(old_room_id) == new_room_id:
            await self.overrides.decide(Kind.ROOM, new_room_id, override)

    def block_of_user(self, user_id: str) -> Override | None:
        """Return the decision that stops a local user's sticky events, if there is one."""
        return _if_off(self.overrides.get(Kind.USER, user_id))

    def block_of_server(self, server_name: str) -> Override | None:
        """Return the decision that stops a server's sticky events, if there is one."""
        return _if_off(self.overrides.get(Kind.SERVER, subject_of_server(server_name)))


def subject_of_server(server_name: str) -> str:
    """Return the name under which a server is decided on.

    To Matrix two names that differ in case are two servers, but they lead to the same host.
    Whoever blocks one means the other too, as in server ACLs.
    """
    return server_name.lower()


def _if_off(override: Override | None) -> Override | None:
    return override if override is not None and not override.enabled else None
