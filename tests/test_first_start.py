"""What was sticky before the module's first start is owed to the servers that missed it."""

import time

import pytest

from harness.homeserver import Homeserver
from harness.remote import RemoteServer
from harness.wait import eventually
from tests.federation import (
    create_room,
    receipts,
    wait_until_joined,
    wait_until_received,
)
from tests.sliding import BEGINNING, Connection, drained, subscription
from tests.support import MakeHomeserver, is_recorded, section_ids, send_plain, send_sticky

pytestmark = pytest.mark.slow

OWN = {"experimental_features": {"msc4354_enabled": True}}
GRACE = {"federation_grace_period": "1s"}


def under_own(make_homeserver: MakeHomeserver, kind: str = "sqlite") -> Homeserver:
    """A server with Synapse's own implementation, and not yet the module."""
    homeserver = make_homeserver(
        kind, federation=True, module=False, module_config=GRACE, extra_config=OWN
    )
    homeserver.start()
    return homeserver


def switch_to_module(homeserver: Homeserver) -> None:
    """Stop the server, and start it with the module beside Synapse's own implementation."""
    homeserver.stop()
    homeserver.reconfigure(module=True)
    homeserver.start()


def wait_until_sent(homeserver: Homeserver, server: RemoteServer, event_id: str) -> None:
    """Wait until Synapse has noted that it has sent an event to a server."""
    eventually(
        lambda: homeserver.query(
            "SELECT 1 FROM destinations INNER JOIN events ON "
            "last_successful_stream_ordering >= stream_ordering "
            "WHERE destination = ? AND event_id = ?",
            server.server_name,
            event_id,
        ),
        30,
        "what Synapse notes of the server",
    )


def forget_tables(homeserver: Homeserver) -> None:
    """Drop the module's tables while the server is stopped."""
    tables = [
        name
        for (name,) in homeserver.query(
            "SELECT name FROM sqlite_master WHERE type = 'table' AND name LIKE 'synapse_sticky_%'"
        )
    ]
    assert len(tables) >= 4
    for name in tables:
        homeserver.execute(f"DROP TABLE {name}")


# F1, F2, F3, F5
@pytest.mark.parametrize("kind", ["sqlite", "workers"])
@pytest.mark.repeats("workers")
def test_owed_after_the_first_start(
    make_homeserver: MakeHomeserver, remote: RemoteServer, kind: str
) -> None:
    """A server that was down, and one that joins, get what they missed; others nothing again."""
    homeserver = under_own(make_homeserver, kind)
    alice = homeserver.register()
    room = create_room(alice)
    with RemoteServer() as down, RemoteServer() as late:
        for server, name in ((remote, "carol"), (down, "dave")):
            user_id = server.join(homeserver, room, name)
            wait_until_joined(homeserver, room, user_id)
        (both,) = send_sticky(alice, room)
        for server in (remote, down):
            server.wait_for(both)
        down.online = False
        missed = send_sticky(alice, room, 3)
        (plain,) = send_plain(alice, room, 1)
        wait_until_received(remote, [*missed, plain])
        wait_until_sent(homeserver, remote, plain)
        switch_to_module(homeserver)
        eventually(lambda: is_recorded(homeserver, missed[-1]), what="the first start")
        late.join(homeserver, room, "erin")
        wait_until_received(late, [both, *missed])
        down.online = True
        wait_until_received(down, missed)
        (after,) = send_sticky(alice, room)
        for server in (remote, down, late):
            server.wait_for(after)
        time.sleep(4)
        assert receipts(remote, [both, *missed]) == dict.fromkeys([both, *missed], 1)
        assert receipts(down, [both]) == {both: 1}


# F2, F5
def test_owed_to_those_who_joined_before_the_first_start(
    make_homeserver: MakeHomeserver, remote: RemoteServer
) -> None:
    """A server gets what is from before its join, though nobody noticed that; the rest it has."""
    homeserver = make_homeserver("sqlite", federation=True, module_config=GRACE)
    homeserver.start()
    alice = homeserver.register()
    room = create_room(alice)
    with RemoteServer() as other:
        carol = other.join(homeserver, room, "carol")
        wait_until_joined(homeserver, room, carol)
        sticky = send_sticky(alice, room, 2)
        wait_until_received(other, sticky)
        homeserver.stop()
        homeserver.reconfigure(module=False)
        homeserver.start()
        dave = remote.join(homeserver, room, "dave")
        wait_until_joined(homeserver, room, dave)
        # That carol has another name now does not make her server a new one.
        other.send_event(
            room, carol, {"membership": "join", "displayname": "C"}, "m.room.member", carol
        )
        (plain,) = send_plain(alice, room, 1)
        for server in (remote, other):
            server.wait_for(plain)
            wait_until_sent(homeserver, server, plain)
        homeserver.stop()
        forget_tables(homeserver)
        homeserver.reconfigure(module=True)
        homeserver.start()
        wait_until_received(remote, sticky)
        time.sleep(3)
        assert receipts(remote, sticky) == dict.fromkeys(sticky, 1)
        assert receipts(other, sticky) == dict.fromkeys(sticky, 1)


