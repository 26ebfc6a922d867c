# SPDX-License-Identifier: AGPL-3.0-or-later
"""The names and limits that sticky events have on the wire, while MSC4354 is unstable.

Nothing else in the package spells them out, so that the stable names replace
them here and only here.
"""

from typing import Final

DURATION_PARAMETER: Final = "org.matrix.msc4354.sticky_duration_ms"
"""The wanted duration in milliseconds: a query parameter of ``/send`` and of
``/delayed_event``, and a key in the body of the latter."""

EVENT_KEY: Final = "msc4354_sticky"
"""Top-level key of a sticky event: ``{"duration_ms": int}``."""

DURATION_KEY: Final = "duration_ms"
"""Key inside the object under :data:`EVENT_KEY`."""

MAP_KEY: Final = "msc4354_sticky_key"
"""Key inside ``content``: events that have the same replace each other in the ephemeral map."""

SYNC_SECTION: Final = "msc4354_sticky"
"""Section of a joined room in ``/sync``: ``{"events": [...]}``."""

REMAINING_KEY: Final = "msc4354_sticky_duration_ttl_ms"
"""Field in ``unsigned``: for how many more milliseconds the event is sticky."""

SLIDING_SYNC_EXTENSION: Final = "org.matrix.msc4354.sticky_events"
"""Name of the Sliding Sync extension (MSC4480), in requests and responses."""

VERSIONS_FLAG: Final = "org.matrix.msc4354"
"""Flag among the ``unstable_features`` of ``/versions``."""

EXTREMITIES_PREFIX: Final = "/_matrix/federation/unstable/org.matrix.msc4370"
"""What the path of MSC4370's endpoint begins with, while it is unstable."""

ADMIN_API_PATH: Final = "/_synapse/client/synapse_sticky/admin/v1"
"""Below it is the API for the server's admins. It is this module's own: no MSC knows it."""

MAX_EVENTS: Final = 100
"""How many sticky events one response carries at most (MSC4354 suggests it)."""
