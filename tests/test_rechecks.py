"""Soft-failed sticky events that the room's state authorises later."""

import shutil
import time
from statistics import median
from types import ModuleType

import pytest

from harness.client import Client, JsonDict, MatrixError, quote
from harness.event_format import Event
from harness.homeserver import Homeserver
from harness.remote import RemoteServer
from harness.wait import eventually
from tests import checks, spam_checker
from tests.federation import wait_until_joined
from tests.sliding import (
    BEGINNING,
    Connection,
    drained,
    send_known,
    subscription,
    until_known,
)
from tests.support import (
    HOUR_MS,
    NO_TIMELINE,
    ROWS,
    MakeHomeserver,
    follow,
    is_stored,
    remaining_ms,
    section_ids,
    sticky,
    text,
    wait_for_readers,
)

pytestmark = pytest.mark.repeats("postgres")

SPECIAL = "org.example.special"


def start_room(homeserver: Homeserver, owner: Client, remote: RemoteServer) -> tuple[str, Event]:
    """A room with carol of the other server in it, and the last event before she is restricted."""
    room = owner.create_room(preset="public_chat", room_version="11")
    carol = remote.join(homeserver, room, "carol")
    before = remote.send_event(room, carol)
    eventually(lambda: is_stored(homeserver, before))
    return room, before


def is_held(homeserver: Homeserver, event: Event) -> bool:
    """Whether an event is recorded as soft-failed, and not deliverable."""
    return homeserver.query(ROWS, event.event_id) == [("soft_failed", None)]


def start_room_with_held_event(
    homeserver: Homeserver, owner: Client, remote: RemoteServer
) -> tuple[str, str, Event]:
    """A room, carol's user ID, and what she sent when she was banned already."""
    room, before = start_room(homeserver, owner, remote)
    carol = remote.user_id("carol")
    owner.ban(room, carol)
    late = remote.send_event(room, carol, prev_events=[before], **sticky())
    eventually(lambda: is_held(homeserver, late), what="the soft failure")
    return room, carol, late


def is_shown(reader: Client, event: Event) -> bool:
    """Whether a user can ask for an event."""
    try:
        shown = reader.event(event.room_id, event.event_id)
    except MatrixError as error:
        if error.status != 404:
            raise
        return False
    return bool(shown["content"] == event.content)


def pass_on(sender: Client, room: str) -> str:
    """Send something sticky and wait for it: then all that was before it was looked at."""
    event_id = sender.send(room, sticky_ms=HOUR_MS)
    eventually(lambda: event_id in section_ids(sender, room), what="the next sticky event")
    return event_id


def change_levels(admin: Client, room: str, **changes: JsonDict) -> None:
    """Change some of the power levels of a room."""
    (levels,) = (e["content"] for e in admin.state(room) if e["type"] == "m.room.power_levels")
    merged = {key: {**levels[key], **change} for key, change in changes.items()}
    admin.send_state(room, "m.room.power_levels", {**levels, **merged})


# K1, C6
def test_delivered_once_the_sender_is_back(
    homeserver: Homeserver, alice: Client, remote: RemoteServer
) -> None:
    """What a banned user sent comes after the end of the ban and a new join, everywhere."""
    room, carol, late = start_room_with_held_event(homeserver, alice, remote)
    alice.unban(room, carol)
    # Not banned any more, but not in the room either.
    first = pass_on(alice, room)
    assert is_held(homeserver, late)
    assert section_ids(alice, room) == [first]
    assert not is_shown(alice, late)
    until_known(alice, room, [first])
    since = alice.sync(filter=NO_TIMELINE)["next_batch"]
    connection = Connection(alice, {}, {room: subscription()})
    connection.collect(room, [first])

    remote.join(homeserver, room, "carol")
    followed = follow(
        alice, since, until=lambda f: late.event_id in f.sticky(room), filter=NO_TIMELINE
    )
    assert followed.sticky(room) == [late.event_id]
    assert drained(connection.collect(room, [late.event_id]), room) == [late.event_id]
    ((reason, position),) = homeserver.query(ROWS, late.event_id)
    assert (reason, position is None) == ("soft_failed", False)
    for url in homeserver.client_urls:
        reader = alice.via(url)
        eventually(lambda reader=reader: is_shown(reader, late), what=f"the event at {url}")  # type: ignore[misc]
    assert 0 < (remaining_ms(alice.event(room, late.event_id)) or 0) <= HOUR_MS
    # Those who join now get it as well.
    dave = homeserver.register()
    dave.join(room)
    eventually(lambda: section_ids(dave, room) == [first, late.event_id])


