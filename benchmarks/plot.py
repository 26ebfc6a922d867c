# SPDX-License-Identifier: AGPL-3.0-or-later
"""Draws ``docs/performance.png``."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot

from benchmarks.ratio import Ratio
from benchmarks.results import Results
from benchmarks.server import OWN, PLAIN, STICKY

_LABELS = {
    "idle_sync": "/sync, nothing new",
    "sync_one_event": "/sync, one new event",
    "send_small": "plain send,\nsmall room",
    "send_large": "plain send,\nlarge room",
    "send_burst": "plain sends\nin a burst",
    "gappy_sync": "/sync over a gap,\n30 sticky events",
    "sticky_send": "sticky send",
    "growth_idle_sync": "/sync, nothing new",
    "growth_old_sync": "/sync from before them",
    "growth_send_sync": "plain send and /sync",
}
_PAIRS = (
    (STICKY, PLAIN, "module / Synapse without", "tab:blue", "o"),
    (STICKY, OWN, "module / Synapse's own", "tab:orange", "s"),
)


def draw(results: Results, path: Path) -> None:
    """Draw the ratios, and how they grow."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 5.2), width_ratios=(3, 2))
    _draw_comparisons(left, results)
    _draw_growth(right, results)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _draw_comparisons(axes: Any, results: Results) -> None:
    measured = [m for m in results.comparisons if m.scenario.key in _LABELS]
    for shift, (first, second, label, colour, marker) in zip((-0.13, 0.13), _PAIRS, strict=True):
        ratios = [m.cpu_ratio(first, second) for m in measured]
        places = [place + shift for place in range(len(ratios))]
        axes.errorbar(
            [r.value for r in ratios],
            places,
            xerr=_errors(ratios),
            fmt=marker,
            color=colour,
            capsize=3,
            label=label,
        )
        for place, ratio in zip(places, ratios, strict=True):
            axes.annotate(
                f"{ratio.value:.2f}",
                (ratio.high, place),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                color=colour,
            )
    axes.axvline(1, color="grey", linewidth=1)
    axes.set_yticks(range(len(measured)), [_LABELS[m.scenario.key] for m in measured])
    axes.invert_yaxis()
    axes.margins(x=0.12, y=0.06)
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("ratio of CPU time (95% confidence)")
    axes.set_title("Compared with the same Synapse")
    axes.legend(loc="best", fontsize=9)


def _draw_growth(axes: Any, results: Results) -> None:
    places = range(len(results.sizes))
    measured = [m for m in results.growth if m.scenario.key in _LABELS]
    for number, (m, marker) in enumerate(zip(measured, "osD", strict=False)):
        ratios = [results.growth_ratio(m, size) for size in results.sizes]
        shift = (number - 1) * 0.06
        axes.errorbar(
            [place + shift for place in places],
            [r.value for r in ratios],
            yerr=_errors(ratios),
            fmt=f"{marker}-",
            capsize=3,
            label=_LABELS[m.scenario.key],
        )
    axes.axhline(1.1, color="tab:red", linestyle="--", linewidth=1, label="target")
    axes.set_xticks(places, [f"{size:,}" for size in results.sizes])
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, 0.9), max(high, 1.2) + 0.1)
    axes.grid(axis="y", alpha=0.3)
    axes.set_xlabel("live sticky events in rooms the user is not in")
    axes.set_ylabel("ratio of CPU time to none (95% confidence)")
    axes.set_title("Many sticky events elsewhere")
    axes.legend(loc="upper left", ncols=2, fontsize=9)


def _errors(ratios: list[Ratio]) -> list[list[float]]:
    return [[r.value - r.low for r in ratios], [r.high - r.value for r in ratios]]
