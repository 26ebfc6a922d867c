# SPDX-License-Identifier: AGPL-3.0-or-later
"""Measures every few seconds how things are, for the metrics listener.

What all processes share is measured by the process that runs the indexer alone, and what a
server is owed by the process that sends to it: so a sum of counts over all processes is right.
"""

from collections.abc import Awaitable, Callable, Mapping
from typing import Final

import attr
from synapse.module_api import ModuleApi

from synapse_sticky.deliverable.reader import IndexReader
from synapse_sticky.noticing.admission import HeldReason
from synapse_sticky.seams.background import Clock
from synapse_sticky.seams.failures import shielded
from synapse_sticky.seams.metrics import (
    EXPIRED_WHILE_HELD,
    HELD_EVENTS,
    INDEX_AGE,
    INDEXER_LAG,
    LIVE_EVENTS,
    LONGEST_OWED,
    OWED_EVENTS,
    OWED_SERVERS,
    TIME_TO_DELIVERABLE,
    Metrics,
)
from synapse_sticky.seams.streams import StreamBounds
from synapse_sticky.servers.debts import Debts, Reason
from synapse_sticky.servers.ledger import Ledger
from synapse_sticky.servers.looper import Looper
from synapse_sticky.storage.reports import Reports

# Prometheus asks every fifteen seconds, unless it is told otherwise.
_INTERVAL_MS: Final = 5_000


@attr.s(slots=True, frozen=True, auto_attribs=True)
class Measurements:
    """Sets the gauges of one process."""

    _api: ModuleApi
    _clock: Clock
    _metrics: Metrics
    _reports: Reports
    _bounds: StreamBounds
    _reader: IndexReader
    _ledger: Ledger | None
    _looper: Looper | None
    _debts: Debts

    def start(self) -> None:
        """Begin to measure, if anybody can ask for it."""
        for reason in HeldReason:
            self._metrics.count(EXPIRED_WHILE_HELD, 0, reason=reason.value)
        if not self._metrics.are_served:
            return
        self._repeat(self._measure_process)
        if self._api.should_run_background_tasks():
            self._metrics.observe(TIME_TO_DELIVERABLE, ())
            self._repeat(self._measure_shared)
        if self._ledger is not None and self._looper is not None:
            self._repeat(self._measure_owed, self._ledger, self._looper)

    def _repeat(self, measure: Callable[..., Awaitable[None]], *arguments: object) -> None:
        async def measure_safely() -> None:
            with shielded("Cannot measure for the metrics; they stay as they were"):
                await measure(*arguments)

        self._api.looping_background_call(
            measure_safely, _INTERVAL_MS, desc="sticky_measure", run_on_all_instances=True
        )

    async def _measure_process(self) -> None:
        age_ms = self._clock.now_ts() - self._reader.refreshed_ts
        self._metrics.set(INDEX_AGE, max(0, age_ms) / 1000)

    async def _measure_shared(self) -> None:
        index = self._reader.index
        self._metrics.set(LIVE_EVENTS, len(index))
        lag = self._bounds.current().events - index.read.events
        self._metrics.set(INDEXER_LAG, max(0, lag))
        held = await self._reports.count_held(self._clock.now_ts()) if index.held_count else {}
        for reason in HeldReason:
            self._metrics.set(HELD_EVENTS, held.get(reason.value, 0), reason=reason.value)

    async def _measure_owed(self, ledger: Ledger, looper: Looper) -> None:
        owed, since_ts = 0, dict[str, int]()
        for server_name, room_id in looper.debts():
            join = self._reader.index.join(server_name, room_id)
            for event in ledger.due(server_name, room_id):
                owed += 1
                # Nothing was owed to it before it joined.
                ts = event.position if join is None else max(event.position, join.position)
                since_ts[server_name] = min(ts, since_ts.get(server_name, ts))
            # Requests need not wait until all are counted.
            await self._clock.sleep(0)
        self._metrics.set(OWED_EVENTS, owed)
        await self._measure_servers(since_ts)

    async def _measure_servers(self, since_ts: Mapping[str, int]) -> None:
        now_ts = self._clock.now_ts()
        waits_ms: dict[Reason, list[int]] = {Reason.TRYING: [], Reason.BACKING_OFF: []}
        for server_name, ts in since_ts.items():
            is_left_alone = await self._debts.backing_off_until_ts(server_name) is not None
            reason = Reason.BACKING_OFF if is_left_alone else Reason.TRYING
            waits_ms[reason].append(now_ts - ts)
        for reason, waits in waits_ms.items():
            self._metrics.set(OWED_SERVERS, len(waits), reason=reason.value)
            longest_ms = max([0, *waits])
            self._metrics.set(LONGEST_OWED, longest_ms / 1000, reason=reason.value)
