"""Servers that are simulated, and a looper that pays them, in a time that is simulated too."""

import sys
from collections import Counter
from collections.abc import Callable, Collection, Coroutine, Iterable, Sequence
from functools import partial
from typing import Any

import attr
from twisted.internet import defer, task

from synapse_sticky.config import StickyEventsConfig
from synapse_sticky.deliverable.index import StickyIndex
from synapse_sticky.seams.background import Broadcast, Clock
from synapse_sticky.seams.bounds import NOTHING_READ
from synapse_sticky.seams.federation import Accepted, Answer, RequestFailed
from synapse_sticky.servers.confirmation import Reply
from synapse_sticky.servers.ledger import Ledger
from synapse_sticky.servers.looper import Looper
from synapse_sticky.storage.rows import Changes, EventChange, JoinChange

BEGIN_TS = 1_000_000_000
HOUR_MS = 3_600_000


class Time(Clock):
    """A time that goes from one thing to happen to the next."""

    def __init__(self) -> None:
        self._reactor: Any = task.Clock()

    def now_ts(self) -> int:
        """The time."""
        return BEGIN_TS + self.monotonic_ms()

    def monotonic_ms(self) -> int:
        """The time, for waits."""
        return int(self._reactor.seconds() * 1_000 + 0.5)

    def call_later(self, delay_ms: float, callback: Callable[[], object]) -> Callable[[], None]:
        """Call something after a while; what is returned keeps it from being called."""
        call = self._reactor.callLater(delay_ms / 1_000, callback)
        return lambda: call.cancel() if call.active() else None

    def sleep(self, duration_ms: float) -> Any:
        """Wait that long."""
        slept: defer.Deferred[None] = defer.Deferred()
        self._reactor.callLater(duration_ms / 1_000, slept.callback, None)
        return slept

    def run(self, until: Callable[[], bool], limit_ms: float) -> bool:
        """Let time go on until something is so; whether it was within some time."""
        end_ms = self.monotonic_ms() + limit_ms
        while not until():
            if self.monotonic_ms() > end_ms:
                return False
            calls = self._reactor.getDelayedCalls()
            next_s = min((call.getTime() for call in calls), default=end_ms / 1_000 + 1)
            self._reactor.advance(max(0, next_s - self._reactor.seconds()))
        return True


class Event(Broadcast):
    """As the real one, without Synapse, and it counts whom it wakes."""

    woken = 0

    def __init__(self, time: Time) -> None:
        self._time = time
        self._waiting: list[defer.Deferred[bool]] = []

    def notify_all(self) -> None:
        """Let everybody go on that waits now."""
        waiting, self._waiting = self._waiting, []
        for one in waiting:
            if not one.called:
                Event.woken += 1
                one.callback(True)

    def wait_for(self, limit_ms: int) -> Any:
        """Wait for the next call of that, for a bounded time."""
        waiting: defer.Deferred[bool] = defer.Deferred()
        if limit_ms <= 0:
            waiting.callback(False)
            return waiting
        self._waiting.append(waiting)

        def give_up() -> None:
            if not waiting.called:
                waiting.callback(False)

        self._time.call_later(limit_ms, give_up)
        return waiting


class Api:
    """Runs the background work, and at once, as Synapse's does."""

    def __init__(self, time: Time) -> None:
        self._time = time
        self.deepest = 0
        self.errors: list[Any] = []

    def run_as_background_process(
        self, desc: str, func: Callable[..., Coroutine[Any, Any, None]], *args: Any
    ) -> None:
        """Begin it."""
        depth, frame = 0, sys._getframe()
        while frame.f_back is not None:
            depth, frame = depth + 1, frame.f_back
        self.deepest = max(self.deepest, depth)
        defer.ensureDeferred(func(*args)).addErrback(self.on_error)

    def on_error(self, failure: Any) -> None:
        """Remember what should not have been."""
        self.errors.append(failure)

    def looping_background_call(self, func: Any, interval_ms: int, **kwargs: Any) -> None:
        """Do it again and again."""

        def again() -> None:
            self.run_as_background_process("loop", func)
            self._time.call_later(interval_ms, again)

        self._time.call_later(interval_ms, again)


class Store:
    """Stores nothing, and cannot be read at first."""

    def __init__(self, time: Time) -> None:
        self._time = time
        self.fails_until_ms = 0
        self.reads = 0

    async def get_watermarks(self, now_ts: int) -> list[Any]:
        """None."""
        self.reads += 1
        await self._time.sleep(1)
        if self._time.monotonic_ms() < self.fails_until_ms:
            raise RuntimeError("the database is away")
        return []

    async def store_watermarks(self, rows: Any, now_ts: int) -> None:
        """Forget them."""


