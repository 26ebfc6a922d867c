"""The ephemeral map beside matrix-js-sdk's store of sticky events, which runs in Node.

:mod:`tests.javascript.histories` says what is compared.
"""

import json
from collections.abc import Iterator

import pytest
from hypothesis import given, settings

from tests.javascript.histories import (
    KEY,
    NOW_TS,
    ROOM,
    TYPES,
    USERS,
    JsonDict,
    Value,
    histories,
    play_here,
    without_removals,
)
from tests.javascript.sdk import RECORDED, JavaScriptSdk, open_sdk


@pytest.fixture(scope="module")
def sdk() -> Iterator[JavaScriptSdk]:
    with open_sdk() as sdk:
        yield sdk


@given(history=histories())
@settings(max_examples=300, deadline=None)
def test_the_same_values_after_each_step(sdk: JavaScriptSdk, history: list[JsonDict]) -> None:
    # M1, M2, M3
    theirs = [without_removals(values) for values in sdk.play(history)]
    assert play_here(history) == theirs


def test_what_is_recorded(sdk: JavaScriptSdk) -> None:
    # M1, M2, M3
    lines = RECORDED.read_text().splitlines()
    assert lines
    for line in lines:
        history, answer = json.loads(line)
        assert sdk.answer(history) == answer


# What the two do differently, as it is in the pinned release


def event(event_id: str, at: int, duration_ms: int = 50, **content: object) -> JsonDict:
    """An event of one key, sent some milliseconds after the beginning."""
    return {
        "event_id": event_id,
        "room_id": ROOM,
        "sender": USERS[0],
        "type": TYPES[0],
        "origin_server_ts": NOW_TS + at,
        "content": {KEY: "k", "seat": 1, **content},
        "msc4354_sticky": {"duration_ms": duration_ms},
    }


def ids(outcome: list[set[Value]]) -> list[list[str]]:
    return [sorted(value[3] for value in values) for values in outcome]


def test_a_redaction_brings_back_the_event_before(sdk: JavaScriptSdk) -> None:
    """Both do so, until the SDK's timer has run once: then it has forgotten that event."""
    # M2
    other = {**event("$x", 0, 10), "type": TYPES[2]}
    steps: list[JsonDict] = [
        {"now_ts": NOW_TS, "add": event("$a", 0)},
        {"now_ts": NOW_TS + 1, "add": event("$b", 1)},
        {"now_ts": NOW_TS + 2, "redact": "$b"},
    ]
    assert ids(sdk.play(steps)) == ids(play_here(steps)) == [["$a"], ["$b"], ["$a"]]
    steps = [{"now_ts": NOW_TS, "add": other}, *steps[:2], {"now_ts": NOW_TS + 20, "redact": "$b"}]
    assert ids(play_here(steps))[-1] == ["$a"]
    assert ids(sdk.play(steps))[-1] == []


def test_the_order_of_different_durations(sdk: JavaScriptSdk) -> None:
    """MSC4354: the last to expire wins. If the SDK says so too, vary durations above."""
    # M1
    steps = [
        {"now_ts": NOW_TS, "add": event("$long", 0, 50)},
        {"now_ts": NOW_TS + 1, "add": event("$short", 1, 20)},
    ]
    assert ids(play_here(steps)) == [["$long"], ["$long"]]
    assert ids(sdk.play(steps)) == [["$long"], ["$short"]]


def test_keys_that_are_no_texts(sdk: JavaScriptSdk) -> None:
    # M1
    steps = [{"now_ts": NOW_TS, "add": event("$a", 0, **{KEY: 5})}]
    assert ids(play_here(steps)) == [["$a"]]
    assert ids(sdk.play(steps)) == [[]]


def test_a_redaction_that_comes_first(sdk: JavaScriptSdk) -> None:
    # M2
    steps = [{"now_ts": NOW_TS, "redact": "$a"}, {"now_ts": NOW_TS, "add": event("$a", 0)}]
    assert ids(play_here(steps)) == [[], []]
    assert ids(sdk.play(steps)) == [[], ["$a"]]


def test_a_value_that_expires_before_the_one_it_replaced(sdk: JavaScriptSdk) -> None:
    """Both are dated in the future, so they count from when they come."""
    # M2
    steps: list[JsonDict] = [
        {"now_ts": NOW_TS, "add": event("$value", 100)},
        {"now_ts": NOW_TS + 20, "add": event("$earlier", 90)},
        {"now_ts": NOW_TS + 60},
        {"now_ts": NOW_TS + 70},
    ]
    assert ids(play_here(steps)) == [["$value"], ["$value"], ["$earlier"], []]
    assert ids(sdk.play(steps)) == [["$value"], ["$value"], [], []]
