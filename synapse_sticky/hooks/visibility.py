# SPDX-License-Identifier: AGPL-3.0-or-later
"""Lifts history visibility from unexpired sticky events, for joined users and servers.

MSC4354: "History visibility checks MUST NOT be applied to sticky events", on
any endpoint. All of Synapse's endpoints for clients ask one function, which
most modules have imported by name: so it is replaced wherever it is held. Only
the timelines of ``/sync`` stay as Synapse makes them, since the section brings
the event anyway, and Synapse would begin the room's state at it.

What other servers ask for passes another such function.

Synapse shows more along with an event, because whoever may see the event has
usually seen that too. For an event whose visibility was lifted it is not so:

- The state of the room at that event (``/context``, and ``/messages`` and ``/search``
  for the senders' names). Instead comes the room's current state.
- The content that a state event replaced. It is left out.
- The newest reply, the newest edit and the references that are bundled with it.
  They are filtered.
"""

import functools
import sys
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence, Set
from contextvars import ContextVar
from operator import attrgetter
from typing import Any, Final

import attr
from synapse import visibility
from synapse.events import EventBase
from synapse.handlers import pagination, sliding_sync
from synapse.server import HomeServer
from synapse.storage.controllers import StorageControllers
from synapse.types import get_domain_from_id
from synapse.types.handlers.sliding_sync import SlidingSyncResult

from synapse_sticky.deliverable.index import LiveAmong
from synapse_sticky.hooks.guard import wrap
from synapse_sticky.hooks.sharing import choosing, synapses, wrap_for
from synapse_sticky.seams.checks import require
from synapse_sticky.seams.events import ClientEvent, event_of, sticky_duration_ms, without_replaced
from synapse_sticky.seams.failures import shielded
from synapse_sticky.seams.federation import Federation

_FUNCTION = "filter_and_transform_events_for_client"
_SERVER_FUNCTION = "filter_events_for_server"

_UNLIFTED_MODULES: Final = ("synapse.handlers.sync",)
"""Where Synapse's own filter stays: the section of ``/sync`` brings what is lifted."""

_NONE_LIFTED: Final[Mapping[str, str]] = {}
_lifted: ContextVar[Mapping[str, str]] = ContextVar("sticky_lifted", default=_NONE_LIFTED)
"""The events whose visibility was lifted in the current request, each with its room."""


def lift_history_visibility(hs: HomeServer, live_among: LiveAmong) -> None:
    """Wrap Synapse's filter for clients.

    Args:
        live_among: that of the index.
    """
    require(
        visibility, _FUNCTION, "storage", "user_id", "events", "is_peeking", "always_include_ids"
    )
    store: Any = hs.get_datastores().main
    require(store, "get_rooms_for_user")
    require(store, "are_users_erased")
    original = synapses(visibility, _FUNCTION)

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
        async def visible(events: list[EventBase], include: frozenset[str]) -> list[ClientEvent]:
            # What Synapse decides by is the state at the events, lifted or not.
            token = _lifted.set(_NONE_LIFTED)
            try:
                result: Any = await original(
                    storage, user_id, events, is_peeking, include, *args, **kwargs
                )
            finally:
                _lifted.reset(token)
            return list(result)

        result = await visible(events, always_include_ids)
        with shielded("Cannot lift the history visibility of sticky events for a user"):
            hidden = _hidden_sticky(events, result, live_among)
            may_see = await _may_see(user_id, hidden) if hidden else []
            if may_see:
                include = frozenset(event.event_id for event in may_see)
                lifted = await visible(may_see, include)
                result = _merged(events, result, map(without_replaced, lifted))
                _lifted.set({**_lifted.get(), **{e.event_id: e.room_id for e in may_see}})
        return result

    async def _may_see(user_id: str, events: list[EventBase]) -> list[EventBase]:
        # Current membership counts, and the membership at the time does not.
        # Erased senders are left to Synapse's rules and its pruning, which being
        # included regardless would skip. Outliers it cannot handle.
        joined_rooms = await store.get_rooms_for_user(user_id)
        # Some requests read redacted events as they were: those are not sticky any more.
        stored = await store.get_events_as_list([event.event_id for event in events])
        sticky_ids = {event.event_id for event in stored if sticky_duration_ms(event)}
        erased = await store.are_users_erased({e.sender for e in events})
        return [
            e
            for e in events
            if e.room_id in joined_rooms
            and e.event_id in sticky_ids
            and not erased.get(e.sender)
            and not e.internal_metadata.is_outlier()
        ]

    _replace_everywhere(hs, _FUNCTION, filter_and_transform_events_for_client)


