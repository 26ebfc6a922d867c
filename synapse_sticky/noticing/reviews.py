# SPDX-License-Identifier: AGPL-3.0-or-later
"""What is to be judged again, since somebody has decided something. No Synapse, no clock.

The rooms in which there are sticky events matter: only there a decision changes anything.
"""

from collections.abc import Iterable, Iterator, Set

from synapse_sticky.storage.rows import Admitted, RecordedEvent

Condition = tuple[str, tuple[str, ...]]
"""SQL on the table of events, ``e``, and its arguments."""

EVERYTHING: Condition = ("TRUE", ())


class Reviews:
    """The events to judge again, and the rooms that matter."""

    def __init__(self) -> None:
        self._due: set[Condition] = set()
        # When the last of its events expires.
        self._rooms: dict[str, int] = {}

    def __bool__(self) -> bool:
        return bool(self._due)

    @property
    def rooms(self) -> Set[str]:
        """The rooms that matter."""
        return self._rooms.keys()

    def add_rooms(self, rooms: Iterable[str]) -> None:
        """Judge the events of these rooms again."""
        self._due.update(("e.room_id = ?", (room_id,)) for room_id in rooms)

    def add_sender(self, user_id: str) -> None:
        """Judge the events of a user again."""
        self._due.add(("e.sender = ?", (user_id,)))

    def add_server(self, server_name: str) -> None:
        """Judge the events of a server's users again, however its name is written."""
        self._due.add(("LOWER(e.sender) LIKE ?", (f"%:{server_name.lower()}",)))

    def add_everything(self) -> None:
        """Judge all events again."""
        self._due = {EVERYTHING}

    def take(self) -> Iterator[Condition]:
        """What is to be judged again, each once."""
        due, self._due = self._due, set()
        yield from [EVERYTHING] if EVERYTHING in due else sorted(due)

    def note(self, events: Iterable[Admitted | RecordedEvent]) -> None:
        """These events are recorded: their rooms matter until they expire."""
        for event in events:
            found = event.candidate if isinstance(event, Admitted) else event
            until_ts = max(self._rooms.get(found.room_id, 0), found.expires_ts)
            self._rooms[found.room_id] = until_ts

    def expire(self, now_ts: int) -> None:
        """Forget the rooms that do not matter any more."""
        self._rooms = {room_id: ts for room_id, ts in self._rooms.items() if ts > now_ts}
