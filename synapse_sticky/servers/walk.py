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
# Events that were sent before the bound, and may lead to newer ones: their time may be forged.
_MAX_OLD: Final = 100
# Events whose predecessors are not known: for each, Synapse asks for more. And those that it
# refuses nevertheless, one after the other.
_MAX_GAPS: Final = 20
_MAX_REFUSED: Final = 4
# After an event that could not be taken: Synapse does not take the one that refers to it either,
# but it takes those that follow, with the state of the room before them.
_PASSED_OVER: Final = 2
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
        self._asked: set[str] = set()
        self._pages_left = _MAX_PAGES
        self._gaps_left = _MAX_GAPS
        self._refused_left = _MAX_REFUSED
        # Events with a gap to pass over before the next one is handed on.
        self._to_pass = 0
        self._unverified: set[str] = set()
        self._verified: set[str] = set()
        # The events to hand on, the last one first.
        self._order: list[FoundEvent] | None = None
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
        # Those that were asked for already come last: a page may not have had room for them.
        wanted = sorted(self._unknown(), key=self._asked.__contains__)[:_MAX_WANTED]
        lengths = itertools.accumulate(map(len, wanted))
        wanted = [
            name
            for name, length in zip(wanted, lengths, strict=True)
            if length <= _MAX_WANTED_CHARS
        ]
        self._asked.update(wanted)
        return wanted

    def _unknown(self) -> list[str]:
        """Return the events to go on with: those before found ones first, which are real."""
        missing = self._missing().values()
        leading = [event for event in missing if event.origin_server_ts > self._oldest_ts]
        if leading and len(missing) - len(leading) <= _MAX_OLD:
            leading = list(missing)
        named = [*(name for event in leading for name in event.prev_event_ids), *self._newest]
        had = self._known | self._history | self._found.keys()
        return [name for name in dict.fromkeys(named) if name not in had]

    def take(self, page: Iterable[FoundEvent]) -> None:
        """Take the events of a page, as far as there is room for them."""
        had = len(self._found)
        for event in page:
            if len(self._found) < MAX_EVENTS and event.event_id not in self._known:
                self._found.setdefault(event.event_id, event)
        if len(self._found) == had and self._asked.issuperset(self._unknown()):
            # A server that has none of the events that are named has no more to tell.
            self._pages_left = 0

    def next(self) -> FoundEvent | None:
        """Return the next event to look at, after all pages were taken; None at the end."""
        if self._order is None:
            self._order = list(self._recent(_in_order(self._missing())))[::-1]
        return self._order.pop() if self._order else None

    def choose(self, event: FoundEvent) -> bool:
        """Decide whether to hand on the event that :meth:`next` has returned.

        Whether it and its predecessors are known by now must have been noted.
        """
        if event.event_id in self._known:
            return False
        if self._is_unverified(event.server_name):
            self._to_pass = _PASSED_OVER
            return False
        if self._known.issuperset(event.prev_event_ids):
            return True
        if self._to_pass and self._order:
            self._to_pass -= 1
            return False
        return self._gaps_left > 0 and self._refused_left > 0

    def _is_unverified(self, server_name: str) -> bool:
        if server_name in self._unverified:
            return True
        # Whether those of any other server can be verified is not tried out.
        return len(self._unverified) >= _MAX_UNVERIFIED and server_name not in self._verified

    def took(self, event: FoundEvent, receipt: Receipt) -> None:
        """Take note of how Synapse took the event that was handed on."""
        self.counts[receipt] += 1
        has_gap = not self._known.issuperset(event.prev_event_ids)
        self._gaps_left -= has_gap
        if receipt is Receipt.UNVERIFIED:
            self._unverified.add(event.server_name)
        else:
            self._verified.add(event.server_name)
        if receipt is not Receipt.ACCEPTED:
            self._to_pass = _PASSED_OVER
            self._refused_left -= has_gap
            return
        self._known.add(event.event_id)
        if has_gap:
            self._refused_left = _MAX_REFUSED

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
