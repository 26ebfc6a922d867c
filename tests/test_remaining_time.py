"""How long an event remains sticky, where Synapse formats events in another way than usual."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness.client import Client, JsonDict, MatrixError, quote
from harness.homeserver import Homeserver
from harness.remote import RemoteServer
from harness.wait import eventually
from tests.remaining import assert_counts_down, expiry, find_event
from tests.sliding import subscription
from tests.support import (
    EVENT_KEY,
    REMAINING_KEY,
    MakeHomeserver,
    now_ms,
    sleep_until,
    text,
)

# One process is there with SQLite, and PostgreSQL with the workers.
pytestmark = pytest.mark.repeats("postgres")

LONG_MS = 600_000
# For all that is asked before they expire, on a busy machine too.
SHORT_MS = 30_000

Read = Callable[[], Any]


def _assert_silent(read: Read, event_id: str, name: str) -> None:
    found = list(find_event(read(), event_id))
    assert found, f"{name} does not show the event"
    for event in found:
        assert REMAINING_KEY not in event.get("unsigned", {}), f"{name}: {event}"


def _fetched(admin: Client, event_id: str) -> JsonDict:
    return admin.request("GET", f"/_synapse/admin/v1/fetch_event/{quote(event_id)}")


# State


def _state(client: Client, room_id: str, type: str, **params: str) -> JsonDict:
    path = f"/_matrix/client/v3/rooms/{quote(room_id)}/state/{quote(type)}/"
    return client.request("GET", path, params=params)


# E3, S6
@pytest.mark.repeats("workers")
def test_sticky_state(homeserver: Homeserver, alice: Client, remote: RemoteServer) -> None:
    """A state event says it where it is asked for as an event, and to the server's admin."""
    admin = homeserver.register(admin=True)
    room = alice.create_room(
        preset="public_chat", room_version="10", power_level_content_override={"state_default": 0}
    )
    dave = remote.join(homeserver, room, "dave")
    # Looks like an event, and is only the content of one.
    content = {
        "event_id": "$id",
        "sender": dave,
        "origin_server_ts": now_ms(),
        "unsigned": {},
        EVENT_KEY: {"duration_ms": LONG_MS},
    }
    types = ("org.example.long", "org.example.short", "org.example.plain")
    long, short, plain = (
        remote.send_event(room, dave, {**content, "event": content}, type, "", **stickiness)
        for type, stickiness in zip(
            types,
            (
                {EVENT_KEY: {"duration_ms": LONG_MS}},
                {EVENT_KEY: {"duration_ms": SHORT_MS}},
                {},
            ),
            strict=True,
        )
    )

    def reads(event: Any) -> dict[str, Read]:
        return {
            "/state": partial(_state, alice, room, event.pdu["type"], format="event"),
            "fetch_event": partial(_fetched, admin, event.event_id),
        }

    for url in homeserver.client_urls:
        reader = alice.via(url)
        eventually(
            lambda reader=reader: types[2] in {event["type"] for event in reader.state(room)},  # type: ignore[misc]
            what=f"the last of them at {url}",
        )
    for event in (long, short):
        expires_ts = expiry(homeserver, event.event_id)
        for name, read in reads(event).items():
            assert_counts_down(read, event.event_id, expires_ts, name)
    for name, read in reads(plain).items():
        _assert_silent(read, plain.event_id, name)
    for type in types:
        assert _state(alice, room, type) == {**content, "event": content}
        assert _state(alice, room, type, format="content") == {**content, "event": content}
    sleep_until(expiry(homeserver, short.event_id))
    for name, read in reads(short).items():
        _assert_silent(read, short.event_id, name)


# Application services


