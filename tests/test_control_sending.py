"""What local users may send and create, as the admins of rooms and of the server decide."""

import json
import re
import shlex
import string
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from signedjson.key import read_signing_keys

from harness.client import STICKY_PARAMETER, Client, JsonDict, MatrixError, quote
from harness.event_format import sign_event
from harness.homeserver import Homeserver
from harness.remote import RemoteServer
from harness.wait import eventually
from tests.support import (
    EVENT_KEY,
    HOUR_MS,
    MakeHomeserver,
    has_endpoint_for_delayed_events,
    is_recorded,
    is_stored,
    now_ms,
    sabotage,
    section_ids,
    sleep_until,
    sticky,
    stored_pdu,
    text,
    unique,
    within_a_second,
)

# One process is there with SQLite, and PostgreSQL with the workers.
pytestmark = pytest.mark.repeats("postgres")

# As it is documented. Spelled out once more on purpose.
SETTINGS = "io.github.synapse_sticky.settings"
ON, OFF = {"enabled": True}, {"enabled": False}

MALFORMED: list[JsonDict] = [
    {"enabled": "false"},
    {"enabled": 0},
    {"enabled": None},
    {"enabled": []},
    {"enable": False},
    {"enabled": False, "reason": "noise"},
    {"on": {"enabled": True}},
]


def _refused(send: Callable[[], object], status: int, errcode: str) -> MatrixError:
    with pytest.raises(MatrixError) as caught:
        send()
    assert (caught.value.status, caught.value.errcode) == (status, errcode)
    return caught.value


def _forbidden(client: Client, room: str, words: str, **arguments: Any) -> None:
    """Sending a sticky event is refused, with a text that has these words, and makes nothing."""
    before = _event_count(client.homeserver, room)
    arguments = {"sticky_ms": HOUR_MS, **arguments}
    error = _refused(lambda: client.send(room, **arguments), 403, "M_FORBIDDEN")
    assert words in error.error
    assert _event_count(client.homeserver, room) == before


def _event_count(homeserver: Homeserver, room: str) -> int:
    ((count,),) = homeserver.query("SELECT count(*) FROM events WHERE room_id = ?", room)
    return int(count)


def _scheduled_count(homeserver: Homeserver, room: str) -> int:
    query = "SELECT count(*) FROM delayed_events WHERE room_id = ?"
    ((count,),) = homeserver.query(query, room)
    return int(count)


def _settings(client: Client, room: str) -> JsonDict | None:
    """The content of the room's settings, None if it has none."""
    for event in client.state(room):
        if (event["type"], event["state_key"]) == (SETTINGS, ""):
            content: JsonDict = event["content"]
            return content
    return None


def _decide(
    homeserver: Homeserver,
    kind: str,
    subject: str,
    enabled: bool,
    reason: str | None = None,
    until_ts: int | None = None,
) -> None:
    """What the server's admin decides, for the next start."""
    homeserver.execute(
        "INSERT INTO synapse_sticky_overrides (kind, subject, enabled, reason, until_ts) "
        "VALUES (?, ?, ?, ?, ?)",
        kind,
        subject,
        int(enabled),
        reason,
        until_ts,
    )


BY_ROOM = "The admins of this room have switched off"
BY_ADMIN = "The server's admin has switched off"
BY_DEFAULT = "this server's default"


# By the room


def test_a_room_that_is_off(homeserver: Homeserver, alice: Client, bob: Client, room: str) -> None:
    # A4
    alice.send_state(room, SETTINGS, OFF)
    for sender in (alice, bob):
        _forbidden(sender, room, BY_ROOM)
        # Whatever is not sticky is sent as ever.
        sender.send(room)
    alice.send_state(room, "m.room.topic", {"topic": "t"})
    alice.send_state(room, SETTINGS, ON)
    event_id = bob.send(room, sticky_ms=HOUR_MS)
    assert stored_pdu(homeserver, event_id)[EVENT_KEY] == {"duration_ms": HOUR_MS}


