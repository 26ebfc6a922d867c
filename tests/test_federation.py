"""Sticky events reach every server in the room: between real homeservers, and to the tests' own."""

import json
import time
from collections import Counter
from typing import Any

import pytest

from harness.client import Client, quote
from harness.event_format import Event
from harness.homeserver import Homeserver
from harness.remote import RemoteServer
from harness.wait import eventually
from tests.federation import (
    create_room,
    join_via,
    receipts,
    stored,
    wait_until_joined,
    wait_until_received,
    wait_until_stored,
)
from tests.support import (
    GRACE_PERIOD_S,
    HOUR_MS,
    NO_TIMELINE,
    MakeHomeserver,
    assert_once,
    follow_until_seen,
    remaining_ms,
    send_plain,
    send_sticky,
    sticky_in,
)

pytestmark = [pytest.mark.slow, pytest.mark.deployments("sqlite", "workers")]


# The other servers


@pytest.fixture(params=["mixed", "stock", "own"])
def peer(request: pytest.FixtureRequest) -> Homeserver:
    """Each of the other servers in turn."""
    homeserver: Homeserver = request.getfixturevalue(f"{request.param}_peer")
    return homeserver


# New servers


# F2, F6, C5
@pytest.mark.parametrize(
    "visibility",
    [
        "shared",
        pytest.param("invited", marks=pytest.mark.repeats("workers")),
        pytest.param("joined", marks=pytest.mark.repeats("workers")),
    ],
)
def test_new_server_gets_what_is_sticky(
    homeserver: Homeserver, alice: Client, peer: Homeserver, visibility: str
) -> None:
    """A server that joins has the sticky events from before its join, and within seconds."""
    room = create_room(alice, visibility)
    sticky = []
    for _ in range(3):
        send_plain(alice, room, 2)
        sticky += send_sticky(alice, room)
    plain = send_plain(alice, room, 3)
    carol = peer.register()
    join_via(carol, room, homeserver)
    wait_until_stored(peer, room, sticky, timeout_s=15)
    if peer.has_module:
        seen = follow_until_seen(carol, room, sticky).seen(room)
        if visibility != "shared":
            assert not set(plain) & set(seen)


# F2, K3
def test_new_server_that_joins_through_another(
    homeserver: Homeserver, alice: Client, mixed_peer: Homeserver, stock_peer: Homeserver
) -> None:
    """It is sent the sticky events of both servers, though it joined through one of them."""
    room = create_room(alice, "joined")
    bob = mixed_peer.register()
    join_via(bob, room, homeserver)
    sticky = [send_sticky(alice, room)[0], send_sticky(bob, room)[0]]
    wait_until_stored(mixed_peer, room, sticky)
    wait_until_stored(homeserver, room, sticky)
    send_plain(alice, room, 3)
    carol = stock_peer.register()
    join_via(carol, room, mixed_peer)
    wait_until_stored(stock_peer, room, sticky)


# F1, C1, E3
def test_both_ways(homeserver: Homeserver, alice: Client, mixed_peer: Homeserver) -> None:
    """Events go both ways between releases, and are sticky on both sides."""
    room = create_room(alice)
    bob = mixed_peer.register()
    join_via(bob, room, homeserver)
    sticky = [*send_sticky(alice, room, 2), *send_sticky(bob, room, 2)]
    for reader in (alice, bob):
        followed = follow_until_seen(reader, room, sticky)
        assert_once(followed, room, sticky)
        for event_id in sticky:
            remaining = remaining_ms(reader.event(room, event_id))
            assert remaining is not None
            assert HOUR_MS - 60_000 < remaining <= HOUR_MS


# F1
def test_to_and_from_synapses_own(
    homeserver: Homeserver, alice: Client, own_peer: Homeserver
) -> None:
    """A server with Synapse's own implementation sends us its events, and has ours."""
    room = create_room(alice)
    bob = own_peer.register()
    join_via(bob, room, homeserver)
    (ours,) = send_sticky(alice, room)
    (theirs,) = send_sticky(bob, room)
    wait_until_stored(own_peer, room, [ours])
    follow_until_seen(alice, room, [ours, theirs])
    eventually(
        lambda: (
            {e["event_id"] for e in sticky_in(alice.sync(filter=NO_TIMELINE), room)}
            == {ours, theirs}
        ),
        what="both in the section",
    )


# F1
@pytest.mark.repeats("workers")
def test_server_that_joins_again(
    homeserver: Homeserver, alice: Client, remote: RemoteServer
) -> None:
    """It is owed everything again."""
    room = create_room(alice)
    sticky = send_sticky(alice, room, 2)
    carol = remote.join(homeserver, room, "carol")
    wait_until_received(remote, sticky)
    remote.leave(room, carol)
    eventually(
        lambda: (
            not homeserver.query(
                "SELECT 1 FROM current_state_events WHERE room_id = ? AND state_key = ? "
                "AND membership = 'join'",
                room,
                carol,
            )
        ),
        what="carol gone",
    )
    remote.join(homeserver, room, "carol")
    wait_until_received(remote, sticky, times=2)


