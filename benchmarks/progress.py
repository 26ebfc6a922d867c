# SPDX-License-Identifier: AGPL-3.0-or-later
"""Shows that something is going on."""

import sys
import time


class Progress:
    """Prints lines with the time since the start."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._last = 0.0

    @property
    def seconds(self) -> float:
        """The time since the start."""
        return time.monotonic() - self._start

    def line(self, text: str) -> None:
        """Something that stays."""
        self._clear()
        print(f"{self.seconds:6.0f} s  {text}", flush=True)

    def step(self, text: str) -> None:
        """Something that the next line may replace; now and then only, if it cannot."""
        if sys.stdout.isatty():
            self._clear()
            print(f"{self.seconds:6.0f} s  {text}", end="", flush=True)
        elif self.seconds - self._last > 15:
            self._last = self.seconds
            self.line(text)

    def _clear(self) -> None:
        if sys.stdout.isatty():
            print("\r\033[K", end="")
