# SPDX-License-Identifier: AGPL-3.0-or-later
"""Sticky events (MSC4354) for Synapse, as a module.

``StickyEventsModule`` is the class to name in ``homeserver.yaml``.
"""

from synapse_sticky.module import StickyEventsModule

__all__ = ["StickyEventsModule"]
