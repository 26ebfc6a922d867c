# SPDX-License-Identifier: AGPL-3.0-or-later
"""How long an event is sticky (MSC4354, "Proposal"). Arithmetic only.

Times (``_ts``) are milliseconds since the epoch, durations (``_ms``) are
milliseconds. Servers of old room versions may send integers of any size:
everything here works on them, and what it returns for a valid event fits into
64 bits as long as ``received_ts`` does and the event is not expired.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Final

from synapse_sticky.protocol import DURATION_KEY, DURATION_PARAMETER

MAX_DURATION_MS: Final = 3_600_000
"""The longest that any event is sticky: one hour."""

# Limit the digits: Synapse parses the number again.
_WHOLE_NUMBER = re.compile(rb"[0-9]{1,7}")


def effective_duration_ms(sticky: object) -> int | None:
    """The duration that the value under an event's top-level key stands for.

    Args:
        sticky: whatever stands there; remote servers put anything there.

    Returns:
        At most :data:`MAX_DURATION_MS`, or None if this is no valid stickiness
        and the event therefore is an ordinary one. A boolean or a float is not
        an integer.
    """
    if not isinstance(sticky, Mapping):
        return None
    duration_ms = sticky.get(DURATION_KEY)
    if type(duration_ms) is not int or duration_ms < 0:
        return None
    return min(duration_ms, MAX_DURATION_MS)


def expires_ts(duration_ms: int, received_ts: int, origin_server_ts: int) -> int:
    """When an event stops being sticky.

    The start is the earlier of the two times, so that nobody can send an event
    that starts in the future. The event is sticky while this is in the future.
    """
    return min(received_ts, origin_server_ts) + min(duration_ms, MAX_DURATION_MS)


def parse_duration_parameter(values: Sequence[bytes]) -> int:
    """Return the duration that a client asks for in a query.

    Args:
        values: everything the client gave for the parameter, undecoded.

    Returns:
        A whole number from 1 to :data:`MAX_DURATION_MS`.

    Raises:
        ValueError: for anything else, with a text for the client.
    """
    text = values[0] if len(values) == 1 else b""
    return check_duration(int(text) if _WHOLE_NUMBER.fullmatch(text) else None)


def check_duration(value: object) -> int:
    """Return the duration that a client asks for in a body, or raise as above."""
    if type(value) is int and 1 <= value <= MAX_DURATION_MS:
        return value
    raise ValueError(
        f"{DURATION_PARAMETER} must be given once, "
        f"as a whole number of milliseconds from 1 to {MAX_DURATION_MS}"
    )
