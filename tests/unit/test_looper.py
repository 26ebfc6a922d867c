"""Servers are paid, however many, and Synapse's queues wait for that or for the first look."""

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from functools import partial
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from synapse_sticky.seams.federation import Accepted
from synapse_sticky.servers.confirmation import Reply
from synapse_sticky.servers.payment import NEVER
from tests.unit.paying import HOUR_MS, Event, Pdu, Queue, Server, World

# Synapse's queues wait for two seconds.
FAILS_MS = 900


def wait_of_queues(world: World, queues: int = 20) -> list[int]:
    """How long Synapse's queues wait for the first look."""
    waits: list[int] = []

    async def wait(server_name: str) -> None:
        await world.looper.before_transaction(server_name, {})
        waits.append(world.time.monotonic_ms())

    for number in range(queues):
        world.api.run_as_background_process("queue", wait, f"{number}.example.org")
    assert world.time.run(lambda: len(waits) == queues, 60_000)
    assert not world.looper.makes_wait("0.example.org")
    return waits


# F5
def test_first_look_that_fails_is_repeated() -> None:
    """Also while many queues wait for it; they go on only once it has succeeded."""
    world = World()
    world.store.fails_until_ms = FAILS_MS
    waits = wait_of_queues(world)
    assert FAILS_MS <= min(waits) <= max(waits) < 2_000
    assert world.store.reads <= 4


# F5a
def test_queues_wait_for_a_first_look_once() -> None:
    """For a bounded time, however long it goes on."""
    world = World()
    world.store.fails_until_ms = 3_600_000
    assert set(wait_of_queues(world)) == {2_000}
    assert world.store.reads <= 5


# F5
@pytest.mark.parametrize("fault", ["back-off", "error"])
def test_server_that_cannot_use_a_slot_holds_up_nobody(fault: str) -> None:
    """One waits for a slot in one room, and is to be left alone when another room is looked at."""
    world = World(slots=1)
    paused, waiting = world.server("paused.example"), world.server("waiting.example")
    # Each has the slot for a quarter of a second.
    busy = [world.server(f"{n}.example", takes_ms=10_000) for n in range(20)]
    is_left_alone = False

    def backing_off_ts() -> int:
        if is_left_alone and fault == "error":
            raise RuntimeError("the database is away")
        return world.time.now_ts() + 600_000 if is_left_alone else 0

    paused.backing_off_ts = backing_off_ts
    world.joined("!busy", *busy)
    world.joined("!a", paused)
    world.events("!busy", 1)
    world.time.run(lambda: False, 1_000)
    world.events("!a", 1)
    assert world.time.run(lambda: world.looper._slots.is_waiting(paused.name), 30_000)
    is_left_alone = True
    for room_id, server in (("!b", paused), ("!c", waiting)):
        world.events(room_id, 1)
        world.join(room_id, server)
    assert world.run_until_paid([waiting], 20_000)


# F5
def test_any_number_of_servers_may_wait() -> None:
    """Five hundred wait for slots, and when they have one for Synapse's queue, all at once."""
    world = World(slots=2)
    servers = [world.server(f"{n}.example", takes_ms=200) for n in range(500)]
    has_queue = False
    world.network.has_queue = lambda name: has_queue
    world.joined("!room", *servers)
    world.events("!room", 2)
    assert world.time.run(lambda: any(server.sending for server in servers), 30_000)
    world.time.run(lambda: False, 100)
    has_queue = True
    world.time.run(lambda: False, 2_000)
    has_queue = False
    assert world.run_until_paid(servers, 300_000)
    assert world.network.most_at_once <= 2
    assert not world.looper._running
    assert all(set(server.copies.values()) == {1} for server in servers)
    assert world.api.deepest < 100
    assert world.api.errors == []


# F5
def test_slots_are_as_many_as_there_are() -> None:
    """Also for servers that are sent many transactions one after the other, each for a moment."""
    world = World(slots=1)
    servers = [world.server(f"{n}.example", takes_ms=40 + 9 * n) for n in range(4)]
    world.joined("!room", *servers)
    world.events("!room", 1_000)
    assert world.run_until_paid(servers, 120_000)
    assert world.network.most_at_once == 1


