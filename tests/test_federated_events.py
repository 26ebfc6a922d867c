"""Sticky events that another server wrote: well-formed or not, in time or not, by any way in."""

import shutil
import threading
import time
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness.client import Client
from harness.event_format import Event
from harness.homeserver import Homeserver
from harness.remote import RemoteServer
from harness.wait import eventually
from tests import spam_checker
from tests.support import (
    EVENT_KEY,
    HOUR_MS,
    NO_TIMELINE,
    ROWS,
    Followed,
    MakeHomeserver,
    follow,
    follow_until_seen,
    is_recorded,
    is_stored,
    now_ms,
    remaining_ms,
    section_ids,
    sticky,
    sticky_in,
    text,
)

pytestmark = pytest.mark.repeats("postgres")

# What canonical JSON of today's room versions can say.
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(min_value=-(2**53) + 1, max_value=2**53 - 1)
    | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)
stickiness_values = json_values | st.fixed_dictionaries(
    {"duration_ms": json_values}, optional={"extra": json_values}
)


def one_reader(client: Client) -> Client:
    """The client, asking one process only: what that shows, another may show a moment later."""
    return client.via(client.homeserver.client_urls[0])


# E2
@pytest.mark.repeats("workers")
def test_any_stickiness_is_harmless(
    homeserver: Homeserver, alice: Client, remote: RemoteServer
) -> None:
    """Whatever a server writes as stickiness: what is invalid is ordinary, and nothing breaks."""
    alice = one_reader(alice)
    room = alice.create_room(preset="public_chat", room_version="10")
    carol = remote.join(homeserver, room, "carol")

    @settings(
        max_examples=8,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(stickiness_values, min_size=10, max_size=10))
    def check(values: list[Any]) -> None:
        position = homeserver.log_position()
        events = [
            remote.create_event(room, "m.room.message", text("?"), carol, **{EVENT_KEY: value})
            for value in values
        ]
        answer = remote.send(events)
        assert all("error" not in result for result in answer["pdus"].values())
        last = remote.send_event(room, carol, **sticky())
        valid = [
            event.event_id
            for event, value in zip(events, values, strict=True)
            if isinstance(value, dict)
            and type(duration_ms := value.get("duration_ms")) is int
            and duration_ms > 60_000
        ]
        invalid = [
            event.event_id
            for event, value in zip(events, values, strict=True)
            if not isinstance(value, dict)
            or type(duration_ms := value.get("duration_ms")) is not int
            or duration_ms <= 0
        ]
        eventually(lambda: last.event_id in section_ids(alice, room), what="the next valid one")
        delivered = section_ids(alice, room)
        assert set(valid) <= set(delivered)
        assert not set(invalid) & set(delivered)
        for event_id in invalid:
            assert remaining_ms(alice.event(room, event_id)) is None
        assert "Traceback" not in homeserver.log_since(position)

    check()


# E2, E7: what only old room versions allow
@pytest.mark.repeats("workers")
def test_numbers_of_any_size(homeserver: Homeserver, alice: Client, remote: RemoteServer) -> None:
    """Numbers beyond 64 bits, and fractions, in durations and times do no harm."""
    alice = one_reader(alice)
    room = remote.create_room("carol", "1")
    carol = remote.user_id("carol")
    durations = [2**70, -(2**70), 1.5, 1e300, 3.6e6, True, 10**400]
    events = [remote.send_event(room, carol, **sticky(duration)) for duration in durations]
    times = [
        remote.send_event(room, carol, origin_server_ts=origin, **sticky())
        for origin in (2**62, 0, -5)
    ]
    valid = remote.send_event(room, carol, **sticky(600_000))
    alice.join(room, via=[remote.server_name])
    eventually(
        lambda: alice.messages(room, limit=50) and valid.event_id in section_ids(alice, room),
        timeout_s=20,
        what="the backfilled event",
    )
    expected = {events[0].event_id, events[6].event_id, times[0].event_id, valid.event_id}
    eventually(lambda: set(section_ids(alice, room)) >= expected, what="all that are valid")
    assert set(section_ids(alice, room)) == expected
    for event_id in (events[0].event_id, times[0].event_id):
        assert 0 < (remaining_ms(alice.event(room, event_id)) or 0) <= HOUR_MS


