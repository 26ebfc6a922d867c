"""Sticky events over Sliding Sync, with real clients' requests (MSC4480)."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from harness.client import SLIDING_SYNC_PATH, Client, JsonDict, MatrixError
from harness.homeserver import Homeserver
from harness.wait import eventually
from tests.sliding import (
    EXTENSION,
    LONG_MS,
    MEMBER,
    Answer,
    Connection,
    drained,
    in_background,
    no_window,
    send_known,
    subscription,
    window,
)
from tests.support import HOUR_MS, ids, now_ms, remaining_ms, sleep_until, until_ignored

# Nothing of it goes by the database, and workers have PostgreSQL too.
pytestmark = pytest.mark.repeats("postgres")

ENCRYPTED_ONLY = {"encrypted": window(is_encrypted=True)}
DIRECT_ONLY = {"direct": window(is_dm=True)}


def error_of(attempt: Callable[[], Any]) -> tuple[int, str]:
    """Status and code of the error that a request ends in."""
    with pytest.raises(MatrixError) as raised:
        attempt()
    return raised.value.status, raised.value.errcode


@pytest.fixture
def other_room(alice: Client, bob: Client) -> str:
    """Another room of alice and bob. Being newer, it is before the first in a list."""
    room_id = alice.create_room(preset="public_chat")
    bob.join(room_id)
    return room_id


# The request


@pytest.mark.repeats("workers")
def test_nothing_comes_unasked(alice: Client, bob: Client, room: str) -> None:
    """The extension is off unless it is enabled."""
    # X1
    event_ids = send_known(alice, room)
    asked: list[JsonDict | None] = [None, {}, {EXTENSION: {}}, {EXTENSION: {"enabled": False}}]
    for extensions in asked:
        body: JsonDict = {"lists": {"all": window()}}
        if extensions is not None:
            body["extensions"] = extensions
        assert EXTENSION not in bob.sliding_sync(body).get("extensions", {})
    assert Connection(bob).ask().sticky(room) == event_ids


@pytest.mark.slow
@pytest.mark.repeats("workers")
def test_at_most_a_hundred(alice: Client, bob: Client, room: str) -> None:
    """That is the default limit, and the largest."""
    # X1
    event_ids = send_known(alice, room, 103)
    for extension in ({}, {"limit": 100}, {"limit": 101}, {"limit": 2**60}):
        connection = Connection(bob)
        answers = [connection.ask(**extension).sticky(room) for _ in range(2)]
        assert answers == [event_ids[:100], event_ids[100:]]
    assert Connection(bob).ask(limit=99).sticky(room) == event_ids[:99]


@pytest.mark.parametrize("limit", [0, -1, 1.5, "5", True, None, [5], {}])
@pytest.mark.repeats("workers")
def test_impossible_limits(alice: Client, limit: Any) -> None:
    """A limit is a whole number, and not below 1."""
    # X1
    assert error_of(lambda: Connection(alice).ask(limit=limit)) == (400, "M_INVALID_PARAM")


@pytest.mark.parametrize(
    "since",
    [
        "",
        "42",
        "sticky",
        "sticky_",
        "sticky_-1",
        "sticky_+1",
        "sticky_1.5",
        "sticky_0x10",
        "sticky_1_000",
        " sticky_1",
        "sticky_1\n",
        "STICKY_1",
        "sticky_٣",
        "sticky_m",
        "sticky_m1~2",
        "s42_1_2",
        42,
        True,
        ["sticky_1"],
        {},
    ],
)
@pytest.mark.repeats("workers")
def test_since_that_is_no_token(alice: Client, since: Any) -> None:
    """What no server can have given out is refused."""
    # X5
    assert error_of(lambda: Connection(alice).ask(since=since)) == (400, "M_INVALID_PARAM")


@pytest.mark.parametrize("extension", ["enabled", 1, [], {"enabled": "yes"}, {"enabled": 1}])
@pytest.mark.repeats("workers")
def test_extension_that_is_none(alice: Client, extension: Any) -> None:
    """The extension is an object, and its switch a boolean."""
    # X1
    body = {"lists": {"all": window()}, "extensions": {EXTENSION: extension}}
    assert error_of(lambda: alice.sliding_sync(body))[0] == 400


@pytest.mark.repeats("workers")
def test_strangers_learn_nothing_of_their_mistakes(homeserver: Homeserver) -> None:
    """Whoever is not logged in hears of that, and not of the limit."""
    # X1
    for extension in ({"enabled": True, "limit": 0}, {"enabled": True, "since": "x"}, 5):
        response = httpx.post(
            homeserver.client_urls[0] + SLIDING_SYNC_PATH,
            json={"extensions": {EXTENSION: extension}},
        )
        assert (response.status_code, response.json()["errcode"]) == (401, "M_MISSING_TOKEN")
    alice = homeserver.register()
    alice.access_token += "x"
    assert error_of(lambda: Connection(alice).ask(limit=0)) == (401, "M_UNKNOWN_TOKEN")


# Positions


@pytest.mark.repeats("workers")
def test_position_advances_with_what_came(alice: Client, bob: Client, room: str) -> None:
    """`next_batch` comes with news, and not without."""
    # X1, C3
    (first,) = send_known(alice, room)
    connection = Connection(bob)
    answer = connection.ask()
    assert answer.sticky(room) == [first]
    assert answer.next_batch is not None
    assert answer.next_batch.startswith("sticky_")
    for _ in range(3):
        assert connection.ask().extension in (None, {})
    (second,) = send_known(alice, room)
    answer = connection.ask()
    assert answer.sticky(room) == [second]
    assert answer.next_batch not in (None, connection.answers[0].next_batch)
    assert connection.ask().extension in (None, {})


@pytest.mark.repeats("workers")
def test_position_advances_past_what_timelines_show(alice: Client, bob: Client, room: str) -> None:
    """What the timeline has is not in the section, and does not come later."""
    # X1, X3
    connection = Connection(bob, {"all": window(timeline_limit=20)})
    connection.ask()
    event_ids = send_known(alice, room, 3)
    answer = connection.ask()
    assert answer.timeline(room) == event_ids
    assert answer.sections == {}
    assert answer.next_batch is not None
    for _ in range(3):
        assert connection.ask().extension in (None, {})
    # The token itself says so, not the connection's memory.
    other = Connection(bob, {"all": no_window()}, since=connection.since)
    assert drained(other.drain(), room) == []


@pytest.mark.repeats("workers")
def test_section_has_what_the_timeline_has_not(alice: Client, bob: Client, room: str) -> None:
    """De-duplication is event by event, and only against this answer."""
    # X3
    older = send_known(alice, room, 2)
    newer = send_known(alice, room, 2)
    connection = Connection(bob, {"all": window(timeline_limit=2)})
    answer = connection.ask()
    assert answer.timeline(room) == newer
    assert answer.sticky(room) == older
    assert connection.drain() == []
    # Another device has seen none of these timelines.
    assert Connection(bob.second_device()).ask().sticky(room) == older + newer


@pytest.mark.repeats("workers")
def test_shown_events_take_no_place_on_a_page(
    alice: Client, bob: Client, room: str, other_room: str
) -> None:
    """What a timeline shows neither fills the page nor stops the paging."""
    # X1, X3, C4
    shown = send_known(alice, other_room, 4)
    hidden = send_known(alice, room, 3)
    # The room of the newest event is the one in the window.
    newest = alice.send(other_room)
    connection = Connection(bob, {"all": window(timeline_limit=5)})
    answer = connection.ask(limit=2)
    assert answer.timeline(other_room) == [*shown, newest]
    assert answer.sections.keys() == {room}
    assert answer.sticky(room) == hidden[:2]
    answers = connection.drain(limit=2)
    assert drained(answers, room) == hidden[2:]
    assert drained(answers, other_room) == []


@pytest.mark.repeats("workers")
def test_shown_events_do_not_come_on_a_later_page(alice: Client, bob: Client, room: str) -> None:
    """What the first answer's timeline shows has come, though pages of older ones wait."""
    # X3, C3
    older = send_known(alice, room, 5)
    newer = send_known(alice, room, 3)
    connection = Connection(bob, {"all": window(timeline_limit=3)})
    answers = connection.drain(limit=2)
    assert answers[0].timeline(room) == newer
    assert drained(answers, room) == older
    # So says the token, whatever is remembered of the connection.
    other = Connection(bob, {"all": no_window()}, since=answers[0].next_batch)
    assert drained(other.drain(), room) == older[2:]
    latest = send_known(alice, room)
    assert connection.ask(limit=2).timeline(room) == latest
    assert connection.seen(room).count(newer[0]) == 1


