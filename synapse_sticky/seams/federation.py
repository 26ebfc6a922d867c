# SPDX-License-Identifier: AGPL-3.0-or-later
"""Sends to other servers, and asks them.

No failure of ours makes Synapse back off from a server, and a server that Synapse backs off from
is not asked: any answer would end that.
"""

import json
import logging
import secrets
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final
from urllib.parse import quote

import attr
from canonicaljson import encode_canonical_json
from synapse.api.constants import EventTypes
from synapse.api.errors import (
    FederationDeniedError,
    HttpResponseException,
    RequestSendFailed,
)
from synapse.events import EventBase
from synapse.federation.sender import FederationSender
from synapse.federation.sender.per_destination_queue import PerDestinationQueue
from synapse.http import matrixfederationclient
from synapse.http.client import BodyExceededMaxSize
from synapse.http.matrixfederationclient import JsonParser
from synapse.server import HomeServer
from synapse.types.state import StateFilter

from synapse_sticky.seams.background import Clock
from synapse_sticky.seams.bounded import bounded_client, noting_retry_after
from synapse_sticky.seams.checks import require
from synapse_sticky.seams.events import sticky_duration_ms
from synapse_sticky.seams.metrics import ACCEPTED_BY_SERVERS, REQUESTS_TO_SERVERS, Metrics
from synapse_sticky.servers.confirmation import Reply

logger = logging.getLogger(__name__)

_ANSWER_TIMEOUT_MS: Final = 10_000
_SEND_TIMEOUT_MS: Final = 20_000
_AT_ONCE_MS: Final = 500
_LONGEST_RETRY_AFTER_MS: Final = 600_000
# A proxy before a server may take bodies of 1 MB, or of less.
_MAX_BYTES: Final = 512 * 1024
# So many events a Synapse tells at most that came before one.
_MAX_HISTORY: Final = 100

_asking: ContextVar[bool] = ContextVar("synapse_sticky_asking", default=False)


@attr.s(slots=True, frozen=True, auto_attribs=True)
class Answer:
    """What a server said to a transaction that it took.

    Attributes:
        accepted: IDs of the events that it named without an error.
        refused: IDs of those that it named with an error.
    """

    accepted: frozenset[str]
    refused: frozenset[str]

    @classmethod
    def of(cls, response: object) -> "Answer":
        """Reads a response; whatever a server puts there."""
        results = response.get("pdus") if isinstance(response, Mapping) else None
        if not isinstance(results, Mapping):
            return cls(frozenset(), frozenset())
        refused = {e for e, r in results.items() if not isinstance(r, Mapping) or "error" in r}
        return cls(frozenset(results) - refused, frozenset(refused))


@attr.s(slots=True, frozen=True, auto_attribs=True)
class Accepted:
    """What a server accepted of one room, in one transaction of Synapse's own queue.

    Attributes:
        event_ids: of all accepted events, in the order sent.
        sticky_ids: of those of them that are sticky.
    """

    room_id: str
    event_ids: list[str] = attr.Factory(list)
    sticky_ids: list[str] = attr.Factory(list)


class RequestFailed(Exception):
    """A server did not answer a request, or with an error.

    Attributes:
        status: the HTTP status if it answered, otherwise 0.
        code: the Matrix error code, if it answered with one.
        retry_after_ms: how long it wants to be left alone, if it says so.
    """

    def __init__(
        self, reason: str, status: int = 0, code: str = "", retry_after_ms: int = 0
    ) -> None:
        super().__init__(reason)
        self.status = status
        self.code = code
        self.retry_after_ms = retry_after_ms


class _NotAsked(RequestFailed):
    """No request was made."""


