# SPDX-License-Identifier: AGPL-3.0-or-later
"""Gives every sticky event its remaining time, on every endpoint that returns it.

Synapse asks a callback for more to put into an event's ``unsigned``. It does not ask

- for the redaction that it puts into what that redacted;
- up to 1.150, where it formats events by a function of its own: in the transactions of
  application services, for ``/state/{type}?format=event``, and for an admin's ``fetch_event``.

There the time is added to the formatted event.
"""

import copy
from collections.abc import Awaitable, Callable
from operator import attrgetter
from typing import Any, Final

from synapse.appservice import api as appservice_api
from synapse.events import EventBase
from synapse.http.servlet import parse_string
from synapse.http.site import SynapseRequest
from synapse.module_api import ModuleApi
from synapse.rest.admin import events as admin_rest
from synapse.rest.client import room as room_rest
from synapse.server import HomeServer
from synapse.types import JsonDict

from synapse_sticky import stickiness
from synapse_sticky.hooks.guard import wrap
from synapse_sticky.hooks.sharing import synapses, wrap_for
from synapse_sticky.protocol import EVENT_KEY, REMAINING_KEY
from synapse_sticky.seams.background import Clock
from synapse_sticky.seams.checks import require
from synapse_sticky.seams.events import has_stickiness, keeps_stickiness, sticky_duration_ms
from synapse_sticky.seams.failures import shielded

_NOTHING: Final[JsonDict] = {}

_CONSEQUENCE: Final = "Cannot tell a client how long an event remains sticky"


def add_remaining_time(
    api: ModuleApi,
    hs: HomeServer,
    clock: Clock,
    noticed_until_ts: Callable[[str], int | None],
    sticky_until_ts: Callable[[str, int, int], Awaitable[int]],
    has_passed: Callable[[str | None, int], bool],
) -> None:
    """Give every sticky event that any client is sent its remaining time.

    Args:
        noticed_until_ts: until when the event of this ID is sticky, 0 if it is held, None if it
            is not known.
        sticky_until_ts: the same for any event, from its ID, duration and ``origin_server_ts``.
        has_passed: whether everything that matters is known up to an event, from the name of
            its writer and its place in the stream.
    """

    def is_settled(event: EventBase) -> bool:
        """Whether the indexer has passed an event that is not known: then it is an ordinary one."""
        written = event.internal_metadata
        with shielded(_CONSEQUENCE):
            return written.stream_ordering is not None and has_passed(
                written.instance_name, written.stream_ordering
            )
        return False

    async def remaining(event: EventBase) -> JsonDict:
        # This runs for every event that any client is sent: first what nearly all of them are.
        noticed_ts = noticed_until_ts(event.event_id)
        if noticed_ts is not None:
            return _field(noticed_ts - clock.now_ts()) if keeps_stickiness(event) else _NOTHING
        if not has_stickiness(event) or is_settled(event):
            return _NOTHING
        with shielded(_CONSEQUENCE):
            return await fields(event.event_id, sticky_duration_ms(event), event.origin_server_ts)
        return _NOTHING

    async def fields(event_id: str, duration_ms: int | None, origin_server_ts: int) -> JsonDict:
        if not duration_ms:
            return _NOTHING
        until_ts = await sticky_until_ts(event_id, duration_ms, origin_server_ts)
        return _field(until_ts - clock.now_ts())

    async def complete(formatted: JsonDict) -> None:
        sticky = formatted.get(EVENT_KEY)
        # A client may have asked for a few fields only.
        if sticky is not None and {"event_id", "origin_server_ts"} <= formatted.keys():
            formatted.setdefault("unsigned", {}).update(
                await fields(
                    formatted["event_id"],
                    stickiness.effective_duration_ms(sticky),
                    formatted["origin_server_ts"],
                )
            )

    async def complete_redaction(formatted: JsonDict) -> None:
        with shielded(_CONSEQUENCE):
            because = formatted.get("unsigned", _NOTHING).get("redacted_because")
            if because is not None:
                # One of Synapse's formats has it there as well.
                is_on_top = formatted.get("redacted_because") == because
                await complete(because)
                if is_on_top:
                    formatted["redacted_because"] = because

    async def complete_all(formatted: JsonDict) -> None:
        with shielded(_CONSEQUENCE):
            await complete(formatted)
        await complete_redaction(formatted)

    api.register_add_extra_fields_to_unsigned_client_event_callbacks(
        add_field_to_unsigned_callback=remaining
    )
    _tolerate_filters_without_unsigned(hs)
    _on_formatted_events(hs, complete_redaction)
    _on_events_formatted_apart(hs, complete_all)


