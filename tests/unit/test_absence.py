"""Who is owed what was sent while the module was away, against what was sent to whom."""

import attr
from hypothesis import given
from hypothesis import strategies as st

from synapse_sticky.deliverable.index import StickyIndex
from synapse_sticky.deliverable.positions import give_positions
from synapse_sticky.noticing.absence import settled_before
from synapse_sticky.seams.contents import Candidate, SeenJoin, ServerInRoom
from synapse_sticky.servers.watermarks import Watermarks
from synapse_sticky.storage.rows import Admitted, EventChange, JoinChange, WatermarkRow

NOW_TS = 1_700_000_000_000
HOUR_MS = 3_600_000
ROOMS = ["!a:example.org", "!b:example.org"]
SERVERS = ["one.example.org", "two.example.org"]


@attr.s(auto_attribs=True, frozen=True)
class Sent:
    """An event from then, at an even place of the stream."""

    room_id: str
    place: int
    owed: bool
    held: bool

    @property
    def admitted(self) -> Admitted:
        """What is recorded of it."""
        candidate = Candidate(
            f"${self.place}",
            self.room_id,
            "@alice:example.org",
            2 * self.place,
            NOW_TS + 1_000 + self.place,
            NOW_TS,
            soft_failed=self.held,
            refused=False,
            unchecked=False,
            sent_out=self.owed,
        )
        return Admitted(candidate, frozenset({"soft_failed"} if self.held else ()), self.owed)


@attr.s(auto_attribs=True, frozen=True)
class Server:
    """Where it stands: the place of its join, if that matters, and up to where it was sent."""

    joined: int | None
    sent_up_to: int


def place(sent: Sent) -> int:
    """Where in the stream an event lies."""
    return sent.place


places = st.integers(0, 12)
events = st.lists(
    st.builds(Sent, st.sampled_from(ROOMS), places, st.booleans(), st.booleans()),
    unique_by=place,
)
servers = st.dictionaries(
    st.tuples(st.sampled_from(SERVERS), st.sampled_from(ROOMS)),
    st.builds(Server, st.none() | places.map(lambda n: 2 * n + 1), st.integers(0, 26)),
)


def world(
    sent: list[Sent], present: dict[tuple[str, str], Server]
) -> tuple[list[WatermarkRow], StickyIndex]:
    """The watermarks that are stored at the first start, and the index then."""
    in_rooms = [
        ServerInRoom(
            *key, None if s.joined is None else SeenJoin(*key, s.joined, "master"), s.sent_up_to
        )
        for key, s in present.items()
    ]
    items: list[Admitted | SeenJoin] = [event.admitted for event in sent]
    items += [server.join for server in in_rooms if server.join is not None]
    items.sort(
        key=lambda i: i.candidate.stream_ordering if isinstance(i, Admitted) else i.stream_ordering
    )
    positioned, last = give_positions(items, None, NOW_TS)
    index = StickyIndex()
    index.apply(
        [
            EventChange.of_admitted(i, position)
            for position, i in positioned
            if isinstance(i, Admitted)
        ],
        [
            JoinChange(i.member, i.room_id, position, NOW_TS + HOUR_MS, i.stream_ordering, None)
            for position, i in positioned
            if isinstance(i, SeenJoin)
        ],
        last,
    )
    return settled_before(positioned, in_rooms, lambda server_name, room_id: 0), index


@given(events, servers)
def test_owed_is_what_was_not_sent(
    sent: list[Sent], present: dict[tuple[str, str], Server]
) -> None:
    # F2, F3: from before the join, or beyond what Synapse has sent; and nothing else (F5)
    rows, index = world(sent, present)
    watermarks = Watermarks()
    watermarks.load(rows, index, NOW_TS)
    for (server_name, room_id), server in present.items():
        owed = [e.event_id for e in watermarks.owed(index, server_name, room_id, NOW_TS)]
        assert owed == [
            event.admitted.candidate.event_id
            for event in sorted(sent, key=place)
            if event.room_id == room_id
            and event.owed
            and not event.held
            and (
                2 * event.place > server.sent_up_to
                or (server.joined is not None and 2 * event.place < server.joined)
            )
        ]


@given(events, servers, st.sampled_from(list(SERVERS)))
def test_who_is_owed_earlier_events_is_owed_all(
    sent: list[Sent], present: dict[tuple[str, str], Server], debtor: str
) -> None:
    # F3: a watermark cannot say that something below it is owed, and nothing is lost
    in_rooms = [ServerInRoom(*key, None, server.sent_up_to) for key, server in present.items()]
    positioned, _ = give_positions([e.admitted for e in sorted(sent, key=place)], None, NOW_TS)
    rows = settled_before(positioned, in_rooms, lambda name, room: None if name == debtor else 7)
    assert debtor not in {row.server_name for row in rows}
    assert {(row.joined_position, row.settled_from) for row in rows} <= {(7, 0)}


@given(events, servers, st.integers(0, 5))
def test_paid_in_order_it_is_settled_for_good(
    sent: list[Sent], present: dict[tuple[str, str], Server], paid: int
) -> None:
    # F3, F5: the watermark is a usual one once it has come beyond what was settled before
    rows, index = world(sent, present)
    watermarks = Watermarks()
    watermarks.load(rows, index, NOW_TS)
    for server_name, room_id in present:
        owed = [e.event_id for e in watermarks.owed(index, server_name, room_id, NOW_TS)]
        watermarks.settle(index, server_name, room_id, owed[:paid], NOW_TS)
        rest = [e.event_id for e in watermarks.owed(index, server_name, room_id, NOW_TS)]
        assert rest == owed[paid:]
    for row in watermarks.take_changed(100):
        assert row.settled_from == 0