# K1
@pytest.mark.repeats("workers")
def test_delivered_once_the_level_suffices(
    homeserver: Homeserver, alice: Client, bob: Client, remote: RemoteServer
) -> None:
    """Power levels count for the type of the event and for the sender."""
    room, before = start_room(homeserver, alice, remote)
    carol = remote.user_id("carol")
    change_levels(alice, room, events={SPECIAL: 50})
    late = remote.send_event(room, carol, {"n": 1}, SPECIAL, prev_events=[before], **sticky())
    usual = remote.send_event(room, carol, {"n": 2}, prev_events=[before], **sticky())
    eventually(lambda: is_held(homeserver, late), what="the soft failure")
    eventually(lambda: section_ids(alice, room) == [usual.event_id])
    # Somebody else's level, and one that is too low.
    change_levels(alice, room, users={bob.user_id: 50, carol: 49})
    first = pass_on(alice, room)
    assert is_held(homeserver, late)
    change_levels(alice, room, users={carol: 50})
    expected = [usual.event_id, first, late.event_id]
    eventually(lambda: section_ids(alice, room) == expected, what="the event")
    for url in homeserver.client_urls:
        reader = alice.via(url)
        eventually(lambda reader=reader: is_shown(reader, late), what=f"the event at {url}")  # type: ignore[misc]


# K1
@pytest.mark.repeats("workers")
def test_what_is_authorised_stays_so(
    homeserver: Homeserver, alice: Client, remote: RemoteServer
) -> None:
    """A later ban does not take away what was delivered, and its end does not repeat it."""
    room, carol, late = start_room_with_held_event(homeserver, alice, remote)
    since = alice.sync(filter=NO_TIMELINE)["next_batch"]
    for _ in range(2):
        alice.unban(room, carol)
        remote.join(homeserver, room, "carol")
        eventually(lambda: late.event_id in section_ids(alice, room), what="the event")
        ((_, position),) = homeserver.query(ROWS, late.event_id)
        alice.ban(room, carol)
    last = pass_on(alice, room)
    assert homeserver.query(ROWS, late.event_id) == [("soft_failed", position)]
    followed = follow(alice, since, until=lambda f: last in f.sticky(room), filter=NO_TIMELINE)
    assert followed.sticky(room) == [late.event_id, last]


def beside(make_homeserver: MakeHomeserver, helper: ModuleType, name: str) -> Homeserver:
    """A homeserver that loads a module of the tests' own before ours."""
    modules = [
        {"module": f"{helper.__name__.rpartition('.')[2]}.{name}", "config": {}},
        {"module": "synapse_sticky.StickyEventsModule", "config": {}},
    ]
    homeserver = make_homeserver("sqlite", federation=True, extra_config={"modules": modules})
    # Where Synapse runs, and finds it.
    shutil.copy(str(helper.__file__), homeserver.directory)
    homeserver.start()
    return homeserver


# K1
def test_checked_only_when_it_can_matter(
    make_homeserver: MakeHomeserver, remote: RemoteServer
) -> None:
    """Changes of state that cannot authorise an event cost no check of it."""
    homeserver = beside(make_homeserver, checks, "ShowChecks")
    alice, bob = homeserver.register(), homeserver.register()
    other_room = alice.create_room()
    room, carol, late = start_room_with_held_event(homeserver, alice, remote)
    dave = remote.join(homeserver, room, "dave")
    before = remote.send_event(room, dave)
    eventually(lambda: is_stored(homeserver, before))
    alice.ban(room, dave)
    other = remote.send_event(room, dave, prev_events=[before], **sticky())

    def checked(event: Event) -> int:
        return homeserver.log().count(f"Checked: {event.event_id}")

    eventually(lambda: checked(late) and checked(other), what="the first checks")
    assert (checked(late), checked(other)) == (1, 1)
    alice.send_state(room, "m.room.topic", {"topic": "calls"})
    bob.join(room)
    bob.leave(room)
    change_levels(alice, other_room, users={bob.user_id: 50})
    alice.unban(room, dave)
    # Checks go in the order of the changes.
    eventually(lambda: checked(other) == 2, what="the check of the other event")
    assert checked(late) == 1
    alice.unban(room, carol)
    eventually(lambda: checked(late) == 2, what="the check")
    assert is_held(homeserver, late)


# K1
def test_refused_events_never_come_back(
    make_homeserver: MakeHomeserver, remote: RemoteServer
) -> None:
    """No change of state brings what a spam checker has refused, soft-failed besides or not."""
    homeserver = beside(make_homeserver, spam_checker, "RefuseSpam")
    alice = homeserver.register()
    room, before = start_room(homeserver, alice, remote)
    carol = remote.user_id("carol")
    spam = [remote.send_event(room, carol, text("spam"), prev_events=[before], **sticky())]
    alice.ban(room, carol)
    spam.append(remote.send_event(room, carol, text("spam"), prev_events=[before], **sticky()))
    late = remote.send_event(room, carol, text("good"), prev_events=[before], **sticky())
    eventually(lambda: is_held(homeserver, late), what="the soft failure")
    assert all(is_stored(homeserver, event) for event in spam)
    alice.unban(room, carol)
    remote.join(homeserver, room, "carol")
    eventually(lambda: section_ids(alice, room) == [late.event_id], what="what is no spam")
    change_levels(alice, room, users={carol: 50})
    last = pass_on(alice, room)
    assert section_ids(alice, room) == [late.event_id, last]
    assert not any(is_shown(alice, event) for event in spam)


