# SPDX-License-Identifier: AGPL-3.0-or-later
"""Runs Synapse's own tests with the module, and those that fail once more without it.

In every homeserver that a test makes, the module is loaded with its default configuration. What
fails only with the module is listed at the end, with the reason if that is on purpose. The tests
use SQLite, and those that cannot, which are the ones of several processes, PostgreSQL.
"""

import argparse
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Final

from harness.postgres import PostgresServer
from upstream.known import KNOWN
from upstream.source import get_tests

_ROOT: Final = Path(__file__).parent.parent
_REPORT_INTERVAL_S: Final = 15


class Run:
    """Some of Synapse's tests, run in several processes.

    Attributes:
        outcomes: of each test that has ended.
    """

    def __init__(
        self,
        directory: Path,
        source: Path,
        mode: str,
        shares: list[list[str]],
        environment: Mapping[str, str],
    ) -> None:
        self.outcomes: dict[str, str] = {}
        self._directory = directory
        self._source = source
        self._mode = mode
        self._environment = environment
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
                env={
                    **os.environ,
                    **self._environment,
                    "PYTHONPATH": os.pathsep.join(filter(None, paths)),
                },
                stdout=subprocess.PIPE,
                stderr=tracebacks,
                text=True,
            )
            assert process.stdout is not None
            for line in process.stdout:
                self._note(line)
        if process.wait():
            # Of tests that it did not come to nothing is known.
            self.outcomes[f"process in {directory}"] = "broken off"
            print(f"A process has broken off: see {directory}", flush=True)

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
    outcomes, without = _compare(directory / "sqlite", source, modules, jobs, {})
    skipped = [test for test, outcome in outcomes.items() if outcome == "skipped"]
    if skipped:
        print(f"{len(skipped)} were skipped: those once more, on PostgreSQL", flush=True)
        with PostgresServer() as server:
            environment = {
                "SYNAPSE_POSTGRES": "1",
                "SYNAPSE_POSTGRES_USER": "synapse",
                "SYNAPSE_POSTGRES_HOST": "127.0.0.1",
                "SYNAPSE_POSTGRES_PORT": str(server.port),
            }
            others = _compare(directory / "postgres", source, skipped, jobs, environment)
        outcomes.update(others[0])
        without.update(others[1])
    return conclude(outcomes, without)


def _compare(
    directory: Path, source: Path, names: list[str], jobs: int, environment: Mapping[str, str]
) -> tuple[dict[str, str], dict[str, str]]:
    """Return the outcomes with the module, and those without of the tests that fail with it."""

    def run(mode: str, names: list[str]) -> dict[str, str]:
        shares = [names[number::jobs] for number in range(jobs)]
        return Run(directory, source, mode, shares, environment).wait()

    outcomes = run("with", names)
    failed = [test for test, outcome in outcomes.items() if outcome == "failed"]
    return outcomes, run("without", failed) if failed else {}


def conclude(outcomes: Mapping[str, str], without: Mapping[str, str]) -> int:
    """Say which tests the module changes, and return 0 if all is as it is known.

    Args:
        outcomes: of all tests, with the module.
        without: of those that fail with it, without it.
    """
    failed = [test for test, outcome in outcomes.items() if outcome == "failed"]
    only_with = sorted(test for test in failed if without.get(test) != "failed")
    counts = Counter(outcomes.values())
    print(
        f"With the module: {counts['passed']} passed, {counts['skipped']} skipped, "
        f"{len(failed) - len(only_with)} failed as they do without it, {len(only_with)} only with:"
    )
    for test in only_with:
        print(f"  {test}: {KNOWN.get(test, 'NOT KNOWN')}")
    unknown = [test for test in only_with if test not in KNOWN]
    print(f"{len(unknown)} of these for no known reason")
    wrong = [f"{test}: is listed, and passes" for test in KNOWN if outcomes.get(test) == "passed"]
    wrong += [
        f"{test}: is listed, and fails without the module too"
        for test in failed
        if test in KNOWN and test not in only_with
    ]
    for mistake in wrong:
        print(f"  {mistake}: see upstream/known.py")
    if counts["broken off"]:
        print(f"{counts['broken off']} processes have broken off, and have not run all their tests")
    return 1 if unknown or wrong or counts["broken off"] else 0


if __name__ == "__main__":
    sys.exit(main())