# F5a
def test_who_waits_for_one_server_is_not_woken_by_others() -> None:
    """Synapse's queues wait for the payment of their own server."""
    world = World(slots=100)
    servers = [world.server(f"{n}.example", takes_ms=1_500) for n in range(60)]
    world.joined("!room", *servers)
    world.events("!room", 2)
    for server in servers:
        # It is away.
        world.looper.transaction_begins(server.name)
    world.time.run(lambda: False, 14_000)
    for server in servers:
        world.looper.transaction_ended(server.name, False)
    assert world.time.run(lambda: all(server.sending for server in servers), 10_000)
    Event.woken = 0
    for server in servers:
        world.api.run_as_background_process(
            "queue", world.looper.before_transaction, server.name, {}
        )
    assert world.run_until_paid(servers, 60_000)
    assert Event.woken <= 4 * len(servers)


# F2
@pytest.mark.parametrize("grace_period", ["0s", "1ms", "15s", "10m"])
def test_second_copies_come_whatever_the_grace_period_is(grace_period: str) -> None:
    """Many events from before a join are settled within a minute or so."""
    world = World(federation_grace_period=grace_period)
    server = world.server("b.example")
    world.joined("!room")
    world.events("!room", 30)
    world.time.run(lambda: False, 1_000)
    world.join("!room", server)
    assert world.run_until_paid([server], 120_000)
    assert set(server.copies.values()) == {2}
    assert world.api.errors == []


# F2, F5
def test_payments_go_on_while_looks_fail() -> None:
    """A server that joins is paid, though the database does not say what else is to do."""
    world = World()
    server = world.server("b.example")
    world.joined("!room")
    world.events("!room", 3)

    async def queued_up_to() -> int:
        raise RuntimeError("the database is away")

    world.network.queued_up_to = queued_up_to  # type: ignore[method-assign]
    world.time.run(lambda: False, 60_000)
    world.time.run(lambda: world.looper._next_look > world.time.monotonic_ms() + 9_000, 60_000)
    world.join("!room", server)
    assert world.time.run(lambda: bool(server.copies), 3_000)


# F3
def test_room_that_cannot_be_looked_into_at_first() -> None:
    """What is owed there from before this process is paid before Synapse's queue goes on."""
    world = World()
    server = world.server("b.example")
    world.joined("!room", server)
    world.events("!room", 2, is_noticed=False)
    world.network.knows_rooms = False
    world.time.run(lambda: False, 2_000)
    assert world.looper._is_first_look_over
    world.network.knows_rooms = True
    assert world.time.run(lambda: bool(server.sending), 5_000)
    assert world.looper._turn(server.name).is_ahead


# F5
def test_obstacles_do_not_change_all_the_time() -> None:
    """They are stored when they do: not whenever a server is asked, once in a second or two."""
    world = World()
    server = world.server("b.example", reply=Reply.HAS_NOT)
    world.joined("!room", server)
    world.events("!room", 30)
    told = []
    for _ in range(600):
        world.time.run(lambda: False, 1_000)
        told.append(world.looper.obstacles())
    changes = sum(before != after for before, after in pairwise(told))
    assert 2 < max(server.copies.values()) < 15
    # When a pause begins, and shortly before it ends.
    assert changes <= 2 * max(server.copies.values()) + 2


# F5
def test_few_servers_are_asked_at_once_whether_they_have_kept_events() -> None:
    world = World(slots=100, federation_grace_period="1s")
    servers = [world.server(f"{n}.example", takes_ms=500) for n in range(200)]
    world.joined("!room")
    world.events("!room", 3)
    world.time.run(lambda: False, 1_000)
    asked, most = 0, 0
    has_in_history = world.network.has_in_history

    async def ask(server_name: str, event_id: str) -> Reply:
        nonlocal asked, most
        asked += 1
        most = max(most, asked)
        reply = await has_in_history(server_name, event_id)
        asked -= 1
        return reply

    world.network.has_in_history = ask  # type: ignore[method-assign]
    world.join("!room", *servers)
    assert world.run_until_paid(servers, 300_000)
    assert 10 <= most <= 20


