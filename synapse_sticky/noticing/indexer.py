# SPDX-License-Identifier: AGPL-3.0-or-later
"""Notices sticky events, by following Synapse's own streams.

One process does this: the one that runs Synapse's background tasks. It is the
only one that gives out positions, so they are committed in order and no reader
ever skips one. How far it has read is stored together with what it found: a
kill at any moment loses nothing and doubles nothing.

While the setting that says which process that is changes, two may do it at the
same time. Then whoever stores first wins, and the other looks again.
"""

import logging
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Final

import attr
from synapse.module_api import ModuleApi
from synapse.types import get_domain_from_id

from synapse_sticky.config import StickyEventsConfig
from synapse_sticky.control.overrides import Kind, Subject
from synapse_sticky.deliverable.messages import Recorded, Stored
from synapse_sticky.deliverable.positions import give_positions
from synapse_sticky.deliverable.reader import IndexReader
from synapse_sticky.noticing.absence import settled_before
from synapse_sticky.noticing.admission import Admission, HeldReason
from synapse_sticky.noticing.announcements import Announcements
from synapse_sticky.noticing.backlog import PAUSE_MS, Backlog
from synapse_sticky.noticing.ranges import in_steps, pending_ranges
from synapse_sticky.noticing.rechecks import Rechecks
from synapse_sticky.noticing.reviews import Reviews
from synapse_sticky.seams.background import Clock
from synapse_sticky.seams.bounds import Bounds
from synapse_sticky.seams.contents import Candidate, SeenJoin, ServerInRoom, Watched
from synapse_sticky.seams.failures import log_failure, shielded
from synapse_sticky.seams.metrics import (
    EXPIRED_WHILE_HELD,
    OVER_CAPACITY,
    TIME_TO_DELIVERABLE,
    Metrics,
)
from synapse_sticky.seams.room_state import STATE_TYPES, RoomState
from synapse_sticky.seams.streams import StreamBounds
from synapse_sticky.seams.tables import SynapseTables
from synapse_sticky.storage.rows import (
    Admitted,
    EventChange,
    Item,
    RecordedEvent,
    Rejudged,
    WatermarkRow,
)
from synapse_sticky.storage.store import LostRace, StickyStore

logger = logging.getLogger(__name__)

_WATCH_INTERVAL_MS: Final = 1_000
# In busy times one look finds several events: they wait this long for each
# other, unless a request waits for one of them.
_MIN_INTERVAL_MS: Final = 50
# How long it takes at most, nearly always, to store an event that has a place.
_SETTLES_MS: Final = 200
# How much of a stream one look takes, and how much may be read anew after a
# kill. A row costs a few microseconds.
_STEP: Final = 5_000


