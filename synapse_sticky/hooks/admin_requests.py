# SPDX-License-Identifier: AGPL-3.0-or-later
"""Serves the admin API, to those whom Synapse's own admin API serves."""

import re
from collections.abc import Iterable
from typing import Any, Final

from synapse.http.server import JsonResource, finish_request
from synapse.http.site import SynapseRequest
from synapse.module_api import ModuleApi
from synapse.rest.admin import _base
from synapse.server import HomeServer
from synapse.types import JsonDict
from twisted.web.http import CACHED

from synapse_sticky.protocol import ADMIN_API_PATH
from synapse_sticky.seams import requests
from synapse_sticky.seams.checks import require
from synapse_sticky.seams.requests import AdminRequest, Document, Route

# In Synapse's metrics and logs, where its own servlets have their class names.
_SERVLET: Final = "StickyAdminRestServlet"


def install(hs: HomeServer, api: ModuleApi, routes: Iterable[Route]) -> None:
    """Make the homeserver serve these, wherever this process listens."""
    requests.check()
    require(JsonResource, "register_paths", "method", "path_patterns", "callback")
    require(_base, "assert_user_is_admin", "auth", "requester")
    resource = JsonResource(hs, canonical_json=False)
    for route in routes:
        path = re.escape(f"{ADMIN_API_PATH}/{route.path}")
        pattern = re.compile("^" + re.sub(r"\\{(\w+)\\}", r"(?P<\1>[^/]+)", path) + "$")
        resource.register_paths(route.method, [pattern], _callback(hs, route), _SERVLET)
    api.register_web_resource(ADMIN_API_PATH, resource)


def _callback(hs: HomeServer, route: Route) -> Any:
    auth = hs.get_auth()

    async def answer(request: SynapseRequest, **names: str) -> tuple[int, JsonDict] | None:
        user_id = ""
        if not route.is_public:
            requester = await auth.get_user_by_req(request)
            await _base.assert_user_is_admin(auth, requester)
            user_id = requester.user.to_string()
        found = await route.handler(AdminRequest(user_id, request), **names)
        if isinstance(found, Document):
            _send(request, found)
            # Nothing is left to do for Synapse.
            return None
        return 200, found

    return answer


def _send(request: Any, document: Document) -> None:
    request.setResponseCode(document.code)
    for name, value in document.headers.items():
        request.setHeader(name, value)
    is_known = document.etag and request.setETag(document.etag.encode()) is CACHED
    if not is_known:
        request.setHeader("Content-Length", str(len(document.body)))
        # To HEAD Twisted sends the headers alone.
        request.write(document.body)
    finish_request(request)
