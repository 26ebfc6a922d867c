# SPDX-License-Identifier: AGPL-3.0-or-later
"""The homeserver behind the module API, and waiting within its event loop."""

from collections.abc import Callable

from synapse.module_api import ModuleApi
from synapse.server import HomeServer
from synapse.util import async_helpers
from synapse.util.duration import Duration

from synapse_sticky.seams.checks import require


def homeserver_of(api: ModuleApi) -> HomeServer:
    """The homeserver object that the seams work on."""
    require(api, "_hs")
    return api._hs


def call_later(hs: HomeServer, delay_ms: float, callback: Callable[[], None]) -> None:
    """Calls something trivial after a while, without a process of its own for it."""
    hs.get_clock().call_later(Duration(milliseconds=delay_ms), callback)


class News:
    """Lets requests wait until something happens, for a bounded time."""

    def __init__(self, hs: HomeServer) -> None:
        require(async_helpers, "DeferredEvent", "clock")
        require(async_helpers.DeferredEvent, "wait", "timeout_seconds")
        self._clock = hs.get_clock()
        self._event = async_helpers.DeferredEvent(self._clock)

    def now_ts(self) -> int:
        """The time in ms since the epoch."""
        return self._clock.time_msec()

    def announce(self) -> None:
        """Lets everybody go on who waits now."""
        event, self._event = self._event, async_helpers.DeferredEvent(self._clock)
        event.set()

    async def wait(self, until_ts: int) -> bool:
        """Waits for the next announcement; False if the time came first."""
        left_ms = until_ts - self._clock.time_msec()
        return left_ms > 0 and await self._event.wait(left_ms / 1000)
