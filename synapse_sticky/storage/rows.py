# SPDX-License-Identifier: AGPL-3.0-or-later
"""The rows of our tables. No Synapse, no clock."""

import attr

from synapse_sticky.seams.bounds import Bounds
from synapse_sticky.seams.contents import Candidate, SeenJoin


@attr.s(slots=True, frozen=True, auto_attribs=True)
class Admitted:
    """A candidate that is to be recorded.

    Attributes:
        reasons: why it is held; it is deliverable if there are none.
        owed: whether other servers are owed it.
    """

    candidate: Candidate
    reasons: frozenset[str]
    owed: bool


@attr.s(slots=True, frozen=True, auto_attribs=True)
class RecordedEvent:
    """An event that was recorded.

    Attributes:
        reasons: why it is held; it is deliverable if there are none.
    """

    event_id: str
    room_id: str
    sender: str
    stream_ordering: int
    expires_ts: int
    reasons: frozenset[str]


@attr.s(slots=True, frozen=True, auto_attribs=True)
class Rejudged:
    """A recorded event that is held for other reasons from now on, or for none.

    Attributes:
        reasons: those.
    """

    event: RecordedEvent
    reasons: frozenset[str]


Item = Admitted | Rejudged | SeenJoin
"""What is given a position when it is stored."""


@attr.s(slots=True, frozen=True, auto_attribs=True)
class EventChange:
    """What the store says of one event: ``position`` is None while it is held.

    ``held_reason`` is one of the reasons, and stays when it becomes deliverable.
    """

    event_id: str
    room_id: str
    sender: str
    position: int | None
    expires_ts: int
    stream_ordering: int
    owed: bool = False
    held_reason: str | None = None

    @classmethod
    def of_admitted(cls, admitted: Admitted, position: int) -> "EventChange":
        """Return the change that recording an event at a position makes."""
        found = admitted.candidate
        return cls(
            found.event_id,
            found.room_id,
            found.sender,
            None if admitted.reasons else position,
            found.expires_ts,
            found.stream_ordering,
            admitted.owed,
            min(admitted.reasons, default=None),
        )


@attr.s(slots=True, frozen=True, auto_attribs=True)
class JoinChange:
    """What the store says of a local user's, or another server's, newest join to a room.

    Everything in the room that is older than ``position`` became due to this
    member there. After ``expires_ts`` nothing that old can be sticky. The join
    itself is at ``stream_ordering`` in what ``instance_name`` has written.

    Attributes:
        member: the ID of the user or the name of the server.
    """

    member: str
    room_id: str
    position: int
    expires_ts: int
    stream_ordering: int
    instance_name: str | None

    @property
    def is_of_server(self) -> bool:
        """Whether the member is a server, and not a user."""
        return not self.member.startswith("@")


@attr.s(slots=True, frozen=True, auto_attribs=True)
class Changes:
    """The changes in our tables, oldest first.

    Attributes:
        position: the last position given out.
        read: how far Synapse's streams were read by then.
    """

    events: list[EventChange]
    joins: list[JoinChange]
    position: int
    read: Bounds


@attr.s(slots=True, frozen=True, auto_attribs=True)
class WatermarkRow:
    """A watermark as it is stored.

    Attributes:
        joined_position: of the server's join from which on it counts, 0 if it
            joined before that mattered.
        settled_position: up to which the server has settled everything.
        expires_ts: when everything that it has settled has expired.
        settled_from: what lies below it is owed all the same. So at the first start, if
            the server joined after some of the events.
    """

    server_name: str
    room_id: str
    joined_position: int
    settled_position: int
    expires_ts: int
    settled_from: int = 0
