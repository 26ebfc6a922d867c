# SPDX-License-Identifier: AGPL-3.0-or-later
"""Rates, counted by Synapse's own rate limiter."""

from collections.abc import Hashable
from typing import Any

from synapse.api import ratelimiting
from synapse.api.errors import LimitExceededError
from synapse.config.ratelimiting import RatelimitSettings
from synapse.server import HomeServer

from synapse_sticky.config import RateLimit
from synapse_sticky.seams.checks import require


class Rates:
    """Limits how much each local sender sends to each room through this process.

    Those whom Synapse exempts are exempt: users in its table of overrides, and application
    services whose registration says so.
    """

    def __init__(self, hs: HomeServer, name: str, limit: RateLimit) -> None:
        require(ratelimiting, "Ratelimiter", "store", "clock", "cfg", "ratelimit_callbacks")
        require(ratelimiting.Ratelimiter, "ratelimit", "requester", "key")
        self._limiter = ratelimiting.Ratelimiter(
            store=hs.get_datastores().main,
            clock=hs.get_clock(),
            cfg=RatelimitSettings(name, limit.per_second, limit.burst_count),
            ratelimit_callbacks=hs.get_module_api_callbacks().ratelimit,
        )

    async def count(self, requester: Any, room_id: str) -> LimitExceededError | None:
        """Count an event, or return the error if there have been too many."""
        try:
            await self._limiter.ratelimit(requester, (requester.user.to_string(), room_id))
        except LimitExceededError as error:
            return error
        return None


class Limiter:
    """Counts by keys of any kind, in this process."""

    def __init__(self, hs: HomeServer, name: str, limit: RateLimit) -> None:
        require(ratelimiting, "Ratelimiter", "store", "clock", "cfg")
        require(ratelimiting.Ratelimiter, "can_do_action", "requester", "key")
        self._limiter = ratelimiting.Ratelimiter(
            store=hs.get_datastores().main,
            clock=hs.get_clock(),
            cfg=RatelimitSettings(name, limit.per_second, limit.burst_count),
        )

    async def allows(self, key: Hashable) -> bool:
        """Whether one more is allowed; if so, it counts."""
        allowed, _ = await self._limiter.can_do_action(None, key)
        return allowed