# F1
@pytest.mark.deployments("sqlite")
def test_another_user_of_a_server(
    homeserver: Homeserver, alice: Client, remote: RemoteServer
) -> None:
    """That a second user of a server joins makes nothing due to the server."""
    room = create_room(alice)
    sticky = send_sticky(alice, room, 2)
    remote.join(homeserver, room, "carol")
    wait_until_received(remote, sticky)
    dave = remote.join(homeserver, room, "dave")
    wait_until_joined(homeserver, room, dave)
    (last,) = send_sticky(alice, room)
    remote.wait_for(last)
    time.sleep(2 * GRACE_PERIOD_S)
    assert receipts(remote, [*sticky, last]) == dict.fromkeys([*sticky, last], 1)


# What is sent


# F5
def test_nothing_is_sent_twice(homeserver: Homeserver, alice: Client, remote: RemoteServer) -> None:
    """In ordinary running Synapse's own queue sends each event, and we none."""
    room = create_room(alice)
    remote.join(homeserver, room, "carol")
    sent = []
    for _ in range(10):
        sent += send_sticky(alice, room) + send_plain(alice, room, 2)
    wait_until_received(remote, sent)
    time.sleep(GRACE_PERIOD_S + 2)
    assert receipts(remote, sent) == dict.fromkeys(sent, 1)


# F4
@pytest.mark.deployments("sqlite")
@pytest.mark.any_synapse
def test_limits_of_transactions(
    homeserver: Homeserver, alice: Client, remote: RemoteServer
) -> None:
    """At most 50 events of one room in a transaction, oldest first; of our own users only."""
    rooms = [create_room(alice) for _ in range(2)]
    bob = homeserver.register()
    bob.join(rooms[0])
    by_room = {room: send_sticky(alice, room, 60) for room in rooms}
    by_room[rooms[0]] += send_sticky(bob, rooms[0], 3)
    with RemoteServer() as other:
        dave = other.join(homeserver, rooms[0], "dave")
        foreign = other.send_event(rooms[0], dave, msc4354_sticky={"duration_ms": HOUR_MS}).event_id
        follow_until_seen(alice, rooms[0], [foreign])
        for room in rooms:
            remote.join(homeserver, room, "carol")
        everything = [event_id for events in by_room.values() for event_id in events]
        wait_until_received(remote, everything)
    ours = set(everything)
    transactions = [
        [e for e in pdus if e.event_id in ours or e.event_id == foreign]
        for pdus in remote.transactions
    ]
    transactions = [pdus for pdus in transactions if pdus]
    assert all(len(pdus) <= 50 for pdus in transactions)
    assert all(len({event.room_id for event in pdus}) == 1 for pdus in transactions)
    for room, sent in by_room.items():
        came = [e.event_id for pdus in transactions for e in pdus if e.room_id == room]
        assert came == sent
    assert foreign not in {event.event_id for event in remote.received}


# F7
@pytest.mark.deployments("sqlite")
def test_refused_events(homeserver: Homeserver, alice: Client, remote: RemoteServer) -> None:
    """What a server refuses is tried a few times more, and the others are not held up."""
    room = create_room(alice)
    first, refused, last = send_sticky(alice, room, 3)
    remote.judge = lambda event: {"error": "no"} if event.event_id == refused else {}
    remote.join(homeserver, room, "carol")
    wait_until_received(remote, [first, last])
    eventually(lambda: receipts(remote, [refused])[refused] > 2, 30, "more tries")
    time.sleep(GRACE_PERIOD_S)
    assert receipts(remote, [refused])[refused] <= 5
    assert receipts(remote, [first, last]) == {first: 1, last: 1}


# F7
@pytest.mark.deployments("sqlite")
def test_passing_refusals(homeserver: Homeserver, alice: Client, remote: RemoteServer) -> None:
    """What was refused once is taken at the next try."""
    room = create_room(alice)
    (event_id,) = send_sticky(alice, room)
    answers = iter([{"error": "in a moment"}])
    remote.judge = lambda event: next(answers, {}) if event.event_id == event_id else {}
    remote.join(homeserver, room, "carol")
    wait_until_received(remote, [event_id])
    assert receipts(remote, [event_id]) == {event_id: 2}


