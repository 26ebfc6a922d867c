"""Sending: the parameter of `/send`, and the event it makes."""

import hashlib
import re
from collections.abc import Iterator
from statistics import median
from typing import Any

import pytest
from signedjson.key import get_verify_key, read_signing_keys
from signedjson.sign import verify_signed_json
from synapse.api.room_versions import KNOWN_ROOM_VERSIONS
from synapse.crypto.event_signing import compute_content_hash, compute_event_signature
from unpaddedbase64 import encode_base64

from harness.client import STICKY_PARAMETER, Client, JsonDict, MatrixError, quote
from harness.event_format import redact
from harness.homeserver import Homeserver
from harness.remote import RemoteServer
from harness.wait import eventually
from tests.support import (
    EVENT_KEY,
    HOUR_MS,
    VERSIONS_FLAG,
    MakeHomeserver,
    assert_once,
    follow_until_seen,
    has_endpoint_for_delayed_events,
    is_recorded,
    now_ms,
    quiet_token,
    remaining_ms,
    send_plain,
    sticky_in,
    stored_pdu,
    text,
    timeline_in,
    unique,
    wait_for_readers,
)

# What differs between deployments differs on workers too.
pytestmark = pytest.mark.repeats("postgres")


def _signing_key(homeserver: Homeserver) -> Any:
    with (homeserver.directory / "signing.key").open() as stream:
        (key,) = read_signing_keys(stream)
    return key


def _message_count(homeserver: Homeserver, room_id: str) -> int:
    """How many events there are in a room, of the kinds that the tests send."""
    query = (
        "SELECT count(*) FROM events WHERE room_id = ? AND type IN ('m.room.message', 'org.x.y')"
    )
    ((count,),) = homeserver.query(query, room_id)
    return int(count)


# The event


@pytest.mark.parametrize("version", ["1", "6", "12"])
@pytest.mark.repeats("workers")
def test_the_key_is_hashed_and_signed(homeserver: Homeserver, alice: Client, version: str) -> None:
    # S1
    room = alice.create_room(preset="public_chat", room_version=version)
    pdu = stored_pdu(homeserver, alice.send(room, text("here"), sticky_ms=54_321))
    assert pdu[EVENT_KEY] == {"duration_ms": 54_321}
    assert pdu["content"] == text("here")
    assert pdu["hashes"] == {"sha256": _content_hash(pdu)}
    # Without it the hash would be another one.
    assert pdu["hashes"] != {"sha256": _content_hash({**pdu, EVENT_KEY: {"duration_ms": 1}})}
    key = _signing_key(homeserver)
    unsigned = {name: value for name, value in pdu.items() if name != "signatures"}
    signatures = compute_event_signature(
        KNOWN_ROOM_VERSIONS[version], unsigned, homeserver.server_name, key
    )
    assert pdu["signatures"] == signatures


def _content_hash(pdu: JsonDict) -> str:
    name, digest = compute_content_hash(pdu, hashlib.sha256)
    assert name == "sha256"
    return str(encode_base64(digest))


@pytest.mark.parametrize("version", ["1", "11"])
def test_other_servers_get_the_key(
    homeserver: Homeserver, alice: Client, remote: RemoteServer, version: str
) -> None:
    # S1
    room = alice.create_room(preset="public_chat", room_version=version)
    remote.join(homeserver, room, "carol")
    event_id = alice.send(room, sticky_ms=60_000)
    # The id is what the remote server computed from what it was sent.
    pdu = remote.wait_for(event_id).pdu
    assert pdu[EVENT_KEY] == {"duration_ms": 60_000}
    assert pdu["hashes"] == {"sha256": _content_hash(pdu)}
    verify_key = get_verify_key(_signing_key(homeserver))
    # Raises if it is wrong.
    verify_signed_json(redact(version, pdu), homeserver.server_name, verify_key)


