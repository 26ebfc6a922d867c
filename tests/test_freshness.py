"""Who asks after a send was answered has the event; and nobody waits for what is settled."""

import random
import time
from collections.abc import Callable
from typing import Any

import pytest

from harness.client import Client, JsonDict
from harness.homeserver import BACKGROUND_WORKER, Homeserver
from harness.remote import RemoteServer
from harness.wait import eventually
from tests.sliding import MEMBER, Connection, no_window, subscription, window
from tests.support import (
    HOUR_MS,
    Followed,
    MakeHomeserver,
    assert_once,
    follow,
    follow_until_seen,
    ids,
    is_recorded,
    now_ms,
    quiet_token,
    section_ids,
    send_sticky,
    sleep_until,
    sticky,
    sticky_in,
    text,
    timeline_in,
    wait_for_readers,
)

pytestmark = pytest.mark.repeats("postgres")

# Sent at full speed, each followed by one question that does not wait.
SENDS = 100
HIDDEN = "org.example.hidden"
HIDING: JsonDict = {"room": {"timeline": {"not_types": [HIDDEN]}}}
# A response waits for 500 ms at most.
LONGEST_WAIT_S = 0.5
NO_WAIT_S = 0.35


class Missing:
    """The answers that lack the event that was sent before them.

    Nobody waits longer for an event than that after it was stored: then the machine is too busy,
    which is rare.
    """

    def __init__(self) -> None:
        self._at_once: list[int] = []
        self._after_waiting: list[int] = []

    def check_next(self, number: int, send: Callable[[], str], ask: Callable[[], list[str]]) -> str:
        """Send an event, ask for events, and note if it is not there. Returns its ID."""
        began = time.monotonic()
        event_id = send()
        if event_id not in ask():
            waited = time.monotonic() - began >= LONGEST_WAIT_S
            (self._after_waiting if waited else self._at_once).append(number)
        return event_id

    def check(self) -> None:
        """No answer lacked its event."""
        assert self._at_once == []
        assert len(self._after_waiting) <= SENDS // 20, self._after_waiting


def _send_hidden(client: Client, room_id: str) -> str:
    return client.send(room_id, {"n": 1}, HIDDEN, sticky_ms=HOUR_MS)


# At once


