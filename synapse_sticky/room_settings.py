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