class Indexer:
    """Follows the streams and records what is sticky."""

    def __init__(
        self,
        api: ModuleApi,
        clock: Clock,
        store: StickyStore,
        tables: SynapseTables,
        bounds: StreamBounds,
        admission: Admission,
        rechecks: Rechecks,
        reviews: Reviews,
        backlog: Backlog,
        room_state: RoomState,
        announcements: Announcements,
        reader: IndexReader,
        metrics: Metrics,
    ) -> None:
        self._api = api
        self._clock = clock
        self._store = store
        self._tables = tables
        self._bounds = bounds
        self._admission = admission
        self._rechecks = rechecks
        self._reviews = reviews
        self._backlog = backlog
        self._room_state = room_state
        self._announcements = announcements
        self._reader = reader
        self._metrics = metrics
        self._now_ts = clock.now_ts
        self._read: Bounds | None = None
        self._stored_events_bound = 0
        self._last_position = 0
        self._running = False
        self._run_again = False
        self._last_run_ts = 0
        self._scheduled = False
        self._slice_scheduled = False
        # How many events were not recorded since that was last said.
        self._beyond = 0
        # Which ones are still to be read a second time, and up to where they were read.
        self._left_out: dict[str, Bounds] = {}
        self._ordinary: set[int] | None = None
        self._has_caught_up = False
        # What is stored may be something else than what is known here.
        self._must_reload = False
        # Whether Synapse remembers places that its database does not know.
        self._is_set_back = False

    def start(self, config: StickyEventsConfig) -> None:
        """Begins to follow the streams."""
        self._reader.subscribe_to_waits(self.run_now)
        self._reader.subscribe_to_stored(self.on_stored)
        self._reader.subscribe_to_resets(self._reload)
        self._api.looping_background_call(self._watch, _WATCH_INTERVAL_MS, desc="sticky_watch")
        self._api.looping_background_call(
            self._clean_up, config.cleanup_interval_ms, desc="sticky_clean_up"
        )
        self.run_now()

    def expect_new_events(self) -> None:
        """From now on :meth:`on_ordinary_events` is told of this process's new events.

        To be called only if this process alone writes events.
        """
        self._ordinary = set()

    def on_ordinary_events(self, ordinary: Iterable[int]) -> None:
        """Events that are not sticky are stored, at these stream orderings. Never raises."""
        if self._ordinary is not None and len(self._ordinary) < _STEP:
            self._ordinary.update(ordinary)

    def on_stored(self, stored: Stored) -> None:
        """A process has stored sticky events. Never raises."""
        self._bounds.take_from(stored.writer, stored.written)
        if self._ordinary is None:
            # Whether a request waits for them, other processes do not tell.
            self.run_now()
        elif not self._scheduled and not self._running:
            self._run_after(self._last_run_ts + _MIN_INTERVAL_MS - self._now_ts())

    def on_decisions(self, subjects: Collection[Subject]) -> None:
        """The server's admin has decided something. Never raises."""
        for kind, subject in subjects:
            if kind is Kind.ROOM:
                self._reviews.add_rooms([subject])
            elif kind is Kind.USER:
                self._reviews.add_sender(subject)
            else:
                self._reviews.add_server(subject)
        self.run_now()

    def on_stream_change(self) -> None:
        """A stream may have moved. Never raises, and is cheap when it did not."""
        if self._scheduled or self._running or not self._has_news():
            return
        wait_ms = self._last_run_ts + _MIN_INTERVAL_MS - self._now_ts()
        if self._ordinary is not None:
            # Nearly always we are told in a moment that there is nothing to do.
            wait_ms = max(wait_ms, _MIN_INTERVAL_MS)
        self._run_after(wait_ms)

    def _run_after(self, wait_ms: int) -> None:
        if wait_ms <= 0:
            self.run_now()
        else:
            self._scheduled = True
            self._clock.call_later(min(wait_ms, _MIN_INTERVAL_MS), self._on_time)

    def _on_time(self) -> None:
        self._scheduled = False
        self._pass_over_ordinary()
        self.run_now()

    def _pass_over_ordinary(self) -> None:
        """Goes on in the stream, in memory, as far as nothing can matter."""
        if self._read is None or not self._ordinary:
            return
        if self._bounds.state_changed_after(self._read.events):
            # A plain event may change the current state too, by state resolution.
            return
        end = self._read.events
        while end + 1 in self._ordinary and end - self._stored_events_bound < _STEP:
            end += 1
            self._ordinary.remove(end)
        if end > self._read.events:
            self._advance(attr.evolve(self._read, events=end, events_by_writer={}))
        # What lies behind was read in the meantime.
        if len(self._ordinary) >= _STEP:
            self._ordinary.clear()

    def _advance(self, read: Bounds) -> None:
        """The streams are read as far as that, and what matters of it is in the index."""
        self._read = read
        oldest = next(iter(self._left_out.values()), None)
        if oldest is not None and read.cover_all_of(oldest):
            self._left_out = {
                event_id: found_in
                for event_id, found_in in self._left_out.items()
                if not read.cover_all_of(found_in)
            }
        self._reader.note_read(read)

    def run_now(self) -> None:
        """Looks for news at once: a request waits for it. Never raises."""
        if self._running:
            self._run_again = True
        elif self._has_news():
            self._api.run_as_background_process("sticky_index", self._run)

    def _has_news(self) -> bool:
        return (
            self._read is None
            or self._must_reload
            or bool(self._backlog)
            or any(pending_ranges(self._read, self._bounds.current()))
        )

    async def _watch(self) -> None:
        # Catches what nobody pokes for: backfill by another process.
        self.on_stream_change()

    async def _run(self) -> None:
        if self._running:
            return
        self._running = True
        self._run_again = False
        try:
            await self._read_news()
        except LostRace:
            logger.info("Another process gives out positions too; looking again")
            self._read = None
        except Exception as error:
            log_failure(
                "Cannot look for new sticky events; they are delivered late, trying again", error
            )
            self._read = None
        finally:
            self._running = False
            self._last_run_ts = self._now_ts()
        if self._run_again:
            self.run_now()
        elif self._read is not None:
            # What was written meanwhile. After a failure the next watch tries again.
            self.on_stream_change()

    async def _read_news(self) -> None:
        if self._must_reload:
            self._must_reload, self._read = False, None
        if self._read is None:
            written = await self._within_database(self._bounds.current())
            progress = await self._store.get_progress()
            if progress is None or progress[0].is_beyond(await self._bounds.allocated()):
                await self._begin(written, progress)
                await self._backlog.begin()
                self._has_caught_up = True
                return
            # Another process may have given out positions meanwhile. And whoever gave them
            # out may have ended before it told.
            await self._reader.refresh()
            self._announcements.signal_later()
            await self._store.mend_reasons()
            await self._backlog.begin()
            self._read, self._last_position = progress
            self._stored_events_bound = self._read.events
        await self._follow()
        self._has_caught_up = True
        for take in self._backlog.takers():
            rejudged = await take()
            if rejudged:
                await self._record([], [], rejudged, self._read, self._last_position)
            # News wait for one slice only.
            await self._follow()
        if self._backlog:
            self._run_again = True
        elif self._backlog.is_left and not self._slice_scheduled:
            self._slice_scheduled = True
            self._clock.call_later(PAUSE_MS, self._on_slice_time)

    def _on_slice_time(self) -> None:
        self._slice_scheduled = False
        self.run_now()

    async def _follow(self) -> None:
        """Read the streams as far as they are written."""
        assert self._read is not None
        written = self._bounds.current()
        if self._is_set_back:
            written = await self._within_database(written)
        for bounds in in_steps(self._read, self._read.joined(written), _STEP):
            await self._read_up_to(bounds)

    async def _begin(self, written: Bounds, progress: tuple[Bounds, int] | None) -> None:
        """The first start: what is already in the database and sticky counts too.

        Args:
            progress: as it is stored, if Synapse's streams end before it: then start over.
        """
        index = self._reader.index
        candidates = [
            attr.evolve(c, was_accepted=c.was_accepted or index.get(c.event_id) is not None)
            for c in await self._tables.find_recent_candidates(self._now_ts())
        ]
        servers = await self._servers_in_rooms_of(candidates)
        joins = [server.join for server in servers if server.join is not None]
        last_position = None if progress is None else progress[1]
        await self._record(candidates, joins, [], written, last_position, servers, begins=True)
        self._advance(written)
        if progress is not None:
            logger.warning(
                "Synapse's database, or a part of it, was restored or set back: its streams end "
                "before the place up to which they were read for sticky events. Read the last "
                "hour again: %d unexpired sticky events are delivered again",
                len(candidates),
            )
        else:
            logger.info("Found %d unexpired sticky events in the database", len(candidates))

    async def _within_database(self, written: Bounds) -> Bounds:
        """Return how far the streams are written, and no further than the database says."""
        allocated = await self._bounds.allocated()
        was_set_back, self._is_set_back = self._is_set_back, written.is_beyond(allocated)
        if not self._is_set_back:
            return written
        if not was_set_back:
            logger.warning(
                "Synapse's database was set back while Synapse was running, as a failover to an "
                "older copy does. Restart Synapse: it has gone on from where it was. Until then "
                "sticky events are noticed a little later"
            )
        # Some of the places may have been given to events that are still to be stored.
        await self._clock.sleep(_SETTLES_MS)
        return written.within(allocated)

    def _reload(self) -> None:
        """Go on with what is stored, whatever is known here. Never raises."""
        self._must_reload = True
        self.run_now()

    async def _read_up_to(self, bounds: Bounds) -> None:
        assert self._read is not None
        ranges = list(pending_ranges(self._read, bounds))
        if not ranges:
            return
        redactions = self._room_state.has_seen_settings
        watched = Watched(self._rechecks.rooms, STATE_TYPES, self._reviews.rooms, redactions)
        found = await self._tables.find(ranges, self._now_ts(), watched)
        changed = {
            change.room_id
            for change in found.state_changes
            if change.type in STATE_TYPES and change.room_id in self._reviews.rooms
        }
        changed |= {state.room_id for state in found.redacted}
        # Synapse's own news of these may still be on their way to this process.
        self._room_state.forget(changed, [state.event_id for state in found.redacted])
        self._reviews.add_rooms(changed)
        fresh = list(self._fresh(found.candidates))
        joins = await self._mattering_joins(found.joins, fresh)
        self._rechecks.on_changes(found.state_changes)
        if (
            fresh
            or joins
            # Other processes must not wait for these.
            or found.has_others
            or bounds.events - self._stored_events_bound >= _STEP
        ):
            # Synapse has sent these while the module was away.
            servers = [] if self._has_caught_up else await self._servers_in_rooms_of(fresh)
            await self._record(fresh, joins, [], bounds, self._last_position, servers)
        self._advance(bounds)

    def _fresh(self, candidates: Iterable[Candidate]) -> Iterator[Candidate]:
        """Return the candidates to record: the others were recorded when they were read before.

        One that is known, and found where nothing was read yet, was purged and stored once more:
        unless it is where it was recorded. That happens to an event that is stored while a first
        start reads the whole database, which may be further than the streams at its beginning.
        """
        assert self._read is not None
        index = self._reader.index
        for candidate in candidates:
            event_id = candidate.event_id
            if not index.knows(event_id) and event_id not in self._left_out:
                yield candidate
            elif candidate.found_at is None or not self._read.cover(*candidate.found_at):
                known = index.get(event_id)
                if known is None:
                    yield attr.evolve(candidate, was_recorded=True)
                elif candidate.found_at is None or candidate.found_at[1] != known.stream_ordering:
                    yield attr.evolve(candidate, was_recorded=True, was_accepted=True)

    async def _mattering_joins(
        self, joins: Iterable[SeenJoin], fresh: Collection[Candidate]
    ) -> list[SeenJoin]:
        """The joins of local users, and of servers, to rooms where something is due to them."""
        index, now_ts = self._reader.index, self._now_ts()
        fresh_rooms = {candidate.room_id for candidate in fresh}
        local, remote = [], []
        for join in joins:
            if self._api.is_mine(join.member):
                if join.room_id in index.rooms or join.room_id in fresh_rooms:
                    local.append(join)
            elif join.is_new and (
                any(index.owed_after(join.room_id, 0, now_ts))
                or any(
                    candidate.room_id == join.room_id
                    and candidate.stream_ordering < join.stream_ordering
                    for candidate in fresh
                )
            ):
                remote.append(join)
        return local + await self._tables.find_server_joins(remote, get_domain_from_id)

    async def _record(
        self,
        candidates: Iterable[Candidate],
        joins: Iterable[SeenJoin],
        rejudged: Collection[Rejudged],
        read: Bounds,
        last_position: int | None,
        servers: Collection[ServerInRoom] = (),
        begins: bool = False,
    ) -> None:
        admitted: list[Admitted] = []
        left_out: list[str] = []
        soft_failed: list[RecordedEvent] = []
        for candidate in candidates:
            reasons = await self._admission.reasons(candidate)
            if reasons is None:
                left_out.append(candidate.event_id)
                continue
            admitted.append(Admitted(candidate, reasons, self._is_owed(candidate)))
            if HeldReason.SOFT_FAILED.value in reasons:
                soft_failed.append(_soft_failed(candidate))
        items: list[Item] = [*admitted, *joins]
        items.sort(key=_stream_ordering)
        items += rejudged
        now_ts = self._now_ts()
        # Older positions are in the hands of clients.
        after = max(now_ts, self._last_position, last_position or 0) if begins else last_position
        positioned, position = give_positions(items, after, now_ts)
        watermarks = await self._settled_before(positioned, servers, begins)
        changes = [
            EventChange.of_admitted(i, at) for at, i in positioned if isinstance(i, Admitted)
        ]
        is_message = (
            not begins
            and len(changes) == len(items)
            and self._announcements.fit_in_message(changes)
        )
        await self._store.record(
            positioned, read, last_position, position, now_ts, watermarks, not is_message, begins
        )
        self._last_position = position
        self._stored_events_bound = read.events
        self._note_left_out(left_out, read)
        self._reviews.note((i.candidate.room_id, i.candidate.expires_ts) for i in admitted)
        if not begins:
            self._measure(admitted)
        self._rechecks.add(soft_failed)
        if len(changes) == len(items) and not begins:
            recorded = Recorded(last_position or 0, position, read, changes)
            if is_message:
                self._announcements.send(recorded)
            await self._reader.on_recorded(recorded)
        else:
            await self._reader.refresh()

    def _note_left_out(self, event_ids: Sequence[str], read: Bounds) -> None:
        """Count the events that were not recorded, each once even if it is read twice."""
        self._beyond += len(event_ids)
        self._metrics.count(OVER_CAPACITY, len(event_ids))
        if len(self._left_out) < _STEP:
            self._left_out.update(dict.fromkeys(event_ids, read))

    def _measure(self, admitted: Iterable[Admitted]) -> None:
        now_ts = self._now_ts()
        deliverable = (item.candidate for item in admitted if not item.reasons)
        self._metrics.observe(TIME_TO_DELIVERABLE, (now_ts - c.received_ts for c in deliverable))

    async def _servers_in_rooms_of(self, candidates: Iterable[Candidate]) -> list[ServerInRoom]:
        """The other servers in the rooms of events that servers are owed."""
        since: dict[str, int] = {}
        for candidate in sorted(candidates, key=lambda c: c.stream_ordering):
            if self._is_owed(candidate):
                since.setdefault(candidate.room_id, candidate.stream_ordering)
        servers = await self._tables.find_servers(since, get_domain_from_id) if since else []
        return [server for server in servers if server.server_name != self._api.server_name]

    async def _settled_before(
        self,
        items: Sequence[tuple[int, Item]],
        servers: Collection[ServerInRoom],
        begins: bool,
    ) -> list[WatermarkRow]:
        if not servers:
            return []
        if begins:
            return settled_before(items, servers, lambda server_name, room_id: 0)
        index, now_ts = self._reader.index, self._now_ts()
        rows = {(r.server_name, r.room_id): r for r in await self._store.get_watermarks(now_ts)}

        def joined_if_settled(server_name: str, room_id: str) -> int | None:
            join, row = index.join(server_name, room_id), rows.get((server_name, room_id))
            joined_position = join.position if join is not None else 0
            *_, newest = [None, *index.owed_after(room_id, 0, now_ts)]
            if newest is None:
                return joined_position
            if (
                row is None
                or row.joined_position < joined_position
                or row.settled_position < newest.position
                or row.settled_from
            ):
                return None
            return row.joined_position

        return settled_before(items, servers, joined_if_settled)

    def _is_owed(self, candidate: Candidate) -> bool:
        return (
            candidate.sent_out and not candidate.unchecked and self._api.is_mine(candidate.sender)
        )

    async def _clean_up(self) -> None:
        with shielded("Cannot find out whether the database was set back; trying again"):
            await self._notice_set_back()
        self._rechecks.expire(self._now_ts())
        self._reviews.expire(self._now_ts())
        with shielded("Cannot delete expired sticky events; trying again"):
            await self._delete_expired()

    async def _notice_set_back(self) -> None:
        if self._read is not None and self._read.is_beyond(await self._bounds.allocated()):
            self._reload()

    async def _delete_expired(self) -> None:
        deleted, held = await self._store.delete_expired(self._now_ts())
        logger.debug("Deleted %d expired sticky events", deleted)
        for reason, count in held.items():
            self._metrics.count(EXPIRED_WHILE_HELD, count, reason=reason)
        if HeldReason.OVER_RATE.value in held:
            logger.info(
                "%d sticky events of other servers have expired before their rate let them through",
                held[HeldReason.OVER_RATE.value],
            )
            self._backlog.on_expired()
        if self._beyond:
            logger.warning(
                "%d sticky events of other servers are ordinary events: more than "
                "`max_held_per_server` were held already, of their server in their room",
                self._beyond,
            )
            self._beyond = 0


def _soft_failed(candidate: Candidate) -> RecordedEvent:
    return RecordedEvent(
        candidate.event_id,
        candidate.room_id,
        candidate.sender,
        candidate.stream_ordering,
        candidate.expires_ts,
        frozenset({HeldReason.SOFT_FAILED.value}),
    )


def _stream_ordering(item: Item) -> int:
    if isinstance(item, Admitted):
        return item.candidate.stream_ordering
    return item.event.stream_ordering if isinstance(item, Rejudged) else item.stream_ordering
