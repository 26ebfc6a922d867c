# SPDX-License-Identifier: AGPL-3.0-or-later
"""Synapse's streams: how far they are, when they move, and who is to be woken.

Also the slot of Synapse's stream token that carries our position: ``groups_key``.
Synapse has kept it without use since 2022; every supported release parses it,
hands it on unchanged, and orders no stream by it.
"""

import logging
from collections.abc import Callable, Collection, Sequence
from typing import Any, Final

import attr
from synapse.events import EventBase
from synapse.module_api import LoggingTransaction
from synapse.server import HomeServer
from synapse.types import PersistedEventPosition, StreamKeyType, StreamToken

from synapse_sticky.clients.since import Since
from synapse_sticky.protocol import EVENT_KEY
from synapse_sticky.seams.bounds import Bounds
from synapse_sticky.seams.checks import require

logger = logging.getLogger(__name__)

_SIGNAL_NAME: Final = "synapse_sticky.signal"


class StreamBounds:
    """Tells up to where the streams are persisted, from memory."""

    def __init__(self, hs: HomeServer) -> None:
        store = hs.get_datastores().main
        generators = (
            "_stream_id_gen",
            "_backfill_id_gen",
            "_un_partial_stated_events_stream_id_gen",
        )
        for name in generators:
            require(store, name)
            require(getattr(store, name), "get_current_token")
            require(getattr(store, name), "get_current_token_for_writer", "instance_name")
        self._events = store._stream_id_gen
        self._backfill = store._backfill_id_gen
        self._un_partial_stated = store._un_partial_stated_events_stream_id_gen
        self._writers = hs.config.worker.writers.events
        require(store, "_curr_state_delta_stream_cache")
        self._state_changes = store._curr_state_delta_stream_cache
        require(self._state_changes, "has_any_entity_changed", "stream_pos")

    def current(self) -> Bounds:
        """The bounds that this process knows of.

        Must be taken before the transaction that uses them begins: a bound
        taken inside may lie beyond the transaction's snapshot.
        """
        return Bounds(
            events=self._events.get_current_token(),
            backfill=self._backfill.get_current_token(),
            un_partial_stated=self._un_partial_stated.get_current_token(),
            events_by_writer={
                writer: self._events.get_current_token_for_writer(writer)
                for writer in self._writers
            },
            backfill_by_writer={
                writer: self._backfill.get_current_token_for_writer(writer)
                for writer in self._writers
            },
        )

    def state_changed_after(self, stream_ordering: int) -> bool:
        """Whether the current state of any room has changed since, or may have."""
        return self._state_changes.has_any_entity_changed(stream_ordering)


def on_stream_change(hs: HomeServer, callback: Callable[[], None]) -> None:
    """Calls back whenever a stream may have moved, often without need.

    Not for what another process has backfilled: compare the bounds from time to
    time as well.
    """
    notifier = hs.get_notifier()
    require(notifier, "add_replication_callback", "cb")
    notifier.add_replication_callback(callback)