# K1
@pytest.mark.slow
@pytest.mark.any_synapse
def test_restart_between_soft_failure_and_return(
    make_homeserver: MakeHomeserver, remote: RemoteServer
) -> None:
    """What is held is held over a restart, and so is what was refused."""
    homeserver = make_homeserver("sqlite", federation=True)
    homeserver.start()
    alice = homeserver.register()
    room, before = start_room(homeserver, alice, remote)
    carol = remote.user_id("carol")
    alice.ban(room, carol)
    late, refused = (
        remote.send_event(room, carol, prev_events=[before], **sticky()) for _ in range(2)
    )
    for event in (late, refused):
        eventually(lambda event=event: is_held(homeserver, event), what="the soft failure")  # type: ignore[misc]
    homeserver.stop()
    # As a policy server's verdict is recorded.
    for update in ("synapse_sticky_held SET reason", "synapse_sticky_events SET held_reason"):
        query = f"UPDATE {update} = 'refused' WHERE event_id = ?"
        assert homeserver.execute(query, refused.event_id) == 1
    homeserver.start()
    first = pass_on(alice, room)
    assert section_ids(alice, room) == [first]
    alice.unban(room, carol)
    remote.join(homeserver, room, "carol")
    eventually(lambda: late.event_id in section_ids(alice, room), what="the event")
    last = pass_on(alice, room)
    assert section_ids(alice, room) == [first, late.event_id, last]
    assert is_shown(alice, late)
    assert homeserver.query(ROWS, refused.event_id) == [("refused", None)]
    assert not is_shown(alice, refused)


# K1
@pytest.mark.slow
@pytest.mark.any_synapse
def test_the_sender_is_back_while_the_module_is_away(
    make_homeserver: MakeHomeserver, remote: RemoteServer
) -> None:
    """Changes of state that nobody looked at are looked at later."""
    homeserver = make_homeserver("sqlite", federation=True)
    homeserver.start()
    alice = homeserver.register()
    room, carol, late = start_room_with_held_event(homeserver, alice, remote)
    homeserver.stop()
    homeserver.reconfigure(module=False)
    homeserver.start()
    alice.unban(room, carol)
    remote.join(homeserver, room, "carol")
    homeserver.stop()
    homeserver.reconfigure(module=True)
    homeserver.start()
    eventually(lambda: section_ids(alice, room) == [late.event_id], what="the event")
    assert is_shown(alice, late)


def answer_ms(connection: Connection) -> float:
    """How long one request takes."""
    began = time.monotonic()
    connection.ask()
    return (time.monotonic() - began) * 1000


# K1, X4
@pytest.mark.repeats("workers")
def test_nobody_waits_for_a_join_that_did_not_matter(
    homeserver: Homeserver, alice: Client, remote: RemoteServer
) -> None:
    """An event older than a join comes once it is released, and slows no answer down."""
    room, carol, late = start_room_with_held_event(homeserver, alice, remote)
    # Nothing in the room is deliverable yet: nothing is due to who joins.
    dave = homeserver.register()
    dave.join(room)
    alice.unban(room, carol)
    # A room in which nothing was ever held.
    other = alice.create_room(preset="public_chat")
    dave.join(other)
    event_ids = {room: [late.event_id], other: send_known(alice, other)}
    # Timelines of one event do not have it.
    alice.send(other)
    connections = {
        room_id: [
            Connection(dave.via(url), {}, {room_id: subscription(timeline_limit=1)})
            for url in homeserver.client_urls
        ]
        for room_id in event_ids
    }
    for connection in connections[room]:
        connection.ask()
    remote.join(homeserver, room, "carol")
    for room_id in event_ids:
        for connection in connections[room_id]:
            connection.collect(room_id, event_ids[room_id])
    for in_rooms in zip(*connections.values(), strict=True):
        times: dict[str, list[float]] = {room_id: [] for room_id in event_ids}
        for _ in range(5):
            for room_id, connection in zip(event_ids, in_rooms, strict=True):
                wait_for_readers(alice, room_id, alice.send(room_id))
                times[room_id].append(answer_ms(connection))
                # So that the next answer has news of sticky events too.
                connection.since = BEGINNING
        assert median(times[room]) - median(times[other]) < 250, times


