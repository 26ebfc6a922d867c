"""What the server's admin decides on rooms, users and servers, and what becomes of live events."""

from urllib.parse import quote

import pytest

from harness.client import Client, JsonDict, MatrixError
from harness.homeserver import BACKGROUND_WORKER, Homeserver
from harness.remote import RemoteServer
from harness.wait import eventually
from tests.support import (
    MakeHomeserver,
    is_stored,
    now_ms,
    reasons,
    section_ids,
    send_sticky,
    sticky,
    switch,
    until_refused,
    wait_for_readers,
)

# One process is there with SQLite, and PostgreSQL with the workers.
pytestmark = pytest.mark.repeats("postgres")

API = "/_synapse/client/synapse_sticky/admin/v1"


def decide(admin: Client, kind: str, subject: str, enabled: bool | None, **more: object) -> None:
    """What the server's admin decides."""
    body: JsonDict = {"enabled": enabled, **more}
    admin.request("PUT", f"{API}/{kind}/{quote(subject, safe='')}/settings", json=body)


@pytest.fixture(scope="module")
def admins() -> dict[str, Client]:
    """The admin of each homeserver."""
    return {}


@pytest.fixture
def admin(homeserver: Homeserver, admins: dict[str, Client]) -> Client:
    """An admin of the server."""
    if homeserver.server_name not in admins:
        admins[homeserver.server_name] = homeserver.register(admin=True)
    return admins[homeserver.server_name]


def shows(homeserver: Homeserver, reader: Client, room: str, expected: list[str]) -> None:
    """Every process has just these events in the section, soon."""
    for url in homeserver.client_urls:
        via = reader.via(url)
        eventually(lambda v=via: section_ids(v, room) == expected, 30, f"{expected} at {url}")  # type: ignore[misc]


def _send_if_allowed(client: Client, room: str) -> list[str]:
    try:
        return send_sticky(client, room)
    except MatrixError as error:
        if error.status != 403:
            raise
        return []


def test_a_room(
    homeserver: Homeserver, admin: Client, alice: Client, bob: Client, room: str
) -> None:
    # A4: before its own settings, both ways
    sent = send_sticky(alice, room, 2)
    wait_for_readers(bob, room, sent[-1])
    decide(admin, "rooms", room, False)
    shows(homeserver, bob, room, [])
    until_refused(homeserver, alice, room)
    for url in homeserver.client_urls:
        with pytest.raises(MatrixError, match="server's admin") as caught:
            send_sticky(alice.via(url), room)
        assert caught.value.status == 403
    switch(alice, room, {"enabled": True})
    assert section_ids(bob, room) == []
    decide(admin, "rooms", room, None)
    shows(homeserver, bob, room, sent)
    switch(alice, room, {"enabled": False})
    shows(homeserver, bob, room, [])
    decide(admin, "rooms", room, True)
    shows(homeserver, bob, room, sent)
    (more,) = eventually(lambda: _send_if_allowed(alice, room), what="a sticky event let through")
    shows(homeserver, bob, room, [*sent, more])


# The decision on a room shows how processes tell each other.
@pytest.mark.repeats("workers")
def test_a_user(
    homeserver: Homeserver, admin: Client, alice: Client, bob: Client, room: str
) -> None:
    # A6: live events are held, nobody else's, until it ends
    (kept,) = send_sticky(bob, room)
    (sent,) = send_sticky(alice, room)
    wait_for_readers(bob, room, sent)
    until_ts = now_ms() + 20_000
    decide(admin, "users", alice.user_id, False, reason="too loud", until_ts=until_ts)
    shows(homeserver, bob, room, [kept])
    assert reasons(homeserver, sent) == ["user_blocked"]
    until_refused(homeserver, alice, room)
    for url in homeserver.client_urls:
        with pytest.raises(MatrixError, match="too loud") as caught:
            send_sticky(alice.via(url), room)
        assert caught.value.status == 403
    assert alice.send(room)
    eventually(lambda: reasons(homeserver, sent) == [], 60, "the end")
    assert now_ms() >= until_ts
    shows(homeserver, bob, room, [kept, sent])
    assert send_sticky(alice, room)


