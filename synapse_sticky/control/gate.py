# SPDX-License-Identifier: AGPL-3.0-or-later
"""Decides whether a local user may send a sticky event."""

from typing import Any

from synapse.api.errors import Codes, SynapseError

from synapse_sticky.control.overrides import Override
from synapse_sticky.control.settings import DecidedBy, Settings
from synapse_sticky.room_settings import SETTINGS_TYPE
from synapse_sticky.seams.metrics import REFUSED_SENDS, Metrics
from synapse_sticky.seams.rates import Rates

_SWITCHED_OFF = {
    DecidedBy.ADMIN: "The server's admin has switched off sticky events in this room",
    DecidedBy.ROOM: "The admins of this room have switched off sticky events in it",
    DecidedBy.DEFAULT: (
        "Sticky events are off in this room, as this server's default says; "
        f"the room's admins can switch them on with {SETTINGS_TYPE}"
    ),
}


class Gate:
    """Decides, by what admins have decided and by how much a user has sent."""

    def __init__(self, settings: Settings, rates: Rates | None, metrics: Metrics) -> None:
        self._settings = settings
        self._rates = rates
        self._metrics = metrics

    async def refusal(self, requester: Any, room_id: str) -> SynapseError | None:
        """Return the error for somebody who may not send to a room, None if they may.

        What is not refused counts towards the sender's rate. Ask for users who are joined
        only: the answer tells the room's settings.
        """
        block = self._settings.block_of_user(requester.user.to_string())
        if block is not None:
            self._metrics.count(REFUSED_SENDS, reason="user_blocked")
            return _forbidden(_blocked(block))
        room = await self._settings.of_room(room_id)
        if not room.enabled:
            self._metrics.count(REFUSED_SENDS, reason="switched_off")
            return _forbidden(_SWITCHED_OFF[room.enabled_by])
        error = await self._rates.count(requester, room_id) if self._rates else None
        if error is not None:
            self._metrics.count(REFUSED_SENDS, reason="over_rate")
        return error


def _blocked(block: Override) -> str:
    text = "The server's admin has stopped your sticky events"
    return f"{text}: {block.reason}" if block.reason else text


def _forbidden(text: str) -> SynapseError:
    return SynapseError(403, text, Codes.FORBIDDEN)