class Reader:
    """Has an index, and tells of its changes."""

    def __init__(self) -> None:
        self.index = StickyIndex()
        self._listeners: list[Any] = []

    def subscribe(self, listener: Any) -> None:
        """Tell this one too."""
        self._listeners.append(listener)

    def take(self, events: list[EventChange], joins: list[JoinChange]) -> None:
        """Take over changes."""
        positions = [event.position or 0 for event in events] + [join.position for join in joins]
        position = max(positions)
        self.index.apply(events, joins, position)
        for listener in self._listeners:
            listener(Changes(events, joins, position, NOTHING_READ))


class Metrics:
    """Counts nothing."""

    def count(self, *args: Any, **labels: Any) -> None:
        """Count nothing."""


@attr.s(slots=True, auto_attribs=True, eq=False)
class Server:
    """A server that is sent events. Its attributes say how it behaves.

    Attributes:
        takes_ms: how long it takes to answer to transactions.
        asks_ms: how long to questions; as long if it is None.
        fails: what it answers to transactions instead, if that is an error: an HTTP status.
        breaks: what it answers to one with these events, if that is an error.
        reply: what it answers when asked for events, if not what is so.
        loses: how often it takes an event without having it then.
        rejected: the events that it takes and then does not have in its room's history.
        backing_off_ts: until when Synapse backs off from it, by how often that was asked.
        copies: how often each event was sent to it.
        kept: the events that it has.
        sending: how many transactions to it are on their way.
        synapse_sends: whether one of Synapse's own queue is; it refuses ours meanwhile.
        questions: how often it was asked for an event.
        reads_ms: how long it takes to read each event, one after the other, that it took; None if
            that is no time. Once a hundred are unread it throws away those that others of them
            refer to; all but the newest, if nothing is known of that.
        rereads_ms: how long it takes to ignore an event that it has.
        fetches: whether it gets what it asks for, if an event refers to one that it does not have;
            otherwise it refuses the event.
        tells_history: whether it can be asked what came before an event.
        outliers: the events that it has fetched and does not have in its room's history.
        sends: how often it answered a transaction of ours.
        hangs: whether it answers none of ours, and takes Synapse's beside them.
    """

    name: str
    takes_ms: int = 20
    asks_ms: int | None = None
    fails: int | None = None
    breaks: Callable[[Sequence[str]], int | None] = lambda event_ids: None
    reply: Reply | None = None
    loses: Callable[[], bool] = lambda: False
    refuses: Callable[[], bool] = lambda: False
    backing_off_ts: Callable[[], int] = lambda: 0
    copies: Counter[str] = attr.Factory(Counter)
    kept: set[str] = attr.Factory(set)
    sending: int = 0
    synapse_sends: bool = False
    questions: int = 0
    rejected: Collection[str] = ()
    reads_ms: int | None = None
    rereads_ms: int = 3
    sends: int = 0
    hangs: bool = False
    staged: dict[str, None] = attr.Factory(dict)
    pruned: int = 0
    fetches: Callable[[], bool] = lambda: True
    tells_history: bool = True
    outliers: set[str] = attr.Factory(set)


@attr.s(slots=True, frozen=True, auto_attribs=True)
class Pdu:
    """An event to send."""

    event_id: str


