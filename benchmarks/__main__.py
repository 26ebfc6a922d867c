# SPDX-License-Identifier: AGPL-3.0-or-later
"""Runs everything."""

import argparse
import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks import change, flood, latency, new_server, plot, report, watermarks
from benchmarks.clock import machine_busy_s, own_cpu_s
from benchmarks.growth import growing_servers, growth_scenarios
from benchmarks.measure import Measurement, Scenario, measure, measure_idleness
from benchmarks.memory import Memory, index_bytes, server_bytes
from benchmarks.progress import Progress
from benchmarks.results import Results, Section, targets
from benchmarks.scenarios import comparisons
from benchmarks.server import CONTROL, OWN, PLAIN, STICKY, Server
from benchmarks.world import World, build_world, copy_server
from harness.processes import temporary_directory


@dataclass(frozen=True)
class Extent:
    """How much is measured.

    Attributes:
        rounds: of every scenario, at most.
        requests: to each server in each round.
        budget_s: how long a scenario may take.
        rooms: that the reader is in.
        members: of the large room.
        sizes: numbers of sticky events for the growth.
        idle_s: how long a process is watched that nobody asks for anything, per round.
        idle_rounds: how often.
        payments: how often a server joins that is owed sticky events.
        payment_events: how many.
        pairs: of a sticky event and a plain one, whose way from one reader to another is timed.
        flood: how many events a server floods a room with.
    """

    rounds: int
    requests: int
    budget_s: float
    rooms: int
    members: int
    sizes: list[int]
    idle_s: float
    idle_rounds: int
    payments: int
    payment_events: int
    pairs: int
    flood: int


FULL: Final = Extent(40, 10, 58, 200, 200, [0, 1_000, 10_000, 100_000], 5, 6, 5, 1_000, 400, 10_000)
QUICK: Final = Extent(5, 5, 20, 40, 40, [0, 1_000, 100_000], 2, 2, 2, 200, 60, 2_000)
SECTIONS: Final = (new_server.KEY, watermarks.KEY, latency.KEY, flood.KEY, change.KEY)
"""What can be measured without the rest. The last one only with `--against`."""
# How much longer than others these may take.
_PATIENCE: Final = {
    new_server.KEY: 5,
    watermarks.KEY: 3,
    latency.KEY: 10,
    flood.KEY: 0,
    change.KEY: 1,
}