def hide_state_beside_lifted_events(hs: HomeServer) -> None:
    """Keep Synapse from showing hidden state along with events whose visibility was lifted.

    Where it asks for the state at such an event, it gets the room's current state. And what
    is shown of a room's state in the same answer does not say what it replaced.
    """
    state: Any = hs.get_storage_controllers().state
    for name, name_of_current in (
        ("get_state_for_events", "get_current_state"),
        ("get_state_ids_for_events", "get_current_state_ids"),
    ):
        require(state, name_of_current, "room_id", "state_filter")
        reads = _current_if_lifted(getattr(state, name), getattr(state, name_of_current))
        wrap(state, name, reads, "event_ids", "state_filter")
    get_messages = _without_replaced_state(
        synapses(pagination.PaginationHandler, "get_messages"), "state"
    )
    require(attr.fields(pagination.GetMessagesResult), "state")
    wrap_for(hs, pagination.PaginationHandler, "get_messages", get_messages)
    get_room = _without_replaced_state(
        synapses(sliding_sync.SlidingSyncHandler, "get_room_sync_data"), "required_state"
    )
    require(attr.fields(SlidingSyncResult.RoomResult), "required_state")
    wrap_for(
        hs,
        sliding_sync.SlidingSyncHandler,
        "get_room_sync_data",
        get_room,
        homeserver_of=attrgetter("store.hs"),
    )
    current_state = state.get_current_state

    async def get_current_state(room_id: str, *args: Any, **kwargs: Any) -> Any:
        found = await current_state(room_id, *args, **kwargs)
        return _state_without_replaced(found) if room_id in _lifted.get().values() else found

    wrap(state, "get_current_state", get_current_state, "room_id")