# F1, F7
@pytest.mark.parametrize("rooms", [1, 8])
def test_server_that_answers_no_question_is_sent_events(rooms: int) -> None:
    """In all rooms, and soon: one question without an answer tells it for all of them."""
    world = World()
    server = world.server("b.example", asks_ms=10_000, reply=Reply.SILENT)
    for number in range(rooms):
        world.events(f"!{number}", 5)
        world.join(f"!{number}", server)
    assert world.time.run(lambda: len(server.copies) == 5 * rooms, 30_000)
    assert world.run_until_paid([server], 600_000)
    assert set(server.copies.values()) <= {1, 2}
    assert server.questions <= 10


# F5
@pytest.mark.parametrize("count", [1, 5, 30, 50])
def test_queue_does_not_wait_for_events_that_nobody_asks_for(count: int) -> None:
    """After an outage Synapse's queue waits for two seconds in all, however much it sends."""
    world = World(slots=3)
    server = world.server("b.example")
    world.joined("!room", server)
    world.events("!room", 300)
    looper, waits = world.looper, []
    world.time.run(lambda: server.name in looper._debtors, 40_000)
    looper.transaction_begins(server.name)
    looper.transaction_ended(server.name, False)

    async def send() -> None:
        began = world.time.monotonic_ms()
        await looper.before_transaction(server.name, {"!room": count})
        waits.append(world.time.monotonic_ms() - began)
        looper.transaction_begins(server.name)
        server.synapse_sends = True
        await world.time.sleep(20)
        server.synapse_sends = False
        ids = [f"$plain{len(waits)}.{number}" for number in range(count)]
        looper.on_accepted(server.name, [Accepted("!room", ids, [])])
        looper.transaction_ended(server.name, True)

    for number in range(1, 61):
        world.api.run_as_background_process("queue", send)
        assert world.time.run(lambda number=number: len(waits) == number, 30_000)  # type: ignore[misc]
        world.time.run(lambda: False, 50)
    assert sum(waits) <= 2_100
    assert world.api.errors == []


# F2, F5
@pytest.mark.parametrize("every_ms", [200, 1_000])
def test_plain_events_in_the_room_cost_no_questions(every_ms: int) -> None:
    """A thousand events from before a join are not asked for one by one because of them."""
    world = World()
    server = world.server("b.example", takes_ms=50)
    queue = Queue(world, server, every_ms, "!room")
    world.events("!room", 1_000)
    world.join("!room", server)
    assert world.time.run(lambda: set(server.copies.values()) == {2}, 300_000)
    assert queue.refused == 0
    assert server.questions <= 150


# F2, F8
@pytest.mark.parametrize("reads_ms", [None, 5, 10])
def test_thousand_events_cost_a_quick_joiner_few_requests(reads_ms: int | None) -> None:
    """All are sent twice, and one question tells for a transaction."""
    world = World()
    server = world.server("b.example", reads_ms=reads_ms)
    world.events("!room", 1_000)
    world.join("!room", server)
    assert world.run_until_paid([server], 120_000)
    assert set(server.copies.values()) == {2}
    assert server.sends + server.questions <= 85
    assert server.pruned == 0


# F2, F8
@pytest.mark.parametrize("reads_ms", [None, 5, 10, 40])
def test_thousand_events_in_a_row_cost_a_joiner_sixty_requests(reads_ms: int | None) -> None:
    """It shows with each answer what came before, so they are sent once."""
    world = World()
    server = world.server("b.example", reads_ms=reads_ms)
    world.events("!room", 1_000, row_of=1_000)
    world.join("!room", server)
    assert world.run_until_paid([server], 60_000)
    assert set(server.copies.values()) == {1}
    assert server.sends + server.questions <= 60
    assert server.pruned == 0


