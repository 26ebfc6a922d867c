"""How long an event is sticky, what clients are told of it, and what ends it."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest

from harness.client import Client, JsonDict, MatrixError, quote
from harness.event_format import Event
from harness.homeserver import Homeserver
from harness.remote import RemoteServer
from harness.wait import eventually
from tests.remaining import assert_counts_down, expiry, find_event
from tests.support import (
    EVENT_KEY,
    HOUR_MS,
    REMAINING_KEY,
    MakeHomeserver,
    assert_once,
    follow_until_seen,
    ids,
    is_recorded,
    now_ms,
    send_plain,
    sleep_until,
    sticky_in,
    stored_pdu,
    text,
    wait_for_readers,
)

# One process is there with SQLite, and PostgreSQL with the workers.
pytestmark = pytest.mark.repeats("postgres")

EXTENSION = "org.matrix.msc4354.sticky_events"
SLIDING_SYNC = {
    "lists": {"all": {"ranges": [[0, 9]], "required_state": [], "timeline_limit": 1}},
    "extensions": {EXTENSION: {"enabled": True}},
}
# Lets no message through, so that sticky messages come in the section.
NO_MESSAGES = {"room": {"timeline": {"not_types": ["m.room.message"]}}}
ALL_MESSAGES = {"room": {"timeline": {"limit": 50}}}

Read = Callable[[], JsonDict]


def _endpoints(client: Client, room_id: str, event_id: str, root_id: str) -> dict[str, Read]:
    """Requests that return an event, which is the newest of a thread but not of the room."""
    initial_sync = f"/_matrix/client/v3/rooms/{quote(room_id)}/initialSync"
    return {
        "/event": lambda: client.event(room_id, event_id),
        "/event of the thread": lambda: client.event(room_id, root_id),
        "/messages": lambda: client.messages(room_id, limit=50),
        "/context": lambda: client.context(room_id, event_id),
        "/context around it": lambda: client.context(room_id, root_id, limit=50),
        "/relations": lambda: client.relations(room_id, root_id),
        "/threads": lambda: client.threads(room_id),
        "/search": lambda: client.search("needle", filter={"rooms": [room_id]}),
        "/initialSync": lambda: client.request("GET", initial_sync, params={"limit": 50}),
        "/notifications": lambda: client.request("GET", "/_matrix/client/v3/notifications"),
        "/sync, timeline": lambda: client.sync(filter={"room": {"timeline": {"limit": 50}}}),
        "/sync, section": lambda: client.sync(filter=NO_MESSAGES),
        "/sync, full state": lambda: client.sync(full_state="true", filter=NO_MESSAGES),
        "sliding sync, timeline": lambda: client.sliding_sync(
            {"lists": {"all": {"ranges": [[0, 9]], "required_state": [], "timeline_limit": 50}}}
        ),
        "sliding sync, extension": lambda: client.sliding_sync(SLIDING_SYNC),
    }


def _shows(read: Read, event_id: str) -> bool:
    return any(find_event(read(), event_id))


def _send_into_a_thread(client: Client, room_id: str, sticky_ms: int) -> tuple[str, str]:
    """A sticky event that all those endpoints show, and the root of its thread."""
    root_id = client.send(room_id, text("root"))
    thread = {"m.relates_to": {"rel_type": "m.thread", "event_id": root_id}}
    event_id = client.send(room_id, {**text("needle"), **thread}, sticky_ms=sticky_ms)
    send_plain(client, room_id, 2)
    return event_id, root_id


# What clients are told


@pytest.mark.repeats("workers")
def test_every_endpoint_tells_the_remaining_time(
    homeserver: Homeserver, alice: Client, bob: Client, room: str
) -> None:
    # E1, E3
    event_id, root_id = _send_into_a_thread(alice, room, sticky_ms=60_000)
    follow_until_seen(bob, room, [event_id])
    expires_ts = expiry(homeserver, event_id)
    assert expires_ts == stored_pdu(homeserver, event_id)["origin_server_ts"] + 60_000
    for name, read in _endpoints(bob, room, event_id, root_id).items():
        # Some worker may not show it yet; what is said of it must be right at once.
        each_reader = [read] * len(homeserver.client_urls)
        eventually(lambda: all(_shows(read, event_id) for read in each_reader), what=name)  # noqa: B023
        assert_counts_down(read, event_id, expires_ts, name)
    # Every process says the same, and counts down.
    for url in {homeserver.main_url, *homeserver.client_urls}:
        assert_counts_down(partial(bob.via(url).event, room, event_id), event_id, expires_ts)
    # Ordinary events are told nothing.
    assert REMAINING_KEY not in bob.event(room, root_id)["unsigned"]


@pytest.mark.parametrize("duration_ms", [10 * HOUR_MS, 2**53 - 1])
@pytest.mark.repeats("workers")
def test_no_event_is_sticky_for_more_than_an_hour(
    homeserver: Homeserver, alice: Client, remote: RemoteServer, duration_ms: int
) -> None:
    # E1
    room = alice.create_room(preset="public_chat")
    carol = remote.join(homeserver, room, "carol")
    event = remote.send_event(room, carol, **_stickiness(duration_ms))
    follow_until_seen(alice, room, [event.event_id])
    expires_ts = event.pdu["origin_server_ts"] + HOUR_MS
    assert expiry(homeserver, event.event_id) == expires_ts
    read = partial(alice.event, room, event.event_id)
    assert_counts_down(read, event.event_id, expires_ts)
    # What the sender has signed stays as it is.
    assert read()[EVENT_KEY] == {"duration_ms": duration_ms}


def _stickiness(duration_ms: Any) -> JsonDict:
    """The top-level keys of a sticky event."""
    return {EVENT_KEY: {"duration_ms": duration_ms}}


# From version 5 on the keys of servers must be valid at that time.
@pytest.mark.parametrize(("version", "ahead_ms"), [("11", 12 * HOUR_MS), ("4", 2**62)])
@pytest.mark.repeats("workers")
def test_the_start_is_the_earlier_of_sending_and_receiving(
    homeserver: Homeserver, alice: Client, remote: RemoteServer, version: str, ahead_ms: int
) -> None:
    # E1, E7
    room = alice.create_room(preset="public_chat", room_version=version)
    carol = remote.join(homeserver, room, "carol")
    since = alice.sync()["next_batch"]
    now = now_ms()

    def send(origin_server_ts: int) -> str:
        sent = remote.send_event(
            room, carol, origin_server_ts=origin_server_ts, **_stickiness(600_000)
        )
        return sent.event_id

    delayed, expired = send(now - 400_000), send(now - 600_001)
    ahead = send(now + ahead_ms)
    sticky = [delayed, ahead, send(now)]
    followed = follow_until_seen(alice, room, sticky, since, filter=NO_MESSAGES)
    assert followed.sticky(room) == sticky
    for event_id in sticky:
        assert_counts_down(
            partial(alice.event, room, event_id), event_id, expiry(homeserver, event_id)
        )
    assert expiry(homeserver, delayed) == now + 200_000
    assert now + 600_000 <= expiry(homeserver, ahead) <= now_ms() + 600_000
    assert not is_recorded(homeserver, expired)
    shown = alice.event(room, expired)
    assert REMAINING_KEY not in shown["unsigned"]
    assert shown[EVENT_KEY] == {"duration_ms": 600_000}


NO_STICKINESS: list[Any] = [
    {"duration_ms": "60000"},
    {"duration_ms": True},
    {"duration_ms": -1},
    {"duration_ms": None},
    {"duration_ms": [60_000]},
    {"duration_ms": {"duration_ms": 60_000}},
    {"sticky_duration_ms": 60_000},
    {},
    [],
    ["duration_ms"],
    60_000,
    True,
    None,
    "duration_ms",
]


# Floats are allowed in old rooms only.
@pytest.mark.parametrize(("version", "more"), [("11", []), ("5", [{"duration_ms": 60_000.0}])])
@pytest.mark.repeats("workers")
def test_what_is_no_stickiness_makes_an_ordinary_event(
    homeserver: Homeserver, alice: Client, remote: RemoteServer, version: str, more: list[Any]
) -> None:
    # E2
    room = alice.create_room(preset="public_chat", room_version=version)
    carol = remote.join(homeserver, room, "carol")
    since = alice.sync()["next_batch"]
    values = NO_STICKINESS + more
    ordinary = [remote.send_event(room, carol, **{EVENT_KEY: value}) for value in values]
    # More is allowed beside the duration.
    sticky: JsonDict = {EVENT_KEY: {"duration_ms": 60_000, "duration": "long"}}
    last = remote.send_event(room, carol, **sticky).event_id
    in_section = follow_until_seen(alice, room, [last], since, filter=NO_MESSAGES)
    assert in_section.sticky(room) == [last]
    everything = follow_until_seen(alice, room, _ids_of([*ordinary]), since, filter=ALL_MESSAGES)
    assert everything.timeline(room) == [*_ids_of(ordinary), last]
    for event, value in zip(ordinary, values, strict=True):
        shown = alice.event(room, event.event_id)
        assert REMAINING_KEY not in shown["unsigned"], value
        assert shown[EVENT_KEY] == value


def _ids_of(events: Iterable[Event]) -> list[str]:
    return [event.event_id for event in events]


# What ends it


def test_after_expiry_nothing_is_special(
    homeserver: Homeserver, alice: Client, bob: Client, room: str
) -> None:
    # E3, E4
    carol = homeserver.register()
    since = bob.sync()["next_batch"]
    event_id, root_id = _send_into_a_thread(alice, room, sticky_ms=8_000)
    send_plain(alice, room, 1)
    first = follow_until_seen(bob, room, [event_id], since, filter=NO_MESSAGES)
    # Not by accident: while it is sticky it does come in the section.
    assert first.sticky(room) == [event_id]
    sleep_until(expiry(homeserver, event_id))
    for name, read in _endpoints(bob, room, event_id, root_id).items():
        if name in ("/sync, section", "/sync, full state", "sliding sync, extension"):
            assert not list(find_event(read(), event_id)), name
            continue
        found = list(find_event(read(), event_id))
        assert found, name
        for event in found:
            assert REMAINING_KEY not in event.get("unsigned", {}), name
            # What was signed is still there.
            assert event[EVENT_KEY] == {"duration_ms": 8_000}, name
    # Neither does it come again to somebody who has not seen it, nor to who joins now.
    assert event_id not in ids(sticky_in(bob.sync(since, filter=NO_MESSAGES), room))
    carol.join(room)
    last = alice.send(room, sticky_ms=60_000)
    late = follow_until_seen(carol, room, [last], filter=NO_MESSAGES)
    assert late.sticky(room) == [last]


@pytest.mark.repeats("workers")
def test_an_event_expires_between_two_pages(
    homeserver: Homeserver, alice: Client, bob: Client, room: str
) -> None:
    # E4, C3
    since = bob.sync()["next_batch"]
    short = alice.send(room, sticky_ms=6_000)
    long = alice.send(room, sticky_ms=60_000)
    follow_until_seen(bob, room, [short, long], since, filter=NO_MESSAGES)
    sleep_until(expiry(homeserver, short))
    # The lost response is repeated with what is still sticky.
    followed = follow_until_seen(bob, room, [long], since, filter=NO_MESSAGES)
    assert followed.sticky(room) == [long]


@pytest.mark.deployments("sqlite")
def test_a_repeated_response_has_no_expired_events(make_homeserver: MakeHomeserver) -> None:
    # E4: by default Synapse remembers its responses, for two minutes
    homeserver = make_homeserver(
        extra_config={"caches": {"sync_response_cache_duration": "2m"}},
    )
    homeserver.start()
    alice, bob = homeserver.register(), homeserver.register()
    room = alice.create_room(preset="public_chat")
    bob.join(room)
    long = alice.send(room, sticky_ms=60_000)
    short = alice.send(room, sticky_ms=6_000)
    eventually(lambda: is_recorded(homeserver, short), what="the last event")
    first = bob.sync(filter=NO_MESSAGES)
    assert ids(sticky_in(first, room)) == [long, short]
    sleep_until(expiry(homeserver, short))
    again = bob.sync(filter=NO_MESSAGES)
    assert ids(sticky_in(again, room)) == [long]
    assert again["next_batch"] == first["next_batch"]
    assert "using completed cached result" in homeserver.log()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_expired_rows_are_deleted(make_homeserver: MakeHomeserver, kind: str) -> None:
    # E4
    homeserver = make_homeserver(kind, module_config={"cleanup_interval": "1s"})
    homeserver.start()
    alice = homeserver.register()
    room = alice.create_room(preset="public_chat")
    short, long = alice.send(room, sticky_ms=8_000), alice.send(room, sticky_ms=600_000)
    eventually(lambda: is_recorded(homeserver, short) and is_recorded(homeserver, long))
    bob = homeserver.register()
    bob.join(room)
    joins = "SELECT member FROM synapse_sticky_joins WHERE member = ?"
    eventually(lambda: homeserver.query(joins, bob.user_id), what="the join")
    eventually(lambda: not is_recorded(homeserver, short), 20, "the deletion")
    # And not before.
    assert now_ms() >= expiry(homeserver, short)
    assert is_recorded(homeserver, long)
    # Of the event itself nothing is deleted.
    assert bob.event(room, short)[EVENT_KEY] == {"duration_ms": 8_000}
    # A join is kept for an hour: nothing that it made due is sticky for longer.
    assert homeserver.query(joins, bob.user_id)
    homeserver.execute("UPDATE synapse_sticky_joins SET expires_ts = ?", now_ms() + 300)
    eventually(lambda: not homeserver.query(joins, bob.user_id), what="the deletion of the join")
    assert is_recorded(homeserver, long)


@pytest.mark.slow
def test_receipt_is_remembered_over_a_restart(
    make_homeserver: MakeHomeserver, remote: RemoteServer
) -> None:
    # E7
    homeserver = make_homeserver("sqlite", federation=True)
    homeserver.start()
    alice = homeserver.register()
    room = alice.create_room(preset="public_chat")
    carol = remote.join(homeserver, room, "carol")
    ts = now_ms() + HOUR_MS
    short, event_id = (
        remote.send_event(room, carol, origin_server_ts=ts, **_stickiness(duration_ms)).event_id
        for duration_ms in (1_000, 600_000)
    )
    follow_until_seen(alice, room, [short, event_id])
    expires_ts = expiry(homeserver, event_id)
    homeserver.restart()
    assert expiry(homeserver, event_id) == expires_ts < now_ms() + 600_000
    for read in (partial(alice.sync, filter=NO_MESSAGES), partial(alice.event, room, event_id)):
        assert_counts_down(read, event_id, expires_ts)
    # One that is over does not begin anew, now that nobody remembers it.
    sleep_until(expiry(homeserver, short))
    assert REMAINING_KEY not in alice.event(room, short)["unsigned"]
    assert ids(sticky_in(alice.sync(filter=NO_MESSAGES), room)) == [event_id]


# Redactions


def _sync_until_gone(client: Client, room_id: str, event_id: str, since: str | None) -> None:
    """No answer from that token on has the event in the section, once readers have caught up."""

    def gone() -> bool:
        readers = client.homeserver.client_urls
        answers = [client.via(url).sync(since, filter=NO_MESSAGES) for url in readers]
        return not any(event_id in ids(sticky_in(answer, room_id)) for answer in answers)

    eventually(gone, what="the redacted event gone from the section")
    for _ in range(2):
        assert gone()


@pytest.mark.parametrize("moderated", [False, True], ids=["by the sender", "by a moderator"])
@pytest.mark.repeats("workers")
def test_a_redacted_event_is_not_sticky(
    homeserver: Homeserver, alice: Client, bob: Client, room: str, moderated: bool
) -> None:
    # E5
    sender = bob if moderated else alice
    since = bob.sync()["next_batch"]
    kept, redacted = (sender.send(room, sticky_ms=60_000) for _ in range(2))
    follow_until_seen(bob, room, [kept, redacted], since, filter=NO_MESSAGES)
    redaction = alice.redact(room, redacted)
    _sync_until_gone(bob, room, redacted, since)
    # Neither is the redaction promoted to a sticky event.
    followed = follow_until_seen(bob, room, [kept, redaction], since, filter=NO_MESSAGES)
    assert followed.sticky(room) == [kept]
    assert redaction not in followed.sticky(room)
    assert redaction in followed.timeline(room)
    assert follow_until_seen(bob, room, [kept], filter=NO_MESSAGES).sticky(room) == [kept]
    # Nor for those who join now.
    carol = homeserver.register()
    carol.join(room)
    assert follow_until_seen(carol, room, [kept], filter=NO_MESSAGES).sticky(room) == [kept]
    event = bob.event(room, redacted)
    assert event["content"] == {}
    assert REMAINING_KEY not in event["unsigned"]
    assert EVENT_KEY not in event
    assert_counts_down(partial(bob.event, room, kept), kept, expiry(homeserver, kept))


@pytest.mark.repeats("workers")
def test_a_user_without_power_redacts_nothing(alice: Client, bob: Client, room: str) -> None:
    # E5
    since = bob.sync()["next_batch"]
    event_id = alice.send(room, sticky_ms=60_000)
    with pytest.raises(MatrixError) as caught:
        bob.redact(room, event_id)
    assert caught.value.status == 403
    followed = follow_until_seen(bob, room, [event_id], since, filter=NO_MESSAGES)
    assert followed.sticky(room) == [event_id]


@pytest.mark.parametrize("version", ["1", "5", "11"])
@pytest.mark.repeats("workers")
def test_a_redaction_that_is_not_accepted_changes_nothing(
    homeserver: Homeserver, alice: Client, bob: Client, remote: RemoteServer, version: str
) -> None:
    # E5: from version 3 on such a redaction is stored, but not applied
    room = alice.create_room(preset="public_chat", room_version=version)
    bob.join(room)
    carol = remote.join(homeserver, room, "carol")
    since = bob.sync()["next_batch"]
    event_id = alice.send(room, text("stays"), sticky_ms=60_000)
    remote.wait_for(event_id)
    redacts = {"redacts": event_id}
    content, top_level = (redacts, {}) if version == "11" else ({}, redacts)
    remote.send_event(room, carol, content, "m.room.redaction", **top_level)
    last = remote.send_event(room, carol, **_stickiness(60_000)).event_id
    followed = follow_until_seen(bob, room, [event_id, last], since, filter=NO_MESSAGES)
    assert followed.sticky(room) == [event_id, last]
    event = bob.event(room, event_id)
    assert event["content"] == text("stays")
    assert_counts_down(partial(bob.event, room, event_id), event_id, expiry(homeserver, event_id))


@pytest.mark.parametrize("version", ["1", "11"])
@pytest.mark.repeats("workers")
def test_a_redaction_from_elsewhere_that_is_accepted(
    homeserver: Homeserver, alice: Client, bob: Client, remote: RemoteServer, version: str
) -> None:
    # E5
    room = alice.create_room(preset="public_chat", room_version=version)
    bob.join(room)
    carol = remote.join(homeserver, room, "carol")
    since = bob.sync()["next_batch"]
    event_id = remote.send_event(room, carol, text("goes"), **_stickiness(60_000)).event_id
    follow_until_seen(bob, room, [event_id], since, filter=NO_MESSAGES)
    redacts = {"redacts": event_id}
    content, top_level = (redacts, {}) if version == "11" else ({}, redacts)
    remote.send_event(room, carol, content, "m.room.redaction", **top_level)
    _sync_until_gone(bob, room, event_id, since)
    assert REMAINING_KEY not in bob.event(room, event_id)["unsigned"]


def test_a_sticky_redaction_is_delivered(
    homeserver: Homeserver, alice: Client, bob: Client
) -> None:
    # E5
    room = alice.create_room(preset="public_chat", room_version="11")
    bob.join(room)
    since = bob.sync()["next_batch"]
    target = alice.send(room, text("goes"), sticky_ms=60_000)
    redaction = alice.send(room, {"redacts": target}, "m.room.redaction", sticky_ms=60_000)
    wait_for_readers(bob, room, send_plain(alice, room, 11)[-1])
    followed = follow_until_seen(bob, room, [redaction], since)
    assert followed.sticky(room) == [redaction]
    assert_once(followed, room, [redaction])
    expires_ts = expiry(homeserver, redaction)
    (event,) = [e for answer in followed.answers for e in sticky_in(answer, room)]
    assert event[EVENT_KEY] == {"duration_ms": 60_000}
    assert event["content"]["redacts"] == target
    assert_counts_down(partial(bob.event, room, redaction), redaction, expires_ts)
    assert bob.event(room, target)["content"] == {}
