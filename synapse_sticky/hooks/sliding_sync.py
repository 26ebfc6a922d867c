# SPDX-License-Identifier: AGPL-3.0-or-later
"""Sliding Sync: the extension of MSC4480.

Synapse's servlet does not know the extension before 1.156 and from then on
checks it by its own rules. So ours takes the extension out of the request
before Synapse reads it, and puts the answer into the response; in between it
travels in a context variable, from the servlet to the handler.

If our part fails, the response is what it is without us, and the client goes on
from the same position.
"""

import io
import json
from collections.abc import Iterator, Mapping, Set
from contextvars import ContextVar
from functools import partial
from typing import Any

import attr
from synapse import server as synapse_server
from synapse.api.constants import Membership
from synapse.api.errors import Codes, SynapseError
from synapse.handlers import sliding_sync
from synapse.handlers.sliding_sync import room_lists
from synapse.http.site import SynapseRequest
from synapse.rest.client import sync as sync_rest
from synapse.server import HomeServer
from synapse.types import JsonDict
from synapse.types.handlers.sliding_sync import SlidingSyncResult

from synapse_sticky.clients.delivery import Delivery
from synapse_sticky.clients.since import MAX_NAMES, Since
from synapse_sticky.hooks.classes import use_instead
from synapse_sticky.hooks.guard import Retries
from synapse_sticky.hooks.token import account_data_position, timelines_up_to, with_since
from synapse_sticky.protocol import MAX_EVENTS, SLIDING_SYNC_EXTENSION
from synapse_sticky.seams.checks import require
from synapse_sticky.seams.events import EventSource
from synapse_sticky.seams.failures import shielded
from synapse_sticky.seams.metrics import SENT_TO_CLIENTS, Metrics
from synapse_sticky.seams.own import OwnTokens

_WITHOUT_ANSWER = "Cannot add sticky events to a response of Sliding Sync: a later one has them"


@attr.s(slots=True, auto_attribs=True)
class StickyRequest:
    """The extension of one request.

    Attributes:
        since: how far the client has read; None if it said nothing.
        limit: at most how many events the client wants.
        interested_rooms: the rooms that match the request, and the user's memberships.
            The handler fills them in.
    """

    since: Since | None
    limit: int
    interested_rooms: room_lists.SlidingSyncInterestedRooms | None = None

    @classmethod
    def parse(cls, extension: object) -> "StickyRequest | None":
        """Read the extension; return None if it is not enabled.

        Raises:
            SynapseError: 400, if the client wrote anything that it must not.
        """
        if not isinstance(extension, Mapping):
            raise _bad_parameter("must be an object")
        enabled = extension.get("enabled", False)
        if not isinstance(enabled, bool):
            raise _bad_parameter("enabled must be true or false")
        limit = extension.get("limit", MAX_EVENTS)
        if type(limit) is not int or limit < 1:
            raise _bad_parameter("limit must be a whole number, at least 1")
        since = extension.get("since")
        try:
            parsed = None if since is None else Since.parse(since)
        except ValueError as error:
            raise SynapseError(400, str(error), Codes.INVALID_PARAM) from None
        return cls(parsed, min(limit, MAX_EVENTS)) if enabled else None


@attr.s(slots=True, frozen=True, auto_attribs=True, kw_only=True)
class StickyExtensions(SlidingSyncResult.Extensions):
    """Synapse's extensions and ours in one response.

    Attributes:
        sticky: the answer of ours, as the client gets it.
    """

    sticky: JsonDict

    @classmethod
    def create(
        cls, extensions: SlidingSyncResult.Extensions, sticky: JsonDict
    ) -> "StickyExtensions":
        """Return Synapse's extensions with ours."""
        fields = {f.name: getattr(extensions, f.name) for f in attr.fields(type(extensions))}
        return cls(**fields, sticky=sticky)

    def __bool__(self) -> bool:
        # A mere change of position is no reason to end a long-poll.
        return "rooms" in self.sticky or super().__bool__()


