# SPDX-License-Identifier: AGPL-3.0-or-later
"""Synapse's own sticky events, which are off where the module is."""

import logging

from synapse.server import HomeServer

from synapse_sticky.seams.checks import require

logger = logging.getLogger(__name__)


def take_the_place_of_synapses_own(hs: HomeServer) -> None:
    """Switch Synapse's own implementation off in this process, and say so if it was on.

    To be called before anything that is built after the modules reads the flag. What
    writes events is built before them, and has stored it; everything else asks the
    configuration at the time of use.
    """
    experimental = hs.config.experimental
    require(experimental, "msc4354_enabled")
    # None on a process that writes no events.
    persist_events = hs.get_datastores().persist_events
    if persist_events is not None:
        require(persist_events, "_msc4354_enabled")
        persist_events._msc4354_enabled = False
    if experimental.msc4354_enabled:
        experimental.msc4354_enabled = False
        logger.info(
            "synapse_sticky takes the place of Synapse's own sticky events, which "
            "`msc4354_enabled: true` in `experimental_features` switches on. They are back "
            "as soon as synapse_sticky is removed from `modules`."
        )
