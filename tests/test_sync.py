"""Sticky events in `/sync`."""

import copy
import itertools
import json
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
from synapse.rest.admin.experimental_features import ExperimentalFeature

from harness.client import Client, JsonDict, MatrixError, quote
from harness.homeserver import Homeserver
from harness.wait import eventually
from tests.support import (
    DELAY_ID_KEY,
    EVENT_KEY,
    HOUR_MS,
    REMAINING_KEY,
    SYNC_SECTION,
    MakeHomeserver,
    all_sticky_in,
    assert_once,
    follow,
    follow_until_seen,
    ids,
    joined_room,
    quiet_token,
    remaining_ms,
    send_plain,
    send_sticky,
    sticky_in,
    text,
    timeline_in,
    until_ignored,
    wait_for_readers,
)

# Lets no message through, so that sticky messages come in the section.
# One process is there with SQLite, and PostgreSQL with the workers.
pytestmark = pytest.mark.repeats("postgres")

NO_MESSAGES = {"room": {"timeline": {"not_types": ["m.room.message"]}}}


def _limit(limit: int) -> JsonDict:
    return {"room": {"timeline": {"limit": limit}}}


# C1: whatever lies outside of the timeline


@pytest.mark.parametrize("limit", [0, 1, 2, 10])
@pytest.mark.repeats("workers")
def test_initial_sync(alice: Client, bob: Client, room: str, limit: int) -> None:
    # C1, C2, C10
    sent = send_sticky(alice, room, 3)
    (last,) = send_plain(alice, room, 1)
    wait_for_readers(bob, room, last)
    followed = follow_until_seen(bob, room, sent, filter=_limit(limit))
    assert_once(followed, room, sent)
    shown = followed.timeline(room)
    assert followed.sticky(room) == [event_id for event_id in sent if event_id not in shown]
    # Not by way of a longer timeline.
    assert len(timeline_in(followed.answers[0], room)) <= max(limit, 1)
    assert limit == 10 or followed.sticky(room)


@pytest.mark.repeats("workers")
def test_a_gap_between_two_syncs(alice: Client, bob: Client, room: str) -> None:
    # C1
    since = quiet_token(bob)
    sent = send_sticky(alice, room, 3)
    plain = send_plain(alice, room, 12)
    wait_for_readers(bob, room, plain[-1])
    followed = follow_until_seen(bob, room, [*sent, plain[-1]], since)
    assert followed.sticky(room) == sent
    assert followed.timeline(room) == plain[-10:]


@pytest.mark.repeats("workers")
def test_every_joined_room(alice: Client, bob: Client, room: str) -> None:
    # C1
    other = alice.create_room(preset="public_chat")
    bob.join(other)
    quiet = alice.create_room(preset="public_chat")
    bob.join(quiet)
    sent = {name: send_sticky(alice, name, 2) for name in (room, other)}
    for initial in (True, False):
        since = None if initial else quiet_token(bob)
        for name in sent:
            sent[name] += send_sticky(alice, name, 1)
        followed = follow(
            bob,
            since,
            until=lambda f: all(sent[name][-1] in f.sticky(name) for name in sent),
            filter=NO_MESSAGES,
        )
        for name in sent:
            expected = sent[name] if initial else sent[name][-1:]
            assert followed.sticky(name) == expected
        assert followed.sticky(quiet) == []


# C2: timelines and filters


@pytest.mark.repeats("workers")
def test_what_the_timeline_shows_is_not_in_the_section(
    alice: Client, bob: Client, room: str
) -> None:
    # C2
    since = quiet_token(bob)
    sent = []
    for _ in range(4):
        sent += [*send_sticky(alice, room), *send_plain(alice, room, 1)]
    for token in (since, None):
        followed = follow_until_seen(bob, room, sent, token)
        assert_once(followed, room, sent)
        assert followed.sticky(room) == []
        for answer in followed.answers:
            # Clients that do not know the section are not bothered with an empty one.
            assert SYNC_SECTION not in joined_room(answer, room)


@pytest.mark.repeats("workers")
def test_a_timeline_filter_moves_events_to_the_section(
    alice: Client, bob: Client, room: str
) -> None:
    # C2
    since = quiet_token(bob)
    member = alice.send(room, {"call": 1}, "org.example.member", sticky_ms=HOUR_MS)
    message = alice.send(room, sticky_ms=HOUR_MS)
    own = bob.send(room, sticky_ms=HOUR_MS)
    wait_for_readers(bob, room, own)
    # What each filter leaves in the timeline.
    timelines: list[tuple[JsonDict, list[str]]] = [
        ({"types": ["m.room.message"]}, [message, own]),
        ({"types": ["org.example.*"]}, [member]),
        ({"types": []}, []),
        ({"not_types": ["org.example.member"]}, [message, own]),
        ({"not_types": ["*"]}, []),
        ({"senders": [bob.user_id]}, [own]),
        ({"not_senders": [alice.user_id]}, [own]),
        ({"not_senders": [alice.user_id, bob.user_id]}, []),
        ({"contains_url": True}, []),
        ({"rooms": []}, []),
        ({"rooms": ["!elsewhere:example.org"]}, []),
        ({"not_rooms": [room]}, []),
        ({"lazy_load_members": True}, [member, message, own]),
        ({"lazy_load_members": True, "types": ["m.room.message"]}, [message, own]),
        ({"limit": 1, "types": ["org.example.member"]}, [member]),
    ]
    everything = [member, message, own]
    for timeline_filter, in_timeline in timelines:
        for token in (since, None):
            filter_json = {"room": {"timeline": timeline_filter}}
            followed = follow_until_seen(bob, room, everything, token, filter=filter_json)
            assert_once(followed, room, everything)
            shown = [name for name in followed.timeline(room) if name in everything]
            assert shown == in_timeline, (timeline_filter, token)
            assert followed.sticky(room) == [e for e in everything if e not in in_timeline]


@pytest.mark.repeats("workers")
def test_other_filters_do_not_touch_the_section(alice: Client, bob: Client, room: str) -> None:
    # C2
    sent = send_sticky(alice, room, 2)
    filters: list[JsonDict] = [
        {"state": {"types": []}},
        {"state": {"not_types": ["*"]}},
        {"state": {"not_senders": [alice.user_id]}},
        {"state": {"not_rooms": [room]}},
        {"state": {"rooms": []}},
        {"state": {"lazy_load_members": True}},
        {"ephemeral": {"types": []}, "account_data": {"types": []}},
        {"include_leave": True},
    ]
    for room_filter in filters:
        filter_json = {"room": {**room_filter, **NO_MESSAGES["room"]}}
        followed = follow_until_seen(bob, room, sent, filter=filter_json)
        assert followed.sticky(room) == sent, room_filter
    filter_json = {"presence": {"types": []}, "account_data": {"types": []}, **NO_MESSAGES}
    assert follow_until_seen(bob, room, sent, filter=filter_json).sticky(room) == sent


