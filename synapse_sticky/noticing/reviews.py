# SPDX-License-Identifier: AGPL-3.0-or-later
"""Which events are to be judged again, since somebody has decided something. No Synapse, no clock.

The rooms in which there are sticky events matter: only there a decision changes anything. A
room's events are judged in the order of their stream, some at a time.
"""

from collections.abc import Iterable, Set
from typing import Final

import attr

Condition = tuple[str, tuple[object, ...]]
"""SQL on the table of events, ``e``, and its arguments."""

_ANY: Final[Condition] = ("TRUE", ())
_FIRST: Final = -(2**63)


@attr.s(slots=True, frozen=True, auto_attribs=True)
class Review:
    """Events of a room that are to be judged again."""

    room_id: str
    events: Condition


class Reviews:
    """The events to judge again, and the rooms that matter."""

    def __init__(self) -> None:
        # The stream ordering up to which each is done. The newest is last, and goes first.
        self._due: dict[Review, int] = {}
        # The same of the one whose events are read now, when that began.
        self._reading = _FIRST
        # Events whose rooms are not known yet.
        self._searches: set[Condition] = set()
        # When the last of its events expires.
        self._rooms: dict[str, int] = {}

    def __bool__(self) -> bool:
        return bool(self._due or self._searches)

    @property
    def has_next(self) -> bool:
        """Whether :meth:`next` has anything to return, without the events of unknown rooms."""
        return bool(self._due)

    @property
    def rooms(self) -> Set[str]:
        """The rooms that matter."""
        return self._rooms.keys()

    def add_rooms(self, rooms: Iterable[str]) -> None:
        """Judge the events of these rooms again."""
        for room_id in rooms:
            self._add(Review(room_id, _ANY))

    def add_sender(self, user_id: str) -> None:
        """Judge the events of a user again."""
        self._searches.add(("e.sender = ?", (user_id,)))

    def add_server(self, server_name: str) -> None:
        """Judge the events of a server's users again, however its name is written."""
        self._searches.add(("LOWER(e.sender) LIKE ?", (f"%:{server_name.lower()}",)))

    def add_everything(self) -> None:
        """Judge all events again."""
        self.add_rooms(self._rooms)

    def take_searches(self) -> set[Condition]:
        """Return the events whose rooms are not known: :meth:`add_found` is told of them."""
        searches, self._searches = self._searches, set()
        return searches

    def add_found(self, events: Condition, rooms: Iterable[str]) -> None:
        """These rooms have such events."""
        for room_id in rooms:
            self._add(Review(room_id, events))

    def next(self) -> tuple[Review, Condition]:
        """Return the review that goes on next, and its next events."""
        review, self._reading = next(reversed(self._due.items()))
        condition, arguments = review.events
        return review, (
            f"e.room_id = ? AND e.stream_ordering > ? AND ({condition})",
            (review.room_id, self._reading, *arguments),
        )

    def go_on(self, review: Review, done: int | None) -> None:
        """Its events were read up to this stream ordering, None if all were.

        They are to be judged after that: by what is decided then.
        """
        if self._due.get(review) != self._reading:
            # Somebody has decided something meanwhile: it begins again.
            return
        if done is None:
            del self._due[review]
        else:
            self._due[review] = done

    def note(self, events: Iterable[tuple[str, int]]) -> None:
        """There are events in these rooms, which matter until these times of expiry."""
        for room_id, expires_ts in events:
            self._rooms[room_id] = max(self._rooms.get(room_id, 0), expires_ts)

    def expire(self, now_ts: int) -> None:
        """Forget the rooms that do not matter any more."""
        self._rooms = {room_id: ts for room_id, ts in self._rooms.items() if ts > now_ts}

    def _add(self, review: Review) -> None:
        self._due.pop(review, None)
        self._due[review] = _FIRST