@pytest.mark.parametrize("duration_ms", [1, HOUR_MS])
@pytest.mark.repeats("workers")
def test_durations_at_the_ends_of_the_range(
    homeserver: Homeserver, alice: Client, room: str, duration_ms: int
) -> None:
    # S3
    pdu = stored_pdu(homeserver, alice.send(room, sticky_ms=duration_ms))
    assert pdu[EVENT_KEY] == {"duration_ms": duration_ms}


@pytest.mark.repeats("workers")
def test_any_type_of_event_can_be_sticky(alice: Client, bob: Client, room: str) -> None:
    # S1, C1
    sent = {
        alice.send(room, {"x": 1}, "org.example.member", sticky_ms=HOUR_MS),
        alice.send(room, {"ciphertext": "...", "algorithm": "a"}, "m.room.encrypted", HOUR_MS),
        alice.send(room, {}, "m.room.topic.not.state", sticky_ms=HOUR_MS),
    }
    send_plain(alice, room, 11)
    followed = follow_until_seen(bob, room, sent)
    assert sent == set(followed.sticky(room))


@pytest.mark.repeats("workers")
def test_post_takes_the_parameter_too(homeserver: Homeserver, alice: Client, room: str) -> None:
    # S1
    path = f"/_matrix/client/v3/rooms/{quote(room)}/send/m.room.message"
    answer = alice.request("POST", path, json=text("posted"), params={STICKY_PARAMETER: "60000"})
    assert stored_pdu(homeserver, answer["event_id"])[EVENT_KEY] == {"duration_ms": 60_000}
    before = _message_count(homeserver, room)
    with pytest.raises(MatrixError) as caught:
        alice.request("POST", path, json=text("posted"), params={STICKY_PARAMETER: "-1"})
    _assert_invalid_parameter(caught.value)
    assert _message_count(homeserver, room) == before


# What is refused

INVALID = [
    "0",
    "00",
    "0000000",
    "-1",
    "-0",
    "+5",
    "3600001",
    "86400000",
    "99999999999999999999999",
    "1" * 5_000,
    "1.5",
    "1.0",
    "1e3",
    "0x10",
    " 5",
    "5 ",
    "5\n",
    " ",
    "",
    "5_000",
    "5,000",
    "5ms",
    "abc",
    "null",
    "true",
    "NaN",
    "\u0665",
    "\uff15",
    "5\0",
    ["5", "5"],
    ["5", ""],
    ["abc", "5"],
]


@pytest.mark.repeats("workers")
def test_invalid_parameters_are_refused(homeserver: Homeserver, alice: Client, room: str) -> None:
    # S3
    before = _message_count(homeserver, room)
    for value in INVALID:
        for delay_ms in (None, 1):
            with pytest.raises(MatrixError) as caught:
                alice.send(room, sticky_ms=value, delay_ms=delay_ms)
            _assert_invalid_parameter(caught.value)
    assert _message_count(homeserver, room) == before
    assert _scheduled(alice) == []
    # One of those that were delayed would have been sent before this one.
    alice.send(room, delay_ms=1)
    eventually(lambda: _message_count(homeserver, room) > before, what="the delayed event")
    assert _message_count(homeserver, room) == before + 1


def _assert_invalid_parameter(error: MatrixError) -> None:
    assert error.status == 400
    assert error.errcode == "M_INVALID_PARAM"
    assert STICKY_PARAMETER in error.error
    assert re.search(r"\bfrom 1 to 3600000\b", error.error)


def _scheduled(client: Client) -> list[JsonDict]:
    path = "/_matrix/client/unstable/org.matrix.msc4140/delayed_events"
    answer = client.request("GET", path)
    events: list[JsonDict] = answer.get("delayed_events") or answer.get("scheduled") or []
    return events


@pytest.mark.repeats("workers")
def test_a_refused_transaction_can_be_mended(
    homeserver: Homeserver, alice: Client, room: str
) -> None:
    # S3, S4
    txn_id = unique()
    with pytest.raises(MatrixError):
        alice.send(room, sticky_ms="3600001", txn_id=txn_id)
    event_id = alice.send(room, sticky_ms="3600000", txn_id=txn_id)
    assert stored_pdu(homeserver, event_id)[EVENT_KEY] == {"duration_ms": HOUR_MS}


