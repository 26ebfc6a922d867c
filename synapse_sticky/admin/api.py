# SPDX-License-Identifier: AGPL-3.0-or-later
"""The endpoints of the admin API."""

import json
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from importlib.resources import files
from typing import Any, Final

import attr
from synapse.api.errors import Codes, NotFoundError, SynapseError
from synapse.module_api import ModuleApi
from synapse.types import JsonDict, RoomID, UserID

from synapse_sticky._version import __version__
from synapse_sticky.admin import decisions
from synapse_sticky.admin.decisions import BadBody, BadValue, Decision
from synapse_sticky.admin.lag import Lag
from synapse_sticky.control.overrides import Kind, Override
from synapse_sticky.control.settings import DecidedBy, Settings, subject_of_server
from synapse_sticky.ephemeral_map import Entry, EphemeralMap
from synapse_sticky.seams.background import Clock
from synapse_sticky.seams.checks import NEWEST_TESTED_SYNAPSE, synapse_version
from synapse_sticky.seams.requests import AdminRequest, Route, is_server_name
from synapse_sticky.seams.rooms import RoomNames, Rooms
from synapse_sticky.servers.debts import Debts, Reason, StoredDebt
from synapse_sticky.storage.reports import EventReport, Reports, RoomCounts

logger = logging.getLogger(__name__)

_MAX_ID_LENGTH: Final = 255
_BATCH: Final = 500
"""How many events are read at a time."""

_ROOM_ORDERS: Final = ("room_id", "name", "live", "held", "owed")


