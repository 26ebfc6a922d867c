"""Beside other implementations: of two servers that send, each event is sent as by one alone."""

import time

import pytest

from harness.client import Client
from harness.homeserver import Homeserver
from harness.remote import RemoteServer
from tests.federation import create_room, join_via, receipts, wait_until_received, wait_until_stored
from tests.support import GRACE_PERIOD_S, send_sticky

pytestmark = [pytest.mark.slow, pytest.mark.deployments("sqlite")]

# Until nothing more is sent: our grace period, and Synapse's queues.
QUIET_S = GRACE_PERIOD_S + 5


@pytest.fixture(params=["own", "mixed"])
def beside(request: pytest.FixtureRequest) -> Homeserver:
    """A server with Synapse's own implementation, and one with the module."""
    homeserver: Homeserver = request.getfixturevalue(f"{request.param}_peer")
    return homeserver


# F2, F5
def test_a_joiner_is_sent_each_event_as_often_as_by_one_server_alone(
    homeserver: Homeserver, alice: Client, beside: Homeserver, remote: RemoteServer
) -> None:
    bob = beside.register()
    alone = {user: create_room(user) for user in (alice, bob)}
    room = create_room(alice)
    join_via(bob, room, homeserver)
    by_one = {user: send_sticky(user, alone[user], 10) for user in (alice, bob)}
    by_both = {user: send_sticky(user, room, 10) for user in (alice, bob)}
    wait_until_stored(beside, room, by_both[alice])
    wait_until_stored(homeserver, room, by_both[bob])
    for user in (alice, bob):
        remote.join(user.homeserver, alone[user], "carol")
    remote.join(homeserver, room, "carol")
    wait_until_received(remote, [*by_one[alice], *by_both[alice]])
    time.sleep(QUIET_S)
    for user in (alice, bob):
        copies = [sum(receipts(remote, events[user]).values()) for events in (by_one, by_both)]
        assert copies[1] <= 1.1 * copies[0], user
