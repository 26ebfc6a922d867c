# SPDX-License-Identifier: AGPL-3.0-or-later
"""Lets the sticky events of other servers through at a rate: the others are held, and follow.

The rate is that of one server in one room. What is above it is held, and released in order
as the rate allows. How much of one server is held in one room is bounded; what is beyond
the bound is not recorded, and stays an ordinary event.
"""

import enum
from collections import Counter
from collections.abc import Mapping

from synapse_sticky.seams.rates import Limiter

Key = tuple[str, str]
"""A room, and the name of a server."""


class Verdict(enum.Enum):
    """What becomes of an event."""

    PASSES = enum.auto()
    HELD = enum.auto()
    BEYOND = enum.auto()


class Throttle:
    """Knows how many events are held for their rate, and how many may pass."""

    def __init__(self, limiter: Limiter | None, most: int) -> None:
        self._limiter = limiter
        self._most = most
        self._held: Counter[Key] = Counter()

    @property
    def keys(self) -> list[Key]:
        """Where events are held."""
        return list(self._held)

    def load(self, held: Mapping[Key, int]) -> None:
        """Take over how many events are held."""
        self._held = Counter(held)

    async def judge(self, room_id: str, server_name: str) -> Verdict:
        """Judge one more event, and count it."""
        key = (room_id, server_name)
        if self._limiter is None or (not self._held[key] and await self._limiter.allows(key)):
            # Reading has made an entry.
            self._forget_if_none(key)
            return Verdict.PASSES
        if self._held[key] >= self._most:
            return Verdict.BEYOND
        self._held[key] += 1
        return Verdict.HELD

    async def take(self, key: Key, most: int) -> int:
        """Return how many of the held events may pass now, which count as passed."""
        passing, most = 0, min(most, self._held[key])
        while passing < most and (self._limiter is None or await self._limiter.allows(key)):
            passing += 1
        # The others have their turn before this one has it again.
        self._held[key] = self._held.pop(key, 0) - passing
        self._forget_if_none(key)
        return passing

    def _forget_if_none(self, key: Key) -> None:
        if not self._held[key]:
            del self._held[key]
