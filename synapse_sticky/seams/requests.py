# SPDX-License-Identifier: AGPL-3.0-or-later
"""Requests of the server's admins, as Synapse parses them; and the names in their paths."""

from collections.abc import Awaitable, Callable, Mapping
from typing import Final

import attr
from synapse.http import servlet
from synapse.http.site import SynapseRequest
from synapse.types import JsonDict
from synapse.util import stringutils

from synapse_sticky.seams.checks import require

MAX_LIMIT: Final = 1000
"""The most entries on a page, since a page is built in one go."""

# The largest number that every JSON parser and every database takes.
_MAX_FROM: Final = 2**53 - 1


@attr.s(slots=True, frozen=True, auto_attribs=True)
class AdminRequest:
    """A request of a server's admin, who has been checked.

    Attributes:
        user_id: who asks; empty where anybody may ask.
    """

    user_id: str
    _request: SynapseRequest

    def page(self) -> tuple[int, int]:
        """Return from where on, and how many entries the request asks for.

        Raises:
            SynapseError: 400 if the parameters are no whole numbers from 0 on.
        """
        start = servlet.parse_integer(self._request, "from", default=0)
        limit = servlet.parse_integer(self._request, "limit", default=100)
        return min(start, _MAX_FROM), min(limit, MAX_LIMIT)

    def flag(self, name: str) -> bool | None:
        """Return a parameter that is true or false, None if it is not given.

        Raises:
            SynapseError: 400 if it is neither.
        """
        return servlet.parse_boolean(self._request, name)

    def text(self, name: str) -> str:
        """Return a parameter that is a text, empty if it is not given."""
        return servlet.parse_string(self._request, name, default="", encoding="utf-8")

    def choice(self, name: str, allowed: tuple[str, ...]) -> str:
        """Return a parameter that is one of these texts, the first if it is not given.

        Raises:
            SynapseError: 400 if it is another one.
        """
        return servlet.parse_string(self._request, name, default=allowed[0], allowed_values=allowed)

    def body(self) -> JsonDict:
        """Return the JSON object in the body.

        Raises:
            SynapseError: 400 if it is none.
        """
        return servlet.parse_json_object_from_request(self._request)


@attr.s(slots=True, frozen=True, auto_attribs=True)
class Document:
    """An answer that is not JSON.

    Attributes:
        etag: changes with the body; empty if the answer is not to be cached.
    """

    body: bytes
    headers: Mapping[str, str]
    code: int = 200
    etag: str = ""


Handler = Callable[..., Awaitable[JsonDict | Document]]
"""Called with an :class:`AdminRequest`, and with the IDs in the path by their names."""


@attr.s(slots=True, frozen=True, auto_attribs=True)
class Route:
    """An endpoint.

    Attributes:
        path: below that of the API; ``{name}`` stands for an ID.
        handler: returns the answer.
        is_public: whether anybody may ask.
    """

    method: str
    path: str
    handler: Handler
    is_public: bool = False


def check() -> None:
    """Refuse to start if Synapse does not parse requests as expected."""
    require(servlet, "parse_integer", "request", "name", "default")
    require(servlet, "parse_boolean", "request", "name")
    require(servlet, "parse_string", "request", "name", "default", "allowed_values", "encoding")
    require(servlet, "parse_json_object_from_request", "request")
    require(stringutils, "parse_and_validate_server_name", "server_name")


def is_server_name(text: str) -> bool:
    """Whether this may be the name of a server."""
    try:
        stringutils.parse_and_validate_server_name(text)
    except ValueError:
        return False
    return True
