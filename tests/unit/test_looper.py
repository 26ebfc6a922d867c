"""How Synapse's queues wait for the first look after a start."""

import asyncio
import time
from typing import Any

from synapse_sticky.config import StickyEventsConfig
from synapse_sticky.seams.background import Broadcast, Clock
from synapse_sticky.servers.ledger import Ledger
from synapse_sticky.servers.looper import Looper

WAIT_S = 0.5
LOOK_S = 0.04


class Time(Clock):
    """The time of this machine."""

    def __init__(self) -> None:
        pass

    def now_ts(self) -> int:
        """The time."""
        return int(time.time() * 1_000)


class Event(Broadcast):
    """As the real one, without Synapse."""

    def __init__(self) -> None:
        self._happened = asyncio.Event()

    def notify_all(self) -> None:
        """Let everybody go on that waits now."""
        happened, self._happened = self._happened, asyncio.Event()
        happened.set()

    async def wait(self, until_ts: int) -> bool:
        """Wait for the next call of that, for a bounded time."""
        try:
            left_s = until_ts / 1_000 - time.time()
            await asyncio.wait_for(self._happened.wait(), left_s)
        except TimeoutError:
            return False
        return True


class Away(Ledger):
    """Cannot read its tables, and finds out at once."""

    def __init__(self) -> None:
        self.tries = 0

    @property
    def has_begun(self) -> bool:
        """Never."""
        return False

    async def begin(self, *args: Any) -> None:
        """Fail, as soon as others have had their turn."""
        self.tries += 1
        await asyncio.sleep(0)
        raise RuntimeError("the database is away")


def looper_with(ledger: Ledger, event: Event) -> Looper:
    """One that runs without Synapse."""

    class Api:
        def run_as_background_process(self, desc: str, func: Any, *args: Any) -> None:
            self.task = asyncio.ensure_future(func(*args))

    nothing: Any = None

    class Sends:
        def sends_to(self, server_name: str) -> bool:
            return True

    api: Any = Api()
    federation: Any = Sends()
    config = StickyEventsConfig.parse({})
    return Looper(api, Time(), nothing, federation, ledger, config, nothing, event)


def test_a_look_that_fails_is_not_tried_without_end() -> None:
    # F5: also while many queues wait for it
    ledger = Away()

    async def play() -> None:
        looper = looper_with(ledger, Event())
        queues = [looper.before_transaction(f"{n}.example.org") for n in range(20)]
        waiting = asyncio.gather(*queues)
        began = time.monotonic()
        await asyncio.sleep(WAIT_S)
        waiting.cancel()
        # On a busy machine that may be longer.
        assert 1 < ledger.tries <= 2 * (time.monotonic() - began) / LOOK_S

    asyncio.run(play())