@pytest.mark.repeats("workers")
def test_a_server(
    homeserver: Homeserver, admin: Client, bob: Client, remote: RemoteServer, room: str
) -> None:
    # A6: what is there and what comes is held, in each room
    carol = remote.join(homeserver, room, "carol")
    first = remote.send_event(room, carol, **sticky()).event_id
    shows(homeserver, bob, room, [first])
    decide(admin, "servers", remote.server_name, False)
    shows(homeserver, bob, room, [])
    second = remote.send_event(room, carol, **sticky()).event_id
    eventually(lambda: reasons(homeserver, second) == ["server_blocked"], 30, "held")
    plain = remote.send_event(room, carol)
    eventually(lambda: is_stored(homeserver, plain), 30, "an ordinary event")
    decide(admin, "servers", remote.server_name, None)
    shows(homeserver, bob, room, [first, second])


@pytest.mark.repeats("workers")
def test_a_server_however_its_name_is_written(
    homeserver: Homeserver, admin: Client, bob: Client, remote: RemoteServer, room: str
) -> None:
    # A6: as in DNS, and in server ACLs; what is there and what comes
    remote.server_name = f"LocalHost:{remote.port}"
    carol = remote.join(homeserver, room, "carol")
    first = remote.send_event(room, carol, **sticky()).event_id
    shows(homeserver, bob, room, [first])
    decide(admin, "servers", f"lOCALHOST:{remote.port}", False)
    for name in (remote.server_name, f"localhost:{remote.port}"):
        assert admin.request("GET", f"{API}/servers/{quote(name)}/settings")["enabled"] is False
    eventually(lambda: reasons(homeserver, first) == ["server_blocked"], 30, "held")
    second = remote.send_event(room, carol, **sticky()).event_id
    eventually(lambda: reasons(homeserver, second) == ["server_blocked"], 30, "held")
    decide(admin, "servers", f"localhost:{remote.port}", None)
    shows(homeserver, bob, room, [first, second])


@pytest.mark.repeats("workers")
def test_two_reasons(
    homeserver: Homeserver, admin: Client, alice: Client, bob: Client, room: str
) -> None:
    # A1: an event is delivered once the last of them has ended
    (sent,) = send_sticky(alice, room)
    wait_for_readers(bob, room, sent)
    decide(admin, "users", alice.user_id, False)
    switch(alice, room, {"enabled": False})
    expected = ["switched_off", "user_blocked"]
    eventually(lambda: reasons(homeserver, sent) == expected, 30, "both")
    decide(admin, "users", alice.user_id, None)
    eventually(lambda: reasons(homeserver, sent) == ["switched_off"], 30, "one")
    assert section_ids(bob, room) == []
    switch(alice, room, {})
    shows(homeserver, bob, room, [sent])


@pytest.mark.slow
@pytest.mark.any_synapse
def test_while_nobody_gives_out_positions(make_homeserver: MakeHomeserver) -> None:
    # A4: the gate is shut at once on all processes, live events are held when somebody is back
    homeserver = make_homeserver("workers")
    homeserver.start()
    admin, alice = homeserver.register(admin=True), homeserver.register()
    room = alice.create_room()
    sent = send_sticky(alice, room, 2)
    shows(homeserver, alice, room, sent)
    homeserver.kill(BACKGROUND_WORKER)
    decide(admin, "rooms", room, False)
    until_refused(homeserver, alice, room)
    assert section_ids(alice, room) == sent
    homeserver.start_process(BACKGROUND_WORKER)
    shows(homeserver, alice, room, [])
    homeserver.restart()
    assert section_ids(alice, room) == []
    decide(admin, "rooms", room, None)
    shows(homeserver, alice, room, sent)


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
@pytest.mark.any_synapse
def test_decisions_that_have_ended_are_deleted(make_homeserver: MakeHomeserver, kind: str) -> None:
    # A6: one that was renewed in time goes on
    homeserver = make_homeserver(kind, module_config={"cleanup_interval": "1s"})
    homeserver.start()
    admin = homeserver.register(admin=True)
    for server_name in ("ended.example", "renewed.example"):
        decide(admin, "servers", server_name, False, until_ts=now_ms() + 10_000)
    decide(admin, "servers", "renewed.example", False, until_ts=now_ms() + 3_600_000)
    decide(admin, "servers", "endless.example", False)
    query = "SELECT subject FROM synapse_sticky_overrides ORDER BY subject"
    everything = [("ended.example",), ("endless.example",), ("renewed.example",)]
    assert homeserver.query(query) == everything
    eventually(lambda: homeserver.query(query) == everything[1:], 30, "only the others")
    path = f"{API}/servers/renewed.example/settings"
    assert admin.request("GET", path)["enabled"] is False
