"""The API for the server's admins."""

import json
import os
import re
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from harness.client import Client, JsonDict, MatrixError
from harness.homeserver import Homeserver
from harness.processes import free_port
from harness.remote import RemoteServer
from harness.wait import eventually
from synapse_sticky.admin.api import read_openapi
from tests.federation import create_room, receipts, wait_until_received
from tests.support import (
    HOUR_MS,
    MakeHomeserver,
    is_recorded,
    now_ms,
    send_sticky,
    unique,
    within_a_second,
)

API = "/_synapse/client/synapse_sticky/admin/v1"
PAGE = Path(__file__).parent.parent / "docs" / "admin-api.md"
SETTINGS_TYPE = "io.github.synapse_sticky.settings"

# Workers use PostgreSQL too.
pytestmark = pytest.mark.repeats("postgres")

# Without a server in it, as from room version 12 on.
ROOM_V12 = "!" + "Ab-_" * 10 + "xyz"

ROUTES = [
    ("GET", "status"),
    ("GET", "rooms"),
    ("GET", "rooms/!a:b"),
    ("GET", "rooms/!a:b/map"),
    ("GET", "rooms/!a:b/servers"),
    ("GET", "rooms/!a:b/settings"),
    ("PUT", "rooms/!a:b/settings"),
    ("GET", "users/@a:b/settings"),
    ("PUT", "users/@a:b/settings"),
    ("GET", "blocks"),
    ("GET", "servers"),
    ("GET", "servers/a.example/settings"),
    ("PUT", "servers/a.example/settings"),
    ("POST", "servers/a.example/retry"),
]


@pytest.fixture
def admin(homeserver: Homeserver) -> Client:
    """A server admin."""
    return homeserver.register(admin=True)


def get(admin: Client, path: str, **params: Any) -> JsonDict:
    """The answer of the API."""
    return admin.request("GET", f"{API}/{path}", params=params)


def put(admin: Client, path: str, body: Any) -> JsonDict:
    """The answer of the API to a change."""
    return admin.request("PUT", f"{API}/{path}", json=body)


def everywhere(admin: Client) -> list[Client]:
    """The admin, with requests going to each of the processes that serve clients."""
    homeserver = admin.homeserver
    return [admin.via(url) for url in {homeserver.main_url, *homeserver.client_urls}]


def room_path(room_id: str, rest: str = "") -> str:
    """The path of a room."""
    return f"rooms/{quote(room_id, safe='')}{rest}"


def in_room(admin: Client, room_id: str) -> JsonDict:
    """The description of one room."""
    return get(admin, room_path(room_id))


def refusal(attempt: Callable[[], Any]) -> tuple[int, str]:
    """The status and the code of an error."""
    with pytest.raises(MatrixError) as caught:
        attempt()
    return caught.value.status, caught.value.errcode


# Status, rooms and events


# A1
def test_status(homeserver: Homeserver, admin: Client, alice: Client, room: str) -> None:
    """The versions, who does the noticing, and how much there is."""
    sent = send_sticky(alice, room, 3)
    eventually(lambda: all(is_recorded(homeserver, e) for e in sent), what="noticing")
    # Those of other tests expire meanwhile.
    others = (
        "SELECT COUNT(*) FROM synapse_sticky_events "
        "WHERE position IS NOT NULL AND expires_ts > ? AND room_id != ?"
    )
    eventually(
        lambda: get(admin, "status")["live"] == 3 + homeserver.query(others, now_ms(), room)[0][0],
        what="live events",
    )
    status = get(admin, "status")
    assert status["indexer"] == {
        "instance_name": "background1" if homeserver.workers else "master",
        "behind": 0,
    }
    assert status["enabled_by_default"] == "all"
    ((version,),) = homeserver.query("SELECT version FROM synapse_sticky_schema")
    assert status["schema_version"] == version
    assert status["instance_name"] == "master"
    assert (status["server_name"], status["user_id"]) == (homeserver.server_name, admin.user_id)
    assert {"version", "synapse_version", "newest_tested_synapse", "held", "owed"} < set(status)