@pytest.mark.repeats("workers")
def test_the_decision_is_taken_back(alice: Client, bob: Client, room: str) -> None:
    # A4: by empty content, and by redacting it
    alice.send_state(room, SETTINGS, OFF)
    _forbidden(bob, room, BY_ROOM)
    alice.send_state(room, SETTINGS, {})
    bob.send(room, sticky_ms=HOUR_MS)
    settings_id = alice.send_state(room, SETTINGS, OFF)
    _forbidden(bob, room, BY_ROOM)
    alice.redact(room, settings_id)
    eventually(lambda: _can_send(bob, room), what="the end of the decision")


def _can_send(client: Client, room: str) -> bool:
    try:
        client.send(room, sticky_ms=HOUR_MS)
    except MatrixError as error:
        if error.status != 403:
            raise
        return False
    return True


@pytest.mark.deployments("workers")
def test_a_switch_counts_within_a_second_on_other_processes(
    homeserver: Homeserver, alice: Client, bob: Client, room: str
) -> None:
    # A4
    first, second = homeserver.client_urls
    admin, sender = alice.via(first), bob.via(second)
    for content, can_send in ((OFF, False), (ON, True)):
        admin.send_state(room, SETTINGS, content, settle=False)
        within_a_second(
            lambda can_send=can_send: _can_send(sender, room) == can_send,  # type: ignore[misc]
            "the switch",
        )


@pytest.mark.repeats("workers")
def test_who_is_not_joined_learns_nothing(
    homeserver: Homeserver, alice: Client, bob: Client, room: str
) -> None:
    # A4
    carol = homeserver.register()
    bob.leave(room)

    def answers() -> list[tuple[int, Any]]:
        found = []
        for client in (bob, carol):
            for delay_ms in (None, HOUR_MS):
                try:
                    client.send(room, sticky_ms=HOUR_MS, delay_ms=delay_ms)
                except MatrixError as error:
                    found.append((error.status, error.body))
                else:
                    # Before 1.164 everybody may schedule something, and it is not sent.
                    found.append((200, None))
        return found

    while_on = answers()
    alice.send_state(room, SETTINGS, OFF)
    assert answers() == while_on
    assert [status for status, _ in while_on[::2]] == [403, 403]


# By the server


@pytest.mark.slow
@pytest.mark.parametrize("default", ["private_rooms", "none"])
def test_by_default(make_homeserver: MakeHomeserver, default: str) -> None:
    # A4
    homeserver = make_homeserver(module_config={"enabled_by_default": default})
    homeserver.start()
    alice = homeserver.register()
    public = alice.create_room(preset="public_chat")
    private = alice.create_room(preset="private_chat")
    _forbidden(alice, public, BY_DEFAULT)
    if default == "none":
        _forbidden(alice, private, BY_DEFAULT)
    else:
        alice.send(private, sticky_ms=HOUR_MS)
        alice.send_state(private, "m.room.join_rules", {"join_rule": "public"})
        _forbidden(alice, private, BY_DEFAULT)
    for room in (public, private):
        alice.send_state(room, SETTINGS, ON)
        alice.send(room, sticky_ms=HOUR_MS)


@pytest.mark.slow
@pytest.mark.any_synapse
def test_by_the_servers_admin(make_homeserver: MakeHomeserver) -> None:
    # A4, A6
    homeserver = make_homeserver()
    began = time.monotonic()
    homeserver.start()
    start_ms = int(1000 * (time.monotonic() - began))
    alice, bob, carol = (homeserver.register() for _ in range(3))
    off, on, untouched = (alice.create_room(preset="public_chat") for _ in range(3))
    for room in (off, on, untouched):
        bob.join(room)
        carol.join(room)
    alice.send_state(off, SETTINGS, ON)
    alice.send_state(on, SETTINGS, OFF)
    homeserver.stop()
    _decide(homeserver, "room", off, False)
    _decide(homeserver, "room", on, True)
    _decide(homeserver, "user", bob.user_id, False, "You fill the room")
    # Long enough for a start on a machine as busy as this one.
    until_ts = now_ms() + 5_000 + 3 * start_ms
    _decide(homeserver, "user", carol.user_id, False, until_ts=until_ts)
    homeserver.start()
    _forbidden(carol, untouched, "The server's admin has stopped your sticky events")
    _forbidden(alice, off, BY_ADMIN)
    alice.send(on, sticky_ms=HOUR_MS)
    alice.send(untouched, sticky_ms=HOUR_MS)
    for room in (off, on, untouched):
        _forbidden(bob, room, "admin has stopped your sticky events: You fill the room")
        bob.send(room)
    _forbidden(bob, on, "You fill the room", delay_ms=HOUR_MS)
    assert _scheduled_count(homeserver, on) == 0
    sleep_until(until_ts)
    carol.send(untouched, sticky_ms=HOUR_MS)


