"""What other servers answer to our requests, whatever that is."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
from synapse.api.errors import HttpResponseException
from twisted.internet import defer
from twisted.web.http_headers import Headers

from synapse_sticky.seams.bounded import _Agent
from synapse_sticky.seams.federation import RequestFailed, _as_request_failed
from tests.unit.paying import Time


def failure(status: int, body: bytes) -> RequestFailed:
    """What is made of an error that a server answers."""
    with pytest.raises(RequestFailed) as caught, _as_request_failed():
        raise HttpResponseException(status, "as the test wants", body)
    return caught.value


# F5a
@pytest.mark.parametrize(
    ("body", "code", "retry_after_ms"),
    [
        (b"", "", 0),
        (b"<html>", "", 0),
        (b"[" * 8_000, "", 0),
        (b'{"a":' * 8_000, "", 0),
        (b"[]", "", 0),
        # So Synapse says that it does not have an event.
        (b'""', "M_NOT_FOUND", 0),
        (b"\xff", "", 0),
        (b'{"errcode": ["M_A"], "retry_after_ms": true}', "", 0),
        (b'{"errcode": "M_A", "retry_after_ms": 1500}', "M_A", 1_500),
        (b'{"errcode": "M_A", "retry_after_ms": -5}', "M_A", 0),
        (json.dumps({"retry_after_ms": 10**30}).encode(), "", 600_000),
    ],
)
def test_any_error_is_read(body: bytes, code: str, retry_after_ms: int) -> None:
    error = failure(429, body)
    assert (error.status, error.code, error.retry_after_ms) == (429, code, retry_after_ms)


class Agent:
    """Answers with a header, as Synapse's agent would."""

    def __init__(self, value: bytes) -> None:
        self._value = value

    def request(self, *args: object) -> Any:
        """Answer at once."""
        headers = Headers({b"Retry-After": [self._value]})
        return defer.succeed(SimpleNamespace(code=429, headers=headers))


# F5a
@pytest.mark.parametrize(
    ("value", "body", "retry_after_ms"),
    [
        (b"7", b"", 7_000),
        (b"7", b'{"retry_after_ms": 1500}', 7_000),
        (b"1", b'{"retry_after_ms": 1500}', 1_500),
        (b"0", b"", 0),
        (b"-7", b"", 0),
        (b"soon", b"", 0),
        (b"7.5", b"", 0),
        (b"\xd9\xa7", b"", 0),
        (b"Fri, 31 Dec 2027 23:59:59 GMT", b"", 0),
        (b"31536000", b"", 600_000),
        (b"9" * 5_000, b"", 600_000),
        (b"", b"", 0),
    ],
)
def test_header_says_when_to_try_again(value: bytes, body: bytes, retry_after_ms: int) -> None:
    """A 429 of a proxy has no Matrix error, but this header; whatever is in it."""
    agent = _Agent(Agent(value), Time(), 1_000)

    def fail() -> None:
        with _as_request_failed():
            agent.request()
            raise HttpResponseException(429, "as the test wants", body)

    with pytest.raises(RequestFailed) as caught:
        fail()
    assert caught.value.retry_after_ms == retry_after_ms


# F5a
def test_answer_that_is_nested_too_deeply() -> None:
    """Synapse does not read it, and it is no fault of ours."""
    with pytest.raises(RequestFailed), _as_request_failed():
        json.loads("[" * 100_000)
