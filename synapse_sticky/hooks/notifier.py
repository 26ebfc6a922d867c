# SPDX-License-Identifier: AGPL-3.0-or-later
"""Synapse's notifier tells us here that something may be new."""

from collections.abc import Callable, Sequence
from typing import Any

from synapse.events import EventBase
from synapse.server import HomeServer
from synapse.types import PersistedEventPosition

from synapse_sticky.hooks.guard import shielded, wrap
from synapse_sticky.protocol import EVENT_KEY
from synapse_sticky.seams.checks import require


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


def on_new_events(hs: HomeServer, callback: Callable[[list[int], bool], None]) -> bool:
    """Call back with events that this process has just stored, if it alone stores events.

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
        with shielded("Cannot take a hint of new events; they are noticed a little later"):
            sticky = {
                position.stream for e, position in events_and_pos if e.get(EVENT_KEY) is not None
            }
            ordinary = [
                position.stream for _, position in events_and_pos if position.stream not in sticky
            ]
            callback(ordinary, bool(sticky))
        await original(events_and_pos, *args, **kwargs)  # type: ignore[arg-type]

    wrap(notifier, "on_new_room_events", on_new_room_events)
    return True