# F2, F5
def test_joined_between_what_was_sent_before(
    make_homeserver: MakeHomeserver, remote: RemoteServer
) -> None:
    """Of a room's events a server is sent those from before its join, and not the others again."""
    homeserver = under_own(make_homeserver)
    alice = homeserver.register()
    room = create_room(alice)
    before = send_sticky(alice, room, 2)
    carol = remote.join(homeserver, room, "carol")
    wait_until_joined(homeserver, room, carol)
    since = send_sticky(alice, room, 2)
    wait_until_received(remote, since)
    wait_until_sent(homeserver, remote, since[-1])
    time.sleep(1)
    # Some releases send it themselves.
    had = receipts(remote, before)
    switch_to_module(homeserver)
    wait_until_received(remote, before, times=max(had.values(), default=0) + 1)
    time.sleep(3)
    assert receipts(remote, since) == dict.fromkeys(since, 1)


# F1, F2, F3, F5
@pytest.mark.parametrize("kind", ["sqlite", "workers"])
@pytest.mark.repeats("workers")
@pytest.mark.any_synapse
def test_owed_after_the_module_was_away(
    make_homeserver: MakeHomeserver, remote: RemoteServer, kind: str
) -> None:
    """Of what Synapse's own sent meanwhile a server is owed what it missed, and nothing again."""
    homeserver = make_homeserver(kind, federation=True, module_config=GRACE)
    homeserver.start()
    alice = homeserver.register()
    room = create_room(alice)
    with RemoteServer() as down, RemoteServer() as late:
        for server, name in ((remote, "carol"), (down, "dave")):
            user_id = server.join(homeserver, room, name)
            wait_until_joined(homeserver, room, user_id)
        (both,) = send_sticky(alice, room)
        for server in (remote, down):
            server.wait_for(both)
        # The watermarks are stored every few seconds.
        eventually(
            lambda: (
                homeserver.query(
                    "SELECT count(*) FROM synapse_sticky_watermarks "
                    "WHERE settled_position = (SELECT max(position) FROM synapse_sticky_events)"
                )
                == [(2,)]
            ),
            30,
        )
        homeserver.stop()
        homeserver.reconfigure(module=False, extra_config=OWN)
        homeserver.start()
        down.online = False
        missed = send_sticky(alice, room, 3)
        wait_until_received(remote, missed)
        erin = late.join(homeserver, room, "erin")
        wait_until_joined(homeserver, room, erin)
        (plain,) = send_plain(alice, room, 1)
        for server in (remote, late):
            server.wait_for(plain)
        wait_until_sent(homeserver, remote, plain)
        # Some releases send it themselves.
        had = receipts(late, [both, *missed])
        switch_to_module(homeserver)
        eventually(lambda: is_recorded(homeserver, missed[-1]), what="the start")
        for event_id in (both, *missed):
            wait_until_received(late, [event_id], times=had.get(event_id, 0) + 1)
        down.online = True
        wait_until_received(down, missed)
        time.sleep(4)
        assert receipts(remote, [both, *missed]) == dict.fromkeys([both, *missed], 1)
        assert receipts(down, [both]) == {both: 1}


# X4
def test_nobody_waits_for_joins_from_before(make_homeserver: MakeHomeserver) -> None:
    """Who joined before the first start gets what is from before the join, and no slow answers."""
    homeserver = under_own(make_homeserver)
    alice, bob = homeserver.register(), homeserver.register()
    room = create_room(alice)
    sent = send_sticky(alice, room, 2)
    bob.join(room)
    switch_to_module(homeserver)
    connection = Connection(bob, {}, {room: subscription(timeline_limit=1)})
    assert drained(connection.collect(room, sent), room) == sent
    times = []
    for _ in range(5):
        send_plain(alice, room, 1)
        connection.since = BEGINNING
        began = time.monotonic()
        connection.ask()
        times.append(time.monotonic() - began)
    # Who waits, waits every time.
    assert min(times) < 0.25, times


# F1, F2, F5
@pytest.mark.parametrize("kind", ["sqlite", "workers"])
@pytest.mark.repeats("workers")
@pytest.mark.any_synapse
def test_owed_after_starting_over(
    make_homeserver: MakeHomeserver, remote: RemoteServer, kind: str
) -> None:
    """If Synapse's streams end before what was read, nothing is sent again or forgotten."""
    homeserver = make_homeserver(kind, federation=True, module_config=GRACE)
    homeserver.start()
    alice = homeserver.register()
    room = create_room(alice)
    carol = remote.join(homeserver, room, "carol")
    wait_until_joined(homeserver, room, carol)
    sent = send_sticky(alice, room, 2)
    wait_until_received(remote, sent)
    wait_until_sent(homeserver, remote, sent[-1])
    # The watermarks are stored every few seconds.
    eventually(
        lambda: homeserver.query(
            "SELECT 1 FROM synapse_sticky_watermarks "
            "WHERE settled_position = (SELECT max(position) FROM synapse_sticky_events)"
        ),
        30,
    )
    homeserver.stop()
    homeserver.execute("UPDATE synapse_sticky_progress SET events_stream = events_stream + 1000")
    homeserver.start()
    sent += send_sticky(alice, room)
    wait_until_received(remote, sent)
    for url in homeserver.client_urls:
        reader = alice.via(url)
        eventually(lambda reader=reader: section_ids(reader, room) == sent)  # type: ignore[misc]
    with RemoteServer() as late:
        late.join(homeserver, room, "dave")
        wait_until_received(late, sent)
        time.sleep(2)
        assert receipts(remote, sent) == dict.fromkeys(sent, 1)
