# SPDX-License-Identifier: AGPL-3.0-or-later
"""Sticky events (MSC4354) for Synapse, as a module.

``StickyEventsModule`` is the class to name in ``homeserver.yaml``. It is imported
when it is first asked for: :mod:`synapse_sticky.ephemeral_map` is for bots too,
which have no Synapse.
"""

from typing import TYPE_CHECKING

from synapse_sticky._version import __version__

if TYPE_CHECKING:
    from synapse_sticky.module import StickyEventsModule
else:

    def __getattr__(name: str) -> object:
        if name == "StickyEventsModule":
            # The module imports names that not every Synapse has: so check the version first.
            from synapse_sticky.seams.checks import check_oldest_synapse, fitting

            check_oldest_synapse()
            with fitting():
                from synapse_sticky.module import StickyEventsModule

            return StickyEventsModule
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["StickyEventsModule", "__version__"]
