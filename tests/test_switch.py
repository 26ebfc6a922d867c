"""Sticky events are switched off and on again in a room, by its admins."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from harness.client import Client, JsonDict, MatrixError
from harness.homeserver import Homeserver
from harness.remote import RemoteServer
from harness.wait import eventually
from tests.sliding import Connection, no_window
from tests.support import (
    NO_TIMELINE,
    SETTINGS,
    MakeHomeserver,
    follow,
    ids,
    is_recorded,
    now_ms,
    quiet_token,
    reasons,
    sabotage,
    section_ids,
    send_plain,
    send_sticky,
    sticky,
    sticky_in,
    switch,
    until_refused,
    wait_for_readers,
)

# One process is there with SQLite, and PostgreSQL with the workers.
pytestmark = pytest.mark.repeats("postgres")

LEVELS = "m.room.power_levels"
REMAINING = "msc4354_sticky_duration_ttl_ms"


def shows_remaining(reader: Client, room: str, event_id: str) -> bool:
    """Whether an event says how long it is sticky."""
    return REMAINING in reader.event(room, event_id).get("unsigned", {})


def make_admin(admin: Client, room: str, user_id: str) -> None:
    """Give a user the power to switch."""
    (levels,) = [e["content"] for e in admin.state(room) if e["type"] == LEVELS]
    admin.send_state(room, LEVELS, {**levels, "users": {**levels["users"], user_id: 100}})


def test_off_and_on_again(homeserver: Homeserver, alice: Client, bob: Client, room: str) -> None:
    # A1, A4: what is there becomes ordinary, and is delivered again to whoever comes then
    since = quiet_token(bob)
    sent = send_sticky(alice, room, 3)
    wait_for_readers(bob, room, sent[-1])
    followed = follow(bob, since, until=lambda f: set(sent) <= set(f.seen(room)))
    switch(alice, room, {"enabled": False})
    for url in homeserver.client_urls:
        reader = bob.via(url)
        eventually(lambda r=reader: section_ids(r, room) == [], 30, "nothing")  # type: ignore[misc]
        assert not any(shows_remaining(reader, room, event_id) for event_id in sent)
        assert Connection(reader, {"all": no_window()}).ask().sticky(room) == []
    assert [reasons(homeserver, event_id) for event_id in sent] == [["switched_off"]] * 3
    switch(alice, room, {"enabled": True})
    for url in homeserver.client_urls:
        reader = bob.via(url)
        eventually(lambda r=reader: section_ids(r, room) == sent, 30, "all")  # type: ignore[misc]
        assert all(shows_remaining(reader, room, event_id) for event_id in sent)
    assert [reasons(homeserver, event_id) for event_id in sent] == [[]] * 3
    # Who had them has them again: meanwhile they were not sticky.
    again = follow(bob, followed.next_batch, until=lambda f: set(sent) <= set(f.sticky(room)))
    assert again.sticky(room) == sent


def test_sent_while_off(
    homeserver: Homeserver, alice: Client, bob: Client, remote: RemoteServer, room: str
) -> None:
    # A4: another server's event is an ordinary one, until the room is switched on
    carol = remote.join(homeserver, room, "carol")
    switch(alice, room, {"enabled": False})
    since = quiet_token(bob)
    event = remote.send_event(room, carol, **sticky())
    eventually(lambda: reasons(homeserver, event.event_id) == ["switched_off"], 30, "held")
    followed = follow(bob, since, until=lambda f: event.event_id in f.timeline(room))
    assert followed.sticky(room) == []
    switch(alice, room, {})
    eventually(lambda: section_ids(bob, room) == [event.event_id], 30, "delivered")


@pytest.mark.parametrize("content", [{"enabled": "no"}, {"enabled": 0}, {"enabled": None}, {}])
@pytest.mark.repeats("workers")
def test_settings_that_make_no_sense(
    homeserver: Homeserver,
    alice: Client,
    bob: Client,
    remote: RemoteServer,
    room: str,
    content: JsonDict,
) -> None:
    # A4: of a remote admin; they count as none
    make_admin(alice, room, remote.user_id("carol"))
    carol = remote.join(homeserver, room, "carol")
    remote.send_event(room, carol, {"enabled": False}, SETTINGS, state_key="")
    sent = remote.send_event(room, carol, **sticky()).event_id
    eventually(lambda: reasons(homeserver, sent) == ["switched_off"], 30, "held")
    remote.send_event(room, carol, content, SETTINGS, state_key="")
    eventually(lambda: section_ids(bob, room) == [sent], 30, "delivered")


@pytest.mark.repeats("workers")
def test_redacted_settings(homeserver: Homeserver, alice: Client, bob: Client, room: str) -> None:
    # A4: that changes no state, only what it says
    (sent,) = send_sticky(alice, room)
    settings = switch(alice, room, {"enabled": False})
    eventually(lambda: reasons(homeserver, sent) == ["switched_off"], 30, "held")
    alice.redact(room, settings)
    eventually(lambda: section_ids(bob, room) == [sent], 30, "delivered")


def settings_in(reader: Client, room: str) -> list[JsonDict]:
    """The settings in a room's current state."""
    return [event["content"] for event in reader.state(room) if event["type"] == SETTINGS]


