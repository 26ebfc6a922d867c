# SPDX-License-Identifier: AGPL-3.0-or-later
"""``/sync``: adds the section of sticky events to joined rooms.

The handler is a subclass, put where the homeserver finds the class. It works
after Synapse's part: only then is known what the timelines show.
"""

import inspect
from collections.abc import Mapping, Sequence, Set
from functools import partial
from typing import Any

import attr
from synapse import server as synapse_server
from synapse.api import filtering
from synapse.handlers import sync
from synapse.rest.client import sync as sync_rest
from synapse.server import HomeServer
from synapse.types import JsonDict

from synapse_sticky.clients.delivery import Delivery
from synapse_sticky.clients.since import MAX_NAMES_IN_ADDRESS, Since
from synapse_sticky.hooks.classes import use_instead
from synapse_sticky.hooks.token import account_data_position, since_of, timelines_up_to, with_since
from synapse_sticky.protocol import SYNC_SECTION
from synapse_sticky.seams.checks import require
from synapse_sticky.seams.events import ClientEvent, EventSource


@attr.s(slots=True, auto_attribs=True, kw_only=True)
class StickyJoinedSyncResult(sync.JoinedSyncResult):
    """A joined room in a ``/sync`` response, with its section of sticky events."""

    section: Sequence[ClientEvent] = ()

    @classmethod
    def create(
        cls, room: sync.JoinedSyncResult, section: Sequence[ClientEvent]
    ) -> "StickyJoinedSyncResult":
        """Synapse's entry with a section."""
        fields = {field.name: getattr(room, field.name) for field in attr.fields(type(room))}
        return cls(**fields, section=section)

    def __bool__(self) -> bool:
        return bool(self.section) or super().__bool__()


def check() -> None:
    """Refuses to start if Synapse's ``/sync`` has changed."""
    require(sync.SyncHandler, "_generate_sync_entry_for_rooms", "sync_result_builder")
    require(
        sync.SyncHandler,
        "_generate_room_entry",
        "sync_result_builder",
        "room_builder",
        "ephemeral",
        "tags",
        "account_data",
        "always_include",
    )
    for name in ("since_token", "now_token", "joined", "joined_room_ids", "sync_config"):
        require(attr.fields(sync.SyncResultBuilder), name)
    for name in ("room_id", "timeline", "unread_notifications"):
        require(attr.fields(sync.JoinedSyncResult), name)
    require(filtering.FilterCollection, "blocks_all_rooms")
    require(filtering.Filter, "filter_rooms", "room_ids")
    require(sync_rest.SyncRestServlet, "encode_room", "room", "serialize_options")


def install(delivery: Delivery, source: EventSource, limit: int) -> None:
    """Makes the homeserver build a ``/sync`` that has sections.

    Args:
        limit: how many sticky events one response carries at most.
    """
    handler = partial(StickySyncHandler, delivery=delivery, limit=limit)
    use_instead(synapse_server, "SyncHandler", handler)
    use_instead(sync_rest, "SyncRestServlet", partial(StickySyncServlet, source=source))


class StickySyncHandler(sync.SyncHandler):
    """Synapse's handler, which then adds the sections."""

    def __init__(self, hs: HomeServer, *, delivery: Delivery, limit: int) -> None:
        super().__init__(hs)
        self._delivery = delivery
        self._sticky_limit = limit

    async def _generate_sync_entry_for_rooms(
        self, sync_result_builder: sync.SyncResultBuilder
    ) -> tuple[Set[str], Set[str]]:
        changes = await super()._generate_sync_entry_for_rooms(sync_result_builder)
        await self._add_sections(sync_result_builder, newly_joined=changes[0])
        return changes

    async def _add_sections(self, builder: sync.SyncResultBuilder, newly_joined: Set[str]) -> None:
        shown = [event for room in builder.joined for event in room.timeline.events]
        await self._delivery.wait_until_noticed(shown)
        since = await self._delivery.resolve_since(since_of(builder.since_token))
        sections = await self._delivery.sections(
            builder.sync_config.user.to_string(),
            _rooms_of_interest(builder),
            since,
            shown=shown,
            timeline_reaches=timelines_up_to(builder.now_token),
            account_data_position=account_data_position(builder.since_token),
            limit=self._sticky_limit,
            from_start=newly_joined,
        )
        await self._put_into_rooms(builder, sections.by_room)
        # Never the position from when the sync began, which others may have
        # moved on since then.
        since = Since.create(sections.position, sections.names, most=MAX_NAMES_IN_ADDRESS)
        builder.now_token = with_since(builder.now_token, since)

    async def _put_into_rooms(
        self, builder: sync.SyncResultBuilder, by_room: Mapping[str, Sequence[ClientEvent]]
    ) -> None:
        if not by_room:
            return
        present = {room.room_id for room in builder.joined}
        for room_id in by_room:
            if room_id not in present:
                await self._add_room(builder, room_id)
        builder.joined[:] = [
            StickyJoinedSyncResult.create(room, by_room[room.room_id])
            if room.room_id in by_room
            else room
            for room in builder.joined
        ]

    async def _add_room(self, builder: sync.SyncResultBuilder, room_id: str) -> None:
        """Lets Synapse make the entry of a room in which nothing else is new."""
        room_builder = sync.RoomSyncResultBuilder(
            room_id=room_id,
            rtype="joined",
            events=[],
            newly_joined=False,
            full_state=False,
            since_token=builder.since_token,
            upto_token=builder.since_token or builder.now_token,
            end_token=builder.now_token,
        )
        # From 1.150 there is one more parameter, for Synapse's own sticky events.
        own: dict[str, Any] = {"sticky_event_ids": []} if _TAKES_STICKY_EVENT_IDS else {}
        await self._generate_room_entry(
            builder,
            room_builder,
            ephemeral=[],
            tags=None,
            account_data={},
            always_include=True,
            **own,
        )


_TAKES_STICKY_EVENT_IDS = (
    "sticky_event_ids" in inspect.signature(sync.SyncHandler._generate_room_entry).parameters
)


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

    def __init__(self, hs: HomeServer, *, source: EventSource) -> None:
        super().__init__(hs)
        self._sticky_events = source

    async def encode_room(
        self, sync_config: Any, room: Any, time_now: int, joined: bool, serialize_options: Any
    ) -> JsonDict:
        result = await super().encode_room(sync_config, room, time_now, joined, serialize_options)
        if isinstance(room, StickyJoinedSyncResult) and room.section:
            events = await self._sticky_events.serialize(room.section, serialize_options)
            result[SYNC_SECTION] = {"events": events}
        return result
