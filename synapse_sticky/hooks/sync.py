# SPDX-License-Identifier: AGPL-3.0-or-later
"""``/sync``: adds the section of sticky events to joined rooms.

The handler is a subclass, put where the homeserver finds the class. It works
after Synapse's part: only then is known what the timelines show. If our part
fails, the response is what it is without us, and the client's position stays.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from functools import partial
from typing import Any

import attr
from synapse import server as synapse_server
from synapse.api import filtering
from synapse.api.constants import EventTypes
from synapse.events import EventBase
from synapse.handlers import sync
from synapse.rest.client import sync as sync_rest
from synapse.server import HomeServer
from synapse.storage.controllers.state import StateStorageController
from synapse.types import JsonDict, StateMap, StreamToken
from synapse.types.state import StateFilter

from synapse_sticky.clients.delivery import Delivery
from synapse_sticky.clients.since import MAX_NAMES_IN_ADDRESS, Since
from synapse_sticky.deliverable.index import LiveAmong
from synapse_sticky.hooks.classes import use_instead
from synapse_sticky.hooks.guard import Retries
from synapse_sticky.hooks.token import account_data_position, since_of, timelines_up_to, with_since
from synapse_sticky.protocol import SYNC_SECTION
from synapse_sticky.seams.checks import misfit, require
from synapse_sticky.seams.events import ClientEvent, EventSource, event_of, without_replaced
from synapse_sticky.seams.failures import shielded
from synapse_sticky.seams.metrics import SENT_TO_CLIENTS, Metrics

_WITHOUT_SECTION = "Cannot add sticky events to a response of /sync: a later one has them"


@attr.s(slots=True, auto_attribs=True, kw_only=True)
class StickyJoinedSyncResult(sync.JoinedSyncResult):
    """A joined room in a ``/sync`` response, with its section of sticky events.

    Attributes:
        section: the sticky events.
        has_news: whether Synapse has news of the room.
        unread: what the client has read up to if the section cannot be written.
    """

    section: Sequence[ClientEvent]
    has_news: bool
    unread: Since

    @classmethod
    def create(
        cls,
        room: sync.JoinedSyncResult,
        section: Sequence[ClientEvent],
        members: StateMap[EventBase],
        unread: Since,
    ) -> "StickyJoinedSyncResult":
        """Return Synapse's entry with a section, and with the memberships of its senders."""
        fields = {field.name: getattr(room, field.name) for field in attr.fields(type(room))}
        fields["state"] = {**room.state, **members}
        return cls(**fields, section=section, has_news=bool(room), unread=unread)

    def __bool__(self) -> bool:
        return bool(self.section) or super().__bool__()

    def lazy_loading_members_user_ids(self) -> set[str]:
        """Return whom Synapse sends the profiles of, from 1.164 on."""
        in_timeline: set[str] = super().lazy_loading_members_user_ids()  # type: ignore[misc]
        return in_timeline | _senders(self.section)


_EMPTY: dict[str, Callable[[], Any]] = {
    "state": dict,
    "ephemeral": list,
    "account_data": list,
    "sticky": list,
    "unread_notifications": dict,
    "unread_thread_notifications": dict,
    "summary": dict,
    "unread_count": int,
}
"""What Synapse has in the entry of a room in which nothing is new. Each release has its own."""


def _empty_entry(room_id: str, timeline: sync.TimelineBatch) -> sync.JoinedSyncResult:
    """Return the entry of a room in which nothing is new."""
    names = [field.name for field in attr.fields(sync.JoinedSyncResult)]
    fields = {name: _EMPTY[name]() for name in names if name in _EMPTY}
    return sync.JoinedSyncResult(room_id=room_id, timeline=timeline, **fields)


