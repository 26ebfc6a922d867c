# SPDX-License-Identifier: AGPL-3.0-or-later
"""How to get from a room's newest events back to those that are known here. No Synapse, no clock.

Another server names its newest events of a room, and answers with pages of events, each with
the events before it. Whatever it answers, this asks a bounded number of times, as long as the
answers bring anything new, and hands on a bounded number of events, each once and after those
that it refers to.

A page goes on behind the events that are known here. Those further back are history: they were
sent before a user of ours joined, say. They are not handed on, or they would come as new.
"""

import enum
import heapq
import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Final

import attr

PAGE_EVENTS: Final = 50
"""How many events one page has at most."""

MAX_EVENTS: Final = 500
"""How many events of a room are taken from one server in one outage."""

# Events to ask for in one request, and the length of their IDs together: they are part of its URL,
# which Synapse logs.
_MAX_WANTED: Final = 50
_MAX_WANTED_CHARS: Final = 4_000
_MAX_PAGES: Final = 20
# As Synapse has it.
_MAX_PREV_EVENTS: Final = 20
# Events whose predecessors no page had: for each, Synapse asks for the room's state.
_MAX_GAPS: Final = 2
# Servers whose events cannot be verified: for each, Synapse asks for a key.
_MAX_UNVERIFIED: Final = 3

_EVENT_ID: Final = re.compile(r"\$[!-~]{1,254}")


class Receipt(enum.Enum):
    """How Synapse took an event."""

    ACCEPTED = enum.auto()
    REFUSED = enum.auto()
    # Its signature is wrong, or there is no key for it.
    UNVERIFIED = enum.auto()


@attr.s(slots=True, frozen=True, auto_attribs=True, eq=False)
class FoundEvent:
    """An event in a page.

    Attributes:
        server_name: of its sender.
        pdu: the event itself, as the caller has it.
    """

    event_id: str
    server_name: str
    prev_event_ids: tuple[str, ...]
    depth: int
    origin_server_ts: int
    pdu: object


def event_ids_in(named: object) -> list[str]:
    """Return the event IDs in a list that another server has made, each once."""
    if not isinstance(named, list):
        return []
    ids = (item for item in named if isinstance(item, str) and _EVENT_ID.fullmatch(item))
    return list(dict.fromkeys(ids))


def prev_event_ids_in(named: object) -> tuple[str, ...] | None:
    """Return what an event names as its predecessors, None if that makes no sense."""
    ids = event_ids_in(named)
    if not isinstance(named, list) or not 0 < len(ids) == len(named) <= _MAX_PREV_EVENTS:
        return None
    return tuple(ids)


