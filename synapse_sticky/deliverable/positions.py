# SPDX-License-Identifier: AGPL-3.0-or-later
"""How positions are given out. No Synapse, no clock.

A position is at least the time, in ms since the epoch: so positions grow across restored
backups, dropped tables and re-installation.
"""

from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def give_positions(
    items: Iterable[T], last_position: int | None, now_ts: int
) -> tuple[list[tuple[int, T]], int]:
    """Give each item the next position.

    Args:
        last_position: the last position given out before; None if there is none.

    Returns:
        The items in their order, each behind its position, and the last position given
        out now.
    """
    position = now_ts if last_position is None else last_position
    positioned = []
    for item in items:
        position = max(position + 1, now_ts)
        positioned.append((position, item))
    return positioned, position
