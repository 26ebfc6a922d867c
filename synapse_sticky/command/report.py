# SPDX-License-Identifier: AGPL-3.0-or-later
"""Findings, and how they are printed."""

import json
import re
import shutil
import textwrap
from collections.abc import Collection, Mapping
from typing import Any, Final, TextIO

import attr

from synapse_sticky.command.checks import BY_ID, Level
from synapse_sticky.command.text import Secrets, clean, counted

JSON_VERSION: Final = 1

EXIT_CODES: Final = {Level.OK: 0, Level.NOTE: 0, Level.WARNING: 1, Level.ERROR: 2}
COULD_NOT_RUN: Final = 3

_ORDER: Final = list(Level)


class CouldNotRun(Exception):
    """The command cannot do its work. The text says why, in a sentence."""


@attr.s(slots=True, frozen=True, auto_attribs=True)
class Finding:
    """The result of a check.

    Attributes:
        text: the result, in a sentence or two.
        advice: how to mend it; empty if there is nothing to do.
    """

    id: str
    level: Level
    text: str
    advice: str = ""

    @property
    def why(self) -> str:
        """Why that matters."""
        return BY_ID[self.id].why


class Report:
    """Collects findings, without the secrets of the configuration in them."""

    def __init__(self, skipped: Collection[str] = (), secrets: Secrets | None = None) -> None:
        self.findings: list[Finding] = []
        self.secrets = secrets or Secrets()
        self._skipped = skipped

    def wants(self, check_id: str) -> bool:
        """Whether the admin wants this check."""
        return check_id not in self._skipped

    def add(self, level: Level, check_id: str, text: str, advice: str = "") -> None:
        """Add a finding, unless the admin has asked to skip its check."""
        if level not in BY_ID[check_id].levels:
            raise ValueError(f"{check_id} has no findings that are {level.value}")
        if self.wants(check_id):
            safe_text, safe_advice = (clean(self.secrets.hide(part)) for part in (text, advice))
            self.findings.append(Finding(check_id, level, safe_text, safe_advice))

    @property
    def worst(self) -> Level:
        """The level of the worst finding."""
        return max((f.level for f in self.findings), key=_ORDER.index, default=Level.OK)

    def as_json(self, about: Mapping[str, Any]) -> str:
        """Return the report as JSON; ``docs/command.md`` describes it."""
        document = {
            "version": JSON_VERSION,
            **about,
            "level": self.worst.value,
            "findings": [
                {
                    "id": finding.id,
                    "level": finding.level.value,
                    "what": finding.text,
                    "why": finding.why,
                    "do": finding.advice or None,
                }
                for finding in self.findings
            ],
        }
        return json.dumps(document, indent=2)

    def write(self, stream: TextIO) -> None:
        """Write the report for people, the worst last, where they look first."""
        width = min(shutil.get_terminal_size((80, 24)).columns, 100)
        for finding in sorted(self.findings, key=lambda f: _ORDER.index(f.level)):
            _write_finding(finding, stream, width)
        stream.write(f"\n{self.summary()}\n")

    def summary(self) -> str:
        """Return how many findings there are of each level, in a sentence."""
        parts = [
            counted(sum(finding.level is level for finding in self.findings), level.value)
            for level in (Level.ERROR, Level.WARNING, Level.NOTE)
        ]
        fine = sum(finding.level is Level.OK for finding in self.findings)
        return f"{', '.join(parts)}; {fine} ok."


def _write_finding(finding: Finding, stream: TextIO, width: int) -> None:
    if finding.level is Level.OK:
        _wrap(f"ok       {finding.id}: {finding.text}", stream, width, 9)
        return
    stream.write(f"\n{finding.level.value:8} {finding.id}\n")
    parts = {"": finding.text, "why: ": finding.why, "do: ": finding.advice}
    for label, text in parts.items():
        # Texts of others, and advice, may have several lines.
        for line in text.splitlines():
            _wrap(f"{' ' * 9}{label}{line}", stream, width, 9 + len(label))
            label = " " * len(label)


def _wrap(text: str, stream: TextIO, width: int, indent: int) -> None:
    # Options, paths and lines of YAML stay in one piece.
    lines = textwrap.wrap(
        text,
        width,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    stream.write("\n".join(lines) + "\n")


def sentence(text: object) -> str:
    """Return a text as a sentence: messages of others often lack the full stop."""
    stripped = re.sub(r"\s+", " ", str(text)).strip()
    return stripped if stripped.endswith((".", "!", "?")) else f"{stripped}."