@pytest.mark.repeats("workers")
def test_stored_filters(alice: Client, bob: Client, room: str) -> None:
    # C2
    sent = send_sticky(alice, room, 2)
    path = f"/_matrix/client/v3/user/{quote(bob.user_id)}/filter"
    filter_id = bob.request("POST", path, json=NO_MESSAGES)["filter_id"]
    followed = follow_until_seen(bob, room, sent, filter=filter_id)
    assert followed.sticky(room) == sent


@pytest.mark.repeats("workers")
def test_the_rooms_of_a_filter_are_those_of_the_section(
    alice: Client, bob: Client, room: str
) -> None:
    # C2
    other = alice.create_room(preset="public_chat")
    bob.join(other)
    since = quiet_token(bob)
    sent = {name: send_sticky(alice, name, 2) for name in (room, other)}
    # Both are known by now.
    follow_until_seen(bob, other, sent[other], since, filter=NO_MESSAGES)
    follow_until_seen(bob, room, sent[room], since, filter=NO_MESSAGES)
    wanted: list[tuple[JsonDict, set[str]]] = [
        ({"rooms": [room]}, {room}),
        ({"not_rooms": [room]}, {other}),
        ({"rooms": [room, other], "not_rooms": [other]}, {room}),
        ({"rooms": []}, set()),
        ({"rooms": [room], "not_rooms": [room]}, set()),
        ({"rooms": ["!elsewhere:example.org"]}, set()),
        ({}, {room, other}),
    ]
    for room_filter, rooms in wanted:
        filter_json = {"room": {**room_filter, **NO_MESSAGES["room"]}}
        for token in (since, None):

            def answer_is_right(token: str | None = token) -> bool:
                answer = bob.sync(token, filter=filter_json)  # noqa: B023
                found = {name: ids(sticky_in(answer, name)) for name in sent}
                assert found == {n: sent[n] if n in rooms else [] for n in sent}  # noqa: B023
                return True

            eventually(answer_is_right, what=str(room_filter))


# C3: like a stream


def test_each_event_comes_once(alice: Client, bob: Client, room: str) -> None:
    # C3
    since: str | None = None
    everything: list[str] = []
    delivered: list[str] = []
    for _ in range(4):
        sent = send_sticky(alice, room, 2)
        followed = follow_until_seen(bob, room, sent, since, filter=NO_MESSAGES)
        since = followed.next_batch
        everything += sent
        delivered += followed.sticky(room)
    assert delivered == everything


@pytest.mark.repeats("workers")
def test_a_lost_response_loses_nothing(alice: Client, bob: Client, room: str) -> None:
    # C3
    since = quiet_token(bob)
    sent = send_sticky(alice, room, 3)
    for _ in range(3):
        # Every time somebody else looks at it from the same token on.
        followed = follow_until_seen(bob, room, sent, since, filter=NO_MESSAGES)
        assert followed.sticky(room) == sent
    more = send_sticky(alice, room, 1)
    again = follow_until_seen(bob, room, more, since, filter=NO_MESSAGES)
    assert again.sticky(room) == sent + more
    # The answer that did arrive goes on from where it ended.
    rest = follow_until_seen(bob, room, more, followed.next_batch, filter=NO_MESSAGES)
    assert rest.sticky(room) == more


@pytest.mark.repeats("workers")
def test_devices_read_independently(alice: Client, bob: Client, room: str) -> None:
    # C3
    sent = send_sticky(alice, room, 2)
    tablet = bob.second_device()
    for device in (bob, tablet):
        followed = follow_until_seen(device, room, sent, filter=NO_MESSAGES)
        assert followed.sticky(room) == sent


@pytest.mark.slow
def test_nothing_comes_twice_while_others_send(
    homeserver: Homeserver, alice: Client, bob: Client, room: str
) -> None:
    # C1, C2, C3: every order in which a sync and the noticing of events may overlap
    other = alice.create_room(preset="public_chat")
    carol, dave = homeserver.register(), homeserver.register()
    for client in (bob, carol):
        client.join(other)
    carol.join(room)
    tokens = {client: quiet_token(client) for client in (bob, carol)}
    filters = {bob: _limit(1), carol: _limit(3)}
    with ThreadPoolExecutor(8) as pool:
        sending = [
            pool.submit(send_sticky, sender, name, 20)
            for sender, name in ((alice, room), (bob, room), (alice, other))
        ]
        finished = _all_done(sending)

        def watch(client: Client) -> list[list[str]]:
            followed = follow(
                client,
                tokens[client],
                until=lambda f: (
                    finished()
                    and {e for s in sending for e in s.result()} <= {*f.seen(room), *f.seen(other)}
                ),
                timeout_s=60,
                timeout_ms=200,
                filter=filters[client],
            )
            return [followed.seen(room), followed.seen(other)]

        watching = {client: pool.submit(watch, client) for client in tokens}
        # Who joins in the middle of it gets all of them once, too.
        dave.join(room)
        late = pool.submit(
            follow,
            dave,
            None,
            until=lambda f: (
                finished() and {*sending[0].result(), *sending[1].result()} <= set(f.seen(room))
            ),
            timeout_s=60,
            timeout_ms=200,
            filter=_limit(2),
        )
        in_room = sending[0].result() + sending[1].result()
        in_other = sending[2].result()
        for client, watched in watching.items():
            seen_in_room, seen_in_other = watched.result()
            assert _counts(seen_in_room, in_room) == dict.fromkeys(in_room, 1), client
            assert _counts(seen_in_other, in_other) == dict.fromkeys(in_other, 1), client
        assert_once(late.result(), room, in_room)


def _all_done(futures: Iterable["Future[Any]"]) -> Callable[[], bool]:
    return lambda: all(future.done() for future in futures)


def _counts(seen: list[str], wanted: list[str]) -> dict[str, int]:
    return {event_id: seen.count(event_id) for event_id in wanted}


# C4: pages


