# SPDX-License-Identifier: AGPL-3.0-or-later
"""Synapse's notifier tells us here that something may be new."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from synapse.api.constants import EventTypes
from synapse.events import EventBase
from synapse.server import HomeServer
from synapse.types import PersistedEventPosition

from synapse_sticky.deliverable.messages import Stored, StoredEvent
from synapse_sticky.hooks.guard import wrap
from synapse_sticky.protocol import EVENT_KEY
from synapse_sticky.seams.background import Clock
from synapse_sticky.seams.checks import require
from synapse_sticky.seams.events import has_stickiness, sticky_duration_ms
from synapse_sticky.seams.failures import shielded
from synapse_sticky.seams.signal import MESSAGE_PREFIX
from synapse_sticky.seams.streams import StreamBounds
from synapse_sticky.stickiness import expires_ts

NewEvents = Sequence[tuple[EventBase, PersistedEventPosition]]


def on_stream_change(hs: HomeServer, callback: Callable[[], None]) -> None:
    """Call back whenever a stream may have moved, often without need.

    Not for what another process has backfilled: compare the bounds from time to
    time as well.
    """
    notifier = hs.get_notifier()
    require(notifier, "add_replication_callback", "cb")

    def on_poke() -> None:
        with shielded("Cannot look for new sticky events now; they are noticed a little later"):
            callback()

    notifier.add_replication_callback(on_poke)


def on_ordinary_events(hs: HomeServer, callback: Callable[[list[int]], None]) -> None:
    """Call back with the stream orderings of events just stored here that do not matter.

    That is a hint, which saves looking into the database for every plain event: what is
    not told is found by the bounds.
    """

    def on_events(events: NewEvents) -> None:
        callback(
            [
                at.stream
                for event, at in events
                # What is redacted may be the settings of a room.
                if event.get(EVENT_KEY) is None and event.type != EventTypes.Redaction
            ]
        )

    _before_clients_are_told(hs, on_events)


def on_sticky_events(
    hs: HomeServer, clock: Clock, bounds: StreamBounds, callback: Callable[[Stored], None]
) -> None:
    """Call back with the sticky events that this process has just stored.

    Not with those that will not be deliverable, as far as it can tell.
    """
    writer = hs.get_instance_name()

    def on_events(events: NewEvents) -> None:
        now_ts = clock.now_ts()
        stored = []
        for event, at in events:
            until_ts = _deliverable_until(event, now_ts) if has_stickiness(event) else None
            if until_ts is not None:
                stored.append(StoredEvent(event.event_id, event.room_id, at.stream, until_ts))
        if stored:
            callback(Stored(writer, bounds.written_by(writer), stored))

    _before_clients_are_told(hs, on_events)


def _before_clients_are_told(hs: HomeServer, callback: Callable[[NewEvents], None]) -> None:
    notifier = hs.get_notifier()
    original = notifier.on_new_room_events

    async def on_new_room_events(events_and_pos: NewEvents, *args: Any, **kwargs: Any) -> None:
        with shielded("Cannot take a hint of new events; they are noticed a little later"):
            callback(events_and_pos)
        await original(events_and_pos, *args, **kwargs)  # type: ignore[arg-type]

    wrap(notifier, "on_new_room_events", on_new_room_events, "events_and_pos")


def _deliverable_until(event: EventBase, now_ts: int) -> int | None:
    """Return when an event expires that was stored now, None if nobody will be sent it."""
    duration_ms = sticky_duration_ms(event)
    if duration_ms is None or event.internal_metadata.is_soft_failed() or event.rejected_reason:
        return None
    until_ts = expires_ts(duration_ms, now_ts, event.origin_server_ts)
    return until_ts if until_ts > now_ts else None


def on_server_back(hs: HomeServer, callback: Callable[[str], None]) -> None:
    """Call back with the name of a server that can be reached again, on every process."""
    notifier = hs.get_notifier()
    original = notifier.notify_remote_server_up

    def notify_remote_server_up(server: str) -> None:
        with shielded("Cannot note that a server is back; the events that it sent stay missed"):
            callback(server)
        original(server)

    wrap(notifier, "notify_remote_server_up", notify_remote_server_up, "server")


def on_messages(hs: HomeServer, listeners: Mapping[str, Callable[[str], None]]) -> None:
    """Call back with the messages that other processes send.

    Args:
        listeners: by the kind of message, called with its text.
    """
    notifier = hs.get_notifier()
    require(notifier, "add_lock_released_callback", "callback")
    own_name = hs.get_instance_name()
    by_lock = {f"{MESSAGE_PREFIX}{kind}": listener for kind, listener in listeners.items()}

    def on_lock_released(instance_name: str, lock_name: str, lock_key: str) -> None:
        listener = by_lock.get(lock_name)
        if listener is not None and instance_name != own_name:
            with shielded("Cannot read what another process tells; it is noticed a little later"):
                listener(lock_key)

    notifier.add_lock_released_callback(on_lock_released)
