# SPDX-License-Identifier: AGPL-3.0-or-later
"""Guards what Synapse calls: no error of ours, a bounded time, Synapse's names.

Synapse does not expect errors from the places that our hooks are in: one of ours would
fail a request, stop a queue or end a stream. So each hook runs our part through one of
these, or shielded (``seams/failures.py``), and Synapse's own part outside of them: Synapse's
errors stay Synapse's.
"""

import logging
from collections.abc import Awaitable, Callable
from functools import update_wrapper
from typing import Any, Final

from synapse.logging.context import make_deferred_yieldable
from synapse.server import HomeServer
from synapse.util.async_helpers import stop_cancellation, timeout_deferred
from twisted.internet import defer

from synapse_sticky.seams.background import Clock
from synapse_sticky.seams.checks import require
from synapse_sticky.seams.streams import Waker

logger = logging.getLogger(__name__)

RETRY_MS: Final = 5_000
"""When a long-poll is answered again whose response lacks its sticky events."""

_PAUSE_MS: Final = 1_000


class Retries:
    """Lets clients whose response lacks sticky events try again, but not all the time."""

    def __init__(self, clock: Clock, waker: Waker) -> None:
        self._clock = clock
        self._waker = waker
        self._users: set[str] = set()

    def wake_later(self, user_id: str) -> None:
        """Wake a user's long-polls a little later: they sleep, where nothing else is new."""
        if not self._users:
            self._clock.call_later(RETRY_MS, self._wake)
        self._users.add(user_id)

    def _wake(self) -> None:
        users, self._users = self._users, set()
        self._waker.wake(users, ())

    async def pause(self) -> None:
        """Hold up a response that lacks its only news, for which its client did not wait."""
        await self._clock.sleep(_PAUSE_MS)


async def run_within(
    hs: HomeServer,
    limit_ms: int,
    consequence: str,
    func: Callable[..., Awaitable[None]],
    *args: object,
) -> None:
    """Run our part, and wait for its end no longer than the limit. Never raises.

    Args:
        consequence: what giving up leads to, for the log.
    """
    try:
        ended = hs.run_as_background_process("sticky_hook", func, *args)
        await make_deferred_yieldable(
            timeout_deferred(
                deferred=stop_cancellation(ended), timeout=limit_ms / 1000, clock=hs.get_clock()
            )
        )
    except defer.TimeoutError:
        logger.warning("%s: not done within %.1f s", consequence, limit_ms / 1000)
    except defer.CancelledError:
        raise
    except Exception as error:
        # Errors of our part are logged by then: a homeserver that is shut down starts nothing.
        logger.debug("%s: %s", consequence, error)


def wrap(owner: object, name: str, wrapper: Callable[..., Any], *parameters: str) -> None:
    """Put our function in place of one of Synapse's, under the same name.

    Args:
        owner: the module or object that has Synapse's.
        wrapper: called as Synapse's was. It calls Synapse's itself.
        parameters: those that Synapse's must take.

    Raises:
        ConfigError: if Synapse's is not there, or does not take the parameters.
    """
    require(owner, name, *parameters)
    setattr(owner, name, update_wrapper(wrapper, getattr(owner, name)))