def check() -> None:
    """Refuse to start if Synapse's ``/sync`` has changed."""
    handler = sync.SyncHandler
    require(handler, "_generate_sync_entry_for_rooms", "sync_result_builder")
    require(handler, "unread_notifs_for_room_id", "room_id", "sync_config")
    require(handler, "get_lazy_loaded_members_cache", "cache_key")
    require(StateStorageController, "get_current_state_ids", "state_filter", "await_full_state")
    for name in ("since_token", "now_token", "joined", "joined_room_ids", "sync_config"):
        require(attr.fields(sync.SyncResultBuilder), name)
    for name in ("user", "device_id", "use_state_after", "filter_collection"):
        require(attr.fields(sync.SyncConfig), name)
    for name in ("prev_batch", "events", "limited"):
        require(attr.fields(sync.TimelineBatch), name)
    for name in ("room_id", "timeline", "state", "unread_notifications", "unread_count"):
        require(attr.fields(sync.JoinedSyncResult), name)
    for field in attr.fields(sync.JoinedSyncResult):
        if field.name not in {"room_id", "timeline", *_EMPTY}:
            raise misfit(f"{sync.JoinedSyncResult.__name__}.{field.name} is not known")
    filters = filtering.FilterCollection
    for name in ("lazy_load_members", "include_redundant_members", "unread_thread_notifications"):
        require(filters, name)
    require(filters, "filter_room_state", "events")
    require(filters, "blocks_all_rooms")
    require(filtering.Filter, "filter_rooms", "room_ids")
    _Memory.check()
    require(sync_rest.SyncRestServlet, "encode_room", "room", "serialize_options")
    require(sync_rest.SyncRestServlet, "encode_response", "sync_result")


def install(
    hs: HomeServer,
    delivery: Delivery,
    source: EventSource,
    retries: Retries,
    metrics: Metrics,
    live_among: LiveAmong,
    limit: int,
) -> None:
    """Make the homeserver build a ``/sync`` that has sections.

    Args:
        live_among: that of the index.
        limit: how many sticky events one response carries at most.
    """
    handler = partial(StickySyncHandler, delivery=delivery, retries=retries, limit=limit)
    use_instead(hs, synapse_server, "SyncHandler", handler)
    servlet = partial(
        StickySyncServlet, source=source, retries=retries, metrics=metrics, live_among=live_among
    )
    use_instead(hs, sync_rest, "SyncRestServlet", servlet)