_current_request: ContextVar[StickyRequest | None] = ContextVar("sticky_request", default=None)


def check() -> None:
    """Refuse to start if Synapse's Sliding Sync has changed."""
    require(
        sliding_sync.SlidingSyncHandler,
        "wait_for_sync_for_user",
        "requester",
        "sync_config",
        "from_token",
        "timeout_ms",
    )
    require(
        sliding_sync.SlidingSyncHandler,
        "current_sync_for_user",
        "sync_config",
        "to_token",
        "from_token",
    )
    require(room_lists.SlidingSyncRoomLists, "compute_interested_rooms", "sync_config")
    for name in ("all_rooms", "room_membership_for_user_map", "newly_joined_rooms"):
        require(attr.fields(room_lists.SlidingSyncInterestedRooms), name)
    for name in ("rooms", "extensions"):
        require(attr.fields(SlidingSyncResult), name)
    for name in ("initial", "timeline_events"):
        require(attr.fields(SlidingSyncResult.RoomResult), name)
    require(sync_rest.SlidingSyncRestServlet, "on_POST", "request")
    require(sync_rest.SlidingSyncRestServlet, "encode_response", "requester", "sliding_sync_result")


def install(
    hs: HomeServer, delivery: Delivery, source: EventSource, retries: Retries, metrics: Metrics
) -> None:
    """Makes the homeserver build a Sliding Sync that has the extension."""
    handler = partial(
        StickySlidingSyncHandler,
        delivery=delivery,
        source=source,
        retries=retries,
        metrics=metrics,
    )
    use_instead(hs, synapse_server, "SlidingSyncHandler", handler)
    use_instead(hs, sync_rest, "SlidingSyncRestServlet", StickySlidingSyncServlet)


class StickyRoomLists(room_lists.SlidingSyncRoomLists):
    """Remembers which rooms matched a request that has the extension."""

    async def compute_interested_rooms(
        self, *args: Any, **kwargs: Any
    ) -> room_lists.SlidingSyncInterestedRooms:
        interested_rooms = await super().compute_interested_rooms(*args, **kwargs)
        if (request := _current_request.get()) is not None:
            request.interested_rooms = interested_rooms
        return interested_rooms


