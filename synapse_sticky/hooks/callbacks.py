# SPDX-License-Identifier: AGPL-3.0-or-later
"""Synapse asks here what local users may send and create.

A spam checker judges an event when Synapse has found out that its sender is joined, and
that the request is not a repeated one. Synapse also asks spam checkers about the events of
other servers, and about our own that come back by backfill: the events that a process
creates itself are told apart by a context variable.

Nobody asks a spam checker when a delayed event is scheduled, so that is judged here too.
It is not judged again when it comes due: Synapse forgets a delayed event that it cannot
send, and a call would keep a participant who has left.
"""

from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any, Final

import attr
from synapse.api.errors import Codes, SynapseError
from synapse.events import EventBase
from synapse.handlers.delayed_events import DelayedEventsHandler
from synapse.handlers.message import EventCreationHandler
from synapse.module_api import NOT_SPAM, ModuleApi
from synapse.server import HomeServer
from synapse.types import JsonDict
from synapse.util import async_helpers

from synapse_sticky.control.gate import Gate
from synapse_sticky.hooks.sharing import synapses, wrap_for
from synapse_sticky.protocol import EVENT_KEY
from synapse_sticky.room_settings import SETTINGS_TYPE, mistake_in, settings_content
from synapse_sticky.seams.checks import require
from synapse_sticky.seams.events import has_stickiness
from synapse_sticky.seams.failures import shielded


@attr.s(slots=True, auto_attribs=True, eq=False)
class _Send:
    """An event that this process is creating, to be judged once."""

    requester: Any
    is_judged: bool = False


_DUE: Final = _Send(None, is_judged=True)
_current: ContextVar[_Send | None] = ContextVar("synapse_sticky_send", default=None)


class SenderCallbacks:
    """Refuses sticky events that local users may not send, and settings that say nothing."""

    def __init__(self, hs: HomeServer, gate: Gate) -> None:
        self._store: Any = hs.get_datastores().main
        require(self._store, "check_local_user_in_room", "user_id", "room_id")
        require(async_helpers, "DoneAwaitable", "value")
        self._gate = gate
        self._passes: Awaitable[Any] = async_helpers.DoneAwaitable(NOT_SPAM)

    def install(self, hs: HomeServer, api: ModuleApi) -> None:
        """Let Synapse ask about the events that it creates and schedules for local users."""
        _note_what_is_created(hs)
        _judge_when_scheduled(hs, self.judge_scheduled)
        api.register_spam_checker_callbacks(check_event_for_spam=self.check_event_for_spam)

    def check_event_for_spam(self, event: EventBase) -> Awaitable[Any]:
        """Judge an event that this process is creating, and let all others through."""
        send = _current.get()
        return self._passes if send is None or send.is_judged else self._judge(send, event)

    async def _judge(self, send: _Send, event: EventBase) -> Any:
        if has_stickiness(event):
            await _raise_refusal(self._gate.refusal(send.requester, event.room_id))
        elif event.type == SETTINGS_TYPE:
            _raise_mistake(event.content)
        # Synapse asks again if it has to create the event once more.
        send.is_judged = True
        return NOT_SPAM

    async def judge_scheduled(self, requester: Any, event: JsonDict) -> None:
        """Judge a delayed event, as the arguments describe it with which Synapse schedules it."""
        if event["sticky_duration_ms"] is not None:
            await _raise_refusal(self._refusal_if_joined(requester, event["room_id"]))
        elif _is_settings(event["event_type"], event["state_key"]):
            _raise_mistake(event["content"])

    async def _refusal_if_joined(self, requester: Any, room_id: str) -> SynapseError | None:
        # Others are not told the room's settings. Synapse refuses them.
        if await self._store.check_local_user_in_room(requester.user.to_string(), room_id):
            return await self._gate.refusal(requester, room_id)
        return None


class CreatorCallbacks:
    """Refuses new rooms whose settings say nothing, and adds the configured settings."""

    def __init__(self, enabled: bool | None) -> None:
        # What the settings of new rooms say, None to add none.
        self._enabled = enabled

    def install(self, api: ModuleApi) -> None:
        """Let Synapse ask about the rooms that it creates for local users."""
        api.register_third_party_rules_callbacks(on_create_room=self.on_create_room)

    async def on_create_room(self, requester: Any, request: JsonDict, is_admin: bool) -> None:
        """Judge a request, and change it."""
        initial_state = request.get("initial_state", [])
        if not isinstance(initial_state, list):
            # Synapse refuses it.
            return
        has_settings = False
        for event in filter(_is_object, initial_state):
            if _is_settings(event.get("type"), event.get("state_key", "")):
                _raise_mistake(event.get("content"))
                has_settings = True
        if self._enabled is not None and not has_settings:
            settings = {"type": SETTINGS_TYPE, "content": settings_content(self._enabled)}
            request["initial_state"] = [*initial_state, settings]


def _note_what_is_created(hs: HomeServer) -> None:
    create = synapses(EventCreationHandler, "create_and_send_nonmember_event")

    def create_and_send_nonmember_event(
        self: Any, requester: Any, event_dict: JsonDict, *args: Any, **kwargs: Any
    ) -> Any:
        is_judged = EVENT_KEY in event_dict or _is_settings(
            event_dict["type"], event_dict.get("state_key")
        )
        if is_judged and _current.get() is not _DUE:
            send = _Send(requester)
            return _during(send, create, self, requester, event_dict, *args, **kwargs)
        return create(self, requester, event_dict, *args, **kwargs)

    wrap_for(
        hs,
        EventCreationHandler,
        "create_and_send_nonmember_event",
        create_and_send_nonmember_event,
        "requester",
        "event_dict",
    )


def _judge_when_scheduled(
    hs: HomeServer, judge: Callable[[Any, JsonDict], Awaitable[None]]
) -> None:
    add = synapses(DelayedEventsHandler, "add")
    send_event = synapses(DelayedEventsHandler, "_send_event")

    async def add_delayed_event(self: Any, requester: Any, **event: Any) -> Any:
        await judge(requester, event)
        return await add(self, requester, **event)

    def send_due_event(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _during(_DUE, send_event, self, *args, **kwargs)

    names = ("room_id", "event_type", "state_key", "content", "sticky_duration_ms")
    wrap_for(hs, DelayedEventsHandler, "add", add_delayed_event, "requester", *names)
    wrap_for(hs, DelayedEventsHandler, "_send_event", send_due_event)


async def _during(send: _Send, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    token = _current.set(send)
    try:
        return await original(*args, **kwargs)
    finally:
        # For what was started meanwhile, and goes on in the same context.
        send.is_judged = True
        _current.reset(token)


async def _raise_refusal(refusal: Awaitable[SynapseError | None]) -> None:
    error: SynapseError | None = None
    with shielded("Cannot judge a sticky event of a local user: it is let through"):
        error = await refusal
    if error is not None:
        raise error


def _raise_mistake(content: object) -> None:
    mistake = mistake_in(content)
    if mistake is not None:
        raise SynapseError(400, mistake, Codes.BAD_JSON)


def _is_settings(event_type: object, state_key: object) -> bool:
    """Whether an event with these holds the settings of its room."""
    return event_type == SETTINGS_TYPE and state_key == ""


def _is_object(value: object) -> bool:
    return isinstance(value, dict)
