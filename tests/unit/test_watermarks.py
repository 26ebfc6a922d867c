"""Watermarks in memory against a naive model: every event, and for whom it is settled."""

from collections.abc import Iterable, Sequence

import attr
from hypothesis import given, settings
from hypothesis import strategies as st

from synapse_sticky.deliverable.index import StickyIndex
from synapse_sticky.servers.watermarks import Watermarks
from synapse_sticky.storage.rows import EventChange, JoinChange, WatermarkRow

HOUR_MS = 3_600_000
ROOMS = ["!a:example.org", "!b:example.org"]
SERVERS = ["one.example.org", "two.example.org"]
PAIRS = [(server, room_id) for server in SERVERS for room_id in ROOMS]


class World:
    """A process with its index and watermarks, the database, and what is true of both."""

    def __init__(self) -> None:
        self.now_ts = 1_700_000_000_000
        self.position = self.now_ts
        self.index = StickyIndex()
        self.watermarks = Watermarks()
        # What the database holds.
        self.events: list[EventChange] = []
        self.joins: dict[tuple[str, str], JoinChange] = {}
        self.rows: dict[tuple[str, str], WatermarkRow] = {}
        # Sent and joined, but not noticed yet: an ID, its room, its end, whether it is owed.
        self.sent: list[tuple[str, str, int, bool]] = []
        self.unnoticed: list[tuple[str, str, int, bool] | tuple[str, str]] = []
        # Since the newest join that was noticed; and what of it no kill made forgotten.
        self.ever_settled: dict[tuple[str, str], set[str]] = {pair: set() for pair in PAIRS}
        self.settled: dict[tuple[str, str], set[str]] = {pair: set() for pair in PAIRS}
        # When each was settled last.
        self.settled_ts: dict[tuple[tuple[str, str], str], int] = {}

    def _next_position(self) -> int:
        self.position = max(self.position + 1, self.now_ts)
        return self.position

    def send(self, room_id: str, duration_ms: int, owed: bool) -> str:
        """A user of ours sends; it is not noticed yet."""
        event = (f"${len(self.sent)}", room_id, self.now_ts + duration_ms, owed)
        self.sent.append(event)
        self.unnoticed.append(event)
        return event[0]

    def join(self, server_name: str, room_id: str) -> None:
        """A server joins, perhaps not for the first time; it is not noticed yet."""
        self.unnoticed.append((server_name, room_id))

    def notice(self) -> None:
        """The index learns of everything, and the watermarks of what is owed of it."""
        events, joins = [], []
        for item in self.unnoticed:
            if len(item) == 2:
                join = JoinChange(
                    *item, self._next_position(), self.now_ts + HOUR_MS, stream_ordering=1,
                    instance_name=None,
                )  # fmt: skip
                self.joins[item] = join
                joins.append(join)
                self.settled[item].clear()
                self.ever_settled[item].clear()
            else:
                event_id, room_id, expires_ts, owed = item
                if expires_ts > self.now_ts:
                    position = self._next_position()
                    events.append(
                        EventChange(
                            event_id, room_id, "@s:example.org", position, expires_ts, 1, owed
                        )
                    )
        self.unnoticed.clear()
        self.events += events
        self.index.apply(events, joins, self.position)
        for event in events:
            if event.owed:
                self.watermarks.advance(self.index, event.room_id, self.now_ts)

    def settle(self, server_name: str, room_id: str, event_ids: Sequence[str]) -> None:
        """These are settled for a server, for example because it acknowledged them."""
        self.watermarks.settle(self.index, server_name, room_id, event_ids, self.now_ts)
        self.settled[server_name, room_id].update(event_ids)
        self.ever_settled[server_name, room_id].update(event_ids)
        for event_id in event_ids:
            self.settled_ts[(server_name, room_id), event_id] = self.now_ts

    def forget(self) -> None:
        """The clean-up of the watermarks; what is not noticed for ten minutes is not settled."""
        self.watermarks.expire(self.index, self.now_ts)
        unnoticed = {item[0] for item in self.unnoticed if len(item) == 4}
        for pair, event_id in [
            k for k, ts in self.settled_ts.items() if ts + 600_000 <= self.now_ts
        ]:
            if event_id in unnoticed:
                self.settled[pair].discard(event_id)

    def flush(self, limit: int, fails: bool) -> None:
        """What has changed is stored, or could not be; as the statement does it."""
        while rows := self.watermarks.take_changed(limit):
            assert len(rows) <= limit
            if fails:
                self.watermarks.put_back(rows)
                return
            for row in rows:
                stored = self.rows.get((row.server_name, row.room_id))
                if (
                    stored is None
                    or stored.expires_ts <= self.now_ts
                    or (stored.joined_position, stored.settled_position)
                    < (row.joined_position, row.settled_position)
                ):
                    self.rows[row.server_name, row.room_id] = row

    def delete_expired(self) -> None:
        """The clean-up of the tables."""
        self.events = [e for e in self.events if e.expires_ts > self.now_ts]
        self.joins = {k: j for k, j in self.joins.items() if j.expires_ts > self.now_ts}
        self.rows = {k: r for k, r in self.rows.items() if r.expires_ts > self.now_ts}

    def kill(self) -> None:
        """The process is killed, and another one starts with what is stored."""
        self.index = StickyIndex()
        self.index.apply(
            [e for e in self.events if e.expires_ts > self.now_ts],
            [j for j in self.joins.values() if j.expires_ts > self.now_ts],
            self.position,
        )
        self.load(r for r in self.rows.values() if r.expires_ts > self.now_ts)
        # Only what is stored is known to be settled now.
        for pair in PAIRS:
            self.settled[pair] = self.noticed(pair[1]) - set(self.owed(*pair))

    def load(self, rows: Iterable[WatermarkRow]) -> None:
        """The watermarks are those that are stored, and nothing else."""
        self.watermarks = Watermarks()
        self.watermarks.load(rows, self.index, self.now_ts)

    def noticed(self, room_id: str) -> set[str]:
        """The noticed, unexpired events of a room that servers are owed."""
        return {
            event.event_id
            for event in self.events
            if event.room_id == room_id and event.owed and event.expires_ts > self.now_ts
        }

    def owed(self, server_name: str, room_id: str) -> list[str]:
        """What the watermarks say."""
        events = self.watermarks.owed(self.index, server_name, room_id, self.now_ts)
        return [event.event_id for event in events]

    def all_owed(self) -> dict[tuple[str, str], list[str]]:
        """What the watermarks say of every server in every room."""
        return {pair: self.owed(*pair) for pair in PAIRS}

    def expected(self) -> dict[tuple[str, str], list[str]]:
        """What is owed, oldest first: everything but what is settled."""
        return {
            pair: [
                event.event_id
                for event in self.events
                if event.event_id in self.noticed(pair[1]) - self.settled[pair]
            ]
            for pair in PAIRS
        }


