"""Waiting for something to come true, with a deadline."""

import time
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


class NeverHappened(AssertionError):
    """What was waited for did not come true before the deadline."""


def eventually(
    attempt: Callable[[], Result | None],
    timeout_s: float = 30,
    what: str = "the awaited condition",
    interval_s: float = 0.05,
) -> Result:
    """Call `attempt` until it returns something true, and return that.

    An AssertionError raised by `attempt` counts as "not yet", so it may be a plain condition
    or a function full of assertions that ends in `return True`. Any other exception is passed
    on at once.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        reason: str
        cause: AssertionError | None = None
        try:
            result = attempt()
            if result:
                return result
            reason = f"the last answer was {result!r}"
        except AssertionError as error:
            reason = str(error) or "an assertion without a message"
            cause = error
        if time.monotonic() >= deadline:
            raise NeverHappened(f"{what}: not within {timeout_s} s: {reason}") from cause
        time.sleep(interval_s)
