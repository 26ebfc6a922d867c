# SPDX-License-Identifier: AGPL-3.0-or-later
"""Sticky events (MSC4354) for Synapse, as a module.

``StickyEventsModule`` is the class to name in ``homeserver.yaml``. It is imported
when it is first asked for: :mod:`synapse_sticky.ephemeral_map` is for bots too,
which have no Synapse.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from synapse_sticky.module import StickyEventsModule
else:

    def __getattr__(name: str) -> object:
        if name == "StickyEventsModule":
            # What the module imports is not there in every Synapse: first the version.
            from synapse_sticky.seams.checks import check_oldest_synapse

            check_oldest_synapse()
            from synapse_sticky.module import StickyEventsModule

            return StickyEventsModule
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["StickyEventsModule"]