@pytest.mark.slow
@pytest.mark.repeats("workers")
@pytest.mark.any_synapse
def test_pages(homeserver: Homeserver, alice: Client, bob: Client, room: str) -> None:
    # C1, C4, C5, C8, C10
    mallory, carol = homeserver.register(), homeserver.register()
    for client in (mallory, carol):
        client.join(room)
    bob.set_ignored_users([mallory.user_id])
    tokens = {client: quiet_token(client) for client in (bob, carol)}
    with ThreadPoolExecutor(5) as pool:
        flood = [pool.submit(send_sticky, mallory, room, 50) for _ in range(5)]
        ignored = {event_id for future in flood for event_id in future.result()}
    sent = send_sticky(alice, room, 5)
    wait_for_readers(bob, room, sent[-1])
    in_order = [
        event_id
        for (event_id,) in homeserver.query(
            "SELECT event_id FROM events WHERE room_id = ? AND type = 'm.room.message' "
            "ORDER BY stream_ordering",
            room,
        )
    ]
    assert set(in_order) == ignored | set(sent)

    # Who ignores nobody gets all of it, page by page, and waits for none of them.
    eventually(partial(_is_noticed, carol, room, sent[-1], tokens[carol]), what="the last event")
    started = time.monotonic()
    pages, token = [], tokens[carol]
    for _ in range(3):
        answer = carol.sync(token, timeout_ms=30_000, filter=NO_MESSAGES)
        token = answer["next_batch"]
        pages.append(ids(sticky_in(answer, room)))
    assert time.monotonic() - started < 15
    assert [len(page) for page in pages] == [100, 100, 55]
    assert [event_id for page in pages for event_id in page] == in_order
    assert ids(all_sticky_in(carol.sync(token, filter=NO_MESSAGES))) == []
    # In an initial sync likewise.
    followed = follow_until_seen(carol, room, in_order, filter=NO_MESSAGES)
    assert followed.sticky(room) == in_order
    assert [len(sticky_in(answer, room)) for answer in followed.answers[:3]] == [100, 100, 55]

    # Who does not want to hear of those 250 is not held up by them.
    answer = bob.sync(tokens[bob], timeout_ms=30_000, filter=NO_MESSAGES)
    assert ids(sticky_in(answer, room)) == sent
    followed = follow_until_seen(bob, room, sent, tokens[bob])
    assert_once(followed, room, sent)
    assert not ignored.intersection(followed.seen(room))

    # Who joins now gets everything, even in one response.
    dave = homeserver.register()
    since = dave.sync()["next_batch"]
    dave.join(room)
    for start in (since, None):
        followed = follow_until_seen(dave, room, in_order, start)
        assert_once(followed, room, in_order)
        timeline = followed.timeline(room)
        assert followed.sticky(room) == [name for name in in_order if name not in timeline]

    # What the timeline of the first answer shows does not come again on a later page.
    for start in (tokens[carol], None):
        followed = follow_until_seen(carol, room, in_order, start)
        assert_once(followed, room, in_order)
        shown = {*ids(timeline_in(followed.answers[0], room))}.intersection(in_order)
        assert shown
        counts = [len(sticky_in(answer, room)) for answer in followed.answers[:3]]
        assert counts == [100, 100, 55 - len(shown)]
        # Until the last page the token says more than a position; it is as good as any other.
        more_than_a_position = followed.answers[0]["next_batch"]
        assert len(more_than_a_position) > len(followed.answers[-1]["next_batch"])
        page = carol.messages(room, dir="b", limit=5, **{"from": more_than_a_position})
        assert in_order[-1] in ids(page["chunk"])
        bounds = {"from": more_than_a_position, "to": followed.next_batch}
        carol.request("GET", "/_matrix/client/v3/keys/changes", params=bounds)


def _is_noticed(client: Client, room_id: str, event_id: str, since: str) -> bool:
    """Whether the sections of every client reader go as far as to this event by now."""
    for url in client.homeserver.client_urls:
        token, found = since, [""]
        seen: list[str] = []
        while found:
            answer = client.via(url).sync(token, filter=NO_MESSAGES)
            token, found = answer["next_batch"], ids(sticky_in(answer, room_id))
            seen += found
        if event_id not in seen:
            return False
    return True


@pytest.mark.slow
@pytest.mark.any_synapse
def test_small_pages(make_homeserver: MakeHomeserver) -> None:
    # C3, C4, C5
    homeserver = make_homeserver("sqlite", module_config={"max_events_per_sync": 3})
    homeserver.start()
    alice, bob, mallory = (homeserver.register() for _ in range(3))
    rooms = [alice.create_room(preset="public_chat") for _ in range(2)]
    for room_id in rooms:
        bob.join(room_id)
        mallory.join(room_id)
    since = quiet_token(bob)
    sent: list[str] = []
    for _ in range(4):
        for room_id in rooms:
            sent += send_sticky(alice, room_id)
    eventually(lambda: _is_noticed(bob, rooms[1], sent[-1], since))

    # Both rooms share a page, oldest first; a page that was lost comes again.
    token, expected = since, list(sent)
    while expected:
        answers = [bob.sync(token, timeout_ms=30_000, filter=NO_MESSAGES) for _ in range(2)]
        for answer in answers:
            assert set(ids(all_sticky_in(answer))) == set(expected[:3])
            for room_id in rooms:
                in_room = ids(sticky_in(answer, room_id))
                assert in_room == [name for name in expected[:3] if name in in_room]
        token, expected = answers[0]["next_batch"], expected[3:]

    # Events that stay unseen, between, before and after those that are seen.
    bob.set_ignored_users([mallory.user_id])
    token = quiet_token(bob)
    wanted: list[str] = []
    for _ in range(4):
        send_sticky(mallory, rooms[0], 5)
        wanted += send_sticky(alice, rooms[0])
    send_sticky(mallory, rooms[0], 5)
    eventually(lambda: _is_noticed(bob, rooms[0], wanted[-1], token))
    answer = bob.sync(token, timeout_ms=30_000, filter=NO_MESSAGES)
    assert ids(sticky_in(answer, rooms[0])) == wanted[:3]
    answer = bob.sync(answer["next_batch"], timeout_ms=30_000, filter=NO_MESSAGES)
    assert ids(sticky_in(answer, rooms[0])) == wanted[3:]
    started = time.monotonic()
    answer = bob.sync(answer["next_batch"], timeout_ms=1_000, filter=NO_MESSAGES)
    assert all_sticky_in(answer) == []
    assert time.monotonic() - started > 0.9

    # A join in the middle: what it makes due stays together, and nothing is lost around it.
    third = alice.create_room(preset="public_chat")
    early = send_sticky(alice, third, 5)
    token = quiet_token(bob)
    before = send_sticky(alice, rooms[1], 4)
    bob.join(third)
    after = send_sticky(alice, rooms[1], 4)
    followed = follow(
        bob,
        token,
        until=lambda f: set(before + after) <= set(f.seen(rooms[1])) and early[-1] in f.seen(third),
        filter=NO_MESSAGES,
    )
    assert followed.sticky(rooms[1]) == before + after
    assert followed.sticky(third) == early

    # What a timeline shows comes neither on a later page nor takes space on this one.
    for since_or_none in (since, None):
        followed = follow(
            bob,
            since_or_none,
            until=lambda f: {*sent, *before, *after} <= {*f.seen(rooms[0]), *f.seen(rooms[1])},
            filter=_limit(10),
        )
        assert_once(followed, rooms[0], sent[0::2])
        assert_once(followed, rooms[1], [*sent[1::2], *before, *after])
        assert_once(followed, third, early)


