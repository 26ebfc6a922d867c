# SPDX-License-Identifier: AGPL-3.0-or-later
"""Whether a sticky event that was noticed is deliverable, or why it is held.

Whatever holds an event back is a reason why it has no position yet. It is kept,
with its reason, until it expires.
"""

import enum

from synapse_sticky.seams.authorisation import CurrentStateCheck
from synapse_sticky.seams.contents import Candidate


class HeldReason(enum.Enum):
    """Why an event is not deliverable. The values are stored."""

    SOFT_FAILED = "soft_failed"
    """The room's current state does not authorise it."""

    REFUSED = "refused"
    """A policy server or a spam checker refused it; that does not end."""


class Admission:
    """Decide on candidates, one at a time."""

    def __init__(self, check: CurrentStateCheck) -> None:
        self._check = check

    async def held_reason(self, candidate: Candidate) -> HeldReason | None:
        """Return why a candidate must be held, or None if it is deliverable.

        Synapse checks what arrives by ``/send`` for soft failure. Backfilled
        events, former outliers, and everything in a room with partial state it
        does not check: without a check of ours, a banned user would get in by
        those ways (MSC4354: state event level checks apply to sticky events).
        """
        if candidate.refused:
            return HeldReason.REFUSED
        if candidate.soft_failed:
            return HeldReason.SOFT_FAILED
        if candidate.was_accepted:
            # What was accepted once never becomes soft-failed again.
            return None
        unchecked = candidate.unchecked or await self._check.has_partial_state(candidate.room_id)
        if unchecked and not await self._check.allows(candidate.event_id):
            return HeldReason.SOFT_FAILED
        return None