class Run:
    """One run."""

    def __init__(self, extent: Extent, only: set[str], against: str | None) -> None:
        self._extent = extent
        self._only = only
        self._against = against
        self._progress = Progress()
        self._directory = temporary_directory("benchmarks-")
        # Of processes whose CPU time was read for the last time.
        self._ours_s = 0.0
        self._busy_s = 0.0
        self._wall_s = 0.0

    def everything(self) -> tuple[Results, float]:
        """Measure all; returns how many seconds it took as well."""
        self._progress.line("Making users and rooms")
        world = build_world(
            self._directory / "template",
            self._extent.rooms,
            self._extent.members,
            self._progress.step,
        )
        compared = self._compare(world)
        grown, memory = self._grow(world)
        sections = self.sections()
        others = max(0.0, self._busy_s - self._ours_s) / (self._wall_s * (os.cpu_count() or 1))
        self._progress.line(f"Other programs used {others:.0%} of the processors meanwhile")
        results = Results(compared, grown, self._extent.sizes, memory, others, sections)
        return results, self._progress.seconds

    def sections(self) -> list[Section]:
        """Measure what takes several homeservers."""
        extent, sections = self._extent, []
        for key in SECTIONS:
            if self._only and key not in self._only:
                continue
            directory, budget_s = self._directory / key, extent.budget_s * _PATIENCE[key]
            if key == new_server.KEY:
                self._progress.line("Paying a server that joins")
                section = new_server.measure_new_server(
                    directory,
                    extent.payments,
                    extent.payment_events,
                    budget_s,
                    self._progress,
                )
            elif key == latency.KEY:
                self._progress.line("Sending from one reader to another")
                section = latency.measure_latency(directory, extent.pairs, budget_s, self._progress)
            elif key == flood.KEY:
                self._progress.line("Flooding a room")
                section = flood.measure_flood(directory, extent.flood, self._progress)
            elif key == change.KEY:
                if self._against is None:
                    continue
                self._progress.line(f"Comparing with the module at {self._against}")
                section = change.measure_change(
                    directory,
                    self._against,
                    extent.rooms,
                    extent.rounds,
                    extent.requests,
                    budget_s,
                    self._progress,
                    self._show,
                )
            else:
                self._progress.line("Sending to many servers")
                measured, section = watermarks.measure_watermarks(
                    directory, extent.rounds, budget_s, self._progress
                )
                self._show(measured)
            sections.append(section)
        return sections

    def _compare(self, world: World) -> list[Measurement]:
        self._progress.line("Comparing Synapse without sticky events, its own, and the module")
        servers = [
            copy_server(world.directory, kind, kind, self._directory / kind)
            for kind in (PLAIN, CONTROL, OWN, STICKY)
        ]
        with self._running(servers):
            scenarios = comparisons(world, self._extent.rooms, self._extent.members)
            return self._measure_all(scenarios, servers)

    def _grow(self, world: World) -> tuple[list[Measurement], Memory]:
        self._progress.line("Comparing numbers of sticky events")
        by_size = growing_servers(world, self._directory / "growth", self._extent.sizes)
        with self._running(list(by_size.values())):
            server_figure = server_bytes(by_size)
            measured = self._measure_all(growth_scenarios(world), list(by_size.values()))
        events = max(by_size)
        memory = Memory(server_figure, index_bytes(events), events)
        self._progress.line(
            f"Memory per event: {memory.server:.0f} bytes in a server, "
            f"{memory.index:.0f} bytes in an index alone"
        )
        return measured, memory

    def _measure_all(self, scenarios: list[Scenario], servers: list[Server]) -> list[Measurement]:
        measured = []
        for scenario in scenarios:
            if self._only and scenario.key not in self._only:
                continue
            result = measure(
                scenario,
                servers,
                self._extent.rounds,
                self._extent.requests,
                self._extent.budget_s,
                self._progress.step,
            )
            measured.append(result)
            self._show(result)
        result = measure_idleness(servers, self._extent.idle_rounds, self._extent.idle_s)
        measured.append(result)
        self._show(result)
        return measured

    def _show(self, measurement: Measurement) -> None:
        for line in report.terminal_lines(measurement):
            self._progress.line(line)

    @contextlib.contextmanager
    def _running(self, servers: list[Server]) -> Iterator[None]:
        """Start servers, and count what else the machine does until they are stopped."""
        try:
            for server in servers:
                server.ensure_running()
            pids = [server.pid for server in servers]
            start_s = self._progress.seconds
            busy_s, ours_s = machine_busy_s(), own_cpu_s(pids)
            yield
            self._busy_s += machine_busy_s() - busy_s
            self._ours_s += own_cpu_s(pids) - ours_s
            self._wall_s += self._progress.seconds - start_s
        finally:
            for server in servers:
                server.close()


def main() -> None:
    """Read the command line, run, and say what came out."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="a short run; writes no document by itself"
    )
    parser.add_argument(
        "--output", type=Path, help="directory for performance.md and .png (default: docs)"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="SCENARIO",
        help="measure these only, and write no document; of these "
        f"({', '.join(SECTIONS)}) it replaces the sections in that of --output",
    )
    parser.add_argument(
        "--against",
        metavar="REVISION",
        help=f"compare with the module at this revision of the repository ({change.KEY})",
    )
    arguments = parser.parse_args()
    if change.KEY in arguments.only and arguments.against is None:
        parser.error(f"{change.KEY} needs --against REVISION, for example: --against HEAD~1")
    extent = QUICK if arguments.quick else FULL
    run = Run(extent, set(arguments.only), arguments.against)
    if arguments.only and set(arguments.only) <= set(SECTIONS):
        sections = run.sections()
        for line in report.target_lines(t for section in sections for t in section.targets):
            print(line)
        if arguments.output is not None:
            report.replace_sections(sections, arguments.output / "performance.md")
        return
    results, seconds = run.everything()
    if arguments.only:
        return
    for line in report.target_lines(targets(results)):
        print(line)
    output = arguments.output or (None if arguments.quick else Path("docs"))
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        report.write_document(results, output / "performance.md", seconds)
        plot.draw(results, output / "performance.png")
        print(f"Written: {output / 'performance.md'} and {output / 'performance.png'}")


main()
