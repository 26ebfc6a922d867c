"""The default rates, and what a large call sends: nothing of it is held or refused."""

import asyncio
import random
from types import SimpleNamespace
from typing import Any

import pytest
from synapse.api.ratelimiting import Ratelimiter
from synapse.config.ratelimiting import RatelimitSettings

from synapse_sticky.config import LOCAL_RATE_LIMIT, REMOTE_RATE_LIMIT, RateLimit

PARTICIPANTS = 1_000
MINUTE_S = 60.0
REFRESH_S = 600.0
LENGTH_S = 3_600.0


def _limiter(limit: RateLimit) -> Ratelimiter:
    # It only has its clock call it from time to time; the time is passed to it.
    clock: Any = SimpleNamespace(looping_call=lambda *args: None)
    store: Any = None
    settings = RatelimitSettings("test", limit.per_second, limit.burst_count)
    return Ratelimiter(store=store, clock=clock, cfg=settings)


def _call(seed: int) -> list[tuple[float, int]]:
    """When each participant sends a sticky event: all join, refresh, and leave."""
    chance = random.Random(seed)
    sends = []
    for participant in range(PARTICIPANTS):
        joined_s = chance.uniform(0, MINUTE_S)
        left_s = LENGTH_S + chance.uniform(0, MINUTE_S)
        moment_s = joined_s
        while moment_s < left_s:
            sends.append((moment_s, participant))
            moment_s += REFRESH_S
        sends.append((left_s, participant))
    return sorted(sends)


@pytest.mark.parametrize("seed", range(3))
def test_a_call_of_a_thousand(seed: int) -> None:
    # A2, A3
    remote, local = _limiter(REMOTE_RATE_LIMIT), _limiter(LOCAL_RATE_LIMIT)

    async def play() -> None:
        for moment_s, participant in _call(seed):
            for limiter, key in ((remote, "server"), (local, f"@{participant}")):
                allowed, _ = await limiter.can_do_action(None, key, _time_now_s=moment_s)
                assert allowed, (moment_s, key)

    asyncio.run(play())


def test_a_flood_is_not_a_call() -> None:
    # A2: ten times as many within a minute
    remote = _limiter(REMOTE_RATE_LIMIT)

    async def play() -> int:
        answers = [
            await remote.can_do_action(None, "server", _time_now_s=moment_s / 10)
            for moment_s, _ in [*_call(0), *_call(1)]
            if moment_s < MINUTE_S
        ]
        return sum(not allowed for allowed, _ in answers)

    assert asyncio.run(play()) > 500