@attr.s(slots=True, frozen=True, auto_attribs=True)
class AdminApi:
    """Answers admins from the database, and from memory that all processes have alike.

    Attributes:
        indexer_name: of the process that notices sticky events.
        retry: pays a server now, on whichever process that is done.
    """

    _api: ModuleApi
    _clock: Clock
    _reports: Reports
    _debts: Debts
    _settings: Settings
    _rooms: Rooms
    _lag: Lag
    _indexer_name: str
    _retry: Callable[[str], None]

    def routes(self) -> list[Route]:
        """Return the endpoints."""
        return [
            # It holds no secret, and tools that read such documents seldom have a token.
            Route("GET", "openapi.json", self.get_openapi, is_public=True),
            Route("GET", "status", self.get_status),
            Route("GET", "rooms", self.get_rooms),
            Route("GET", "rooms/{room_id}", self.get_room),
            Route("GET", "rooms/{room_id}/map", self.get_map),
            Route("GET", "rooms/{room_id}/servers", self.get_servers_of_room),
            Route("GET", "rooms/{room_id}/settings", self.get_room_settings),
            Route("PUT", "rooms/{room_id}/settings", self.put_room_settings),
            Route("GET", "users/{user_id}/settings", self.get_user_settings),
            Route("PUT", "users/{user_id}/settings", self.put_user_settings),
            Route("GET", "blocks", self.get_blocks),
            Route("GET", "servers", self.get_servers),
            Route("GET", "servers/{server_name}/settings", self.get_server_settings),
            Route("PUT", "servers/{server_name}/settings", self.put_server_settings),
            Route("POST", "servers/{server_name}/retry", self.retry_server),
        ]

    async def get_openapi(self, request: AdminRequest) -> JsonDict:
        """Return the description of this API."""
        return read_openapi()

    async def get_status(self, request: AdminRequest) -> JsonDict:
        """Describe this deployment, and count the events of all rooms."""
        counts = await self._reports.count(self._clock.now_ts())
        held: dict[str, int] = defaultdict(int)
        for room in counts.values():
            for reason, count in room.held.items():
                held[reason] += count
        return {
            "version": __version__,
            "synapse_version": str(synapse_version()),
            "newest_tested_synapse": str(NEWEST_TESTED_SYNAPSE),
            "schema_version": await self._reports.get_schema_version(),
            "server_name": self._api.server_name,
            "user_id": request.user_id,
            "instance_name": self._api.worker_name or "master",
            "indexer": {
                "instance_name": self._indexer_name,
                "behind": await self._lag.count_unnoticed(),
            },
            "live": sum(room.live for room in counts.values()),
            "held": held,
            "owed": sum(debt.owed for debt in await self._debts.stored()),
            "enabled_by_default": self._settings.default.value,
        }

    # Rooms

    async def get_rooms(self, request: AdminRequest) -> JsonDict:
        """List the rooms with unexpired sticky events, or with a decision on them."""
        search, order_by = request.text("search_term"), request.choice("order_by", _ROOM_ORDERS)
        backwards = request.choice("dir", ("f", "b")) == "b"
        counts = await self._reports.count(self._clock.now_ts())
        decided = {room_id for room_id, _ in self._settings.overrides.all(Kind.ROOM)}
        owed: dict[str, int] = defaultdict(int)
        for debt in await self._debts.stored():
            owed[debt.room_id] += debt.owed
        room_ids = sorted(counts.keys() | decided)
        names: dict[str, RoomNames] = {}
        if search or order_by == "name":
            names = await self._rooms.names_of(room_ids)
            room_ids = [room for room in room_ids if _is_found(search, room, names[room])]
        ranks: dict[str, Callable[[str], Any]] = {
            "room_id": lambda room: room,
            # Rooms without a name come last, in either direction of the alphabet.
            "name": lambda room: _rank_of_name(names[room], backwards),
            "live": lambda room: counts[room].live if room in counts else 0,
            "held": lambda room: sum(counts[room].held.values()) if room in counts else 0,
            "owed": lambda room: owed[room],
        }
        room_ids.sort(key=ranks[order_by], reverse=backwards)
        start, limit = request.page()
        page = room_ids[start : start + limit]
        names = await self._rooms.names_of(page)
        rooms = [
            await self._describe_room(room, names[room], counts.get(room, RoomCounts()), owed[room])
            for room in page
        ]
        return {"rooms": rooms, **_totals(start, limit, len(room_ids))}

    async def get_room(self, request: AdminRequest, room_id: str) -> JsonDict:
        """Describe a room and its unexpired sticky events."""
        await self._check_known(room_id)
        start, limit = request.page()
        held = request.flag("held")
        now_ts = self._clock.now_ts()
        counts = await self._reports.count(now_ts, room_id)
        owed = sum(debt.owed for debt in await self._debts.stored(room_id))
        events, total = await self._reports.list_events(room_id, now_ts, start, limit, held)
        types = await self._rooms.types_of([event.event_id for event in events])
        names = (await self._rooms.names_of([room_id]))[room_id]
        counted = counts.get(room_id, RoomCounts())
        return {
            **await self._describe_room(room_id, names, counted, owed),
            "events": [
                _describe_event(event, types.get(event.event_id), now_ts) for event in events
            ],
            **_totals(start, limit, total),
        }

    async def get_map(self, request: AdminRequest, room_id: str) -> JsonDict:
        """Return the ephemeral map that clients make of a room's sticky events."""
        await self._check_known(room_id)
        now_ts = self._clock.now_ts()
        expires_ts = await self._reports.get_live(room_id, now_ts)
        event_ids, ephemeral = list(expires_ts), EphemeralMap()
        for start in range(0, len(event_ids), _BATCH):
            for event in await self._rooms.contents_of(event_ids[start : start + _BATCH]):
                ephemeral.add(room_id, event, now_ts, expires_ts=expires_ts[event["event_id"]])
            # Other requests need not wait for the whole room.
            await self._clock.sleep(0)
        entries = [_describe_entry(e, now_ts) for e in ephemeral.entries(room_id, now_ts)]
        return _paged(request, "entries", entries)

    async def _describe_room(
        self, room_id: str, names: RoomNames, counts: RoomCounts, owed: int
    ) -> JsonDict:
        settings = await self._settings.of_room(room_id)
        return {
            "room_id": room_id,
            "name": names.name,
            "canonical_alias": names.alias,
            "live": counts.live,
            "held": counts.held,
            "owed": owed,
            "enabled": settings.enabled,
            "enabled_by": settings.enabled_by.value,
        }

    async def _check_known(self, room_id: str) -> None:
        _check_room_id(room_id)
        if self._settings.overrides.get(Kind.ROOM, room_id) is not None:
            return
        # A room that was purged may be left in our tables for a while.
        if await self._rooms.is_known(room_id) or await self._reports.count(
            self._clock.now_ts(), room_id
        ):
            return
        raise NotFoundError("This server does not know this room")

    # Servers

    async def get_servers_of_room(self, request: AdminRequest, room_id: str) -> JsonDict:
        """List the servers that are owed events in a room, or all that are in it."""
        await self._check_known(room_id)
        servers = await self._debts.other_servers_in(room_id) if request.flag("all") else ()
        return await self._list_servers(request, await self._debts.stored(room_id), servers)

    async def get_servers(self, request: AdminRequest) -> JsonDict:
        """List the servers that are owed events in any room."""
        return await self._list_servers(request, await self._debts.stored())

    async def _list_servers(
        self, request: AdminRequest, debts: Iterable[StoredDebt], others: Iterable[str] = ()
    ) -> JsonDict:
        """List the servers with debts, and these others, a page of them."""
        by_server: dict[str, list[StoredDebt]] = {name: [] for name in others}
        for debt in debts:
            by_server.setdefault(debt.server_name, []).append(debt)
        failing_ts = await self._debts.failing_since_ts(by_server)
        # Those that an admin looks for come first.
        names = sorted(
            by_server,
            key=lambda name: (
                -sum(debt.owed for debt in by_server[name]),
                name not in failing_ts,
                name,
            ),
        )
        now_ts = self._clock.now_ts()
        return _paged(
            request,
            "servers",
            [
                {
                    "server_name": name,
                    **_describe_debts(by_server[name], now_ts),
                    "failing_since_ts": failing_ts.get(name),
                    "blocked": self._settings.block_of_server(name) is not None,
                }
                for name in names
            ],
        )

    async def retry_server(self, request: AdminRequest, server_name: str) -> JsonDict:
        """Pay a server now, unless Synapse backs off from it."""
        self._check_server_name(server_name)
        retry_ts = await self._debts.backing_off_until_ts(server_name)
        if retry_ts is not None:
            raise SynapseError(
                409,
                f"Synapse is backing off from this server until {retry_ts} (ms since the epoch). "
                "Synapse's own admin API can reset that",
                additional_fields={"retry_ts": retry_ts},
            )
        debts = await self._debts.stored()
        self._retry(server_name)
        logger.info("%s asked to pay %s the sticky events it is owed", request.user_id, server_name)
        return {"owed": sum(debt.owed for debt in debts if debt.server_name == server_name)}

    # Settings

    async def get_blocks(self, request: AdminRequest) -> JsonDict:
        """List the users and servers that are blocked."""
        blocks = [
            {
                "kind": kind.value,
                "subject": subject,
                "reason": block.reason,
                "until_ts": block.until_ts,
            }
            for kind in (Kind.USER, Kind.SERVER)
            for subject, block in sorted(self._settings.overrides.all(kind), key=lambda b: b[0])
        ]
        return _paged(request, "blocks", blocks)

    async def get_room_settings(self, request: AdminRequest, room_id: str) -> JsonDict:
        """Return whether sticky events are on in a room, which this server need not know."""
        _check_room_id(room_id)
        settings = await self._settings.of_room(room_id)
        override = self._settings.overrides.get(Kind.ROOM, room_id)
        return {
            "enabled": settings.enabled,
            "enabled_by": settings.enabled_by.value,
            "override": override.enabled if override is not None else None,
        }

    async def put_room_settings(self, request: AdminRequest, room_id: str) -> JsonDict:
        """Decide whether sticky events are on in a room."""
        _check_room_id(room_id)
        await self._decide(request, Kind.ROOM, room_id, decisions.of_room)
        return await self.get_room_settings(request, room_id)

    async def get_user_settings(self, request: AdminRequest, user_id: str) -> JsonDict:
        """Return whether a local user may send sticky events."""
        self._check_user_id(user_id)
        return _describe_sender(self._settings.block_of_user(user_id))

    async def put_user_settings(self, request: AdminRequest, user_id: str) -> JsonDict:
        """Block a local user, or not any more."""
        self._check_user_id(user_id)
        await self._decide(request, Kind.USER, user_id, self._of_sender)
        return _describe_sender(self._settings.block_of_user(user_id))

    async def get_server_settings(self, request: AdminRequest, server_name: str) -> JsonDict:
        """Return whether sticky events of another server are delivered."""
        self._check_server_name(server_name)
        return _describe_sender(self._settings.block_of_server(server_name))

    async def put_server_settings(self, request: AdminRequest, server_name: str) -> JsonDict:
        """Block another server, or not any more."""
        self._check_server_name(server_name)
        subject = subject_of_server(server_name)
        await self._decide(request, Kind.SERVER, subject, self._of_sender)
        return _describe_sender(self._settings.block_of_server(server_name))

    def _of_sender(self, body: JsonDict) -> Decision:
        return decisions.of_sender(body, self._clock.now_ts())

    async def _decide(
        self,
        request: AdminRequest,
        kind: Kind,
        subject: str,
        parse: Callable[[JsonDict], Decision],
    ) -> None:
        try:
            decision = parse(request.body())
        except BadBody as error:
            raise SynapseError(400, str(error), Codes.BAD_JSON) from error
        except BadValue as error:
            raise SynapseError(400, str(error), Codes.INVALID_PARAM) from error
        override = None
        if decision.enabled is not None:
            override = Override(decision.enabled, decision.reason, decision.until_ts)
        await self._settings.overrides.decide(kind, subject, override)
        logger.info(
            # Room IDs of other servers may hold anything, such as the end of a line.
            "%s decided on sticky events of %s %r: enabled=%s reason=%r until_ts=%s",
            request.user_id,
            kind.value,
            subject,
            decision.enabled,
            decision.reason,
            decision.until_ts,
        )

    def _check_user_id(self, user_id: str) -> None:
        if not UserID.is_valid(user_id) or not _is_storable(user_id):
            raise _bad_id("user_id", "must be the ID of a user")
        if not self._api.is_mine(user_id):
            raise _bad_id("user_id", "must be of this server; others are blocked as a server")

    def _check_server_name(self, server_name: str) -> None:
        if not is_server_name(server_name) or not _is_storable(server_name):
            raise _bad_id("server_name", "must be the name of a server")
        if subject_of_server(server_name) == subject_of_server(self._api.server_name):
            raise _bad_id("server_name", "must be that of another server")