@pytest.mark.repeats("workers")
def test_pages_come_oldest_first_without_gaps(
    alice: Client, bob: Client, room: str, other_room: str
) -> None:
    """The limit counts for all rooms together, and their events mix in the order sent."""
    # X1, X3, C10
    event_ids = []
    for number in range(7):
        in_room = (room, other_room)[number % 2]
        event_ids += [(in_room, name) for name in send_known(alice, in_room)]
    for limit in (1, 3):
        connection = Connection(bob)
        pages = []
        for answer in connection.drain(limit=limit):
            page = {(r, e["event_id"]) for r, events in answer.sections.items() for e in events}
            pages.append(page)
        expected = [event_ids[start : start + limit] for start in range(0, 7, limit)]
        assert pages == [set(page) for page in expected]
        assert connection.seen(room) == [name for r, name in event_ids if r == room]


def test_paging_goes_on_while_more_arrives(alice: Client, bob: Client, room: str) -> None:
    """What is sent between two pages comes after what was there before."""
    # X3, C3
    event_ids = send_known(alice, room, 4)
    connection = Connection(bob)
    assert connection.ask(limit=3).sticky(room) == event_ids[:3]
    event_ids += send_known(alice, room, 3)
    assert connection.ask(limit=3).sticky(room) == event_ids[3:6]
    assert drained(connection.drain(limit=3), room) == event_ids[6:]


@pytest.mark.repeats("workers")
def test_the_same_request_gets_the_same_answer(alice: Client, bob: Client, room: str) -> None:
    """An answer that got lost is given again, with or without a position."""
    # X3, C3
    event_ids = send_known(alice, room, 3)
    connection = Connection(bob)
    for expected in (event_ids[:2], event_ids[2:]):
        lost = [connection.peek(limit=2) for _ in range(3)]
        assert [answer.sticky(room) for answer in lost] == [expected] * 3
        assert len({answer.next_batch for answer in lost}) == 1
        assert connection.ask(limit=2).sticky(room) == expected
    assert connection.drain() == []