class Federation:
    """The servers that this process sends to."""

    def __init__(self, hs: HomeServer, clock: Clock, metrics: Metrics) -> None:
        self._hs = hs
        self._clock = clock
        self._metrics = metrics
        self._storage = hs.get_storage_controllers()
        self._store: Any = hs.get_datastores().main
        self._instance_name = hs.get_instance_name()
        self._shards = hs.config.worker.federation_shard_config
        require(
            self._storage.state,
            "get_current_hosts_in_room_or_partial_state_approximation",
            "room_id",
        )
        for method in ("get_events_as_list", "are_users_erased", "get_destination_retry_timings"):
            require(self._store, method)
        require(self._store, "get_destination_retry_timings_batch", "destinations")
        require(self._store, "get_partial_filtered_current_state_ids", "room_id", "state_filter")
        self.sends = hs.should_send_federation()
        if not self.sends:
            return
        self._sender: Any = hs.get_federation_sender()
        require(FederationSender, "_get_per_destination_queue", "destination")
        require(PerDestinationQueue, "attempt_new_transaction")
        require(PerDestinationQueue, "pending_pdu_count")
        require(self._store, "get_federation_out_pos", "typ")
        http_client = matrixfederationclient.MatrixFederationHttpClient
        require(
            http_client,
            "get_json",
            "destination",
            "path",
            "args",
            "timeout",
            "ignore_backoff",
            "parser",
        )
        require(
            http_client,
            "put_json",
            "destination",
            "path",
            "data",
            "timeout",
            "ignore_backoff",
            "parser",
        )
        require(JsonParser, "MAX_RESPONSE_SIZE")
        self._client: Any = bounded_client(hs, clock, _SEND_TIMEOUT_MS)
        client_logger = logging.getLogger(matrixfederationclient.__name__)
        client_logger.addFilter(_NoWarningWhenAsking())

    def sends_to(self, server_name: str) -> bool:
        """Whether it is this process that sends to a server."""
        return (
            self.sends
            and self.is_other(server_name)
            and self._shards.should_handle(self._instance_name, server_name)
        )

    def is_other(self, server_name: str) -> bool:
        """Whether it is another server, and the configuration allows to federate with it."""
        allowed = self._hs.config.federation.is_domain_allowed_according_to_federation_whitelist
        return not self._hs.is_mine_server_name(server_name) and bool(allowed(server_name))

    async def servers_in_room(self, room_id: str) -> Collection[str]:
        """The servers joined to a room, this one included."""
        servers: Collection[
            str
        ] = await self._storage.state.get_current_hosts_in_room_or_partial_state_approximation(
            room_id
        )
        return servers

    async def backing_off_until_ts(self, server_name: str) -> int:
        """Until when Synapse leaves a server alone; 0 or in the past if it does not."""
        timings = await self._store.get_destination_retry_timings(server_name)
        return timings.retry_last_ts + timings.retry_interval if timings else 0

    async def failing_since_ts(self, server_names: Collection[str]) -> dict[str, int]:
        """Return since when Synapse cannot reach servers, without those that it can reach."""
        timings = await self._store.get_destination_retry_timings_batch(server_names)
        return {name: timing.failure_ts for name, timing in timings.items() if timing}

    async def to_send(self, event_ids: Sequence[str]) -> list[EventBase]:
        """Those of these events that are still to be sent, in the given order.

        Left out is what is not sticky any more (redacted), what was rejected, and
        what was sent by somebody who has been erased (MSC4354: not sent to other
        servers as part of catch-up).
        """
        events = [
            event
            for event in await self._store.get_events_as_list(event_ids)
            if sticky_duration_ms(event) is not None
        ]
        erased = await self._store.are_users_erased({event.sender for event in events})
        by_id = {event.event_id: event for event in events if not erased.get(event.sender)}
        return [by_id[event_id] for event_id in event_ids if event_id in by_id]

    def fitting(self, events: Sequence[EventBase]) -> Sequence[EventBase]:
        """Return as many of these events as fit into one transaction: at least the first."""
        size = 0
        for count, event in enumerate(events):
            size += len(encode_canonical_json(event.get_pdu_json()))
            if size > _MAX_BYTES and count:
                return events[:count]
        return events

    async def send(self, server_name: str, events: Collection[EventBase]) -> Answer:
        """Send events in one transaction; to be called in our turn only.

        Raises:
            RequestFailed: if the server did not take it.
        """
        now_ts = self._clock.now_ts()
        # A repeated ID would be answered without a look at what is inside.
        path = f"/_matrix/federation/v1/send/sticky{secrets.token_hex(12)}"
        transaction = {
            "origin": self._hs.hostname,
            "origin_server_ts": now_ts,
            "pdus": [event.get_pdu_json(now_ts) for event in events],
            "edus": [],
        }

        async def put() -> object:
            with self._counted("send"):
                response: object = await self._client.put_json(
                    server_name,
                    path=path,
                    data=transaction,
                    timeout=_SEND_TIMEOUT_MS,
                    ignore_backoff=True,
                    parser=_ShortAnswer(),
                )
                return response

        answer = Answer.of(await self._try_twice(put))
        count = sum(event.event_id in answer.accepted for event in events)
        self._metrics.count(ACCEPTED_BY_SERVERS, count, sender="module")
        return answer

    async def _try_twice(self, request: Callable[[], Awaitable[object]]) -> object:
        """Repeat a request that fails at once: the server may have closed the connection before."""
        started_ms = self._clock.monotonic_ms()
        try:
            return await request()
        except RequestFailed as error:
            if error.status or self._clock.monotonic_ms() - started_ms > _AT_ONCE_MS:
                raise
        return await request()

    async def first_event_id(self, room_id: str) -> str | None:
        """The ID of the event that created a room."""
        key = (EventTypes.Create, "")
        state = await self._store.get_partial_filtered_current_state_ids(
            room_id, StateFilter.from_types([key])
        )
        event_id: str | None = state.get(key)
        return event_id

    async def has_event(self, server_name: str, event_id: str) -> Reply:
        """Ask a server whether it has an event, be it as an outlier."""
        try:
            await self._ask(server_name, f"event/{quote(event_id, safe='')}")
        except _NotAsked:
            return Reply.NOT_ASKED
        except RequestFailed as error:
            return Reply.of_error(error.status, error.code)
        return Reply.HAS

    async def has_with_history(
        self, server_name: str, room_id: str, event_ids: Sequence[str]
    ) -> tuple[Reply, Collection[str]] | None:
        """Ask a server for the last of these events with what came before it in its room.

        `/backfill` names no outlier and nothing rejected, except maybe the event with which it
        begins, which other servers than Synapse leave out.

        Returns:
            Whether the server seems to have the last, and which of the others are in its history;
            None if it does not answer that question, or says too much.
        """
        path = f"backfill/{quote(room_id, safe='')}"
        # Others may lie between them.
        args = {"v": event_ids[-1], "limit": str(min(2 * len(event_ids), _MAX_HISTORY))}
        try:
            answer = await self._ask(server_name, path, args, _History())
        except _NotAsked:
            return Reply.NOT_ASKED, ()
        except RequestFailed as error:
            reply = Reply.of_error(error.status, error.code)
            is_too_long = str(error) == BodyExceededMaxSize.__name__
            return None if reply is Reply.HAS or is_too_long else (reply, ())
        pdus = answer.get("pdus") if isinstance(answer, Mapping) else None
        if not isinstance(pdus, list):
            return None
        events = await self._store.get_events_as_list(event_ids)
        by_key = {_key(event.get_dict()): event.event_id for event in events}
        found = {by_key[key] for pdu in pdus if (key := _key(pdu)) in by_key}
        return Reply.HAS if pdus else Reply.HAS_NOT, found - {event_ids[-1]}

    async def has_in_history(self, server_name: str, event_id: str) -> Reply:
        """Ask a server that has an event whether it has it in the history of its room.

        By the event's time, which passes over outliers and rejected events. A server whose
        answers do not rule it out has it: not all can be asked.
        """
        (event,) = await self._store.get_events_as_list([event_id]) or (None,)
        if event is None:
            return Reply.HAS
        path = f"timestamp_to_event/{quote(event.room_id, safe='')}"
        # Of several events of the same time these name the first and the last. Forwards
        # first: a server that has just joined finds its own join at least.
        named = set()
        for direction in ("f", "b"):
            args = {"ts": str(event.origin_server_ts), "dir": direction}
            try:
                answer = await self._ask(server_name, path, args)
            except _NotAsked:
                return Reply.NOT_ASKED
            except RequestFailed as error:
                reply = Reply.of_error(error.status, error.code)
                if reply is Reply.HAS_NOT:
                    continue
                return reply
            if not isinstance(answer, Mapping) or not isinstance(answer.get("event_id"), str):
                return Reply.HAS
            if answer["event_id"] == event_id:
                return Reply.HAS
            if answer.get("origin_server_ts") != event.origin_server_ts:
                return Reply.HAS_NOT
            if answer["event_id"] in named:
                return Reply.HAS_NOT
            named.add(answer["event_id"])
        return Reply.HAS

    async def _ask(
        self,
        server_name: str,
        path: str,
        args: Mapping[str, str] | None = None,
        parser: JsonParser | None = None,
    ) -> object:
        timings = await self._store.get_destination_retry_timings(server_name)
        if timings is not None and timings.retry_interval:
            # It may be that only its transactions fail, and an answer would clear the back-off.
            request = path.partition("/")[0]
            self._metrics.count(REQUESTS_TO_SERVERS, request=request, outcome="backing_off")
            raise _NotAsked("Synapse is backing off from it")
        asking = _asking.set(True)
        try:
            parser = parser or _ShortAnswer()
            return await self._try_twice(lambda: self._get(server_name, path, args, parser))
        finally:
            _asking.reset(asking)

    async def _get(
        self, server_name: str, path: str, args: Mapping[str, str] | None, parser: JsonParser
    ) -> object:
        with self._counted(path.partition("/")[0]):
            answer: object = await self._client.get_json(
                server_name,
                path=f"/_matrix/federation/v1/{path}",
                args=args,
                timeout=_ANSWER_TIMEOUT_MS,
                # That it does not answer this is no reason to back off from it.
                ignore_backoff=True,
                parser=parser,
            )
            return answer

    @contextmanager
    def _counted(self, request: str) -> Iterator[None]:
        """Count a request by its outcome, and say what went wrong."""
        outcome = "failed"
        try:
            with _as_request_failed():
                yield
            outcome = "ok"
        except RequestFailed as error:
            outcome = "error" if error.status else "failed"
            raise
        finally:
            self._metrics.count(REQUESTS_TO_SERVERS, request=request, outcome=outcome)

    async def queued_up_to(self) -> int:
        """The stream ordering up to which Synapse has put events into its queues."""
        position: int = await self._store.get_federation_out_pos("events")
        return position

    def remind_queue(self, server_name: str) -> bool:
        """Lets Synapse's queue send what it has for a server; whether it has anything.

        So that we do not overtake it, and nothing is sent twice.
        """
        queue = self._sender._get_per_destination_queue(server_name)
        if queue is None:
            return False
        # What it is about to send it may have taken out already.
        is_sending: bool = queue.transmission_loop_running
        if not (is_sending or queue.pending_pdu_count() or queue._catching_up):
            return False
        queue.attempt_new_transaction()
        return True


