"""The decisions of the server's admin, in memory."""

import asyncio
from typing import Any

from synapse_sticky.control.overrides import Kind, Overrides
from synapse_sticky.storage.overrides import OverrideRow


class _Clock:
    def now_ts(self) -> int:
        return 1_000


class _Table:
    """A table whose readers get the rows of when they begin, in an order that a test chooses."""

    def __init__(self) -> None:
        self.rows: list[OverrideRow] = []
        self.readers: list[asyncio.Future[None]] = []

    async def get_all(self) -> list[OverrideRow]:
        rows = list(self.rows)
        self.readers.append(asyncio.get_running_loop().create_future())
        await self.readers[-1]
        return rows


def test_a_late_answer_undoes_nothing() -> None:
    """Of two reads at the same time the one that began last counts, whichever ends last."""
    table = _Table()
    without_synapse: Any = None
    clock: Any = _Clock()
    store: Any = table
    overrides = Overrides(without_synapse, clock, store)

    async def read_twice() -> None:
        first = asyncio.create_task(overrides.refresh())
        await asyncio.sleep(0)
        table.rows = [OverrideRow("room", "!a:b", 0, None, None)]
        second = asyncio.create_task(overrides.refresh())
        await asyncio.sleep(0)
        for reader, task in ((1, second), (0, first)):
            table.readers[reader].set_result(None)
            await task

    asyncio.run(read_twice())
    assert overrides.get(Kind.ROOM, "!a:b") is not None