# F1, F2, F7
@settings(deadline=None, max_examples=60)
@given(st.integers(0, 1 << 32))
def test_joiner_that_refuses_some_at_first_loses_nothing(seed: int) -> None:
    """For seconds it cannot always fetch what events refer to, and has others' to read as well."""
    world, random = World(), Random(seed)
    refuses = random.choice([0, 0.02, 0.2, 0.5, 1])
    server = world.server(
        "b.example",
        takes_ms=random.choice([20, 200]),
        reads_ms=random.choice([None, 3, 10, 40]),
        fetches=lambda: random.random() > refuses,
    )

    def disturb() -> None:
        nonlocal refuses
        is_over = world.time.monotonic_ms() > 8_000
        refuses = 0 if is_over else random.choice([0, 0.02, 0.2, 0.5, 1])
        if server.reads_ms is not None:
            server.reads_ms = 10 if is_over else random.choice([3, 10, 40, 333])
            for number in range(random.choice([0, 0, 0, 20, 120])):
                world.network.stage(server, f"$other{number} of {world.time.monotonic_ms()}")
        if not is_over:
            world.time.call_later(random.choice([50, 500, 2_000, 5_000]), disturb)

    count = random.choice([5, 30, 120, 500])
    world.events("!room", count, row_of=random.choice([1, 3, 15, 50, 500]))
    world.join("!room", server)
    disturb()
    assert world.run_until_paid([server], HOUR_MS)
    world.time.run(lambda: not server.staged, 200_000)
    assert {f"${number + 1}" for number in range(count)} <= server.kept


# F2, F5
@pytest.mark.parametrize("rereads_ms", [3, 20, 35])
def test_second_copies_are_not_thrown_away(rereads_ms: int) -> None:
    """The joiner has nearly all, so no answer tells how far it is; what it has not is taken in."""
    world = World()
    lost = {f"${number}" for number in range(100, 120)}
    server = world.server("b.example", reads_ms=10, rereads_ms=rereads_ms)
    stage = world.network.stage

    def lose_first_copies(server: Server, event_id: str) -> None:
        if server.copies[event_id] > 1 or event_id not in lost:
            stage(server, event_id)

    world.network.stage = lose_first_copies  # type: ignore[method-assign]
    world.events("!room", 400)
    world.join("!room", server)
    assert world.run_until_paid([server], 120_000)
    world.time.run(lambda: not server.staged, 60_000)
    assert server.pruned == 0
    assert len(server.kept) == 400


# F2, F5, F7
@pytest.mark.parametrize("count", [200, 1_000])
def test_slow_joiner_is_asked_after_each_transaction(count: int) -> None:
    """It reads three events in a second, and throws nothing away."""
    world = World()
    server = world.server("b.example", reads_ms=333)
    world.events("!room", count)
    world.join("!room", server)
    assert world.run_until_paid([server], HOUR_MS)
    assert set(server.copies.values()) == {2}
    assert len(server.kept) == count
    assert server.pruned == 0
    assert server.sends + server.questions <= 125


# F1, F7
@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1 << 32))
def test_joiner_that_reads_now_fast_now_slowly_loses_nothing(seed: int) -> None:
    """It is asked after each transaction, and each event is sent twice."""
    world, random = World(), Random(seed)
    server = world.server("b.example", takes_ms=random.choice([20, 50, 200]))

    def change() -> None:
        server.reads_ms = random.choice([3, 5, 5, 10, 10, 20, 40, 333])
        world.time.call_later(random.choice([500, 2_000, 5_000]), change)

    change()
    world.events("!room", 500)
    world.join("!room", server)
    assert world.run_until_paid([server], HOUR_MS)
    world.time.run(lambda: not server.staged, 200_000)
    assert len(server.kept) == 500
    assert set(server.copies.values()) <= {1, 2}


# F1
@pytest.mark.parametrize("is_joiner", [False, True])
def test_server_that_has_rejected_one_event(is_joiner: bool) -> None:
    """It is sent that one a few times more in an hour, and the others not again."""
    world = World()
    server = world.server("b.example", rejected={"$50"})
    if is_joiner:
        world.events("!room", 50)
        world.join("!room", server)
    else:
        world.joined("!room", server)
        world.events("!room", 50)
    world.time.run(lambda: False, HOUR_MS - 60_000)
    assert world.owed(server) == ["$50"]
    assert server.copies.pop("$50") <= 10
    assert max(server.copies.values()) <= 2
    assert server.questions < 500