@contextmanager
def _as_request_failed() -> Iterator[None]:
    """Says what went wrong, without what the other server wrote."""
    try:
        with noting_retry_after() as seconds:
            yield
    except (HttpResponseException, RequestSendFailed, FederationDeniedError) as error:
        cause = error.inner_exception if isinstance(error, RequestSendFailed) else error
        if isinstance(cause, HttpResponseException):
            code, body_ms = _read_error(cause.response)
            asked_ms = max(body_ms, *(1_000 * count for count in seconds), 0)
            retry_after_ms = min(asked_ms, _LONGEST_RETRY_AFTER_MS)
            raise RequestFailed(
                f"it answered {cause.code}", cause.code, code, retry_after_ms
            ) from error
        raise RequestFailed(type(cause).__name__) from error
    except RecursionError as error:
        raise RequestFailed("its answer is nested too deeply") from error


def _read_error(body: bytes) -> tuple[str, int]:
    """Return the Matrix code of an error, and how long the server wants to be left alone."""
    try:
        error = json.loads(body)
    except (ValueError, RecursionError):
        return "", 0
    if error == "":
        # That is all that Synapse says if it does not have an event.
        return "M_NOT_FOUND", 0
    if not isinstance(error, Mapping):
        return "", 0
    code, asked_ms = error.get("errcode"), error.get("retry_after_ms")
    if type(asked_ms) is not int or asked_ms < 0:
        asked_ms = 0
    return code if isinstance(code, str) else "", asked_ms


class _ShortAnswer(JsonParser):
    """An event at most; whatever else a server sends is not read."""

    MAX_RESPONSE_SIZE = 128 * 1024


class _History(JsonParser):
    """As many events as Synapse tells at once, of ordinary sizes."""

    MAX_RESPONSE_SIZE = 1024 * 1024


def _key(pdu: object) -> tuple[str, str] | None:
    """Return the sender and the content's hash of an event: together no other event has them.

    Others may put the same hash into an event, which Synapse redacts then, but not the sender.
    """
    if not isinstance(pdu, Mapping) or not isinstance(pdu.get("hashes"), Mapping):
        return None
    sender, found = pdu.get("sender"), pdu["hashes"].get("sha256")
    return (sender, found) if isinstance(sender, str) and isinstance(found, str) else None


class _NoWarningWhenAsking(logging.Filter):
    """Whether a server has an event is an open question, and "no" is no failure."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (_asking.get() and record.levelno == logging.WARNING)