class StickySlidingSyncHandler(sliding_sync.SlidingSyncHandler):
    """Synapse's handler, which then answers the extension."""

    def __init__(
        self,
        hs: HomeServer,
        *,
        delivery: Delivery,
        source: EventSource,
        retries: Retries,
        metrics: Metrics,
    ) -> None:
        super().__init__(hs)
        self.room_lists = StickyRoomLists(hs)
        self._delivery = delivery
        self._events = source
        self._retries = retries
        self._sticky_metrics = metrics
        self._own_tokens = OwnTokens(hs)

    async def wait_for_sync_for_user(
        self, requester: Any, sync_config: Any, from_token: Any = None, timeout_ms: int = 0
    ) -> tuple[SlidingSyncResult, bool]:
        request = _current_request.get()
        if request is not None and from_token is not None:
            # Early releases compute nothing before they wait if the token is the
            # current one. Only `since` says how far the client has read of ours.
            from_token = attr.evolve(
                from_token,
                stream_token=with_since(from_token.stream_token, request.since or Since(0)),
            )
        return await super().wait_for_sync_for_user(requester, sync_config, from_token, timeout_ms)

    async def current_sync_for_user(
        self, sync_config: Any, to_token: Any, from_token: Any = None
    ) -> SlidingSyncResult:
        result = await super().current_sync_for_user(sync_config, to_token, from_token)
        request = _current_request.get()
        if (
            request is None
            or request.interested_rooms is None
            # Without lists and subscriptions Synapse does not say which rooms there are:
            # to move on would lose the events of those that a later request matches.
            or not request.interested_rooms.room_membership_for_user_map
        ):
            return result
        with shielded(_WITHOUT_ANSWER):
            answer = await self._answer(
                sync_config.requester, request, request.interested_rooms, from_token, result
            )
            return _with_answer(result, answer)
        self._retries.wake_later(sync_config.user.to_string())
        with shielded(_WITHOUT_ANSWER):
            return _with_answer(result, await self._answer_without_events(request, result))
        return result

    async def _answer(
        self,
        requester: Any,
        request: StickyRequest,
        interested: room_lists.SlidingSyncInterestedRooms,
        from_token: Any,
        result: SlidingSyncResult,
    ) -> JsonDict:
        user_id = requester.user.to_string()
        shown = [event for room in result.rooms.values() for event in room.timeline_events or ()]
        rooms = MatchedJoinedRooms(interested)
        timeline_reaches = timelines_up_to(result.next_pos.stream_token)
        since = await self._delivery.resolve_since(request.since or Since(0))
        await self._delivery.wait_until_noticed(
            rooms, since, shown=shown, timeline_reaches=timeline_reaches, most=MAX_NAMES
        )
        await self._wait_for_joins(user_id, rooms, since)
        sections = await self._delivery.sections(
            user_id,
            rooms,
            since,
            shown=shown,
            timeline_reaches=timeline_reaches,
            since_reaches=timelines_up_to(from_token.stream_token) if from_token else None,
            account_data_position=account_data_position(from_token and from_token.stream_token),
            limit=request.limit,
            from_start=_initial_rooms(result),
            due_at_join=True,
        )
        unmatched = self._unmatched(user_id, interested, since, sections.position)
        next_batch = Since.create(
            sections.position, sections.names | unmatched, undecided=sections.undecided
        )
        is_moved = sections.by_room or next_batch != request.since
        answer = await self._position(next_batch if is_moved else None)
        if sections.by_room:
            config = await self._events.client_format(requester)
            answer["rooms"] = {
                room_id: {"events": await self._events.serialize(events, config)}
                for room_id, events in sections.by_room.items()
            }
            count = sum(map(len, sections.by_room.values()))
            self._sticky_metrics.count(SENT_TO_CLIENTS, count, endpoint="sliding_sync")
        return answer

    async def _answer_without_events(
        self, request: StickyRequest, result: SlidingSyncResult
    ) -> JsonDict:
        """Return the answer to a client that is to come again for its events.

        The next response does not say any more which rooms were new in this one.
        """
        if request.since is None:
            return {}
        unread = request.since.with_names(_initial_rooms(result), most=MAX_NAMES)
        return await self._position(unread if unread != request.since else None)

    async def _position(self, since: Since | None) -> JsonDict:
        """Return the part of an answer that says how far the client has read now."""
        if since is None:
            return {}
        return {"next_batch": since.to_text(await self._own_tokens.writer_id())}

    async def _wait_for_joins(
        self, user_id: str, rooms: "MatchedJoinedRooms", since: Since
    ) -> None:
        """Wait, for a bounded time, until recent joins are noticed.

        Otherwise the events of a room would be handed out now, and again when the join
        is noticed. Events later than the join need no wait.
        """
        waiting = self._delivery.rooms_due(user_id, rooms, since.position).union(
            self._delivery.rooms_with_events(rooms.newly_joined)
        )
        missing = {}
        for room_id in waiting:
            membership = rooms.membership(room_id)
            if (
                membership is not None
                and membership.event_id is not None
                and self._delivery.misses_join(user_id, room_id, membership.event_pos)
                # Not just a new name or avatar.
                and await self._events.is_real_join(membership.event_id)
            ):
                missing[room_id] = membership.event_pos
        if missing:
            await self._delivery.wait_for_joins(user_id, missing)

    def _unmatched(
        self,
        user_id: str,
        interested: room_lists.SlidingSyncInterestedRooms,
        since: Since,
        position: int,
    ) -> set[str]:
        """Return the joined rooms that the next token must name.

        Those are the rooms that the request does not match and that have events up to
        the new position.
        """
        if position == since.position and not since.digests:
            return set()
        memberships = interested.room_membership_for_user_map
        rooms = {
            room_id
            for room_id in self._delivery.rooms_with_events(memberships.keys())
            if room_id not in interested.all_rooms and _is_joined(interested, room_id)
        }
        passed_over = self._delivery.rooms_due(user_id, rooms, since.position, position)
        return passed_over | {
            room_id
            for room_id in rooms
            # The user may not ignore the sender any more once the room matches again.
            if since.names(room_id) or self._delivery.names_sender_in(since, room_id)
        }