# F1
@pytest.mark.deployments("sqlite")
def test_room_that_the_server_does_not_know_yet(
    homeserver: Homeserver, alice: Client, remote: RemoteServer
) -> None:
    """What a server leaves out of its answer, as Synapse does with unknown rooms, comes again."""
    room = create_room(alice)
    sticky = send_sticky(alice, room, 2)
    unknown = Counter[str]()

    def judge(event: Any) -> dict[str, Any] | None:
        unknown[event.event_id] += 1
        return None if unknown[event.event_id] <= 2 and event.event_id in sticky else {}

    remote.judge = judge
    remote.join(homeserver, room, "carol")
    wait_until_received(remote, sticky)
    assert receipts(remote, sticky) == dict.fromkeys(sticky, 3)


# F1, F5
@pytest.mark.deployments("sqlite")
def test_taken_but_thrown_away(homeserver: Homeserver, alice: Client, remote: RemoteServer) -> None:
    """What a server says that it took, and does not have then, comes again."""
    room = create_room(alice)
    sticky = send_sticky(alice, room, 2)
    known_event = remote._known_event
    forgotten = Counter[str]()

    def forgetful(event_id: str) -> Any:
        # For longer than we wait for the receiver to read what it took.
        if event_id in sticky and receipts(remote, [event_id])[event_id] < 2:
            forgotten[event_id] += 1
            return known_event("$unknown")
        return known_event(event_id)

    remote._known_event = forgetful  # type: ignore[method-assign]
    remote.has_in_history = lambda event: receipts(remote, sticky).get(event.event_id, 2) > 1
    remote.join(homeserver, room, "carol")
    wait_until_received(remote, sticky, times=2, timeout_s=40)
    assert forgotten


# F1, F5
@pytest.mark.deployments("sqlite")
@pytest.mark.parametrize("tells", [True, False], ids=["tells", "does_not_tell"])
def test_kept_as_an_outlier(
    homeserver: Homeserver, alice: Client, remote: RemoteServer, tells: bool
) -> None:
    """What a server has, and not in the room's history, comes again; if it does not tell, once."""
    room = create_room(alice)
    lost, kept = send_sticky(alice, room, 2)

    def in_history(event: Event) -> bool:
        if not tells:
            return False
        return event.event_id != lost or receipts(remote, [lost])[lost] > 1

    remote.has_in_history = in_history
    remote.join(homeserver, room, "carol")
    wait_until_received(remote, [kept])
    wait_until_received(remote, [lost], times=2 if tells else 1)
    eventually(
        lambda: sum("timestamp_to_event" in path for _, path in remote.requests) >= 3,
        what="the questions",
    )
    time.sleep(3)
    assert receipts(remote, [lost, kept]) == {lost: 2 if tells else 1, kept: 1}


# F2, F8
@pytest.mark.deployments("sqlite")
def test_second_copy_reaches_the_history(
    make_homeserver: MakeHomeserver, mixed_peer: Homeserver
) -> None:
    """Of many events a joiner is sent a second copy, with which it takes in what it has not."""
    # The second copies come after two to four of these.
    homeserver = make_homeserver(
        "sqlite", federation=True, module_config={"federation_grace_period": "8s"}
    )
    homeserver.start()
    alice = homeserver.register()
    room = create_room(alice)
    sticky = send_sticky(alice, room, 12)
    bob = mixed_peer.register()
    join_via(bob, room, homeserver)
    wait_until_stored(mixed_peer, room, sticky)
    mixed_peer.stop()
    # As Synapse has events that it came across while it found out what came before its join.
    mixed_peer.execute("UPDATE events SET outlier = 1 WHERE event_id = ?", sticky[5])
    mixed_peer.execute(
        "UPDATE event_json SET internal_metadata = ? WHERE event_id = ?",
        json.dumps({"outlier": True}),
        sticky[5],
    )
    mixed_peer.execute("DELETE FROM event_to_state_groups WHERE event_id = ?", sticky[5])
    assert sticky[5] not in stored(mixed_peer, room)
    mixed_peer.start()
    bob.send(room)
    wait_until_stored(mixed_peer, room, sticky, timeout_s=90)


# F1, F5
@pytest.mark.deployments("sqlite")
@pytest.mark.parametrize(("others", "times"), [(1, 2), (2, 1)], ids=["one", "two"])
def test_events_of_the_same_time(
    homeserver: Homeserver, alice: Client, remote: RemoteServer, others: int, times: int
) -> None:
    """An event between two of the same time cannot be asked for, and is believed to be there."""
    room = create_room(alice)
    (sticky,) = send_sticky(alice, room)
    remote.has_in_history = lambda event: (
        event.event_id != sticky or receipts(remote, [sticky])[sticky] > 1
    )
    carol = remote.user_id("carol")

    def judge(event: Event) -> dict[str, Any]:
        # The others are there before anybody asks.
        if event.event_id == sticky and not receipts(remote, [sticky]):
            ts = event.pdu["origin_server_ts"]
            for _ in range(others):
                remote.remember(
                    remote.create_event(room, "m.room.message", {}, carol, origin_server_ts=ts)
                )
        return {}

    remote.judge = judge
    remote.join(homeserver, room, "carol")
    wait_until_received(remote, [sticky], times)
    time.sleep(3)
    assert receipts(remote, [sticky]) == {sticky: times}