# C5: joining


def test_who_joins_gets_everything(
    homeserver: Homeserver, alice: Client, bob: Client, room: str
) -> None:
    # C5
    sent = send_sticky(alice, room, 3)
    (last,) = send_plain(alice, room, 12)[-1:]
    wait_for_readers(alice, room, last)
    carol = homeserver.register()
    for since in (None, quiet_token(carol)):
        carol.join(room)
        followed = follow_until_seen(carol, room, sent, since)
        assert followed.sticky(room) == sent
        carol.leave(room)


@pytest.mark.repeats("workers")
def test_who_joins_again_gets_everything_again(alice: Client, bob: Client, room: str) -> None:
    # C5
    sent = send_sticky(alice, room, 2)
    token = follow_until_seen(bob, room, sent, filter=NO_MESSAGES).next_batch
    for invited in (False, True):
        bob.leave(room)
        token = follow(
            bob, token, until=lambda f: any(_left(a, room) for a in f.answers)
        ).next_batch
        sent += send_sticky(alice, room, 1)
        if invited:
            alice.invite(room, bob.user_id)
        bob.join(room)
        followed = follow_until_seen(bob, room, sent, token, filter=NO_MESSAGES)
        assert followed.sticky(room) == sent
        token = followed.next_batch
    # From between two syncs as well: the client never saw itself leave.
    bob.leave(room)
    bob.join(room)
    followed = follow_until_seen(bob, room, sent, token, filter=NO_MESSAGES)
    assert followed.sticky(room) == sent


def _left(answer: JsonDict, room_id: str) -> bool:
    return room_id in answer.get("rooms", {}).get("leave", {})


@pytest.mark.repeats("workers")
def test_a_new_name_is_no_join(alice: Client, bob: Client, room: str) -> None:
    # C5
    sent = send_sticky(alice, room, 2)
    token = follow_until_seen(bob, room, sent, filter=NO_MESSAGES).next_batch
    bob.set_display_name("Robert")
    path = f"/_matrix/client/v3/rooms/{quote(room)}/state/m.room.member/{quote(bob.user_id)}"
    eventually(lambda: bob.request("GET", path).get("displayname") == "Robert")
    # The same again, by hand: still a change from join to join.
    member = {"membership": "join", "displayname": "Bobby"}
    renamed = bob.send_state(room, "m.room.member", member, bob.user_id)
    more = send_sticky(alice, room, 1)
    followed = follow_until_seen(bob, room, [renamed, *more], token, filter=NO_MESSAGES)
    assert followed.sticky(room) == more


# C6: long-polls


def _seconds(call: Callable[[], JsonDict]) -> tuple[float, JsonDict]:
    started = time.monotonic()
    answer = call()
    return time.monotonic() - started, answer


def test_long_polls_wake(alice: Client, bob: Client, room: str) -> None:
    # C6
    with ThreadPoolExecutor(2) as pool:
        for filter_json in (NO_MESSAGES, None):
            since = quiet_token(bob)
            waiting = pool.submit(bob.sync, since, 20_000, filter_json)
            time.sleep(0.5)
            assert not waiting.done()
            (sent,) = send_sticky(alice, room)
            seconds, answer = _seconds(partial(waiting.result, 30))
            assert seconds < 10
            found = sticky_in(answer, room) + timeline_in(answer, room)
            assert ids(found) == [sent]


def test_idle_long_polls_sleep(
    homeserver: Homeserver, alice: Client, bob: Client, room: str
) -> None:
    # C6
    other = alice.create_room(preset="public_chat")
    mallory = homeserver.register()
    mallory.join(room)
    mallory.join(other)
    bob.set_ignored_users([mallory.user_id])
    sent = send_sticky(alice, room, 2)
    follow_until_seen(bob, room, sent, filter=NO_MESSAGES)
    since = quiet_token(bob)
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(_seconds, partial(bob.sync, since, 3_000, NO_MESSAGES))
        # Neither what goes on elsewhere nor what he is not to see concerns bob.
        for _ in range(3):
            time.sleep(0.3)
            send_sticky(mallory, other)
            send_sticky(alice, other)
            send_sticky(mallory, room)
        seconds, answer = waiting.result(30)
    assert seconds > 2.9
    assert "rooms" not in answer or not answer["rooms"].get("join")
    # And what he missed meanwhile is nothing.
    more = send_sticky(alice, room, 1)
    followed = follow_until_seen(bob, room, more, answer["next_batch"], filter=NO_MESSAGES)
    assert followed.sticky(room) == more


# C7: the format


def _without_times(event: JsonDict) -> JsonDict:
    """An event without what counts down or up, and without the id of its room."""
    event = copy.deepcopy(event)
    event.pop("room_id", None)
    if "unsigned" in event:
        event["unsigned"].pop("age", None)
        if REMAINING_KEY in event["unsigned"]:
            event["unsigned"][REMAINING_KEY] = "some"
    event.pop("age", None)
    return event


FORMATS: list[JsonDict] = [
    {},
    {"event_format": "federation"},
    {"event_fields": ["event_id", "type", "content.body"]},
    {"event_fields": ["event_id", "unsigned"]},
    {"event_fields": ["event_id", "unsigned.transaction_id"]},
    {"event_fields": ["event_id", f"unsigned.{REMAINING_KEY}"]},
    {"event_fields": ["event_id", EVENT_KEY]},
    {"event_fields": ["event_id", "room_id"]},
    {"event_fields": ["content"]},
    {"event_format": "federation", "event_fields": ["event_id", "hashes"]},
]


@pytest.mark.repeats("workers")
def test_the_section_is_formatted_as_the_timeline_is(alice: Client, bob: Client, room: str) -> None:
    # C7, E3
    sent = alice.send(room, {**text("hello"), "more": 1}, sticky_ms=HOUR_MS)
    wait_for_readers(bob, room, sent)
    follow_until_seen(bob, room, [sent], filter=NO_MESSAGES)
    for client in (alice, alice.second_device(), bob):
        for format_json in FORMATS:
            timeline = client.sync(filter={**format_json, **_limit(1)})
            ((in_timeline,),) = (timeline_in(timeline, room),)
            answer = eventually(partial(_answer_with_section, client, room, format_json))
            (in_section,) = sticky_in(answer, room)
            assert _without_times(in_section) == _without_times(in_timeline), format_json
            assert in_section["room_id"] == room
            fields = format_json.get("event_fields", ["unsigned"])
            if {"unsigned", f"unsigned.{REMAINING_KEY}"}.intersection(fields):
                assert remaining_ms(in_section), format_json