# Delayed events


def test_a_delayed_event_is_judged_when_it_is_scheduled(
    homeserver: Homeserver, alice: Client, bob: Client, room: str
) -> None:
    # A5
    alice.send_state(room, SETTINGS, OFF)
    _forbidden(bob, room, BY_ROOM, delay_ms=HOUR_MS)
    assert _scheduled_count(homeserver, room) == 0
    bob.send(room, delay_ms=HOUR_MS)
    alice.send_state(room, "org.example.state", {}, delay_ms=HOUR_MS)
    assert _scheduled_count(homeserver, room) == 2


@has_endpoint_for_delayed_events
@pytest.mark.parametrize("where", ["body", "query"])
def test_a_delayed_event_is_judged_at_its_own_endpoint(
    homeserver: Homeserver, alice: Client, bob: Client, room: str, where: str
) -> None:
    # A5
    alice.send_state(room, SETTINGS, OFF)
    body = {STICKY_PARAMETER: HOUR_MS} if where == "body" else None
    params = {STICKY_PARAMETER: HOUR_MS} if where == "query" else None
    error = _refused(lambda: bob.schedule(room, HOUR_MS, body, params=params), 403, "M_FORBIDDEN")
    assert BY_ROOM in error.error
    assert _scheduled_count(homeserver, room) == 0
    bob.schedule(room, HOUR_MS)
    assert _scheduled_count(homeserver, room) == 1


def test_a_delayed_event_that_comes_due_is_sent(
    homeserver: Homeserver, alice: Client, bob: Client, room: str
) -> None:
    # A5: whatever was switched since; nor is it judged when it is put off, or sent at once
    delays = {
        name: bob.send(room, text(name), sticky_ms=HOUR_MS, delay_ms=delay_ms)
        for name, delay_ms in (("sent", HOUR_MS), ("cancelled", HOUR_MS), ("due", 5_000))
    }
    alice.send_state(room, SETTINGS, OFF)
    bob.manage_delayed_event(delays["due"], "restart")
    bob.manage_delayed_event(delays["sent"], "send")
    bob.manage_delayed_event(delays["cancelled"], "cancel")
    eventually(lambda: _bodies(alice, room) == {"due", "sent"}, 30, "the delayed events")
    # Synapse forgets them once they are sent.
    eventually(lambda: _scheduled_count(homeserver, room) == 0, what="the end of their schedule")
    _forbidden(bob, room, BY_ROOM)


def _bodies(client: Client, room: str) -> set[str]:
    chunk = client.messages(room, limit=100)["chunk"]
    return {event["content"]["body"] for event in chunk if event["type"] == "m.room.message"}


# Repeated requests


@pytest.mark.repeats("workers")
def test_a_repeated_request_is_answered_as_before(
    homeserver: Homeserver, alice: Client, bob: Client, room: str
) -> None:
    # A4, S4
    sent, scheduled = unique(), unique()
    event_id = bob.send(room, sticky_ms=HOUR_MS, txn_id=sent)
    delayer = bob.via(homeserver.client_urls[0])
    delay_id = delayer.send(room, sticky_ms=HOUR_MS, delay_ms=HOUR_MS, txn_id=scheduled)
    alice.send_state(room, SETTINGS, OFF)
    # On workers by the other process too, which has not answered it before.
    for url in homeserver.client_urls:
        assert bob.via(url).send(room, sticky_ms=HOUR_MS, txn_id=sent) == event_id
    again = delayer.send(room, sticky_ms=HOUR_MS, delay_ms=HOUR_MS, txn_id=scheduled)
    assert again == delay_id