def read_openapi() -> JsonDict:
    """Return the document that describes this API."""
    text = files(__package__).joinpath("openapi.json").read_text(encoding="utf-8")
    document: JsonDict = json.loads(text)
    return document


def _is_found(search: str, room_id: str, names: RoomNames) -> bool:
    texts = (room_id, names.name or "", names.alias or "")
    return any(search.casefold() in text.casefold() for text in texts)


def _rank_of_name(names: RoomNames, backwards: bool) -> tuple[bool, str]:
    shown = names.name or names.alias
    return ((shown is None) is not backwards, (shown or "").casefold())


def _check_room_id(room_id: str) -> None:
    if not RoomID.is_valid(room_id) or not _is_storable(room_id):
        raise _bad_id("room_id", "must be the ID of a room")


def _is_storable(name: str) -> bool:
    return len(name.encode()) <= _MAX_ID_LENGTH and "\0" not in name


def _bad_id(name: str, problem: str) -> SynapseError:
    return SynapseError(400, f"'{name}' {problem}", Codes.INVALID_PARAM)


def _describe_event(event: EventReport, event_type: str | None, now_ts: int) -> JsonDict:
    return {
        "event_id": event.event_id,
        "sender": event.sender,
        "type": event_type,
        "remaining_ms": event.expires_ts - now_ts,
        "position": event.position,
        "held_reasons": event.held_reasons,
    }


