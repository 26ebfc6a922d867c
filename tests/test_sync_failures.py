"""Our part of a response fails: the rest of it is as ever, and nothing is lost.

What is sabotaged is the module, not Synapse: it fails for as long as a file says so.
"""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from harness.client import Client, JsonDict, quote
from harness.homeserver import Homeserver
from harness.wait import eventually
from tests.sliding import MEMBER, Connection, no_window, send_known, subscription
from tests.support import (
    HOUR_MS,
    MakeHomeserver,
    follow_until_seen,
    ids,
    joined_room,
    quiet_token,
    sabotage,
    send_plain,
    sticky_in,
    text,
    timeline_in,
)

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("sync failures")]

# Reading events, whether a client lacks their senders, and writing events.
READ = "visible_sticky_events"
LAZY = "_members_to_add"
WRITE = "serialize"
FUNCTIONS = [
    f"synapse_sticky.seams.events:EventSource.{READ}",
    f"synapse_sticky.seams.events:EventSource.{WRITE}",
    "synapse_sticky.seams.events:EventSource._filter",
    f"synapse_sticky.hooks.sync:StickySyncHandler.{LAZY}",
]
COMPLAINT = "Cannot add sticky events to a response of"

# Timelines do not show what is sent sticky here, or nothing at all.
UNSEEN: JsonDict = {"room": {"timeline": {"not_types": [MEMBER]}}}
NOTHING: JsonDict = {"room": {"timeline": {"types": []}, "state": {"types": []}}}