class Network:
    """Takes the place of the federation."""

    def __init__(self, time: Time) -> None:
        self._time = time
        self.servers: dict[str, Server] = {}
        self.rooms: dict[str, list[str]] = {}
        # Whether Synapse's queue for a server has anything.
        self.has_queue: Callable[[str], bool] = lambda name: False
        self.knows_rooms = True
        # What events refer to.
        self.previous: dict[str, list[str]] = {}
        self.sending_at_once = 0
        self.most_at_once = 0

    def sends_to(self, server_name: str) -> bool:
        """To this one too."""
        return True

    async def servers_in_room(self, room_id: str) -> Collection[str]:
        """Those that were put there."""
        await self._time.sleep(1)
        if not self.knows_rooms:
            raise RuntimeError("the database is away")
        return self.rooms.get(room_id, [])

    async def backing_off_until_ts(self, server_name: str) -> int:
        """As the server says."""
        return self.servers[server_name].backing_off_ts()

    async def to_send(self, event_ids: Sequence[str]) -> list[Pdu]:
        """All of them."""
        return [Pdu(event_id) for event_id in event_ids]

    def fitting(self, events: Sequence[Pdu]) -> Sequence[Pdu]:
        """All of them."""
        return events

    async def queued_up_to(self) -> int:
        """Everything."""
        return 1 << 60

    async def first_event_id(self, room_id: str) -> str:
        """One that everybody has."""
        return "$first"

    def remind_queue(self, server_name: str) -> bool:
        """Whether it has anything."""
        return self.has_queue(server_name)

    async def send(self, server_name: str, events: Collection[Pdu]) -> Answer:
        """Let the server take them, or not."""
        server = self.servers[server_name]
        assert not server.sending, "two at once"
        server.sending += 1
        self.sending_at_once += server.fails is None
        self.most_at_once = max(self.most_at_once, self.sending_at_once)
        fails = 0 if server.hangs else server.fails
        if fails is None:
            fails = server.breaks([one.event_id for one in events])
        is_refused = server.synapse_sends
        await self._time.sleep(20_000 if server.hangs else server.takes_ms)
        server.sending -= 1
        self.sending_at_once -= server.fails is None
        if is_refused:
            raise RequestFailed("it answered 429", 429)
        if fails is not None:
            raise RequestFailed(f"it answered {fails}", fails)
        refused = set()
        server.sends += 1
        for one in events:
            server.copies[one.event_id] += 1
            if server.refuses():
                refused.add(one.event_id)
            elif not server.loses():
                self.stage(server, one.event_id)
        return Answer(frozenset(one.event_id for one in events) - refused, frozenset(refused))

    def stage(self, server: Server, event_id: str) -> None:
        """Let a server read an event after those that it took before."""
        if server.reads_ms is None:
            self._take_in(server, event_id)
            return
        server.staged[event_id] = None
        if len(server.staged) == 1:
            self._read_next(server)

    def _read_next(self, server: Server) -> None:
        event_id = next(iter(server.staged))
        is_known = event_id in server.kept
        reads_ms = server.rereads_ms if is_known else server.reads_ms or 0
        self._time.call_later(reads_ms, partial(self._read, server, event_id))

    def _read(self, server: Server, event_id: str) -> None:
        del server.staged[event_id]
        self._take_in(server, event_id)
        if len(server.staged) >= 100:
            newest = list(server.staged)[-1]
            referred = {other for e in server.staged for other in self.previous.get(e, [])}
            kept = [e for e in server.staged if e == newest or e in self.previous]
            kept = [e for e in kept if e not in referred]
            server.pruned += len(server.staged) - len(kept)
            server.staged = dict.fromkeys(kept)
        if server.staged:
            self._read_next(server)

    def _take_in(self, server: Server, event_id: str) -> None:
        """As Synapse's `on_receive_pdu` does."""
        missing = [e for e in self.previous.get(event_id, []) if e not in server.kept]
        if missing:
            if not server.fetches():
                return
            for _ in range(10):
                server.kept.update(missing)
                missing = [
                    e for m in missing for e in self.previous.get(m, []) if e not in server.kept
                ]
            # Their state is asked for, and they come with it.
            server.outliers.update(missing)
        server.kept.add(event_id)

    async def has_event(self, server_name: str, event_id: str) -> Reply:
        """What the server says."""
        server = self.servers[server_name]
        return await self._asked(server, event_id, server.kept | server.outliers)

    async def has_with_history(
        self, server_name: str, room_id: str, event_ids: Sequence[str]
    ) -> tuple[Reply, Collection[str]] | None:
        """What the server says, as Synapse's `/backfill` does."""
        server = self.servers[server_name]
        if not server.tells_history:
            server.questions += 1
            await self._time.sleep(server.takes_ms)
            return None
        reply = await self._asked(server, event_ids[-1], server.kept | server.outliers)
        found, left = set[str](), self.previous.get(event_ids[-1], [])
        while left and len(found) < 100:
            has = {e for e in left if e in server.kept and e not in server.rejected}
            found |= has
            left = [other for e in has for other in self.previous.get(e, [])]
        return reply, found & set(event_ids) if reply is Reply.HAS else ()

    async def has_in_history(self, server_name: str, event_id: str) -> Reply:
        """What the server says."""
        server = self.servers[server_name]
        reply = await self._asked(server, event_id, server.kept)
        return Reply.HAS_NOT if event_id in server.rejected else reply

    async def _asked(self, server: Server, event_id: str, has: Collection[str]) -> Reply:
        server.questions += 1
        await self._time.sleep(server.takes_ms if server.asks_ms is None else server.asks_ms)
        if server.reply is not None:
            return server.reply
        return Reply.HAS if event_id in has or event_id == "$first" else Reply.HAS_NOT


