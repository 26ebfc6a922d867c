# SPDX-License-Identifier: AGPL-3.0-or-later
"""Sending: the sticky duration that clients ask for, and the flag of ``/versions``.

Synapse can do the sending itself, delayed events included, but only does so
with its own implementation switched on. Its check of the duration is laxer
than the MSC's range, so ours comes first.
"""

import json
from collections.abc import Callable
from typing import Any

from synapse.api.errors import Codes, SynapseError
from synapse.http.site import SynapseRequest
from synapse.rest.client import room, versions
from synapse.server import HomeServer
from synapse.types import JsonDict

from synapse_sticky.hooks.classes import use_instead
from synapse_sticky.hooks.sharing import synapses
from synapse_sticky.protocol import DURATION_PARAMETER, VERSIONS_FLAG
from synapse_sticky.seams.checks import require
from synapse_sticky.stickiness import check_duration, parse_duration_parameter

# From 1.164 delayed events have an endpoint of their own, beside a parameter of `/send`.
_DELAYED_EVENTS = "RoomDelayedEventRestServlet"


def check() -> None:
    """Refuse to start if Synapse's servlets have changed."""
    require(room.RoomSendEventRestServlet, "_do", "request", "requester", "room_id", "txn_id")
    if hasattr(room, _DELAYED_EVENTS):
        require(getattr(room, _DELAYED_EVENTS), "_do", "request", "requester", "room_id")
    require(versions.VersionsRestServlet, "on_GET", "request")


def install(hs: HomeServer) -> None:
    """Make the homeserver build servlets that take and announce the duration."""
    servlet = _taking_duration(synapses(room, "RoomSendEventRestServlet"), _check_query)
    use_instead(hs, room, "RoomSendEventRestServlet", servlet)
    if hasattr(room, _DELAYED_EVENTS):
        servlet = _taking_duration(synapses(room, _DELAYED_EVENTS), _check_query_and_body)
        use_instead(hs, room, _DELAYED_EVENTS, servlet)
    use_instead(hs, versions, "VersionsRestServlet", StickyVersionsServlet)


def _taking_duration(servlet: Any, check: Callable[[SynapseRequest], None]) -> Any:
    """Return a subclass of this servlet of Synapse's that takes a sticky duration.

    Args:
        servlet: Synapse's class, which takes the duration if its own flag is on.
        check: raises ``ValueError`` for a request whose duration is not valid.
    """

    class StickyServlet(servlet):  # type: ignore[misc]
        """Synapse's servlet, taking a sticky duration."""

        def __init__(self, hs: HomeServer) -> None:
            super().__init__(hs)
            require(self, "_msc4354_enabled")
            self._msc4354_enabled = True

        async def _do(self, request: SynapseRequest, *args: Any, **kwargs: Any) -> Any:
            try:
                check(request)
            except ValueError as error:
                raise SynapseError(400, str(error), Codes.INVALID_PARAM) from None
            return await super()._do(request, *args, **kwargs)

    return StickyServlet


def _check_query(request: SynapseRequest) -> None:
    assert request.args is not None
    values = request.args.get(DURATION_PARAMETER.encode())
    if values is not None:
        parse_duration_parameter(values)


def _check_query_and_body(request: SynapseRequest) -> None:
    _check_query(request)
    assert request.content is not None
    raw = request.content.read()
    request.content.seek(0)
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        # Synapse says so, in its own way.
        return
    if isinstance(body, dict) and DURATION_PARAMETER in body:
        check_duration(body[DURATION_PARAMETER])


class StickyVersionsServlet(versions.VersionsRestServlet):
    """``/versions`` that says that sticky events are there."""

    async def on_GET(self, request: SynapseRequest) -> tuple[int, JsonDict]:
        code, body = await super().on_GET(request)
        features = {**body.get("unstable_features", {}), VERSIONS_FLAG: True}
        return code, {**body, "unstable_features": features}