@pytest.mark.repeats("workers")
def test_position_without_the_extension_loses_nothing(
    alice: Client, bob: Client, room: str
) -> None:
    """`since` counts, and not `pos`, which moves on without the extension as well."""
    # X1, X4, C3
    connection = Connection(bob)
    connection.ask()
    event_ids = send_known(alice, room, 2)
    plain = {"conn_id": connection.conn_id, "lists": {"all": window()}}
    connection.pos = bob.sliding_sync(plain, connection.pos)["pos"]
    assert connection.ask().sticky(room) == event_ids


@pytest.mark.repeats("workers")
def test_no_since_begins_at_the_beginning(alice: Client, bob: Client, room: str) -> None:
    """A client that stored no `since` gets all, whatever its `pos`."""
    # X1
    event_ids = send_known(alice, room, 2)
    connection = Connection(bob)
    assert connection.ask().sticky(room) == event_ids
    connection.since = None
    assert connection.ask().sticky(room) == event_ids


# Rooms


@pytest.mark.repeats("workers")
def test_rooms_outside_the_window(alice: Client, bob: Client, room: str, other_room: str) -> None:
    """It is enough that a list matches a room."""
    # X2
    outside = send_known(alice, room, 2)
    in_window = send_known(alice, other_room, 1)
    for shown, lists in ([other_room], window()), ([], no_window()):
        answer = Connection(bob, {"all": lists}).ask()
        assert answer.listed() == shown
        assert answer.count() == 2
        assert list(answer.body["rooms"]) == shown
        assert answer.sticky(room) == outside
        assert answer.sticky(other_room) == in_window


@pytest.mark.repeats("workers")
def test_rooms_that_nothing_matches(alice: Client, bob: Client, room: str, other_room: str) -> None:
    """Only what the request asks for, be it by a list or by a subscription."""
    # X2
    event_ids = send_known(alice, room)
    in_other = send_known(alice, other_room)
    assert Connection(bob, {}).ask().sections == {}
    assert Connection(bob, ENCRYPTED_ONLY).ask().sections == {}
    only_room = Connection(bob, {}, {room: subscription()}).ask()
    assert {room_id: ids(events) for room_id, events in only_room.sections.items()} == {
        room: event_ids
    }
    both = Connection(bob, ENCRYPTED_ONLY, {other_room: subscription()}).ask()
    assert list(both.sections) == [other_room]
    assert both.sticky(other_room) == in_other


@pytest.mark.repeats("workers")
def test_subscription_to_a_room_of_others(homeserver: Homeserver, alice: Client, room: str) -> None:
    """Asking is not enough: the user must be joined, however public the room."""
    # X2, C8
    send_known(alice, room)
    alice.send_state(room, "m.room.history_visibility", {"history_visibility": "world_readable"})
    carol = homeserver.register()
    connection = Connection(carol, subscriptions={room: subscription()})
    assert [connection.ask().sections for _ in range(2)] == [{}, {}]


@pytest.mark.repeats("workers")
def test_invited_users(homeserver: Homeserver, alice: Client) -> None:
    """Lists match invites as well, and those have nothing to see yet."""
    # X2, X4, K2, C8
    room = alice.create_room(preset="private_chat")
    before = send_known(alice, room)
    carol = homeserver.register()
    alice.invite(room, carol.user_id)
    while_invited = send_known(alice, room)
    connection = Connection(carol, subscriptions={room: subscription()})

    def invited() -> bool:
        answer = connection.ask()
        assert answer.sections == {}
        return answer.listed() == [room]

    eventually(invited, what="the invite in the list")
    assert Connection(carol, {"all": window(is_invite=True)}).ask().sections == {}
    carol.join(room)
    expected = before + while_invited
    assert drained(connection.collect(room, expected), room) == expected


@pytest.mark.parametrize("leave", ["leave", "kick", "ban"])
@pytest.mark.repeats("workers")
def test_users_who_are_gone(alice: Client, bob: Client, room: str, leave: str) -> None:
    """Whoever has left, was kicked or was banned gets nothing, old or new."""
    # X2, C8
    first = send_known(alice, room)
    connection = Connection(bob, subscriptions={room: subscription()})
    assert connection.ask(limit=1).sticky(room) == first
    send_known(alice, room)
    if leave == "leave":
        bob.leave(room)
    else:
        getattr(alice, leave)(room, bob.user_id)
    send_known(alice, room)

    def gone() -> bool:
        answer = connection.ask()
        assert answer.sections == {}
        # Those who were removed keep the room in their lists. That is no way in.
        return answer.count() == (0 if leave == "leave" else 1)

    eventually(gone, what="the end of the membership")
    assert drained(connection.anew().drain(), room) == []
    assert Connection(bob, subscriptions={room: subscription()}).ask().sections == {}


# Rooms that are new to the client


@pytest.mark.parametrize("keep_pos", [True, False], ids=["with pos", "pos lost"])
def test_late_join(
    homeserver: Homeserver, alice: Client, room: str, other_room: str, keep_pos: bool
) -> None:
    """Who joins gets what was sent before, though it lies behind `since`."""
    # X4, C5
    carol = homeserver.register()
    carol.join(other_room)
    before = send_known(alice, room, 3)
    elsewhere = send_known(alice, other_room)
    connection = Connection(carol, {"all": no_window()})
    assert connection.ask().sticky(other_room) == elsewhere
    carol.join(room)
    if not keep_pos:
        connection = connection.anew()
    answers = connection.collect(room, before)
    assert drained(answers, room) == before
    assert drained(answers, other_room) == []
    after = send_known(alice, room)
    assert drained(connection.drain(), room) == after