@pytest.mark.repeats("workers")
def test_who_may_not_send_may_not_send_sticky_either(
    homeserver: Homeserver, alice: Client, bob: Client
) -> None:
    # S1
    levels = {"events_default": 50}
    room = alice.create_room(preset="public_chat", power_level_content_override=levels)
    bob.join(room)
    before = _message_count(homeserver, room)
    for sender in (bob, homeserver.register()):
        with pytest.raises(MatrixError) as caught:
            sender.send(room, sticky_ms=60_000)
        assert (caught.value.status, caught.value.errcode) == (403, "M_FORBIDDEN")
    assert _message_count(homeserver, room) == before


# Transactions


def test_a_repeated_transaction_gives_one_event(
    homeserver: Homeserver, alice: Client, bob: Client, room: str
) -> None:
    # S4
    since = quiet_token(bob)
    txn_id = unique()
    event_id = alice.send(room, text("once"), sticky_ms=60_000, txn_id=txn_id)
    for sticky_ms in (60_000, 60_000, 30_000):
        again = alice.send(room, text("once"), sticky_ms=sticky_ms, txn_id=txn_id)
        assert again == event_id
    assert _message_count(homeserver, room) == 1
    last = alice.send(room)
    followed = follow_until_seen(bob, room, [event_id, last], since)
    assert_once(followed, room, [event_id, last])


# Delayed events


def test_a_delayed_event_is_sticky_once_it_is_sent(
    homeserver: Homeserver, alice: Client, bob: Client, room: str
) -> None:
    # S2, E1
    since = quiet_token(bob)
    scheduled_ts = now_ms()
    alice.send(room, text("late"), sticky_ms=60_000, delay_ms=6_000)
    # So that it comes in the section, and not in the timeline.
    filter_json = {"room": {"timeline": {"types": ["org.example.other"]}}}
    answer = bob.sync(since, filter=filter_json)
    assert sticky_in(answer, room) == []

    def fired() -> list[JsonDict]:
        answer = bob.sync(since, filter=filter_json)
        return sticky_in(answer, room)

    (event,) = eventually(fired, what="the delayed event")
    assert event["content"] == text("late")
    assert event[EVENT_KEY] == {"duration_ms": 60_000}
    # Counted from when it was scheduled this would be less.
    assert event["origin_server_ts"] >= scheduled_ts + 6_000
    remaining = remaining_ms(event)
    assert remaining is not None
    assert 60_000 - 6_000 < remaining <= 60_000
    ((expires_ts,),) = homeserver.query(
        "SELECT expires_ts FROM synapse_sticky_events WHERE event_id = ?", event["event_id"]
    )
    assert expires_ts == event["origin_server_ts"] + 60_000


def test_a_delayed_event_that_is_sent_early(
    homeserver: Homeserver, alice: Client, room: str
) -> None:
    # S2
    delay_id = alice.send(room, text("hurry"), sticky_ms=30_000, delay_ms=HOUR_MS)
    assert [event["delay_id"] for event in _scheduled(alice)] == [delay_id]
    assert _message_count(homeserver, room) == 0
    alice.manage_delayed_event(delay_id, "send")
    eventually(lambda: _message_count(homeserver, room) == 1, what="the event")
    query = "SELECT event_id FROM events WHERE room_id = ? AND type = 'm.room.message'"
    ((event_id,),) = homeserver.query(query, room)
    assert stored_pdu(homeserver, event_id)[EVENT_KEY] == {"duration_ms": 30_000}
    eventually(lambda: is_recorded(homeserver, event_id), what="its stickiness")


