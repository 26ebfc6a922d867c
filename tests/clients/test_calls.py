"""MatrixRTC calls with sticky memberships, as matrix-js-sdk's session makes and sees them.

There is no media: the session is about who takes part, and sends keys for media if it is told to.
"""

import time

import pytest

from harness.client import Client
from harness.homeserver import Homeserver
from harness.wait import eventually
from tests.clients.device import OpenDevice
from tests.federation import create_room, join_via
from tests.support import send_plain

MEMBERSHIP = "org.matrix.msc4143.rtc.member"
# How long a device that fell silent takes part, and how often one says that it is there.
LEAVE_DELAY_S = 6
CONFIG = {"delayedLeaveEventDelayMs": LEAVE_DELAY_S * 1000, "delayedLeaveEventRestartMs": 1500}
# For a delayed event to be sent and to arrive, on a busy machine.
LEEWAY_S = 20


@pytest.fixture(params=["one server", "two servers", "a late server"])
def homes(request: pytest.FixtureRequest, homeserver: Homeserver) -> list[Homeserver]:
    """The servers of the first, of the second, and of the late participant."""
    if request.param == "one server":
        return [homeserver] * 3
    other: Homeserver = request.getfixturevalue("other_deployment")
    # The second participant's server is in the room before the call, or joins it with the late one.
    return [homeserver, other if request.param == "two servers" else homeserver, other]


def test_a_call(homes: list[Homeserver], open_device: OpenDevice, sliding: bool) -> None:
    """Two join, a late one sees both, one crashes, and one hangs up."""
    # S2, C1, C5, F1, F2, X4
    alice, bob, carol = (home.register() for home in homes)
    room = create_room(alice, power_level_content_override={"events_default": 0})
    join_via(bob, room, homes[0])
    first, second = (open_device(user, sliding=sliding) for user in (alice, bob))
    for device in (first, second):
        device.wait_until_in_room(room, alice.user_id, bob.user_id)

    first.ask("join_call", room_id=room, config=CONFIG)
    for device in (first, second):
        device.wait_for_participants(room, alice.user_id)
    second.ask("join_call", room_id=room, config=CONFIG)
    for device in (first, second):
        device.wait_for_participants(room, alice.user_id, bob.user_id)

    send_plain(alice, room, 5)
    late = open_device(carol, sliding=sliding, timeline_limit=1)
    late.ask("join", room_id=room, via=[homes[0].server_name])
    late.wait_for_participants(room, alice.user_id, bob.user_id, timeout_s=60)
    assert {event["type"] for event in late.sticky(room).values()} == {MEMBERSHIP}

    # They stay for as long as they say that they are there.
    silent_until_s = time.monotonic() + 1.5 * LEAVE_DELAY_S
    while time.monotonic() < silent_until_s:
        for device in (first, second, late):
            assert device.participants(room) == sorted([alice.user_id, bob.user_id])
        time.sleep(0.5)

    first.crash()
    crashed_s = time.monotonic()
    assert late.participants(room) == sorted([alice.user_id, bob.user_id])
    for device in (second, late):
        device.wait_for_participants(room, bob.user_id, timeout_s=LEAVE_DELAY_S + LEEWAY_S)
    # The last time that it said it was there may be a while before the crash.
    assert time.monotonic() - crashed_s > LEAVE_DELAY_S - 1.5 - 1

    second.ask("leave_call", room_id=room)
    for device in (second, late):
        device.wait_for_participants(room)


def test_keys_for_media(
    alice: Client, bob: Client, encrypted_room: str, open_device: OpenDevice
) -> None:
    """The session hands its keys to those whom the sticky memberships name, encrypted."""
    room = encrypted_room
    devices = [open_device(user, encrypted=True) for user in (alice, bob)]
    for device in devices:
        device.wait_until_keys_known(room, *devices)
    for device in devices:
        device.ask("join_call", room_id=room, config={**CONFIG, "manageMediaKeys": True})
    both = sorted([alice.user_id, bob.user_id])
    for device in devices:
        device.wait_for_participants(room, *both)
        eventually(
            lambda device=device: sorted(device.ask("media_keys", room_id=room)) == both,  # type: ignore[misc]
            what=f"the keys that {device.user_id} has",
        )
    (sticky, *_) = devices[0].sticky(room).values()
    assert sticky["encrypted"]