@pytest.mark.repeats("workers")
def test_join_named_in_a_lost_answer(homeserver: Homeserver, alice: Client, room: str) -> None:
    """Synapse names a join in one answer only. If that is lost, nothing else is."""
    # X4, C3
    carol = homeserver.register()
    connection = Connection(carol)
    before = send_known(alice, room, 2)
    connection.ask()
    carol.join(room)

    eventually(lambda: connection.peek().sticky(room) == before, what="the join")
    # The answer is lost, and so is the connection.
    again = connection.anew()
    assert drained(again.collect(room, before), room) == before


@pytest.mark.repeats("workers")
def test_join_made_known_by_an_answer_without_the_extension(
    homeserver: Homeserver, alice: Client, room: str
) -> None:
    """A client may ask for sticky events in some of its requests only."""
    # X4
    carol = homeserver.register()
    before = send_known(alice, room, 2)
    connection = Connection(carol)
    connection.ask()
    carol.join(room)
    plain = {"conn_id": connection.conn_id, "lists": {"all": window()}}

    def joined() -> bool:
        answer = Answer(carol.sliding_sync(plain, connection.pos))
        connection.pos = answer.pos
        return answer.count() == 1

    eventually(joined, what="the join")
    assert drained(connection.collect(room, before), room) == before


@pytest.mark.repeats("workers")
def test_join_brings_more_than_a_page(homeserver: Homeserver, alice: Client, room: str) -> None:
    """All of a room that was joined comes, in few answers or many, and each event once."""
    # X4, C5
    carol = homeserver.register()
    connection = Connection(carol)
    connection.ask()
    event_ids = send_known(alice, room, 7)
    carol.join(room)
    eventually(lambda: noticed_after_ms(homeserver, carol, room) is not None, what="the join")
    assert drained(connection.collect(room, event_ids, limit=2), room) == event_ids


def noticed_after_ms(homeserver: Homeserver, client: Client, room_id: str) -> int | None:
    """How long it took until the module noticed a user's join; None if it has not yet."""
    rows = homeserver.query(
        "SELECT j.position - e.received_ts FROM synapse_sticky_joins AS j "
        "INNER JOIN events AS e USING (stream_ordering) WHERE j.member = ? AND j.room_id = ?",
        client.user_id,
        room_id,
    )
    return int(rows[0][0]) if rows else None


def test_joins_are_in_time(homeserver: Homeserver, alice: Client, room: str) -> None:
    """A long-poll that a join wakes neither misses it nor delivers its events twice.

    How fast the join is noticed is a matter of luck, so there are many of them.
    """
    # X3, X4, C5
    connections = [Connection(homeserver.register(), {"all": no_window()}) for _ in range(12)]
    for connection in connections:
        connection.ask()
    event_ids = send_known(alice, room, 3)
    with ThreadPoolExecutor(len(connections)) as pool:
        polls = [pool.submit(connection.ask, LONG_MS) for connection in connections]
        for connection in connections:
            connection.client.join(room, settle=False)
        for poll in polls:
            poll.result()
    for connection in connections:

        def complete(connection: Connection = connection) -> bool:
            connection.drain()
            return set(event_ids) <= set(connection.seen(room))

        eventually(complete, what="what the join brings")
    # What came twice would have come the second time by now.
    for connection in connections:
        connection.drain()
        # Answers wait half a second for a join to be noticed: on a busy machine that is too short.
        if (noticed_after_ms(homeserver, connection.client, room) or 0) < 250:
            assert connection.seen(room) == event_ids
        assert set(connection.seen(room)) == set(event_ids)


@pytest.mark.repeats("workers")
def test_joining_again(alice: Client, bob: Client, room: str) -> None:
    """Who comes back gets everything, what they had before included."""
    # X4, C5
    first = send_known(alice, room, 2)
    connection = Connection(bob)
    assert drained(connection.drain(), room) == first
    bob.leave(room)
    meanwhile = send_known(alice, room, 2)
    assert drained(connection.drain(), room) == []
    bob.join(room)
    everything = first + meanwhile
    assert drained(connection.collect(room, everything), room) == everything


@pytest.mark.repeats("workers")
def test_a_new_name_is_no_join(alice: Client, bob: Client, room: str) -> None:
    """A membership event that changes no membership delivers nothing again."""
    # X4, C5
    first = send_known(alice, room)
    # Synapse sends rooms in the window as initial.
    connection = Connection(bob, {"all": no_window()})
    assert drained(connection.drain(), room) == first
    bob.set_display_name("Robert")

    def renamed() -> bool:
        members = [e for e in alice.state(room) if e.get("state_key") == bob.user_id]
        return [e["content"]["displayname"] for e in members] == ["Robert"]

    eventually(renamed, what="the new name in the room")
    second = send_known(alice, room)
    assert drained(connection.collect(room, second), room) == second