class StickySyncHandler(sync.SyncHandler):
    """Synapse's handler, which then adds the sections."""

    def __init__(self, hs: HomeServer, *, delivery: Delivery, retries: Retries, limit: int) -> None:
        super().__init__(hs)
        self._delivery = delivery
        self._retries = retries
        self._sticky_limit = limit

    async def _generate_sync_entry_for_rooms(
        self, sync_result_builder: sync.SyncResultBuilder
    ) -> tuple[Set[str], Set[str]]:
        builder = sync_result_builder
        changes = await super()._generate_sync_entry_for_rooms(builder)
        newly_joined = changes[0]
        with shielded(_WITHOUT_SECTION):
            await self._add_sections(builder, newly_joined)
            return changes
        builder.now_token = with_since(builder.now_token, _unread(builder, newly_joined))
        self._retries.wake_later(builder.sync_config.user.to_string())
        return changes

    async def _add_sections(self, builder: sync.SyncResultBuilder, newly_joined: Set[str]) -> None:
        user_id, since = builder.sync_config.user.to_string(), since_of(builder.since_token)
        account_data_at = account_data_position(builder.since_token)
        has_news = builder.joined or newly_joined
        if not has_news and self._delivery.has_nothing_for(user_id, since, account_data_at):
            builder.now_token = with_since(builder.now_token, since)
            return
        shown = [event for room in builder.joined for event in room.timeline.events]
        rooms, timeline_reaches = _rooms_of_interest(builder), timelines_up_to(builder.now_token)
        since = await self._delivery.resolve_since(since)
        await self._delivery.wait_until_noticed(
            rooms,
            since,
            shown=shown,
            timeline_reaches=timeline_reaches,
            most=MAX_NAMES_IN_ADDRESS,
        )
        sections = await self._delivery.sections(
            user_id,
            rooms,
            since,
            shown=shown,
            timeline_reaches=timeline_reaches,
            since_reaches=timelines_up_to(builder.since_token) if builder.since_token else None,
            account_data_position=account_data_at,
            limit=self._sticky_limit,
            from_start=newly_joined,
        )
        if sections.by_room:
            await self._put_into_rooms(builder, sections.by_room, newly_joined)
        # Never the position from when the sync began, which others may have
        # moved on since then.
        since = Since.create(
            sections.position, sections.names, MAX_NAMES_IN_ADDRESS, sections.undecided
        )
        builder.now_token = with_since(builder.now_token, since)

    async def _put_into_rooms(
        self,
        builder: sync.SyncResultBuilder,
        by_room: Mapping[str, Sequence[ClientEvent]],
        newly_joined: Set[str],
    ) -> None:
        unread = _unread(builder, newly_joined)
        is_lazy = builder.sync_config.filter_collection.lazy_load_members()
        memory = _Memory.of(self, builder) if is_lazy else None
        entries = {room.room_id: room for room in builder.joined}
        added: list[EventBase] = []
        for room_id, section in by_room.items():
            # An entry that is there may be empty, and not true.
            room = entries.get(room_id)
            if room is None:
                is_new = builder.since_token is None or room_id in newly_joined
                room = await self._entry_for_section(builder, room_id, is_new)
            members = await self._members_to_add(builder, room, section, memory)
            entries[room_id] = StickyJoinedSyncResult.create(room, section, members, unread)
            added += members.values()
        # Nothing can fail from here on.
        builder.joined[:] = entries.values()
        if memory is not None and _moves_timelines(builder):
            memory.mark(added)

    async def _entry_for_section(
        self, builder: sync.SyncResultBuilder, room_id: str, is_new: bool
    ) -> sync.JoinedSyncResult:
        """Return the entry of a room of which Synapse has nothing to say.

        Not told of a gap, clients keep the timeline that they have. One that has none yet
        has to know that there is something before.
        """
        timeline = sync.TimelineBatch(prev_batch=builder.now_token, events=[], limited=is_new)
        room = _empty_entry(room_id, timeline)
        notifs = await self.unread_notifs_for_room_id(room_id, builder.sync_config)
        counts = [notifs.main_timeline]
        if builder.sync_config.filter_collection.unread_thread_notifications():
            room.unread_thread_notifications = {
                thread_id: _notification_counts([count])
                for thread_id, count in notifs.threads.items()
                if thread_id is not None
            }
        else:
            counts += notifs.threads.values()
        room.unread_notifications = _notification_counts(counts)
        room.unread_count = sum(count.unread_count for count in counts)
        return room

    async def _members_to_add(
        self,
        builder: sync.SyncResultBuilder,
        room: sync.JoinedSyncResult,
        section: Sequence[ClientEvent],
        memory: "_Memory | None",
    ) -> StateMap[EventBase]:
        """Return the memberships of a section's senders that the client lacks.

        MSC4354 wants what clients get that load members lazily for a timeline's senders.
        """
        config = builder.sync_config
        if memory is None:
            return {}
        told = {key[1] for key in room.state if key[0] == EventTypes.Member}
        if not config.use_state_after:
            # Those are applied after the state.
            told.update(
                event.state_key
                for event in map(event_of, room.timeline.events)
                if event.type == EventTypes.Member and event.is_state()
            )
        unknown = _senders(section) - told
        if not unknown:
            return {}
        event_ids = await self._state_storage_controller.get_current_state_ids(
            room.room_id,
            StateFilter.from_types((EventTypes.Member, user_id) for user_id in unknown),
            await_full_state=False,
        )
        missing = [
            event_id for key, event_id in event_ids.items() if not memory.has(key[1], event_id)
        ]
        events = await self.store.get_events(missing)
        wanted = await config.filter_collection.filter_room_state(events.values())
        # An event of the section may be all that this user may see of the sender's past.
        return {(event.type, event.state_key): without_replaced(event) for event in wanted}


def _moves_timelines(builder: sync.SyncResultBuilder) -> bool:
    """Whether Synapse can tell this response from the one before it.

    Its memory of members forgets what a lost response had, and knows that one by the
    position of timelines. So what comes without any move of theirs must not be remembered.
    """
    since_token = builder.since_token
    return since_token is None or not builder.now_token.room_key.is_before_or_eq(
        since_token.room_key
    )


def _unread(builder: sync.SyncResultBuilder, newly_joined: Set[str]) -> Since:
    """Return what a client has read whose response lacks our part.

    The next response does not say any more which rooms were joined before this one.
    """
    return since_of(builder.since_token).with_names(newly_joined)


def _notification_counts(counts: Sequence[Any]) -> JsonDict:
    return {
        "notification_count": sum(count.notify_count for count in counts),
        "highlight_count": sum(count.highlight_count for count in counts),
    }


def _senders(section: Iterable[ClientEvent]) -> set[str]:
    return {event_of(client_event).sender for client_event in section}