def _answer_with_section(
    client: Client, room_id: str, more: JsonDict, since: str | None = None
) -> JsonDict | None:
    answer = client.sync(since, filter={**NO_MESSAGES, **more})
    return answer if sticky_in(answer, room_id) else None


@pytest.mark.repeats("workers")
def test_what_an_event_in_the_section_looks_like(alice: Client, bob: Client, room: str) -> None:
    # C7, E3
    sent = alice.send(room, text("hello"), sticky_ms=60_000, txn_id="txn-of-alice")
    answers = [
        eventually(partial(_answer_with_section, client, room, {}))
        for client in (alice, alice.second_device(), bob)
    ]
    for answer in answers:
        (event,) = sticky_in(answer, room)
        assert event["event_id"] == sent
        assert event["type"] == "m.room.message"
        assert event["sender"] == alice.user_id
        assert event["room_id"] == room
        assert event["content"] == text("hello")
        assert event[EVENT_KEY] == {"duration_ms": 60_000}
        assert isinstance(event["origin_server_ts"], int)
        assert 0 < (remaining_ms(event) or 0) <= 60_000
        # Keys between servers are no concern of clients.
        assert not {"hashes", "signatures", "depth", "prev_events"}.intersection(event)
        own = answer is answers[0]
        assert event["unsigned"].get("transaction_id") == ("txn-of-alice" if own else None)
    answer = eventually(partial(_answer_with_section, bob, room, {"event_format": "federation"}))
    (event,) = sticky_in(answer, room)
    assert {"hashes", "signatures", "depth", "prev_events", "room_id"} <= event.keys()


@pytest.mark.repeats("workers")
def test_the_delay_id_is_for_the_sender(alice: Client, bob: Client, room: str) -> None:
    # C7, S2
    delay_id = alice.send(room, text("late"), sticky_ms=HOUR_MS, delay_ms=1)
    for client in (alice, alice.second_device(), bob):
        answer = eventually(partial(_answer_with_section, client, room, {}))
        (event,) = sticky_in(answer, room)
        wait_for_readers(client, room, event["event_id"])
        elsewhere = client.event(room, event["event_id"])["unsigned"].get(DELAY_ID_KEY)
        assert event["unsigned"].get(DELAY_ID_KEY) == elsewhere
        # It is for the sender only. Old releases do not give it to anybody.
        assert elsewhere in ((None, delay_id) if client.user_id == alice.user_id else (None,))


# C8: who gets nothing


@pytest.mark.repeats("workers")
def test_ignored_senders(homeserver: Homeserver, alice: Client, bob: Client, room: str) -> None:
    # C8
    mallory = homeserver.register()
    mallory.join(room)
    since = quiet_token(bob)
    before = send_sticky(mallory, room, 1)
    follow_until_seen(bob, room, before, since, filter=NO_MESSAGES)
    bob.set_ignored_users([mallory.user_id])
    after = send_sticky(mallory, room, 2)
    sent = send_sticky(alice, room, 1)
    for token in (since, None):

        def only_alice(token: str | None = token) -> bool:
            # Readers of other processes may not know yet whom bob ignores.
            followed = follow_until_seen(bob, room, sent, token, filter=NO_MESSAGES)
            return followed.sticky(room) == sent

        eventually(only_alice, what="nothing of the ignored user")
    followed = follow_until_seen(bob, room, sent, None, filter=_limit(1))
    assert not {*before, *after}.intersection(followed.seen(room))


# X8: who is not ignored any more


@pytest.mark.parametrize("timeline_limit", [1, 10])
@pytest.mark.repeats("workers")
def test_who_stops_ignoring_gets_what_was_left_out(
    homeserver: Homeserver, alice: Client, bob: Client, room: str, timeline_limit: int
) -> None:
    # X8, C3
    mallory = homeserver.register()
    mallory.join(room)
    arguments: dict[str, Any] = {"filter": _limit(timeline_limit)}
    bob.set_ignored_users([mallory.user_id])
    until_ignored(bob, mallory)
    since = quiet_token(bob)
    hidden = send_sticky(mallory, room, 2)
    sent = send_sticky(alice, room, 2)
    plain = send_plain(alice, room, timeline_limit)
    followed = follow_until_seen(bob, room, [*sent, *plain], since, **arguments)
    assert not set(hidden).intersection(followed.seen(room))
    # What comes in between does not make it forgotten, nor does to ignore somebody else.
    more = send_sticky(alice, room)
    followed = follow_until_seen(bob, room, more, followed.next_batch, **arguments)
    bob.set_ignored_users([mallory.user_id, alice.user_id])
    until_ignored(bob, alice)
    followed = follow(bob, followed.next_batch, until=lambda f: True, **arguments)
    assert followed.seen(room) == []
    bob.set_ignored_users([alice.user_id])
    for _ in range(2):
        # The same request gets the same.
        again = follow_until_seen(bob, room, hidden, followed.next_batch, **arguments)
        assert again.sticky(room) == hidden
        assert again.timeline(room) == []
    # Then it is as if nothing had been.
    newest = send_sticky(mallory, room)
    followed = follow_until_seen(bob, room, newest, again.next_batch, **arguments)
    assert followed.seen(room) == newest


@pytest.mark.repeats("workers")
def test_who_stops_ignoring_gets_what_they_had_before(
    homeserver: Homeserver, alice: Client, bob: Client, room: str
) -> None:
    """A client may have thrown away what it had of the ignored user."""
    # X8
    mallory = homeserver.register()
    mallory.join(room)
    before = send_sticky(mallory, room, 2)
    sent = send_sticky(alice, room)
    followed = follow_until_seen(bob, room, [*before, *sent], filter=NO_MESSAGES)
    bob.set_ignored_users([mallory.user_id])
    until_ignored(bob, mallory)
    followed = follow(bob, followed.next_batch, until=lambda f: True, filter=NO_MESSAGES)
    assert followed.seen(room) == []
    bob.set_ignored_users([])
    followed = follow_until_seen(bob, room, before, followed.next_batch, filter=NO_MESSAGES)
    assert followed.sticky(room) == before