@pytest.mark.parametrize("how", ["list", "filter", "subscription", "account data"])
@pytest.mark.parametrize("keep_pos", [True, False], ids=["with pos", "pos lost"])
@pytest.mark.repeats("workers")
def test_room_that_only_now_matches(
    alice: Client, bob: Client, room: str, other_room: str, how: str, keep_pos: bool
) -> None:
    """A room that was not asked for until now has been left behind, and catches up."""
    # X4
    older = send_known(alice, room, 2)
    connection = Connection(bob, {"all": window(is_dm=True)}, {other_room: subscription()})
    elsewhere = send_known(alice, other_room)
    assert drained(connection.drain(), other_room) == elsewhere
    older += send_known(alice, room)
    assert drained(connection.drain(), room) == []
    if how == "list":
        connection.lists = {**connection.lists, "more": window()}
    elif how == "filter":
        connection.lists = {"all": window(is_dm=False)}
    elif how == "subscription":
        connection.subscriptions = {**connection.subscriptions, room: subscription()}
    else:
        make_direct(bob, alice, room)
    if not keep_pos:
        connection = connection.anew()
    answers = connection.drain()
    assert drained(answers, room) == older
    # Without `pos` it is as new as the first time.
    assert drained(answers, other_room) == ([] if keep_pos else elsewhere)
    newer = send_known(alice, room)
    assert drained(connection.drain(), room) == newer


def make_direct(client: Client, other: Client, room_id: str) -> None:
    """Mark a room as a direct chat, and wait until every client reader says so."""
    path = f"/_matrix/client/v3/user/{client.user_id}/account_data/m.direct"
    client.request("PUT", path, json={other.user_id: [room_id]})
    for url in client.homeserver.client_urls:
        connection = Connection(client.via(url), DIRECT_ONLY)
        eventually(
            lambda connection=connection: connection.ask().count("direct") == 1,  # type: ignore[misc]
            what=f"the direct chat known to {url}",
        )


@pytest.mark.repeats("workers")
def test_unmatched_rooms_are_remembered_over_many_answers(
    alice: Client, bob: Client, room: str, other_room: str
) -> None:
    """However often `since` advances, what was left behind is not forgotten."""
    # X4
    third = alice.create_room(preset="public_chat")
    bob.join(third)
    older = {room_id: send_known(alice, room_id, 2) for room_id in (room, third)}
    connection = Connection(bob, {}, {other_room: subscription()})
    for _ in range(3):
        elsewhere = send_known(alice, other_room)
        assert drained(connection.drain(), other_room) == elsewhere
    for room_id in (third, room):
        connection.subscriptions = {**connection.subscriptions, room_id: subscription()}
        answers = connection.drain(limit=1)
        assert drained(answers, room_id) == older[room_id]
        assert {r for answer in answers for r in answer.sections} == {room_id}


@pytest.mark.repeats("workers")
def test_request_that_matches_nothing(alice: Client, bob: Client, room: str) -> None:
    """A client without lists and subscriptions yet is not taken to have read anything."""
    # X4
    first = send_known(alice, room)
    connection = Connection(bob, {})
    for _ in range(2):
        assert connection.ask().extension in (None, {})
    connection.lists = {"all": no_window()}
    assert drained(connection.drain(), room) == first
    connection.lists = {}
    second = send_known(alice, room)
    assert connection.ask().extension in (None, {})
    connection.lists = {"all": no_window()}
    assert drained(connection.drain(), room) == second


@pytest.mark.repeats("workers")
def test_room_that_matches_again(alice: Client, bob: Client, room: str, other_room: str) -> None:
    """What was delivered before a room was out of sight is not delivered again."""
    # X4, C3
    first = send_known(alice, room)
    connection = Connection(bob)
    assert drained(connection.drain(), room) == first
    connection.lists = {}
    connection.subscriptions = {other_room: subscription()}
    send_known(alice, other_room)
    assert drained(connection.drain(), room) == []
    connection.lists = {"all": window()}
    assert drained(connection.drain(), room) == []
    second = send_known(alice, room)
    assert drained(connection.drain(), room) == second


# Rooms that are sent as initial


@pytest.mark.parametrize("timeline_limit", [0, 2])
@pytest.mark.repeats("workers")
def test_room_that_scrolls_into_view(
    alice: Client, bob: Client, room: str, other_room: str, timeline_limit: int
) -> None:
    """A room that is sent for the first time brings the events that came before it."""
    # X7, X3, C3
    event_ids = send_known(alice, room, 5)
    elsewhere = send_known(alice, other_room)
    connection = Connection(bob, {"all": window(timeline_limit=timeline_limit)})
    answers = connection.drain()
    assert drained(answers, room) == event_ids
    assert connection.kept(room) == []
    connection.lists = {"all": window(first=1, timeline_limit=timeline_limit)}
    answer = connection.ask()
    assert answer.initial == {room}
    shown = event_ids[5 - timeline_limit :]
    assert answer.timeline(room) == shown
    assert answer.sticky(room) == event_ids[: 5 - timeline_limit]
    assert answer.sections.keys() == {room}
    assert answer.next_batch is not None
    # Only once.
    assert connection.drain() == []
    newer = send_known(alice, room)
    connection.drain()
    assert connection.kept(room) == answer.sticky(room) + shown + newer
    assert set(elsewhere) <= set(connection.kept(other_room))


@pytest.mark.repeats("workers")
def test_initial_room_brings_more_than_a_page(
    alice: Client, bob: Client, room: str, other_room: str
) -> None:
    """Events up to `since` come at once, later ones page by page."""
    # X7, X3
    behind = send_known(alice, room, 4)
    connection = Connection(bob, {"all": no_window()})
    connection.drain(limit=3)
    beyond = send_known(alice, room, 3)
    connection.subscriptions = {room: subscription()}
    answer = connection.ask(limit=2)
    assert answer.initial == {room}
    assert answer.sticky(room) == behind + beyond[:2]
    assert drained(connection.drain(limit=2), room) == beyond[2:]