class Walk:
    """One walk, in one room, with one server.

    Args:
        newest: the IDs that the server has named.
        oldest_ts: events that were sent before then lead no further, and are not handed on.
        history: the missing predecessors of known events. Neither they nor those behind them are
            handed on.
    """

    def __init__(
        self, newest: Iterable[str], oldest_ts: int, history: Collection[str] = ()
    ) -> None:
        self._newest = list(newest)[:MAX_EVENTS]
        self._oldest_ts = oldest_ts
        self._history = frozenset(history)
        self._found: dict[str, FoundEvent] = {}
        self._looked_up: set[str] = set()
        self._known: set[str] = set()
        self._pages_left = _MAX_PAGES
        self._gaps_left = _MAX_GAPS
        self._unverified: set[str] = set()
        self._order: Iterator[FoundEvent] | None = None
        self.counts: Counter[Receipt] = Counter()

    def to_look_up(self) -> list[str]:
        """Return the events of which it matters whether they are known here. Each once."""
        named = [*self._newest, *self._found]
        named += (name for event in self._found.values() for name in event.prev_event_ids)
        unclear = [name for name in dict.fromkeys(named) if name not in self._looked_up]
        self._looked_up.update(unclear)
        return unclear

    def know(self, event_ids: Iterable[str]) -> None:
        """Take note of events that are in the history here."""
        self._known.update(event_ids)
        for event_id in self._known & self._found.keys():
            del self._found[event_id]

    def wanted(self) -> list[str]:
        """Return the events with which the next page is to begin, none if there is no more."""
        if not self._pages_left or len(self._found) >= MAX_EVENTS:
            return []
        self._pages_left -= 1
        recent = (e for e in self._missing().values() if e.origin_server_ts > self._oldest_ts)
        named = [*self._newest, *(name for event in recent for name in event.prev_event_ids)]
        had = self._known | self._history | self._found.keys()
        wanted = [name for name in dict.fromkeys(named) if name not in had][:_MAX_WANTED]
        lengths = itertools.accumulate(map(len, wanted))
        return [
            name
            for name, length in zip(wanted, lengths, strict=True)
            if length <= _MAX_WANTED_CHARS
        ]

    def take(self, page: Iterable[FoundEvent]) -> None:
        """Take the events of a page, as far as there is room for them."""
        had = len(self._found)
        for event in page:
            if len(self._found) < MAX_EVENTS and event.event_id not in self._known:
                self._found.setdefault(event.event_id, event)
        if len(self._found) == had:
            # A server that has none of the events that it names has no more to tell.
            self._pages_left = 0

    def next(self) -> FoundEvent | None:
        """Return the next event to hand on, after all pages were taken; None at the end."""
        if self._order is None:
            self._order = self._recent(_in_order(self._missing()))
        for event in self._order:
            if len(self._unverified) >= _MAX_UNVERIFIED:
                return None
            if event.event_id in self._known or event.server_name in self._unverified:
                continue
            if not self._known.issuperset(event.prev_event_ids):
                if not self._gaps_left:
                    continue
                self._gaps_left -= 1
            return event
        return None

    def took(self, event: FoundEvent, receipt: Receipt) -> None:
        """Take note of how Synapse took the event that :meth:`next` has returned."""
        self.counts[receipt] += 1
        if receipt is Receipt.ACCEPTED:
            self._known.add(event.event_id)
        elif receipt is Receipt.UNVERIFIED:
            self._unverified.add(event.server_name)

    def _missing(self) -> dict[str, FoundEvent]:
        """Return the found events that lead to the newest, as far back as none is known."""
        behind = self._reached(self._history, stops=())
        return self._reached(self._newest, stops=self._history | behind.keys())

    def _reached(self, names: Iterable[str], stops: Collection[str]) -> dict[str, FoundEvent]:
        reached: dict[str, FoundEvent] = {}
        pending = list(names)
        while pending:
            name = pending.pop()
            if name in self._found and name not in reached and name not in stops:
                reached[name] = self._found[name]
                pending += reached[name].prev_event_ids
        return reached

    def _recent(self, in_order: Iterable[FoundEvent]) -> Iterator[FoundEvent]:
        """Leave out the events before the bound. None is older than one that it refers to."""
        recent: set[str] = set()
        for event in in_order:
            if event.origin_server_ts > self._oldest_ts or not recent.isdisjoint(
                event.prev_event_ids
            ):
                recent.add(event.event_id)
                yield event


def _in_order(events: Mapping[str, FoundEvent]) -> Iterator[FoundEvent]:
    """Return each event after those that it refers to, otherwise by depth, which may be a lie.

    Events that refer to each other in a circle are left out.
    """
    following: dict[str, list[FoundEvent]] = defaultdict(list)
    waits_for: Counter[str] = Counter()
    for event in events.values():
        for name in events.keys() & set(event.prev_event_ids):
            following[name].append(event)
            waits_for[event.event_id] += 1
    ready = [(e.depth, e.event_id) for e in events.values() if not waits_for[e.event_id]]
    heapq.heapify(ready)
    while ready:
        _, event_id = heapq.heappop(ready)
        yield events[event_id]
        for event in following[event_id]:
            waits_for[event.event_id] -= 1
            if not waits_for[event.event_id]:
                heapq.heappush(ready, (event.depth, event.event_id))