@pytest.mark.repeats("workers")
def test_a_refused_request_can_be_repeated(alice: Client, bob: Client, room: str) -> None:
    # A4, S4
    txn_id = unique()
    alice.send_state(room, SETTINGS, OFF)
    _forbidden(bob, room, BY_ROOM, txn_id=txn_id)
    alice.send_state(room, SETTINGS, ON)
    bob.send(room, sticky_ms=HOUR_MS, txn_id=txn_id)


@pytest.mark.slow
def test_a_request_that_is_repeated_after_a_restart(make_homeserver: MakeHomeserver) -> None:
    # A4, A3, S4
    homeserver = make_homeserver(module_config={"local_rate_limit": {"burst_count": 1}})
    homeserver.start()
    alice = homeserver.register()
    room = alice.create_room()
    txn_id = unique()
    event_id = alice.send(room, sticky_ms=HOUR_MS, txn_id=txn_id)
    alice.send_state(room, SETTINGS, OFF)
    homeserver.restart()
    for _ in range(3):
        assert alice.send(room, sticky_ms=HOUR_MS, txn_id=txn_id) == event_id


# Settings


@pytest.mark.repeats("workers")
def test_malformed_settings_are_refused(
    homeserver: Homeserver, alice: Client, bob: Client, room: str
) -> None:
    # A4
    alice.send_state(room, SETTINGS, OFF)
    before = _event_count(homeserver, room)
    for content in MALFORMED:
        for delay_ms in (None, HOUR_MS):
            error = _refused(
                lambda content=content, delay_ms=delay_ms: alice.send_state(  # type: ignore[misc]
                    room, SETTINGS, content, delay_ms=delay_ms
                ),
                400,
                "M_BAD_JSON",
            )
            assert SETTINGS in error.error
            assert '{"enabled": true}' in error.error
    assert _event_count(homeserver, room) == before
    assert _scheduled_count(homeserver, room) == 0
    assert _settings(alice, room) == OFF
    _forbidden(bob, room, BY_ROOM)


@pytest.mark.repeats("workers")
def test_admins_of_the_server_write_them_right_too(homeserver: Homeserver) -> None:
    # A4: some of Synapse's checks do not concern them
    admin = homeserver.register(admin=True)
    room = admin.create_room()
    _refused(lambda: admin.send_state(room, SETTINGS, {"enabled": 1}), 400, "M_BAD_JSON")


@pytest.mark.repeats("workers")
def test_what_only_looks_like_settings_is_left_alone(alice: Client, room: str) -> None:
    # A4
    alice.send_state(room, SETTINGS, {"enabled": "?"}, "key")
    alice.send(room, {"enabled": "?"}, SETTINGS)
    alice.send(room, {"enabled": "?"}, SETTINGS, delay_ms=HOUR_MS)
    alice.send_state(room, "org.example.settings", {"enabled": "?"})


@pytest.mark.repeats("workers")
def test_settings_need_power(alice: Client, bob: Client, room: str) -> None:
    # A4
    _refused(lambda: bob.send_state(room, SETTINGS, OFF), 403, "M_FORBIDDEN")
    alice.send(room, sticky_ms=HOUR_MS)
    outsider = alice.homeserver.register()
    _refused(lambda: outsider.send_state(room, SETTINGS, {"enabled": 1}), 403, "M_FORBIDDEN")


# The page for the admins of rooms

_PAGE = Path(__file__).parent.parent / "docs" / "room-admins.md"
_COMMANDS = re.compile(r"^```sh\n(.*?)\n```$", re.MULTILINE)


@pytest.mark.repeats("workers")
def test_what_the_page_says(homeserver: Homeserver, alice: Client, bob: Client, room: str) -> None:
    # A4, E5
    switch_off, show, find, remove = _COMMANDS.findall(_PAGE.read_text(encoding="utf-8"))
    event_id = bob.send(room, sticky_ms=HOUR_MS)
    eventually(lambda: event_id in section_ids(bob, room), what="the event")
    assert _run(show, alice, room).status_code == 404
    # On workers another process answers this.
    (shown,) = eventually(
        lambda: [e for e in _run(find, alice, room).json()["chunk"] if EVENT_KEY in e],
        what="the event in the answer",
    )
    assert (shown["event_id"], shown["sender"]) == (event_id, bob.user_id)
    assert _run(remove, alice, room, event_id).status_code == 200
    eventually(lambda: section_ids(bob, room) == [], what="the end of the event")
    assert _run(switch_off, alice, room).status_code == 200
    eventually(lambda: _run(show, alice, room).json() == OFF, what="the settings")
    eventually(lambda: not _can_send(bob, room), what="the switch")


