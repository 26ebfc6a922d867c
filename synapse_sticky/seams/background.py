# SPDX-License-Identifier: AGPL-3.0-or-later
"""The homeserver behind the module API, its clock, and waiting within its event loop."""

import time
from collections.abc import Callable

from synapse.module_api import ModuleApi
from synapse.server import HomeServer
from synapse.util import async_helpers
from synapse.util.duration import Duration

from synapse_sticky.seams.checks import require


def homeserver_of(api: ModuleApi) -> HomeServer:
    """Return the homeserver object that hooks and seams work on."""
    require(api, "_hs")
    return api._hs


class Clock:
    """The one clock that everything here goes by."""

    def __init__(self, hs: HomeServer) -> None:
        self._clock = hs.get_clock()
        require(self._clock, "time_msec")
        require(self._clock, "call_later")
        require(self._clock, "sleep")

    def now_ts(self) -> int:
        """Return the time in ms since the epoch."""
        return self._clock.time_msec()

    def monotonic_ms(self) -> int:
        """Return a time in ms that never jumps, for waits."""
        return int(time.monotonic() * 1000)

    def call_later(self, delay_ms: float, callback: Callable[[], object]) -> Callable[[], None]:
        """Call something trivial after a while, without a background process for it.

        Returns:
            what keeps it from being called.
        """
        call = self._clock.call_later(Duration(milliseconds=delay_ms), callback)

        def cancel() -> None:
            if call.active():
                call.cancel()

        return cancel

    async def sleep(self, duration_ms: float) -> None:
        """Wait that long."""
        await self._clock.sleep(Duration(milliseconds=duration_ms))


class Broadcast:
    """Lets requests wait until something happens, for a bounded time."""

    def __init__(self, hs: HomeServer, clock: Clock) -> None:
        require(async_helpers, "DeferredEvent", "clock")
        require(async_helpers.DeferredEvent, "wait", "timeout_seconds")
        self._clock = clock
        self._synapse_clock = hs.get_clock()
        self._event = async_helpers.DeferredEvent(self._synapse_clock)

    def notify_all(self) -> None:
        """Let every request go on that waits now."""
        event, self._event = self._event, async_helpers.DeferredEvent(self._synapse_clock)
        event.set()

    async def wait(self, until_ts: int) -> bool:
        """Wait for the next call of :meth:`notify_all`; False if the time came first."""
        return await self.wait_for(until_ts - self._clock.now_ts())

    async def wait_for(self, limit_ms: int) -> bool:
        """Wait for the next call of :meth:`notify_all`; False if that took too long."""
        return limit_ms > 0 and await self._event.wait(limit_ms / 1000)