@pytest.mark.repeats("workers")
def test_a_state_reset_that_brings_older_settings_back(
    homeserver: Homeserver, alice: Client, bob: Client, remote: RemoteServer
) -> None:
    # A4: nobody sends settings then, and the current state is others all the same
    room = alice.create_room(preset="public_chat", room_version="10")
    bob.join(room)
    carol = remote.join(homeserver, room, "carol")
    make_admin(alice, room, carol)
    levels = remote.wait_for(lambda event: event.type == LEVELS and carol in event.content["users"])
    # Dated later than what follows: of two branches, this one has the last word.
    old = remote.send_event(
        room,
        carol,
        {"enabled": False},
        SETTINGS,
        state_key="",
        prev_events=[levels],
        origin_server_ts=now_ms() + 60_000,
    )
    eventually(lambda: settings_in(alice, room) == [{"enabled": False}], 30, "off")
    switch(alice, room, {"enabled": True})
    (mine,) = send_sticky(alice, room)
    # So that carol goes on from there.
    remote.wait_for(mine)
    theirs = remote.send_event(room, carol, **sticky()).event_id
    eventually(lambda: section_ids(bob, room) == [mine, theirs], 30, "delivered")

    branch = remote.send_event(room, carol, prev_events=[old])
    eventually(lambda: settings_in(alice, room) == [{"enabled": False}], 30, "the reset")
    eventually(lambda: section_ids(bob, room) == [], 30, "nothing")
    assert [reasons(homeserver, event_id) for event_id in (mine, theirs)] == [["switched_off"]] * 2
    until_refused(homeserver, alice, room)
    for url in homeserver.client_urls:
        with pytest.raises(MatrixError, match="admins of this room") as caught:
            send_sticky(alice.via(url), room)
        assert caught.value.status == 403
    later = remote.send_event(room, carol, prev_events=[branch], **sticky()).event_id
    eventually(lambda: reasons(homeserver, later) == ["switched_off"], 30, "held")
    switch(alice, room, {"enabled": True})
    eventually(lambda: section_ids(bob, room) == [mine, theirs, later], 30, "all")


@pytest.mark.repeats("workers")
def test_settings_that_come_during_a_join(
    homeserver: Homeserver, alice: Client, remote: RemoteServer
) -> None:
    # A4: the server has the state of before them, and is sent them before it is in the room
    room = remote.create_room("carol")
    carol = remote.user_id("carol")
    remote.lets_in.clear()
    with ThreadPoolExecutor() as pool:
        joined = pool.submit(alice.join, room, via=[remote.server_name])
        eventually(lambda: any("/send_join/" in path for _, path in remote.requests), 30, "a join")
        settings = remote.create_event(room, SETTINGS, {"enabled": False}, carol, "")
        remote.send(settings, homeserver.server_name)
        remote.lets_in.set()
        joined.result(30)
    assert settings_in(alice, room) == []
    sent = remote.send_event(room, carol, **sticky()).event_id
    eventually(lambda: reasons(homeserver, sent) == ["switched_off"], 30, "held")
    eventually(lambda: settings_in(alice, room) == [{"enabled": False}], 30, "the settings")
    until_refused(homeserver, alice, room)
    with pytest.raises(MatrixError, match="admins of this room"):
        send_sticky(alice, room)
    remote.send_event(room, carol, {}, SETTINGS, state_key="")
    eventually(lambda: section_ids(alice, room) == [sent], 30, "delivered")


def test_settings_that_come_during_a_faster_join(
    homeserver: Homeserver, alice: Client, remote: RemoteServer
) -> None:
    # A4: while the members of the room are not known yet, and afterwards
    room = remote.create_room("carol")
    carol = remote.user_id("carol")
    remote.omits_members = True
    remote.tells_state.clear()
    alice.join(room, via=[remote.server_name])
    try:
        sent = [remote.send_event(room, carol, **sticky()).event_id]
        # Until then others are not shown the room.
        lazily = {"room": {**NO_TIMELINE["room"], "state": {"lazy_load_members": True}}}

        def section(reader: Client) -> list[str]:
            return ids(sticky_in(reader.sync(filter=lazily), room))

        eventually(lambda: section(alice) == sent, 30, "delivered")
        remote.send_event(room, carol, {"enabled": False}, SETTINGS, state_key="")
        eventually(lambda: reasons(homeserver, sent[0]) == ["switched_off"], 30, "held")
        sent.append(remote.send_event(room, carol, **sticky()).event_id)
        eventually(lambda: reasons(homeserver, sent[1]) == ["switched_off"], 30, "held")
        until_refused(homeserver, alice, room)
        with pytest.raises(MatrixError, match="admins of this room"):
            send_sticky(alice, room)
        for url in homeserver.client_urls:
            eventually(lambda u=url: section(alice.via(u)) == [], 30, f"held at {url}")  # type: ignore[misc]
        assert is_joining(homeserver, room)
    finally:
        remote.tells_state.set()
    eventually(lambda: not is_joining(homeserver, room), 30, "the end of the join")
    assert [reasons(homeserver, event_id) for event_id in sent] == [["switched_off"]] * 2
    remote.send_event(room, carol, {"enabled": True}, SETTINGS, state_key="")
    eventually(lambda: section_ids(alice, room) == sent, 30, "delivered")


