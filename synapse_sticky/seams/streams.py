# SPDX-License-Identifier: AGPL-3.0-or-later
"""Synapse's streams: how far they are written, and waking the clients that wait for them."""

from collections.abc import Collection
from typing import Any

from synapse.server import HomeServer
from synapse.types import StreamKeyType

from synapse_sticky.seams.bounds import Bounds
from synapse_sticky.seams.checks import require
from synapse_sticky.seams.failures import shielded


class StreamBounds:
    """Tells up to where the streams are persisted, from memory.

    Attributes:
        is_writer: whether this process writes the stream of events.
        is_only_writer: whether it does so alone.
    """

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
            require(getattr(store, name), "get_max_allocated_token")
        self._events = store._stream_id_gen
        # It has more than its base class promises.
        self._backfill: Any = store._backfill_id_gen
        self._un_partial_stated: Any = store._un_partial_stated_events_stream_id_gen
        self._writers = hs.config.worker.writers.events
        self._told: dict[str, int] = {}
        self.is_writer = hs.get_instance_name() in self._writers
        self.is_only_writer = self._writers == [hs.get_instance_name()]
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
            events_by_writer={writer: self.written_by(writer) for writer in self._writers},
            backfill_by_writer={
                writer: self._backfill.get_current_token_for_writer(writer)
                for writer in self._writers
            },
        )

    async def allocated(self) -> Bounds:
        """Return up to where Synapse has given out places, as the database says.

        No place beyond was ever written, unless the database was set back.
        """
        return Bounds(
            events=await self._events.get_max_allocated_token(),
            # As a positive number.
            backfill=-await self._backfill.get_max_allocated_token(),
            un_partial_stated=await self._un_partial_stated.get_max_allocated_token(),
        )

    def written_by(self, writer: str) -> int:
        """Return up to where one writer has written the stream of events."""
        return max(self.known_from(writer), self._told.get(writer, 0))

    def known_from(self, writer: str) -> int:
        """Return up to where this process has one writer's events from Synapse itself."""
        known: int = self._events.get_current_token_for_writer(writer)
        return known

    def take_from(self, writer: str, written: int) -> None:
        """Take from a writer itself how far it is, before Synapse's replication tells."""
        self._told[writer] = max(written, self._told.get(writer, 0))

    def state_changed_after(self, stream_ordering: int) -> bool:
        """Whether the current state of any room has changed since, or may have."""
        return self._state_changes.has_any_entity_changed(stream_ordering)


class Waker:
    """Wakes the long-polls of users."""

    def __init__(self, hs: HomeServer) -> None:
        self._notifier = hs.get_notifier()
        require(self._notifier, "on_new_event", "stream_key", "new_token", "users", "rooms")
        require(StreamKeyType, "STICKY_EVENTS")

    def wake(self, user_ids: Collection[str], room_ids: Collection[str]) -> None:
        """Wakes these users, and the users in these rooms. Never raises."""
        with shielded("Cannot wake clients for sticky events; they see them at their next sync"):
            # The token is only logged: woken syncs ask for the current one.
            self._notifier.on_new_event(
                StreamKeyType.STICKY_EVENTS,
                0,  # type: ignore[call-overload]
                users=user_ids,
                rooms=room_ids,
            )