@pytest.mark.deployments("sqlite", "postgres")
def test_an_initial_sync_after_a_send_has_the_event(homeserver: Homeserver, alice: Client) -> None:
    # C11: as long as all of them are on one page
    missing = Missing()
    for _ in range(SENDS // 50):
        reader, room = homeserver.register(), alice.create_room(preset="public_chat")
        reader.join(room)
        for number in range(50):
            missing.check_next(
                number,
                lambda: _send_hidden(alice, room),  # noqa: B023
                lambda: section_ids(reader, room),  # noqa: B023
            )
    missing.check()


@pytest.mark.deployments("sqlite", "postgres")
@pytest.mark.any_synapse
def test_a_sync_after_a_send_has_the_event(alice: Client, bob: Client, room: str) -> None:
    # C11: from the last answer's token
    missing = Missing()
    followed = Followed(bob.sync(filter=HIDING)["next_batch"])

    def ask() -> list[str]:
        answer = bob.sync(followed.next_batch, filter=HIDING)
        followed.answers.append(answer)
        followed.next_batch = answer["next_batch"]
        return ids(sticky_in(answer, room))

    sent = [missing.check_next(n, lambda: _send_hidden(alice, room), ask) for n in range(SENDS)]
    missing.check()
    eventually(lambda: [*ask(), *followed.sticky(room)].count(sent[-1]), what="the last one")
    assert followed.sticky(room) == sent


@pytest.mark.deployments("sqlite", "postgres")
@pytest.mark.any_synapse
def test_a_sliding_sync_after_a_send_has_the_event(alice: Client, bob: Client, room: str) -> None:
    # C11: whether or not the room is in the window
    missing = Missing()
    for lists in ({"all": window(timeline_limit=0)}, {"all": no_window()}):
        connection = Connection(bob, lists)
        connection.drain()
        del connection.answers[:]
        sent = [
            missing.check_next(
                number,
                lambda: alice.send(room, {"n": number}, MEMBER, sticky_ms=HOUR_MS),  # noqa: B023
                lambda: connection.ask().sticky(room),  # noqa: B023
            )
            for number in range(SENDS // 2)
        ]
        eventually(lambda: connection.ask() and sent[-1] in connection.seen(room))  # noqa: B023
        assert connection.seen(room) == sent
    missing.check()


@pytest.mark.deployments("workers")
def test_another_reader_is_no_later_than_with_a_plain_message(
    homeserver: Homeserver, alice: Client, bob: Client, room: str
) -> None:
    # C11: sticky events and plain ones in turn, and a question to another reader after each
    sender, reader = (c.via(u) for c, u in zip((alice, bob), homeserver.client_urls, strict=True))
    order = random.Random(0)
    late = {True: 0, False: 0}
    since = quiet_token(bob)
    for _ in range(SENDS):
        for is_sticky in order.sample((True, False), 2):
            began = time.monotonic()
            event_id = _send_hidden(sender, room) if is_sticky else sender.send(room)
            answer = reader.sync(since, filter=HIDING)
            took_s = time.monotonic() - began
            seen = ids(sticky_in(answer, room) + timeline_in(answer, room))
            since = answer["next_batch"]
            if event_id not in seen:
                # Who has waited as long as a response may has met a machine that is too busy.
                late[is_sticky] += took_s < LONGEST_WAIT_S
                followed = follow_until_seen(
                    reader, room, [event_id], since, afterwards=0, filter=HIDING
                )
                since = followed.next_batch or since
    # What the two differ by merely by chance.
    assert late[True] <= late[False] + 5, late


# What a timeline shows


def test_a_fresh_event_that_the_timeline_shows_comes_once(
    alice: Client, bob: Client, room: str
) -> None:
    # C2, C3: it is named in the token until it is noticed, by whichever reader
    since = quiet_token(bob)
    sent = []
    followed = Followed(since)
    for number in range(30):
        sent.append(alice.send(room, text(f"{number}"), sticky_ms=HOUR_MS))
        answer = bob.sync(followed.next_batch)
        followed.answers.append(answer)
        followed.next_batch = answer["next_batch"]
    rest = follow(
        bob,
        followed.next_batch,
        until=lambda f: set(sent) <= {*f.seen(room), *followed.seen(room)},
        afterwards=4,
    )
    followed.answers += rest.answers
    assert_once(followed, room, sent)
    # Its token ends as a plain position, that wakes nobody.
    tokens = [rest.next_batch]

    def rests() -> bool:
        tokens.append(bob.sync(tokens[-1])["next_batch"])
        return tokens[-1] == tokens[-2]

    eventually(rests, what="the same token again")


def test_a_fresh_event_that_a_sliding_timeline_shows_comes_once(
    alice: Client, bob: Client, room: str
) -> None:
    # X3
    connection = Connection(bob, {"all": window(timeline_limit=1)})
    connection.drain()
    sent = []
    for number in range(30):
        sent.append(alice.send(room, {"n": number}, MEMBER, sticky_ms=HOUR_MS))
        connection.ask()
    eventually(lambda: connection.ask() and set(sent) <= set(connection.seen(room)))
    connection.drain()
    seen = connection.seen(room)
    assert [seen.count(event_id) for event_id in sent] == [1] * len(sent)


@pytest.mark.deployments("workers")
def test_while_nobody_notices(
    homeserver: Homeserver, alice: Client, bob: Client, room: str
) -> None:
    # C2, C3, C11: the process that notices is down
    reader = bob.via(homeserver.client_urls[1])
    shown, hidden = Followed(quiet_token(bob)), Followed(quiet_token(bob))

    def ask(followed: Followed, **more: Any) -> float:
        began = time.monotonic()
        answer = reader.sync(followed.next_batch, **more)
        followed.answers.append(answer)
        followed.next_batch = answer["next_batch"]
        return time.monotonic() - began

    homeserver.kill(BACKGROUND_WORKER)
    sent = []
    waits: dict[str, list[float]] = {"shown": [], "hidden": [], "again": []}
    for number in range(4):
        sent.append(_send_hidden(alice, room))
        wait_for_readers(bob, room, sent[-1])
        # A timeline that shows an event lets nobody wait, and the token names it.
        waits["shown"].append(ask(shown))
        assert shown.timeline(room) == sent
        # Where the section should have it, a request waits, but not for long,
        waits["hidden"].append(ask(hidden, filter=HIDING))
        # and not twice.
        sleep_until(now_ms() + 500)
        waits["again"].append(ask(hidden, filter=HIDING))
        assert number == 0 or shown.answers[-2]["next_batch"] != shown.next_batch
    # Who waits, waits every time.
    assert min(waits["shown"]) < NO_WAIT_S
    assert min(waits["hidden"]) < 1
    assert min(waits["again"]) < NO_WAIT_S
    assert hidden.seen(room) == []
    # As many names as a token has space for.
    more = send_sticky(alice, room, 70, type=HIDDEN)
    wait_for_readers(bob, room, more[-1])
    initial = Followed(None)
    assert ask(initial, filter={"room": {"timeline": {"limit": 100}}}) < 3
    assert set(sent + more) <= set(initial.timeline(room))
    homeserver.start_process(BACKGROUND_WORKER)
    for url in homeserver.client_urls:
        eventually(
            lambda url=url: set(sent + more) <= set(section_ids(bob.via(url), room)),  # type: ignore[misc]
            30,
            f"all at {url}",
        )

    def rests(followed: Followed, **more: Any) -> bool:
        ask(followed, **more)
        return bool(followed.answers[-1]["next_batch"] == followed.answers[-2]["next_batch"])

    for _ in range(2):
        ask(hidden, filter=HIDING)
        ask(shown, filter={"room": {"timeline": {"limit": 100}}})
        ask(initial)
    # Nothing is left to name.
    eventually(lambda: rests(hidden, filter=HIDING))
    eventually(lambda: rests(shown, filter={"room": {"timeline": {"limit": 100}}}))
    eventually(lambda: rests(initial))
    assert_once(hidden, room, sent + more)
    assert_once(shown, room, sent + more)
    # What there was no space for comes again.
    assert len(initial.sticky(room)) <= len(sent + more) - 64
    for followed in (shown, hidden, initial):
        assert len(followed.answers[-1]["next_batch"]) < 120


# What is settled


@pytest.mark.parametrize("duration_ms", [0, 1])
def test_nobody_waits_for_an_event_from_the_future_that_has_expired(
    homeserver: Homeserver, alice: Client, bob: Client, remote: RemoteServer, duration_ms: int
) -> None:
    # E1, E7: it counts from its receipt, and expired before anybody could notice it
    room = alice.create_room(preset="public_chat")
    bob.join(room)
    event_id = _receive_from_the_future(homeserver, bob, remote, room, duration_ms)
    assert not is_recorded(homeserver, event_id) or duration_ms > 0
    for url in homeserver.client_urls:
        assert _fastest_answers(bob.via(url), room, event_id) < NO_WAIT_S


def test_nor_for_one_that_was_noticed_long_ago(
    make_homeserver: MakeHomeserver, remote: RemoteServer
) -> None:
    # E1, E7
    homeserver = make_homeserver(federation=True)
    homeserver.start()
    alice, bob = homeserver.register(), homeserver.register()
    room = alice.create_room(preset="public_chat")
    bob.join(room)
    event_id = _receive_from_the_future(homeserver, bob, remote, room, 5_000)
    assert is_recorded(homeserver, event_id)
    # It starts with what has not expired.
    homeserver.restart()
    assert _fastest_answers(bob, room, event_id) < NO_WAIT_S


def _receive_from_the_future(
    homeserver: Homeserver, reader: Client, remote: RemoteServer, room: str, duration_ms: int
) -> str:
    """Receive an event that another server has dated tomorrow, and wait until it has expired."""
    carol = remote.join(homeserver, room, "carol")
    tomorrow = now_ms() + 24 * HOUR_MS
    event = remote.send_event(room, carol, origin_server_ts=tomorrow, **sticky(duration_ms))
    follow_until_seen(reader, room, [event.event_id])
    sleep_until(now_ms() + duration_ms + 100)
    return event.event_id


def _fastest_answers(reader: Client, room: str, event_id: str) -> float:
    """How long both syncs take to show an event in their timelines, and nowhere else."""

    def sync() -> None:
        answer = reader.sync()
        assert event_id in ids(timeline_in(answer, room))
        assert event_id not in ids(sticky_in(answer, room))

    def sliding_sync() -> None:
        answer = Connection(reader, {}, {room: subscription(timeline_limit=5)}).ask()
        assert event_id in answer.timeline(room)
        assert event_id not in answer.sticky(room)

    return max(_fastest(sync), _fastest(sliding_sync))


def _fastest(action: Callable[[], object]) -> float:
    """How long something takes at least: who waits, waits every time."""
    times = []
    for _ in range(3):
        began = time.monotonic()
        action()
        times.append(time.monotonic() - began)
    return min(times)