def _run(command: str, client: Client, room: str, event_id: str = "") -> Any:
    """Do what a command line with curl does, as the page shows it."""
    words = shlex.split(
        string.Template(command).substitute(
            SERVER=client.homeserver.main_url,
            TOKEN=client.access_token,
            ROOM=room,
            EVENT=event_id,
        )
    )
    assert words.pop(0) == "curl"
    url = words.pop()
    options = dict(zip(words[::2], words[1::2], strict=True))
    assert options.keys() <= {"-X", "-H", "-d"}
    name, _, value = options["-H"].partition(": ")
    return client.homeserver.http.request(
        options.get("-X", "GET"), url, content=options.get("-d"), headers={name: value}
    )


# New rooms


@pytest.mark.repeats("workers")
def test_settings_of_a_new_room(homeserver: Homeserver, alice: Client) -> None:
    # A4
    query = "SELECT count(*) FROM rooms WHERE creator = ?"
    event: JsonDict = {"type": SETTINGS}
    malformed_contents: list[Any] = [*MALFORMED, None, 5, "off", [], False]
    for content in malformed_contents:
        for changes in ({}, {"state_key": ""}):
            malformed = {**event, **changes, "content": content}
            error = _refused(
                lambda malformed=malformed: alice.create_room(initial_state=[malformed]),  # type: ignore[misc]
                400,
                "M_BAD_JSON",
            )
            assert SETTINGS in error.error
    _refused(lambda: alice.create_room(initial_state=[event]), 400, "M_BAD_JSON")
    assert homeserver.query(query, alice.user_id) == [(0,)]
    room = alice.create_room(initial_state=[{**event, "content": OFF}])
    assert _settings(alice, room) == OFF
    _forbidden(alice, room, BY_ROOM)
    # It has another state key, so these are none.
    alice.create_room(initial_state=[{**event, "state_key": "x", "content": {"enabled": 5}}])
    assert _settings(alice, alice.create_room()) is None


@pytest.mark.slow
@pytest.mark.any_synapse
def test_configured_settings_of_new_rooms(make_homeserver: MakeHomeserver) -> None:
    # A4
    homeserver = make_homeserver(module_config={"new_rooms": OFF})
    homeserver.start()
    alice = homeserver.register()
    event = {"type": SETTINGS, "state_key": ""}
    topic = {"type": "m.room.topic", "content": {"topic": "t"}}
    for preset in ("public_chat", "private_chat", "trusted_private_chat"):
        room = alice.create_room(preset=preset)
        assert _settings(alice, room) == OFF
        _forbidden(alice, room, BY_ROOM)
    for initial_state in ([topic], [topic, {**event, "state_key": "x", "content": ON}], []):
        assert _settings(alice, alice.create_room(initial_state=initial_state)) == OFF
    # Whoever creates it with some decides.
    for content in (ON, {}):
        room = alice.create_room(initial_state=[topic, {**event, "content": content}])
        assert _settings(alice, room) == content
        alice.send(room, sticky_ms=HOUR_MS)


# Upgrades


def _upgrade(client: Client, room: str, version: str) -> str:
    path = f"/_matrix/client/v3/rooms/{quote(room)}/upgrade"
    new: str = client.request("POST", path, json={"new_version": version})["replacement_room"]
    return new


@pytest.mark.parametrize("version", ["11", "12"])
@pytest.mark.repeats("workers")
def test_an_upgraded_room_keeps_its_settings(alice: Client, version: str) -> None:
    # A4
    # Other processes may know of the new room a little later.
    alice = alice.via(alice.homeserver.main_url)
    levels = {"events": {SETTINGS: 100}, "users": {alice.user_id: 100}}
    for content, kept in ((OFF, OFF), (ON, ON), ({}, None), (None, None)):
        room = alice.create_room(room_version="10", power_level_content_override=levels)
        if content is not None:
            alice.send_state(room, SETTINGS, content)
        new = _upgrade(alice, room, version)
        assert _settings(alice, new) == kept
        if kept == OFF:
            _forbidden(alice, new, BY_ROOM)
        else:
            alice.send(new, sticky_ms=HOUR_MS)