def is_joining(homeserver: Homeserver, room: str) -> bool:
    """Whether a faster join is under way, so that only a part of the state is known."""
    return bool(homeserver.query("SELECT 1 FROM partial_state_rooms WHERE room_id = ?", room))


def test_default_for_private_rooms(make_homeserver: MakeHomeserver, remote: RemoteServer) -> None:
    # A4: by the join rule of now
    homeserver = make_homeserver(
        federation=True, module_config={"enabled_by_default": "private_rooms"}
    )
    homeserver.start()
    alice, bob = homeserver.register(), homeserver.register()
    room = alice.create_room(preset="public_chat")
    bob.join(room)
    carol = remote.join(homeserver, room, "carol")
    event = remote.send_event(room, carol, **sticky())
    eventually(lambda: reasons(homeserver, event.event_id) == ["switched_off"], 30, "held")
    alice.send_state(room, "m.room.join_rules", {"join_rule": "invite"})
    eventually(lambda: section_ids(bob, room) == [event.event_id], 30, "delivered")
    alice.send_state(room, "m.room.join_rules", {"join_rule": "public"})
    eventually(lambda: section_ids(bob, room) == [], 30, "held again")
    switch(alice, room, {"enabled": True})
    eventually(lambda: section_ids(bob, room) == [event.event_id], 30, "delivered")


def test_after_a_restart_another_default_counts(make_homeserver: MakeHomeserver) -> None:
    # A1, A4: what was delivered is held, and comes again
    homeserver = make_homeserver()
    homeserver.start()
    alice = homeserver.register()
    room, other = alice.create_room(), alice.create_room()
    switch(alice, other, {"enabled": True})
    sent, kept = send_sticky(alice, room, 2), send_sticky(alice, other, 2)
    eventually(lambda: section_ids(alice, room) == sent, 30, "delivered")
    since = alice.sync()["next_batch"]
    homeserver.stop()
    homeserver.reconfigure(module_config={"enabled_by_default": "none"})
    homeserver.start()
    eventually(lambda: section_ids(alice, room) == [], 30, "held")
    eventually(lambda: section_ids(alice, other) == kept, 30, "the other room")
    homeserver.stop()
    homeserver.reconfigure(module_config={"enabled_by_default": "all"})
    homeserver.start()
    eventually(lambda: section_ids(alice, room) == sent, 30, "delivered")
    assert ids(sticky_in(alice.sync(since), room)) == sent


def test_visibility_is_not_lifted_while_off(
    homeserver: Homeserver, alice: Client, room: str
) -> None:
    # A4
    hidden = alice.create_room(preset="public_chat")
    alice.send_state(hidden, "m.room.history_visibility", {"history_visibility": "joined"})
    (sent,) = send_sticky(alice, hidden)
    send_plain(alice, hidden, 2)
    dora = homeserver.register()
    dora.join(hidden)
    for url in homeserver.client_urls:
        eventually(lambda u=url: section_ids(dora.via(u), hidden) == [sent], 30, "lifted")  # type: ignore[misc]
        assert dora.via(url).event(hidden, sent)
    switch(alice, hidden, {"enabled": False})
    for url in homeserver.client_urls:
        eventually(lambda u=url: section_ids(dora.via(u), hidden) == [], 30, "held")  # type: ignore[misc]
        with pytest.raises(MatrixError, match="M_NOT_FOUND"):
            dora.via(url).event(hidden, sent)


def test_redacted_settings_of_a_room_that_was_forgotten(make_homeserver: MakeHomeserver) -> None:
    # A4: processes remember the state of so many rooms only
    homeserver = make_homeserver()
    sabotage(homeserver, "FewRoomsRemembered")
    homeserver.start()
    alice = homeserver.register()
    room, other = alice.create_room(), alice.create_room()
    sent = send_sticky(alice, room)
    settings = switch(alice, room, {"enabled": False})
    eventually(lambda: reasons(homeserver, sent[0]) == ["switched_off"], 30, "held")
    (elsewhere,) = send_sticky(alice, other)
    eventually(lambda: is_recorded(homeserver, elsewhere), 30, "another room")
    alice.redact(room, settings)
    eventually(lambda: section_ids(alice, room) == sent, 30, "delivered")