def _describe_entry(entry: Entry, now_ts: int) -> JsonDict:
    return {
        "sender": entry.sender,
        "type": entry.type,
        "sticky_key": entry.sticky_key,
        "event_id": entry.event_id,
        "remaining_ms": entry.expires_ts - now_ts,
        "opaque": entry.opaque,
        "content": None if entry.opaque else entry.content,
    }


def _describe_debts(debts: Sequence[StoredDebt], now_ts: int) -> JsonDict:
    """Describe the debts to one server, in several rooms."""
    if not debts:
        nothing = ("oldest_owed_ms", "reason", "obstacle", "retry_ts")
        return {"owed": 0, **dict.fromkeys(nothing)}
    reasons = {debt.reason for debt in debts}
    reason = debts[0].reason if len(reasons) == 1 else Reason.TRYING
    return {
        "owed": sum(debt.owed for debt in debts),
        "oldest_owed_ms": max(0, now_ts - min(debt.since_ts for debt in debts)),
        "reason": reason.value,
        "obstacle": debts[0].obstacle,
        "retry_ts": max((d.retry_ts for d in debts if d.retry_ts is not None), default=None),
    }


def _describe_sender(block: Override | None) -> JsonDict:
    return {
        "enabled": block is None,
        "enabled_by": (DecidedBy.DEFAULT if block is None else DecidedBy.ADMIN).value,
        "override": None if block is None else False,
        "reason": block.reason if block is not None else None,
        "until_ts": block.until_ts if block is not None else None,
    }


def _paged(request: AdminRequest, name: str, entries: Sequence[Any]) -> JsonDict:
    """Return the page of a list that a request asks for."""
    start, limit = request.page()
    return {name: entries[start : start + limit], **_totals(start, limit, len(entries))}


def _totals(start: int, limit: int, total: int) -> JsonDict:
    # As in Synapse's admin API: a token only if there is more.
    more = {"next_token": str(start + limit)} if start + limit < total else {}
    return {"total": total, **more}
