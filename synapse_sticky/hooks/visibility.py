# SPDX-License-Identifier: AGPL-3.0-or-later
"""Lifts history visibility from unexpired sticky events, for joined users and servers.

MSC4354: "History visibility checks MUST NOT be applied to sticky events", on
any endpoint. All of Synapse's endpoints for clients ask one function, which
most modules have imported by name: so it is replaced wherever it is held.

What other servers ask for passes another such function.

What Synapse bundles with an event (its newest reply in a thread, its newest edit,
references to it) it does not filter: who may see the event has usually seen those
too. That is not so for an event whose visibility was lifted, so what is bundled with
it is filtered here.
"""

import functools
import sys
from collections.abc import Callable, Iterator, Sequence, Set
from typing import Any

from synapse import visibility
from synapse.events import EventBase
from synapse.server import HomeServer
from synapse.storage.controllers import StorageControllers
from synapse.types import get_domain_from_id

from synapse_sticky.seams.checks import require
from synapse_sticky.seams.events import event_of, sticky_duration_ms
from synapse_sticky.seams.federation import Federation

_FUNCTION = "filter_and_transform_events_for_client"
_SERVER_FUNCTION = "filter_events_for_server"


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

    @functools.wraps(original)
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

    _replace_everywhere(_FUNCTION, original, filter_and_transform_events_for_client)


def lift_history_visibility_for_servers(
    federation: Federation, is_sticky: Callable[[str], bool]
) -> None:
    """Wraps Synapse's filter of events that other servers ask for.

    Args:
        is_sticky: whether the event of this ID is deliverable and unexpired.
            It is asked for every event that passes the filter.
    """
    require(
        visibility,
        _SERVER_FUNCTION,
        "storage",
        "target_server_name",
        "local_server_name",
        "events",
        "filter_out_remote_partial_state_events",
    )
    original = visibility.filter_events_for_server

    @functools.wraps(original)
    async def filter_events_for_server(
        storage: StorageControllers,
        target_server_name: str,
        local_server_name: str,
        events: Sequence[EventBase],
        **kwargs: Any,
    ) -> list[EventBase]:
        result = await original(storage, target_server_name, local_server_name, events, **kwargs)
        lifted = [e for e in events if is_sticky(e.event_id) and sticky_duration_ms(e)]
        if lifted:
            may_see = await _server_may_see(storage, target_server_name, local_server_name, lifted)
            shown = {event.event_id: event for event in result} | may_see
            result = [shown[e.event_id] for e in events if e.event_id in shown]
        return result

    async def _server_may_see(
        storage: Any,
        server_name: str,
        local_server_name: str,
        events: list[EventBase],
    ) -> dict[str, EventBase]:
        # Erased senders are left to Synapse. Of a room with partial state it does not
        # know for sure who is in it, so it shows nobody there what others have sent.
        erased = await storage.main.are_users_erased({e.sender for e in events})
        may_see = {}
        for event in events:
            if erased.get(event.sender):
                continue
            if get_domain_from_id(
                event.sender
            ) != local_server_name and await storage.main.is_partial_state_room(event.room_id):
                continue
            if server_name in await federation.servers_in_room(event.room_id):
                may_see[event.event_id] = event
        return may_see

    _replace_everywhere(_SERVER_FUNCTION, original, filter_events_for_server)


def _replace_everywhere(name: str, original: object, replacement: object) -> None:
    """Puts a function where most of Synapse's modules have imported it by name."""
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith("synapse.") and getattr(module, name, None) is original:
            setattr(module, name, replacement)


def filter_bundled_aggregations(hs: HomeServer, is_sticky: Callable[[str], bool]) -> None:
    """Takes from what is bundled with sticky events whatever the user may not see."""
    relations = hs.get_relations_handler()
    require(relations, "get_bundled_aggregations", "user_id")
    store: Any = hs.get_datastores().main
    storage = hs.get_storage_controllers()
    original = relations.get_bundled_aggregations

    async def get_bundled_aggregations(events: Any, user_id: str) -> dict[str, Any]:
        bundled: dict[str, Any] = await original(events, user_id)
        lifted = {event_id: b for event_id, b in bundled.items() if is_sticky(event_id)}
        if lifted:
            event_ids = {e for b in lifted.values() for e in _bundled_event_ids(b)}
            visible = await visibility.filter_and_transform_events_for_client(
                storage, user_id, await store.get_events_as_list(event_ids)
            )
            visible_ids = {event_of(client_event).event_id for client_event in visible}
            bundled.update((event_id, _only(b, visible_ids)) for event_id, b in lifted.items())
        return bundled

    setattr(relations, "get_bundled_aggregations", get_bundled_aggregations)  # noqa: B010


def _bundled_event_ids(bundled: Any) -> Iterator[str]:
    if bundled.replace:
        yield bundled.replace.event_id
    if bundled.thread:
        yield bundled.thread.latest_event.event_id
    for reference in (bundled.references or {}).get("chunk", ()):
        yield reference["event_id"]


def _only(bundled: Any, event_ids: Set[str]) -> Any:
    """What is bundled, without what is not among these events."""
    chunk = (bundled.references or {}).get("chunk", ())
    references = [reference for reference in chunk if reference["event_id"] in event_ids]
    replace, thread = bundled.replace, bundled.thread
    return type(bundled)(
        references={"chunk": references} if references else None,
        replace=replace if replace and replace.event_id in event_ids else None,
        thread=thread if thread and thread.latest_event.event_id in event_ids else None,
    )
