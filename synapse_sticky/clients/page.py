# SPDX-License-Identifier: AGPL-3.0-or-later
"""Which of the due events go into one response. Arithmetic only.

MSC4354 suggests at most 100 events a response; the rest comes in the next ones,
oldest first. Only what a join (or a room newly matched) made due all at once
stays together, and may exceed the limit, which the MSC allows.
"""

from bisect import bisect_left
from collections.abc import Sequence, Set

from synapse_sticky.deliverable.index import Due


def next_page_end(due: Sequence[Due], start: int, limit: int) -> int:
    """Where a page that begins at index ``start`` ends (exclusive).

    A page never ends between events that are due at the same position: a
    client's position could not tell afterwards which of them it has.
    """
    end = min(start + limit, len(due))
    while start < end < len(due) and due[end].position == due[end - 1].position:
        end += 1
    return end


def first_due_with(due: Sequence[Due], event_ids: Set[str]) -> int:
    """The first index of a position at which one of these events is due."""
    for d in due:
        if d.event.event_id in event_ids:
            return bisect_left(due, d.position, key=lambda other: other.position)
    return len(due)