@pytest.mark.repeats("workers")
def test_a_delayed_event_that_is_cancelled(
    homeserver: Homeserver, alice: Client, room: str
) -> None:
    # S2
    delay_id = alice.send(room, sticky_ms=30_000, delay_ms=HOUR_MS)
    alice.manage_delayed_event(delay_id, "cancel")
    assert _scheduled(alice) == []
    assert _message_count(homeserver, room) == 0


# Delayed events, at the endpoint of their own


@has_endpoint_for_delayed_events
@pytest.mark.parametrize("where", ["body", "query", "both"])
def test_a_scheduled_event_is_sticky_once_it_is_sent(
    homeserver: Homeserver, alice: Client, bob: Client, room: str, where: str
) -> None:
    # S2, E1
    body = {STICKY_PARAMETER: 60_000} if where != "query" else None
    params = {STICKY_PARAMETER: "60000"} if where != "body" else None
    since = quiet_token(bob)
    scheduled_ts = now_ms()
    delay_id = alice.schedule(room, 6_000, body, params=params)
    assert [event["delay_id"] for event in _scheduled(alice)] == [delay_id]
    sent = eventually(lambda: timeline_in(bob.sync(since), room), what="the delayed event")
    pdu = stored_pdu(homeserver, sent[0]["event_id"])
    assert pdu[EVENT_KEY] == {"duration_ms": 60_000}
    # Counted from when it was sent.
    assert pdu["origin_server_ts"] >= scheduled_ts + 6_000
    query = "SELECT expires_ts FROM synapse_sticky_events WHERE event_id = ?"
    rows = eventually(lambda: homeserver.query(query, sent[0]["event_id"]), what="its stickiness")
    assert rows == [(pdu["origin_server_ts"] + 60_000,)]
    eventually(lambda: _scheduled(alice) == [], what="nothing scheduled")


@has_endpoint_for_delayed_events
def test_a_scheduled_event_that_is_put_off(
    homeserver: Homeserver, alice: Client, room: str
) -> None:
    # S2
    scheduled_ts = now_ms()
    delay_id = alice.schedule(room, 5_000, {STICKY_PARAMETER: HOUR_MS})
    while now_ms() < scheduled_ts + 6_000:
        alice.manage_delayed_event(delay_id, "restart")
    assert _message_count(homeserver, room) == 0
    alice.manage_delayed_event(delay_id, "send")
    eventually(lambda: _message_count(homeserver, room) == 1, what="the event")
    query = "SELECT event_id FROM events WHERE room_id = ? AND type = 'm.room.message'"
    ((event_id,),) = homeserver.query(query, room)
    assert stored_pdu(homeserver, event_id)[EVENT_KEY] == {"duration_ms": HOUR_MS}
    eventually(lambda: is_recorded(homeserver, event_id), what="its stickiness")


@has_endpoint_for_delayed_events
@pytest.mark.slow
def test_a_scheduled_event_outlives_a_restart(make_homeserver: MakeHomeserver) -> None:
    # S2
    homeserver = make_homeserver("sqlite")
    homeserver.start()
    alice = homeserver.register()
    room = alice.create_room()
    alice.schedule(room, 4_000, {STICKY_PARAMETER: 60_000})
    homeserver.restart()
    eventually(lambda: _message_count(homeserver, room) == 1, what="the event")
    query = "SELECT event_id FROM events WHERE room_id = ? AND type = 'm.room.message'"
    ((event_id,),) = homeserver.query(query, room)
    assert stored_pdu(homeserver, event_id)[EVENT_KEY] == {"duration_ms": 60_000}


# In a body that is JSON.
INVALID_IN_BODY = [0, -1, 3_600_001, 10**30, 5.0, 1e3, "5", "60000", "", True, None, [5], {}]


