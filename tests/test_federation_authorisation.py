"""Soft failure between real servers: what could not be authorised at first is delivered later."""

from typing import Any

import pytest

from harness.client import Client, MatrixError
from harness.homeserver import Homeserver
from harness.proxy import Fault
from harness.wait import eventually
from tests.federation import create_room, join_via, wait_until_joined, wait_until_stored
from tests.sliding import Connection, window
from tests.support import (
    assert_once,
    follow,
    follow_until_seen,
    quiet_token,
    remaining_ms,
    send_sticky,
)

pytestmark = [pytest.mark.slow, pytest.mark.deployments("sqlite", "workers")]


def membership(homeserver: Homeserver, room: str, user_id: str) -> Any:
    """A user's membership in the current state, as a server sees it."""
    rows = homeserver.query(
        "SELECT membership FROM current_state_events WHERE room_id = ? "
        "AND type = 'm.room.member' AND state_key = ?",
        room,
        user_id,
    )
    return rows[0][0] if rows else None


def wait_for_membership(
    homeserver: Homeserver, room: str, user_id: str, expected: str, timeout_s: float = 30
) -> None:
    """Wait until a server sees that membership."""
    eventually(
        lambda: membership(homeserver, room, user_id) == expected,
        timeout_s,
        f"{user_id} being {expected} on {homeserver.server_name}",
    )


def wait_until_held(homeserver: Homeserver, event_id: str) -> None:
    """Wait until a server has soft-failed and holds an event."""
    eventually(
        lambda: (
            homeserver.query(
                "SELECT held_reason, position FROM synapse_sticky_events WHERE event_id = ?",
                event_id,
            )
            == [("soft_failed", None)]
        ),
        30,
        f"{event_id} held on {homeserver.server_name}",
    )


def assert_delivered(reader: Client, room: str, event_id: str, since: str) -> None:
    """Over both syncs, once, and on `/event`, as a sticky event."""
    assert_once(follow_until_seen(reader, room, [event_id], since, timeout_s=40), room, [event_id])
    connection = Connection(reader, {"all": window()})
    connection.collect(room, [event_id])
    assert connection.seen(room).count(event_id) == 1
    assert remaining_ms(reader.event(room, event_id))


# K1, K3
def test_kicked_and_sending_at_the_same_time(
    homeserver: Homeserver, alice: Client, mixed_peer: Homeserver
) -> None:
    """What a user sent who was kicked meanwhile is held, and delivered once the user is back."""
    room = create_room(alice)
    bob, ben = mixed_peer.register(), mixed_peer.register()
    for user in (bob, ben):
        join_via(user, room, homeserver)
        wait_until_joined(homeserver, room, user.user_id)
    since_alice, since_ben = quiet_token(alice), quiet_token(ben)
    homeserver.proxy.set_fault(Fault.CLOSE)
    mixed_peer.proxy.set_fault(Fault.CLOSE)
    alice.kick(room, bob.user_id)
    (event_id,) = send_sticky(bob, room)
    homeserver.proxy.set_fault(Fault.NONE)
    mixed_peer.proxy.set_fault(Fault.NONE)
    wait_until_held(homeserver, event_id)
    wait_for_membership(mixed_peer, room, bob.user_id, "leave")
    assert event_id not in follow(alice, since_alice, until=lambda f: True).seen(room)
    with pytest.raises(MatrixError, match="404"):
        alice.event(room, event_id)
    join_via(bob, room, homeserver)
    assert_delivered(alice, room, event_id, since_alice)
    assert_delivered(ben, room, event_id, since_ben)
    assert remaining_ms(bob.event(room, event_id))


# K1
@pytest.mark.repeats("workers")
def test_unbanned_by_a_state_reset(
    homeserver: Homeserver, alice: Client, mixed_peer: Homeserver
) -> None:
    """A ban that turns out never to have been allowed holds nothing back any more."""
    room = create_room(alice)
    bob = homeserver.register()
    bob.join(room)
    mike, ben = mixed_peer.register(), mixed_peer.register()
    for user in (mike, ben):
        join_via(user, room, homeserver)
        wait_until_joined(homeserver, room, user.user_id)
    (levels,) = [
        event["content"] for event in alice.state(room) if event["type"] == "m.room.power_levels"
    ]
    promoted = {**levels, "users": {**levels["users"], mike.user_id: 50}}
    promotion = alice.send_state(room, "m.room.power_levels", promoted)
    wait_until_stored(mixed_peer, room, [promotion])
    since_alice, since_ben = quiet_token(alice), quiet_token(ben)
    # From here on only one direction works.
    homeserver.proxy.set_fault(Fault.CLOSE)
    mike.ban(room, bob.user_id)
    (event_id,) = send_sticky(bob, room)
    wait_until_held(mixed_peer, event_id)
    with pytest.raises(MatrixError, match="404"):
        ben.event(room, event_id)
    alice.send_state(room, "m.room.power_levels", levels)
    wait_for_membership(mixed_peer, room, bob.user_id, "join")
    assert_delivered(ben, room, event_id, since_ben)
    homeserver.proxy.set_fault(Fault.NONE)
    assert_delivered(alice, room, event_id, since_alice)
    assert membership(homeserver, room, bob.user_id) == "join"
