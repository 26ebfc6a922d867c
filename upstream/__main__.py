# SPDX-License-Identifier: AGPL-3.0-or-later
"""Runs Synapse's own tests with the module, and those that fail once more without it.

In every homeserver that a test makes, the module is loaded with its default configuration. What
fails only with the module is listed at the end, with the reason if that is on purpose.
"""

import argparse
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Final

from upstream.known import reason_of
from upstream.source import get_tests

_ROOT: Final = Path(__file__).parent.parent
_REPORT_INTERVAL_S: Final = 15


class Run:
    """Some of Synapse's tests, run in several processes.

    Attributes:
        outcomes: of each test that has ended.
    """

    def __init__(self, directory: Path, source: Path, mode: str, shares: list[list[str]]) -> None:
        self.outcomes: dict[str, str] = {}
        self._directory = directory
        self._source = source
        self._mode = mode
        self._shares = [share for share in shares if share]
        self._start = time.monotonic()
        self._told = 0.0

    def wait(self) -> dict[str, str]:
        """Run them all, and say from time to time how far that is."""
        threads = [
            threading.Thread(target=self._run_share, args=(number, share))
            for number, share in enumerate(self._shares)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self._tell()
        return self.outcomes

    def _run_share(self, number: int, names: list[str]) -> None:
        directory = self._directory / f"{self._mode}-{number}"
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        # Synapse's package `tests` comes before ours.
        paths = [str(self._source), str(_ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        with (directory / "tracebacks.txt").open("w", encoding="utf-8") as tracebacks:
            process = subprocess.Popen(
                [sys.executable, "-m", "upstream.trial", self._mode, *names],
                cwd=directory,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
                stdout=subprocess.PIPE,
                stderr=tracebacks,
                text=True,
            )
            assert process.stdout is not None
            for line in process.stdout:
                self._note(line)
        if process.wait():
            # Of tests that it did not come to nothing is known.
            self.outcomes[f"process {number}"] = "failed"
            print(f"Process {number} has broken off: see {directory}", flush=True)

    def _note(self, line: str) -> None:
        outcome, _, test = line.strip().partition(" ")
        if outcome not in ("passed", "failed", "skipped"):
            return
        self.outcomes[test] = outcome
        if outcome == "failed":
            print(f"failed {self._mode} the module: {test}", flush=True)
        if time.monotonic() > self._told + _REPORT_INTERVAL_S:
            self._tell()

    def _tell(self) -> None:
        self._told = time.monotonic()
        counts = Counter(self.outcomes.values())
        numbers = ", ".join(f"{counts[key]} {key}" for key in ("passed", "failed", "skipped"))
        seconds = self._told - self._start
        print(f"{seconds:6.0f} s  {self._mode} the module: {numbers}", flush=True)


def modules_of(source: Path, names: list[str]) -> list[str]:
    """Return the names of the test modules below these packages and modules, in order."""
    found = sorted(path.relative_to(source) for path in source.glob("tests/**/test_*.py"))
    modules = [".".join(path.with_suffix("").parts) for path in found]
    # A name may be of a single test as well.
    below = [m for m in modules if any(f"{m}.".startswith(f"{name}.") for name in names)]
    single = [name for name in names if any(name.startswith(f"{m}.") for m in modules)]
    return below + single


def main() -> int:
    """Run, compare, and say what came out."""
    parser = argparse.ArgumentParser(prog="python -m upstream", description=__doc__)
    parser.add_argument(
        "names",
        nargs="*",
        default=["tests"],
        metavar="NAME",
        help="packages, modules or single tests of Synapse's, for example: tests.rest.client",
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="how many processes")
    parser.add_argument(
        "--directory",
        type=Path,
        default=_ROOT / "build" / "upstream",
        help="for Synapse's tests and their tracebacks (default: build/upstream)",
    )
    arguments = parser.parse_args()
    synapse, jobs = version("matrix-synapse"), arguments.jobs
    print(f"Tests of Synapse {synapse}", flush=True)
    source = get_tests(synapse, arguments.directory.absolute())
    modules = modules_of(source, arguments.names)
    if not modules:
        parser.error(f"there are no tests of Synapse's of these names: {arguments.names}")
    directory = arguments.directory.absolute() / f"{synapse}-results"
    shares = [modules[number::jobs] for number in range(jobs)]
    outcomes = Run(directory, source, "with", shares).wait()
    failed = [test for test, outcome in outcomes.items() if outcome == "failed"]
    shares = [failed[number::jobs] for number in range(jobs)]
    without = Run(directory, source, "without", shares).wait() if failed else {}
    return _conclude([test for test in failed if without.get(test) != "failed"], len(failed))


def _conclude(only_with: list[str], failed: int) -> int:
    print(
        f"{failed - len(only_with)} fail with and without the module, {len(only_with)} only with:"
    )
    unknown = 0
    for test in sorted(only_with):
        reason = reason_of(test)
        unknown += reason is None
        print(f"  {test}: {reason or 'NOT KNOWN'}")
    print(f"{unknown} of these for no known reason")
    return 1 if unknown else 0


if __name__ == "__main__":
    sys.exit(main())