@pytest.mark.repeats("workers")
def test_initial_room_while_pages_wait(
    alice: Client, bob: Client, room: str, other_room: str
) -> None:
    """Events of later pages come once, and what only an earlier timeline showed comes again."""
    # X7, X3, C3
    waiting = send_known(alice, other_room, 4)
    older = send_known(alice, room, 2)
    (newest,) = send_known(alice, room)
    show_room = {room: subscription(timeline_limit=1)}
    connection = Connection(bob, {"all": no_window()}, show_room)
    answer = connection.ask(limit=3)
    assert answer.timeline(room) == [newest]
    assert answer.sticky(other_room) == waiting[:3]
    alice.send(room)
    # The timeline has moved on when the room is initial again.
    connection = connection.without_pos()
    answer = connection.ask(limit=2)
    assert answer.initial == {room}
    assert answer.sticky(room) == [older[0], newest]
    assert answer.sticky(other_room) == waiting[3:]
    answers = connection.drain(limit=2)
    assert drained(answers, room) == older[1:]
    assert drained(answers, other_room) == []


@pytest.mark.repeats("workers")
def test_lost_answer_with_an_initial_room(
    alice: Client, bob: Client, room: str, other_room: str
) -> None:
    """A repeated request gets the same, and a room stays initial until an answer arrives."""
    # X7, C3
    event_ids = send_known(alice, room, 3)
    connection = Connection(bob, {"all": no_window()})
    connection.drain()
    connection.subscriptions = {room: subscription()}
    lost = [connection.peek() for _ in range(3)]
    assert [answer.sticky(room) for answer in lost] == [event_ids] * 3
    assert len({answer.next_batch for answer in lost}) == 1
    newer = send_known(alice, room)
    assert connection.ask().sticky(room) == event_ids + newer
    assert connection.drain() == []


@pytest.mark.repeats("workers")
def test_lost_pos_makes_rooms_initial(
    alice: Client, bob: Client, room: str, other_room: str
) -> None:
    """A client that lost `pos` gets the events of rooms in the window again, and no others."""
    # X7, X3
    outside = send_known(alice, room, 2)
    inside = send_known(alice, other_room, 2)
    connection = Connection(bob)
    answers = connection.drain()
    assert [drained(answers, r) for r in (room, other_room)] == [outside, inside]
    for again in (connection.anew(), connection.without_pos()):
        answer = again.ask()
        assert answer.initial == {other_room}
        assert {r: answer.sticky(r) for r in answer.sections} == {other_room: inside}
        assert again.drain() == []


@pytest.mark.repeats("workers")
def test_initial_room_that_the_user_is_not_joined_to(homeserver: Homeserver, alice: Client) -> None:
    """An invite is sent as initial too, and brings nothing."""
    # X7, X2
    room = alice.create_room(preset="private_chat")
    send_known(alice, room)
    carol = homeserver.register()
    connection = Connection(carol)
    connection.ask()
    alice.invite(room, carol.user_id)

    def invited() -> bool:
        connection.ask()
        return any(room in answer.initial for answer in connection.answers)

    eventually(invited, what="the invite")
    connection.drain()
    assert connection.seen(room) == []


@pytest.mark.repeats("workers")
def test_initial_room_brings_only_live_events(
    homeserver: Homeserver, alice: Client, bob: Client, room: str
) -> None:
    """Events that expired or were redacted, and those of ignored users, do not come."""
    # X7, C8, E4, E5
    mallory = homeserver.register()
    mallory.join(room)
    short_ms = 20_000
    (lasting, redacted) = send_known(alice, room, 2)
    (unwanted,) = send_known(mallory, room)
    (expiring,) = send_known(alice, room, sticky_ms=short_ms)
    expired_ts = now_ms() + short_ms
    connections = [Connection(bob, {"all": no_window()}) for _ in homeserver.client_urls]
    for connection in connections:
        assert connection.ask().sticky(room) == [lasting, redacted, unwanted, expiring]
        connection.subscriptions = {room: subscription()}
    alice.redact(room, redacted)
    bob.set_ignored_users([mallory.user_id])
    until_ignored(bob, mallory)

    def without_it() -> bool:
        return redacted not in Connection(bob).ask().sticky(room)

    eventually(without_it, what="the redaction")
    sleep_until(expired_ts)
    for connection in connections:
        answer = connection.ask()
        assert room in answer.initial
        assert answer.sticky(room) == [lasting]


# Tokens from elsewhere


@pytest.mark.repeats("workers")
def test_since_from_the_future(alice: Client, bob: Client, room: str) -> None:
    """Rather everything again than nothing, and from then on as usual."""
    # X5, C9
    event_ids = send_known(alice, room, 2)
    for number in (now_ms() + 24 * HOUR_MS, 2**48 - 1, 10**30 - 1):
        connection = Connection(bob, since=f"sticky_{number}")
        answer = connection.ask(limit=1)
        assert answer.sticky(room) == event_ids[:1]
        assert answer.next_batch not in (None, f"sticky_{number}")
        assert drained(connection.drain(), room) == event_ids[1:]


@pytest.mark.parametrize("since", ["sticky_0", "sticky_42", "sticky_m42~1.45", "sticky_m42"])
@pytest.mark.repeats("workers")
def test_since_of_synapse_itself(alice: Client, bob: Client, room: str, since: str) -> None:
    """What Synapse's own sticky events handed out locks nobody out."""
    # X5
    event_ids = send_known(alice, room, 2)
    connection = Connection(bob, since=since)
    assert drained(connection.drain(), room) == event_ids
    assert connection.since != since


