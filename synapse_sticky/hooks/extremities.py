# SPDX-License-Identifier: AGPL-3.0-or-later
"""Serves MSC4370: what this server would refer to if it sent an event now.

Newer releases of Synapse have an implementation of their own, behind a flag. It
answers 403 where the MSC asks for 404, and lists more than the ten events that
Synapse refers to.
"""

import logging
from typing import Any

from synapse.api.errors import Codes, NotFoundError, SynapseError
from synapse.federation.transport import server
from synapse.federation.transport.server._base import BaseFederationServlet
from synapse.http.server import HttpServer
from synapse.server import HomeServer
from synapse.types import JsonDict
from synapse.util.stringutils import parse_and_validate_server_name

from synapse_sticky.hooks.sharing import is_noted, note
from synapse_sticky.protocol import EXTREMITIES_PREFIX
from synapse_sticky.seams.checks import require

logger = logging.getLogger(__name__)

_SERVLET_GROUP = "synapse_sticky"


def install(hs: HomeServer) -> None:
    """Makes the homeserver serve it, on every process that serves federation."""
    if getattr(hs.config.experimental, "msc4370_enabled", False):
        logger.info(
            "Synapse's own `msc4370_enabled` is on: synapse_sticky leaves the endpoint for a "
            "room's extremities to it"
        )
        return
    require(server, "SERVLET_GROUPS")
    require(BaseFederationServlet, "register")
    server.SERVLET_GROUPS[_SERVLET_GROUP] = (ExtremitiesServlet,)
    note(hs, ExtremitiesServlet, ExtremitiesServlet)


class ExtremitiesServlet(BaseFederationServlet):
    """``GET /_matrix/federation/unstable/org.matrix.msc4370/extremities/{roomId}``"""

    PREFIX = EXTREMITIES_PREFIX
    PATH = "/extremities/(?P<room_id>[^/]*)"
    CATEGORY = "Federation requests"

    def __init__(self, hs: HomeServer, *args: Any, **kwargs: Any) -> None:
        super().__init__(hs, *args, **kwargs)
        self._is_served = is_noted(hs, ExtremitiesServlet)
        self._store: Any = hs.get_datastores().main
        self._federation_server = hs.get_federation_server()
        self._event_auth_handler = hs.get_event_auth_handler()
        require(self._store, "get_prev_events_for_room", "room_id")
        require(self._store, "get_room_version_id", "room_id")
        require(self._federation_server, "check_server_matches_acl", "server_name", "room_id")
        require(self._event_auth_handler, "assert_host_in_room", "room_id", "host")

    def register(self, server: HttpServer) -> None:
        """Serve it, if this homeserver of the process is to."""
        if self._is_served:
            super().register(server)

    async def on_GET(
        self, origin: str, content: None, query: dict[bytes, list[bytes]], room_id: str
    ) -> tuple[int, JsonDict]:
        """Answers an authenticated server.

        Raises:
            SynapseError: 404 for a room unknown here, 403 if the asking server is
                not in it or is denied by its ACL.
        """
        if "\0" in room_id:
            # PostgreSQL does not even take the question.
            raise _unknown_room()
        try:
            await self._store.get_room_version_id(room_id)
        except NotFoundError:
            raise _unknown_room() from None
        # First, so that the ACL is not shown to those outside.
        await self._event_auth_handler.assert_host_in_room(room_id, origin)
        host, _ = parse_and_validate_server_name(origin)
        await self._federation_server.check_server_matches_acl(host, room_id)
        prev_events = await self._store.get_prev_events_for_room(room_id)
        if not prev_events:
            raise _unknown_room()
        return 200, {"prev_events": prev_events}


def _unknown_room() -> SynapseError:
    return SynapseError(404, "Unknown room", Codes.NOT_FOUND)
