# SPDX-License-Identifier: AGPL-3.0-or-later
"""Reads decisions from the bodies of an admin's requests. No Synapse, no clock."""

from collections.abc import Collection, Mapping
from typing import Any, Final

import attr

MAX_REASON_LENGTH: Final = 1000

# The largest number that every JSON parser reads as it is written.
_MAX_TS: Final = 2**53 - 1


@attr.s(slots=True, frozen=True, auto_attribs=True)
class Decision:
    """A decision as an admin gives it: ``enabled`` is None to take back the one before."""

    enabled: bool | None
    reason: str | None = None
    until_ts: int | None = None


class BadBody(Exception):
    """The body lacks a field, has an unknown one, or one of a wrong type."""


class BadValue(Exception):
    """A field has a value that is not allowed."""


def of_room(body: Mapping[str, Any]) -> Decision:
    """Return the decision on a room.

    Raises:
        BadBody, BadValue: naming the field.
    """
    _check_fields(body, ["enabled"])
    return Decision(_enabled(body))


def of_sender(body: Mapping[str, Any], now_ts: int) -> Decision:
    """Return the decision on a user or a server, which can be blocked only.

    Raises:
        BadBody, BadValue: naming the field.
    """
    _check_fields(body, ["enabled", "reason", "until_ts"])
    decision = Decision(_enabled(body), _reason(body), _until_ts(body, now_ts))
    if decision.enabled:
        raise BadValue("'enabled' must be false, to block, or null")
    if decision.enabled is None:
        for name in ("reason", "until_ts"):
            if body.get(name) is not None:
                raise BadValue(f"'{name}' goes with 'enabled': false only")
    return decision


def _check_fields(body: Mapping[str, Any], known: Collection[str]) -> None:
    for name in body:
        if name not in known:
            raise BadBody(f"unknown field {name!r}; known are {', '.join(known)}")


def _enabled(body: Mapping[str, Any]) -> bool | None:
    if "enabled" not in body:
        raise BadBody("'enabled' is missing")
    enabled = body["enabled"]
    if enabled is not None and not isinstance(enabled, bool):
        raise BadBody("'enabled' must be true, false or null")
    return enabled


def _reason(body: Mapping[str, Any]) -> str | None:
    reason = body.get("reason")
    if reason is None:
        return None
    if not isinstance(reason, str):
        raise BadBody("'reason' must be a text or null")
    if len(reason) > MAX_REASON_LENGTH:
        raise BadValue(f"'reason' must have at most {MAX_REASON_LENGTH} characters")
    # Neither of them can be stored.
    if "\0" in reason or any("\ud800" <= character <= "\udfff" for character in reason):
        raise BadValue("'reason' must not contain the character 0, nor half a character")
    return reason


def _until_ts(body: Mapping[str, Any], now_ts: int) -> int | None:
    until_ts = body.get("until_ts")
    if until_ts is None:
        return None
    if isinstance(until_ts, float) and until_ts.is_integer():
        # In JSON 1.0 is a whole number too.
        until_ts = int(until_ts)
    if type(until_ts) is not int:
        raise BadBody("'until_ts' must be a whole number of ms since the epoch, or null")
    if not now_ts < until_ts <= _MAX_TS:
        raise BadValue("'until_ts' must be in the future, in ms since the epoch")
    return until_ts