@pytest.mark.repeats("workers")
def test_absurdly_long_since(alice: Client) -> None:
    """Nor does it end in an error of the server's."""
    # X5
    for digits in (400, 640):
        Connection(alice, since="sticky_" + "9" * digits).ask()
    for digits in (5_000, 100_000):
        connection = Connection(alice, since="sticky_" + "9" * digits)
        assert error_of(connection.ask) == (400, "M_INVALID_PARAM")


# Waiting


@pytest.mark.repeats("workers")
def test_long_poll_wakes_outside_the_window(alice: Client, bob: Client, room: str) -> None:
    """A sticky event ends the wait, though Synapse's part of the answer is empty."""
    # X6, X2, C6
    connection = Connection(bob, {"all": no_window()})
    connection.drain()
    with in_background(lambda: connection.ask(LONG_MS)) as poll:
        assert not poll.is_over
        event_id = alice.send(room, {"n": 1}, MEMBER, sticky_ms=HOUR_MS)
        answer = poll.result()
        assert poll.duration_s() < LONG_MS / 1000 / 2
    assert answer.sticky(room) == [event_id]
    assert answer.body["rooms"] == {}
    assert connection.drain() == []


@pytest.mark.repeats("workers")
def test_long_poll_with_more_to_come_returns_at_once(alice: Client, bob: Client, room: str) -> None:
    """Nobody waits for something new while there is something old."""
    # X6, C4
    event_ids = send_known(alice, room, 3)
    connection = Connection(bob)
    connection.ask(limit=1)
    began = time.monotonic()
    assert connection.ask(LONG_MS, limit=1).sticky(room) == event_ids[1:2]
    assert connection.ask(LONG_MS, limit=1).sticky(room) == event_ids[2:]
    assert time.monotonic() - began < LONG_MS / 1000 / 2


@pytest.mark.repeats("workers")
def test_long_poll_wakes_for_a_join(homeserver: Homeserver, alice: Client, room: str) -> None:
    """A join brings the room's sticky events, though the room is not in the window."""
    # X6, X4, C6
    carol = homeserver.register()
    event_ids = send_known(alice, room, 2)
    connection = Connection(carol, {"all": no_window()})
    connection.drain()
    with in_background(lambda: connection.ask(LONG_MS)) as poll:
        assert not poll.is_over
        carol.join(room)
        answer = poll.result()
        assert poll.duration_s() < LONG_MS / 1000 / 2
    assert answer.sticky(room) == event_ids
    assert answer.body["rooms"] == {}
    assert connection.drain() == []


def test_idle_long_poll_stays_asleep(
    homeserver: Homeserver, alice: Client, bob: Client, room: str, other_room: str
) -> None:
    """What others are sent wakes nobody, though positions move on."""
    # X6, C6
    carol = homeserver.register()
    theirs = carol.create_room(preset="public_chat")
    connection = Connection(bob, {}, {room: subscription()})
    connection.drain()
    with in_background(lambda: connection.ask(2_500)) as poll:
        # Not bob's, and bob's but not asked for.
        carol.send(theirs, {"n": 1}, MEMBER, sticky_ms=HOUR_MS)
        alice.send(other_room, {"n": 1}, MEMBER, sticky_ms=HOUR_MS)
        answer = poll.result()
        assert poll.duration_s() >= 2.4
    assert answer.sections == {}
    assert not answer.body["rooms"]
    event_ids = send_known(alice, room)
    assert drained(connection.drain(), room) == event_ids


# Who and what


@pytest.mark.repeats("workers")
def test_ignored_senders(homeserver: Homeserver, alice: Client, bob: Client, room: str) -> None:
    """They are left out, take no place on a page, and hold nothing up."""
    # X6, X1, C8, C4
    carol = homeserver.register()
    carol.join(room)
    bob.set_ignored_users([alice.user_id])
    until_ignored(bob, alice)
    send_known(alice, room, 4)
    wanted = send_known(carol, room, 2)
    send_known(alice, room, 2)
    connection = Connection(bob)
    assert connection.ask(limit=2).sticky(room) == wanted
    assert drained(connection.drain(limit=2), room) == []
    since = connection.since
    send_known(alice, room)
    answer = connection.ask()
    assert answer.sections == {}
    assert answer.next_batch not in (None, since)
    assert connection.ask().extension in (None, {})


@pytest.mark.parametrize("keep_pos", [True, False], ids=["with pos", "pos lost"])
@pytest.mark.repeats("workers")
def test_sender_who_is_not_ignored_any_more(
    homeserver: Homeserver,
    alice: Client,
    bob: Client,
    room: str,
    other_room: str,
    keep_pos: bool,
) -> None:
    """What was left out comes, at once and in all rooms, and nothing else does."""
    # X8, X3, C3
    mallory = homeserver.register()
    for room_id in (room, other_room):
        mallory.join(room_id)
    bob.set_ignored_users([mallory.user_id])
    until_ignored(bob, mallory)
    hidden = {room_id: send_known(mallory, room_id, 3) for room_id in (room, other_room)}
    sent = send_known(alice, room, 3)
    connection = Connection(bob, {"all": no_window()})
    assert drained(connection.drain(limit=2), room) == sent
    more = send_known(alice, room)
    bob.set_ignored_users([mallory.user_id, alice.user_id])
    until_ignored(bob, alice)
    assert drained(connection.drain(limit=2), room) == []
    bob.set_ignored_users([])
    until_ignored(bob, mallory, ignored=False)
    if not keep_pos:
        connection = connection.without_pos()
    lost = [connection.peek(limit=2) for _ in range(2)]
    answer = connection.ask(limit=2)
    for one in (*lost, answer):
        assert one.sticky(other_room) == hidden[other_room]
        assert sorted(one.sticky(room)) == sorted(hidden[room] + sent + more)
        assert one.next_batch == answer.next_batch is not None
    assert connection.drain(limit=2) == []


