# SPDX-License-Identifier: AGPL-3.0-or-later
"""Says what was found: on the terminal, and in ``docs/performance.md``."""

import datetime
import platform
import re
import sqlite3
import statistics
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from string import Template

from benchmarks.measure import Measurement
from benchmarks.results import Results, Section, Target, targets
from benchmarks.server import CONTROL, OWN, PLAIN, STICKY

_PAIRS = ((STICKY, PLAIN), (STICKY, OWN), (OWN, PLAIN), (CONTROL, PLAIN))


def terminal_lines(measurement: Measurement) -> Iterable[str]:
    """One measurement, with times of this machine."""
    yield measurement.scenario.title
    for name, cpu_ms in measurement.cpu_ms.items():
        line = f"  {name:>8}: {statistics.median(cpu_ms):8.3f} ms CPU"
        if name in measurement.wall_ms:
            line += f", {statistics.median(measurement.wall_ms[name]):8.3f} ms until answered"
        yield line
    names = list(measurement.cpu_ms)
    pairs = _PAIRS if PLAIN in names else [(name, names[0]) for name in names[1:]]
    for first, second in pairs:
        if first not in names or second not in names:
            continue
        yield f"  {first}/{second}: {measurement.cpu_ratio(first, second)} CPU"


def target_lines(targets: Iterable[Target]) -> Iterable[str]:
    """Which targets are met."""
    for target in targets:
        verdict = "met   " if target.met else "MISSED"
        yield f"{verdict} {target.text}: {target.measured} ({target.bound})"


def write_document(results: Results, path: Path, seconds: float) -> None:
    """Write the document from its template."""
    template = Template(files("benchmarks").joinpath("template.md").read_text(encoding="utf-8"))
    text = template.substitute(
        date=datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        synapse=version("matrix-synapse"),
        module=version("synapse-sticky"),
        python=platform.python_version(),
        sqlite=sqlite3.sqlite_version,
        minutes=f"{seconds / 60:.0f}",
        others=f"{results.others:.0%}",
        targets=_target_table(results),
        comparisons=_comparison_table(results.comparisons),
        growth=_growth_table(results),
        memory_server=f"{results.memory.server:.0f}",
        memory_index=f"{results.memory.index:.0f}",
        memory_events=f"{results.memory.events:,}",
        sections="\n\n".join(map(_section_text, results.sections)),
    )
    path.write_text(text, encoding="utf-8")


def replace_sections(sections: Iterable[Section], path: Path) -> None:
    """Write sections into the document in place of older ones, their targets too."""
    before, targets_title, rest = path.read_text(encoding="utf-8").partition("## Targets\n\n")
    table, _, rest = rest.partition("\n\n")
    parts = re.split(r"^(?=## )", rest, flags=re.MULTILINE)
    for section in sections:
        rows = [_row(_target_cells(target)) for target in section.targets]
        old = [f"| {target.text} |" for target in section.targets]
        kept = [line for line in table.splitlines() if not line.startswith(tuple(old))]
        table = "\n".join([*kept, *rows])
        parts = [part for part in parts if not part.startswith(f"## {section.title}\n")]
        # The last part is about the method.
        parts.insert(-1, _section_text(section) + "\n\n")
    text = before + targets_title + table + "\n\n" + "".join(parts)
    path.write_text(text, encoding="utf-8")


def _section_text(section: Section) -> str:
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    versions = f"Synapse {version('matrix-synapse')}, synapse_sticky {version('synapse-sticky')}"
    return f"## {section.title}\n\n{section.text}\n\nMeasured on {today} with {versions}."


def _target_table(results: Results) -> str:
    return _table(("Target", "Bound", "Measured", "Met"), map(_target_cells, targets(results)))


def _target_cells(target: Target) -> Sequence[str]:
    return target.text, target.bound, target.measured, "yes" if target.met else "**no**"


def _comparison_table(measurements: Sequence[Measurement]) -> str:
    rows = []
    for m in measurements:
        wall = str(m.wall_ratio(STICKY, PLAIN)) if m.wall_ms else "-"
        rows.append((m.scenario.title, *(str(m.cpu_ratio(*pair)) for pair in _PAIRS), wall))
    return _table(
        (
            "Request",
            "CPU: module / without",
            "CPU: module / own",
            "CPU: own / without",
            "CPU: without / without",
            "Time to answer: module / without",
        ),
        rows,
    )


def _growth_table(results: Results) -> str:
    larger = results.sizes[1:]
    return _table(
        ("Request", *(f"{size:,}" for size in larger)),
        [
            (m.scenario.title, *(str(results.growth_ratio(m, size)) for size in larger))
            for m in results.growth
        ],
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(map(_row, lines))


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