def _field(remaining_ms: int) -> JsonDict:
    return {REMAINING_KEY: remaining_ms} if remaining_ms > 0 else _NOTHING


Complete = Callable[[JsonDict], Awaitable[None]]


def _on_formatted_events(hs: HomeServer, complete: Complete) -> None:
    """Call a function with each event that Synapse has formatted for a client."""
    serializer: Any = hs.get_event_client_serializer()
    serialize_one, serialize_many = serializer.serialize_event, serializer.serialize_events

    async def serialize_event(*args: Any, **kwargs: Any) -> Any:
        formatted = await serialize_one(*args, **kwargs)
        await complete(formatted)
        return formatted

    async def serialize_events(*args: Any, **kwargs: Any) -> Any:
        formatted = await serialize_many(*args, **kwargs)
        for event in formatted:
            if "redacted_because" in event.get("unsigned", _NOTHING):
                await complete(event)
        return formatted

    wrap(serializer, "serialize_event", serialize_event, "event", "time_now", "config")
    if hasattr(serializer, "create_config"):
        # Before 1.157 it calls the other.
        wrap(serializer, "serialize_events", serialize_events, "events", "time_now", "config")


def _on_events_formatted_apart(hs: HomeServer, complete: Complete) -> None:
    """Call a function with each event that Synapse formats without its serializer."""
    if hasattr(appservice_api, "serialize_event"):
        application_services = hs.get_application_service_api()
        put_json = application_services.put_json

        async def put_completed_json(uri: str, json_body: Any, *args: Any, **kwargs: Any) -> Any:
            for event in json_body.get("events", ()):
                await complete(event)
            return await put_json(uri, json_body, *args, **kwargs)

        wrap(application_services, "put_json", put_completed_json, "uri", "json_body")

    if hasattr(room_rest, "serialize_event"):
        get_state = synapses(room_rest.RoomStateEventRestServlet, "on_GET")

        async def get_completed_state(
            servlet: Any, request: SynapseRequest, *args: Any, **kwargs: Any
        ) -> tuple[int, JsonDict]:
            code, body = await get_state(servlet, request, *args, **kwargs)
            # Otherwise it is the content of an event, whatever it looks like.
            if parse_string(request, "format") == "event":
                await complete(body)
            return code, body

        wrap_for(
            hs,
            room_rest.RoomStateEventRestServlet,
            "on_GET",
            get_completed_state,
            "request",
            homeserver_of=attrgetter("auth.hs"),
        )

    if hasattr(admin_rest, "serialize_event"):
        fetch_event = synapses(admin_rest.EventRestServlet, "on_GET")

        async def fetch_completed_event(*args: Any, **kwargs: Any) -> tuple[int, JsonDict]:
            code, body = await fetch_event(*args, **kwargs)
            await complete(body["event"])
            return code, body

        wrap_for(
            hs,
            admin_rest.EventRestServlet,
            "on_GET",
            fetch_completed_event,
            "request",
            homeserver_of=attrgetter("_auth.hs"),
        )


def _tolerate_filters_without_unsigned(hs: HomeServer) -> None:
    """Before 1.157, additions to ``unsigned`` fail if ``event_fields`` leaves none of it.

    Then they are made here, as far as the client wants them.
    """
    serializer: Any = hs.get_event_client_serializer()
    if hasattr(serializer, "create_config"):
        return
    require(serializer, "_add_extra_fields_to_unsigned_client_event_callbacks")
    callbacks = serializer._add_extra_fields_to_unsigned_client_event_callbacks
    original = serializer.serialize_event
    plain = copy.copy(serializer)
    plain._add_extra_fields_to_unsigned_client_event_callbacks = []

    async def serialize_event(event: Any, time_now: int, **kwargs: Any) -> Any:
        fields = getattr(kwargs.get("config"), "only_event_fields", None)
        if not fields or not isinstance(event, EventBase):
            return await original(event, time_now, **kwargs)
        serialized = await plain.serialize_event(event, time_now, **kwargs)
        for callback in callbacks:
            for name, value in (await callback(event)).items():
                if "unsigned" in fields or f"unsigned.{name}" in fields:
                    serialized.setdefault("unsigned", {}).setdefault(name, value)
        return serialized

    wrap(serializer, "serialize_event", serialize_event, "event", "time_now", "config")