class World:
    """A looper, its servers, and what they are owed."""

    def __init__(self, slots: int = 3, **config: Any) -> None:
        self.time = Time()
        self.api = Api(self.time)
        self.reader = Reader()
        self.store = Store(self.time)
        self.metrics = Metrics()
        self.network = Network(self.time)
        parsed = StickyEventsConfig.parse({"max_servers_at_once": slots, **config})
        fake: Any = self
        self.ledger = Ledger(
            self.time, fake.store, fake.reader, parsed.federation_grace_period_ms, -1
        )
        self.looper = Looper(
            fake.api,
            self.time,
            fake.reader,
            fake.network,
            self.ledger,
            parsed,
            fake.metrics,
            lambda: Event(self.time),
        )
        self.looper.start(parsed)
        self._events = 0
        self._position = BEGIN_TS

    def _next_position(self) -> int:
        self._position = max(self._position + 1, self.time.now_ts())
        return self._position

    def server(self, name: str, **attributes: Any) -> Server:
        """A server that is in no room."""
        return self.network.servers.setdefault(name, Server(name, **attributes))

    def events(
        self,
        room_id: str,
        count: int,
        lifetime_ms: int = HOUR_MS,
        *,
        is_noticed: bool = True,
        row_of: int = 0,
    ) -> None:
        """Send events to a room; unless they are noticed they are from before this process.

        Args:
            row_of: of so many, all but the first refer to the one before, and that to a plain
                event; 0 if nothing is known of that.
        """
        changes = []
        for number in range(count):
            self._events += 1
            if row_of:
                previous = self._events - 1 if number % row_of else f"plain{self._events}"
                self.network.previous[f"${self._events}"] = [f"${previous}"]
            position = self._next_position()
            changes.append(
                EventChange(
                    f"${self._events}",
                    room_id,
                    "@alice:a.example",
                    position,
                    position + lifetime_ms,
                    self._events,
                    owed=True,
                )
            )
        if is_noticed:
            self.reader.take(changes, [])
        else:
            self.reader.index.apply(changes, [], self._position)

    def joined(self, room_id: str, *servers: Server) -> None:
        """Let servers be in a room that they joined long ago."""
        names = self.network.rooms.setdefault(room_id, [])
        names += [server.name for server in servers if server.name not in names]

    def join(self, room_id: str, *servers: Server) -> None:
        """Let servers join a room now."""
        self.joined(room_id, *servers)
        joins = []
        for server in servers:
            position = self._next_position()
            joins.append(
                JoinChange(server.name, room_id, position, position + HOUR_MS, position, None)
            )
        self.reader.take([], joins)

    def owed(self, server: Server) -> list[str]:
        """The events that a server is owed, in all rooms."""
        return [
            event.event_id
            for room_id, names in self.network.rooms.items()
            if server.name in names
            for event in self.ledger.owed(server.name, room_id)
        ]

    def run_until_paid(self, servers: Iterable[Server], limit_ms: int) -> bool:
        """Whether servers have everything within some time."""
        servers = list(servers)

        def are_paid() -> bool:
            return self.ledger.has_begun and not any(map(self.owed, servers))

        return self.time.run(are_paid, limit_ms)


class Queue:
    """Synapse's own queue for a server, which gets a plain event again and again.

    A transaction that the server refuses, because one of ours is on its way, is repeated only
    seconds later, as Synapse does.

    Attributes:
        latencies: how long each event took.
        waits: how long each transaction waited for us.
        refused: how often the server refused one.
    """

    def __init__(
        self, world: World, server: Server, every_ms: int, room_id: str = "!plain"
    ) -> None:
        self._world = world
        self._server = server
        self._every_ms = every_ms
        self._room_id = room_id
        self._pending: list[tuple[str, int]] = []
        self._is_running = False
        self._count = 0
        self.is_over = False
        self.latencies: list[int] = []
        self.waits: list[int] = []
        self.refused = 0
        world.network.has_queue = lambda name: self._is_running
        world.time.call_later(0, self._add)

    def _add(self) -> None:
        if self.is_over:
            return
        self._count += 1
        self._pending.append((f"$plain{self._count}", self._world.time.monotonic_ms()))
        if not self._is_running:
            self._is_running = True
            self._world.api.run_as_background_process("queue", self._run)
        self._world.time.call_later(self._every_ms, self._add)

    async def _run(self) -> None:
        while self._pending:
            events, self._pending = self._pending[:50], self._pending[50:]
            await self._send(events)
        self._is_running = False

    async def _send(self, events: list[tuple[str, int]]) -> None:
        time, looper, server = self._world.time, self._world.looper, self._server
        began = time.monotonic_ms()
        if looper.makes_wait(server.name):
            await looper.before_transaction(server.name, {self._room_id: len(events)})
        self.waits.append(time.monotonic_ms() - began)
        looper.transaction_begins(server.name)
        refused = 0
        while server.sending and not server.hangs:
            refused += 1
            await time.sleep(1_000 * min(4**refused, 60))
        self.refused += refused
        server.synapse_sends = True
        await time.sleep(server.takes_ms)
        server.synapse_sends = False
        ids = [event_id for event_id, _ in events]
        server.kept.update(ids)
        looper.on_accepted(server.name, [Accepted(self._room_id, ids, [])])
        looper.transaction_ended(server.name, True)
        self.latencies += [time.monotonic_ms() - since for _, since in events]
