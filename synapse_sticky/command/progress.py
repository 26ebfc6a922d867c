# SPDX-License-Identifier: AGPL-3.0-or-later
"""Shows the progress on standard error, so that nobody waits in the dark."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, TextIO

_REMIND_EVERY_S: Final = 10


@contextmanager
def step(stream: TextIO | None, text: str) -> Iterator[None]:
    """Say that a step begins, that it still goes on, and how long it took."""
    if stream is None:
        yield
        return
    began = time.monotonic()
    ended = threading.Event()

    def remind() -> None:
        while not ended.wait(_REMIND_EVERY_S):
            stream.write(f" {time.monotonic() - began:.0f} s")
            stream.flush()

    stream.write(f"{text} ...")
    stream.flush()
    reminder = threading.Thread(target=remind, daemon=True)
    reminder.start()
    try:
        yield
    finally:
        ended.set()
        reminder.join()
        stream.write(f" {time.monotonic() - began:.1f} s\n")
        stream.flush()