def on_new_events(hs: HomeServer, callback: Callable[[list[int], bool], None]) -> bool:
    """Calls back with events that this process has just stored, if it alone stores events.

    That is a hint, which saves looking into the database for every plain event: what
    is not told is found by the bounds.

    Returns:
        Whether it does. The callback gets the stream orderings of events that are
        not sticky, and whether others are.
    """
    if hs.config.worker.writers.events != [hs.get_instance_name()]:
        return False
    notifier = hs.get_notifier()
    require(notifier, "on_new_room_events", "events_and_pos")
    original = notifier.on_new_room_events

    async def on_new_room_events(
        events_and_pos: Sequence[tuple[EventBase, PersistedEventPosition]],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        try:
            sticky = {
                position.stream for e, position in events_and_pos if e.get(EVENT_KEY) is not None
            }
            ordinary = [
                position.stream for _, position in events_and_pos if position.stream not in sticky
            ]
            callback(ordinary, bool(sticky))
        except Exception:
            logger.exception("Cannot take a hint of new events; they are noticed a little later")
        await original(events_and_pos, *args, **kwargs)  # type: ignore[arg-type]

    notifier.on_new_room_events = on_new_room_events  # type: ignore[method-assign]
    return True


class Waker:
    """Wakes the long-polls of users."""

    def __init__(self, hs: HomeServer) -> None:
        self._notifier = hs.get_notifier()
        require(self._notifier, "on_new_event", "stream_key", "new_token", "users", "rooms")
        require(StreamKeyType, "STICKY_EVENTS")

    def wake(self, user_ids: Collection[str], room_ids: Collection[str]) -> None:
        """Wakes these users, and the users in these rooms. Never raises."""
        try:
            # The token is only logged: woken syncs ask for the current one.
            self._notifier.on_new_event(
                StreamKeyType.STICKY_EVENTS,
                0,  # type: ignore[call-overload]
                users=user_ids,
                rooms=room_ids,
            )
        except Exception:
            logger.exception(
                "Cannot wake clients for sticky events; they see them at their next sync"
            )


class Signal:
    """Tells every process that our tables changed.

    An object with the face of one of Synapse's cached functions, so that
    Synapse's own cache invalidation carries the news to all processes.
    """

    __module__ = _SIGNAL_NAME.split(".")[0]
    __name__ = _SIGNAL_NAME.split(".")[1]

    def __init__(self, hs: HomeServer, on_signal: Callable[[], None]) -> None:
        store = hs.get_datastores().main
        require(store, "_send_invalidation_to_replication", "txn", "cache_name", "keys")
        self._send = store._send_invalidation_to_replication
        self._has_other_processes = hs.config.redis.redis_enabled
        self._on_signal = on_signal
        hs.get_module_api().register_cached_function(self)  # type: ignore[arg-type]

    def send(self, txn: LoggingTransaction) -> None:
        """Tells all other processes once this transaction is committed."""
        if self._has_other_processes:
            self._send(txn, _SIGNAL_NAME, ("changed",))

    def invalidate(self, keys: tuple[str, ...]) -> None:
        """Called by Synapse when another process has sent a signal."""
        self._on_signal()

    def invalidate_all(self) -> None:
        """Called by Synapse when it does not know what changed."""
        self._on_signal()


def carry_position(hs: HomeServer, position: Callable[[], int]) -> None:
    """Makes Synapse's current stream token carry our current position.

    Synapse's notifier compares whole tokens: so a client that was given a
    position that lies behind is answered at once, and others stay asleep.
    """
    event_sources = hs.get_event_sources()
    require(event_sources, "get_current_token")
    require(StreamToken, "groups_key")
    original = event_sources.get_current_token

    def get_current_token() -> StreamToken:
        token = original()
        # The token was made for this call and is in nobody else's hands yet.
        # Making a second one would cost more than all else that we do to an
        # idle /sync.
        object.__setattr__(token, "groups_key", position())
        return token

    event_sources.get_current_token = get_current_token  # type: ignore[method-assign]


def since_of(token: StreamToken | None) -> Since:
    """How far the client has read, from a stream token; nothing without a token."""
    return Since.from_number(token.groups_key) if token else Since(0)


def covered_by(token: StreamToken) -> Callable[[str | None, int], bool]:
    """Whether timelines up to a token go as far as to what one writer has written."""

    def covered(instance_name: str | None, stream_ordering: int) -> bool:
        # What was written before there were several writers has no name.
        written_by = instance_name or "master"
        return stream_ordering <= token.room_key.get_stream_pos_for_instance(written_by)

    return covered


def with_since(token: StreamToken, since: Since) -> StreamToken:
    """The token of a client that has read so far."""
    if token.groups_key == since.number:
        return token
    return attr.evolve(token, groups_key=since.number)