class _Memory:
    """Which memberships a device has been sent, so that they come once: Synapse's own."""

    def __init__(self, cache: Any, next_batch: StreamToken, is_redundant: bool) -> None:
        self._cache = cache
        self._next_batch = next_batch
        self._is_redundant = is_redundant

    @staticmethod
    def check() -> None:
        """Refuse to start if it has changed."""
        if _MEMORY_KNOWS_RESPONSES:
            require(sync.LazyLoadedMembersCache, "was_sent", "user_id", "event_id")
            require(sync.LazyLoadedMembersCache, "mark_sent", "user_id", "event_id", "next_batch")

    @classmethod
    def of(cls, handler: sync.SyncHandler, builder: sync.SyncResultBuilder) -> "_Memory":
        """Return that of the device that a response is for."""
        config = builder.sync_config
        return cls(
            handler.get_lazy_loaded_members_cache((config.user.to_string(), config.device_id)),
            builder.now_token,
            config.filter_collection.include_redundant_members(),
        )

    def has(self, user_id: str, event_id: str) -> bool:
        """Whether the device needs this membership no more."""
        if self._is_redundant:
            return False
        if _MEMORY_KNOWS_RESPONSES:
            return bool(self._cache.was_sent(user_id, event_id))
        return bool(self._cache.get(user_id) == event_id)

    def mark(self, members: Iterable[EventBase]) -> None:
        """Note that the device is sent these memberships."""
        if self._is_redundant:
            return
        for member in members:
            if _MEMORY_KNOWS_RESPONSES:
                self._cache.mark_sent(member.state_key, member.event_id, self._next_batch)
            else:
                self._cache.set(member.state_key, member.event_id)


# Before that it is a plain cache.
_MEMORY_KNOWS_RESPONSES = hasattr(sync, "LazyLoadedMembersCache")


def _rooms_of_interest(builder: sync.SyncResultBuilder) -> Set[str]:
    """The joined rooms that the client's filter lets through.

    Only ``rooms`` and ``not_rooms`` of the room filter count (MSC4354,
    "Interaction with RoomFilter").
    """
    filters = builder.sync_config.filter_collection
    if filters.blocks_all_rooms():
        return frozenset()
    room_filter = filters._room_filter
    if room_filter.rooms is None and not room_filter.not_rooms:
        return builder.joined_room_ids
    return room_filter.filter_rooms(builder.joined_room_ids)


class StickySyncServlet(sync_rest.SyncRestServlet):
    """``/sync`` that writes the sections."""

    def __init__(
        self,
        hs: HomeServer,
        *,
        source: EventSource,
        retries: Retries,
        metrics: Metrics,
        live_among: LiveAmong,
    ) -> None:
        super().__init__(hs)
        self._sticky_events = source
        self._retries = retries
        self._sticky_metrics = metrics
        self._live_among = live_among

    async def encode_room(
        self, sync_config: Any, room: Any, time_now: int, joined: bool, serialize_options: Any
    ) -> JsonDict:
        result = await super().encode_room(sync_config, room, time_now, joined, serialize_options)
        if isinstance(room, StickyJoinedSyncResult):
            with shielded(_WITHOUT_SECTION):
                # Synapse remembers responses for minutes, for clients that ask once more.
                live = self._live_among(event_of(e).event_id for e in room.section)
                section = [e for e in room.section if event_of(e).event_id in live]
                events = await self._sticky_events.serialize(section, serialize_options)
                result[SYNC_SECTION] = {"events": events}
        return result

    async def encode_response(
        self, time_now: int, sync_config: Any, sync_result: Any, *args: Any, **kwargs: Any
    ) -> JsonDict:
        response = await super().encode_response(
            time_now, sync_config, sync_result, *args, **kwargs
        )
        rooms = [room for room in sync_result.joined if isinstance(room, StickyJoinedSyncResult)]
        if not rooms:
            return response
        entries = [response["rooms"]["join"][room.room_id] for room in rooms]
        if all(SYNC_SECTION in entry for entry in entries):
            count = sum(len(entry[SYNC_SECTION]["events"]) for entry in entries)
            self._sticky_metrics.count(SENT_TO_CLIENTS, count, endpoint="sync")
            return response
        for entry in entries:
            entry.pop(SYNC_SECTION, None)
        token = with_since(sync_result.next_batch, rooms[0].unread)
        response["next_batch"] = await token.to_string(self.store)
        rest = [room for room in sync_result.joined if getattr(room, "has_news", True)]
        if not attr.evolve(sync_result, joined=rest):
            # The client did not wait for news, and comes back at once.
            await self._retries.pause()
        return response
