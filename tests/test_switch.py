"""Sticky events are switched off and on again in a room, by its admins."""

import pytest

from harness.client import Client, JsonDict, MatrixError
from harness.homeserver import Homeserver
from harness.remote import RemoteServer
from harness.wait import eventually
from tests.sliding import Connection, no_window
from tests.support import (
    SETTINGS,
    MakeHomeserver,
    follow,
    ids,
    is_recorded,
    quiet_token,
    reasons,
    sabotage,
    section_ids,
    send_plain,
    send_sticky,
    sticky,
    sticky_in,
    switch,
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
        eventually(lambda r=reader: section_ids(r, room) == [], 10, "nothing")  # type: ignore[misc]
        assert not any(shows_remaining(reader, room, event_id) for event_id in sent)
        assert Connection(reader, {"all": no_window()}).ask().sticky(room) == []
    assert [reasons(homeserver, event_id) for event_id in sent] == [["switched_off"]] * 3
    switch(alice, room, {"enabled": True})
    for url in homeserver.client_urls:
        reader = bob.via(url)
        eventually(lambda r=reader: section_ids(r, room) == sent, 10, "all")  # type: ignore[misc]
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
    eventually(lambda: reasons(homeserver, event.event_id) == ["switched_off"], 10, "held")
    followed = follow(bob, since, until=lambda f: event.event_id in f.timeline(room))
    assert followed.sticky(room) == []
    switch(alice, room, {})
    eventually(lambda: section_ids(bob, room) == [event.event_id], 10, "delivered")


@pytest.mark.parametrize("content", [{"enabled": "no"}, {"enabled": 0}, {"enabled": None}, {}])
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
    eventually(lambda: reasons(homeserver, sent) == ["switched_off"], 10, "held")
    remote.send_event(room, carol, content, SETTINGS, state_key="")
    eventually(lambda: section_ids(bob, room) == [sent], 10, "delivered")


def test_redacted_settings(homeserver: Homeserver, alice: Client, bob: Client, room: str) -> None:
    # A4: that changes no state, only what it says
    (sent,) = send_sticky(alice, room)
    settings = switch(alice, room, {"enabled": False})
    eventually(lambda: reasons(homeserver, sent) == ["switched_off"], 10, "held")
    alice.redact(room, settings)
    eventually(lambda: section_ids(bob, room) == [sent], 10, "delivered")


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
    eventually(lambda: reasons(homeserver, event.event_id) == ["switched_off"], 10, "held")
    alice.send_state(room, "m.room.join_rules", {"join_rule": "invite"})
    eventually(lambda: section_ids(bob, room) == [event.event_id], 10, "delivered")
    alice.send_state(room, "m.room.join_rules", {"join_rule": "public"})
    eventually(lambda: section_ids(bob, room) == [], 10, "held again")
    switch(alice, room, {"enabled": True})
    eventually(lambda: section_ids(bob, room) == [event.event_id], 10, "delivered")


def test_after_a_restart_another_default_counts(make_homeserver: MakeHomeserver) -> None:
    # A1, A4: what was delivered is held, and comes again
    homeserver = make_homeserver()
    homeserver.start()
    alice = homeserver.register()
    room, other = alice.create_room(), alice.create_room()
    switch(alice, other, {"enabled": True})
    sent, kept = send_sticky(alice, room, 2), send_sticky(alice, other, 2)
    wait_for_readers(alice, room, sent[-1])
    since = alice.sync()["next_batch"]
    homeserver.stop()
    homeserver.reconfigure(module_config={"enabled_by_default": "none"})
    homeserver.start()
    eventually(lambda: section_ids(alice, room) == [], 10, "held")
    assert section_ids(alice, other) == kept
    homeserver.stop()
    homeserver.reconfigure(module_config={"enabled_by_default": "all"})
    homeserver.start()
    eventually(lambda: section_ids(alice, room) == sent, 10, "delivered")
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
    eventually(lambda: section_ids(dora, hidden) == [sent], 10, "lifted")
    assert dora.event(hidden, sent)
    switch(alice, hidden, {"enabled": False})
    for url in homeserver.client_urls:
        eventually(lambda u=url: section_ids(dora.via(u), hidden) == [], 10, "held")  # type: ignore[misc]
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
    eventually(lambda: reasons(homeserver, sent[0]) == ["switched_off"], 10, "held")
    (elsewhere,) = send_sticky(alice, other)
    eventually(lambda: is_recorded(homeserver, elsewhere), 10, "another room")
    alice.redact(room, settings)
    eventually(lambda: section_ids(alice, room) == sent, 10, "delivered")
