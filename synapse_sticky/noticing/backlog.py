# SPDX-License-Identifier: AGPL-3.0-or-later
"""Judges recorded events again, a slice at a time: news go first, and wait for one slice only.

Nothing of this is stored: at a start all rooms are reviewed, and all soft-failed events checked.
"""

import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Final

from synapse.types import get_domain_from_id

from synapse_sticky.noticing.admission import Admission, HeldReason
from synapse_sticky.noticing.rechecks import Rechecks
from synapse_sticky.noticing.reviews import Condition, Reviews
from synapse_sticky.noticing.throttle import Key, Throttle
from synapse_sticky.seams.background import Clock
from synapse_sticky.storage.rows import RecordedEvent, Rejudged
from synapse_sticky.storage.store import StickyStore

logger = logging.getLogger(__name__)

# What a slice has at most, and how long it goes on to fill up: recording it comes on top.
_SLICE: Final = 500
_SLICE_BUDGET_MS: Final = 50
# How often held events are released that the rate of their server allows by now.
_RELEASE_INTERVAL_MS: Final = 1_000
PAUSE_MS: Final = 100
"""How long the database is left to others between slices that nobody waits for."""

_OVER_RATE: Final = frozenset({HeldReason.OVER_RATE.value})
_SOFT_FAILED: Final = frozenset({HeldReason.SOFT_FAILED.value})


