# SPDX-License-Identifier: AGPL-3.0-or-later
"""What a run has found, and what it was to be."""

from dataclasses import dataclass

from benchmarks.measure import Measurement
from benchmarks.memory import Memory
from benchmarks.ratio import Ratio
from benchmarks.server import OWN, PLAIN, STICKY


@dataclass(frozen=True)
class Target:
    """A promise, and whether it is kept."""

    text: str
    bound: str
    measured: str
    met: bool


@dataclass(frozen=True)
class Section:
    """What a benchmark found that has a section of the document to itself.

    Attributes:
        key: the benchmark's.
        text: what stands under the title.
    """

    key: str
    title: str
    text: str
    targets: list[Target]


@dataclass(frozen=True)
class Results:
    """Everything that was measured.

    Attributes:
        comparisons: on the three servers.
        growth: on servers of different sizes, whose names are the sizes.
        sizes: how many sticky events the latter have, smallest first.
        others: the part of the machine's processors that was used by other programs.
    """

    comparisons: list[Measurement]
    growth: list[Measurement]
    sizes: list[int]
    memory: Memory
    others: float
    sections: list[Section]

    def comparison(self, key: str) -> Measurement:
        """One of the comparisons."""
        return next(m for m in self.comparisons if m.scenario.key == key)

    def growth_ratio(self, measurement: Measurement, size: int) -> Ratio:
        """What a size costs, compared with the smallest."""
        return measurement.cpu_ratio(str(size), str(self.sizes[0]))


def targets(results: Results) -> list[Target]:
    """All targets. A ratio is judged by itself, not by its interval."""
    comparison = results.comparison
    largest = results.sizes[-1]
    return [
        at_most(
            "Plain send to a small room, to Synapse without",
            comparison("send_small").cpu_ratio(STICKY, PLAIN),
            1.02,
        ),
        at_most(
            "Plain send to a large room, to Synapse without",
            comparison("send_large").cpu_ratio(STICKY, PLAIN),
            1.02,
        ),
        at_most(
            "`/sync` with nothing new, to Synapse without",
            comparison("idle_sync").cpu_ratio(STICKY, PLAIN),
            1.05,
        ),
        _below(
            "`/sync` with nothing new, to Synapse's own",
            comparison("idle_sync").cpu_ratio(STICKY, OWN),
            1.0,
        ),
        at_most(
            "`/sync` over a gap with 30 sticky events, to Synapse's own",
            comparison("gappy_sync").cpu_ratio(STICKY, OWN),
            1.0,
        ),
        *(
            at_most(
                f"{m.scenario.title}: {largest:,} sticky events elsewhere, to none",
                results.growth_ratio(m, largest),
                1.1,
            )
            for m in results.growth
            if m.wall_ms
        ),
        Target(
            "Memory for a live sticky event",
            "≤ 500 bytes",
            f"{results.memory.server:.0f} bytes",
            results.memory.server <= 500,
        ),
        *(target for section in results.sections for target in section.targets),
    ]


def at_most(text: str, ratio: Ratio, limit: float) -> Target:
    """A target for a ratio."""
    return Target(text, f"≤ {limit:.2f}", str(ratio), ratio.value <= limit)


def _below(text: str, ratio: Ratio, limit: float) -> Target:
    return Target(text, f"< {limit:.2f}", str(ratio), ratio.value < limit)
