# SPDX-License-Identifier: AGPL-3.0-or-later
"""How long a sticky event takes from one reader to a long-poll on another.

Nine processes with PostgreSQL and Redis. A sticky event and a plain one are sent in turn.
"""

import contextlib
import random
import statistics
import time
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from benchmarks.listener import Listener, Wire
from benchmarks.progress import Progress
from benchmarks.ratio import Ratio, ratio_of_medians
from benchmarks.results import Section, Target, at_most
from benchmarks.scenarios import STICKY_MS
from benchmarks.server import OWN, STICKY, Server
from harness.client import STICKY_PARAMETER
from harness.postgres import PostgresServer
from harness.redis import RedisServer

KEY: Final = "latency"
_WARM_UP_PAIRS: Final = 20
_MIN_PAIRS: Final = 50
_KINDS: Final = (STICKY, OWN)
# By then all processes have done what an event gives them to do.
_PAUSE_S: Final = 0.12
_PLAIN: Final = "m.room.message"
# What the filter leaves out of the timeline, where it is to leave out sticky events.
_HIDDEN: Final = "org.example.hidden"

_SHOWN: Final = "timeline"
_SECTION: Final = "section"
_TITLES: Final = {
    _SHOWN: "the timeline shows it",
    _SECTION: "only the section shows it",
}
_BOUNDS: Final = {_SHOWN: 1.05, _SECTION: 1.10}


@dataclass
class Latencies:
    """How long events took, in ms, pair by pair."""

    sticky: list[float] = field(default_factory=list)
    plain: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> Ratio:
        """The median of sticky events to that of plain ones."""
        return ratio_of_medians(self.sticky, self.plain)

    def __str__(self) -> str:
        parts = []
        for name, values in (("sticky", self.sticky), ("plain", self.plain)):
            median, high = statistics.median(values), percentile(values, 99)
            parts.append(f"{name} {median:.1f} ms, 99th percentile {high:.1f} ms")
        return f"{self.ratio}: {'; '.join(parts)}"


def percentile(values: Sequence[float], percent: int) -> float:
    """The value that this part of all values does not exceed."""
    return sorted(values)[max(0, -(-len(values) * percent // 100) - 1)]


def measure_latency(directory: Path, pairs: int, budget_s: float, progress: Progress) -> Section:
    """Measure both cases, with the module and with Synapse's own.

    Args:
        pairs: how many at most, in each case.
    """
    results: dict[tuple[str, str], Latencies] = {}
    each_s = budget_s / len(_KINDS) / len(_TITLES)
    with PostgresServer() as postgres, RedisServer() as redis:
        for kind in _KINDS:
            server = Server(
                kind,
                kind,
                directory / kind,
                workers=True,
                database=postgres.create_database(),
                redis_port=redis.port,
            )
            with contextlib.closing(server):
                server.start()
                for case in (_SHOWN, _SECTION):
                    results[kind, case] = _measure(server, case, pairs, each_s, progress)
                    progress.line(f"{KEY}: {kind}, {_TITLES[case]}: {results[kind, case]}")
    return _section(results)


def _measure(
    server: Server, case: str, pairs: int, budget_s: float, progress: Progress
) -> Latencies:
    deadline = time.monotonic() + budget_s
    sender, reader = server.register(), server.register()
    room_id = sender.create_room(preset="public_chat")
    reader.join(room_id)
    order = random.Random(case)
    result = Latencies()
    sending, receiving = server.client_urls
    timeline = {"not_types": [_HIDDEN]} if case == _SECTION else {}
    with Listener(reader, receiving, timeline) as listener:
        wire = Wire(sender, sending)
        for number in range(-_WARM_UP_PAIRS, pairs):
            if number >= _MIN_PAIRS and time.monotonic() > deadline:
                break
            for sticky in order.sample((True, False), 2):
                time.sleep(_PAUSE_S)
                start = time.perf_counter()
                event_id = _send(wire, room_id, f"{case}{number}", case, sticky)
                took_ms = (listener.arrival(event_id) - start) * 1e3
                if number >= 0:
                    (result.sticky if sticky else result.plain).append(took_ms)
            progress.step(f"{KEY}: {server.kind}, {_TITLES[case]}: pair {number + 1} of {pairs}")
        wire.close()
    return result


def _send(wire: Wire, room_id: str, name: str, case: str, sticky: bool) -> str:
    event_type = _HIDDEN if sticky and case == _SECTION else _PLAIN
    path = (
        f"/_matrix/client/v3/rooms/{urllib.parse.quote(room_id)}"
        f"/send/{event_type}/{name}{'s' if sticky else 'p'}"
    )
    if sticky:
        path += f"?{STICKY_PARAMETER}={STICKY_MS}"
    body = {"msgtype": "m.text", "body": f"This is message {name} of the benchmark"}
    event_id: str = wire.exchange("PUT", path, body)["event_id"]
    return event_id


def _section(results: dict[tuple[str, str], Latencies]) -> Section:
    pairs = min(len(found.plain) for found in results.values())
    rows = "\n".join(
        f"| {'the module' if kind == STICKY else 'own'}, {_TITLES[case]} | {found.ratio} | "
        + " | ".join(
            f"{statistics.median(values):.1f} / {percentile(values, 99):.1f} ms"
            for values in (found.sticky, found.plain)
        )
        + " |"
        for (kind, case), found in results.items()
    )
    text = f"""\
Nine processes with PostgreSQL and Redis. A user sends a sticky event and a plain one in turn,
at least {pairs} of each, in random order, through one reader; another user waits for them in a
long-poll of `/sync` on another. The time is from the beginning of the send until the whole answer
of the long-poll is there. "Own" is Synapse's own implementation.

| | Sticky / plain, medians | Sticky: median / 99th percentile | Plain: the same |
| --- | --- | --- | --- |
{rows}"""
    targets: list[Target] = [
        at_most(
            f"From one reader to a long-poll on another, {title}: sticky to plain",
            results[STICKY, case].ratio,
            _BOUNDS[case],
        )
        for case, title in _TITLES.items()
    ]
    return Section(KEY, "From one reader to another", text, targets)
