# SPDX-License-Identifier: AGPL-3.0-or-later
"""The state event with which a room's admins switch sticky events on or off. No Synapse.

It is this module's own: no MSC knows it.
"""

from collections.abc import Mapping
from typing import Any, Final

SETTINGS_TYPE: Final = "io.github.synapse_sticky.settings"
"""Its type. Its state key is empty, its content ``{"enabled": bool}``."""


def enabled_of(content: Mapping[str, Any]) -> bool | None:
    """Return what a room's settings say, None if they make no sense."""
    enabled = content.get("enabled")
    return enabled if isinstance(enabled, bool) else None


def settings_content(enabled: bool) -> dict[str, Any]:
    """Return the content that says so."""
    return {"enabled": enabled}


def mistake_in(content: object) -> str | None:
    """Return why a client's settings of a room are refused, None if they are not.

    Nothing but the key is taken: a typing error would be ignored otherwise. Empty content
    takes the room's decision back.
    """
    if isinstance(content, Mapping):
        keys = set(content)
        if not keys or (keys == {"enabled"} and isinstance(content["enabled"], bool)):
            return None
    return (
        f'The content of {SETTINGS_TYPE} must be {{"enabled": true}} or {{"enabled": false}}, '
        "or {} to leave the decision to the server"
    )