def test_the_next_answer_after_ignoring(make_homeserver: MakeHomeserver) -> None:
    # X8: on one process at once, whatever else the filter lets through; also beyond a page
    homeserver = make_homeserver(module_config={"max_events_per_sync": 3})
    homeserver.start()
    alice, bob, mallory = (homeserver.register() for _ in range(3))
    rooms = [alice.create_room(preset="public_chat") for _ in range(2)]
    for client, room in itertools.product((bob, mallory), rooms):
        client.join(room)
    bob.set_ignored_users([mallory.user_id])
    hidden = [send_sticky(mallory, room, 4) for room in rooms]
    sent = send_sticky(alice, rooms[0], 4)
    arguments: dict[str, Any] = {
        "filter": {**NO_MESSAGES, "account_data": {"not_types": ["*"]}},
    }
    follow_until_seen(alice, rooms[0], sent, filter=NO_MESSAGES)
    pages: list[list[str]] = []
    token: str | None = None
    for _ in range(3):
        answer = bob.sync(token, **arguments)
        token = answer["next_batch"]
        pages.append(ids(all_sticky_in(answer)))
    assert pages == [sent[:3], sent[3:], []]
    with ThreadPoolExecutor(1) as pool:
        poll = pool.submit(bob.sync, token, timeout_ms=30_000, **arguments)
        time.sleep(0.5)
        started = time.monotonic()
        assert not poll.done()
        bob.set_ignored_users([])
        answer = poll.result()
        assert time.monotonic() - started < 10
    assert [ids(sticky_in(answer, room)) for room in rooms] == hidden
    assert all_sticky_in(bob.sync(answer["next_batch"], **arguments)) == []


@pytest.mark.repeats("workers")
def test_long_polls_wake_for_who_is_not_ignored_any_more(
    homeserver: Homeserver, alice: Client, bob: Client, room: str
) -> None:
    # X8, C6: even if the answer has nothing else, and whichever process is told first
    mallory = homeserver.register()
    mallory.join(room)
    hidden = send_sticky(mallory, room)
    arguments: dict[str, Any] = {
        "filter": {**NO_MESSAGES, "account_data": {"not_types": ["*"]}},
    }
    for url in homeserver.client_urls * 3:
        reader = bob.via(url)
        bob.set_ignored_users([mallory.user_id])
        until_ignored(bob, mallory)
        sent = send_sticky(alice, room)
        token = follow_until_seen(reader, room, sent, **arguments).next_batch
        with ThreadPoolExecutor(1) as pool:
            poll = pool.submit(reader.sync, token, timeout_ms=30_000, **arguments)
            time.sleep(0.5)
            assert not poll.done()
            started = time.monotonic()
            bob.set_ignored_users([])
            answer = poll.result()
            assert time.monotonic() - started < 10
        assert ids(sticky_in(answer, room)) == hidden
        assert all_sticky_in(reader.sync(answer["next_batch"], **arguments)) == []


@pytest.mark.repeats("workers")
def test_who_left_does_not_get_what_was_left_out(
    homeserver: Homeserver, alice: Client, bob: Client, room: str
) -> None:
    # X8, C8, C5
    mallory = homeserver.register()
    mallory.join(room)
    bob.set_ignored_users([mallory.user_id])
    until_ignored(bob, mallory)
    hidden = send_sticky(mallory, room)
    sent = send_sticky(alice, room)
    followed = follow_until_seen(bob, room, sent, filter=NO_MESSAGES)
    bob.leave(room)
    bob.set_ignored_users([])
    until_ignored(bob, mallory, ignored=False)
    followed = follow(bob, followed.next_batch, until=lambda f: True, filter=NO_MESSAGES)
    assert followed.sticky(room) == []
    bob.join(room)
    followed = follow_until_seen(bob, room, hidden + sent, followed.next_batch, filter=NO_MESSAGES)
    assert followed.sticky(room) == hidden + sent


def _leave(alice: Client, bob: Client, room_id: str) -> None:
    bob.leave(room_id)


def _kick(alice: Client, bob: Client, room_id: str) -> None:
    alice.kick(room_id, bob.user_id)


def _ban(alice: Client, bob: Client, room_id: str) -> None:
    alice.ban(room_id, bob.user_id)


def _invite_again(alice: Client, bob: Client, room_id: str) -> None:
    bob.leave(room_id)
    alice.invite(room_id, bob.user_id)


@pytest.mark.repeats("workers")
def test_who_is_not_in_the_room_gets_nothing(alice: Client, bob: Client, room: str) -> None:
    # C8
    parts = (_leave, _kick, _ban, _invite_again)
    rooms = {alice.create_room(preset="public_chat"): part for part in parts}
    for room_id in rooms:
        bob.join(room_id)
    since = quiet_token(bob)
    unseen = {room_id: send_sticky(alice, room_id, 2) for room_id in rooms}
    for room_id, part in rooms.items():
        follow_until_seen(alice, room_id, unseen[room_id], filter=NO_MESSAGES)
        part(alice, bob, room_id)
        unseen[room_id] += send_sticky(alice, room_id, 2)
    # Once this arrives, what was sent before would have arrived.
    (last,) = send_sticky(alice, room)
    for include_leave in (False, True):
        filter_json = {"room": {"include_leave": include_leave, **NO_MESSAGES["room"]}}
        for token in (since, None):
            followed = follow_until_seen(bob, room, [last], token, filter=filter_json)
            everything = json.dumps(followed.answers)
            for room_id, part in rooms.items():
                assert room_id in everything or not include_leave
                for event_id in unseen[room_id]:
                    assert event_id not in everything, part.__name__
            for answer in followed.answers:
                for kind, entries in answer.get("rooms", {}).items():
                    for room_id, part in rooms.items():
                        assert SYNC_SECTION not in entries.get(room_id, {}), (kind, part)


@pytest.mark.repeats("workers")
def test_who_was_never_in_the_room_gets_nothing(
    homeserver: Homeserver, alice: Client, room: str
) -> None:
    # C8
    sent = send_sticky(alice, room, 1)
    follow_until_seen(alice, room, sent, filter=NO_MESSAGES)
    carol = homeserver.register()
    answer = carol.sync(filter=NO_MESSAGES)
    assert sent[0] not in json.dumps(answer)
    alice.invite(room, carol.user_id)
    eventually(lambda: room in carol.sync().get("rooms", {}).get("invite", {}))
    for token in (None, answer["next_batch"]):
        for url in homeserver.client_urls:
            assert sent[0] not in json.dumps(carol.via(url).sync(token, filter=NO_MESSAGES))


# C9: tokens

SLOT = 8


def _position(token: str) -> int:
    """The module's position in a token: the slot of Synapse's that nothing else uses."""
    return int(token.split("_")[SLOT])


def _with_slot(token: str, value: str) -> str:
    parts = token.split("_")
    parts[SLOT] = value
    return "_".join(parts)


