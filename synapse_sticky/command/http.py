# SPDX-License-Identifier: AGPL-3.0-or-later
"""Requests to a homeserver, each bounded in time and size."""

import http.client
import json
import secrets
import socket
import ssl
import time
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import quote, urlencode, urlsplit

import attr

from synapse_sticky.command.report import sentence

JsonDict = dict[str, Any]

_LARGEST_ANSWER: Final = 50_000_000
_CHUNK: Final = 65_536


class Unreachable(Exception):
    """No answer. The text says why, as a sentence."""


class Refused(Exception):
    """An answer that is no success."""

    def __init__(self, status: int, errcode: str, error: str) -> None:
        super().__init__(f"{status} {errcode}: {error}" if errcode else f"{status} {error}")
        self.status = status
        self.errcode = errcode


@attr.s(slots=True, frozen=True, auto_attribs=True)
class Place:
    """Where a homeserver listens: the base URL of its client API, or a Unix socket."""

    url: str
    socket_path: str | None = None

    def connect(self, timeout_s: float) -> http.client.HTTPConnection:
        """Return a connection, which is not open yet."""
        if self.socket_path is not None:
            return _UnixConnection(self.socket_path, timeout_s)
        parts = urlsplit(self.url)
        assert parts.hostname is not None
        if parts.scheme == "https":
            return http.client.HTTPSConnection(
                parts.hostname, parts.port, timeout=timeout_s, context=ssl.create_default_context()
            )
        return http.client.HTTPConnection(parts.hostname, parts.port, timeout=timeout_s)

    @property
    def prefix(self) -> str:
        """The path of the base URL, which stands before that of each request."""
        return "" if self.socket_path is not None else urlsplit(self.url).path.rstrip("/")

    def __str__(self) -> str:
        return self.url


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        """Open the socket."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def place_of(url: str) -> Place:
    """Return the place that an admin has given.

    Raises:
        ValueError: if it is no base URL.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.username:
        raise ValueError(f"{url!r} is no base URL such as https://matrix.example.com")
    _ = parts.port
    return Place(url)


@attr.s(slots=True, frozen=True, auto_attribs=True)
class Client:
    """Sends requests as one user, or as nobody.

    It follows no redirect: the token is for the server that was named.
    """

    place: Place
    token: str | None = attr.ib(default=None, repr=False)
    timeout_s: float = 30

    def get(self, path: str, timeout_s: float | None = None, **params: object) -> JsonDict:
        """Return the answer to a GET."""
        return self.request("GET", path, params=params, timeout_s=timeout_s)

    def post(self, path: str, body: JsonDict, timeout_s: float | None = None) -> JsonDict:
        """Return the answer to a POST."""
        return self.request("POST", path, body, timeout_s=timeout_s)

    def put(self, path: str, body: JsonDict, **params: object) -> JsonDict:
        """Return the answer to a PUT."""
        return self.request("PUT", path, body, params=params)

    def request(
        self,
        method: str,
        path: str,
        body: JsonDict | None = None,
        params: Mapping[str, object] | None = None,
        timeout_s: float | None = None,
    ) -> JsonDict:
        """Return the JSON of an answer.

        Raises:
            Unreachable: if there is none in time, or it is none of Matrix.
            Refused: if it is an error.
        """
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        wanted = {name: value for name, value in (params or {}).items() if value is not None}
        target = self.place.prefix + path + (f"?{urlencode(wanted)}" if wanted else "")
        try:
            status, text = self._exchange(method, target, body, timeout_s)
        except TimeoutError:
            raise Unreachable(f"{self.place} has not answered for {timeout_s:g} s.") from None
        except ssl.SSLError as error:
            raise Unreachable(
                f"{self.place} has no certificate that this machine trusts: {sentence(error)}"
            ) from error
        except (OSError, http.client.HTTPException) as error:
            raise Unreachable(
                f"{self.place} cannot be reached: {sentence(error or type(error).__name__)}"
            ) from error
        return _parsed(self.place, status, text)

    def _exchange(
        self, method: str, target: str, body: JsonDict | None, timeout_s: float
    ) -> tuple[int, bytes]:
        deadline = time.monotonic() + timeout_s
        connection = self.place.connect(timeout_s)
        headers = {"Accept": "application/json", "User-Agent": "synapse-sticky"}
        if self.token is not None:
            headers["Authorization"] = f"Bearer {self.token}"
        content = None
        if body is not None:
            content = json.dumps(body).encode()
            headers["Content-Type"] = "application/json"
        try:
            connection.request(method, target, content, headers)
            response = connection.getresponse()
            text = b""
            while chunk := response.read1(_CHUNK):
                text += chunk
                if time.monotonic() > deadline:
                    raise TimeoutError
                if len(text) > _LARGEST_ANSWER:
                    raise http.client.HTTPException("the answer is too large")
            return response.status, text
        finally:
            connection.close()


def _parsed(place: Place, status: int, text: bytes) -> JsonDict:
    try:
        answer = json.loads(text)
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        if 200 <= status < 300:
            raise Unreachable(f"{place} does not answer as a Matrix server does.")
        raise Refused(status, "", http.client.responses.get(status, ""))
    if not 200 <= status < 300:
        raise Refused(status, str(answer.get("errcode", "")), str(answer.get("error", "")))
    return answer


def quoted(*parts: str) -> str:
    """Return parts of a path, joined."""
    return "/".join(quote(part, safe="") for part in parts)


def new_name() -> str:
    """Return a name that nobody else uses, for a transaction."""
    return f"synapse-sticky-{secrets.token_hex(8)}"
