# SPDX-License-Identifier: AGPL-3.0-or-later
"""Makes the same requests to several servers in turn, and counts what they cost."""

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from benchmarks.clock import cpu_ns, settle
from benchmarks.ratio import Ratio, ratio_of
from benchmarks.server import Server

_WARM_UP_ROUNDS: Final = 3
_MIN_ROUNDS: Final = 5


class Scenario:
    """A kind of request, and what has to happen before it. To be subclassed.

    Attributes:
        key: a short name.
        title: what it is, for readers.
        burst: how many requests are made to one server before it is the next one's
            turn.
        prepares: whether `prepare` does anything.
        patience: how much longer than others it may take.
    """

    key: str
    title: str
    burst: int = 1
    prepares: bool = False
    patience: float = 1

    def begin(self, server: Server) -> None:
        """Called once for each server."""

    def prepare_round(self, server: Server) -> None:
        """Called before each round."""

    def prepare(self, server: Server) -> None:
        """Called before each request."""

    def request(self, server: Server) -> bytes:
        """Make the request: this is what is measured."""
        raise NotImplementedError

    def check(self, server: Server, body: bytes) -> None:
        """Look at the answer, and raise an AssertionError if it is not what it should be."""


@dataclass
class Measurement:
    """What a scenario cost.

    Attributes:
        cpu_ms: by server, the mean for a request of each round.
        wall_ms: by server, the median of each round.
    """

    scenario: Scenario
    cpu_ms: dict[str, list[float]] = field(default_factory=dict)
    wall_ms: dict[str, list[float]] = field(default_factory=dict)

    def add(self, other: "Measurement") -> None:
        """Take the medians of another measurement for one round of this."""
        for own, others in ((self.cpu_ms, other.cpu_ms), (self.wall_ms, other.wall_ms)):
            for name, values in others.items():
                own.setdefault(name, []).append(statistics.median(values))

    def cpu_ratio(self, numerator: str, denominator: str) -> Ratio:
        """How much more CPU time one server takes than another."""
        return ratio_of(self.cpu_ms[numerator], self.cpu_ms[denominator])

    def wall_ratio(self, numerator: str, denominator: str) -> Ratio:
        """How much longer one server takes to answer than another."""
        return ratio_of(self.wall_ms[numerator], self.wall_ms[denominator])


def measure(
    scenario: Scenario,
    servers: Sequence[Server],
    rounds: int,
    requests: int,
    budget_s: float,
    progress: Callable[[str], None],
) -> Measurement:
    """Run a scenario on several servers.

    The servers take turns request by request, each time in another random order, so
    that whatever else the machine does hits all alike.

    Args:
        rounds: how many at most.
        requests: to each server in each round.
        budget_s: no round begins later than that, except for the first few.
    """
    deadline = time.monotonic() + budget_s * scenario.patience
    order = random.Random(scenario.key)
    result = Measurement(scenario)
    for server in servers:
        scenario.begin(server)
    for number in range(-_WARM_UP_ROUNDS, rounds):
        if number >= _MIN_ROUNDS and time.monotonic() > deadline:
            break
        cpu: dict[str, list[float]] = {server.name: [] for server in servers}
        wall: dict[str, list[float]] = {server.name: [] for server in servers}
        for server in servers:
            scenario.prepare_round(server)
        for server in servers:
            settle(server.pid)
        for _ in range(max(1, requests // scenario.burst)):
            if scenario.prepares:
                for server in servers:
                    scenario.prepare(server)
                for server in servers:
                    settle(server.pid)
            for server in order.sample(servers, len(servers)):
                cost, times = _measure_burst(scenario, server)
                cpu[server.name].append(cost)
                wall[server.name] += times
        if number < 0:
            progress(f"{scenario.key}: warming up")
            continue
        for server in servers:
            name = server.name
            result.cpu_ms.setdefault(name, []).append(statistics.fmean(cpu[name]))
            result.wall_ms.setdefault(name, []).append(statistics.median(wall[name]))
        progress(f"{scenario.key}: round {number + 1} of at most {rounds}")
    return result


def _measure_burst(scenario: Scenario, server: Server) -> tuple[float, list[float]]:
    """Make one burst of requests; returns the CPU time of one and the wall time of each."""
    bodies: list[bytes] = []
    times: list[float] = []
    start_ns = cpu_ns(server.pid)
    for _ in range(scenario.burst):
        start = time.perf_counter()
        bodies.append(scenario.request(server))
        times.append((time.perf_counter() - start) * 1e3)
    settle(server.pid)
    cost_ms = (cpu_ns(server.pid) - start_ns) / 1e6 / scenario.burst
    for body in bodies:
        scenario.check(server, body)
    return cost_ms, times


def measure_idleness(servers: Sequence[Server], rounds: int, seconds: float) -> Measurement:
    """What the processes cost that nobody asks for anything: CPU time for each second."""
    result = Measurement(_Nothing())
    for _ in range(rounds):
        start = {server.name: cpu_ns(server.pid) for server in servers}
        time.sleep(seconds)
        for server in servers:
            used_ms = (cpu_ns(server.pid) - start[server.name]) / 1e6
            result.cpu_ms.setdefault(server.name, []).append(used_ms / seconds)
    return result


class _Nothing(Scenario):
    key = "idle_process"
    title = "A process that nobody asks for anything, per second"