@pytest.mark.repeats("workers")
def test_positions_that_nobody_was_given(alice: Client, bob: Client, room: str) -> None:
    # C9
    sent = send_sticky(alice, room, 3)
    for slot in ("future", "0", "1", "-1", "9223372036854775807", "9" * 40, "-" + "9" * 40):
        followed = follow_until_seen(bob, room, sent, filter=NO_MESSAGES)
        assert followed.next_batch is not None
        position = _position(followed.next_batch)
        assert position > 0
        number = str(position + 10_000_000) if slot == "future" else slot
        token = _with_slot(followed.next_batch, number)
        # Everything is delivered again, at once, and then no more.
        seconds, answer = _seconds(partial(bob.sync, token, 10_000, NO_MESSAGES))
        assert ids(sticky_in(answer, room)) == sent, slot
        assert seconds < 8, slot
        again = follow_until_seen(bob, room, sent, token, filter=NO_MESSAGES)
        assert again.sticky(room) == sent, slot
        assert again.next_batch is not None
        # And from there on all is as it should be.
        assert position <= _position(again.next_batch) < position + 10_000_000, slot
        more = send_sticky(alice, room, 1)
        rest = follow_until_seen(bob, room, more, again.next_batch, filter=NO_MESSAGES)
        assert rest.sticky(room) == more, slot
        sent += more


@pytest.mark.repeats("workers")
def test_tokens_that_are_none(bob: Client, room: str) -> None:
    # C9: as Synapse alone answers them
    token = quiet_token(bob)
    for slot in ("", "abc", "1.5", "0x10", "None", "m5~1.2"):
        with pytest.raises(MatrixError) as caught:
            bob.sync(_with_slot(token, slot))
        assert caught.value.status == 400
    assert bob.sync(token)["next_batch"] == token


@pytest.mark.repeats("workers")
def test_tokens_from_before_the_module(alice: Client, bob: Client, room: str) -> None:
    # C9
    sent = send_sticky(alice, room, 2)
    token = follow_until_seen(bob, room, sent, filter=NO_MESSAGES).next_batch
    assert token is not None
    # Synapse alone writes a 0 there, and once had fewer slots.
    old = [_with_slot(token, "0"), *("_".join(token.split("_")[:n]) for n in (SLOT, 4))]
    for old_token in old:
        followed = follow_until_seen(bob, room, sent, old_token, filter=NO_MESSAGES)
        assert followed.sticky(room) == sent


def test_tokens_are_good_everywhere(alice: Client, bob: Client, room: str) -> None:
    # C9
    before = send_plain(alice, room, 3)
    wait_for_readers(bob, room, before[-1])
    first = quiet_token(bob)
    sent = send_sticky(alice, room, 3)
    after = send_plain(alice, room, 2)
    wait_for_readers(bob, room, after[-1])
    followed = follow_until_seen(bob, room, [*sent, after[-1]], first, filter=_limit(1))
    last = followed.next_batch
    assert last is not None
    prev_batch = joined_room(followed.answers[0], room)["timeline"]["prev_batch"]
    assert _position(last) > 0
    for from_token, to_token in ((first, last), (_with_slot(first, "5"), _with_slot(last, "7"))):
        page = bob.messages(room, dir="f", limit=50, **{"from": from_token, "to": to_token})
        assert ids(page["chunk"]) == sent + after
        page = bob.messages(room, dir="b", limit=50, **{"from": to_token, "to": from_token})
        assert ids(page["chunk"]) == [*reversed(sent + after)]
        path = "/_matrix/client/v3/keys/changes"
        changes = bob.request("GET", path, params={"from": from_token, "to": to_token})
        assert changes.keys() >= {"changed", "left"}
        path = f"/_matrix/client/v3/rooms/{quote(room)}/members"
        members = bob.request("GET", path, params={"at": to_token})["chunk"]
        assert {m["state_key"] for m in members} == {alice.user_id, bob.user_id}
    # What a timeline gives to go on from, and what that gives in turn.
    chunk = bob.messages(room, dir="b", limit=2, **{"from": prev_batch})
    assert ids(chunk["chunk"])[0] in (*sent, *after)
    rest = bob.messages(room, dir="b", limit=50, **{"from": chunk["end"]})
    assert set(ids(rest["chunk"])) >= set(before)


@pytest.mark.repeats("workers")
def test_members_of_a_token_from_before(
    homeserver: Homeserver, alice: Client, bob: Client, room: str
) -> None:
    # C9
    send_sticky(alice, room, 1)
    token = quiet_token(bob)
    carol = homeserver.register()
    carol.join(room)
    send_sticky(alice, room, 1)
    path = f"/_matrix/client/v3/rooms/{quote(room)}/members"
    members = bob.request("GET", path, params={"at": token})["chunk"]
    assert {m["state_key"] for m in members} == {alice.user_id, bob.user_id}


@pytest.mark.slow
def test_tokens_outlive_the_module_and_its_tables(make_homeserver: MakeHomeserver) -> None:
    # C9
    homeserver = make_homeserver("sqlite")
    homeserver.start()
    alice, bob = homeserver.register(), homeserver.register()
    room = alice.create_room(preset="public_chat")
    bob.join(room)
    sent = send_sticky(alice, room, 2)
    token = follow_until_seen(bob, room, sent, filter=NO_MESSAGES).next_batch
    assert token is not None

    # Without the module they are tokens like others.
    homeserver.stop()
    homeserver.reconfigure(module=False)
    homeserver.start()
    missed = alice.send(room, text("missed"))
    answer = bob.sync(token)
    assert ids(timeline_in(answer, room)) == [missed]
    assert SYNC_SECTION not in joined_room(answer, room)
    seconds, idle = _seconds(partial(bob.sync, answer["next_batch"], 1_000))
    assert seconds > 0.9
    page = bob.messages(room, dir="f", **{"from": token, "to": answer["next_batch"]})
    assert ids(page["chunk"]) == [missed]
    path = "/_matrix/client/v3/keys/changes"
    bob.request("GET", path, params={"from": token, "to": answer["next_batch"]})

    # With it again nothing is lost: a client may get again what it has.
    homeserver.stop()
    homeserver.reconfigure(module=True)
    homeserver.start()
    for since in (answer["next_batch"], idle["next_batch"]):
        followed = follow_until_seen(bob, room, sent, since, filter=NO_MESSAGES)
        assert followed.sticky(room) == sent
    assert follow(bob, token, until=lambda f: f.answers, filter=NO_MESSAGES).sticky(room) == []

    # The tables are lost: everything that is still sticky comes again, to every token.
    token = followed.next_batch
    homeserver.stop()
    tables = homeserver.query(
        "SELECT name FROM sqlite_master WHERE type = 'table' AND name LIKE 'synapse_sticky_%'"
    )
    assert tables
    for (name,) in tables:
        homeserver.execute(f"DROP TABLE {name}")
    homeserver.start()
    followed = follow_until_seen(bob, room, sent, token, filter=NO_MESSAGES)
    assert followed.sticky(room) == sent

    # A backup is restored: its last position is one that was given out long ago.
    token = followed.next_batch
    homeserver.stop()
    homeserver.execute("UPDATE synapse_sticky_events SET position = revision - 1000000000")
    homeserver.execute("UPDATE synapse_sticky_events SET revision = position")
    homeserver.execute(
        "UPDATE synapse_sticky_progress SET last_position = last_position - 1000000000"
    )
    homeserver.start()
    followed = follow_until_seen(bob, room, sent, token, filter=NO_MESSAGES)
    assert followed.sticky(room) == sent


