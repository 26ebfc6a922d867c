# SPDX-License-Identifier: AGPL-3.0-or-later
"""The page for admins: files that a browser shows, and that ask the admin API for all the rest.

They hold no data, so anybody may have them. The browser sends the token of an admin with each
request to the API.
"""

import hashlib
from functools import partial
from importlib.resources import files
from typing import Final

from synapse_sticky.seams.requests import AdminRequest, Document, Route

_HTML: Final = "text/html; charset=utf-8"
_CSS: Final = "text/css; charset=utf-8"
_JAVASCRIPT: Final = "text/javascript; charset=utf-8"
_SVG: Final = "image/svg+xml"

# What there is, by its path below the API. The addresses in the files are relative to theirs, so
# that they work behind any prefix.
_FILES: Final = {
    "page": ("index.html", _HTML),
    "page/style.css": ("style.css", _CSS),
    "page/icon.svg": ("icon.svg", _SVG),
    **{
        f"page/{name}": (name, _JAVASCRIPT)
        for name in (
            "api.js",
            "blocks.js",
            "dialogs.js",
            "dom.js",
            "live.js",
            "main.js",
            "room.js",
            "rooms.js",
            "rows.js",
            "servers.js",
            "view.js",
            "words.js",
        )
    },
}

_POLICY: Final = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        # No text becomes markup or a script by mistake.
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    ]
)

HEADERS: Final = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": _POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
"""What goes with each file."""


def routes() -> list[Route]:
    """Return the endpoints that serve the page."""
    served = [
        Route("GET", path, partial(_serve, _read(name, content_type)), is_public=True)
        for path, (name, content_type) in _FILES.items()
    ]
    elsewhere = Document(b"", {**HEADERS, "Location": "../page"}, code=308)
    return [*served, Route("GET", "page/", partial(_serve, elsewhere), is_public=True)]


async def _serve(document: Document, request: AdminRequest) -> Document:
    return document


def _read(name: str, content_type: str) -> Document:
    body = files(__package__).joinpath("static", name).read_bytes()
    etag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    return Document(body, {**HEADERS, "Content-Type": content_type}, etag=etag)
