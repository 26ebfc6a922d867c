"""A server floods a room: it gets what its rate allows, and nobody else pays for it."""

import statistics
import time

import pytest

from harness.client import Client, JsonDict
from harness.homeserver import Homeserver
from harness.remote import RemoteServer
from harness.wait import eventually
from tests.support import (
    MakeHomeserver,
    follow_until_seen,
    is_recorded,
    quiet_token,
    send_sticky,
    sticky,
)

pytestmark = pytest.mark.slow


# A tenth of the default, so that a server of the tests can be above it for a while.
RATE = {"remote_rate_limit": {"per_second": 1.5, "burst_count": 10}}
FLOOD = 60
PROBES = 10
NO_TIMELINE: JsonDict = {"room": {"timeline": {"types": []}}}


def test_others_do_not_pay(make_homeserver: MakeHomeserver, remote: RemoteServer) -> None:
    # A2: what is sent meanwhile is as fast as before, and all of the flood follows, in order
    homeserver = make_homeserver(federation=True, module_config=RATE)
    homeserver.start()
    alice, bob = homeserver.register(), homeserver.register()
    room, flooded = (alice.create_room(preset="public_chat") for _ in range(2))
    for client_room in (room, flooded):
        bob.join(client_room)
    carol = remote.join(homeserver, flooded, "carol")
    since = quiet_token(bob)
    sent = [remote.send_event(flooded, carol, **sticky()).event_id for _ in range(FLOOD)]
    eventually(lambda: is_recorded(homeserver, sent[-1]), 60, "all recorded")
    assert _held(homeserver) > 5
    during = _latencies(alice, bob, room)
    assert _held(homeserver) > 0, "the flood was over before others were measured"
    followed = follow_until_seen(
        bob, flooded, sent, since, afterwards=0, filter=NO_TIMELINE, timeout_s=60
    )
    assert followed.sticky(flooded) == sent
    assert _held(homeserver) == 0
    assert statistics.median(during) <= 3 * statistics.median(_latencies(alice, bob, room))


def _latencies(sender: Client, reader: Client, room: str) -> list[float]:
    """How long sticky events take from the send to the answer of a sync, in seconds."""
    since = quiet_token(reader)
    found = []
    for _ in range(PROBES):
        began = time.monotonic()
        sent = send_sticky(sender, room)
        followed = follow_until_seen(reader, room, sent, since, afterwards=0)
        found.append(time.monotonic() - began)
        since = followed.next_batch or since
    return found


def _held(homeserver: Homeserver) -> int:
    ((count,),) = homeserver.query(
        "SELECT COUNT(*) FROM synapse_sticky_held WHERE reason = 'over_rate'"
    )
    return int(count)