# F5, F7
@pytest.mark.parametrize("rooms", [("!a", "!b"), ("!b", "!a")])
def test_room_that_always_fails_stops_no_other(rooms: tuple[str, str]) -> None:
    """It is put off ever more, and the other rooms of the same servers are paid."""
    world = World()
    server = world.server("b.example")
    lookups = 0
    servers_in_room = world.network.servers_in_room

    async def find(room_id: str) -> Collection[str]:
        nonlocal lookups
        if room_id == "!a" and server.name in world.looper._debtors:
            lookups += 1
            raise RuntimeError("the room has no state")
        return await servers_in_room(room_id)

    world.network.servers_in_room = find  # type: ignore[method-assign]
    for room_id in rooms:
        world.joined(room_id, server)
        world.events(room_id, 5)
    assert world.time.run(lambda: len(server.kept) == 5, 60_000)
    world.time.run(lambda: False, 3_000_000)
    assert lookups < 70


# F5
@pytest.mark.parametrize(("takes_ms", "limit_s"), [(50, 12), (400, 25)])
def test_payment_keeps_its_pace(takes_ms: int, limit_s: int) -> None:
    """A good server is sent a thousand events as fast as it reads them, ten milliseconds each."""
    world = World()
    server = world.server("b.example", takes_ms=takes_ms)
    world.time.run(lambda: False, 2_000)
    world.events("!room", 1_000)
    world.join("!room", server)
    assert world.time.run(lambda: len(server.copies) == 1_000, 1_000 * limit_s)


# F5
def test_database_that_was_away_for_a_moment() -> None:
    """It delays nobody for long."""
    world = World(slots=100)
    servers = [world.server(f"{number}.example") for number in range(100)]
    is_away, to_send = True, world.network.to_send

    async def read(event_ids: Sequence[str]) -> list[Pdu]:
        if is_away:
            raise RuntimeError("the connection was reset")
        return await to_send(event_ids)

    world.network.to_send = read  # type: ignore[method-assign]
    world.time.run(lambda: False, 2_000)
    world.events("!room", 5)
    world.join("!room", *servers)
    world.time.run(lambda: False, 500)
    is_away = False
    assert world.time.run(lambda: all(len(server.kept) == 5 for server in servers), 3_000)


# F5
def test_room_that_cannot_be_looked_into_is_looked_into_ever_more_rarely() -> None:
    world = World()
    server = world.server("b.example")
    lookups = 0

    async def find(room_id: str) -> Collection[str]:
        nonlocal lookups
        lookups += 1
        raise RuntimeError("the room has no state")

    world.network.servers_in_room = find  # type: ignore[method-assign]
    world.joined("!room", server)
    world.events("!room", 1)
    world.time.run(lambda: False, 600_000)
    assert 5 < lookups < 20


# F7
def test_refusals_for_a_minute_give_nothing_up() -> None:
    """A server reports passing faults as refusals, too."""
    world = World()
    server = world.server("b.example")
    server.refuses = lambda: world.time.monotonic_ms() < 90_000
    world.events("!room", 5)
    world.join("!room", server)
    assert world.run_until_paid([server], 600_000)
    assert len(server.kept) == 5


# F1, F5
def test_joiner_that_answers_no_question_is_sent_many_events_twice() -> None:
    world = World()
    server = world.server("b.example", reply=Reply.SILENT)
    world.events("!room", 200)
    world.join("!room", server)
    assert world.run_until_paid([server], 600_000)
    assert set(server.copies.values()) == {2}


# F1, F5
@pytest.mark.parametrize("is_joiner", [False, True])
def test_server_that_denies_that_it_has_anything(is_joiner: bool) -> None:
    """It is sent everything a few times in an hour, and no more."""
    world = World()
    server = world.server("b.example", reply=Reply.HAS_NOT)
    world.joined("!room", *([] if is_joiner else [server]))
    world.events("!room", 100)
    if is_joiner:
        world.join("!room", server)
    world.time.run(lambda: False, HOUR_MS - 60_000)
    assert max(server.copies.values()) <= 8