@pytest.mark.slow
@pytest.mark.any_synapse
def test_the_admins_decision_follows_an_upgrade(make_homeserver: MakeHomeserver) -> None:
    # A4
    homeserver = make_homeserver(module_config={"new_rooms": ON})
    homeserver.start()
    alice = homeserver.register()
    room, other = alice.create_room(room_version="10"), alice.create_room(room_version="10")
    _decide(homeserver, "room", room, False, "because", now_ms() + HOUR_MS)
    homeserver.restart()
    new = _upgrade(alice, room, "11")
    _forbidden(alice, new, BY_ADMIN)
    rows = {
        subject: rest
        for subject, *rest in homeserver.query(
            "SELECT subject, kind, enabled, reason, until_ts FROM synapse_sticky_overrides"
        )
    }
    assert rows[new] == rows[room]
    assert rows[new][:3] == ["room", 0, "because"]
    alice.send(_upgrade(alice, other, "11"), sticky_ms=HOUR_MS)
    homeserver.restart()
    _forbidden(alice, new, BY_ADMIN)


@pytest.mark.slow
@pytest.mark.any_synapse
def test_the_admins_decision_follows_an_upgrade_elsewhere(
    make_homeserver: MakeHomeserver, remote: RemoteServer
) -> None:
    # A4: if the old room and the new one agree
    homeserver = make_homeserver(federation=True)
    homeserver.start()
    alice = homeserver.register()
    carol = remote.user_id("carol")
    upgraded, left, untouched = (remote.create_room("carol", "10") for _ in range(3))
    for room in (upgraded, left, untouched):
        alice.join(room, via=[remote.server_name])
        _decide(homeserver, "room", room, False)
    homeserver.restart()
    successors = [
        remote.create_room("carol", "10", predecessor={"room_id": room, "event_id": "$x"})
        for room in (upgraded, left, untouched)
    ]
    other = remote.create_room("carol", "10")
    for room, successor in ((upgraded, successors[0]), (left, other)):
        tombstone = remote.send_event(
            room, carol, {"body": "", "replacement_room": successor}, "m.room.tombstone", ""
        )
        eventually(lambda event=tombstone: is_stored(homeserver, event), what="it")  # type: ignore[misc]
    for room in (*successors, other):
        alice.join(room, via=[remote.server_name])
    _forbidden(alice, successors[0], BY_ADMIN)
    for room in (*successors[1:], other):
        alice.send(room, sticky_ms=HOUR_MS)


# Rates


def _put(client: Client, room: str, sticky_ms: int | None) -> Any:
    return client.homeserver.http.put(
        f"{client.homeserver.main_url}/_matrix/client/v3/rooms/{quote(room)}"
        f"/send/m.room.message/{unique()}",
        json=text("?"),
        params={STICKY_PARAMETER: sticky_ms} if sticky_ms is not None else {},
        headers={"Authorization": f"Bearer {client.access_token}"},
    )


@pytest.mark.slow
def test_a_sender_above_the_rate(make_homeserver: MakeHomeserver) -> None:
    # A3, A5
    limit = {"per_second": 0.125, "burst_count": 3}
    homeserver = make_homeserver(module_config={"local_rate_limit": limit})
    homeserver.start()
    alice, bob = homeserver.register(), homeserver.register()
    room, other = (alice.create_room(preset="public_chat") for _ in range(2))
    bob.join(room)
    # A delayed event counts as one that is sent. Once it is due, it is sent all the same.
    alice.send(room, text("due"), sticky_ms=HOUR_MS, delay_ms=1_500)
    for _ in range(2):
        alice.send(room, sticky_ms=HOUR_MS)
    before = _event_count(homeserver, room)
    answer = _put(alice, room, HOUR_MS)
    assert answer.status_code == 429
    body = answer.json()
    assert body["errcode"] == "M_LIMIT_EXCEEDED"
    assert 0 < body["retry_after_ms"] <= 8_000
    retry_ts = now_ms() + body["retry_after_ms"]
    assert 1 <= int(answer.headers["Retry-After"]) <= 8
    for delay_ms in (None, HOUR_MS):
        error = _refused(
            lambda delay_ms=delay_ms: alice.send(room, sticky_ms=HOUR_MS, delay_ms=delay_ms),  # type: ignore[misc]
            429,
            "M_LIMIT_EXCEEDED",
        )
        assert error.body["retry_after_ms"] > 0
    assert _event_count(homeserver, room) - before <= 1
    assert _scheduled_count(homeserver, room) <= 1
    # Neither others, nor other rooms, nor what is not sticky.
    bob.send(room, sticky_ms=HOUR_MS)
    alice.send(other, sticky_ms=HOUR_MS)
    for _ in range(5):
        alice.send(room)
    eventually(lambda: "due" in _bodies(alice, room), what="the delayed event")
    sleep_until(retry_ts)
    alice.send(room, sticky_ms=HOUR_MS)


