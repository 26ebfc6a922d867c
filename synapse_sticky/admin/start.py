# SPDX-License-Identifier: AGPL-3.0-or-later
"""The line in the log that says what runs, on every process."""

import logging

from synapse_sticky._version import __version__
from synapse_sticky.seams.checks import synapse_version

logger = logging.getLogger(__name__)


def log_start(tables_version: int, *, stores: bool, notices: bool, sends: bool) -> None:
    """Log which versions run, and which jobs this process has.

    Args:
        tables_version: the version of our tables in the database.
        stores: whether this process stores events.
        notices: whether it gives out positions.
        sends: whether it sends to other servers.
    """
    jobs = {
        "stores events": stores,
        "notices sticky events for all processes": notices,
        "sends to other servers": sends,
        "answers requests": True,
    }
    logger.info(
        "synapse_sticky %s on Synapse %s, with tables of version %d. This process: %s",
        __version__,
        synapse_version(),
        tables_version,
        ", ".join(job for job, is_done in jobs.items() if is_done),
    )