# F5
def test_servers_are_checked_by_turns() -> None:
    """Those that were asked first and do not answer take no places from others."""
    world = World(slots=100)
    silent = [world.server(f"{number}.example") for number in range(60)]
    good = world.server("good.example")
    has_in_history = world.network.has_in_history

    async def ask(server_name: str, event_id: str) -> Reply:
        if server_name == good.name:
            return await has_in_history(server_name, event_id)
        await world.time.sleep(10_000)
        return Reply.SILENT

    world.network.has_in_history = ask  # type: ignore[method-assign]
    world.events("!room", 5)
    world.join("!room", *silent)
    world.time.run(lambda: False, 3_000)
    world.join("!room", good)
    assert world.run_until_paid([good], 40_000)


# F7
def test_event_that_is_always_refused_is_given_up() -> None:
    """After some minutes, and a few tries."""
    world = World()
    server = world.server("b.example", refuses=lambda: True)
    world.events("!room", 5)
    world.join("!room", server)
    assert world.run_until_paid([server], 1_200_000)
    assert max(server.copies.values()) <= 12


# F5
def test_transactions_on_their_way_are_bounded() -> None:
    """A server keeps its slot for a moment only, but memory until its transaction ends."""
    world = World(slots=30)
    for number in range(300):
        world.server(f"{number}.example", takes_ms=20_000)
    world.joined("!room", *world.network.servers.values())
    world.events("!room", 2)
    world.time.run(lambda: False, 60_000)
    assert 30 < world.network.most_at_once <= 120


class Chaos(World):
    """Everything goes wrong at times, until it is over."""

    def __init__(self, random: Random) -> None:
        super().__init__(slots=random.randint(1, 3), federation_grace_period="1s")
        self.random = random
        self.is_over = False
        self.joins = Counter[str]()
        self.network.has_queue = lambda name: self.chance(0.2)
        self.servers = [self.server(f"{n}.example") for n in range(random.randint(1, 12))]
        for server in self.servers:
            server.loses = partial(self.chance, random.choice([0, 0.1, 0.9]))
            server.refuses = partial(self.chance, random.choice([0, 0, 0.05]))
        for number, server in enumerate(self.servers):
            self.joined(f"!{number % 4}", server)
            self.joined("!all", server)

    def chance(self, probability: float) -> bool:
        """Whether something goes wrong now."""
        return not self.is_over and self.random.random() < probability

    def disturb(self) -> None:
        """Let anything happen."""
        server = self.random.choice(self.servers)
        room_id = self.random.choice(list(self.network.rooms))
        looper, now_ts = self.looper, self.time.now_ts()

        def join() -> None:
            self.joins[server.name] += 1
            self.join(room_id, server)

        happenings: list[Callable[[], object]] = [
            lambda: self.events(room_id, self.random.randint(1, 70)),
            join,
            lambda: looper.on_back(server.name),
            lambda: looper.retry(server.name),
            lambda: setattr(server, "fails", self.random.choice([None, 0, 413, 429, 500])),
            lambda: setattr(server, "takes_ms", self.random.choice([5, 50, 500, 20_000])),
            lambda: setattr(server, "reply", self.random.choice([None, None, *Reply])),
            lambda: setattr(server, "backing_off_ts", lambda: now_ts + 60_000),
            lambda: setattr(server, "backing_off_ts", lambda: 0),
            lambda: setattr(self.network, "knows_rooms", self.random.random() < 0.8),
            partial(self.send_by_synapse, server),
        ]
        self.random.choice(happenings)()

    def send_by_synapse(self, server: Server) -> None:
        """Let Synapse's own queue send, unless it does so already."""
        if not self.looper._turn(server.name).synapse_sends:
            self.api.run_as_background_process("synapse", self._send_by_synapse, server)

    async def _send_by_synapse(self, server: Server) -> None:
        name, began = server.name, self.time.monotonic_ms()
        if name in self.looper._turn_over:
            return
        if self.looper.makes_wait(name):
            await self.looper.before_transaction(name, {"!all": self.random.randint(0, 50)})
        assert self.time.monotonic_ms() - began <= 12_000
        self.looper.transaction_begins(name)
        await self.time.sleep(self.random.choice([5, 500]))
        arrived = self.random.random() < 0.8
        owed = self.ledger.owed(name, "!all")[-self.random.randint(1, 50) :]
        if arrived and owed:
            ids = [event.event_id for event in owed]
            server.kept.update(event_id for event_id in ids if not self.chance(0.1))
            self.looper.on_accepted(name, [Accepted("!all", ids, ids)])
        self.looper.transaction_ended(name, arrived)

    def watch(self, duration_ms: int) -> None:
        """Let time go on, and check all the time."""

        def check() -> bool:
            self.check()
            return False

        self.time.run(check, duration_ms)

    def check(self) -> None:
        """Nobody has a slot who does nothing, and everybody has something to wait for."""
        looper = self.looper
        waiting = {s.name for s in self.servers if looper._slots.is_waiting(s.name)}
        held = {s.name for s in self.servers if looper._slots.has(s.name)}
        assert held <= looper._running
        assert not waiting & (looper._running | held)
        for name, debtor in looper._debtors.items():
            assert (
                name in looper._running
                or name in waiting
                or debtor.next_ts < NEVER
                or debtor.history
                or debtor.history.is_checking
            )

    def calm(self) -> None:
        """Let everything work from now on."""
        self.is_over = True
        self.network.knows_rooms = True
        for server in self.servers:
            server.fails, server.takes_ms, server.reply = None, 20, None
            server.backing_off_ts = lambda: 0


