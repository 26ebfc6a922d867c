# SPDX-License-Identifier: AGPL-3.0-or-later
"""Runs some of Synapse's tests in this process. The package `tests` must be Synapse's.

Prints a line for each test as soon as it has ended: its outcome, a blank, and its name. The
tracebacks go to the standard error.
"""

import os
import sys
from typing import Any

from twisted.python.failure import Failure
from twisted.trial.reporter import Reporter
from twisted.trial.runner import TestLoader, TrialRunner

_Reporter: Any = Reporter
_Failure: Any = Failure
_Runner: Any = TrialRunner


class LineReporter(_Reporter):  # type: ignore[misc]
    """Prints the outcome of each test."""

    _outcome = "passed"

    def startTest(self, test: Any) -> None:
        super().startTest(test)
        self._outcome = "passed"

    def addError(self, test: Any, error: Any) -> None:
        super().addError(test, error)
        self._fail(test, error)

    def addFailure(self, test: Any, fail: Any) -> None:
        super().addFailure(test, fail)
        self._fail(test, fail)

    def addSkip(self, test: Any, reason: Any) -> None:
        super().addSkip(test, reason)
        self._outcome = "skipped"

    def stopTest(self, test: Any) -> None:
        super().stopTest(test)
        print(self._outcome, test.id(), flush=True)

    def _fail(self, test: Any, error: Any) -> None:
        if self._outcome != "failed":
            # Twisted's own kind of tests comes with its own kind of errors.
            failure = _Failure(error[1], *error[::2]) if isinstance(error, tuple) else error
            text = failure.getTraceback()
            print(f"--- {test.id()}\n{text}", file=sys.stderr, flush=True)
        self._outcome = "failed"


def main(mode: str, names: list[str]) -> None:
    """Run tests.

    Args:
        mode: "with" or "without" the module.
        names: of modules, or of single tests.
    """
    if mode == "with":
        # Not before: without the module nothing of it is imported.
        from upstream import everywhere

        everywhere.install()
    # What the reporter says beside our lines is of no use.
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        runner = _Runner(LineReporter, stream=nowhere, workingDirectory="trial")
        runner.run(TestLoader().loadByNames(names, recurse=True))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
