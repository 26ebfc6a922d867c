# SPDX-License-Identifier: AGPL-3.0-or-later
"""Failures of our work: they are logged, not once for each try, and Synapse goes on.

While the database is away all of our work fails, on every process and at every try: that is
one line for all of it.
"""

import logging
import time
from types import TracebackType
from typing import Final

from twisted.enterprise import adbapi
from twisted.internet import defer

logger = logging.getLogger(__name__)

_LOG_INTERVAL_S: Final = 60

_DATABASE: Final = "The database does not answer (%s). Sticky events wait until it does"

# Those of psycopg2's errors that say nothing of the statement: PostgreSQL is away, starting or
# stopping, has no connection left, or is a standby now.
_AWAY: Final = frozenset(
    {
        "AdminShutdown",
        "CannotConnectNow",
        "CrashShutdown",
        "InterfaceError",
        "OperationalError",
        "ReadOnlySqlTransaction",
        "TooManyConnections",
    }
)


class shielded:
    """Log an error of our part, and go on after it. Use it with `with`.

    The same failure again is logged once a minute at most: every client may meet with it.

    Args:
        consequence: what the error leads to, for the log.
    """

    __slots__ = ("_consequence",)

    def __init__(self, consequence: str) -> None:
        self._consequence = consequence

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        # After a cancellation the client has gone: Synapse ends the request.
        if not isinstance(error, Exception) or isinstance(error, defer.CancelledError):
            return False
        log_failure(self._consequence, error)
        return True


def log_failure(consequence: str, error: Exception) -> None:
    """Log an error, unless the same failure was logged within the last minute.

    Args:
        consequence: what the error leads to.
    """
    reason = _database_failure(error)
    key = consequence if reason is None else _DATABASE
    now = time.monotonic()
    if now < _silent_until.get(key, now):
        return
    for past in [key for key, until in _silent_until.items() if until <= now]:
        del _silent_until[past]
    _silent_until[key] = now + _LOG_INTERVAL_S
    if reason is None:
        logger.error("%s", consequence, exc_info=error)
    else:
        logger.error(_DATABASE, reason)


_silent_until: dict[str, float] = {}


def _database_failure(error: BaseException | None) -> str | None:
    """Return why the database does not answer; None if the error says something else."""
    while error is not None:
        kind = type(error)
        if kind.__module__.startswith("psycopg2") and kind.__name__ in _AWAY:
            return next(iter(str(error).splitlines()), kind.__name__)
        if isinstance(error, adbapi.ConnectionLost):
            return "the connection was lost"
        error = error.__cause__
    return None