# F1, F5, F7
@settings(deadline=None, max_examples=30)
@given(st.integers(0, 1 << 32), st.integers(0, 200))
def test_whatever_happens_servers_are_paid(seed: int, happenings: int) -> None:
    """No slot is lost, nobody is forgotten, and nothing is sent without end."""
    random = Random(seed)
    world = Chaos(random)
    for room_id in world.network.rooms:
        world.events(room_id, random.randint(1, 60))
    for _ in range(happenings):
        world.disturb()
        pause_ms = random.choice([0, 1, 20, 300, 2_000, 30_000])
        world.watch(pause_ms)
    for server in world.servers:
        # An event whose every copy is lost, or every question unanswered.
        assert max(server.copies.values(), default=0) <= 12 * (1 + world.joins[server.name])
    world.calm()
    before = {server.name: Counter(server.copies) for server in world.servers}
    assert world.run_until_paid(world.servers, HOUR_MS)
    world.watch(120_000)
    # What has expired is forgotten when it would be tried again.
    assert world.time.run(lambda: not world.looper._debtors, 2 * HOUR_MS)
    for server in world.servers:
        assert max((server.copies - before[server.name]).values(), default=0) <= 3
    assert not world.looper._turns
    assert world.api.errors == []
    assert world.api.deepest < 120


# F3, F5, F5a
@pytest.mark.parametrize("takes_ms", [20, 5_000])
def test_what_was_missed_comes_first(takes_ms: int) -> None:
    """Synapse's queue, whose catch-up begins with the newest, waits for it: for two seconds."""
    world = World(federation_grace_period="1s")
    server = world.server("b.example", fails=503)
    world.joined("!room", server)
    world.time.run(lambda: False, 2_000)
    world.events("!room", 30)
    assert world.time.run(lambda: bool(world.looper.debts()), 10_000)
    world.looper.transaction_begins(server.name)
    world.looper.transaction_ended(server.name, arrived=False)
    world.time.run(lambda: False, 5_000)
    server.fails, server.takes_ms = None, takes_ms
    began_ms, ended = world.time.monotonic_ms(), []

    async def send() -> None:
        assert world.looper.makes_wait(server.name)
        await world.looper.before_transaction(server.name, {"!room": 1})
        ended.append((list(server.copies), world.time.monotonic_ms() - began_ms))

    world.api.run_as_background_process("queue", send)
    assert world.time.run(lambda: bool(ended), 60_000)
    ((sent, waited_ms),) = ended
    assert waited_ms <= 2_000
    assert sent == ([f"${number}" for number in range(1, 31)] if takes_ms == 20 else [])