class Saboteur:
    """Lets the module fail, or hang, at will."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    @contextmanager
    def breaks(self, name: str) -> Iterator[None]:
        """Let a function fail."""
        file = self._directory / name
        file.touch()
        try:
            yield
        finally:
            file.unlink()

    @contextmanager
    def holds(self, name: str, call: Callable[[], JsonDict]) -> Iterator[Callable[[], JsonDict]]:
        """Call something that comes to that function, and keep it there until the end."""
        hold, held = (self._directory / f"{prefix}_{name}" for prefix in ("slow", "in"))
        hold.touch()
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(call)
            try:
                eventually(held.exists, what=f"{name} being called")
                yield partial(future.result, 30)
            finally:
                hold.unlink()
                held.unlink(missing_ok=True)


@pytest.fixture(scope="module")
def sabotaged(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Homeserver]:
    """A server whose module can be made to fail."""
    directory = tmp_path_factory.mktemp("sabotaged")
    homeserver = Homeserver(directory=directory)
    sabotage(homeserver, "Unreliable", {"directory": str(directory), "functions": FUNCTIONS})
    try:
        homeserver.start()
        yield homeserver
    finally:
        homeserver.close()


@pytest.fixture
def saboteur(sabotaged: Homeserver) -> Saboteur:
    """Who makes it fail."""
    return Saboteur(sabotaged.directory)


@pytest.fixture
def homeserver(sabotaged: Homeserver) -> Homeserver:
    """The server whose module can be made to fail, for `alice` and `bob` too."""
    return sabotaged


@pytest.mark.parametrize("function", [READ, LAZY])
def test_sync(alice: Client, bob: Client, room: str, saboteur: Saboteur, function: str) -> None:
    # C2a, C3
    filter_json = {"room": {**UNSEEN["room"], "state": {"lazy_load_members": True}}}
    sync = partial(bob.sync, filter=filter_json)
    since = quiet_token(bob)
    sent = send_known(alice, room, 2)
    (plain,) = (alice.send(room, type="org.example.plain"),)
    for token in (since, None):
        with saboteur.breaks(function):
            first = sync(token)
            assert plain in ids(timeline_in(first, room))
            assert sticky_in(first, room) == []
            # The same again, since nothing has come of it.
            second = sync(first["next_batch"])
            assert joined_room(second, room) == {}
            assert second["next_batch"] == first["next_batch"]
        third = sync(second["next_batch"])
        assert ids(sticky_in(third, room)) == sent
        assert timeline_in(third, room) == []
        assert joined_room(sync(third["next_batch"]), room) == {}


def test_sections_that_cannot_be_written(
    alice: Client, bob: Client, room: str, saboteur: Saboteur
) -> None:
    # C2a, C3
    since = quiet_token(bob)
    sent = send_known(alice, room, 2)
    for token in (since, None):
        with saboteur.breaks(WRITE):
            started = time.monotonic()
            answer = bob.sync(token, 10_000, filter=NOTHING)
            for _ in range(2):
                assert sticky_in(answer, room) == []
                answer = bob.sync(answer["next_batch"], 10_000, filter=NOTHING)
            # Not as often as a client can ask. From the start on, there is other news at first.
            assert time.monotonic() - started > (1.9 if token is None else 2.9)
        answer = bob.sync(answer["next_batch"], filter=NOTHING)
        assert ids(sticky_in(answer, room)) == sent
        answer = bob.sync(answer["next_batch"], filter=NOTHING)
        assert sticky_in(answer, room) == []


def test_beside_sections_that_cannot_be_written(
    alice: Client, bob: Client, room: str, saboteur: Saboteur
) -> None:
    # C2a
    since = quiet_token(bob)
    sent = send_known(alice, room, 1)
    plain = alice.send(room, type="org.example.plain")
    with saboteur.breaks(WRITE):
        took_s = []
        for _ in range(5):
            started = time.monotonic()
            answer = bob.sync(since, filter=UNSEEN)
            took_s.append(time.monotonic() - started)
            assert ids(timeline_in(answer, room)) == [plain]
        # What else is new does not wait. The fastest counts: a busy machine is no wait of ours.
        assert min(took_s) < 0.9, took_s
    answer = bob.sync(answer["next_batch"], filter=UNSEEN)
    assert ids(sticky_in(answer, room)) == sent


def test_rooms_joined_meanwhile(alice: Client, bob: Client, room: str, saboteur: Saboteur) -> None:
    # C5
    other = alice.create_room(preset="public_chat")
    early = send_known(alice, other, 2)
    send_plain(alice, other, 1)
    # A client that has read further than those.
    late = send_known(alice, room, 1)
    since = follow_until_seen(bob, room, late, filter=UNSEEN).next_batch
    bob.join(other)
    for function in (READ, WRITE):
        with saboteur.breaks(function):
            answer = bob.sync(since, filter=UNSEEN)
            assert "timeline" in joined_room(answer, other)
            assert sticky_in(answer, other) == []
            answer = bob.sync(answer["next_batch"], filter=UNSEEN)
        answer = bob.sync(answer["next_batch"], filter=UNSEEN)
        assert ids(sticky_in(answer, other)) == early
        assert sticky_in(answer, room) == []
        answer = bob.sync(answer["next_batch"], filter=UNSEEN)
        assert joined_room(answer, other) == {}


def test_long_polls(
    homeserver: Homeserver, alice: Client, bob: Client, room: str, saboteur: Saboteur
) -> None:
    # C6
    since = quiet_token(bob)
    sent = send_known(alice, room, 1)
    log = homeserver.log_position()
    with ThreadPoolExecutor(1) as pool:
        with saboteur.breaks(READ):
            # They sleep, although the position lies behind.
            started = time.monotonic()
            answer = bob.sync(since, 2_000, filter=UNSEEN)
            assert time.monotonic() - started > 1.9
            assert joined_room(answer, room) == {}
            waiting = pool.submit(bob.sync, answer["next_batch"], 30_000, UNSEEN)
            time.sleep(1)
            assert not waiting.done()
        # And are answered soon after it has passed, not at their end.
        answer = waiting.result(15)
        assert ids(sticky_in(answer, room)) == sent
        assert time.monotonic() - started < 20
    # Said once a minute at most, and nothing of what the event says.
    complaints = [line for line in homeserver.log_since(log).splitlines() if COMPLAINT in line]
    assert len(complaints) <= 1


def test_sliding_sync(alice: Client, bob: Client, room: str, saboteur: Saboteur) -> None:
    # C2a, X1
    connection = Connection(bob, {}, {room: subscription()})
    sent = send_known(alice, room, 2)
    connection.collect(room, sent)
    sent += send_known(alice, room, 2)
    for function in (READ, WRITE):
        reader = connection.without_pos()
        reader.since = connection.since
        with saboteur.breaks(function):
            # The room is new to this connection, so all its events are due.
            answer = reader.ask()
            assert answer.body["rooms"][room]["initial"]
            assert answer.sections == {}
            started = time.monotonic()
            assert reader.ask(timeout_ms=2_000).sections == {}
            assert time.monotonic() - started > 1.9
        answer = reader.ask()
        assert answer.sticky(room) == sent
        assert reader.ask().sections == {}


@pytest.mark.parametrize("delete_local_events", [True, False])
def test_events_that_are_purged_meanwhile(
    homeserver: Homeserver,
    alice: Client,
    bob: Client,
    room: str,
    saboteur: Saboteur,
    delete_local_events: bool,
) -> None:
    # C2a
    purged = send_known(alice, room, 2)
    kept = send_known(alice, room, 2)
    admin = homeserver.register(admin=True)
    # Its events are read, and not filtered yet.
    with saboteur.holds("_filter", partial(bob.sync, filter=NOTHING)) as answer_of:
        purge = admin.request(
            "POST",
            f"/_synapse/admin/v1/purge_history/{quote(room)}/{quote(kept[0])}",
            json={"delete_local_events": delete_local_events},
        )
        path = f"/_synapse/admin/v1/purge_history_status/{purge['purge_id']}"
        eventually(lambda: admin.request("GET", path)["status"] == "complete")
    answer = answer_of()
    assert ids(sticky_in(answer, room)) == kept
    again = bob.sync(answer["next_batch"], filter=NOTHING)
    assert joined_room(again, room) == {}
    assert set(ids(sticky_in(bob.sync(filter=NOTHING), room))).isdisjoint(purged)


# C2a
def test_what_is_bundled_cannot_be_read(make_homeserver: MakeHomeserver) -> None:
    homeserver = make_homeserver()
    sabotage(homeserver, "UnreadableBundles")
    homeserver.start()
    alice, bob = homeserver.register(), homeserver.register()
    hidden = {"type": "m.room.history_visibility", "content": {"history_visibility": "joined"}}
    room = alice.create_room(preset="public_chat", initial_state=[hidden])
    (event_id,) = send_known(alice, room, type="m.room.message", content=text("x"))
    edit = {"rel_type": "m.replace", "event_id": event_id}
    content = {**text("*"), "m.new_content": text("y"), "m.relates_to": edit}
    alice.send(room, content, sticky_ms=HOUR_MS)
    bob.join(room)
    position = homeserver.log_position()
    assert event_id in ids(bob.messages(room)["chunk"])
    shown = bob.event(room, event_id)
    assert "m.replace" not in shown["unsigned"].get("m.relations", {})
    # Others are shown what Synapse shows them.
    shown = alice.event(room, event_id)
    assert "m.replace" in shown["unsigned"]["m.relations"]
    eventually(
        lambda: "Cannot tell what may be bundled" in homeserver.problems_since(position),
        what="the complaint in the log",
    )


# X4, C2a
def test_many_joins_are_waited_for_once(make_homeserver: MakeHomeserver, tmp_path: Path) -> None:
    homeserver = make_homeserver()
    functions = ["synapse_sticky.noticing.indexer:Indexer._read_news"]
    sabotage(homeserver, "Unreliable", {"directory": str(tmp_path), "functions": functions})
    homeserver.start()
    alice, bob = homeserver.register(), homeserver.register()
    rooms = [alice.create_room(preset="public_chat") for _ in range(12)]
    for room in rooms:
        send_known(alice, room)
    connection = Connection(bob, {"all": no_window()})
    connection.drain()
    (tmp_path / "slow__read_news").touch()
    for room in rooms:
        bob.join(room)
    began = time.monotonic()
    connection.ask()
    # One after the other that would be six seconds. On a busy machine a second more than one
    # wait is no sign of that.
    assert time.monotonic() - began < 5
    (tmp_path / "slow__read_news").unlink()