class Backlog:
    """Takes slices of the events that are released, reviewed or checked again."""

    def __init__(
        self,
        clock: Clock,
        store: StickyStore,
        admission: Admission,
        throttle: Throttle,
        reviews: Reviews,
        rechecks: Rechecks,
    ) -> None:
        self._now_ts = clock.now_ts
        self._store = store
        self._admission = admission
        self._throttle = throttle
        self._reviews = reviews
        self._rechecks = rechecks
        self._last_release_ts = 0
        self._resume_ts = 0
        self._count_again = False
        # Where events are held that have not had their turn since then.
        self._to_release: list[Key] = []
        # How many were reviewed, are held since, and are delivered since.
        self._reviewed, self._held, self._delivered = 0, 0, 0

    def __bool__(self) -> bool:
        """Whether a slice is due now."""
        return bool(self._reviews) or (self.is_left and self._resume_ts <= self._now_ts())

    @property
    def is_left(self) -> bool:
        """Whether a slice is due now, or after a pause."""
        return bool(self._reviews) or bool(self._rechecks) or self._may_release()

    def takers(self) -> Iterator[Callable[[], Awaitable[list[Rejudged]]]]:
        """Return what takes a slice of each kind that is due."""
        if self._reviews:
            yield self._review
        if self._resume_ts > self._now_ts():
            return
        for is_due, take in (
            (self._may_release(), self._release),
            (bool(self._rechecks), self._recheck),
        ):
            if is_due:
                yield take
                # Who has decided something waits for it. Nobody waits for these.
                self._resume_ts = self._now_ts() + PAUSE_MS

    async def begin(self) -> None:
        """Judge everything again: nobody has followed what was decided, or changed, meanwhile."""
        now_ts = self._now_ts()
        self._reviews.note(await self._store.get_expiry_by_room(now_ts))
        self._reviews.add_everything()
        self._rechecks.clear()
        condition, arguments = _held_for(HeldReason.SOFT_FAILED)
        self._rechecks.add(await self._store.get_recorded(now_ts, condition, arguments))
        self._to_release = []
        await self._count_held()

    def on_expired(self) -> None:
        """Some of the events that are held for their rate have expired."""
        self._count_again = True

    async def _count_held(self) -> None:
        held: Counter[Key] = Counter()
        counts = await self._store.count_held(self._now_ts(), HeldReason.OVER_RATE.value)
        for room_id, sender, count in counts:
            held[room_id, get_domain_from_id(sender)] += count
        self._throttle.load(held)
        self._count_again = False

    def _may_release(self) -> bool:
        """Whether it is time to look whether events that are held for their rate may pass."""
        if self._to_release:
            return True
        since_ts = self._last_release_ts + _RELEASE_INTERVAL_MS
        return bool(self._throttle.keys) and since_ts <= self._now_ts()

    async def _release(self) -> list[Rejudged]:
        """Release events that the rate of their server allows by now."""
        if self._count_again:
            await self._count_held()
        if not self._to_release:
            self._last_release_ts = self._now_ts()
            self._to_release = self._throttle.keys[::-1]
        until_ts = self._now_ts() + _SLICE_BUDGET_MS
        released: list[RecordedEvent] = []
        while self._to_release and len(released) < _SLICE and self._now_ts() <= until_ts:
            key = self._to_release.pop()
            most = _SLICE - len(released)
            passing = await self._throttle.take(key, most)
            if passing == most:
                # There may be more.
                self._to_release.append(key)
            if passing:
                released += await self._find_over_rate(key, passing)
        return _without(released, _OVER_RATE)

    async def _review(self) -> list[Rejudged]:
        """Judge events again, after somebody has decided something."""
        now_ts = self._now_ts()
        for search in self._reviews.take_searches():
            self._reviews.add_found(search, await self._store.get_rooms(now_ts, *search))
        recorded: list[RecordedEvent] = []
        until_ts = now_ts + _SLICE_BUDGET_MS
        # Somebody may decide on a user meanwhile: the next slice looks for the user's rooms.
        while self._reviews.has_next and len(recorded) < _SLICE and self._now_ts() <= until_ts:
            limit = _SLICE - len(recorded)
            review, events = self._reviews.next()
            found = await self._store.get_recorded(now_ts, *events, limit)
            done = found[-1].stream_ordering if len(found) == limit else None
            self._reviews.go_on(review, done)
            recorded += found
        rejudged = await self._admission.rejudge(recorded)
        held = sum(1 for item in rejudged if item.reasons)
        self._reviewed += len(recorded)
        self._held += held
        self._delivered += len(rejudged) - held
        if not self._reviews:
            self._tell_of_reviews()
        return rejudged

    def _tell_of_reviews(self) -> None:
        if self._held or self._delivered:
            logger.info(
                "Of %d sticky events, %d are held now, and %d are delivered, by what admins "
                "have decided",
                self._reviewed,
                self._held,
                self._delivered,
            )
        self._reviewed, self._held, self._delivered = 0, 0, 0

    async def _recheck(self) -> list[Rejudged]:
        """Check soft-failed events again."""
        passing = await self._rechecks.take_passing(self._find_soft_failed)
        if not passing:
            return []
        event_ids = [event.event_id for event in passing]
        condition = f"e.event_id IN ({', '.join('?' * len(event_ids))})"
        recorded = await self._store.get_recorded(self._now_ts(), condition, event_ids)
        logger.info("%d sticky events are no longer soft-failed", len(recorded))
        return _without(recorded, _SOFT_FAILED)

    async def _find_soft_failed(self, room_id: str, after: int, limit: int) -> list[RecordedEvent]:
        condition, arguments = _held_for(HeldReason.SOFT_FAILED)
        return await self._store.get_recorded(
            self._now_ts(),
            f"e.room_id = ? AND e.stream_ordering > ? AND {condition}",
            (room_id, after, *arguments),
            limit,
        )

    async def _find_over_rate(self, key: Key, limit: int) -> list[RecordedEvent]:
        room_id, server_name = key
        condition, arguments = _held_for(HeldReason.OVER_RATE)
        return await self._store.get_recorded(
            self._now_ts(),
            f"e.room_id = ? AND {condition} AND e.sender LIKE ?",
            (room_id, *arguments, f"%:{server_name}"),
            limit,
        )


def _held_for(reason: HeldReason) -> Condition:
    condition = (
        "e.position IS NULL AND EXISTS (SELECT 1 FROM synapse_sticky_held AS r "
        "WHERE r.event_id = e.event_id AND r.reason = ?)"
    )
    return condition, (reason.value,)


def _without(events: Iterable[RecordedEvent], reasons: frozenset[str]) -> list[Rejudged]:
    return [Rejudged(event, event.reasons - reasons) for event in events]
