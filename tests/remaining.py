"""Where an answer has an event, and how long it says that the event remains sticky."""

from collections.abc import Callable, Iterator
from typing import Any

from harness.client import JsonDict
from harness.homeserver import Homeserver
from tests.support import EVENT_KEY, HOUR_MS, now_ms, remaining_ms, stored_pdu


def find_event(value: Any, event_id: str) -> Iterator[JsonDict]:
    """Every place in an answer where an event is, however deep."""
    if isinstance(value, dict):
        if value.get("event_id") == event_id and "sender" in value:
            yield value
        for inner in value.values():
            yield from find_event(inner, event_id)
    elif isinstance(value, list):
        for inner in value:
            yield from find_event(inner, event_id)


def expiry(homeserver: Homeserver, event_id: str) -> int:
    """When an event stops being sticky, by what Synapse has stored."""
    query = "SELECT received_ts, origin_server_ts FROM events WHERE event_id = ?"
    ((received_ts, origin_server_ts),) = homeserver.query(query, event_id)
    duration_ms = stored_pdu(homeserver, event_id)[EVENT_KEY]["duration_ms"]
    return int(min(received_ts, origin_server_ts) + min(duration_ms, HOUR_MS))


def assert_counts_down(
    read: Callable[[], Any], event_id: str, expires_ts: int, name: str = ""
) -> None:
    """The remaining time is right, to the millisecond, wherever the answer has the event."""
    before = now_ms()
    answer = read()
    after = now_ms()
    found = list(find_event(answer, event_id))
    assert found, f"{name} does not show the event"
    for event in found:
        remaining = remaining_ms(event)
        assert type(remaining) is int, f"{name} does not say how long: {event}"
        assert expires_ts - after - 1 <= remaining <= expires_ts - before, name
