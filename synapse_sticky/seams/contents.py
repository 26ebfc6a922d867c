# SPDX-License-Identifier: AGPL-3.0-or-later
"""What is found in Synapse's streams. No Synapse, no clock."""

from collections.abc import Collection, Set

import attr


@attr.s(slots=True, frozen=True, auto_attribs=True)
class Candidate:
    """A sticky event found in Synapse's tables.

    Attributes:
        stream_ordering: where Synapse has put it when it was stored.
        received_ts: when this server stored it, in ms since the epoch.
        soft_failed: Synapse has marked it so.
        refused: by a policy server or a spam checker.
        unchecked: Synapse never checked it against the room's current state.
        sent_out: Synapse sends it to other servers if it is by a user of this one.
        was_accepted: it was delivered to clients before, by Synapse's own implementation, or
            by this one before it was purged.
        was_recorded: it was recorded before, and purged since.
        found_at: its place in the stream of events that was read, and who wrote it there; None
            if it was found in another way.
    """

    event_id: str
    room_id: str
    sender: str
    stream_ordering: int
    expires_ts: int
    received_ts: int
    soft_failed: bool
    refused: bool
    unchecked: bool
    sent_out: bool
    was_accepted: bool = False
    was_recorded: bool = False
    found_at: tuple[str | None, int] | None = None


@attr.s(slots=True, frozen=True, auto_attribs=True)
class Unknown:
    """The events of a room that are not known here, though known ones refer to them.

    Attributes:
        gaps: those before an event that another server pushed a moment ago.
        history: the others, for example those before our join.
        begins_ts: when this server received its first event of the room that is no history.
    """

    gaps: Collection[str]
    history: Collection[str]
    begins_ts: int


@attr.s(slots=True, frozen=True, auto_attribs=True)
class SeenJoin:
    """A user's join to a room, found in Synapse's tables, or the join of a server by it.

    Attributes:
        is_new: the membership event came in then. Otherwise it is an old one that the
            current state has only now, for example at the end of a faster join.
    """

    member: str
    room_id: str
    stream_ordering: int
    instance_name: str | None
    is_new: bool = True


@attr.s(slots=True, frozen=True, auto_attribs=True)
class ServerInRoom:
    """Another server in a room, and what Synapse knows of it.

    Attributes:
        join: by which it came in since some moment; None if it was there before.
        sent_up_to: the stream ordering up to which Synapse has sent it events; 0 if none.
    """

    server_name: str
    room_id: str
    join: SeenJoin | None
    sent_up_to: int


@attr.s(slots=True, frozen=True, auto_attribs=True)
class StateChange:
    """A change of a room's current state, found in Synapse's tables."""

    room_id: str
    type: str
    state_key: str


@attr.s(slots=True, frozen=True, auto_attribs=True)
class RedactedState:
    """An event of a room's current state that was redacted, which does not change the state."""

    room_id: str
    event_id: str


@attr.s(slots=True, frozen=True, auto_attribs=True)
class Watched:
    """What is looked for in Synapse's streams beside sticky events and joins.

    Attributes:
        rooms: in these, every change of the current state.
        types: of state, whose changes are looked for in ``rooms_for_types``.
        redactions: whether redactions of that state are looked for too.
    """

    rooms: Set[str]
    types: Collection[str]
    rooms_for_types: Set[str]
    redactions: bool


@attr.s(slots=True, frozen=True, auto_attribs=True)
class StreamContents:
    """The sticky events, joins and changes of state in some ranges of Synapse's streams.

    Attributes:
        redacted: the watched state that was redacted.
        has_others: whether there are events that a response may take for sticky ones, which
            they are no longer.
    """

    candidates: list[Candidate]
    joins: list[SeenJoin]
    state_changes: list[StateChange]
    redacted: list[RedactedState]
    has_others: bool
