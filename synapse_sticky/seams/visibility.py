# SPDX-License-Identifier: AGPL-3.0-or-later
"""Lifts history visibility from unexpired sticky events, for joined users.

MSC4354: "History visibility checks MUST NOT be applied to sticky events", on
any endpoint. All of Synapse's endpoints for clients ask one function, which
most modules have imported by name: so it is replaced wherever it is held.
"""

import sys
from collections.abc import Callable
from typing import Any

from synapse import visibility
from synapse.events import EventBase
from synapse.server import HomeServer
from synapse.storage.controllers import StorageControllers

from synapse_sticky.seams.checks import require
from synapse_sticky.seams.events import sticky_duration_ms

_FUNCTION = "filter_and_transform_events_for_client"


def lift_history_visibility(hs: HomeServer, is_sticky: Callable[[str], bool]) -> None:
    """Wraps Synapse's filter.

    Args:
        is_sticky: whether the event of this ID is deliverable and unexpired.
            It is asked for every event that passes the filter.
    """
    require(
        visibility, _FUNCTION, "storage", "user_id", "events", "is_peeking", "always_include_ids"
    )
    store: Any = hs.get_datastores().main
    require(store, "get_rooms_for_user")
    require(store, "are_users_erased")
    original = visibility.filter_and_transform_events_for_client

    async def filter_and_transform_events_for_client(
        storage: StorageControllers,
        user_id: str,
        events: list[EventBase],
        is_peeking: bool = False,
        always_include_ids: frozenset[str] = frozenset(),
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        sticky = [e for e in events if is_sticky(e.event_id) and sticky_duration_ms(e)]
        if sticky:
            always_include_ids |= await _may_see(user_id, sticky)
        return await original(
            storage, user_id, events, is_peeking, always_include_ids, *args, **kwargs
        )

    async def _may_see(user_id: str, events: list[EventBase]) -> frozenset[str]:
        # Current membership counts, and the membership at the time does not.
        # Erased senders are left to Synapse's rules and its pruning, which being
        # included regardless would skip. Outliers it cannot handle.
        joined_rooms = await store.get_rooms_for_user(user_id)
        erased = await store.are_users_erased({e.sender for e in events})
        return frozenset(
            e.event_id
            for e in events
            if e.room_id in joined_rooms
            and not erased.get(e.sender)
            and not e.internal_metadata.is_outlier()
        )

    for name, module in list(sys.modules.items()):
        if name.startswith("synapse.") and getattr(module, _FUNCTION, None) is original:
            setattr(module, _FUNCTION, filter_and_transform_events_for_client)