# X4
@pytest.mark.deployments("sqlite", "workers")
@pytest.mark.repeats("workers")
def test_a_join_that_is_back_by_state_resolution(
    homeserver: Homeserver, alice: Client, bob: Client, remote: RemoteServer
) -> None:
    """Who is joined again by way of somebody else's event gets what lies behind."""
    dave = homeserver.register()
    room = alice.create_room(preset="public_chat", room_version="11")
    carol = remote.join(homeserver, room, "carol")
    bob.join(room)
    dave.join(room)
    levels = {alice.user_id: 100, carol: 100, bob.user_id: 50}
    change_levels(alice, room, users=levels)
    remote.wait_for(lambda e: e.type == "m.room.power_levels" and carol in e.content["users"])
    before = remote.send_event(room, carol)
    eventually(lambda: is_stored(homeserver, before))
    bob.kick(room, dave.user_id)
    connection = Connection(dave)
    sent = send_known(alice, room, 2)
    # A position beyond what was sent in the room meanwhile.
    own_room = dave.create_room()
    connection.collect(own_room, send_known(dave, own_room))
    assert connection.seen(room) == []
    # Had bob no power, he could not have done that.
    content = remote.rooms[room].state["m.room.power_levels", ""].content
    content = {**content, "users": {**levels, bob.user_id: 0}}
    remote.send_event(room, carol, content, "m.room.power_levels", "", prev_events=[before])
    wait_until_joined(homeserver, room, dave.user_id)
    # Such a join is as old as the event that it once was: no answer can know that the indexer
    # has still to come to it. If one is faster, the events come once more.
    assert set(drained(connection.collect(room, sent), room)) == set(sent)


# K1
@pytest.mark.slow
@pytest.mark.deployments("sqlite")
def test_what_was_accepted_stays_so_when_it_comes_again(
    make_homeserver: MakeHomeserver, remote: RemoteServer
) -> None:
    """An event that was delivered, purged, and comes again is not held for a ban since."""
    homeserver = make_homeserver("sqlite", federation=True)
    homeserver.start()
    alice = homeserver.register(admin=True)
    room, before = start_room(homeserver, alice, remote)
    carol = remote.user_id("carol")
    # Purging goes by depths. The event before it stays: it can be sent again.
    accepted = remote.send_event(room, carol, prev_events=[before], depth=1, **sticky())
    eventually(lambda: section_ids(alice, room) == [accepted.event_id], what="the event")
    another = remote.send_event(room, carol, prev_events=[before])
    eventually(lambda: is_stored(homeserver, another))
    alice.ban(room, carol)
    path = f"/_synapse/admin/v1/purge_history/{quote(room)}/{quote(before.event_id)}"
    purge = alice.request("POST", path, json={})["purge_id"]
    status = f"/_synapse/admin/v1/purge_history_status/{purge}"
    eventually(lambda: alice.request("GET", status)["status"] == "complete", what="the purge")
    assert not is_stored(homeserver, accepted)
    remote.send(accepted)
    eventually(lambda: is_stored(homeserver, accepted), what="the event again")
    eventually(lambda: accepted.event_id in section_ids(alice, room), what="its delivery")
    assert is_shown(alice, accepted)


# K1
@pytest.mark.slow
@pytest.mark.deployments("sqlite")
def test_what_synapse_accepted_stays_so_at_the_first_start(
    make_homeserver: MakeHomeserver, remote: RemoteServer
) -> None:
    """What Synapse's own has delivered is not held for a ban since, however it had arrived."""
    homeserver = make_homeserver(
        "sqlite",
        federation=True,
        module=False,
        extra_config={"experimental_features": {"msc4354_enabled": True}},
    )
    homeserver.start()
    alice = homeserver.register()
    room = remote.create_room("carol", "10")
    carol, dave = remote.user_id("carol"), remote.user_id("dave")
    remote.send_event(room, dave, {"membership": "join"}, "m.room.member", dave)
    event = remote.send_event(room, dave, **sticky())
    remote.send_event(room, carol)
    alice.join(room, via=[remote.server_name])
    alice.messages(room, limit=50)
    eventually(lambda: is_stored(homeserver, event), what="the event by backfill")
    assert event.event_id in [
        row[0] for row in homeserver.query("SELECT event_id FROM sticky_events")
    ]
    ban = remote.send_event(room, carol, {"membership": "ban"}, "m.room.member", dave)
    eventually(lambda: is_stored(homeserver, ban), what="the ban")
    homeserver.stop()
    homeserver.reconfigure(module=True, extra_config={})
    homeserver.start()
    eventually(lambda: homeserver.query(ROWS, event.event_id), what="the first start")
    eventually(lambda: section_ids(alice, room) == [event.event_id], what="the event")
