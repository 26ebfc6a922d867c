# SPDX-License-Identifier: AGPL-3.0-or-later
"""Gives every sticky event its remaining time, on every endpoint that returns it."""

import copy
from collections.abc import Awaitable, Callable
from typing import Any, Final

from synapse.events import EventBase
from synapse.module_api import ModuleApi
from synapse.server import HomeServer
from synapse.types import JsonDict

from synapse_sticky.hooks.guard import shielded
from synapse_sticky.protocol import REMAINING_KEY
from synapse_sticky.seams.background import Clock
from synapse_sticky.seams.checks import require
from synapse_sticky.seams.events import has_stickiness, sticky_duration_ms

_NOTHING: Final[JsonDict] = {}


def add_remaining_time(
    api: ModuleApi,
    hs: HomeServer,
    clock: Clock,
    is_noticed: Callable[[str], bool],
    expires_ts: Callable[[str, int, int], Awaitable[int]],
) -> None:
    """Give every sticky event that any client is sent its remaining time.

    Args:
        is_noticed: whether the event of this ID is known to be sticky.
        expires_ts: of an event, from its ID, duration and ``origin_server_ts``.
    """

    async def remaining(event: EventBase) -> JsonDict:
        # This runs for every event that any client is sent: first the test that
        # nearly all of them fail.
        if not is_noticed(event.event_id) and not has_stickiness(event):
            return _NOTHING
        with shielded("Cannot tell a client how long an event remains sticky"):
            duration_ms = sticky_duration_ms(event)
            if not duration_ms:
                return _NOTHING
            expiry = await expires_ts(event.event_id, duration_ms, event.origin_server_ts)
            remaining_ms = expiry - clock.now_ts()
            if remaining_ms > 0:
                return {REMAINING_KEY: remaining_ms}
        return _NOTHING

    api.register_add_extra_fields_to_unsigned_client_event_callbacks(
        add_field_to_unsigned_callback=remaining
    )
    _tolerate_filters_without_unsigned(hs)


def _tolerate_filters_without_unsigned(hs: HomeServer) -> None:
    """Before 1.157, additions to ``unsigned`` fail if ``event_fields`` leaves none of it.

    Then they are made here, as far as the client wants them.
    """
    serializer: Any = hs.get_event_client_serializer()
    if hasattr(serializer, "create_config"):
        return
    require(serializer, "serialize_event", "event", "time_now", "config")
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

    serializer.serialize_event = serialize_event
