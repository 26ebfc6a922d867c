"""Sticky events, as matrix-js-sdk sends and shows them."""

import time

import pytest

from harness.client import Client
from harness.wait import eventually
from tests.clients.device import DeviceError, OpenDevice
from tests.support import HOUR_MS, send_plain, switch

KEY = "msc4354_sticky_key"


def test_sent_and_seen(
    alice: Client, bob: Client, room: str, open_device: OpenDevice, sliding: bool
) -> None:
    # S1, E3, C2, X3
    sender, receiver = open_device(alice, sliding=sliding), open_device(bob, sliding=sliding)
    content = {"text": "here", KEY: "place"}
    event = sender.send(room, content, sticky_ms=HOUR_MS)
    sender.wait_until_sticky(room, event)
    receiver.wait_until_sticky(room, event)
    seen = receiver.sticky(room)[event]
    assert (seen["sender"], seen["content"]) == (alice.user_id, content)
    assert HOUR_MS - 60_000 < seen["remaining_ms"] <= HOUR_MS


def test_seen_behind_the_timeline_and_by_who_joins(
    alice: Client, bob: Client, room: str, open_device: OpenDevice, sliding: bool
) -> None:
    # C1, C5, X2, X4
    sender = open_device(alice)
    events = [
        sender.send(room, {KEY: "place"}, sticky_ms=HOUR_MS),
        sender.send(room, {"text": "without a key"}, sticky_ms=HOUR_MS),
    ]
    send_plain(alice, room, 5)
    receiver = open_device(bob, sliding=sliding, timeline_limit=1)
    receiver.wait_until_sticky(room, *events)
    timeline = {event["event_id"] for event in receiver.ask("timeline", room_id=room)}
    assert not timeline & set(events)

    carol = alice.homeserver.register()
    newcomer = open_device(carol, sliding=sliding, timeline_limit=1)
    newcomer.ask("join", room_id=room, via=[])
    newcomer.wait_until_sticky(room, *events)


def test_replaced(
    alice: Client, bob: Client, room: str, open_device: OpenDevice, sliding: bool
) -> None:
    # M1
    sender, receiver = open_device(alice, sliding=sliding), open_device(bob, sliding=sliding)
    # A client hears of changes to rooms that it knows.
    receiver.wait_until_in_room(room, alice.user_id)
    first = sender.send(room, {"text": "first", KEY: "place"}, sticky_ms=HOUR_MS)
    receiver.wait_until_sticky(room, first)
    other = sender.send(room, {"text": "other", KEY: "elsewhere"}, sticky_ms=HOUR_MS)
    second = sender.send(room, {"text": "second", KEY: "place"}, sticky_ms=HOUR_MS)
    receiver.wait_until_sticky(room, other, second)
    changes = receiver.ask("changes", room_id=room)
    assert [pair for change in changes for pair in change["updated"]] == [[first, second]]
    send_plain(alice, room, 5)
    late = open_device(bob.second_device(), sliding=sliding, timeline_limit=1)
    late.wait_until_sticky(room, other, second)


def test_expired(
    alice: Client, bob: Client, room: str, open_device: OpenDevice, sliding: bool
) -> None:
    # E1, E4
    sender, receiver = open_device(alice, sliding=sliding), open_device(bob, sliding=sliding)
    receiver.wait_until_in_room(room, alice.user_id)
    sent_s = time.monotonic()
    event = sender.send(room, {KEY: "place"}, sticky_ms=8_000)
    receiver.wait_until_sticky(room, event)
    receiver.wait_until_sticky(room, timeout_s=20)
    sender.wait_until_sticky(room, timeout_s=20)
    # Synapse may have made the event a little before.
    assert time.monotonic() - sent_s > 7.5
    changes = receiver.ask("changes", room_id=room)
    assert [change["removed"] for change in changes if change["removed"]] == [[event]]
    # It is in the timeline of who comes now, and not sticky.
    late = open_device(bob.second_device(), sliding=sliding)
    late.wait_until_in_room(room, alice.user_id)
    assert event in {found["event_id"] for found in late.ask("timeline", room_id=room)}
    assert late.sticky(room) == {}