@pytest.mark.repeats("workers")
def test_sender_not_ignored_any_more_while_pages_wait(
    homeserver: Homeserver, alice: Client, bob: Client, room: str
) -> None:
    """What was passed over comes at once, and what was not reached yet in its turn."""
    # X8, X3
    mallory = homeserver.register()
    mallory.join(room)
    bob.set_ignored_users([mallory.user_id])
    until_ignored(bob, mallory)
    event_ids = [
        event_id
        for _ in range(4)
        for sender in (mallory, alice)
        for event_id in send_known(sender, room)
    ]
    connection = Connection(bob)
    assert connection.ask(limit=2).sticky(room) == [event_ids[1], event_ids[3]]
    bob.set_ignored_users([])
    until_ignored(bob, mallory, ignored=False)
    pages = [answer.sticky(room) for answer in connection.drain(limit=1)]
    passed_over = [event_ids[0], event_ids[2], event_ids[4]]
    assert pages == [[*passed_over, event_ids[5]], [event_ids[6]], [event_ids[7]]]


@pytest.mark.repeats("workers")
def test_sender_not_ignored_any_more_in_a_room_that_does_not_match(
    homeserver: Homeserver, alice: Client, bob: Client, room: str, other_room: str
) -> None:
    """The room brings it as soon as it matches."""
    # X8, X4
    mallory = homeserver.register()
    mallory.join(room)
    bob.set_ignored_users([mallory.user_id])
    until_ignored(bob, mallory)
    hidden = send_known(mallory, room)
    connection = Connection(bob, {}, {room: subscription(), other_room: subscription()})
    assert drained(connection.drain(), room) == []
    connection.subscriptions = {other_room: subscription()}
    bob.set_ignored_users([])
    until_ignored(bob, mallory, ignored=False)
    elsewhere = send_known(alice, other_room)
    answers = connection.drain()
    assert drained(answers, other_room) == elsewhere
    assert drained(answers, room) == []
    connection.subscriptions = {room: subscription(), other_room: subscription()}
    assert drained(connection.drain(), room) == hidden
    assert connection.drain() == []


@pytest.mark.repeats("workers")
def test_long_poll_wakes_for_who_is_not_ignored_any_more(
    homeserver: Homeserver, alice: Client, bob: Client, room: str
) -> None:
    """Nobody has to send anything."""
    # X8, X6
    mallory = homeserver.register()
    mallory.join(room)
    bob.set_ignored_users([mallory.user_id])
    until_ignored(bob, mallory)
    hidden = send_known(mallory, room)
    connection = Connection(bob, {"all": no_window()})
    connection.drain()
    with in_background(lambda: connection.ask(LONG_MS)) as poll:
        assert not poll.is_over
        bob.set_ignored_users([])
        answer = poll.result()
        assert poll.duration_s() < LONG_MS / 1000 / 2
    assert answer.sticky(room) == hidden
    assert connection.drain() == []


@pytest.mark.repeats("workers")
def test_format_of_events(alice: Client, bob: Client, room: str) -> None:
    """Events say how long they are sticky and where, and to their sender which they are."""
    # X6, E3, C7
    txn_id = "my-transaction"
    before = now_ms()
    (event_id,) = send_known(alice, room, content={"focus": "x"}, sticky_ms=600_000, txn_id=txn_id)
    after = now_ms()
    other_device = alice.second_device()
    for client in (alice, bob, other_device):
        (event,) = Connection(client).ask().sections[room]
        answered = now_ms()
        remaining = remaining_ms(event)
        assert remaining is not None
        # Each of these clocks is the same one.
        assert before + 600_000 - answered <= remaining <= after + 600_000 - after
        assert event["room_id"] == room
        assert event["event_id"] == event_id
        assert event["type"] == MEMBER
        assert event["sender"] == alice.user_id
        assert event["content"] == {"focus": "x"}
        assert event["msc4354_sticky"] == {"duration_ms": 600_000}
        assert event["unsigned"].get("transaction_id") == (txn_id if client is alice else None)


@pytest.mark.repeats("workers")
def test_what_is_over_does_not_come(alice: Client, bob: Client, room: str) -> None:
    """Neither what has expired nor what was redacted."""
    # X6, E4, E5
    short_ms = 10_000
    (lasting, redacted) = send_known(alice, room, 2)
    (expiring,) = send_known(alice, room, sticky_ms=short_ms)
    expired_ts = now_ms() + short_ms
    assert Connection(bob).ask().sticky(room) == [lasting, redacted, expiring]
    alice.redact(room, redacted)

    def without_it() -> bool:
        return redacted not in Connection(bob).ask().sticky(room)

    eventually(without_it, what="the redaction")
    sleep_until(expired_ts)
    for _ in bob.homeserver.client_urls:
        assert Connection(bob).ask().sticky(room) == [lasting]