# E1, E7
def test_future_events_count_from_receipt(
    make_homeserver: MakeHomeserver, remote: RemoteServer
) -> None:
    """A time in the future does not prolong stickiness, also after a restart."""
    homeserver = make_homeserver("sqlite", federation=True)
    homeserver.start()
    alice = homeserver.register()
    room = alice.create_room(preset="public_chat")
    carol = remote.join(homeserver, room, "carol")
    before = now_ms()
    event = remote.send_event(
        room, carol, origin_server_ts=before + 10 * HOUR_MS, **sticky(600_000)
    )
    eventually(lambda: event.event_id in section_ids(alice, room))
    first = remaining_ms(alice.event(room, event.event_id)) or 0
    latest = now_ms()
    assert 600_000 - (latest - before) <= first <= 600_000
    homeserver.restart()
    (again,) = sticky_in(alice.sync(filter=NO_TIMELINE), room)
    expected = first - (now_ms() - latest)
    assert abs((remaining_ms(again) or 0) - expected) < 2_000


# E1
@pytest.mark.repeats("workers")
def test_late_events_count_from_their_time(
    homeserver: Homeserver, alice: Client, remote: RemoteServer
) -> None:
    """What was under way for a while is sticky for as much less, or not at all."""
    alice = one_reader(alice)
    room = alice.create_room(preset="public_chat")
    carol = remote.join(homeserver, room, "carol")
    old = remote.send_event(room, carol, origin_server_ts=now_ms() - 600_000, **sticky(900_000))
    too_old = remote.send_event(room, carol, origin_server_ts=now_ms() - 600_000, **sticky(590_000))
    last = remote.send_event(room, carol, **sticky())
    eventually(lambda: last.event_id in section_ids(alice, room))
    delivered = {e["event_id"]: e for e in sticky_in(alice.sync(filter=NO_TIMELINE), room)}
    assert 270_000 < (remaining_ms(delivered[old.event_id]) or 0) <= 300_000
    assert too_old.event_id not in delivered
    assert remaining_ms(alice.event(room, too_old.event_id)) is None


# S6
@pytest.mark.repeats("workers")
def test_sticky_state_event(homeserver: Homeserver, alice: Client, remote: RemoteServer) -> None:
    """A state event of another server can be sticky like any other."""
    room = alice.create_room(
        preset="public_chat", room_version="10", power_level_content_override={"state_default": 0}
    )
    carol = remote.join(homeserver, room, "carol")
    topic = remote.send_event(room, carol, {"topic": "x"}, "m.room.topic", "", **sticky())
    eventually(lambda: topic.event_id in section_ids(alice, room))


# E5
@pytest.mark.repeats("workers")
def test_redaction_before_its_target(
    homeserver: Homeserver, alice: Client, remote: RemoteServer
) -> None:
    """An event whose redaction is here first is never sticky."""
    alice = one_reader(alice)
    room = alice.create_room(preset="public_chat", room_version="10")
    carol = remote.join(homeserver, room, "carol")
    target = remote.create_event(room, "m.room.message", text("taken back"), carol, **sticky())
    remote.send_event(room, carol, {}, "m.room.redaction", redacts=target.event_id)
    remote.send(target)
    last = remote.send_event(room, carol, **sticky())
    eventually(lambda: last.event_id in section_ids(alice, room))
    assert is_stored(homeserver, target)
    assert section_ids(alice, room) == [last.event_id]
    assert remaining_ms(alice.event(room, target.event_id)) is None


# E5
@pytest.mark.repeats("workers")
def test_redaction_that_is_not_accepted(
    homeserver: Homeserver, alice: Client, remote: RemoteServer
) -> None:
    """Another server's user without power cannot end stickiness by a redaction."""
    room = alice.create_room(preset="public_chat", room_version="10")
    carol = remote.join(homeserver, room, "carol")
    event_id = alice.send(room, text("stays"), sticky_ms=HOUR_MS)
    remote.wait_for(event_id)
    redaction = remote.send_event(room, carol, {}, "m.room.redaction", redacts=event_id)
    eventually(lambda: is_stored(homeserver, redaction))
    eventually(lambda: section_ids(alice, room) == [event_id])
    assert remaining_ms(alice.event(room, event_id))


# K1: a soft-failed event is recorded and held
def test_soft_failed_event_is_held(
    homeserver: Homeserver, alice: Client, remote: RemoteServer
) -> None:
    """What the current state does not authorise is kept, with the reason, and not delivered."""
    alice = one_reader(alice)
    room = alice.create_room(preset="public_chat")
    carol = remote.join(homeserver, room, "carol")
    before = remote.send_event(room, carol)
    eventually(lambda: is_stored(homeserver, before))
    alice.ban(room, carol)
    late = remote.send_event(room, carol, prev_events=[before], **sticky())
    eventually(lambda: homeserver.query(ROWS, late.event_id) == [("soft_failed", None)])
    own = alice.send(room, sticky_ms=HOUR_MS)
    eventually(lambda: own in section_ids(alice, room))
    assert section_ids(alice, room) == [own]