def _current_if_lifted(
    state_at: Callable[..., Awaitable[dict[str, Any]]], current_state: Callable[..., Awaitable[Any]]
) -> Callable[..., Awaitable[dict[str, Any]]]:
    """Read the state at events as Synapse does, except for lifted ones."""

    async def state(
        event_ids: Collection[str], state_filter: Any = None, *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        lifted = _lifted.get()
        if not lifted:
            return await state_at(event_ids, state_filter, *args, **kwargs)
        others = [event_id for event_id in event_ids if event_id not in lifted]
        result = await state_at(others, state_filter, *args, **kwargs) if others else {}
        for event_id in set(event_ids).difference(others):
            result[event_id] = await current_state(lifted[event_id], state_filter, *args, **kwargs)
        return {event_id: _state_without_replaced(found) for event_id, found in result.items()}

    return state


def _without_replaced_state(
    original: Callable[..., Awaitable[Any]], field: str
) -> Callable[..., Awaitable[Any]]:
    """Let a method of Synapse's return its state events without what they replaced.

    For what reads the events later than their IDs.
    """

    async def method(*args: Any, **kwargs: Any) -> Any:
        # Rooms of a response share a context: what was lifted in others does not matter.
        token = _lifted.set(_NONE_LIFTED)
        try:
            result = await original(*args, **kwargs)
            is_lifted = bool(_lifted.get())
        finally:
            _lifted.reset(token)
        if not is_lifted or not (events := getattr(result, field)):
            return result
        return attr.evolve(result, **{field: [without_replaced(event) for event in events]})

    return method


def _state_without_replaced(state: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return a room's state, be it events or their IDs, without what the events replaced."""
    return {
        key: without_replaced(event) if isinstance(event, EventBase) else event
        for key, event in state.items()
    }


def lift_history_visibility_for_servers(
    hs: HomeServer, federation: Federation, live_among: LiveAmong
) -> None:
    """Wrap Synapse's filter of events that other servers ask for.

    Args:
        live_among: that of the index.
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
    original = synapses(visibility, _SERVER_FUNCTION)

    @functools.wraps(original)
    async def filter_events_for_server(
        storage: StorageControllers,
        target_server_name: str,
        local_server_name: str,
        events: Sequence[EventBase],
        **kwargs: Any,
    ) -> list[EventBase]:
        result: list[EventBase] = await original(
            storage, target_server_name, local_server_name, events, **kwargs
        )
        with shielded("Cannot lift the history visibility of sticky events for a server"):
            # What is hidden is pruned by now, so not sticky any more, or left out.
            in_full = [event for event in result if sticky_duration_ms(event)]
            hidden = _hidden_sticky(events, in_full, live_among)
            if hidden:
                lifted = await _server_may_see(
                    storage, target_server_name, local_server_name, hidden
                )
                result = _merged(events, result, map(without_replaced, lifted))
        return result

    async def _server_may_see(
        storage: Any,
        server_name: str,
        local_server_name: str,
        events: list[EventBase],
    ) -> list[EventBase]:
        # Erased senders are left to Synapse. Of a room with partial state it does not
        # know for sure who is in it, so it shows nobody there what others have sent.
        erased = await storage.main.are_users_erased({e.sender for e in events})
        may_see = []
        for event in events:
            if erased.get(event.sender):
                continue
            if get_domain_from_id(
                event.sender
            ) != local_server_name and await storage.main.is_partial_state_room(event.room_id):
                continue
            if server_name in await federation.servers_in_room(event.room_id):
                may_see.append(event)
        return may_see

    _replace_everywhere(hs, _SERVER_FUNCTION, filter_events_for_server)


def _hidden_sticky(
    events: Sequence[EventBase],
    visible: Sequence[ClientEvent],
    live_among: LiveAmong,
) -> list[EventBase]:
    """Return the sticky events that are not among the visible ones."""
    if len(visible) == len(events):
        return []
    sticky_ids = live_among(event.event_id for event in events)
    if not sticky_ids:
        return []
    visible_ids = {event_of(client_event).event_id for client_event in visible}
    # Reading the duration costs more than all else here, and nearly always none is hidden.
    hidden_ids = sticky_ids - visible_ids
    return [e for e in events if e.event_id in hidden_ids and sticky_duration_ms(e)]


def _merged(
    events: Sequence[EventBase], visible: Sequence[ClientEvent], lifted: Iterator[ClientEvent]
) -> list[ClientEvent]:
    """Return the visible and the lifted ones in the order of the events."""
    shown = {event_of(client_event).event_id: client_event for client_event in visible}
    shown.update((event_of(client_event).event_id, client_event) for client_event in lifted)
    return [shown[event.event_id] for event in events if event.event_id in shown]


def _replace_everywhere(hs: HomeServer, name: str, replacement: Callable[..., Any]) -> None:
    """Put a function where most of Synapse's modules have imported it by name.

    Its first argument is the homeserver's storage.
    """
    original = synapses(visibility, name)
    choose = choosing(hs, original, replacement, attrgetter("main.hs"))
    for module_name, module in list(sys.modules.items()):
        if (
            module_name.startswith("synapse.")
            and module_name not in _UNLIFTED_MODULES
            and synapses(module, name) is original
        ):
            setattr(module, name, choose)


def filter_bundled_aggregations(hs: HomeServer) -> None:
    """Leave out what is bundled with lifted events and the user may not see.

    All others are shown as Synapse shows them: to users who may see them anyway, and to
    readers whom it exempts from visibility, such as admins.
    """
    relations = hs.get_relations_handler()
    require(relations, "get_bundled_aggregations", "user_id")
    store: Any = hs.get_datastores().main
    storage = hs.get_storage_controllers()
    original = relations.get_bundled_aggregations

    async def _visible(bundled: dict[str, Any], user_id: str) -> dict[str, Any]:
        visible_ids: set[str] = set()
        with shielded("Cannot tell what may be bundled with sticky events: it is left out"):
            event_ids = {e for b in bundled.values() for e in _bundled_event_ids(b)}
            visible = await visibility.filter_and_transform_events_for_client(
                storage, user_id, await store.get_events_as_list(event_ids)
            )
            # No state events: what is bundled still says what they replaced.
            visible_ids = {e.event_id for e in map(event_of, visible) if not e.is_state()}
        return {event_id: _only(b, visible_ids) for event_id, b in bundled.items()}

    async def get_bundled_aggregations(events: Any, user_id: str) -> dict[str, Any]:
        bundled: dict[str, Any] = await original(events, user_id)
        done: set[str] = set()
        # The newest replies that are bundled may be lifted too, and have more bundled with them.
        while lifted := (bundled.keys() & _lifted.get().keys()) - done:
            found = {event_id: bundled[event_id] for event_id in lifted}
            bundled.update(await _visible(found, user_id))
            done |= lifted
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
