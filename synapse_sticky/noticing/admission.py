# SPDX-License-Identifier: AGPL-3.0-or-later
"""Whether a sticky event that was noticed is deliverable, or why it is held.

Whatever holds an event back is a reason why it has no position yet. An event may have
several. It is kept, with its reasons, until it expires.
"""

import enum
from collections.abc import Callable, Iterable
from typing import Final

from synapse.types import get_domain_from_id

from synapse_sticky.control.settings import Settings
from synapse_sticky.noticing.throttle import Throttle, Verdict
from synapse_sticky.seams.authorisation import CurrentStateCheck
from synapse_sticky.seams.contents import Candidate
from synapse_sticky.storage.rows import RecordedEvent, Rejudged
from synapse_sticky.storage.store import SOFT_FAILED


class HeldReason(enum.Enum):
    """Why an event is not deliverable. The values are stored."""

    SOFT_FAILED = SOFT_FAILED
    """The room's current state does not authorise it."""

    REFUSED = "refused"
    """A policy server or a spam checker refused it; that does not end."""

    SWITCHED_OFF = "switched_off"
    """Sticky events are off in the room."""

    USER_BLOCKED = "user_blocked"
    """The server's admin has stopped the sticky events of this user."""

    SERVER_BLOCKED = "server_blocked"
    """The server's admin has stopped the sticky events of the sender's server."""

    OVER_RATE = "over_rate"
    """More came from the sender's server than the rate in the room allows; it follows."""


_DECIDED: Final = frozenset(
    reason.value
    for reason in (HeldReason.SWITCHED_OFF, HeldReason.USER_BLOCKED, HeldReason.SERVER_BLOCKED)
)
"""The reasons that follow from what admins have decided."""

_NONE: Final[frozenset[str]] = frozenset()


class Admission:
    """Decide on candidates, one at a time, and again on what was recorded."""

    def __init__(
        self,
        check: CurrentStateCheck,
        settings: Settings,
        throttle: Throttle,
        is_mine: Callable[[str], bool],
    ) -> None:
        self._check = check
        self._settings = settings
        self._throttle = throttle
        self._is_mine = is_mine

    async def reasons(self, candidate: Candidate) -> frozenset[str] | None:
        """Return why a candidate must be held: it is deliverable if there is no reason.

        None if it is beyond what is held of its server: then it stays an ordinary event.
        """
        reasons = set(await self._decided_for_room(candidate.room_id))
        reasons |= self._decided_for_sender(candidate.sender)
        found = await self._found(candidate)
        if found is not None:
            reasons.add(found.value)
        if not self._is_mine(candidate.sender) and not candidate.was_accepted:
            server_name = get_domain_from_id(candidate.sender)
            verdict = await self._throttle.judge(candidate.room_id, server_name)
            if verdict is Verdict.BEYOND:
                return None
            if verdict is Verdict.HELD:
                reasons.add(HeldReason.OVER_RATE.value)
        return frozenset(reasons)

    async def rejudge(self, events: Iterable[RecordedEvent]) -> list[Rejudged]:
        """Return those of these events that are held for other reasons now, or for none."""
        by_room: dict[str, frozenset[str]] = {}
        rejudged = []
        for event in events:
            if event.room_id not in by_room:
                by_room[event.room_id] = await self._decided_for_room(event.room_id)
            decided = by_room[event.room_id] | self._decided_for_sender(event.sender)
            reasons = (event.reasons - _DECIDED) | decided
            if reasons != event.reasons:
                rejudged.append(Rejudged(event, reasons))
        return rejudged

    async def _decided_for_room(self, room_id: str) -> frozenset[str]:
        enabled = (await self._settings.of_room(room_id)).enabled
        return _NONE if enabled else frozenset({HeldReason.SWITCHED_OFF.value})

    def _decided_for_sender(self, sender: str) -> frozenset[str]:
        if self._is_mine(sender):
            blocked, reason = self._settings.block_of_user(sender), HeldReason.USER_BLOCKED
        else:
            server_name = get_domain_from_id(sender)
            blocked, reason = self._settings.block_of_server(server_name), HeldReason.SERVER_BLOCKED
        return _NONE if blocked is None else frozenset({reason.value})

    async def _found(self, candidate: Candidate) -> HeldReason | None:
        """Return the reason that lies in the event itself.

        Synapse checks what arrives by ``/send`` for soft failure. Backfilled
        events, former outliers, and everything in a room with partial state it
        does not check: without a check of ours, a banned user would get in by
        those ways (MSC4354: state event level checks apply to sticky events).
        """
        if candidate.refused:
            return HeldReason.REFUSED
        if candidate.was_accepted:
            # What was accepted once never becomes soft-failed again.
            return None
        if candidate.soft_failed:
            return HeldReason.SOFT_FAILED
        unchecked = candidate.unchecked or await self._check.has_partial_state(candidate.room_id)
        if unchecked and not await self._check.allowed([candidate.event_id]):
            return HeldReason.SOFT_FAILED
        return None
