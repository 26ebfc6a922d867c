"""Calls in Element Call's mode `matrix_2_0`, whose memberships are sticky events.

There is no media server: Element Call shows who takes part, and waits for the media.
"""

import time

import pytest
from playwright.sync_api import expect

from harness.client import Client, JsonDict
from harness.homeserver import Homeserver
from harness.wait import eventually
from tests.element_call.call import OpenCall
from tests.element_call.site import LEAVE_DELAY_S, RESTART_S, Site
from tests.federation import create_room, join_via
from tests.support import HOUR_MS, MakeHomeserver, remaining_ms, send_plain, sticky_in, switch

MEMBERSHIP = "org.matrix.msc4143.rtc.member"
DELAYED_EVENTS = "/_matrix/client/unstable/org.matrix.msc4140/delayed_events"
CAPABILITIES = {
    "org.matrix.msc4157.send.delayed_event",
    "org.matrix.msc4157.update_delayed_event",
    "org.matrix.msc4407.send.sticky_event",
    "org.matrix.msc4407.receive.sticky_event",
    "org.matrix.msc4515.rtc_transports",
}
# For a delayed event to be sent and to arrive, on a busy machine.
LEEWAY_S = 20


def section(user: Client, room: str) -> list[JsonDict]:
    """What is sticky in a room and not in the last event of its timeline, to a plain client."""
    return sticky_in(user.sync(filter={"room": {"timeline": {"limit": 1}}}), room)


def test_the_membership_is_sticky(
    alice: Client, bob: Client, room: str, open_call: OpenCall, site: Site
) -> None:
    """Somebody with a plain client finds it behind the timeline; the leave is scheduled."""
    # S1, S2, C1, E3
    call = open_call(alice, room)
    call.wait_for_participants(alice)
    noted = call.noted
    assert set(noted["capabilities"]) >= CAPABILITIES
    assert "io.element.join" in noted["actions"]
    assert site.token_requests[-1]["member"]["claimed_user_id"] == alice.user_id

    send_plain(alice, room, 5)
    (membership,) = section(bob, room)
    assert (membership["type"], membership["sender"]) == (MEMBERSHIP, alice.user_id)
    assert membership["msc4354_sticky"] == {"duration_ms": HOUR_MS}
    remaining = remaining_ms(membership)
    assert remaining is not None
    assert HOUR_MS - 60_000 < remaining < HOUR_MS
    content = membership["content"]
    assert content["slot_id"] == "m.call#ROOM"
    assert content["member"]["device_id"] == alice.device_id

    (leave,) = alice.request("GET", DELAYED_EVENTS)["delayed_events"]
    assert (leave["type"], leave["delay"]) == (MEMBERSHIP, LEAVE_DELAY_S * 1000)
    assert leave["content"] == {"msc4354_sticky_key": content["msc4354_sticky_key"]}


@pytest.fixture(params=["one server", "two servers", "a late server"])
def homes(request: pytest.FixtureRequest, homeserver: Homeserver) -> tuple[Homeserver, bool]:
    """The server of the second participant, and whether it joins the room during the call."""
    if request.param == "one server":
        return homeserver, False
    return request.getfixturevalue("other_deployment"), request.param == "a late server"


def test_a_call_of_two(
    alice: Client, homes: tuple[Homeserver, bool], homeserver: Homeserver, open_call: OpenCall
) -> None:
    """Each is shown to the other; one crashes, comes back, and hangs up."""
    # S2, C1, C5, F1, F2
    home, late = homes
    bob = home.register()
    room = create_room(alice)
    if not late:
        join_via(bob, room, homeserver)
    first = open_call(alice, room)
    first.wait_for_participants(alice)
    # Behind the timeline: Bob's client finds it in the sticky section only.
    send_plain(alice, room, 5)
    if late:
        join_via(bob, room, homeserver)
    (membership,) = eventually(lambda: section(bob, room), what="the membership at Bob's server")
    second = open_call(bob, room, timeline_limit=1)
    for call in (first, second):
        call.wait_for_participants(alice, bob)
    assert second.noted["sticky_at_start"] == [membership["event_id"]]

    # They are shown for as long as they say that they are there.
    first.pause(1.5 * LEAVE_DELAY_S)
    for call in (first, second):
        call.wait_for_participants(alice, bob, timeout_s=0.1)

    second.crash()
    crashed_s = time.monotonic()
    first.wait_for_participants(alice, bob, timeout_s=0.1)
    first.wait_for_participants(alice, timeout_s=LEAVE_DELAY_S + LEEWAY_S)
    # The last time that it said it was there may be a while before the crash.
    assert time.monotonic() - crashed_s > LEAVE_DELAY_S - RESTART_S - 1

    again = open_call(bob, room, timeline_limit=1)
    for call in (first, again):
        call.wait_for_participants(alice, bob)
    again.hang_up()
    # Long before its delayed leave would be sent.
    first.wait_for_participants(alice, timeout_s=LEAVE_DELAY_S - RESTART_S)