def test_redacted(
    alice: Client, bob: Client, room: str, open_device: OpenDevice, sliding: bool
) -> None:
    # E5
    sender, receiver = open_device(alice, sliding=sliding), open_device(bob, sliding=sliding)
    receiver.wait_until_in_room(room, alice.user_id)
    kept = sender.send(room, {KEY: "kept"}, sticky_ms=HOUR_MS)
    event = sender.send(room, {KEY: "place"}, sticky_ms=HOUR_MS)
    receiver.wait_until_sticky(room, event, kept)
    sender.ask("redact", room_id=room, event_id=event)
    receiver.wait_until_sticky(room, kept)
    sender.wait_until_sticky(room, kept)


def test_delayed(
    alice: Client, bob: Client, room: str, open_device: OpenDevice, sliding: bool
) -> None:
    # S2
    sender, receiver = open_device(alice, sliding=sliding), open_device(bob, sliding=sliding)
    sent_s = time.monotonic()
    sender.send(room, {"text": "later", KEY: "place"}, sticky_ms=HOUR_MS, delay_ms=4_000)
    assert receiver.sticky(room) == {}
    ((event, seen),) = eventually(lambda: receiver.sticky(room).items(), what="the delayed event")
    assert time.monotonic() - sent_s > 3.5
    assert seen["content"] == {"text": "later", KEY: "place"}
    # By another device, which must be told that it is sticky.
    send_plain(alice, room, 5)
    late = open_device(bob.second_device(), sliding=sliding, timeline_limit=1)
    late.wait_until_sticky(room, event)


def test_encrypted(
    alice: Client, bob: Client, encrypted_room: str, open_device: OpenDevice, sliding: bool
) -> None:
    # C7, X1
    sender = open_device(alice, encrypted=True, sliding=sliding)
    receiver = open_device(bob, encrypted=True, sliding=sliding, timeline_limit=1)
    sender.wait_until_keys_known(encrypted_room, receiver)
    receiver.wait_until_in_room(encrypted_room, alice.user_id)
    content = {"text": "secret", KEY: "place"}
    live = sender.send(encrypted_room, content, sticky_ms=HOUR_MS)
    receiver.wait_until_sticky(encrypted_room, live)
    assert receiver.sticky(encrypted_room)[live]["content"] == content

    # Sent while the receiver is out of reach, and behind its timeline when it is back.
    receiver.ask("disconnect")
    missed = sender.send(encrypted_room, {"text": "missed", KEY: "other"}, sticky_ms=HOUR_MS)
    send_plain(alice, encrypted_room, 25)
    receiver.ask("connect")
    receiver.wait_until_sticky(encrypted_room, live, missed)
    timeline = {event["event_id"] for event in receiver.ask("timeline", room_id=encrypted_room)}
    assert missed not in timeline
    seen = receiver.sticky(encrypted_room)[missed]
    assert (seen["type"], seen["encrypted"]) == ("org.example.status", True)
    assert seen["content"] == {"text": "missed", KEY: "other"}
    # On the wire it says nothing.
    wire = bob.event(encrypted_room, missed)
    assert (wire["type"], KEY in wire["content"]) == ("m.room.encrypted", False)


def test_a_refusal_is_told(alice: Client, room: str, open_device: OpenDevice) -> None:
    # S3, A4
    sender = open_device(alice)
    with pytest.raises(DeviceError) as refused:
        sender.send(room, {}, sticky_ms=HOUR_MS + 1)
    assert refused.value.errcode == "M_INVALID_PARAM"
    switch(alice, room, {"enabled": False})
    with pytest.raises(DeviceError) as refused:
        sender.send(room, {}, sticky_ms=HOUR_MS)
    assert refused.value.errcode == "M_FORBIDDEN"
    assert sender.send(room, {})