@has_endpoint_for_delayed_events
@pytest.mark.repeats("workers")
def test_invalid_durations_of_scheduled_events_are_refused(
    homeserver: Homeserver, alice: Client, room: str
) -> None:
    # S2, S3
    for value in INVALID_IN_BODY:
        with pytest.raises(MatrixError) as caught:
            alice.schedule(room, 1, {STICKY_PARAMETER: value})
        _assert_invalid_parameter(caught.value)
    for value in INVALID:
        for body in (None, {STICKY_PARAMETER: 5}):
            with pytest.raises(MatrixError) as caught:
                alice.schedule(room, 1, body, params={STICKY_PARAMETER: value})
            _assert_invalid_parameter(caught.value)
    contradictions: list[tuple[JsonDict, JsonDict]] = [
        ({STICKY_PARAMETER: 5}, {STICKY_PARAMETER: "6"}),
        ({STICKY_PARAMETER: 5, "state_key": ""}, {}),
        ({"state_key": ""}, {STICKY_PARAMETER: "5"}),
    ]
    for body, params in contradictions:
        with pytest.raises(MatrixError) as caught:
            alice.schedule(room, 1, body, params=params)
        assert (caught.value.status, caught.value.errcode) == (400, "M_INVALID_PARAM")
    assert _scheduled(alice) == []
    # One of those that were delayed would have been sent before this one.
    alice.schedule(room, 1)
    eventually(lambda: _message_count(homeserver, room) > 0, what="the delayed event")
    assert _message_count(homeserver, room) == 1


@has_endpoint_for_delayed_events
@pytest.mark.repeats("workers")
def test_what_else_is_scheduled_is_as_ever(
    homeserver: Homeserver, alice: Client, bob: Client, room: str
) -> None:
    # S2, S5
    since = quiet_token(bob)
    txn_id = unique()
    first = alice.schedule(room, 1_000, txn_id=txn_id)
    assert alice.schedule(room, 1_000, txn_id=txn_id) == first
    alice.schedule(room, 1_000, {"state_key": "", "content": {"topic": "t"}}, "m.room.topic")
    for event in eventually(lambda: _two(timeline_in(bob.sync(since), room)), what="both events"):
        assert EVENT_KEY not in stored_pdu(homeserver, event["event_id"])
    for mistake in ({"delay_ms": 0}, {"delay_ms": "5"}, {"content": 5}, {"state_key": 5}):
        with pytest.raises(MatrixError) as caught:
            alice.schedule(room, 1, mistake)
        assert caught.value.status == 400
        assert STICKY_PARAMETER not in caught.value.error
    path = f"/_matrix/client/unstable/org.matrix.msc4140/rooms/{quote(room)}/delayed_event/t/"
    for raw in (b"", b"[]", b"5", b"{", b"\xff", f'{{"{STICKY_PARAMETER}": 5'.encode()):
        answer = homeserver.http.put(
            alice.homeserver.main_url + path + unique(),
            content=raw,
            headers={"Authorization": f"Bearer {alice.access_token}"},
        )
        assert answer.status_code == 400
        assert answer.json()["errcode"] in ("M_NOT_JSON", "M_BAD_JSON")


def _two(events: list[JsonDict]) -> list[JsonDict]:
    return events if len(events) == 2 else []


# Without the parameter


@pytest.mark.repeats("workers")
def test_an_ordinary_event_stays_one(
    homeserver: Homeserver, alice: Client, bob: Client, room: str
) -> None:
    # S5, E2
    content = {**text("plain"), STICKY_PARAMETER: 5, EVENT_KEY: {"duration_ms": HOUR_MS}}
    event_id = alice.send(room, content)
    assert EVENT_KEY not in stored_pdu(homeserver, event_id)
    last = alice.send(room, sticky_ms=HOUR_MS)
    wait_for_readers(bob, room, send_plain(alice, room, 10)[-1])
    # Once the last one is noticed, so would the first one be.
    followed = follow_until_seen(bob, room, [last])
    assert event_id not in followed.sticky(room)
    assert not is_recorded(homeserver, event_id)
    assert remaining_ms(bob.event(room, event_id)) is None


_PROCESSED = re.compile(
    r"Processed request: .*/(?P<transactions>\d+)\) .*\"PUT [^\"]*/send/m\.room\.message/"
)