def test_an_encrypted_call(
    alice: Client, bob: Client, encrypted_room: str, open_call: OpenCall
) -> None:
    """The memberships are encrypted, and the keys for media go to those whom they name."""
    # C7
    room = encrypted_room
    users = (alice, bob)
    calls = [open_call(user, room, encrypted=True, join=False) for user in users]
    for user in users:
        eventually(lambda user=user: has_keys(user), what=f"the keys of {user.user_id}")  # type: ignore[misc]
    for call in calls:
        call.join()
    for call in calls:
        call.wait_for_participants(*users)
    send_plain(alice, room, 5)
    found = section(alice, room)
    assert {event["sender"] for event in found} == {user.user_id for user in users}
    assert {event["type"] for event in found} == {"m.room.encrypted"}
    for call, other in zip(calls, reversed(users), strict=True):
        eventually(
            lambda call=call, other=other: other.user_id in call.noted["keys_from"],  # type: ignore[misc]
            what=f"the keys for media of {other.user_id}",
        )

    # The delayed leave is not encrypted, and ends the membership that is.
    calls[1].crash()
    calls[0].wait_for_participants(alice, timeout_s=LEAVE_DELAY_S + LEEWAY_S)


def has_keys(user: Client) -> bool:
    """Whether others can encrypt for a user's device."""
    body: JsonDict = {"device_keys": {user.user_id: []}}
    answer = user.request("POST", "/_matrix/client/v3/keys/query", json=body)
    return user.device_id in answer["device_keys"][user.user_id]


def test_all_that_an_admin_has_to_switch_on(
    make_homeserver: MakeHomeserver, open_call: OpenCall, site: Site
) -> None:
    """With these settings Synapse's own are enough, its limits too."""
    service = {"type": "livekit", "livekit_service_url": site.other_service}
    homeserver = make_homeserver(
        as_shipped=True,
        federation=True,
        extra_config={
            "max_event_delay_duration": "1h",
            "experimental_features": {"msc4143_enabled": True},
            "matrix_rtc": {"transports": [service]},
            # Another host, as shipped.
            "trusted_key_servers": [],
            # Only slow, as shipped.
            "background_updates": {"sleep_enabled": False},
        },
    )
    homeserver.start()
    alice = homeserver.register()
    room = create_room(alice)
    call = open_call(alice, room)
    call.wait_for_participants(alice)
    send_plain(alice, room, 2)
    (membership,) = section(alice, room)
    assert membership["content"]["transports"]["published"] == [service]
    call.pause(2 * LEAVE_DELAY_S)
    call.wait_for_participants(alice, timeout_s=0.1)
    (leave,) = alice.request("GET", DELAYED_EVENTS)["delayed_events"]
    assert leave["type"] == MEMBERSHIP


def test_without_a_media_server(alice: Client, bob: Client, room: str, open_call: OpenCall) -> None:
    """Element Call gives up after a while, and leaves the call."""
    first = open_call(alice, room)
    first.wait_for_participants(alice)
    second = open_call(bob, room, patient=False)
    first.wait_for_participants(alice, bob)
    expect(second.screen.get_by_text("Connection timeout")).to_be_visible()
    first.wait_for_participants(alice, timeout_s=LEAVE_DELAY_S - RESTART_S)


def test_without_the_module(make_homeserver: MakeHomeserver, open_call: OpenCall) -> None:
    """Element Call says that it lacks sticky events."""
    # S7
    homeserver = make_homeserver(module=False, federation=True)
    homeserver.start()
    alice = homeserver.register()
    call = open_call(alice, alice.create_room())
    message = "Homeserver does not support Matrix 2.0 calls"
    expect(call.screen.get_by_text(message)).to_be_visible()


def test_a_room_where_sticky_events_are_off(alice: Client, room: str, open_call: OpenCall) -> None:
    """Element Call does not say why it cannot join."""
    # A4
    switch(alice, room, {"enabled": False})
    call = open_call(alice, room)
    expect(call.screen.get_by_text("Connection lost")).to_be_visible()
    assert section(alice, room) == []