@pytest.mark.slow
@pytest.mark.any_synapse
def test_the_default_rate(make_homeserver: MakeHomeserver) -> None:
    # A3: more at once than a client sends in any call, and not without end
    homeserver = make_homeserver(module_config={"local_rate_limit": {}})
    homeserver.start()
    alice = homeserver.register()
    room = alice.create_room()
    for _ in range(60):
        alice.send(room, sticky_ms=HOUR_MS)

    def send_more() -> None:
        # In the time that these take, the bucket does not empty.
        for _ in range(120):
            alice.send(room, sticky_ms=HOUR_MS)

    _refused(send_more, 429, "M_LIMIT_EXCEEDED")


@pytest.mark.slow
def test_whom_synapse_exempts(make_homeserver: MakeHomeserver) -> None:
    # A3
    homeserver = make_homeserver()
    registrations = {}
    for name in ("free", "limited"):
        registrations[name] = {
            "id": name,
            "url": None,
            "as_token": unique(),
            "hs_token": unique(),
            "sender_localpart": name,
            "rate_limited": name == "limited",
            "namespaces": {"users": [{"exclusive": True, "regex": f"@{name}-.*"}]},
        }
        file = homeserver.directory / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(yaml.safe_dump(registrations[name]))
    homeserver.reconfigure(
        module_config={"local_rate_limit": {"per_second": 0.001, "burst_count": 2}},
        extra_config={
            "app_service_config_files": [
                str(homeserver.directory / f"{name}.yaml") for name in registrations
            ]
        },
    )
    homeserver.start()
    admin, alice = homeserver.register(admin=True), homeserver.register()
    room = alice.create_room(preset="public_chat")
    for name, registration in registrations.items():
        user_id = f"@{name}:{homeserver.server_name}"
        service = Client(homeserver, user_id, str(registration["as_token"]), "", "")
        service.join(room)
        puppet_id = f"@{name}-puppet:{homeserver.server_name}"
        service.request(
            "POST",
            "/_matrix/client/v3/register",
            json={"type": "m.login.application_service", "username": f"{name}-puppet"},
        )
        path = f"/_matrix/client/v3/join/{quote(room)}"
        service.request("POST", path, json={}, params={"user_id": puppet_id})
        for params in ({}, {"user_id": puppet_id}):
            for _ in range(2):
                service.send(room, sticky_ms=HOUR_MS, params=params)
            if name == "free":
                service.send(room, sticky_ms=HOUR_MS, params=params)
            else:
                _refused(
                    lambda service=service, params=params: service.send(  # type: ignore[misc]
                        room, sticky_ms=HOUR_MS, params=params
                    ),
                    429,
                    "M_LIMIT_EXCEEDED",
                )
    for _ in range(2):
        alice.send(room, sticky_ms=HOUR_MS)
    _refused(lambda: alice.send(room, sticky_ms=HOUR_MS), 429, "M_LIMIT_EXCEEDED")
    path = f"/_synapse/admin/v1/users/{quote(alice.user_id)}/override_ratelimit"
    admin.request("POST", path, json={"messages_per_second": 0, "burst_count": 0})
    for delay_ms in (None, HOUR_MS):
        alice.send(room, sticky_ms=HOUR_MS, delay_ms=delay_ms)


