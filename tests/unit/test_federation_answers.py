"""What other servers answer to our requests, whatever that is."""

import json

import pytest
from synapse.api.errors import HttpResponseException

from synapse_sticky.seams.federation import RequestFailed, _as_request_failed


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


# F5a
def test_answer_that_is_nested_too_deeply() -> None:
    """Synapse does not read it, and it is no fault of ours."""
    with pytest.raises(RequestFailed), _as_request_failed():
        json.loads("[" * 100_000)