def _join_with_history(
    homeserver: Homeserver, reader: Client, remote: RemoteServer, *, ban_author: bool
) -> tuple[str, Event]:
    """Joins a room of the remote's, in which somebody has sent a sticky event before."""
    room = remote.create_room("carol", "10")
    carol, dave = remote.user_id("carol"), remote.user_id("dave")
    remote.send_event(room, dave, {"membership": "join"}, "m.room.member", dave)
    event = remote.send_event(room, dave, **sticky())
    if ban_author:
        remote.send_event(room, carol, {"membership": "ban"}, "m.room.member", dave)
    remote.send_event(room, carol)
    reader.join(room, via=[remote.server_name])
    return room, event


# K3
@pytest.mark.repeats("workers")
def test_backfilled_event_is_delivered(
    homeserver: Homeserver, alice: Client, remote: RemoteServer
) -> None:
    """What arrives by backfill counts as much as what is sent."""
    room, event = _join_with_history(homeserver, alice, remote, ban_author=False)
    since = alice.sync()["next_batch"]
    alice.messages(room, limit=50)
    eventually(lambda: is_stored(homeserver, event), what="the event by backfill")
    followed = follow(alice, since, until=lambda f: event.event_id in f.sticky(room))
    assert followed.seen(room).count(event.event_id) == 1


# K1, K3
@pytest.mark.repeats("workers")
def test_backfill_lets_no_banned_user_in(
    homeserver: Homeserver, alice: Client, remote: RemoteServer
) -> None:
    """A backfilled event of a user who is banned by now is held."""
    alice = one_reader(alice)
    room, event = _join_with_history(homeserver, alice, remote, ban_author=True)
    alice.messages(room, limit=50)
    eventually(lambda: homeserver.query(ROWS, event.event_id) == [("soft_failed", None)])
    own = alice.send(room, sticky_ms=HOUR_MS)
    eventually(lambda: own in section_ids(alice, room))
    assert section_ids(alice, room) == [own]


# K3
def test_missing_event_is_delivered(
    homeserver: Homeserver, alice: Client, remote: RemoteServer
) -> None:
    """What arrives because a later event refers to it counts as much as what is sent."""
    room = alice.create_room(preset="public_chat")
    carol = remote.join(homeserver, room, "carol")
    since = alice.sync()["next_batch"]
    missing = remote.create_event(room, "m.room.message", text("missing"), carol, **sticky())
    remote.remember(missing)
    remote.send_event(room, carol)
    followed = follow(
        alice, since, until=lambda f: missing.event_id in f.seen(room), filter=NO_TIMELINE
    )
    assert followed.sticky(room) == [missing.event_id]


# K3
def test_former_outlier_is_delivered(
    homeserver: Homeserver, alice: Client, remote: RemoteServer
) -> None:
    """An event that was known as somebody's authority first is delivered once it is accepted."""
    room = remote.create_room("carol", "10")
    carol, dave = remote.user_id("carol"), remote.user_id("dave")
    # Dave's join is sticky. Who joins later learns it with the state of the room: an outlier.
    join = remote.send_event(room, dave, {"membership": "join"}, "m.room.member", dave, **sticky())
    remote.send_event(room, carol)
    alice.join(room, via=[remote.server_name])
    outlier = "SELECT outlier FROM events WHERE event_id = ?"
    ((was_outlier,),) = eventually(lambda: homeserver.query(outlier, join.event_id))
    assert was_outlier
    assert section_ids(alice, room) == []
    alice.messages(room, limit=50)
    eventually(lambda: not homeserver.query(outlier, join.event_id)[0][0], what="its acceptance")
    eventually(lambda: section_ids(alice, room) == [join.event_id])