class MatchedJoinedRooms(Set[str]):
    """The rooms that match a request and that the user is joined to.

    Lists match invites and kicks too. Asking for a few of many rooms costs in
    proportion to the few.
    """

    def __init__(self, interested: room_lists.SlidingSyncInterestedRooms) -> None:
        self._interested = interested

    @property
    def newly_joined(self) -> Set[str]:
        """The rooms that were joined since `pos`, for Synapse; a new name counts as a join."""
        return self._interested.newly_joined_rooms

    def membership(self, room_id: str) -> Any:
        """Return the user's membership as Synapse knows it; None if it knows none."""
        return self._interested.room_membership_for_user_map.get(room_id)

    def __contains__(self, room_id: object) -> bool:
        return room_id in self._interested.all_rooms and _is_joined(self._interested, str(room_id))

    def __iter__(self) -> Iterator[str]:
        return filter(self.__contains__, self._interested.all_rooms)

    def __len__(self) -> int:
        # Only says which of two sets to look into first: an upper bound will do.
        return len(self._interested.all_rooms)


def _initial_rooms(result: SlidingSyncResult) -> set[str]:
    """Return the rooms whose events the client has dropped: it did not know them yet."""
    return {room_id for room_id, room in result.rooms.items() if room.initial}


def _with_answer(result: SlidingSyncResult, answer: JsonDict) -> SlidingSyncResult:
    return attr.evolve(result, extensions=StickyExtensions.create(result.extensions, answer))


def _is_joined(interested: room_lists.SlidingSyncInterestedRooms, room_id: str) -> bool:
    room = interested.room_membership_for_user_map.get(room_id)
    return room is not None and room.membership == Membership.JOIN


class StickySlidingSyncServlet(sync_rest.SlidingSyncRestServlet):
    """Sliding Sync that reads and writes the extension."""

    async def on_POST(self, request: SynapseRequest) -> tuple[int, JsonDict]:
        try:
            sticky_request = _take_out_extension(request)
        except SynapseError:
            # Somebody who is not logged in learns nothing else.
            await self.auth.get_user_by_req(request, allow_guest=True)
            raise
        token = _current_request.set(sticky_request)
        try:
            return await super().on_POST(request)
        finally:
            _current_request.reset(token)

    async def encode_response(
        self, requester: Any, sliding_sync_result: SlidingSyncResult
    ) -> JsonDict:
        response = await super().encode_response(requester, sliding_sync_result)
        extensions = sliding_sync_result.extensions
        if isinstance(extensions, StickyExtensions) and extensions.sticky:
            response["extensions"][SLIDING_SYNC_EXTENSION] = extensions.sticky
        return response


def _take_out_extension(request: SynapseRequest) -> StickyRequest | None:
    """Remove our extension from the request's body, and read it."""
    assert request.content is not None
    raw = request.content.read()
    request.content.seek(0)
    if SLIDING_SYNC_EXTENSION.encode() not in raw:
        return None
    try:
        body = json.loads(raw)
        extension = body["extensions"].pop(SLIDING_SYNC_EXTENSION, None)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        # Synapse refuses a body like this one.
        return None
    request.content = io.BytesIO(json.dumps(body).encode())
    return None if extension is None else StickyRequest.parse(extension)


def _bad_parameter(what: str) -> SynapseError:
    return SynapseError(400, f"Extension {SLIDING_SYNC_EXTENSION}: {what}", Codes.INVALID_PARAM)
