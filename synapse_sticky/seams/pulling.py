# SPDX-License-Identifier: AGPL-3.0-or-later
"""Asks other servers for the newest events of a room, and hands them to Synapse.

Handed on they are as if they had been pushed: Synapse checks and stores them as it does those,
and whoever answers us can do no more than push the same events.
"""

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final
from urllib.parse import quote

from synapse.api.errors import (
    FederationError,
    HttpResponseException,
    NotFoundError,
    RequestSendFailed,
    UnsupportedRoomVersionError,
)
from synapse.events import EventBase
from synapse.federation import federation_base
from synapse.federation.federation_server import FederationServer
from synapse.http import matrixfederationclient
from synapse.http.client import BodyExceededMaxSize
from synapse.http.matrixfederationclient import JsonParser, MatrixFederationHttpClient
from synapse.logging.context import current_context, nested_logging_context
from synapse.server import HomeServer
from synapse.types import get_domain_from_id
from synapse.util.stringutils import parse_and_validate_server_name

from synapse_sticky.protocol import EXTREMITIES_PREFIX
from synapse_sticky.seams.background import Clock
from synapse_sticky.seams.bounded import bounded_client
from synapse_sticky.seams.checks import require
from synapse_sticky.seams.metrics import REQUESTS_TO_SERVERS, Metrics
from synapse_sticky.servers.walk import (
    PAGE_EVENTS,
    FoundEvent,
    Receipt,
    event_ids_in,
    prev_event_ids_in,
)

logger = logging.getLogger(__name__)

_ANSWER_TIMEOUT_MS: Final = 10_000
_AT_ONCE_MS: Final = 500
# For one event that Synapse may have to ask more questions for, of the same server.
_RECEIVE_TIMEOUT_MS: Final = 30_000
# When to look whether Synapse has taken an event: most take less than 50 ms.
_LOOKS_AFTER_MS: Final = (10, 20, 40, 80, *[160] * 30)
# Where the clock of the server is ahead of ours, its newest events seem to be to come.
_CLOCKS_DIFFER_MS: Final = 60_000
# If a page is too large: that many of the largest events fit.
_FEW_EVENTS: Final = 10
# What a server answers that does not know the question, or has nothing to tell us.
_UNKNOWN_QUESTION: Final = frozenset({400, 403, 404, 405, 501})
_FEDERATION_PREFIX: Final = "/_matrix/federation/v1"

# The end of the name of the logging context in which a question is asked.
_QUESTION: Final = "sticky_question"


class PullFailed(Exception):
    """A server gave no answer that is of use.

    Attributes:
        status: the HTTP status if it answered with an error, otherwise 0.
        is_too_large: whether it answered with more than is read.
    """

    def __init__(self, reason: str, status: int = 0, is_too_large: bool = False) -> None:
        super().__init__(reason)
        self.status = status
        self.is_too_large = is_too_large


class BackingOff(PullFailed):
    """Synapse backs off from a server: any answer to us would end that."""


class HasNothingToTell(PullFailed):
    """A server answers, and names no event: its own join to the room may be under way."""


class _ShortAnswer(JsonParser):
    MAX_RESPONSE_SIZE = 64 * 1024


class _Page(JsonParser):
    # Of small objects it may need twenty times as much once it is parsed.
    MAX_RESPONSE_SIZE = 1024 * 1024


def has_federation(hs: HomeServer) -> bool:
    """Whether the configuration allows any other server."""
    allowed = hs.config.federation.federation_domain_whitelist
    return allowed is None or any(not hs.is_mine_server_name(name) for name in allowed)


