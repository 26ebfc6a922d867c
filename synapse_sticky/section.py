# SPDX-License-Identifier: AGPL-3.0-or-later
"""Which of the due events go into one response. Arithmetic only.

MSC4354 suggests at most 100 events a response; the rest comes in the next ones,
oldest first. Only what a join (or a room newly matched) made due all at once
stays together, and may exceed the limit, which the MSC allows.
"""

from collections.abc import Sequence
from typing import Final

from synapse_sticky.index import Due

MAX_EVENTS: Final = 100
"""How many sticky events one response carries at most."""


def next_page_end(due: Sequence[Due], start: int, limit: int) -> int:
    """Where a page that begins at index ``start`` ends (exclusive).

    A page never ends between events that are due at the same position: a
    client's position could not tell afterwards which of them it has.
    """
    end = min(start + limit, len(due))
    while start < end < len(due) and due[end].position == due[end - 1].position:
        end += 1
    return end
