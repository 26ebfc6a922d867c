# SPDX-License-Identifier: AGPL-3.0-or-later
"""Events as Synapse hands them out: read, filtered and formatted for a client."""

import inspect
from collections.abc import Collection, Iterable, Sequence
from typing import Any, Final

import attr
from synapse import visibility
from synapse.api.constants import Membership
from synapse.events import EventBase
from synapse.events import utils as events_utils
from synapse.server import HomeServer
from synapse.types import JsonDict
from twisted.internet import defer

from synapse_sticky import stickiness
from synapse_sticky.protocol import EVENT_KEY
from synapse_sticky.seams.background import Clock
from synapse_sticky.seams.checks import require

ClientEvent = Any
"""What Synapse's visibility filter returns: an event before 1.152, and from
then on an event with the user's membership at that time."""


def event_of(client_event: ClientEvent) -> EventBase:
    """The event in what the visibility filter returned."""
    event: Any = getattr(client_event, "event", client_event)
    return event  # type: ignore[no-any-return]


def has_stickiness(event: EventBase) -> bool:
    """Whether an event has a stickiness that makes sense: a cheap test for hot paths.

    Of the Rust events from 1.155 on, those with a duration beyond 64 bits fail it.
    """
    if _EVENTS_ARE_RUST:
        # To get a key that Synapse does not know costs forty times as much.
        return event.sticky_duration() is not None
    return event.get(EVENT_KEY) is not None


_EVENTS_ARE_RUST: Final = not inspect.isfunction(EventBase.sticky_duration)


def keeps_stickiness(event: EventBase) -> bool:
    """Whether an event that was noticed is still sticky: not redacted, nor pruned."""
    # Twenty times as fast as to look for the key.
    return not event.internal_metadata.is_redacted()


def sticky_duration_ms(event: EventBase) -> int | None:
    """How long an event is sticky, None for an ordinary one.

    A redacted event is an ordinary one: its key went with the redaction.
    """
    sticky = event.get(EVENT_KEY)
    return None if sticky is None else stickiness.effective_duration_ms(sticky)


_ABOUT_REPLACED: Final = ("prev_content", "prev_sender", "replaces_state")


def without_replaced(client_event: ClientEvent) -> ClientEvent:
    """Return an event without what Synapse says of the state event that it replaced."""
    event = event_of(client_event)
    names = [name for name in _ABOUT_REPLACED if name in event.unsigned]
    if not names:
        return client_event
    # The event itself is shared by all requests.
    copy: Any = events_utils.clone_event(event)
    for name in names:
        del copy.unsigned[name]
    return copy if client_event is event else attr.evolve(client_event, event=copy)


class EventSource:
    """Reads events for clients."""

    def __init__(self, hs: HomeServer, clock: Clock) -> None:
        self._store: Any = hs.get_datastores().main
        self._storage = hs.get_storage_controllers()
        self._serializer = hs.get_event_client_serializer()
        require(self._store, "_invalidate_local_get_event_cache", "event_id")
        for method in ("get_event", "get_events_as_list", "ignored_users"):
            require(self._store, method)
        require(self._store, "_account_data_stream_cache")
        self._account_data_changes = self._store._account_data_stream_cache
        require(self._account_data_changes, "has_entity_changed", "entity", "stream_pos")
        require(self._store, "have_events_in_timeline", "event_ids")
        require(events_utils, "clone_event", "event")
        require(self._serializer, "serialize_events", "events", "time_now", "config")
        self._clock = clock

    def forget_cached(self, event_ids: Iterable[str]) -> None:
        """What is cached of these events in this process is out of date."""
        for event_id in event_ids:
            self._store._invalidate_local_get_event_cache(event_id)

    async def ignored_users(self, user_id: str) -> frozenset[str]:
        """The senders whom a user does not want to hear."""
        ignored: frozenset[str] = await self._store.ignored_users(user_id)
        return ignored

    def account_data_changed(self, user_id: str, position: int) -> bool:
        """Whether any account data of a user may have changed since. Costs no query.

        Args:
            position: in Synapse's stream of account data.
        """
        changed: bool = self._account_data_changes.has_entity_changed(user_id, position)
        return changed

    async def is_real_join(self, event_id: str) -> bool:
        """Whether a join does not just replace another join of the same user."""
        event = await self._store.get_event(event_id, allow_none=True)
        replaced_id = event.unsigned.get("replaces_state") if event else None
        if replaced_id is None:
            return event is not None
        replaced = await self._store.get_event(replaced_id, allow_none=True)
        return replaced is None or replaced.membership != Membership.JOIN

    async def visible_sticky_events(
        self, user_id: str, event_ids: Sequence[str]
    ) -> list[ClientEvent]:
        """These events as this user may see them, in the given order.

        Synapse's filter decides, which lifts their history visibility for users who are
        joined, as on every endpoint (``hooks/visibility.py``).

        Left out is what is not sticky any more (redacted, or pruned because its
        sender was erased), was rejected or soft-failed, and what Synapse's
        filter leaves out: ignored senders, the retention policy.
        """
        events = await self._store.get_events_as_list(event_ids)
        try:
            visible = await self._filter(user_id, events)
        except (KeyError, RuntimeError, defer.FirstError):
            # It fails for all of them if one was purged since it was read.
            there = await self._store.have_events_in_timeline(event_ids)
            if there.issuperset(event.event_id for event in events):
                raise
            visible = await self._filter(user_id, [e for e in events if e.event_id in there])
        by_id = {
            event.event_id: client_event
            for event, client_event in zip(map(event_of, visible), visible, strict=True)
            if keeps_stickiness(event)
        }
        return [by_id[event_id] for event_id in event_ids if event_id in by_id]

    async def _filter(self, user_id: str, events: list[EventBase]) -> list[ClientEvent]:
        visible: list[ClientEvent] = await visibility.filter_and_transform_events_for_client(
            self._storage, user_id, events
        )
        return visible

    async def serialize(self, events: Collection[ClientEvent], config: Any) -> list[JsonDict]:
        """Formats events of one room for its section.

        The ``room_id`` is always there: matrix-js-sdk reads the section without
        knowing the room, and cannot decrypt an event that lacks it.
        """
        serialized = await self._serializer.serialize_events(
            events, self._clock.now_ts(), config=config
        )
        for client_event, formatted in zip(events, serialized, strict=True):
            formatted["room_id"] = event_of(client_event).room_id
        return serialized

    async def client_format(self, requester: Any) -> Any:
        """How Sliding Sync formats events for this requester."""
        if hasattr(self._serializer, "create_config"):
            return await self._serializer.create_config(
                event_format=events_utils.EventFormat.ClientV2, requester=requester
            )
        # Before 1.157 it is a plain class, and formats are functions.
        config_class: Any = events_utils.SerializeEventConfig
        return config_class(
            event_format=events_utils.format_event_for_client_v2, requester=requester
        )