class Pulling:
    """The rooms of this server, and the other servers in them."""

    def __init__(self, hs: HomeServer, clock: Clock, metrics: Metrics) -> None:
        self._hs = hs
        self._clock = clock
        self._metrics = metrics
        self._store: Any = hs.get_datastores().main
        self._state: Any = hs.get_storage_controllers().state
        self._federation_server: Any = hs.get_federation_server()
        self._client = bounded_client(hs, clock, _ANSWER_TIMEOUT_MS)
        # Servers that have no endpoint for extremities, as far as was found.
        self._without_extremities: set[str] = set()
        get_json = ("destination", "path", "args", "timeout", "ignore_backoff", "parser")
        require(MatrixFederationHttpClient, "get_json", *get_json)
        require(JsonParser, "MAX_RESPONSE_SIZE")
        require(FederationServer, "_handle_received_pdu", "origin", "pdu")
        require(federation_base, "event_from_pdu_json", "pdu_json", "room_version")
        require(self._state, "get_server_acl_for_room", "room_id")
        for name in (
            "get_room_version",
            "is_partial_state_room",
            "get_current_hosts_in_room_ordered",
            "get_local_users_in_room",
            "get_next_staged_event_id_for_room",
        ):
            require(self._store, name, "room_id")
        require(self._store, "have_events_in_timeline", "event_ids")
        require(self._store, "get_destination_retry_timings", "destination")
        logging.getLogger(matrixfederationclient.__name__).addFilter(_NoWarningWhenPulling())

    async def servers_in_room(self, room_id: str) -> Sequence[str]:
        """Return the other servers of a room, the oldest first.

        None of a room that this server is not in.
        """
        try:
            await self._store.get_room_version(room_id)
        except (NotFoundError, UnsupportedRoomVersionError):
            return []
        servers: Sequence[str] = await self._store.get_current_hosts_in_room_ordered(room_id)
        if self._hs.hostname not in servers:
            return []
        return [server for server in servers if not self._hs.is_mine_server_name(server)]

    async def is_joining(self, room_id: str) -> bool:
        """Whether a faster join to a room is under way: Synapse does not know who is in it yet."""
        is_joining: bool = await self._store.is_partial_state_room(room_id)
        return is_joining

    async def may_send(self, server_name: str, room_id: str) -> bool:
        """Whether our configuration and the room's ACL allow a server to send to it."""
        try:
            host, _ = parse_and_validate_server_name(server_name)
        except ValueError:
            return False
        federation = self._hs.config.federation
        if not federation.is_domain_allowed_according_to_federation_whitelist(server_name):
            return False
        acl = await self._state.get_server_acl_for_room(room_id)
        return acl is None or bool(acl.server_matches_acl_event(host))

    def forget_servers(self) -> None:
        """Take it that each server may have been upgraded before the next outage."""
        self._without_extremities.clear()

    async def known_among(self, event_ids: Collection[str]) -> set[str]:
        """Return those of these events that are in the history of their room here."""
        known: set[str] = await self._store.have_events_in_timeline(event_ids)
        return known

    async def newest(self, server_name: str, room_id: str) -> list[str]:
        """Return the IDs of the newest events that a server has in a room.

        Its forward extremities (MSC4370). If it does not tell these, the events that it would
        refer to if one of our users left, and if there are none the newest by its time.

        Raises:
            HasNothingToTell: if it names none.
            PullFailed: if it does not answer.
        """
        newest = await self._newest(server_name, room_id)
        if not newest:
            raise HasNothingToTell("it names no event")
        return newest

    async def _newest(self, server_name: str, room_id: str) -> list[str]:
        if server_name not in self._without_extremities:
            path = f"{EXTREMITIES_PREFIX}/extremities/{_quoted(room_id)}"
            answer = await self._ask_if_known("extremities", server_name, path, {})
            if answer is not None:
                return event_ids_in(answer.get("prev_events"))
            self._without_extremities.add(server_name)
        for user_id in sorted(await self._store.get_local_users_in_room(room_id))[:1]:
            # That makes nobody leave: it asks how the event would have to look.
            path = f"{_FEDERATION_PREFIX}/make_leave/{_quoted(room_id)}/{_quoted(user_id)}"
            answer = await self._ask_if_known("make_leave", server_name, path, {})
            event = answer.get("event") if answer is not None else None
            newest = event_ids_in(event.get("prev_events")) if isinstance(event, dict) else []
            if newest:
                return newest
        path = f"{_FEDERATION_PREFIX}/timestamp_to_event/{_quoted(room_id)}"
        args = {"ts": str(self._clock.now_ts() + _CLOCKS_DIFFER_MS), "dir": "b"}
        answer = await self._ask_if_known("timestamp_to_event", server_name, path, args)
        return event_ids_in([answer.get("event_id")]) if answer is not None else []

    async def page(
        self, server_name: str, room_id: str, event_ids: Collection[str]
    ) -> list[FoundEvent]:
        """Return events of a room, and those before them, as a server has them.

        Raises:
            PullFailed: if it does not answer.
        """
        try:
            return await self._page(server_name, room_id, event_ids, PAGE_EVENTS)
        except PullFailed as error:
            if not error.is_too_large:
                raise
        return await self._page(server_name, room_id, event_ids, _FEW_EVENTS)

    async def _page(
        self, server_name: str, room_id: str, event_ids: Collection[str], limit: int
    ) -> list[FoundEvent]:
        path = f"{_FEDERATION_PREFIX}/backfill/{_quoted(room_id)}"
        args = {"v": list(event_ids), "limit": str(limit)}
        answer = await self._ask("backfill", server_name, path, args, _Page)
        pdus = answer.get("pdus")
        try:
            version = await self._store.get_room_version(room_id)
        except NotFoundError:
            # The room was purged meanwhile.
            return []
        listed = pdus[:limit] if isinstance(pdus, list) else []
        found = (_found(pdu, room_id, version) for pdu in listed)
        return [event for event in found if event is not None]

    async def receive(self, server_name: str, found: FoundEvent) -> Receipt:
        """Hand an event to Synapse as if the server had pushed it.

        It joins those that servers push to the room, which Synapse takes one after the other.

        Raises:
            PullFailed: if that takes long. It goes on by itself then.
        """
        event: Any = found.pdu
        until_ms = self._clock.monotonic_ms() + _RECEIVE_TIMEOUT_MS
        while self._clock.monotonic_ms() < until_ms:
            try:
                # Once more if it takes long: a process that was killed may have left the room
                # locked, and Synapse goes on with its events only when the next one comes.
                await self._federation_server._handle_received_pdu(server_name, event)
            except FederationError:
                return Receipt.UNVERIFIED
            except Exception as error:
                # The room may have been purged meanwhile.
                logger.info("Cannot take an event from %s: %s", server_name, type(error).__name__)
                return Receipt.REFUSED
            receipt = await self._receipt_of(event)
            if receipt is not None:
                return receipt
        raise PullFailed("an event takes long")

    async def _receipt_of(self, event: EventBase) -> Receipt | None:
        """Wait until Synapse has taken an event or dropped it; None if that takes long."""
        for wait_ms in _LOOKS_AFTER_MS:
            staged = await self._store.get_next_staged_event_id_for_room(event.room_id)
            if await self.known_among([event.event_id]):
                return Receipt.ACCEPTED
            if staged is None:
                return Receipt.REFUSED
            await self._clock.sleep(wait_ms)
        return None

    async def _ask_if_known(
        self, request: str, server_name: str, path: str, args: Mapping[str, Any]
    ) -> Mapping[str, object] | None:
        """Ask a server; None if it does not know the question, or finds nothing."""
        try:
            return await self._ask(request, server_name, path, args, _ShortAnswer)
        except PullFailed as error:
            if error.status not in _UNKNOWN_QUESTION:
                raise
        return None

    async def _ask(
        self,
        request: str,
        server_name: str,
        path: str,
        args: Mapping[str, Any],
        parser: type[JsonParser],
    ) -> Mapping[str, object]:
        started_ms = self._clock.monotonic_ms()
        try:
            return await self._ask_once(request, server_name, path, args, parser())
        except PullFailed as error:
            if isinstance(error, BackingOff):
                raise
            failed_at_once = self._clock.monotonic_ms() - started_ms < _AT_ONCE_MS
            if error.status or error.is_too_large or not failed_at_once:
                raise
        # It may have been a connection that the server had closed.
        return await self._ask_once(request, server_name, path, args, parser())

    async def _ask_once(
        self, request: str, server_name: str, path: str, args: Mapping[str, Any], parser: JsonParser
    ) -> Mapping[str, object]:
        timings = await self._store.get_destination_retry_timings(server_name)
        if timings is not None and timings.retry_interval:
            self._count(request, "backing_off")
            raise BackingOff("Synapse backs off from it")
        outcome = "failed"
        try:
            with nested_logging_context(_QUESTION):
                answer: Mapping[str, object] = await self._client.get_json(
                    server_name,
                    path=path,
                    args=args,
                    timeout=_ANSWER_TIMEOUT_MS,
                    # That it does not answer this is no reason to back off from it.
                    ignore_backoff=True,
                    parser=parser,
                )
            outcome = "ok"
            return answer
        except Exception as error:
            # Synapse wraps most of what can go wrong, but not if the answer is nested too deeply.
            cause = error.inner_exception if isinstance(error, RequestSendFailed) else error
            status = cause.code if isinstance(cause, HttpResponseException) else 0
            outcome = "error" if status else "failed"
            is_too_large = isinstance(cause, BodyExceededMaxSize)
            raise PullFailed(type(cause).__name__, status, is_too_large) from error
        finally:
            self._count(request, outcome)

    def _count(self, request: str, outcome: str) -> None:
        self._metrics.count(REQUESTS_TO_SERVERS, request=request, outcome=outcome)


def _quoted(part: str) -> str:
    return quote(part, safe="")


def _found(pdu: object, room_id: str, version: Any) -> FoundEvent | None:
    """Read an event in a page; None if it makes no sense, or is one of another room."""
    if not isinstance(pdu, dict) or pdu.get("room_id") != room_id:
        return None
    try:
        event = federation_base.event_from_pdu_json(pdu, version)
        prev_event_ids = prev_event_ids_in(list(event.prev_event_ids()))
        ts, server_name = event.origin_server_ts, get_domain_from_id(event.sender)
        if prev_event_ids is None or not event_ids_in([event.event_id]) or type(ts) is not int:
            return None
        return FoundEvent(event.event_id, server_name, prev_event_ids, event.depth, ts, event)
    except Exception:
        # Synapse expects that the parts of an event are what they should be.
        return None


class _NoWarningWhenPulling(logging.Filter):
    """Whether a server knows the question is open, and it may answer as it likes."""

    def filter(self, record: logging.LogRecord) -> bool:
        is_question = str(current_context()).endswith(_QUESTION)
        return not (is_question and record.levelno == logging.WARNING)