# A1
def test_a_room_and_its_events(homeserver: Homeserver, admin: Client, alice: Client) -> None:
    """The events are listed oldest first, in pages, without their content."""
    room = alice.create_room()
    sent = send_sticky(alice, room, 6, sticky_ms=HOUR_MS // 2)
    eventually(lambda: in_room(admin, room)["live"] == 6, what="the events")
    described = in_room(admin, room)
    events = described.pop("events")
    assert described == {
        "room_id": room,
        "name": None,
        "canonical_alias": None,
        "live": 6,
        "held": {},
        "owed": 0,
        "enabled": True,
        "enabled_by": "default",
        "total": 6,
    }
    assert [event["event_id"] for event in events] == sent
    for event in events:
        assert set(event) == {
            *("event_id", "sender", "type", "remaining_ms", "position", "held_reasons")
        }
        assert event["sender"] == alice.user_id
        assert event["type"] == "m.room.message"
        assert 0 < event["remaining_ms"] <= HOUR_MS // 2
        assert event["held_reasons"] == []
    assert [e["position"] for e in events] == sorted(e["position"] for e in events)

    page = get(admin, room_path(room), limit=4)
    assert [event["event_id"] for event in page["events"]] == sent[:4]
    page = get(admin, room_path(room), limit=4, **{"from": page["next_token"]})
    assert [event["event_id"] for event in page["events"]] == sent[4:]
    assert page["total"] == 6
    assert "next_token" not in page


def test_rooms(homeserver: Homeserver, admin: Client, alice: Client) -> None:
    """Rooms with sticky events, or with a decision, are listed page by page; others are not."""
    quiet = alice.create_room()
    rooms = [alice.create_room() for _ in range(3)]
    for room in rooms:
        send_sticky(alice, room)
    decided = f"!{unique()}:elsewhere.example"
    put(admin, room_path(decided, "/settings"), {"enabled": False})

    def listed() -> dict[str, JsonDict]:
        found: dict[str, JsonDict] = {}
        token: str | None = "0"
        while token is not None:
            page = get(admin, "rooms", limit=2, **{"from": token})
            assert len(page["rooms"]) <= 2
            assert not found.keys() & {room["room_id"] for room in page["rooms"]}
            found.update((room["room_id"], room) for room in page["rooms"])
            token = page.get("next_token")
        assert len(found) == page["total"]
        return found

    # While these pages are read, events of other tests may expire.
    found = eventually(
        lambda: all_rooms if {*rooms, decided} <= set(all_rooms := listed()) else None,
        what="the rooms",
    )
    assert quiet not in found
    unnamed: JsonDict = {"name": None, "canonical_alias": None, "held": {}, "owed": 0}
    entry = {**unnamed, "live": 1, "enabled": True, "enabled_by": "default"}
    assert found[rooms[0]] == {"room_id": rooms[0], **entry}
    entry = {**unnamed, "live": 0, "enabled": False, "enabled_by": "admin"}
    assert found[decided] == {"room_id": decided, **entry}
    # A room that is only decided on can be asked for by itself too.
    assert in_room(admin, decided) == {"room_id": decided, **entry, "events": [], "total": 0}


def test_rooms_by_name(admin: Client, alice: Client) -> None:
    """Rooms have their names, and are found by them and sorted, whatever these hold."""
    word = unique()
    names = [f"b {word.upper()} <i>", f"A {word}\u202e\x7f\n"]
    rooms = [
        alice.create_room(name=names[0]),
        alice.create_room(name=names[1], room_alias_name=word),
        alice.create_room(),
        alice.create_room(room_alias_name=f"c-{word}"),
    ]
    for number, room in enumerate(rooms, 1):
        send_sticky(alice, room, number)
    alias = f"#{word}:{alice.user_id.partition(':')[2]}"

    def found(**params: Any) -> list[str]:
        listed = get(admin, "rooms", search_term=word, **params)
        assert listed["total"] == 3
        return [room["room_id"] for room in listed["rooms"]]

    b, a, unnamed, c = rooms
    eventually(lambda: in_room(admin, c)["live"] == 4, what="the events")
    eventually(lambda: found(order_by="live") == [b, a, c], what="their counts")
    assert found() == sorted([a, b, c])
    assert found(order_by="live", dir="b") == [c, a, b]
    # By what is shown: the alias of a room without a name.
    assert found(order_by="name") == [a, b, c] or found(order_by="name") == [c, a, b]
    assert found(order_by="name") == found(order_by="name", dir="b")[::-1]
    assert found(order_by="name", limit=1, **{"from": 1}) == found(order_by="name")[1:2]
    (described,) = [r for r in get(admin, "rooms", search_term=word)["rooms"] if r["room_id"] == a]
    assert (described["name"], described["canonical_alias"]) == (names[1], alias)
    assert in_room(admin, a)["name"] == names[1]
    assert get(admin, "rooms", search_term=f"#{word.upper()}:")["total"] == 1
    assert get(admin, "rooms", search_term=unnamed.upper())["total"] == 1
    assert get(admin, "rooms", search_term=unique("nothing")) == {"rooms": [], "total": 0}
    # Rooms that have nothing to be sorted by come last, in both directions.
    for direction in ("f", "b"):
        every = get(admin, "rooms", order_by="name", dir=direction, limit=1000)["rooms"]
        shown = [room["name"] or room["canonical_alias"] for room in every]
        assert shown[-1] is None
        assert None not in shown[: shown.index(None)]
        assert not any(shown[shown.index(None) :])


def test_names_that_are_none(admin: Client, alice: Client) -> None:
    """A name that was redacted, or is empty, is none."""
    room = alice.create_room(name="first")
    send_sticky(alice, room)
    eventually(lambda: in_room(admin, room)["name"] == "first", what="the name")
    alice.send_state(room, "m.room.name", {"name": " "})
    eventually(lambda: in_room(admin, room)["name"] is None, what="no name")
    event_id = alice.send_state(room, "m.room.name", {"name": "second"})
    eventually(lambda: in_room(admin, room)["name"] == "second", what="the second name")
    alice.redact(room, event_id)
    eventually(lambda: in_room(admin, room)["name"] is None, what="the redaction")


# A1
def test_held_events(
    homeserver: Homeserver, admin: Client, alice: Client, bob: Client, room: str
) -> None:
    """Events that are held are counted and listed with all of their reasons."""
    (first,), (second,) = send_sticky(alice, room), send_sticky(bob, room)
    eventually(lambda: in_room(admin, room)["live"] == 2, what="live events")
    user = f"users/{quote(bob.user_id, safe='')}/settings"
    put(admin, user, {"enabled": False})
    eventually(lambda: in_room(admin, room)["held"] == {"user_blocked": 1}, what="the block")
    put(admin, room_path(room, "/settings"), {"enabled": False})
    expected = {"switched_off": 2, "user_blocked": 1}
    eventually(lambda: in_room(admin, room)["held"] == expected, what="the switch")
    described = in_room(admin, room)
    assert described["live"] == 0
    assert described["enabled"] is False
    held = {event["event_id"]: event["held_reasons"] for event in described["events"]}
    assert held == {first: ["switched_off"], second: ["switched_off", "user_blocked"]}
    assert [event["position"] for event in described["events"]] == [None, None]
    put(admin, room_path(room, "/settings"), {"enabled": None})
    eventually(lambda: in_room(admin, room)["live"] == 1, what="one release")
    for flag, expected_ids in (("true", [second]), ("false", [first])):
        page = get(admin, room_path(room), held=flag)
        assert [event["event_id"] for event in page["events"]] == expected_ids
        assert page["total"] == 1
    put(admin, room_path(room, "/settings"), {"enabled": False})
    eventually(lambda: in_room(admin, room)["held"] == expected, what="the switch once more")
    described = in_room(admin, room)
    (listed,) = [r for r in get(admin, "rooms", limit=1000)["rooms"] if r["room_id"] == room]
    assert listed == {name: described[name] for name in listed}
    status = get(admin, "status")
    assert status["held"]["switched_off"] >= 2
    assert status["held"]["user_blocked"] >= 1

    put(admin, room_path(room, "/settings"), {"enabled": None})
    put(admin, user, {"enabled": None})
    eventually(lambda: in_room(admin, room)["live"] == 2, what="their release")
    assert in_room(admin, room)["held"] == {}


# A1
@pytest.mark.repeats("workers")
def test_a_room_that_was_purged(homeserver: Homeserver, admin: Client, alice: Client) -> None:
    """It is shown as long as there is anything left of it."""
    room = alice.create_room()
    (event_id,) = send_sticky(alice, room)
    eventually(lambda: in_room(admin, room)["live"] == 1, what="the event")
    admin.request("DELETE", f"/_synapse/admin/v1/rooms/{quote(room)}", json={"purge": True})
    eventually(
        lambda: not homeserver.query("SELECT 1 FROM rooms WHERE room_id = ?", room), what="purging"
    )
    (event,) = in_room(admin, room)["events"]
    assert (event["event_id"], event["type"]) == (event_id, None)


# M1, M3
def test_the_map_of_a_room(admin: Client, alice: Client, bob: Client, room: str) -> None:
    """Events replace, remove and redact each other as for clients; encrypted ones are opaque."""

    def seat(client: Client, row: int | None, sticky_ms: int = HOUR_MS // 2) -> str:
        content = {"msc4354_sticky_key": "laptop"} | ({} if row is None else {"row": row})
        return client.send(room, content, type="org.example.seat", sticky_ms=sticky_ms)

    def entries() -> list[JsonDict]:
        found = get(admin, room_path(room, "/map"))
        assert found["total"] == len(found["entries"])
        listed: list[JsonDict] = found["entries"]
        return listed

    seat(alice, 1)
    second = seat(alice, 2)
    seat(alice, 3, sticky_ms=HOUR_MS // 3)
    of_bob = seat(bob, 4)
    redacted = send_sticky(alice, room)[0]
    alice.redact(room, redacted)
    opaque = bob.send(room, {"ciphertext": "x"}, type="m.room.encrypted", sticky_ms=HOUR_MS)
    eventually(
        lambda: {e["event_id"] for e in entries()} == {second, of_bob, opaque},
        what="alice's seat, bob's seat and the encrypted one",
    )
    by_id = {entry["event_id"]: entry for entry in entries()}
    assert 0 < by_id[second].pop("remaining_ms") <= HOUR_MS // 2
    assert by_id[second] == {
        "sender": alice.user_id,
        "type": "org.example.seat",
        "sticky_key": "laptop",
        "event_id": second,
        "opaque": False,
        "content": {"msc4354_sticky_key": "laptop", "row": 2},
    }
    del by_id[opaque]["remaining_ms"]
    assert by_id[opaque] == {
        "sender": bob.user_id,
        "type": "m.room.encrypted",
        "sticky_key": None,
        "event_id": opaque,
        "opaque": True,
        "content": None,
    }
    # Bob leaves his seat, and held events are not in the map.
    seat(bob, None, sticky_ms=HOUR_MS)
    eventually(lambda: {e["event_id"] for e in entries()} == {second, opaque}, what="the removal")
    path = f"users/{quote(alice.user_id, safe='')}/settings"
    put(admin, path, {"enabled": False})
    eventually(lambda: [e["event_id"] for e in entries()] == [opaque], what="the block")
    put(admin, path, {"enabled": None})


# Decisions


# A4
def test_settings_of_a_room(admin: Client, alice: Client) -> None:
    """The admin comes first, then the room, then the default."""
    room = alice.create_room()
    path = room_path(room, "/settings")
    assert get(admin, path) == {"enabled": True, "enabled_by": "default", "override": None}
    alice.send_state(room, SETTINGS_TYPE, {"enabled": False})
    by_room = {"enabled": False, "enabled_by": "room", "override": None}
    eventually(lambda: get(admin, path) == by_room, what="the room's own settings")
    on = put(admin, path, {"enabled": True})
    assert on == get(admin, path) == {"enabled": True, "enabled_by": "admin", "override": True}
    off = put(admin, path, {"enabled": False})
    assert off == get(admin, path) == {"enabled": False, "enabled_by": "admin", "override": False}
    # Once more changes nothing.
    assert put(admin, path, {"enabled": False}) == off
    assert put(admin, path, {"enabled": None}) == by_room
    assert put(admin, path, {"enabled": None}) == by_room


# A4
@pytest.mark.parametrize("room_id", [ROOM_V12, "!a/b?c%&:elsewhere.example:8448", "!:[::1]"])
@pytest.mark.repeats("workers")
def test_settings_of_rooms_that_are_not_known(admin: Client, room_id: str) -> None:
    """Any room can be decided on, also before the server is in it."""
    path = room_path(room_id, "/settings")
    assert get(admin, path)["override"] is None
    assert refusal(lambda: in_room(admin, room_id)) == (404, "M_NOT_FOUND")
    assert refusal(lambda: get(admin, room_path(room_id, "/servers"))) == (404, "M_NOT_FOUND")
    put(admin, path, {"enabled": False})
    assert get(admin, path)["override"] is False
    assert in_room(admin, room_id)["enabled_by"] == "admin"
    put(admin, path, {"enabled": None})
    assert refusal(lambda: in_room(admin, room_id)) == (404, "M_NOT_FOUND")


# A6
@pytest.mark.parametrize("kind", ["users", "servers"])
@pytest.mark.repeats("workers")
def test_blocks(homeserver: Homeserver, admin: Client, kind: str) -> None:
    """A user or a server, known or not, is blocked with a reason and an end, or without."""
    subject = f"@{unique()}:{homeserver.server_name}" if kind == "users" else unique("server")
    path = f"{kind}/{quote(subject, safe='')}/settings"
    nothing = {
        "enabled": True,
        "enabled_by": "default",
        "override": None,
        "reason": None,
        "until_ts": None,
    }
    assert get(admin, path) == nothing
    blocked = {**nothing, "enabled": False, "enabled_by": "admin", "override": False}
    assert put(admin, path, {"enabled": False}) == get(admin, path) == blocked
    until_ts = now_ms() + HOUR_MS
    body = {"enabled": False, "reason": "floods ☎ rooms", "until_ts": until_ts}
    assert put(admin, path, body) == {**blocked, **body}
    assert get(admin, path) == {**blocked, **body}
    assert put(admin, path, {"enabled": None, "reason": None, "until_ts": None}) == nothing
    put(admin, path, {"enabled": False, "until_ts": now_ms() + 5_000})
    assert get(admin, path)["enabled"] is False
    for process in everywhere(admin):
        eventually(lambda p=process: get(p, path) == nothing, 20, "its end")  # type: ignore[misc]


# A6
def test_all_blocks(homeserver: Homeserver, admin: Client) -> None:
    """Users come first, then servers, each with its reason and its end, until it is lifted."""
    word, until_ts = unique(), now_ms() + HOUR_MS
    user, server = f"@{word}:{homeserver.server_name}", f"{word}.example"
    paths = [f"users/{quote(user, safe='')}/settings", f"servers/{server.upper()}/settings"]
    put(admin, paths[0], {"enabled": False, "reason": "floods", "until_ts": until_ts})
    put(admin, paths[1], {"enabled": False})

    def listed(process: Client) -> list[JsonDict]:
        answer = get(process, "blocks", limit=1000)
        assert answer["total"] == len(answer["blocks"])
        return [block for block in answer["blocks"] if word in block["subject"]]

    expected = [
        {"kind": "user", "subject": user, "reason": "floods", "until_ts": until_ts},
        {"kind": "server", "subject": server, "reason": None, "until_ts": None},
    ]
    for process in everywhere(admin):
        eventually(lambda p=process: listed(p) == expected, what="the blocks")  # type: ignore[misc]
    assert len(get(admin, "blocks", limit=1)["blocks"]) == 1
    for path in paths:
        put(admin, path, {"enabled": None})
    assert listed(admin) == []


@pytest.mark.repeats("workers")
@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("order_by", "rooms"),
        ("dir", "rooms"),
        ("held", "rooms/ROOM"),
        ("all", "rooms/ROOM/servers"),
    ],
)
def test_parameters_that_have_few_values(admin: Client, name: str, path: str) -> None:
    """Others are refused, and the answer names the parameter."""
    path = path.replace("ROOM", quote(admin.create_room(), safe=""))
    with pytest.raises(MatrixError) as caught:
        get(admin, path, **{name: "nonsense"})
    assert (caught.value.status, caught.value.errcode) == (400, "M_INVALID_PARAM")
    assert name in caught.value.error


@pytest.mark.repeats("workers")
@pytest.mark.parametrize(
    ("body", "code", "field"),
    [
        ([], "M_BAD_JSON", ""),
        ({}, "M_BAD_JSON", "enabled"),
        ({"enabled": "false"}, "M_BAD_JSON", "enabled"),
        ({"enabled": 0}, "M_BAD_JSON", "enabled"),
        ({"enabled": False, "until": 5}, "M_BAD_JSON", "until"),
        ({"enabled": True}, "M_INVALID_PARAM", "enabled"),
        ({"enabled": False, "reason": 5}, "M_BAD_JSON", "reason"),
        ({"enabled": False, "reason": "a\0b"}, "M_INVALID_PARAM", "reason"),
        ({"enabled": False, "reason": "\ud800"}, "M_INVALID_PARAM", "reason"),
        ({"enabled": False, "reason": "x" * 1001}, "M_INVALID_PARAM", "reason"),
        ({"enabled": False, "until_ts": "5"}, "M_BAD_JSON", "until_ts"),
        ({"enabled": False, "until_ts": True}, "M_BAD_JSON", "until_ts"),
        ({"enabled": False, "until_ts": 1e15 + 0.5}, "M_BAD_JSON", "until_ts"),
        ({"enabled": False, "until_ts": 1e300}, "M_INVALID_PARAM", "until_ts"),
        ({"enabled": False, "until_ts": 1}, "M_INVALID_PARAM", "until_ts"),
        ({"enabled": False, "until_ts": 2**70}, "M_INVALID_PARAM", "until_ts"),
        ({"enabled": None, "reason": "x"}, "M_INVALID_PARAM", "reason"),
        ({"enabled": None, "until_ts": 2**50}, "M_INVALID_PARAM", "until_ts"),
    ],
)
def test_wrong_bodies(admin: Client, body: Any, code: str, field: str) -> None:
    """Nothing is decided, and the answer names the field."""
    path = f"users/{quote(admin.user_id, safe='')}/settings"
    with pytest.raises(MatrixError) as caught:
        # With characters that UTF-8 does not have, as JSON can write them.
        _raw(admin, "PUT", path, json.dumps(body))
    assert (caught.value.status, caught.value.errcode) == (400, code)
    assert field in caught.value.error
    assert get(admin, path)["enabled"] is True


@pytest.mark.repeats("workers")
def test_bodies_of_rooms_and_no_json(admin: Client) -> None:
    """A room has neither a reason nor an end, and a body is JSON."""
    path = room_path(ROOM_V12, "/settings")
    for body in ({"enabled": False, "reason": "x"}, {"enabled": False, "until_ts": 2**50}):
        assert refusal(lambda body=body: put(admin, path, body)) == (400, "M_BAD_JSON")  # type: ignore[misc]
    assert refusal(lambda: _raw(admin, "PUT", path, "{")) == (400, "M_NOT_JSON")
    assert get(admin, path)["override"] is None


# A6
@pytest.mark.repeats("workers")
@pytest.mark.parametrize(
    "path",
    [
        "rooms/nonsense",
        "rooms/!nonsense",
        "rooms/!a:b%00/settings",
        "rooms/!a%00b:c/settings",
        f"rooms/!{'a' * 300}:b/settings",
        "rooms/@a:b/servers",
        "users/a/settings",
        "users/!a:b/settings",
        "users/@a:elsewhere.example/settings",
        "servers/a_b/settings",
        "servers/a:b:c/settings",
        "servers/%00/settings",
        "servers/OWN/settings",
    ],
)
def test_nonsense_ids(homeserver: Homeserver, admin: Client, path: str) -> None:
    """Nothing that is no ID can be decided on, nor this server itself."""
    path = path.replace("OWN", quote(homeserver.server_name, safe=""))
    assert refusal(lambda: get(admin, path)) == (400, "M_INVALID_PARAM")
    if path.endswith("/settings"):
        assert refusal(lambda: put(admin, path, {"enabled": False})) == (400, "M_INVALID_PARAM")


@pytest.mark.parametrize("name", ["from", "limit"])
@pytest.mark.repeats("workers")
def test_paging_parameters(admin: Client, name: str) -> None:
    """Those of no sense are refused, and the largest numbers do no harm."""
    room = admin.create_room()
    of_room = [room_path(room, rest) for rest in ("", "/map", "/servers")]
    for path in ("rooms", "servers", "blocks", *of_room):
        for value in ("-1", "x", "1.5"):
            attempt = lambda path=path, value=value: get(admin, path, **{name: value})  # noqa: E731
            assert refusal(attempt) == (400, "M_INVALID_PARAM")
        assert get(admin, path, **{name: 10**30})["total"] >= 0
        assert get(admin, path, **{name: 0})["total"] >= 0


@pytest.mark.repeats("workers")
def test_changes_are_logged(homeserver: Homeserver, admin: Client) -> None:
    """Who decided is in the log, with the decision."""
    before = homeserver.log_position()
    name = unique("server")
    put(admin, f"servers/{name}/settings", {"enabled": False, "reason": "so be it"})
    (line,) = [line for line in homeserver.log_since(before).splitlines() if f" '{name}':" in line]
    assert " INFO " in line
    assert admin.user_id in line
    assert "so be it" in line


@pytest.mark.repeats("workers")
def test_a_room_id_with_the_end_of_a_line(homeserver: Homeserver, admin: Client) -> None:
    """Other servers choose such IDs: the room is decided on, and the log has one line of it."""
    room = f"!{unique()}\u2028a\u0085b\r\nc:evil.example"
    before = homeserver.log_position()
    assert put(admin, room_path(room, "/settings"), {"enabled": False})["override"] is False
    for process in everywhere(admin):
        eventually(lambda p=process: room in _rooms_of(p), what="the room in the list")  # type: ignore[misc]
    assert put(admin, room_path(room, "/settings"), {"enabled": None})["override"] is None
    lines = [line for line in homeserver.log_since(before).splitlines() if "decided on" in line]
    assert [line.endswith("until_ts=None") for line in lines] == [True, True]


def _rooms_of(admin: Client) -> list[str]:
    return [entry["room_id"] for entry in get(admin, "rooms", limit=1000)["rooms"]]


def test_changes_at_the_same_time(homeserver: Homeserver, admin: Client) -> None:
    """Each is made or not, and all processes agree on the last one."""
    room = f"!{unique()}:elsewhere.example"
    path, failures = room_path(room, "/settings"), []
    processes = everywhere(admin)

    def decide(number: int) -> None:
        for turn in range(5):
            try:
                put(processes[number % len(processes)], path, {"enabled": turn % 2 == number % 2})
            except Exception as error:
                failures.append(error)

    threads = [threading.Thread(target=decide, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    query = "SELECT enabled FROM synapse_sticky_overrides WHERE subject = ?"
    ((enabled,),) = homeserver.query(query, room)
    for process in processes:
        eventually(
            lambda process=process: get(process, path)["override"] == bool(enabled),  # type: ignore[misc]
            what="agreeing",
        )


@pytest.mark.slow
@pytest.mark.any_synapse
def test_decisions_survive(make_homeserver: MakeHomeserver) -> None:
    """A decision that was answered is kept, even if the server is killed right after it."""
    homeserver = make_homeserver("sqlite")
    homeserver.start()
    admin = homeserver.register(admin=True)
    path = "servers/elsewhere.example/settings"
    until_ts = now_ms() + HOUR_MS
    blocked = put(admin, path, {"enabled": False, "reason": "spam", "until_ts": until_ts})
    homeserver.kill("main")
    homeserver.start()
    assert get(admin, path) == blocked
    put(admin, path, {"enabled": None})
    homeserver.restart()
    assert get(admin, path)["enabled"] is True


# Who may ask


@pytest.mark.repeats("workers")
@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_only_admins_may_ask(homeserver: Homeserver, alice: Client, method: str, path: str) -> None:
    """Others get the errors of Synapse's own admin API, whatever they ask."""

    def ask(token: str | None) -> tuple[int, str]:
        response = homeserver.http.request(
            method,
            f"{homeserver.main_url}{API}/{path}",
            headers={} if token is None else {"Authorization": f"Bearer {token}"},
            json={"enabled": False} if method == "PUT" else None,
        )
        return response.status_code, response.json()["errcode"]

    assert ask(None) == (401, "M_MISSING_TOKEN")
    assert ask("nonsense") == (401, "M_UNKNOWN_TOKEN")
    assert ask(alice.access_token) == (403, "M_FORBIDDEN")


def test_tokens_that_ended(homeserver: Homeserver) -> None:
    """An admin's token that has expired, or was logged out, is none any more."""
    expired, logged_out = homeserver.register(admin=True), homeserver.register(admin=True)
    homeserver.execute(
        "UPDATE access_tokens SET valid_until_ms = 1 WHERE user_id = ?", expired.user_id
    )
    logged_out.request("POST", "/_matrix/client/v3/logout", json={})
    for client in (expired, logged_out):
        assert refusal(lambda c=client: get(c, "status")) == (401, "M_UNKNOWN_TOKEN")  # type: ignore[misc]


@pytest.mark.repeats("workers")
def test_paths_and_methods(homeserver: Homeserver, admin: Client) -> None:
    """Unknown ones are told apart, and browsers may ask from elsewhere."""
    for path in ("", "nothing", "rooms/", "rooms//settings", "rooms/!a:b/settings/more", "room"):
        assert refusal(lambda path=path: get(admin, path)) == (404, "M_UNRECOGNIZED")  # type: ignore[misc]
    for method, path in (
        ("POST", "status"),
        ("DELETE", "rooms/!a:b/settings"),
        ("GET", "servers/a.example/retry"),
    ):
        attempt = lambda m=method, p=path: admin.request(m, f"{API}/{p}")  # noqa: E731
        assert refusal(attempt) == (405, "M_UNRECOGNIZED")
    url = f"{homeserver.main_url}{API}/status"
    assert homeserver.http.options(url).headers["Access-Control-Allow-Origin"] == "*"
    assert homeserver.http.get(url).headers["Access-Control-Allow-Origin"] == "*"


class AuthenticationService:
    """A stand-in for Matrix Authentication Service: it knows tokens, and their scopes."""

    def __init__(self) -> None:
        self.tokens: dict[str, JsonDict] = {}
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"])).decode()
                (token,) = urllib.parse.parse_qs(body)["token"]
                answer = json.dumps(service.tokens.get(token, {"active": False})).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, format: str, *arguments: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", free_port()), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """End it."""
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def authentication_service() -> Iterator[AuthenticationService]:
    """A service that issues the tokens in place of Synapse."""
    service = AuthenticationService()
    yield service
    service.close()


@pytest.mark.slow
def test_tokens_of_an_authentication_service(
    make_homeserver: MakeHomeserver, authentication_service: AuthenticationService
) -> None:
    """Its scope says who is an admin, and not the flag in the database."""
    homeserver = make_homeserver("sqlite")
    homeserver.start()
    plain, flagged = homeserver.register(), homeserver.register(admin=True)
    homeserver.stop()
    homeserver.reconfigure(
        extra_config={
            "matrix_authentication_service": {
                "enabled": True,
                "endpoint": authentication_service.url,
                "secret": "secret",
            },
            "password_config": {"enabled": False},
        }
    )
    homeserver.start()
    for client, scope in ((plain, "urn:synapse:admin:*"), (flagged, "")):
        authentication_service.tokens[client.access_token] = {
            "active": True,
            "scope": f"urn:matrix:client:api:* {scope}",
            "username": client.user_id[1:].partition(":")[0],
        }
    assert get(plain, "status")["live"] == 0
    assert refusal(lambda: get(flagged, "status")) == (403, "M_FORBIDDEN")
    flagged.access_token = "unknown"
    assert refusal(lambda: get(flagged, "status")) == (401, "M_UNKNOWN_TOKEN")


# Servers that are owed something


# A1, F1
@pytest.mark.slow
@pytest.mark.any_synapse
@pytest.mark.repeats("workers")
def test_servers_that_are_owed(
    homeserver: Homeserver, admin: Client, alice: Client, remote: RemoteServer
) -> None:
    """Who is owed how much for how long, and why; not paid while Synapse backs off."""
    room = create_room(alice)
    remote.join(homeserver, room, "carol")
    (first,) = send_sticky(alice, room)
    wait_until_received(remote, [first])
    remote.online = False
    send_sticky(alice, room, 2)
    retry = f"{API}/servers/{quote(remote.server_name, safe='')}/retry"

    def owed(path: str) -> JsonDict | None:
        servers = get(admin, path, limit=1000)["servers"]
        found = [s for s in servers if s["server_name"] == remote.server_name]
        return found[0] if found else None

    in_this_room = room_path(room, "/servers")

    def backing_off() -> JsonDict:
        # Synapse's own sending fails; ours is no reason to back off.
        alice.send(room)
        server = owed(in_this_room)
        assert server is not None
        assert (server["reason"], server["owed"]) == ("backing_off", 2)
        assert server["obstacle"] in ("it answered 503", "Synapse is backing off from it")
        return server

    began_ts = now_ms()
    server = eventually(backing_off, 30, "Synapse backing off")
    assert server["oldest_owed_ms"] < 60_000
    assert began_ts - 10_000 < server["failing_since_ts"] <= now_ms()
    everybody = get(admin, in_this_room, all="true")["servers"]
    assert [s["server_name"] for s in everybody] == [remote.server_name]
    assert server["retry_ts"] > now_ms() - 10_000
    assert in_room(admin, room)["owed"] == 2
    assert get(admin, "status")["owed"] >= 2
    assert owed("servers")

    def until_ts() -> int:
        alice.send(room)
        # The pauses of these tests are short, and one may have ended just now.
        response = homeserver.http.post(
            homeserver.main_url + retry, headers={"Authorization": f"Bearer {admin.access_token}"}
        )
        assert response.status_code == 409
        assert response.json()["errcode"] == "M_UNKNOWN"
        return int(response.json()["retry_ts"])

    assert eventually(until_ts, 20, "backing off") > now_ms() - 10_000
    remote.online = True
    eventually(lambda: owed(in_this_room) is None, 40, "nothing owed")
    rows = "SELECT 1 FROM synapse_sticky_obstacles WHERE server_name = ?"
    eventually(lambda: not homeserver.query(rows, remote.server_name), what="no row left")
    assert admin.request("POST", retry) == {"owed": 0}
    put(admin, f"servers/{quote(remote.server_name, safe='')}/settings", {"enabled": False})
    nothing = ("oldest_owed_ms", "reason", "obstacle", "retry_ts", "failing_since_ts")
    assert get(admin, in_this_room, all="true") == {
        "servers": [
            {
                "server_name": remote.server_name,
                "owed": 0,
                **dict.fromkeys(nothing),
                "blocked": True,
            }
        ],
        "total": 1,
    }
    put(admin, f"servers/{quote(remote.server_name, safe='')}/settings", {"enabled": None})
    assert get(admin, in_this_room)["total"] == 0


@pytest.mark.slow
def test_paying_now(
    homeserver: Homeserver, admin: Client, alice: Client, remote: RemoteServer
) -> None:
    """A server that is left alone for a while is sent its events at once, if an admin says so."""
    room = create_room(alice)
    remote.join(homeserver, room, "carol")
    (first,) = send_sticky(alice, room)
    wait_until_received(remote, [first])
    # As one that does not know the room: we come back after 1, 2, 4, 8 and 16 seconds.
    remote.judge = lambda event: None
    (event_id,) = send_sticky(alice, room)
    eventually(
        lambda: receipts(remote, [event_id]).get(event_id, 0) >= 6, 60, "five tries of our own"
    )
    for process in everywhere(admin):

        def is_paused(process: Client = process) -> bool:
            (server,) = get(process, room_path(room, "/servers"))["servers"]
            assert server["reason"] == "trying"
            assert server["obstacle"] == "it does not know the room yet"
            return server["retry_ts"] is not None and int(server["retry_ts"]) > now_ms()

        eventually(is_paused, what="the pause")
    before = receipts(remote, [event_id])[event_id]
    remote.judge = lambda event: {}
    path = f"{API}/servers/{quote(remote.server_name, safe='')}/retry"
    assert admin.request("POST", path)["owed"] >= 1
    eventually(lambda: receipts(remote, [event_id])[event_id] > before, 4, "a try at once")


# Several processes


def test_all_processes_answer_alike(
    homeserver: Homeserver, admin: Client, alice: Client, remote: RemoteServer
) -> None:
    """Each answers the same, and a decision made on one counts on all within a second."""
    room = create_room(alice)
    remote.join(homeserver, room, "carol")
    remote.online = False
    sent = send_sticky(alice, room, 2)
    eventually(lambda: all(is_recorded(homeserver, e) for e in sent), what="noticing")
    processes = everywhere(admin)

    def answers(process: Client) -> list[JsonDict]:
        status = get(process, "status")
        del status["instance_name"]
        described = in_room(process, room)
        for event in described["events"]:
            del event["remaining_ms"]
        (server,) = get(process, room_path(room, "/servers"))["servers"]
        del server["oldest_owed_ms"]
        return [status, described, server, get(process, "rooms")]

    def agree() -> bool:
        first, *others = map(answers, processes)
        assert all(other == first for other in others)
        return True

    eventually(agree, 20, "the same answers")
    for process in processes:
        for path, off in (
            (room_path(room, "/settings"), {"enabled": False}),
            (f"users/{quote(alice.user_id, safe='')}/settings", {"enabled": False}),
            ("servers/elsewhere.example/settings", {"enabled": False, "reason": unique()}),
        ):
            expected = put(process, path, off)
            for other in processes:
                within_a_second(
                    lambda o=other, p=path, e=expected: get(o, p) == e,  # type: ignore[misc]
                    f"{path} known elsewhere",
                )
            put(process, path, {"enabled": None})
    names = {get(process, "status")["instance_name"] for process in processes}
    assert len(names) == len(processes)


# The page and the document that describe it


# A1, A4, A6
@pytest.mark.deployments("sqlite")
def test_the_examples(homeserver: Homeserver, admin: Client, alice: Client) -> None:
    """Each line with curl in the documentation works as it stands there, and none is missing."""
    room = alice.create_room()
    names = {
        "%21call%3Aexample.com": quote(room, safe=""),
        "%40mallory%3Aexample.com": quote(alice.user_id, safe=""),
    }
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("curl ")]
    used = set()
    for line in lines:
        for name, real in names.items():
            line = line.replace(name, real)
        done = subprocess.run(
            ["sh", "-c", f"{line} -w '\n%{{http_code}}'"],
            env={
                **os.environ,
                "API": homeserver.main_url + API,
                "AUTH": f"Authorization: Bearer {admin.access_token}",
            },
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        body, _, status = done.stdout.rpartition("\n")
        assert (status, done.stderr) == ("200", ""), f"{line}: {done.stdout}"
        assert isinstance(json.loads(body), dict)
        method = "PUT" if "-X PUT" in line else "POST" if "-X POST" in line else "GET"
        path = line[line.index("$API/") + 5 :].split()[0].strip('"').partition("?")[0]
        used.add((method.lower(), path))
    described = {
        (method, path) for path, methods in read_openapi()["paths"].items() for method in methods
    }
    for method, path in described:
        pattern = re.sub(r"{\w+}", "[^/]+", path.removeprefix("/"))
        assert any(m == method and re.fullmatch(pattern, p) for m, p in used), (method, path)


@pytest.mark.repeats("workers")
def test_the_document(homeserver: Homeserver) -> None:
    """It is served to anybody, and describes the endpoints that there are."""
    response = homeserver.http.get(f"{homeserver.main_url}{API}/openapi.json")
    assert response.json() == read_openapi()
    described = {
        (method.upper(), path.removeprefix("/"))
        for path, methods in read_openapi()["paths"].items()
        for method in methods
    }
    ids = {"!a:b": "{room_id}", "@a:b": "{user_id}", "a.example": "{server_name}"}
    known = {("GET", "openapi.json")}
    for method, path in ROUTES:
        for example, name in ids.items():
            path = path.replace(example, name)
        known.add((method, path))
    assert described == known


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["positive", "negative"])
@pytest.mark.any_synapse
def test_whatever_the_document_allows(
    make_homeserver: MakeHomeserver, tmp_path: Path, mode: str
) -> None:
    """Schemathesis finds no answer that the document does not describe, and no error of ours."""
    homeserver = make_homeserver("sqlite")
    homeserver.start()
    admin = homeserver.register(admin=True)
    room = admin.create_room()
    send_sticky(admin, room, 3)
    document = read_openapi()
    document["servers"] = [{"url": homeserver.main_url + API}]
    # These depend on the server and the time.
    user_id = document["components"]["parameters"]["user_id"]["schema"]
    user_id["pattern"] = rf"^@[a-z0-9]+:{re.escape(homeserver.server_name)}$"
    server_name = document["components"]["parameters"]["server_name"]["schema"]
    server_name["not"] = {"const": homeserver.server_name}
    if mode == "positive":
        document["components"]["schemas"]["UntilTs"]["minimum"] = now_ms() + HOUR_MS
    path = tmp_path / "openapi.json"
    path.write_text(json.dumps(document))
    before = homeserver.log_position()
    done = subprocess.run(
        [
            *(sys.executable, "-m", "schemathesis.cli", "run", str(path)),
            *("--url", homeserver.main_url + API, "--no-color", "--seed", "4354"),
            *("--mode", mode),
            *("--phases", "examples,coverage,fuzzing", "--max-examples", "20"),
            # Synapse's answers of 405 name no methods, and neither do these.
            *("--exclude-checks", "unsupported_method"),
            *("--header", f"Authorization: Bearer {admin.access_token}"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    # Synapse warns of bodies that are no JSON, and of tokens that are none.
    assert not re.search(r" (ERROR|CRITICAL) |Traceback", homeserver.problems_since(before))


def _raw(admin: Client, method: str, path: str, body: str) -> None:
    """A request with a body as it is written here."""
    response = admin.homeserver.http.request(
        method,
        f"{admin.homeserver.main_url}{API}/{path}",
        content=body,
        headers={"Authorization": f"Bearer {admin.access_token}"},
    )
    if not response.is_success:
        raise MatrixError.from_response(response)