# C10: order


def test_the_order_is_that_of_sending(
    homeserver: Homeserver, alice: Client, bob: Client, room: str
) -> None:
    # C10
    carol = homeserver.register()
    carol.join(room)
    since = quiet_token(carol)
    sent = []
    for number in range(12):
        # Durations have nothing to do with it.
        sent += send_sticky((alice, bob)[number % 2], room, sticky_ms=HOUR_MS - number * 1_000)
    for token in (since, None):
        followed = follow_until_seen(carol, room, sent, token, filter=NO_MESSAGES)
        assert followed.sticky(room) == sent


# The room's entry around the section


@pytest.mark.repeats("workers")
def test_an_entry_that_is_there_for_its_section_only(alice: Client, bob: Client, room: str) -> None:
    # C1
    sent = send_sticky(alice, room, 2)
    thread = {"m.relates_to": {"rel_type": "m.thread", "event_id": sent[1]}}
    in_thread = alice.send(room, {**text("reply"), **thread})
    (last,) = send_plain(alice, room, 1)
    path = f"/_matrix/client/v3/rooms/{quote(room)}/receipt/m.read/{quote(sent[0])}"
    wait_for_readers(bob, room, last)
    bob.request("POST", path, json={"thread_id": "main"})
    filter_json = {"room": {"timeline": {"unread_thread_notifications": True}}}

    def notifications() -> tuple[JsonDict, JsonDict]:
        entry = joined_room(bob.sync(full_state="true", filter=filter_json), room)
        unread = entry["unread_notifications"], entry.get("unread_thread_notifications", {})
        # The second sticky one and the last one; the reply counts for its thread.
        assert unread[0]["notification_count"] == 2
        assert unread[1][sent[1]]["notification_count"] == 1
        return unread

    # Synapse sums them up every half minute. If it has done so between the messages and the
    # receipt, its count is right only after the next time.
    unread = eventually(notifications, timeout_s=60, what="the unread messages")
    follow_until_seen(alice, room, sent, filter=NO_MESSAGES)
    token = quiet_token(bob)
    # As the token of a client that has everything but the section.
    answer = bob.sync(_with_slot(token, "0"), filter=filter_json)
    entry = joined_room(answer, room)
    assert ids(sticky_in(answer, room)) == sent
    assert (entry["unread_notifications"], entry["unread_thread_notifications"]) == unread
    # A client that were told of a gap would throw its timeline away.
    assert entry["timeline"]["events"] == []
    assert entry["timeline"]["limited"] is False
    assert entry["state"]["events"] == []
    assert entry["account_data"]["events"] == []
    assert entry["ephemeral"]["events"] == []
    page = bob.messages(room, dir="b", limit=2, **{"from": entry["timeline"]["prev_batch"]})
    assert ids(page["chunk"]) == [last, in_thread]
    # Nothing else is in the answer because of it.
    assert set(answer["rooms"]["join"]) == {room}
    assert joined_room(bob.sync(answer["next_batch"]), room) == {}


@pytest.mark.repeats("workers")
def test_full_state(alice: Client, bob: Client, room: str) -> None:
    # C1, C2, C3
    since = quiet_token(bob)
    sent = send_sticky(alice, room, 2)
    for filter_json in (NO_MESSAGES, None):
        for token in (since, None):
            followed = follow_until_seen(
                bob, room, sent, token, full_state="true", filter=filter_json
            )
            assert_once(followed, room, sent)
            assert followed.sticky(room) == (sent if filter_json else [])
            state = joined_room(followed.answers[0], room)["state"]["events"]
            assert "m.room.create" in [event["type"] for event in state] or token is None


@pytest.mark.repeats("workers")
def test_state_after(homeserver: Homeserver, alice: Client, bob: Client, room: str) -> None:
    # C1, C2: with MSC4222, where Synapse fills in the entry in another way
    if hasattr(ExperimentalFeature, "MSC4222"):
        # Until 1.164, where nobody needs to be allowed it.
        admin = homeserver.register(admin=True)
        admin.request(
            "PUT",
            f"/_synapse/admin/v1/experimental_features/{quote(bob.user_id)}",
            json={"features": {"msc4222": True}},
        )
    parameter: JsonDict = {"org.matrix.msc4222.use_state_after": "true"}
    since = quiet_token(bob)
    state_id = alice.send_state(room, "org.example.state", {"v": 1})
    sent = send_sticky(alice, room, 2)
    plain = send_plain(alice, room, 12)
    wait_for_readers(bob, room, plain[-1])
    for token in (since, None):

        def answered_so(token: str | None = token) -> bool:
            first = joined_room(bob.sync(token, **parameter), room)
            return "org.matrix.msc4222.state_after" in first

        eventually(answered_so, what="the feature switched on")
        followed = follow_until_seen(bob, room, sent, token, **parameter)
        assert_once(followed, room, sent)
        assert followed.sticky(room) == sent
        entry = joined_room(followed.answers[0], room)
        assert state_id in ids(entry["org.matrix.msc4222.state_after"]["events"])
    answer = bob.sync(_with_slot(quiet_token(bob), "0"), **parameter)
    entry = joined_room(answer, room)
    assert ids(sticky_in(answer, room)) == sent
    assert entry["org.matrix.msc4222.state_after"]["events"] == []
    assert entry["timeline"]["events"] == []


@pytest.mark.deployments("sqlite")
def test_presence_beside_sections(make_homeserver: MakeHomeserver) -> None:
    # C2a: Synapse has presence on unless told otherwise
    homeserver = make_homeserver(extra_config={"presence": {"enabled": True}})
    homeserver.start()
    alice, bob = homeserver.register(), homeserver.register()
    room = alice.create_room(preset="public_chat")
    bob.join(room)
    sent = send_sticky(alice, room, 1)
    follow_until_seen(alice, room, sent, filter=NO_MESSAGES)
    status = {"presence": "online", "status_msg": "in a call"}
    alice.request("PUT", f"/_matrix/client/v3/presence/{quote(alice.user_id)}/status", json=status)
    answer = bob.sync(filter=NO_MESSAGES)
    assert ids(sticky_in(answer, room)) == sent
    said = {event["sender"]: event["content"] for event in answer["presence"]["events"]}
    assert said[alice.user_id]["status_msg"] == "in a call"
