"""A flood that goes on for longer than events are sticky: how much memory it takes."""

import asyncio
import gc
import sys
import tracemalloc
from array import array

from synapse_sticky.deliverable.index import StickyIndex
from synapse_sticky.noticing.reviews import Reviews
from synapse_sticky.noticing.throttle import Key, Throttle, Verdict
from synapse_sticky.seams.rates import Limiter
from synapse_sticky.storage.rows import EventChange

ROOM, SERVER = "!room:example.org", "elsewhere.example.org"
KEY: Key = (ROOM, SERVER)
HOUR_S = 3_600
EXPIRY_INTERVAL_S = 60


class Timed(Limiter):
    """Allows so many in a second, at times that the test says."""

    def __init__(self, per_second: float, burst_count: int) -> None:
        self._per_second, self._burst_count = per_second, burst_count
        self._left, self._filled_s, self.now_s = float(burst_count), 0.0, 0.0

    async def allows(self, key: object) -> bool:
        """Whether there is room for one more."""
        since_s, self._filled_s = self.now_s - self._filled_s, self.now_s
        self._left = min(self._burst_count, self._left + since_s * self._per_second)
        if self._left < 1:
            return False
        self._left -= 1
        return True


class Flood:
    """What processes remember of a flood: rows of held events are in the database alone."""

    def __init__(self, per_second: float, burst_count: int, most: int) -> None:
        self.limiter = Timed(per_second, burst_count)
        self.throttle = Throttle(self.limiter, most)
        self.index, self.reviews = StickyIndex(), Reviews()
        self.beyond = 0
        self._position = 0
        # The number and the time of expiry of each held event, one after the other: that is
        # the database, and hardly counts as memory.
        self._rows = array("q")
        self._numbers = 0

    async def second(self, events: int) -> None:
        """Play a second, at the beginning of which so many events come."""
        self.limiter.now_s += 1
        now_ts = int(self.limiter.now_s * 1_000)
        for _ in range(events):
            self._numbers += 1
            verdict = await self.throttle.judge(*KEY)
            if verdict is Verdict.BEYOND:
                self.beyond += 1
                continue
            expires_ts = now_ts + HOUR_S * 1_000
            if verdict is Verdict.HELD:
                self._rows.extend((self._numbers, expires_ts))
            self._record(self._numbers, expires_ts, verdict is Verdict.HELD)
        for _ in range(await self.throttle.take(KEY, 500)):
            number, expires_ts = self._rows[:2]
            del self._rows[:2]
            self._record(number, expires_ts, held=False)
        if self.limiter.now_s % EXPIRY_INTERVAL_S == 0:
            self.index.expire(now_ts)
            self.reviews.expire(now_ts)
            while self._rows and self._rows[1] <= now_ts:
                del self._rows[:2]
            self.throttle.load({KEY: len(self._rows) // 2} if self._rows else {})

    def _record(self, number: int, expires_ts: int, held: bool) -> None:
        self._position += 1
        # As long as an ID is, and a new text each time, as read from a database.
        event_id = f"${number:043}"
        position = None if held else self._position
        change = EventChange(event_id, ROOM, f"@{number}:{SERVER}", position, expires_ts, number)
        self.index.apply([change], [], self._position)
        self.reviews.note([(ROOM, expires_ts)])


def _traced_bytes() -> int:
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


def test_memory_of_a_held_event() -> None:
    # A2: of every process; the writer has an index too
    async def play() -> float:
        flood = Flood(per_second=1, burst_count=1, most=20_000)
        await flood.second(2)
        before = _traced_bytes()
        for _ in range(10):
            await flood.second(2_000)
        assert flood.index.held_count > 19_900
        live = len(flood.index) * 1_000
        return (_traced_bytes() - before - live) / flood.index.held_count

    tracemalloc.start()
    try:
        assert asyncio.run(play()) <= 200
    finally:
        tracemalloc.stop()


def test_memory_is_bounded_however_long_it_goes_on() -> None:
    # A1, A2: an hour until the first have expired, and two more
    async def play() -> list[int]:
        flood = Flood(per_second=0.5, burst_count=50, most=500)
        highest = [0, 0, 0]
        for second in range(3 * HOUR_S):
            await flood.second(2)
            assert flood.index.held_count <= 500
            assert len(flood.index) <= 50 + HOUR_S / 2 + EXPIRY_INTERVAL_S + 10
            if second % 300 == 0:
                hour = second // HOUR_S
                highest[hour] = max(highest[hour], _traced_bytes())
        assert flood.beyond > 10_000
        return highest

    tracemalloc.start()
    try:
        _, second, third = asyncio.run(play())
    finally:
        tracemalloc.stop()
    assert third <= 1.05 * second


def test_the_measure_sees_what_a_process_keeps() -> None:
    """A list of the events would be seen."""
    tracemalloc.start()
    try:
        before = _traced_bytes()
        kept = [f"${number:043}" for number in range(1_000)]
        assert _traced_bytes() - before >= 1_000 * sys.getsizeof(kept[0])
    finally:
        tracemalloc.stop()
