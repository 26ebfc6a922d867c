# SPDX-License-Identifier: AGPL-3.0-or-later
"""Makes text of others fit to be printed. No Synapse, no clock."""

import re
import unicodedata
from collections.abc import Iterator, Mapping
from typing import Any, Final

# Names of options whose values nobody else may read.
_SECRET_NAME: Final = re.compile(
    r"(secret|password|passwd|_pass$|access_key|pepper|token|private_key|signing_key$|macaroon|credential|dsn)",
    re.I,
)
# Those that only have such a word in them: a place, a duration, a rate.
_PLAIN_NAME: Final = re.compile(r"^rc_|_(path|file|endpoint|uri|url|lifetime|ttl)$", re.I)
# A shorter text may well stand somewhere else by chance.
_SHORTEST_SECRET: Final = 4

HIDDEN: Final = "[hidden]"


def clean(text: str) -> str:
    """Return a text without characters that a terminal, or a reader, takes for something else.

    IDs and names come from other servers, and may hold escape sequences or turn the direction
    of the text around. The end of a line stays.
    """
    return "".join(c if c == "\n" or _is_plain(c) else _spelled_out(c) for c in text)


def clean_line(text: str) -> str:
    """Return a text as :func:`clean` does, in one line."""
    return clean(text.replace("\n", "\\n"))


def _is_plain(character: str) -> bool:
    return unicodedata.category(character)[0] not in "CZ" or character == " "


def _spelled_out(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii") if not character.isspace() else " "


class Secrets:
    """The secrets of a configuration, and the tokens that were given."""

    def __init__(self) -> None:
        self._secrets: set[str] = set()

    def add(self, secret: str | None) -> None:
        """Remember a secret."""
        if secret and len(secret) >= _SHORTEST_SECRET:
            self._secrets.add(secret)

    def add_from(self, options: Mapping[str, Any]) -> None:
        """Remember every value in a configuration whose option has the name of a secret."""
        for secret in _secrets_in(options):
            self.add(secret)

    def hide(self, text: str) -> str:
        """Return a text with each secret replaced."""
        # The longest first: one may be part of another.
        for secret in sorted(self._secrets, key=len, reverse=True):
            text = text.replace(secret, HIDDEN)
        return text


def _secrets_in(value: Any, is_secret: bool = False) -> Iterator[str]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            hidden = bool(_SECRET_NAME.search(str(name))) and not _PLAIN_NAME.search(str(name))
            yield from _secrets_in(inner, is_secret or hidden)
    elif isinstance(value, list):
        for inner in value:
            yield from _secrets_in(inner, is_secret)
    elif is_secret and isinstance(value, str | int) and not isinstance(value, bool):
        yield str(value)


def counted(count: int, name: str) -> str:
    """Return a number with the name of the things, such as `2 files`."""
    return f"{count} {name}" if count == 1 else f"{count} {name}s"