def _costs(homeserver: Homeserver, client: Client, room_id: str) -> tuple[float, list[JsonDict]]:
    """How many database transactions a plain `/send` takes, and the events."""
    send_plain(client, room_id, 3)
    position = homeserver.log_position()
    event_ids = send_plain(client, room_id, 7)

    def counts() -> list[int]:
        found = [
            int(m["transactions"]) for m in _PROCESSED.finditer(homeserver.log_since(position))
        ]
        assert len(found) == 7
        return found

    return median(eventually(counts)), [stored_pdu(homeserver, name) for name in event_ids]


@pytest.mark.slow
def test_a_plain_event_is_what_it_is_without_the_module(make_homeserver: MakeHomeserver) -> None:
    # S5
    homeserver = make_homeserver("sqlite")
    homeserver.start()
    client = homeserver.register()
    room = client.create_room()
    with_module, events = _costs(homeserver, client, room)
    homeserver.stop()
    homeserver.reconfigure(module=False)
    homeserver.start()
    without_module, plain_events = _costs(homeserver, client, room)
    assert _shapes(events) == _shapes(plain_events)
    assert with_module == without_module


def _shapes(pdus: list[JsonDict]) -> set[str]:
    """The keys that events have, at the top level and below."""
    return {str(sorted(_paths(pdu))) for pdu in pdus}


def _paths(value: Any, path: str = "") -> Iterator[str]:
    yield f"{path}:{type(value).__name__}"
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _paths(inner, f"{path}/{key}")


# Elsewhere


@pytest.mark.repeats("workers")
def test_state_does_not_take_the_parameter(
    homeserver: Homeserver, alice: Client, bob: Client, room: str
) -> None:
    # S6
    for value in (60_000, "abc"):
        event_id = alice.send_state(room, "org.example.state", {"v": str(value)}, sticky_ms=value)
        assert EVENT_KEY not in stored_pdu(homeserver, event_id)
        assert remaining_ms(bob.event(room, event_id)) is None
    alice.send_state(room, "org.example.state", {"v": "late"}, "key", sticky_ms=60_000, delay_ms=1)

    def delayed() -> list[JsonDict]:
        return [event for event in alice.state(room) if event.get("state_key") == "key"]

    (event,) = eventually(delayed, what="the delayed state event")
    assert EVENT_KEY not in event
    assert EVENT_KEY not in stored_pdu(homeserver, event["event_id"])


@pytest.mark.repeats("workers")
def test_redact_does_not_take_the_parameter(
    homeserver: Homeserver, alice: Client, room: str
) -> None:
    # E5
    target = alice.send(room)
    redaction_id = alice.redact(room, target, params={STICKY_PARAMETER: 60_000})
    assert EVENT_KEY not in stored_pdu(homeserver, redaction_id)


@pytest.mark.repeats("workers")
def test_versions_name_the_feature(homeserver: Homeserver, alice: Client) -> None:
    # S7
    for url in {homeserver.main_url, *homeserver.client_urls}:
        features = alice.via(url).request("GET", "/_matrix/client/versions")["unstable_features"]
        assert features[VERSIONS_FLAG] is True
        # Clients ask before they log in.
        answer = homeserver.http.get(f"{url}/_matrix/client/versions").json()
        assert answer["unstable_features"][VERSIONS_FLAG] is True
        # And what Synapse has to say is still there.
        assert "org.matrix.msc4140" in answer["unstable_features"]
        assert "v1.11" in answer["versions"]


def test_the_sender_sees_what_was_sent(alice: Client, room: str) -> None:
    # S1, C2
    since = quiet_token(alice)
    event_id = alice.send(room, text("mine"), sticky_ms=60_000)
    followed = follow_until_seen(alice, room, [event_id], since)
    assert_once(followed, room, [event_id])
    (event,) = [e for a in followed.answers for e in timeline_in(a, room)]
    assert event[EVENT_KEY] == {"duration_ms": 60_000}
    assert event["content"] == text("mine")
