"""How long an event is sticky, and what clients may ask for."""

import json
import re
import time
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from immutabledict import immutabledict

from synapse_sticky.stickiness import (
    MAX_DURATION_MS,
    check_duration,
    effective_duration_ms,
    expires_ts,
    parse_duration_parameter,
)

PARAMETER = "org.matrix.msc4354.sticky_duration_ms"

any_integer = st.integers() | st.integers(-(2**4000), 2**4000)
any_json = st.recursive(
    st.none() | st.booleans() | any_integer | st.floats(allow_nan=True) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=5) | st.just("duration_ms"), inner, max_size=3)
    ),
    max_leaves=8,
)


def test_the_longest_duration_is_one_hour() -> None:
    # E1
    assert MAX_DURATION_MS == 60 * 60 * 1000


@given(any_json)
@example({"duration_ms": True})
@example({"duration_ms": False})
@example({"duration_ms": 1000.0})
@example({"duration_ms": -1})
@example({"duration_ms": 2**80})
@example({"duration_ms": "1000"})
@example({"duration_ms": None})
@example({"duration_ms": {"duration_ms": 1}})
@example({"Duration_ms": 1})
@example(["duration_ms"])
@example("duration_ms")
def test_only_an_object_with_a_duration_is_sticky(value: Any) -> None:
    # E2
    duration_ms = effective_duration_ms(value)
    if isinstance(value, dict) and "duration_ms" in value:
        written = value["duration_ms"]
        # How JSON spells it says what it is: 1 is an integer, 1.0 and true are not.
        if re.fullmatch(r"0|[1-9][0-9]*", json.dumps(written)):
            assert duration_ms == min(written, 3_600_000)
            assert type(duration_ms) is int
            return
    assert duration_ms is None


@pytest.mark.parametrize("text", ["0", "-0", "1", "3600000", "3600001", "9" * 400])
def test_durations_as_read_from_json(text: str) -> None:
    # E2: what a remote server can write and Python's reader makes an integer of
    value = json.loads(f'{{"duration_ms": {text}, "more": 1}}')
    assert effective_duration_ms(value) == min(int(text), 3_600_000)


@pytest.mark.parametrize("text", ["1e3", "1.0", "NaN", "Infinity", "-1", "true", '"1"', "[1]"])
def test_what_is_no_integer_in_json(text: str) -> None:
    # E2
    assert effective_duration_ms(json.loads(f'{{"duration_ms": {text}}}')) is None


def test_frozen_events_are_read_too() -> None:
    # E2: Synapse freezes the content of some events
    assert effective_duration_ms(immutabledict({"duration_ms": 7})) == 7


@given(any_integer, any_integer, any_integer)
def test_expiry(duration_ms: int, received_ts: int, origin_server_ts: int) -> None:
    # E1, E7
    expiry = expires_ts(duration_ms, received_ts, origin_server_ts)
    starts = (received_ts, origin_server_ts)
    durations = (duration_ms, 3_600_000)
    # No later than any of the four bounds, and one pair of them is reached.
    assert all(expiry <= start + duration for start in starts for duration in durations)
    assert any(expiry == start + duration for start in starts for duration in durations)


@pytest.mark.parametrize(
    ("duration_ms", "received_ts", "origin_server_ts", "expected"),
    [
        (1_000, 50_000, 40_000, 41_000),
        (1_000, 40_000, 50_000, 41_000),
        (0, 40_000, 40_000, 40_000),
        (3_600_000, 10, 10, 3_600_010),
        (3_600_001, 10, 10, 3_600_010),
        (2**70, 10, 20, 3_600_010),
        (60_000, 1_700_000_000_000, 2**70, 1_700_000_060_000),
        (60_000, 1_700_000_000_000, -(2**70), 60_000 - 2**70),
    ],
)
def test_expiry_in_numbers(
    duration_ms: int, received_ts: int, origin_server_ts: int, expected: int
) -> None:
    # E1, E7
    assert expires_ts(duration_ms, received_ts, origin_server_ts) == expected


@given(any_json, st.integers(0, 2**62), any_integer)
def test_what_is_still_sticky_fits_into_the_database(
    value: Any, received_ts: int, origin_server_ts: int
) -> None:
    # E7
    duration_ms = effective_duration_ms(value)
    if duration_ms is not None:
        expiry = expires_ts(duration_ms, received_ts, origin_server_ts)
        # Whatever is stored is stored because it lies in the future.
        if expiry > 0:
            assert expiry < 2**63


# The query parameter

whole_numbers = st.integers(0, 4_000_000).map(lambda n: str(n).encode())
nearly_numbers = st.from_regex(rb"\A[ +\-_0-9.eE\x00\n\t]{0,12}\Z")


@given(whole_numbers | nearly_numbers | st.binary())
@example(b"0")
@example(b"3600000")
@example(b"3600001")
@example(b"-0")
@example(b"+1")
@example(b"1_000")
@example(b" 1")
@example(b"1\n")
@example(b"1.0")
@example(b"1e3")
@example(b"0x10")
@example(b"")
@example("\u0663".encode())
@example("\uff11".encode())
@example(b"0" * 5_000 + b"5")
@example(b"9" * 100_000)
def test_only_whole_numbers_in_the_range_are_taken(given_text: bytes) -> None:
    # S3
    digits = given_text.lstrip(b"0") or b"0"
    is_number = given_text != b"" and all(byte in b"0123456789" for byte in given_text)
    try:
        duration_ms = parse_duration_parameter([given_text])
    except ValueError as error:
        _assert_helpful(error)
        in_range = is_number and len(digits) <= 7 and 1 <= int(digits) <= 3_600_000
        # With this many zeros in front of it either answer will do.
        assert not in_range or len(given_text) > 4_000
    else:
        assert is_number
        assert len(digits) <= 7
        assert duration_ms == int(digits)
        assert 1 <= duration_ms <= 3_600_000


@pytest.mark.parametrize("values", [[], [b"1", b"1"], [b"1", b""], [b"", b""], [b"0"] * 50])
def test_the_parameter_is_given_once(values: Sequence[bytes]) -> None:
    # S3
    with pytest.raises(ValueError, match="once") as caught:
        parse_duration_parameter(values)
    _assert_helpful(caught.value)


def test_a_book_of_digits_costs_nothing() -> None:
    # S3: converting them would take time that grows with their square
    book = b"1" * 10_000_000
    start = time.process_time()
    with pytest.raises(ValueError, match=re.escape(PARAMETER)):
        parse_duration_parameter([book])
    assert time.process_time() - start < 0.5


@pytest.mark.parametrize("value", [1, 2, 60_000, 3_600_000])
def test_durations_in_a_body(value: int) -> None:
    # S2, S3
    assert check_duration(value) == value


@given(any_json)
@example(0)
@example(3_600_001)
@example(True)
@example(1.0)
@example("1")
@example(None)
def test_only_integers_in_the_range_are_taken_from_a_body(value: Any) -> None:
    # S2, S3
    if type(value) is int and 1 <= value <= 3_600_000:
        return
    with pytest.raises(ValueError, match=re.escape(PARAMETER)) as caught:
        check_duration(value)
    _assert_helpful(caught.value)


def _assert_helpful(error: ValueError) -> None:
    """The text for the client names the parameter and what is allowed."""
    message = str(error)
    assert PARAMETER in message
    assert re.search(r"\bfrom 1 to 3600000\b", message)
    assert len(message) < 300