# K1, K3
@pytest.mark.deployments("sqlite", "workers")
def test_events_that_are_judged_again_after_a_faster_join(
    homeserver: Homeserver, alice: Client, remote: RemoteServer
) -> None:
    """What was rejected is delivered once Synapse has accepted it, and the other way round."""
    room = remote.create_room("carol")
    carol, dave, mike = (remote.user_id(name) for name in ("carol", "dave", "mike"))
    for user in (dave, mike):
        join = {"membership": "join"}
        remote.remember(remote.create_event(room, "m.room.member", join, user, user))
    levels = {"users": {carol: 100, mike: 50}}
    remote.remember(remote.create_event(room, "m.room.power_levels", levels, carol, ""))
    state = dict(remote.rooms[room].state)
    # Who joins is not told that mike may not ban anybody any more.
    banned = {"membership": "ban"}
    remote.remember(remote.create_event(room, "m.room.member", banned, carol, mike))
    remote.omits_members = True
    remote.tells_state.clear()
    alice.join(room, via=[remote.server_name])
    try:
        slots = [("m.room.create", ""), ("m.room.power_levels", ""), ("m.room.member", mike)]
        of_mike = [state[slot] for slot in slots]
        of_dave = [*of_mike[:2], state["m.room.member", dave]]
        ban = remote.create_event(
            room, "m.room.member", banned, mike, dave, auth_events=[*of_mike, of_dave[-1]]
        )
        remote.send(ban)
        accepted = remote.send_event(room, mike, auth_events=of_mike, **sticky())
        rejected = remote.send_event(room, dave, auth_events=of_dave, **sticky())
        eventually(lambda: is_recorded(homeserver, accepted.event_id), 20, "mike's event")
        eventually(lambda: is_stored(homeserver, rejected), 20, "dave's event")
        assert is_rejected(homeserver, rejected)
        assert not is_rejected(homeserver, accepted)
    finally:
        remote.tells_state.set()
    eventually(lambda: is_rejected(homeserver, accepted), 30, "the end of the join")
    eventually(lambda: section_ids(alice, room) == [rejected.event_id], 20, "the other event")


def is_rejected(homeserver: Homeserver, event: Event) -> bool:
    """Whether Synapse has rejected an event that it has."""
    reason = "SELECT rejection_reason FROM events WHERE event_id = ?"
    return homeserver.query(reason, event.event_id) != [(None,)]


# K1
def test_refused_event_is_never_delivered(
    make_homeserver: MakeHomeserver, remote: RemoteServer
) -> None:
    """What a spam checker refuses has lost its stickiness."""
    modules = [
        {"module": "spam_checker.RefuseSpam", "config": {}},
        {"module": "synapse_sticky.StickyEventsModule", "config": {}},
    ]
    homeserver = make_homeserver("sqlite", federation=True, extra_config={"modules": modules})
    # Where Synapse runs, and finds it.
    shutil.copy(spam_checker.__file__, homeserver.directory)
    homeserver.start()
    alice = homeserver.register()
    room = alice.create_room(preset="public_chat")
    carol = remote.join(homeserver, room, "carol")
    spam = remote.send_event(room, carol, text("spam"), **sticky())
    good = remote.send_event(room, carol, text("good"), **sticky())
    eventually(lambda: good.event_id in section_ids(alice, room))
    assert is_stored(homeserver, spam)
    assert section_ids(alice, room) == [good.event_id]


# C6
def test_late_deliverable_event_wakes(
    homeserver: Homeserver, alice: Client, remote: RemoteServer
) -> None:
    """A long-poll wakes for an event that was in the database long before: a former outlier."""
    room, event = _join_with_history(homeserver, alice, remote, ban_author=False)
    other = alice.second_device()
    since = alice.sync(filter=NO_TIMELINE)["next_batch"]
    followed: list[Followed] = []

    def read_on() -> None:
        found = follow(
            alice,
            since,
            until=lambda f: event.event_id in f.sticky(room),
            filter=NO_TIMELINE,
            timeout_ms=60_000,
            timeout_s=60,
        )
        followed.append(found)

    reading = threading.Thread(target=read_on)
    started = time.monotonic()
    reading.start()
    other.messages(room, limit=50)
    reading.join()
    assert followed[0].sticky(room) == [event.event_id]
    # No single long-poll slept through it.
    assert time.monotonic() - started < 40


@pytest.mark.repeats("workers")
def test_duration_of_zero(
    homeserver: Homeserver, alice: Client, bob: Client, room: str, remote: RemoteServer
) -> None:
    """No client may ask for it, and a server may write it: over as soon as it is sent."""
    # E1, E2, S3
    carol = remote.join(homeserver, room, "carol")
    since = bob.sync()["next_batch"]
    over = remote.send_event(room, carol, **sticky(0)).event_id
    lasting = remote.send_event(room, carol, **sticky()).event_id
    followed = follow_until_seen(bob, room, [lasting], since, filter=NO_TIMELINE)
    assert followed.sticky(room) == [lasting]
    event = bob.event(room, over)
    assert event[EVENT_KEY] == {"duration_ms": 0}
    assert remaining_ms(event) is None
