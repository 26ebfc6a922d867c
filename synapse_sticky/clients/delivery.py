# SPDX-License-Identifier: AGPL-3.0-or-later
"""Out to clients: what one response to one client carries.

``/sync`` and Sliding Sync differ in where they keep the client's position and
in which rooms they look; what they share is here.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set

import attr
from synapse.types import PersistedEventPosition

from synapse_sticky.clients.page import first_due_with, next_page_end
from synapse_sticky.clients.since import MAX_POSITION, Since, digest_of, name_of_sender
from synapse_sticky.deliverable.index import Due, StickyEvent, hash_of_sender
from synapse_sticky.deliverable.messages import StoredEvent
from synapse_sticky.deliverable.reader import IndexReader
from synapse_sticky.seams.background import Clock
from synapse_sticky.seams.events import (
    ClientEvent,
    EventSource,
    event_of,
    has_stickiness,
    sticky_duration_ms,
)


@attr.s(slots=True, frozen=True, auto_attribs=True)
class Sections:
    """The sticky events for one response.

    Attributes:
        by_room: visible events of each room that has any, in the order in which
            they became deliverable.
        position: what the client has read up to once it has this response.
        names: for the client's next token: the events beyond that position that it has
            all the same, from the timelines of this or an earlier response, and the
            ignored senders of events up to that position.
        undecided: for that token too: digests of events that the client has from timelines,
            and of which nobody knows yet whether they are deliverable.
    """

    by_room: Mapping[str, list[ClientEvent]]
    position: int
    names: frozenset[str] = frozenset()
    undecided: frozenset[int] = frozenset()


TimelineReaches = Callable[[str | None, int], bool]
"""Whether timelines go as far as to (instance name, stream ordering)."""


class Delivery:
    """Chooses the sticky events for responses."""

    def __init__(self, clock: Clock, reader: IndexReader, events: EventSource) -> None:
        self._clock = clock
        self._reader = reader
        self._events = events

    def has_nothing_for(self, user_id: str, since: Since, account_data_position: int) -> bool:
        """Whether :meth:`sections` are empty for a user who has joined nothing since.

        That is so for a response without timelines if nothing has happened, and costs little.

        Args:
            since: as the client said it.
        """
        return (
            since == Since(self._reader.index.position)
            and not self._reader.expects_events
            and not self._events.account_data_changed(user_id, account_data_position)
        )

    async def wait_until_noticed(
        self,
        rooms: Set[str],
        since: Since,
        *,
        shown: Collection[ClientEvent],
        timeline_reaches: TimelineReaches,
        most: int,
    ) -> None:
        """Wait, for a bounded time, for the events that the sections may lack.

        To be called once Synapse's part of a response is computed. A sticky event that was
        stored before the response may not be noticed yet. If no timeline shows it, the
        client would get it late; if one does, its token has to name it, and there may be
        no space left for names.

        Args:
            rooms, since, shown, timeline_reaches: see :meth:`sections`.
            most: how many names its token has space for.
        """
        shown_ids = {event_of(client_event).event_id for client_event in shown}

        def is_lacking(event: StoredEvent, writer: str) -> bool:
            return (
                event.room_id in rooms
                and event.event_id not in shown_ids
                and timeline_reaches(writer, event.stream_ordering)
            )

        await self._reader.wait_for_expected(is_lacking)
        space = max(0, most - len(since.digests) - len(since.undecided))
        await self._reader.wait_until(lambda: len(self._unnoticed(shown)) <= space)

    def misses_join(self, user_id: str, room_id: str, written: PersistedEventPosition) -> bool:
        """Whether a user's join to a room may matter and is not noticed yet.

        It matters only if the room has sticky events that were stored before it.
        """
        return not self._reader.is_join_noticed(user_id, room_id, written) and any(
            0 < event.stream_ordering < written.stream
            for event in self._reader.index.in_room(room_id, self._clock.now_ts())
        )

    async def wait_for_joins(
        self, user_id: str, joins: Mapping[str, PersistedEventPosition]
    ) -> None:
        """Wait until a user's joins to these rooms are noticed, for a bounded time."""
        is_noticed = self._reader.is_join_noticed
        await self._reader.wait_until(
            lambda: all(is_noticed(user_id, room_id, at) for room_id, at in joins.items())
        )

    def rooms_with_events(self, rooms: Set[str]) -> list[str]:
        """Those of these rooms that have deliverable events."""
        smaller, larger = sorted((self._reader.index.rooms.keys(), rooms), key=len)
        return [room_id for room_id in smaller if room_id in larger]

    def names_sender_in(self, since: Since, room_id: str) -> bool:
        """Whether a token names somebody who has live events in this room."""
        live = self._reader.index.in_room(room_id, self._clock.now_ts())
        return bool(_named_senders(live, since))

    def rooms_due(
        self, user_id: str, rooms: Set[str], since: int, until: int = MAX_POSITION
    ) -> set[str]:
        """Those of these rooms in which something is due after one position, up to another."""
        due = self._reader.index.due(user_id, rooms, since, self._clock.now_ts())
        return {d.event.room_id for d in due if d.position <= until}

    async def resolve_since(self, since: Since) -> Since:
        """See :meth:`IndexReader.resolve_since`."""
        return await self._reader.resolve_since(since)

    async def sections(
        self,
        user_id: str,
        rooms: Set[str],
        since: Since,
        *,
        shown: Collection[ClientEvent],
        timeline_reaches: TimelineReaches,
        since_reaches: TimelineReaches | None,
        account_data_position: int,
        limit: int,
        from_start: Set[str] = frozenset(),
        due_at_join: bool = False,
    ) -> Sections:
        """Return the events to hand out to a user who has read so far.

        Args:
            rooms: joined rooms to look into.
            since: as of :meth:`resolve_since`.
            shown: the events in this response's timelines.
            timeline_reaches: whether this response's timelines go as far as to what one
                writer has at a stream ordering. What lies beyond is left to the
                next response: its timelines may show it.
            since_reaches: the same for the timelines that came with ``since``, if known.
            account_data_position: up to where the client has read Synapse's stream of
                account data; 0 if that is not known.
            limit: how many events at most. Events that the client's position lies
                beyond, or that a join made due all at once, may exceed it.
            from_start: rooms whose events that the client has already are handed out too:
                those up to ``since``, and those that ``since`` names. So are those of rooms
                that ``since`` names, and of senders that it names and the user does not
                ignore any more.
            due_at_join: whether what is older than the user's join to its room
                is due where the join lies. Otherwise ``from_start`` must name the rooms
                joined since.
        """
        due, position = self._due(user_id if due_at_join else None, rooms, since, timeline_reaches)
        undecided = self._undecided(since, since_reaches or timeline_reaches).union(
            map(digest_of, self._unnoticed(shown))
        )
        # A token may name rooms and senders, and the user may ignore others now.
        changed = self._events.account_data_changed(user_id, account_data_position)
        live = self._live(rooms, rooms if changed or since.digests else from_start)
        if not due and not live:
            return Sections({}, max(position, since.position), undecided=undecided)
        ignored = set(map(hash_of_sender, await self._events.ignored_users(user_id)))
        due_ids = {d.event.event_id for d in due}
        index = self._reader.index
        named = set(filter(since.names, due_ids)) if since.digests else set()
        if since.undecided:
            # What was held then is handed out as if nobody had seen it.
            undecided_ids = filter(since.leaves_undecided, due_ids)
            named.update(e for e in undecided_ids if not index.was_held(e))
        rooms_again = from_start | set(filter(since.names, {e.room_id for e in live}))
        senders_again = _named_senders(live, since) - ignored
        again = [
            event
            for event in live
            if (event.room_id in rooms_again or event.sender_hash in senders_again)
            and (
                event.event_id in named
                or (event.position <= since.position and event.event_id not in due_ids)
            )
        ]
        has = {event_of(client_event).event_id for client_event in shown}

        def is_wanted(event: StickyEvent) -> bool:
            return event.event_id not in has and event.sender_hash not in ignored

        found = await self._visible(user_id, filter(is_wanted, again))
        has |= named
        wanted = [d for d in due if d.position <= position and is_wanted(d.event)]
        pages, end = await self._pages(user_id, wanted, timeline_reaches, limit)
        if end < len(wanted):
            # Not the position of the last one handed out: what was skipped since
            # then is done with.
            position = wanted[end].position - 1
        beyond = {d.event.event_id for d in due if d.position > position}
        passed_over = {
            event.sender_hash
            for event in (*live, *(d.event for d in due))
            if event.sender_hash in ignored and event.position <= position
        }
        names = (has & beyond).union(map(name_of_sender, passed_over))
        visible = self._in_order(found + pages) if found else pages
        return Sections(_by_room(visible), position, frozenset(names), undecided)

    def _due(
        self,
        user_id: str | None,
        rooms: Set[str],
        since: Since,
        timeline_reaches: TimelineReaches,
    ) -> tuple[list[Due], int]:
        """Return the events due after a position, and up to which one to hand them out.

        Args:
            user_id: as of :meth:`StickyIndex.due`.
        """
        index = self._reader.index
        position = index.position
        for join in index.joins_after(user_id, since.position) if user_id else ():
            if not timeline_reaches(join.instance_name, join.stream_ordering):
                position = join.position - 1
                break
        due = index.due(user_id, rooms, since.position, self._clock.now_ts())
        return due, position

    def _live(self, rooms: Set[str], looked_into: Set[str]) -> list[StickyEvent]:
        """Return all live events of those of these rooms that are looked into."""
        index, now_ts = self._reader.index, self._clock.now_ts()
        return [
            event
            for room_id in self.rooms_with_events(looked_into)
            if room_id in rooms
            for event in index.in_room(room_id, now_ts)
        ]

    def _in_order(self, events: Iterable[ClientEvent]) -> list[ClientEvent]:
        """Return events in the order in which they became deliverable."""
        index = self._reader.index

        def position(client_event: ClientEvent) -> int:
            # One that has expired and was forgotten meanwhile was among the oldest.
            event = index.get(event_of(client_event).event_id)
            return event.position if event else 0

        return sorted(events, key=position)

    async def _pages(
        self, user_id: str, due: Sequence[Due], timeline_reaches: TimelineReaches, limit: int
    ) -> tuple[list[ClientEvent], int]:
        """Visible events, each room's in order, and the index up to which they were looked for.

        What turns out not to be visible does not use up the limit: a page of such
        events would be an empty answer, and a long-poll would sleep on it although
        there is more.
        """
        found: list[ClientEvent] = []
        end = 0
        while end < len(due) and len(found) < limit:
            start, end = end, next_page_end(due, end, limit - len(found))
            page = await self._visible(user_id, [d.event for d in due[start:end]])
            uncovered = _beyond(page, timeline_reaches)
            if uncovered:
                end = first_due_with(due, uncovered)
                before = {d.event.event_id for d in due[start:end]}
                return found + [e for e in page if event_of(e).event_id in before], end
            found += page
        return found, end

    async def _visible(self, user_id: str, events: Iterable[StickyEvent]) -> list[ClientEvent]:
        event_ids = [event.event_id for event in events]
        if not event_ids:
            return []
        return await self._events.visible_sticky_events(user_id, event_ids)

    def _unnoticed(self, timelines: Iterable[ClientEvent]) -> frozenset[str]:
        """Return the sticky events in timelines that the index may have later."""
        index, now_ts = self._reader.index, self._clock.now_ts()
        found = set()
        for event in map(event_of, timelines):
            if not has_stickiness(event) or index.knows(event.event_id):
                continue
            duration_ms = sticky_duration_ms(event)
            written = event.internal_metadata
            if (
                duration_ms is not None
                and event.origin_server_ts + duration_ms > now_ts
                and not index.has_passed(written.instance_name, written.stream_ordering or 0)
            ):
                found.add(event.event_id)
        return frozenset(found)

    def _undecided(self, since: Since, since_reaches: TimelineReaches) -> frozenset[int]:
        """Return the digests of events that ``since`` leaves undecided and that still are.

        Args:
            since_reaches: whether the timelines that came with ``since`` go as far as to a place.
        """
        if not since.undecided:
            return frozenset()
        index = self._reader.index
        read = index.read
        writers: list[tuple[str | None, int]] = [
            (None, read.events),
            *read.events_by_writer.items(),
        ]
        if not any(since_reaches(w, max(to, read.events) + 1) for w, to in writers):
            return frozenset()
        return since.undecided.difference(
            digest_of(e.event_id) for e in index.after(since.position)
        )


def _by_room(events: Iterable[ClientEvent]) -> dict[str, list[ClientEvent]]:
    by_room: dict[str, list[ClientEvent]] = {}
    for client_event in events:
        by_room.setdefault(event_of(client_event).room_id, []).append(client_event)
    return by_room


def _beyond(events: Iterable[ClientEvent], timeline_reaches: TimelineReaches) -> set[str]:
    """Return the IDs of the events that timelines do not go as far as to."""
    by_writer: dict[str | None, list[tuple[int, str]]] = {}
    for event in map(event_of, events):
        written = event.internal_metadata
        at = (written.stream_ordering or 0, event.event_id)
        by_writer.setdefault(written.instance_name, []).append(at)
    return {
        event_id
        for writer, places in by_writer.items()
        if not timeline_reaches(writer, max(places)[0])
        for stream_ordering, event_id in places
        if not timeline_reaches(writer, stream_ordering)
    }


def _named_senders(events: Iterable[StickyEvent], since: Since) -> set[int]:
    """Return the hashes of those senders of these events whom a token names."""
    if not since.digests:
        return set()
    senders = {event.sender_hash for event in events}
    return {sender for sender in senders if since.names(name_of_sender(sender))}
