"""After an outage of its own a server asks others for what nobody sends it again."""

import itertools
import json
import os
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from harness.client import Client, JsonDict
from harness.event_format import Event
from harness.homeserver import BACKGROUND_WORKER, Homeserver
from harness.proxy import Fault
from harness.remote import RawAnswer, RemoteServer
from harness.wait import eventually
from synapse_sticky.servers.walk import MAX_EVENTS
from tests.federation import create_room, join_via, purge_room, stored, wait_until_stored
from tests.support import (
    HOUR_MS,
    NO_TIMELINE,
    MakeHomeserver,
    follow_until_seen,
    ids,
    is_recorded,
    is_stored,
    joined_room,
    now_ms,
    sabotage,
    section_ids,
    send_sticky,
    sticky,
    switch,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sender_deployment(
    peer_python: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Homeserver]:
    """Another Synapse without the module; its own sticky events are on, or it could send none."""
    homeserver = Homeserver(
        directory=tmp_path_factory.mktemp("sender"),
        python=peer_python,
        federation=True,
        proxied=True,
        module=False,
        extra_config={"experimental_features": {"msc4354_enabled": True}},
    )
    try:
        homeserver.start()
        yield homeserver
    finally:
        homeserver.close()


@pytest.fixture
def sender(sender_deployment: Homeserver) -> Homeserver:
    """The sender of the events that are missed, running and in reach."""
    sender_deployment.ensure_running()
    sender_deployment.proxy.set_fault(Fault.NONE)
    return sender_deployment


def start_again(homeserver: Homeserver) -> None:
    """End the process that asks, and start it."""
    homeserver.kill(BACKGROUND_WORKER if homeserver.workers else "main")
    homeserver.start()


def room_with(
    homeserver: Homeserver, alice: Client, sender: Homeserver, lives_ms: int = HOUR_MS
) -> tuple[str, Client, str | None]:
    """A room with a live sticky event, its sender, and alice's token after it."""
    room = create_room(alice)
    bob = sender.register()
    join_via(bob, room, homeserver)
    sent = send_sticky(bob, room, sticky_ms=lives_ms)
    return room, bob, follow_until_seen(alice, room, sent).next_batch


def room_of_remote(
    homeserver: Homeserver, alice: Client, remote: RemoteServer
) -> tuple[str, str, Event]:
    """A room, a user of the tests' own server in it, and that user's event, which is recorded."""
    room = create_room(alice)
    carol = remote.join(homeserver, room, "carol")
    before = remote.send_event(room, carol, **sticky())
    eventually(lambda: is_recorded(homeserver, before.event_id))
    return room, carol, before


def sticky_after(alice: Client, room: str, missed: list[str], since: str | None) -> list[str]:
    """The sticky events that alice gets after a token, once these are among them.

    The second try comes after a minute: the first may meet a back-off.
    """
    followed = follow_until_seen(
        alice, room, missed, since, timeout_s=150, timeout_ms=500, filter=NO_TIMELINE
    )
    return followed.sticky(room)


# P3
@pytest.mark.deployments("sqlite", "workers")
@pytest.mark.parametrize(
    "who_tells",
    [
        pytest.param("the sender", marks=pytest.mark.repeats("workers")),
        "one with MSC4370",
        pytest.param("one without", marks=pytest.mark.repeats("workers")),
    ],
)
def test_nobody_sends_again(
    homeserver: Homeserver,
    alice: Client,
    sender: Homeserver,
    mixed_peer: Homeserver,
    stock_peer: Homeserver,
    who_tells: str,
) -> None:
    """All that was sent while nobody could reach us is there, each once and in order.

    Nothing else is sent in the meantime: what is pushed comes as it arrives.
    """
    room, bob, since = room_with(homeserver, alice, sender)
    third = {"one with MSC4370": mixed_peer, "one without": stock_peer}.get(who_tells)
    if third is not None:
        join_via(third.register(), room, homeserver)
        joining = "SELECT 1 FROM partial_state_rooms WHERE room_id = ?"
        eventually(lambda: not third.query(joining, room), 30, "the end of the join")
    # From here on nothing reaches us that we did not ask for.
    homeserver.proxy.set_fault(Fault.CLOSE)
    missed = send_sticky(bob, room, 30)
    if third is not None:
        wait_until_stored(third, room, missed)
        sender.stop()
    assert not set(missed) & stored(homeserver, room)
    start_again(homeserver)
    assert sticky_after(alice, room, missed, since) == missed


# P3
@pytest.mark.deployments("sqlite")
def test_a_room_that_was_joined_a_moment_ago(
    homeserver: Homeserver, alice: Client, sender: Homeserver
) -> None:
    """The missed events come, and nothing from before the join: no message, no state, no count."""
    bob, dave = sender.register(), sender.register()
    room = create_room(bob)
    dave.join(room)
    bob.send_state(room, "m.room.topic", {"topic": "the first"})
    for _ in range(5):
        bob.send(room)
    bob.kick(room, dave.user_id)
    bob.send_state(room, "m.room.topic", {"topic": "the last"})
    send_sticky(bob, room, 5)
    alice.join(room, via=[sender.server_name])
    sent = send_sticky(bob, room)
    follow_until_seen(alice, room, sent)
    joining = "SELECT 1 FROM partial_state_rooms WHERE room_id = ?"
    eventually(lambda: not homeserver.query(joining, room), 30, "the end of the join")
    before, count = unread(alice, room)
    homeserver.proxy.set_fault(Fault.CLOSE)
    missed = send_sticky(bob, room, 3)
    start_again(homeserver)
    eventually(lambda: is_recorded(homeserver, missed[-1]), 60, "the missed events")
    # The pull of this room has ended with the last of them.
    answer = joined_room(alice.sync(since=before), room)
    assert ids(answer["timeline"]["events"]) == missed
    assert answer["state"]["events"] == []
    assert unread(alice, room)[1] == count + len(missed)


def unread(client: Client, room: str) -> tuple[str, int]:
    """How many messages of a room a user has not read, and the position in the stream."""
    answer = client.sync()
    counts = joined_room(answer, room)["unread_notifications"]
    return answer["next_batch"], counts["notification_count"]


# P3
@pytest.mark.deployments("sqlite")
def test_history_that_a_user_has_scrolled_back_to(
    homeserver: Homeserver, alice: Client, remote: RemoteServer
) -> None:
    """What is missing before it is no gap of an outage."""
    room = remote.create_room("carol")
    carol = remote.user_id("carol")
    old = []
    for number in range(20):
        old.append(remote.create_event(room, "m.room.message", {"body": f"{number}"}, carol))
        remote.remember(old[-1])
    alice.join(room, via=[remote.server_name])
    event = remote.send_event(room, carol, **sticky())
    eventually(lambda: is_recorded(homeserver, event.event_id))
    remote.answer_backfill = lambda room_id, event_ids, limit: [e.pdu for e in old[:15:-1]]
    joined = joined_room(alice.sync(), room)
    alice.messages(room, limit=10, **{"from": joined["timeline"]["prev_batch"]})
    eventually(lambda: is_stored(homeserver, old[-1]), 30, "the page")
    assert not is_stored(homeserver, old[10])
    remote.answer_backfill = remote.backfill
    since = alice.sync()["next_batch"]
    missed = remote.create_event(room, "m.room.message", {"body": "missed"}, carol, **sticky())
    remote.remember(missed)
    start_again(homeserver)
    eventually(lambda: is_recorded(homeserver, missed.event_id), 60, "the missed event")
    answer = joined_room(alice.sync(since=since), room)
    assert ids(answer["timeline"]["events"]) == [missed.event_id]
    assert not is_stored(homeserver, old[10])


# P3
@pytest.mark.deployments("sqlite", "workers")
@pytest.mark.parametrize(
    "lives_ms",
    [HOUR_MS, pytest.param(3_000, marks=pytest.mark.repeats("workers"), id="expired meanwhile")],
)
def test_an_outage_of_the_network(
    homeserver: Homeserver, alice: Client, sender: Homeserver, lives_ms: int
) -> None:
    """Without a start: a server that could not be reached is back, and may have missed us too."""
    room, bob, since = room_with(homeserver, alice, sender, lives_ms)
    homeserver.proxy.set_fault(Fault.CLOSE)
    sender.proxy.set_fault(Fault.CLOSE)
    if lives_ms < HOUR_MS:
        time.sleep(lives_ms / 1000)
    missed = send_sticky(bob, room, 30)
    alice.send(room)

    def backs_off() -> bool:
        query = "SELECT retry_interval FROM destinations WHERE destination = ?"
        return any(interval for (interval,) in homeserver.query(query, sender.server_name))

    eventually(backs_off, 30, "Synapse backing off")
    assert not set(missed) & stored(homeserver, room)
    sender.proxy.set_fault(Fault.NONE)

    def is_reached() -> bool:
        alice.send(room)
        return not backs_off()

    eventually(is_reached, 60, "the sender being reached again", interval_s=1)
    assert sticky_after(alice, room, missed, since) == missed


# P3
@pytest.mark.deployments("sqlite")
def test_only_the_newest_is_sent_again(
    homeserver: Homeserver, alice: Client, remote: RemoteServer
) -> None:
    """As Synapse does it: it is known then what is newest, and not those before it."""
    room = create_room(alice)
    carol = remote.join(homeserver, room, "carol")

    def create() -> Event:
        return remote.create_event(room, "m.room.message", {"body": "x"}, carol, **sticky())

    before = create()
    remote.send(before)
    eventually(lambda: is_recorded(homeserver, before.event_id))
    missed = []
    for _ in range(30):
        missed.append(create())
        remote.remember(missed[-1])
    newest = create()
    remote.send(newest)
    eventually(lambda: is_recorded(homeserver, newest.event_id), 60, "the newest event")
    assert not any(is_stored(homeserver, event) for event in missed[:15])
    start_again(homeserver)
    for event in missed:
        eventually(lambda e=event: is_recorded(homeserver, e.event_id), 60)  # type: ignore[misc]


# P3
@pytest.mark.deployments("sqlite")
def test_only_requests_to_us_fail(
    homeserver: Homeserver, alice: Client, remote: RemoteServer
) -> None:
    """Nothing starts and nobody is back: the gap before the newest event tells."""
    room, carol, _ = room_of_remote(homeserver, alice, remote)
    missed = []
    for _ in range(30):
        missed.append(remote.create_event(room, "m.room.message", {}, carol, **sticky()))
        remote.remember(missed[-1])
    newest = remote.send_event(room, carol, **sticky())
    eventually(lambda: is_recorded(homeserver, newest.event_id), 30, "the newest event")
    assert not any(is_stored(homeserver, event) for event in missed[:15])
    for event in missed:
        eventually(lambda e=event: is_recorded(homeserver, e.event_id), 60)  # type: ignore[misc]


# P3
@pytest.mark.deployments("sqlite")
def test_events_that_cannot_be_verified(
    homeserver: Homeserver, alice: Client, remote: RemoteServer
) -> None:
    """Two of a server that gives no key are among those that were missed: all others come."""
    room, carol, _ = room_of_remote(homeserver, alice, remote)
    missed, behind = [], []
    for number in range(40):
        missed.append(remote.create_event(room, "m.room.message", {}, carol, **sticky()))
        remote.remember(missed[-1])
        if number in (2, 20):
            auth = missed[-1].pdu["auth_events"]
            remote.remember(
                remote.create_event(
                    room, "m.room.message", {}, "@mallory:127.0.0.1:1", auth_events=auth
                )
            )
        elif number in (3, 21):
            # Synapse does not take what refers to such an event directly.
            behind.append(missed.pop())
    start_again(homeserver)
    for event in missed:
        eventually(lambda e=event: is_recorded(homeserver, e.event_id), 60)  # type: ignore[misc]


# P3
@pytest.mark.deployments("sqlite")
def test_more_than_is_taken_of_a_wide_room(
    homeserver: Homeserver, alice: Client, remote: RemoteServer
) -> None:
    """More was missed than is taken: the newest ones come, of each branch."""
    room, carol, before = room_of_remote(homeserver, alice, remote)
    branches = [[before.event_id] for _ in range(3)]
    missed = []
    for number in range(MAX_EVENTS + 60):
        branch = branches[number % 3]
        extra: Any = sticky() if number % 20 == 0 else {}
        event = remote.create_event(
            room, "m.room.message", {}, carol, prev_events=branch[-1:], **extra
        )
        remote.remember(event)
        branch.append(event.event_id)
        if extra and number > 60:
            missed.append(event)
    remote.remember(
        remote.create_event(
            room, "m.room.message", {}, carol, prev_events=[branch[-1] for branch in branches]
        )
    )
    start_again(homeserver)
    for event in reversed(missed):
        eventually(lambda e=event: is_recorded(homeserver, e.event_id), 90)  # type: ignore[misc]


# P3, C10
@pytest.mark.deployments("sqlite")
def test_events_that_are_pushed_meanwhile(
    homeserver: Homeserver, alice: Client, remote: RemoteServer
) -> None:
    """Synapse takes them one after the other, pushed or fetched: once, in order, and counts them.

    While it waits for the events before a pushed one, the same are fetched.
    """
    room = create_room(alice)
    carol = remote.join(homeserver, room, "carol")

    def create() -> Event:
        content = {"body": "x", "msgtype": "m.text"}
        return remote.create_event(room, "m.room.message", content, carol, **sticky())

    before = create()
    remote.send(before)
    eventually(lambda: is_recorded(homeserver, before.event_id))
    missed = []
    for _ in range(2):
        missed.append(create())
        remote.remember(missed[-1])
    count = unread(alice, room)[1]
    asked = threading.Event()

    def missing() -> Iterator[bytes]:
        asked.set()
        time.sleep(6)
        yield json.dumps({"events": [missed[0].pdu]}).encode()

    def answer(path: str) -> RawAnswer | None:
        if "/get_missing_events/" in path:
            return 200, missing()
        # The newest event only: Synapse asks for the one before it.
        return (200, page([missed[1].pdu])) if "/backfill/" in path else None

    remote.answer_instead = answer
    start_again(homeserver)
    assert asked.wait(30), "no question"
    remote.send(missed[1])
    for event in missed:
        eventually(lambda e=event: is_recorded(homeserver, e.event_id), 30)  # type: ignore[misc]
    assert section_ids(alice, room) == [before.event_id, *(event.event_id for event in missed)]
    # Longer than it takes Synapse to take the event for the second time.
    time.sleep(2)
    query = "SELECT COUNT(*) FROM event_push_actions WHERE event_id = ? AND user_id = ?"
    assert homeserver.query(query, missed[1].event_id, alice.user_id) == [(1,)]
    assert unread(alice, room)[1] == count + 2


# P3
@pytest.mark.deployments("sqlite")
def test_rooms_that_are_left_alone(make_homeserver: MakeHomeserver, remote: RemoteServer) -> None:
    """All of them if it is off; rooms that had no sticky events, and those where they are off."""
    homeserver = make_homeserver("sqlite", federation=True)
    homeserver.start()
    alice = homeserver.register()
    rooms = {name: create_room(alice) for name in ("live", "off", "plain", "configured")}
    for name, room in rooms.items():
        carol = remote.join(homeserver, room, "carol")
        extra: Any = {} if name in ("plain", "configured") else sticky()
        event = remote.send_event(room, carol, **extra)
        if extra:
            eventually(lambda e=event: is_recorded(homeserver, e.event_id))  # type: ignore[misc]
    switch(alice, rooms["off"], {"enabled": False})
    missed = {
        name: remote.create_event(
            room, "m.room.message", {"body": "missed"}, remote.user_id("carol"), **sticky()
        )
        for name, room in rooms.items()
    }
    remote.remember(missed.values())

    def start_with(config: JsonDict | None) -> None:
        homeserver.stop()
        homeserver.reconfigure(module_config={"pull_after_outage": config})
        homeserver.start()

    def asked(since: int) -> Counter[str]:
        paths = [path for method, path in remote.requests[since:] if method == "GET"]
        names = [name for path in paths for name in path.split("/") if name in QUESTIONS]
        return Counter(names)

    before = len(remote.requests)
    start_with(None)
    # Longer than it takes until the first question, if there is any.
    time.sleep(5)
    assert asked(before) == {}
    assert not any(is_stored(homeserver, event) for event in missed.values())
    config: JsonDict = {"rooms": [rooms["configured"], "!unknown:a"]}
    start_with(config)
    # In this order: "off" comes before "live", whose event is older.
    for name in ("configured", "live"):
        event = missed[name]
        eventually(lambda e=event: is_recorded(homeserver, e.event_id), 60)  # type: ignore[misc]
    assert not is_stored(homeserver, missed["off"])
    assert not is_stored(homeserver, missed["plain"])
    # That it does not know the question for extremities is asked once.
    old = {"extremities": 1, "make_leave": 2, "timestamp_to_event": 2}
    assert asked(before) == {**old, "backfill": 2}
    before = len(remote.requests)
    start_with(config)
    eventually(lambda: asked(before)["timestamp_to_event"] == 2, 60, "the questions")
    # Nothing is fetched twice.
    assert asked(before) == old


# Servers that answer anything


def made_up(count: int) -> list[str]:
    return [f"${secrets.token_urlsafe(32)}" for _ in range(count)]


def extremities(event_ids: Iterable[str]) -> list[bytes]:
    return [json.dumps({"prev_events": list(event_ids)}).encode()]


def page(pdus: Iterable[JsonDict]) -> list[bytes]:
    return [json.dumps({"origin": "x", "origin_server_ts": 1, "pdus": list(pdus)}).encode()]


def nested(answer: bytes) -> bytes:
    """The same with the contents of events nested, each time more deeply."""
    first, *others = answer.split(b'"' + SECRET.encode() * 100 + b'"')
    levels = range(100, 100 * (len(others) + 1), 100)
    pieces = zip((b'{"a":' * n + b"1" + b"}" * n for n in levels), others, strict=True)
    return first + b"".join(depth + other for depth, other in pieces)


def for_ever(piece: bytes, pause_s: float = 0) -> Iterator[bytes]:
    yield b'{"prev_events": [], "pdus": ['
    while True:
        time.sleep(pause_s)
        yield piece


def hostile(
    kind: str, remote: RemoteServer, room: str, other_room: str
) -> Callable[[str], RawAnswer | None]:
    """What a server answers, by what it is asked."""
    mallory = remote.user_id("mallory")

    def own(count: int) -> Iterator[JsonDict]:
        """Events that are its own, after events that nobody has."""
        for _ in range(count):
            content = {"body": SECRET * 100}
            prev = made_up(20)
            yield remote.create_event(
                room, "m.room.message", content, mallory, prev_events=prev, depth=10_000, **sticky()
            ).pdu

    def of_others(count: int) -> Iterator[JsonDict]:
        """Events of servers that there are not, with no signature that could be right."""
        for n, pdu in zip(range(count), itertools.cycle(own(20)), strict=False):
            yield {**pdu, "sender": f"@a:127.0.0.1:{1 + n % 50}", "origin_server_ts": n}

    elsewhere = remote.create_event(other_room, "m.room.message", {}, mallory, **sticky())
    answers: dict[str, dict[str, Callable[[], Iterable[bytes]]]] = {
        "thousands of names": {"extremities": lambda: extremities(made_up(50_000))},
        "names and nothing else": {
            "extremities": lambda: extremities(made_up(1_000)),
            "backfill": lambda: page([]),
        },
        "events of others": {
            "extremities": lambda: extremities(made_up(1_000)),
            "backfill": lambda: page(of_others(400)),
        },
        "events of its own": {
            "extremities": lambda: extremities(made_up(1_000)),
            "backfill": lambda: page(own(100)),
        },
        "another room": {
            "extremities": lambda: extremities([elsewhere.event_id]),
            "backfill": lambda: page([elsewhere.pdu]),
        },
        "a huge page": {
            "extremities": lambda: extremities(made_up(1)),
            "backfill": lambda: for_ever(b"{}," * 50_000),
        },
        "no end": {"extremities": lambda: for_ever(b"[],", pause_s=0.2)},
        "an error without end": {
            "extremities": lambda: for_ever(b"{}," * 50_000),
            "make_leave": lambda: for_ever(b"[],", pause_s=0.2),
        },
        "nonsense": {
            "extremities": lambda: extremities(made_up(1)),
            "backfill": lambda: page([{"type": 1, "room_id": room}, {}]),
        },
        "a deep answer": {"extremities": lambda: [b'{"prev_events": ', b"[" * 50_000]},
        "deep events": {
            "extremities": lambda: extremities(made_up(1)),
            "backfill": lambda: [nested(piece) for piece in page(own(10))],
        },
        "a list": {"extremities": lambda: [b"[]"]},
        "a redirect": {"extremities": lambda: extremities(made_up(1))},
    }
    statuses = {"an error without end": 404, "a redirect": 302}

    def answer(path: str) -> RawAnswer | None:
        for name, pieces in answers[kind].items():
            if f"/{name}/" in path:
                return statuses.get(kind, 200), pieces()
        return None

    return answer


# In the contents of events, which no log is to have.
SECRET = "secret-xyz"

QUESTIONS = ("extremities", "make_leave", "timestamp_to_event", "backfill")

HOSTILE = (
    "thousands of names",
    "names and nothing else",
    "events of others",
    "events of its own",
    "another room",
    "a huge page",
    "no end",
    "an error without end",
    "nonsense",
    "a deep answer",
    "deep events",
    "a list",
    "a redirect",
)


# P3
@pytest.mark.deployments("sqlite")
def test_answers_that_are_hostile(make_homeserver: MakeHomeserver) -> None:
    """They cost little and change nothing, and an honest server is asked after them."""
    homeserver = make_homeserver("sqlite", federation=True)
    homeserver.start()
    alice = homeserver.register()
    other_room = create_room(alice)
    with ExitStack() as stack:
        remotes = {kind: stack.enter_context(RemoteServer()) for kind in (*HOSTILE, "honest")}
        rooms = {}
        for number, (kind, remote) in enumerate(remotes.items()):
            room = rooms[kind] = create_room(alice)
            mallory = remote.join(homeserver, room, "mallory")
            # The room whose events live longest is first.
            event = remote.send_event(room, mallory, **sticky(3_600_000 - 100_000 * number))
            eventually(lambda e=event: is_recorded(homeserver, e.event_id))  # type: ignore[misc]
            remote.join(homeserver, other_room, "mallory")
            if kind != "honest":
                remote.answer_instead = hostile(kind, remote, room, other_room)
        honest = remotes["honest"]
        missed = honest.create_event(
            rooms["honest"], "m.room.message", {}, honest.user_id("mallory"), **sticky()
        )
        honest.remember(missed)
        homeserver.stop()
        counts = {kind: len(remote.requests) for kind, remote in remotes.items()}
        homeserver.reconfigure(module_config={"pull_after_outage": {"max_rooms": 50}})
        homeserver.start()
        before = events_by_room(homeserver)
        cpu_s, memory_mib = cpu_used_s(homeserver), memory_used_mib(homeserver)
        eventually(lambda: is_recorded(homeserver, missed.event_id), 120, "the honest answer")
        # Longer than an answer is waited for: others are asked at the same time.
        time.sleep(12)
        spent = cpu_used_s(homeserver) - cpu_s, memory_used_mib(homeserver) - memory_mib
        after = events_by_room(homeserver)
        asked = {k: len(remote.requests) - counts[k] for k, remote in remotes.items()}
        log = homeserver.log()
        query = "SELECT destination FROM destinations WHERE retry_interval > 0"
        left_alone = {name for (name,) in homeserver.query(query)}
    after[rooms["honest"]] -= 1
    assert after == before
    assert max(asked.values()) < 15, asked
    assert spent[0] < 5, spent
    assert spent[1] < 80, spent
    assert " ERROR " not in log
    assert SECRET not in log
    # Of events with a gap before them Synapse asks for more, and of their senders for the keys.
    names = {name: kind for kind, remote in remotes.items() for name in [remote.server_name]}
    assert {names.get(name) for name in left_alone} <= {"events of its own", None}
    assert len(left_alone) <= 4


# P3
def test_a_slow_server(make_homeserver: MakeHomeserver) -> None:
    """It is in many rooms, and answers after six seconds: the others' rooms come in between."""
    homeserver = make_homeserver("sqlite", federation=True)
    homeserver.start()
    alice = homeserver.register()
    with RemoteServer() as slow, RemoteServer() as honest:
        asked = []

        def answer(path: str) -> RawAnswer | None:
            if "/extremities/" not in path:
                return None
            asked.append(path)
            time.sleep(6)
            return 200, extremities([known])

        for number in range(4):
            room = create_room(alice)
            remote = honest if number == 3 else slow
            carol = remote.join(homeserver, room, "carol")
            # The room whose events live longest is first.
            event = remote.send_event(room, carol, **sticky(3_600_000 - 100_000 * number))
            eventually(lambda e=event: is_recorded(homeserver, e.event_id))  # type: ignore[misc]
            known = event.event_id
        missed = honest.create_event(room, "m.room.message", {}, carol, **sticky())
        honest.remember(missed)
        slow.answer_instead = answer
        homeserver.restart()
        eventually(lambda: is_recorded(homeserver, missed.event_id), 40, "the other room")
        assert len(asked) == 1


# P3
def test_a_first_look_that_fails(
    make_homeserver: MakeHomeserver, remote: RemoteServer, tmp_path: Path
) -> None:
    """Which rooms had sticky events is looked up again a little later."""
    homeserver = make_homeserver("sqlite", federation=True)
    functions = ["synapse_sticky.storage.store:StickyStore.get_expiry_by_sender"]
    sabotage(homeserver, "Unreliable", {"directory": str(tmp_path), "functions": functions})
    homeserver.start()
    alice = homeserver.register()
    room, carol, _ = room_of_remote(homeserver, alice, remote)
    missed = remote.create_event(room, "m.room.message", {}, carol, **sticky())
    remote.remember(missed)
    fails = tmp_path / "get_expiry_by_sender"
    fails.touch()
    position = homeserver.log_position()
    homeserver.restart()
    eventually(
        lambda: "Cannot fetch the events that were missed" in homeserver.problems_since(position),
        what="the failure",
    )
    fails.unlink()
    eventually(lambda: is_recorded(homeserver, missed.event_id), 60, "the missed event")


# P3
def test_servers_that_hang(make_homeserver: MakeHomeserver) -> None:
    """Another room is asked about meanwhile."""
    homeserver = make_homeserver("sqlite", federation=True)
    homeserver.start()
    alice = homeserver.register()
    released = threading.Event()
    with ExitStack() as stack:
        stack.callback(released.set)

        def answer(path: str) -> RawAnswer | None:
            if "/extremities/" in path:
                released.wait(60)
            return None

        for number in range(3):
            remote = stack.enter_context(RemoteServer())
            room = create_room(alice)
            carol = remote.join(homeserver, room, "carol")
            # The room whose events live longest is first.
            event = remote.send_event(room, carol, **sticky(3_600_000 - 100_000 * number))
            eventually(lambda e=event: is_recorded(homeserver, e.event_id))  # type: ignore[misc]
            if number < 2:
                remote.answer_instead = answer
        missed = remote.create_event(room, "m.room.message", {}, carol, **sticky())
        remote.remember(missed)
        homeserver.restart()
        # Less than one of them is waited for.
        eventually(lambda: is_recorded(homeserver, missed.event_id), 9, "the other room")


# P3
@pytest.mark.deployments("sqlite")
def test_a_back_off_that_begins_while_a_server_answers(
    homeserver: Homeserver, alice: Client, remote: RemoteServer
) -> None:
    """Synapse's own transaction fails in the meantime: no more pages are asked for."""
    room, carol, _ = room_of_remote(homeserver, alice, remote)
    missed = []
    for _ in range(10):
        missed.append(remote.create_event(room, "m.room.message", {}, carol, **sticky()))
        remote.remember(missed[-1])
    asked, backs_off = threading.Event(), threading.Event()
    pages = []

    def pieces() -> Iterator[bytes]:
        asked.set()
        backs_off.wait(30)
        yield from page(event.pdu for event in missed[:4:-1])

    def answer(path: str) -> RawAnswer | None:
        if "/send/" in path:
            return 500, [b"{}"]
        if "/backfill/" in path:
            pages.append(path)
            return (200, pieces()) if len(pages) == 1 else None
        return None

    def retry_intervals() -> list[int]:
        query = "SELECT retry_interval FROM destinations WHERE destination = ?"
        return [n for (n,) in homeserver.query(query, remote.server_name) if n]

    remote.answer_instead = answer
    start_again(homeserver)
    assert asked.wait(30), "no question"
    alice.send(room)
    eventually(retry_intervals, 30, "Synapse backing off")
    backs_off.set()
    # Longer than it takes until the next question, if there is any.
    time.sleep(3)
    assert len(pages) == 1
    assert retry_intervals()


# P3
@pytest.mark.deployments("sqlite")
def test_rooms_that_change_while_a_server_answers(make_homeserver: MakeHomeserver) -> None:
    """They are left, purged, switched off, and closed to the server: nothing is reported.

    Another one, whose faster join is under way, holds nobody up.
    """
    homeserver = make_homeserver("sqlite", federation=True)
    homeserver.start()
    alice = homeserver.register(admin=True)
    acl: JsonDict = {"allow": ["*"], "allow_ip_literals": False}
    changes: dict[str, Callable[[str], object]] = {
        "left": alice.leave,
        "purged": lambda room: purge_room(homeserver, alice, room),
        "switched off": lambda room: switch(alice, room, {"enabled": False}),
        "closed": lambda room: alice.send_state(room, "m.room.server_acl", acl),
        "as before": lambda room: None,
    }
    with ExitStack() as stack:
        rooms, missed = {}, {}
        asked, changed = ({name: threading.Event() for name in changes} for _ in range(2))
        for number, name in enumerate(changes):
            remote = stack.enter_context(RemoteServer())
            room = rooms[name] = create_room(alice)
            carol = remote.join(homeserver, room, "carol")
            # The room whose events live longest is first.
            event = remote.send_event(room, carol, **sticky(3_600_000 - 100_000 * number))
            eventually(lambda e=event: is_recorded(homeserver, e.event_id))  # type: ignore[misc]
            missed[name] = remote.create_event(room, "m.room.message", {}, carol, **sticky())
            remote.remember(missed[name])

            def pieces(name: str = name) -> Iterator[bytes]:
                asked[name].set()
                changed[name].wait(10)
                yield from page([missed[name].pdu])

            def answer(path: str, pieces: Any = pieces) -> RawAnswer | None:
                return (200, pieces()) if "/backfill/" in path else None

            remote.answer_instead = answer
        joining = stack.enter_context(RemoteServer())
        joined = joining.create_room("carol")
        joining.omits_members = True
        joining.tells_state.clear()
        stack.callback(joining.tells_state.set)
        alice.join(joined, via=[joining.server_name])
        event = joining.send_event(joined, joining.user_id("carol"), **sticky())
        eventually(lambda: is_recorded(homeserver, event.event_id))
        homeserver.restart()
        for name, change in changes.items():
            assert asked[name].wait(30), name
            change(rooms[name])
            changed[name].set()
        last = missed["as before"].event_id
        eventually(lambda: is_recorded(homeserver, last), 30, "the last room")
        log = homeserver.log()
        assert homeserver.query("SELECT 1 FROM partial_state_rooms WHERE room_id = ?", joined)
    assert not [path for _, path in joining.requests if "/extremities/" in path]
    assert {name for name, event in missed.items() if is_stored(homeserver, event)} == {
        "switched off",
        "as before",
    }
    assert section_ids(alice, rooms["switched off"]) == []
    assert " ERROR " not in log


# P3
@pytest.mark.parametrize("federation", [False, True])
def test_a_server_alone(make_homeserver: MakeHomeserver, federation: bool) -> None:
    """Without federation nothing runs at all; with it, rooms without others cost no request."""
    homeserver = make_homeserver(
        "sqlite", federation=federation, extra_config={"enable_metrics": True}
    )
    homeserver.start()
    alice = homeserver.register()
    room = alice.create_room()
    sent = send_sticky(alice, room)
    eventually(lambda: section_ids(alice, room) == sent, 30, "the event")
    homeserver.restart()
    # Longer than it takes until the first question, if there is any.
    time.sleep(5)
    metrics = homeserver.metrics()
    assert ('synapse_background_process_start_count_total{name="sticky_pull"' in metrics) is (
        federation
    )
    assert requests_to_servers(metrics) == []


def requests_to_servers(metrics: str) -> list[str]:
    """The questions that were counted."""
    name = "synapse_sticky_requests_to_servers_total"
    lines = [line for line in metrics.splitlines() if line.startswith(name)]
    assert lines
    return [line for line in lines if not line.endswith(" 0.0")]


# P3
@pytest.mark.deployments("sqlite")
def test_killed_in_the_middle(homeserver: Homeserver, alice: Client, sender: Homeserver) -> None:
    """The next start asks again, and goes on where the last one ended.

    It was killed while it took an event: Synapse leaves the room locked for two minutes.
    """
    room, bob, since = room_with(homeserver, alice, sender)
    homeserver.proxy.set_fault(Fault.CLOSE)
    missed = send_sticky(bob, room, 60)
    start_again(homeserver)
    eventually(lambda: stored(homeserver, room) & set(missed), 30, "the first", interval_s=0.01)
    had = len(stored(homeserver, room) & set(missed))
    homeserver.kill("main")
    homeserver.execute("DELETE FROM worker_locks")
    homeserver.execute(
        "INSERT INTO worker_locks (lock_name, lock_key, instance_name, token, last_renewed_ts) "
        "VALUES ('federation_inbound_pdu', ?, 'main', 'x', ?)",
        room,
        now_ms() - 95_000,
    )
    homeserver.start()
    assert had < len(missed), "killed too late"
    assert sticky_after(alice, room, missed, since) == missed


def events_by_room(homeserver: Homeserver) -> dict[str, int]:
    """How many events of each room a homeserver has, outliers and rejected ones included."""
    return dict(homeserver.query("SELECT room_id, COUNT(*) FROM events GROUP BY room_id"))


def cpu_used_s(homeserver: Homeserver) -> float:
    """The CPU time that a homeserver of one process has used, in seconds."""
    # After the name of the program, which may have spaces in it.
    fields = Path(f"/proc/{homeserver.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory_used_mib(homeserver: Homeserver) -> float:
    """The most memory that a homeserver of one process has had, in MiB."""
    lines = Path(f"/proc/{homeserver.pid}/status").read_text().splitlines()
    (peak,) = (line for line in lines if line.startswith("VmHWM:"))
    return int(peak.split()[1]) / 1024