# When the module fails


@pytest.mark.slow
@pytest.mark.any_synapse
def test_who_cannot_be_judged_is_let_through(
    make_homeserver: MakeHomeserver, tmp_path: Path
) -> None:
    # A4, S5: nothing of Synapse's fails with us
    homeserver = make_homeserver()
    functions = [
        "synapse_sticky.control.settings:Settings.of_room",
        "synapse_sticky.control.settings:Settings.decided_in_room",
        "synapse_sticky.control.overrides:Overrides.decide",
    ]
    sabotage(homeserver, "Unreliable", {"directory": str(tmp_path), "functions": functions})
    homeserver.start()
    alice = homeserver.register()
    room = alice.create_room(room_version="10")
    alice.send_state(room, SETTINGS, OFF)
    _decide(homeserver, "room", room, False)
    homeserver.restart()
    for name in ("of_room", "decided_in_room", "decide"):
        (tmp_path / name).touch()
    position = homeserver.log_position()
    alice.send(room)
    assert homeserver.problems_since(position) == ""
    alice.send(room, sticky_ms=HOUR_MS)
    alice.send(room, sticky_ms=HOUR_MS, delay_ms=HOUR_MS)
    new = _upgrade(alice, room, "11")
    alice.send(new, sticky_ms=HOUR_MS)
    problems = homeserver.problems_since(position)
    for consequence in (
        "Cannot judge a sticky event of a local user: it is let through",
        "Cannot read a room's sticky event settings: its upgrade goes without them",
        "Cannot keep the server admin's override of a room that is upgraded",
    ):
        assert problems.count(consequence) == 1
    (tmp_path / "of_room").unlink()
    _forbidden(alice, room, BY_ADMIN)


# Events of others


@pytest.mark.repeats("workers")
def test_events_of_others_pass(homeserver: Homeserver, alice: Client, remote: RemoteServer) -> None:
    # A4, S5: as any event, in full
    room = alice.create_room(preset="public_chat", room_version="10")
    carol = remote.join(homeserver, room, "carol")
    alice.send_state(room, SETTINGS, OFF)
    event = remote.send_event(room, carol, text("remote"), **sticky())
    eventually(lambda: _bodies(alice, room) == {"remote"}, what="the event")
    assert EVENT_KEY in stored_pdu(homeserver, event.event_id)
    assert _internal_metadata(homeserver, event.event_id).get("soft_failed") is None


@pytest.mark.repeats("workers")
def test_our_own_events_that_come_back_pass(
    homeserver: Homeserver, alice: Client, remote: RemoteServer
) -> None:
    # A4: such as those of a time of which our database was lost
    room = alice.create_room(preset="public_chat", room_version="10")
    carol = remote.join(homeserver, room, "carol")
    alice.send_state(room, SETTINGS, OFF)
    with (homeserver.directory / "signing.key").open() as stream:
        (key,) = read_signing_keys(stream)
    pdus = [
        remote.create_event(room, "m.room.message", text("lost"), alice.user_id, **sticky()).pdu,
        remote.create_event(room, SETTINGS, {"enabled": "?"}, alice.user_id, "").pdu,
    ]
    events = [
        sign_event(
            "10", {k: v for k, v in pdu.items() if k != "signatures"}, homeserver.server_name, key
        )
        for pdu in pdus
    ]
    for event in events:
        assert remote.send(event) == {"pdus": {event.event_id: {}}}
    # One that is sent after them is accepted after them.
    remote.send_event(room, carol, text("after"))
    eventually(lambda: _bodies(alice, room) == {"lost", "after"}, what="the events")
    for event in events:
        assert stored_pdu(homeserver, event.event_id)["content"] == event.pdu["content"]
        assert _internal_metadata(homeserver, event.event_id).get("soft_failed") is None
    eventually(lambda: is_recorded(homeserver, events[0].event_id), what="its row")


def _internal_metadata(homeserver: Homeserver, event_id: str) -> JsonDict:
    query = "SELECT internal_metadata FROM event_json WHERE event_id = ?"
    ((stored,),) = homeserver.query(query, event_id)
    metadata: JsonDict = json.loads(stored)
    return metadata