# F5
@pytest.mark.deployments("sqlite")
def test_nothing_waits_for_checks(
    homeserver: Homeserver, alice: Client, remote: RemoteServer
) -> None:
    """While a server does not tell what it has in one room it is paid in others, and all once."""
    remote.finds_after_s = 60
    rooms = [create_room(alice) for _ in range(3)]
    sticky = []
    for room in rooms:
        events = send_sticky(alice, room, 10)
        remote.join(homeserver, room, "carol")
        # Our questions are given up after ten seconds.
        wait_until_received(remote, events, timeout_s=8)
        sticky += events
        # It is being asked by now.
        time.sleep(2)
    assert any("timestamp_to_event" in path for _, path in remote.requests)
    assert receipts(remote, sticky) == dict.fromkeys(sticky, 1)


# F5
@pytest.mark.deployments("sqlite")
def test_synapse_tells_what_it_has_in_history(
    homeserver: Homeserver, alice: Client, peer: Homeserver, remote: RemoteServer
) -> None:
    """What we ask a server after sending: it finds an event by its time, unless an outlier."""
    room = create_room(alice)
    remote.join(homeserver, room, "carol")
    bob = peer.register()
    join_via(bob, room, homeserver)
    wait_until_joined(homeserver, room, bob.user_id)
    (sticky,) = send_sticky(alice, room)
    wait_until_stored(peer, room, [sticky])
    remote.wait_for(sticky)

    def found_at(event_id: str) -> str:
        ts = remote.event(event_id).pdu["origin_server_ts"]
        path = f"/_matrix/federation/v1/timestamp_to_event/{quote(room)}"
        parameters = [("ts", str(ts)), ("dir", "f")]
        answer = remote.request(peer.server_name, "GET", path, params=parameters)
        found: str = answer["event_id"]
        return found

    assert eventually(lambda: found_at(sticky), 10) == sticky
    ((created, is_outlier),) = peer.query(
        "SELECT event_id, outlier FROM events WHERE room_id = ? AND type = 'm.room.create'", room
    )
    assert is_outlier
    assert found_at(created) != created


# F1, E5, E6
@pytest.mark.repeats("workers")
def test_what_is_owed_no_more(homeserver: Homeserver, remote: RemoteServer) -> None:
    """Redacted and expired events, and those of erased users, are not sent to a new server."""
    admin = homeserver.register(admin=True)
    alice, bob = homeserver.register(), homeserver.register()
    room = create_room(alice)
    bob.join(room)
    redacted, kept = send_sticky(alice, room, 2)
    (expired,) = send_sticky(alice, room, sticky_ms=1500)
    (erased,) = send_sticky(bob, room)
    alice.redact(room, redacted)
    admin.request("POST", f"/_synapse/admin/v1/deactivate/{bob.user_id}", json={"erase": True})
    eventually(
        lambda: homeserver.query("SELECT 1 FROM erased_users WHERE user_id = ?", bob.user_id),
        what="the erasure",
    )
    time.sleep(1.5)
    remote.join(homeserver, room, "carol")
    wait_until_received(remote, [kept])
    (last,) = send_sticky(alice, room)
    wait_until_received(remote, [last])
    time.sleep(1)
    assert set(receipts(remote, [redacted, expired, erased, kept])) == {kept}


# F1
def test_rooms_that_the_server_left(make_homeserver: MakeHomeserver, remote: RemoteServer) -> None:
    """A server that has left while it was away is sent nothing of the room."""
    homeserver = make_homeserver(
        "sqlite", federation=True, module_config={"federation_grace_period": "1s"}
    )
    homeserver.start()
    alice = homeserver.register()
    left, stayed = create_room(alice), create_room(alice)
    carol = remote.join(homeserver, left, "carol")
    remote.join(homeserver, stayed, "carol")
    remote.online = False
    missed = {room: send_sticky(alice, room, 2) for room in (left, stayed)}
    alice.kick(left, carol)
    # Synapse's own queue forgets them; what is left is what we owe.
    homeserver.restart()
    remote.online = True
    wait_until_received(remote, missed[stayed])
    time.sleep(2)
    sent_by_us = receipts(remote, missed[left])
    assert not sent_by_us, "sent after the server had left"