class ApplicationService:
    """Keeps the transactions that it is sent, with the time of each."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.transactions: list[tuple[int, JsonDict]] = []

    def events(self, event_id: str) -> list[tuple[int, JsonDict]]:
        """The places where an event was sent, and when."""
        return [
            (received_ts, event)
            for received_ts, body in list(self.transactions)
            for event in find_event(body.get("events"), event_id)
        ]

    def registration(self) -> JsonDict:
        """The file that tells Synapse of it."""
        everybody = [{"exclusive": False, "regex": "@.*"}]
        return {
            "id": "bridge",
            "url": self.url,
            "as_token": "as_token",
            "hs_token": "hs_token",
            "sender_localpart": "bridge",
            "rate_limited": False,
            "namespaces": {"users": everybody, "rooms": [], "aliases": []},
        }


@contextmanager
def application_service() -> Iterator[ApplicationService]:
    """An application service that is interested in everybody."""

    class Handler(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            service.transactions.append((now_ms(), body))
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    service = ApplicationService(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield service
    finally:
        server.shutdown()
        server.server_close()


# E3
def test_transactions_of_application_services(
    make_homeserver: MakeHomeserver, tmp_path: Path
) -> None:
    """What application services are sent says it, too, and a redaction within it."""
    registration = tmp_path / "bridge.yaml"
    with application_service() as service:
        registration.write_text(yaml.safe_dump(service.registration()))
        homeserver = make_homeserver(
            "sqlite", extra_config={"app_service_config_files": [str(registration)]}
        )
        homeserver.start()
        alice = homeserver.register()
        room = alice.create_room(room_version="11")
        sent: dict[str, int] = {}
        for _ in range(3):
            before = now_ms()
            sent[alice.send(room, sticky_ms=LONG_MS)] = before
        target = alice.send(room, text("goes"))
        redaction = alice.send(room, {"redacts": target}, "m.room.redaction", sticky_ms=LONG_MS)
        plain = alice.send(room)
        eventually(lambda: service.events(plain), what="the last transaction")
    for event_id in (*sent, redaction):
        expires_ts = expiry(homeserver, event_id)
        for received_ts, event in service.events(event_id):
            remaining = event["unsigned"].get(REMAINING_KEY)
            assert type(remaining) is int, event
            earliest = sent[event_id] if event_id in sent else event["origin_server_ts"]
            assert expires_ts - received_ts - 1 <= remaining <= expires_ts - earliest
        assert service.events(event_id)
    for event_id in (plain, target):
        for _, event in service.events(event_id):
            assert REMAINING_KEY not in event["unsigned"]


# Redactions within what they redact


def _redacted(client: Client, room_id: str, event_id: str) -> dict[str, Read]:
    """Requests that show a redacted event."""
    initial_sync = f"/_matrix/client/v3/rooms/{quote(room_id)}/initialSync"

    def sync(**filters: Any) -> Any:
        return client.sync(filter={"room": {"timeline": {"limit": 50}}, **filters})

    return {
        "/event": lambda: client.event(room_id, event_id),
        "/messages": lambda: client.messages(room_id, limit=50),
        "/context": lambda: client.context(room_id, event_id, limit=50),
        "/initialSync": lambda: client.request("GET", initial_sync, params={"limit": 50}),
        "/sync": sync,
        "/sync, as servers see events": lambda: sync(event_format="federation"),
        "sliding sync": lambda: client.sliding_sync(
            {"room_subscriptions": {room_id: subscription(timeline_limit=50)}}
        ),
    }


def _within(value: Any, redaction: str) -> Iterator[JsonDict]:
    """Every place in an answer where the redaction is within what it redacted."""
    if isinstance(value, dict):
        because = value.get("redacted_because")
        if because is not None and because.get("event_id") == redaction:
            yield because
        for inner in value.values():
            yield from _within(inner, redaction)
    elif isinstance(value, list):
        for inner in value:
            yield from _within(inner, redaction)


# E3, E5
@pytest.mark.parametrize("version", [pytest.param("10", marks=pytest.mark.repeats("sqlite")), "11"])
@pytest.mark.repeats("workers")
def test_sticky_redactions_within_what_they_redact(
    homeserver: Homeserver, alice: Client, remote: RemoteServer, version: str
) -> None:
    """There a redaction says it as anywhere else."""
    room = alice.create_room(preset="public_chat", room_version=version)
    dave = remote.join(homeserver, room, "dave")
    admin = homeserver.register(admin=True)
    redactions: dict[str, str] = {}
    for duration_ms in (LONG_MS, SHORT_MS, None):
        target = remote.send_event(room, dave, text("goes")).event_id
        more: Any = {} if duration_ms is None else {EVENT_KEY: {"duration_ms": duration_ms}}
        redacts = {"redacts": target}
        redaction = (
            remote.send_event(room, dave, redacts, "m.room.redaction", **more)
            if version == "11"
            else remote.send_event(room, dave, {}, "m.room.redaction", **redacts, **more)
        )
        redactions[target] = redaction.event_id
    long, short, plain = redactions

    def reads(target: str, reader: Client = alice) -> dict[str, Read]:
        return {
            name: lambda read=read: list(_within(read(), redactions[target]))  # type: ignore[misc]
            for name, read in _redacted(reader, room, target).items()
        }

    def is_redacted(read: Read) -> bool:
        try:
            return bool(read())
        except MatrixError:
            return False

    for url in homeserver.client_urls:
        for target in (plain, long, short):
            for name, read in reads(target, alice.via(url)).items():
                eventually(partial(is_redacted, read), what=f"the redaction in {name} at {url}")
    for target in (short, long):
        redaction_id = redactions[target]
        for name, read in reads(target).items():
            assert_counts_down(read, redaction_id, expiry(homeserver, redaction_id), name)
    for name, read in reads(plain).items():
        _assert_silent(read, redactions[plain], name)
    _assert_silent(lambda: _fetched(admin, long), long, "fetch_event")
    sleep_until(expiry(homeserver, redactions[short]))
    for name, read in reads(short).items():
        _assert_silent(read, redactions[short], name)
    # Only what is asked for. Some releases leave nothing then of what is within.
    fields = alice.sync(
        filter={"event_fields": ["unsigned.redacted_because"], "room": {"timeline": {"limit": 50}}}
    )
    for event in _within(fields, redactions[long]):
        assert event["unsigned"][REMAINING_KEY] > 0
    fields = alice.sync(filter={"event_fields": ["type"], "room": {"timeline": {"limit": 50}}})
    assert REMAINING_KEY not in json.dumps(fields)
