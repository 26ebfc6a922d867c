"""A server floods a room: it gets what its rate allows, and nobody else pays for it."""

import os
import statistics
import time
from pathlib import Path

import pytest

from harness.client import Client, JsonDict
from harness.homeserver import Homeserver
from harness.remote import RemoteServer
from harness.wait import eventually
from tests.support import (
    MakeHomeserver,
    follow_until_seen,
    is_recorded,
    is_stored,
    quiet_token,
    send_sticky,
    sticky,
)

pytestmark = [pytest.mark.slow, pytest.mark.any_synapse]


# A tenth of the default, so that a server of the tests can be above it for a while.
RATE = {"remote_rate_limit": {"per_second": 1.5, "burst_count": 10}}
# A thousandth.
SLOW = {"remote_rate_limit": {"per_second": 0.02, "burst_count": 1}}
FLOOD = 60
PARTS, PART = 4, 25
TYPE = "m.room.message"
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
    # Before and after: what else the machine does may change meanwhile.
    quiet = [_usual(_latencies(alice, bob, room))]
    since = quiet_token(bob)
    sent = []
    for _ in range(2):
        events = []
        for _ in range(FLOOD // 2):
            events.append(remote.create_event(flooded, TYPE, {"body": "flood"}, carol, **sticky()))
            remote.remember(events[-1])
        remote.send(events)
        sent += [event.event_id for event in events]
    eventually(lambda: is_recorded(homeserver, sent[-1]), 60, "all recorded")
    assert _held(homeserver) > 5
    during = _latencies(alice, bob, room)
    assert _held(homeserver) > 0, "the flood was over before others were measured"
    followed = follow_until_seen(
        bob, flooded, sent, since, afterwards=0, filter=NO_TIMELINE, timeout_s=60
    )
    assert followed.sticky(flooded) == sent
    assert _held(homeserver) == 0
    quiet.append(_usual(_latencies(alice, bob, room)))
    assert _usual(during) <= 3 * max(quiet)


def test_a_flood_costs_little_more_than_one_of_plain_events(
    make_homeserver: MakeHomeserver, remote: RemoteServer
) -> None:
    # A2: others pay for what the processors do. Most of the flood is held.
    homeserver = make_homeserver(federation=True, module_config=SLOW)
    homeserver.start()
    room = homeserver.register().create_room(preset="public_chat")
    carol = remote.join(homeserver, room, "carol")
    spent: dict[bool, float] = {False: 0, True: 0}
    for number in range(-1, PARTS):
        for is_sticky in (False, True):
            before = _cpu_s(homeserver)
            keys = sticky() if is_sticky else {}
            sent = []
            for _ in range(PART):
                event = remote.create_event(room, TYPE, {"body": "flood"}, carol, **keys)
                remote.remember(event)
                sent.append(event)
            remote.send(sent)
            eventually(lambda last=sent[-1]: is_stored(homeserver, last), 60, "all stored")  # type: ignore[misc]
            if is_sticky:
                eventually(
                    lambda last=sent[-1]: is_recorded(homeserver, last.event_id),  # type: ignore[misc]
                    60,
                    "all recorded",
                )
            # The first part warms up.
            if number >= 0:
                spent[is_sticky] += _cpu_s(homeserver) - before
    assert _held(homeserver) > PARTS * PART / 2
    assert spent[True] <= 1.3 * spent[False], spent


def _cpu_s(homeserver: Homeserver) -> float:
    """The CPU time that a homeserver of one process has used, in seconds."""
    # After the name of the program, which may have spaces in it.
    fields = Path(f"/proc/{homeserver.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


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


def _usual(latencies: list[float]) -> float:
    """The lower quartile: what else the machine does now and then makes none of them shorter."""
    return statistics.quantiles(latencies, n=4)[0]


def _held(homeserver: Homeserver) -> int:
    ((count,),) = homeserver.query(
        "SELECT COUNT(*) FROM synapse_sticky_held WHERE reason = 'over_rate'"
    )
    return int(count)
