# SPDX-License-Identifier: AGPL-3.0-or-later
"""Synapse's client for other servers, which really ends an answer that is too long.

Synapse stops waiting for such an answer, but a server that goes on sending is read for as long as
it likes: with TLS the connection is closed only once the other side agrees. And of an error Synapse
reads everything, but not the header that says when to try again.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from copy import copy
from typing import Any, Final

from synapse.server import HomeServer
from twisted.internet.protocol import Protocol, connectionDone
from twisted.python.failure import Failure
from twisted.web.client import ResponseDone

from synapse_sticky.seams.background import Clock
from synapse_sticky.seams.checks import require

# The status is what matters.
_MAX_ERROR_BYTES: Final = 16 * 1024


# For how many seconds the server wants to be left alone: a list for each request, to be filled.
_retry_after: ContextVar[list[int] | None] = ContextVar("synapse_sticky_retry_after", default=None)


@contextmanager
def noting_retry_after() -> Iterator[list[int]]:
    """Note the seconds in the header Retry-After of each response to the requests made within."""
    noted: list[int] = []
    token = _retry_after.set(noted)
    try:
        yield noted
    finally:
        _retry_after.reset(token)


def read_retry_after(values: list[bytes] | None) -> list[int]:
    """Return the seconds that such headers name; a date, or anything else, is left out."""
    # The first digits of a long number are more than anybody waits.
    return [int(value[:9]) for value in values or () if value.isdigit()]


def bounded_client(hs: HomeServer, clock: Clock, limit_ms: int) -> Any:
    """Return Synapse's client, with its connections, bounded in the bodies that it reads.

    Args:
        limit_ms: how long a body may take. Its length is bounded by the parser that is given
            with a request.
    """
    require(hs.get_federation_http_client(), "agent")
    client: Any = copy(hs.get_federation_http_client())
    client.agent = _Agent(client.agent, clock, limit_ms)
    return client


class _Agent:
    """Makes requests as another agent does."""

    def __init__(self, agent: Any, clock: Clock, limit_ms: int) -> None:
        self._agent = agent
        self._clock = clock
        self._limit_ms = limit_ms

    def request(self, *args: Any, **kwargs: Any) -> Any:
        """Make a request."""
        noted = _retry_after.get()

        def bound(response: Any) -> _Response:
            if noted is not None:
                noted.extend(read_retry_after(response.headers.getRawHeaders(b"retry-after")))
            return _Response(response, self._clock, self._limit_ms)

        return self._agent.request(*args, **kwargs).addCallback(bound)


class _Response:
    """A response whose body is bounded."""

    def __init__(self, response: Any, clock: Clock, limit_ms: int) -> None:
        self._response = response
        self._clock = clock
        self._limit_ms = limit_ms

    def __getattr__(self, name: str) -> Any:
        return getattr(self._response, name)

    def deliverBody(self, protocol: Any) -> None:
        """Hand the body to a protocol, as a response of Twisted's does."""
        body = _Body(protocol, _MAX_ERROR_BYTES if self._response.code >= 300 else None)
        body.cancel_timeout = self._clock.call_later(self._limit_ms, body.abortConnection)
        self._response.deliverBody(body)


class _Body(Protocol):
    """Passes a body on, and is the connection that its reader can abort."""

    def __init__(self, reader: Any, limit_bytes: int | None) -> None:
        self._reader = reader
        self._left = limit_bytes
        self._has_ended = False
        self.cancel_timeout: Callable[[], None] = lambda: None

    def connectionMade(self) -> None:
        """The body begins."""
        self._reader.makeConnection(self)

    def dataReceived(self, data: bytes) -> None:
        """A part of the body has come."""
        if self._has_ended:
            return
        self._reader.dataReceived(data)
        if self._left is not None:
            self._left -= len(data)
            if self._left < 0:
                # To the reader it is all there is.
                self._end(Failure(ResponseDone()))  # type: ignore[no-untyped-call]
                self._close()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """The body has ended."""
        self._end(reason)

    def abortConnection(self) -> None:
        """End the connection, whatever the other side does."""
        if not self._has_ended:
            self._close()

    def _end(self, reason: Failure) -> None:
        if not self._has_ended:
            self._has_ended = True
            self.cancel_timeout()
            self._reader.connectionLost(reason)

    def _close(self) -> None:
        # No more is read from then on; to lose the connection would wait for the other side.
        if self.transport is not None:
            self.transport.stopProducing()