@attr.s(auto_attribs=True, frozen=True)
class Send:
    room_id: str
    duration_ms: int
    owed: bool


@attr.s(auto_attribs=True, frozen=True)
class Join:
    server_name: str
    room_id: str


@attr.s(auto_attribs=True, frozen=True)
class Settle:
    """Some of the newest events of a room are settled, noticed or not, in any order."""

    server_name: str
    room_id: str
    newest: tuple[int, ...]


@attr.s(auto_attribs=True, frozen=True)
class Pay:
    """The oldest of what is owed is settled."""

    server_name: str
    room_id: str
    count: int


@attr.s(auto_attribs=True, frozen=True)
class Pass:
    """Time passes; then some of the clean-ups run, if any."""

    ms: int
    index_forgets: bool
    watermarks_forget: bool
    store_deletes: bool


@attr.s(auto_attribs=True, frozen=True)
class Flush:
    limit: int
    fails: bool


class Notice:
    pass


class Kill:
    pass


Step = Send | Join | Settle | Pay | Pass | Flush | Notice | Kill

servers = st.sampled_from(SERVERS)
rooms = st.sampled_from(ROOMS)
durations = st.sampled_from([1, 10_000, 60_000, HOUR_MS, HOUR_MS]) | st.integers(1, HOUR_MS)
sends = st.builds(Send, rooms, durations, st.sampled_from([True, True, True, False]))
joins = st.builds(Join, servers, rooms)
settles = st.builds(
    Settle, servers, rooms, st.lists(st.integers(0, 5), min_size=1, max_size=4).map(tuple)
)
payments = st.builds(Pay, servers, rooms, st.integers(1, 3))
passes = st.builds(
    Pass,
    st.sampled_from([0, 1, 9_999, 10_000, 60_000, HOUR_MS]) | st.integers(0, HOUR_MS),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
flushes = st.builds(Flush, st.integers(1, 3), st.booleans())
notices, kills = st.builds(Notice), st.builds(Kill)
running = sends | sends | notices | joins | passes | flushes
histories = st.lists(running | settles | settles | payments, max_size=60)
histories_with_kills = st.lists(running | settles | settles | payments | kills, max_size=60)
orderly_histories = st.lists(running | payments | payments, max_size=60)


def _do(world: World, step: Step) -> None:
    if isinstance(step, Send):
        world.send(step.room_id, step.duration_ms, step.owed)
    elif isinstance(step, Join):
        world.join(step.server_name, step.room_id)
    elif isinstance(step, Settle):
        in_room = [event[0] for event in reversed(world.sent) if event[1] == step.room_id]
        chosen = [in_room[number] for number in step.newest if number < len(in_room)]
        world.settle(step.server_name, step.room_id, chosen)
    elif isinstance(step, Pay):
        due = world.owed(step.server_name, step.room_id)
        world.settle(step.server_name, step.room_id, due[: step.count])
    elif isinstance(step, Pass):
        world.now_ts += step.ms
        if step.index_forgets:
            world.index.expire(world.now_ts)
        if step.watermarks_forget:
            world.forget()
        if step.store_deletes:
            world.delete_expired()
    elif isinstance(step, Flush):
        world.flush(step.limit, step.fails)
    elif isinstance(step, Notice):
        world.notice()
    else:
        world.kill()


@settings(deadline=None, max_examples=400)
@given(histories)
def test_what_is_owed_is_what_is_not_settled(history: list[Step]) -> None:
    # F1: no more and no less, in whatever order it was settled
    world = World()
    for step in [*history, Notice()]:
        _do(world, step)
        assert world.all_owed() == world.expected()


@settings(deadline=None, max_examples=400)
@given(histories_with_kills)
def test_a_kill_skips_nothing(history: list[Step]) -> None:
    # F1, F3
    world = World()
    for step in [*history, Notice(), Kill()]:
        before = world.all_owed()
        _do(world, step)
        owed = world.all_owed()
        for pair in PAIRS:
            # Whatever became of the watermarks, what was never settled is owed.
            assert world.noticed(pair[1]) - world.ever_settled[pair] <= set(owed[pair])
            if isinstance(step, Kill):
                assert set(before[pair]) <= set(owed[pair])
        # And after the kill things go on in the same way.
        assert owed == world.expected()


@settings(deadline=None, max_examples=300)
@given(orderly_histories)
def test_nothing_is_sent_twice_if_all_is_in_order_and_stored(history: list[Step]) -> None:
    # F1, F3: what was settled oldest first, and stored, is not owed after a kill either
    world = World()
    for step in [*history, Notice(), Flush(limit=2, fails=False)]:
        _do(world, step)
    before = world.all_owed()
    world.kill()
    assert world.all_owed() == before


# The same in small


def _world(*sent: str) -> World:
    """A world in which these events are noticed, in the first room, and owed for an hour."""
    world = World()
    for event_id in sent:
        assert world.send(ROOMS[0], HOUR_MS, owed=True) == event_id
    world.notice()
    return world


def test_a_server_without_a_watermark_is_owed_everything() -> None:
    # F1
    world = _world("$0", "$1")
    world.send(ROOMS[0], HOUR_MS, owed=False)
    world.notice()
    assert world.all_owed() == {
        (server, room_id): ["$0", "$1"] if room_id == ROOMS[0] else [] for server, room_id in PAIRS
    }


def test_a_gap_holds_the_watermark_back() -> None:
    # F3: what is stored lies before the gap, so that a kill does not skip what is in it
    world = _world("$0", "$1", "$2")
    pair = SERVERS[0], ROOMS[0]
    world.settle(*pair, ["$2", "$0"])
    assert world.owed(*pair) == ["$1"]
    (row,) = world.watermarks.take_changed(10)
    assert row.settled_position == world.events[0].position
    world.settle(*pair, ["$1"])
    assert world.owed(*pair) == []
    (row,) = world.watermarks.take_changed(10)
    assert row.settled_position == world.events[2].position


def test_settled_before_it_was_noticed() -> None:
    # F1: Synapse's queue can be faster than the index
    world = _world("$0")
    pair = SERVERS[0], ROOMS[0]
    early = world.send(ROOMS[0], HOUR_MS, owed=True)
    world.settle(*pair, ["$0", early])
    world.notice()
    assert world.owed(*pair) == []
    (row,) = world.watermarks.take_changed(10)
    assert row.settled_position == world.events[1].position


def test_a_server_that_joins_again_is_owed_everything_again() -> None:
    # F1: also by a process that knows no more than what was stored before the join
    world = _world("$0", "$1")
    pair, other = (SERVERS[0], ROOMS[0]), (SERVERS[1], ROOMS[0])
    for each in (pair, other):
        world.settle(*each, ["$0", "$1"])
    world.flush(10, fails=False)
    world.join(*pair)
    world.notice()
    assert world.owed(*pair) == ["$0", "$1"]
    assert world.owed(*other) == []
    world.settle(*pair, ["$0"])
    assert world.owed(*pair) == ["$1"]
    world.kill()
    assert world.owed(*pair) == ["$0", "$1"]
    assert world.owed(*other) == []


def test_a_stored_watermark_counts_from_the_newest_join() -> None:
    # F1, F3
    world = _world("$0", "$1")
    pair = SERVERS[0], ROOMS[0]
    world.join(*pair)
    world.notice()
    world.settle(*pair, ["$0"])
    (row,) = world.watermarks.take_changed(10)
    assert row.joined_position == world.joins[pair].position
    world.load([row])
    assert world.owed(*pair) == ["$1"]
    world.load([attr.evolve(row, joined_position=row.joined_position - 1)])
    assert world.owed(*pair) == ["$0", "$1"]


def test_what_changed_is_taken_once_unless_put_back() -> None:
    # F3
    world = _world("$0", "$1")
    pairs = [(server, ROOMS[0]) for server in SERVERS]
    for pair in pairs:
        world.settle(*pair, ["$0"])
    first, second = (world.watermarks.take_changed(1) for _ in pairs)
    assert [(row.server_name, row.room_id) for row in first + second] == pairs
    assert world.watermarks.take_changed(1) == []
    world.watermarks.put_back(second)
    world.settle(*pairs[1], ["$1"])
    # As it is by then.
    (again,) = world.watermarks.take_changed(10)
    assert again.server_name == SERVERS[1]
    assert again.settled_position == world.events[1].position
    world.settle(*pairs[0], ["$0"])
    assert world.watermarks.take_changed(10) == [], "nothing has moved"


def test_what_speaks_of_nothing_sticky_is_forgotten() -> None:
    # F1
    world = _world("$0")
    short = world.send(ROOMS[1], 60_000, owed=True)
    world.notice()
    pairs = [(SERVERS[0], room_id) for room_id in ROOMS]
    world.settle(*pairs[0], ["$0"])
    world.settle(*pairs[1], [short])
    rows = world.watermarks.take_changed(10)
    assert [row.expires_ts for row in rows] == [world.now_ts + HOUR_MS, world.now_ts + 60_000]
    world.now_ts += 60_000
    world.forget()
    world.watermarks.put_back(rows)
    assert world.watermarks.take_changed(10) == rows[:1]
    world.now_ts += HOUR_MS
    world.forget()
    world.watermarks.put_back(rows)
    assert world.watermarks.take_changed(10) == []


def test_what_is_still_sticky_is_not_forgotten() -> None:
    # F1: neither what lies ahead of a gap, nor that of which the longest is not the newest
    world = World()
    gap, long, short = (
        world.send(ROOMS[0], duration_ms, owed=True) for duration_ms in (HOUR_MS, HOUR_MS, 1_000)
    )
    world.notice()
    with_gap, without = ((server, ROOMS[0]) for server in SERVERS)
    world.settle(*with_gap, [long])
    world.settle(*without, [gap, long, short])
    end_ts = world.now_ts + HOUR_MS
    for world.now_ts in (end_ts - HOUR_MS + 1_000, end_ts - 1):
        world.forget()
        assert world.owed(*with_gap) == [gap]
        assert world.owed(*without) == []
        world.flush(10, fails=False)
        world.delete_expired()
    world.kill()
    assert world.owed(*with_gap) == [gap, long]
    assert world.owed(*without) == []


# F3
def test_a_row_that_counts_from_a_forgotten_join_is_replaced() -> None:
    """It has expired, and is in nobody's way though the tables are not cleaned up yet."""
    world, pair = World(), (SERVERS[0], ROOMS[0])
    world.join(*pair)
    world.notice()
    world.now_ts += HOUR_MS - 10_000
    first = world.send(ROOMS[0], 20_000, True)
    world.notice()
    world.settle(*pair, [first])
    world.flush(10, fails=False)
    world.now_ts += 21_000
    world.index.expire(world.now_ts + 10_000)
    world.forget()
    second = world.send(ROOMS[0], HOUR_MS, True)
    world.notice()
    world.settle(*pair, [second])
    world.flush(10, fails=False)
    world.kill()
    assert world.owed(*pair) == []


def test_what_never_becomes_deliverable_is_forgotten() -> None:
    # F5: acknowledged events that do not get into the index take little memory, and not for long
    world = World()
    events = [f"${number}" for number in range(20_000)]
    for event_id in events:
        world.watermarks.settle(world.index, SERVERS[0], ROOMS[0], [event_id], world.now_ts)
    assert len(world.watermarks._by_room[ROOMS[0]][SERVERS[0]].ahead) <= 5_000
    world.now_ts += HOUR_MS // 4
    world.forget()
    assert not world.watermarks._by_room


# F5
def test_any_number_of_live_events_may_be_settled_beyond_a_gap() -> None:
    """None of them is owed again, whatever else is settled that never gets into the index."""
    world, pair = World(), (SERVERS[0], ROOMS[0])
    gap, *events = [world.send(ROOMS[0], HOUR_MS, True) for _ in range(12_000)]
    world.notice()
    for first in range(0, len(events), 50):
        world.settle(*pair, events[first : first + 50])
        others = [f"$other{first + n}" for n in range(50)]
        world.watermarks.settle(world.index, *pair, others, world.now_ts)
    assert world.owed(*pair) == [gap]
    assert len(world.watermarks._by_room[ROOMS[0]][SERVERS[0]].ahead) <= 12_000 + 24_000 + 5_000


def test_what_was_settled_before_it_was_noticed_stays_settled_behind_a_gap() -> None:
    # F1, F5: as all that a server has acknowledged at once, if it has refused one before
    world = World()
    world.send(ROOMS[0], HOUR_MS, owed=True)
    second = world.send(ROOMS[0], HOUR_MS, owed=True)
    world.settle(SERVERS[0], ROOMS[0], [second])
    world.notice()
    world.now_ts += 1_800_000
    world.forget()
    assert world.owed(SERVERS[0], ROOMS[0]) == ["$0"]
