# SPDX-License-Identifier: AGPL-3.0-or-later
"""Sending: the query parameter of ``/send``, and the flag of ``/versions``.

Synapse can do the sending itself, delayed events included, but only does so
with its own implementation switched on. Its check of the parameter is laxer
than the MSC's range, so ours comes first.
"""

from typing import Any

from synapse.api.errors import Codes, SynapseError
from synapse.http.site import SynapseRequest
from synapse.rest.client import room, versions
from synapse.server import HomeServer
from synapse.types import JsonDict

from synapse_sticky.hooks.classes import use_instead
from synapse_sticky.protocol import QUERY_PARAMETER, VERSIONS_FLAG
from synapse_sticky.seams.checks import require
from synapse_sticky.stickiness import parse_duration_parameter


def check() -> None:
    """Refuses to start if Synapse's servlets have changed."""
    require(room.RoomSendEventRestServlet, "_do", "request", "requester", "room_id", "txn_id")
    require(versions.VersionsRestServlet, "on_GET", "request")


def install() -> None:
    """Makes the homeserver build servlets that take and announce the parameter."""
    use_instead(room, "RoomSendEventRestServlet", StickySendServlet)
    use_instead(versions, "VersionsRestServlet", StickyVersionsServlet)


class StickySendServlet(room.RoomSendEventRestServlet):
    """``/rooms/{roomId}/send`` that takes a sticky duration."""

    def __init__(self, hs: HomeServer) -> None:
        super().__init__(hs)
        require(self, "_msc4354_enabled")
        self._msc4354_enabled = True

    async def _do(self, request: SynapseRequest, *args: Any, **kwargs: Any) -> tuple[int, JsonDict]:
        assert request.args is not None
        values = request.args.get(QUERY_PARAMETER.encode())
        if values is not None:
            try:
                parse_duration_parameter(values)
            except ValueError as error:
                raise SynapseError(400, str(error), Codes.INVALID_PARAM) from None
        return await super()._do(request, *args, **kwargs)


class StickyVersionsServlet(versions.VersionsRestServlet):
    """``/versions`` that says that sticky events are there."""

    async def on_GET(self, request: SynapseRequest) -> tuple[int, JsonDict]:
        code, body = await super().on_GET(request)
        features = {**body.get("unstable_features", {}), VERSIONS_FLAG: True}
        return code, {**body, "unstable_features": features}
