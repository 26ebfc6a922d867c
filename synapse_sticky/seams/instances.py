# SPDX-License-Identifier: AGPL-3.0-or-later
"""The names of this deployment's processes."""

from synapse.config import _base
from synapse.server import HomeServer

from synapse_sticky.seams.checks import require

_MAIN = "master"


def name_of_indexer(hs: HomeServer) -> str:
    """Return the name of the process that runs Synapse's background tasks.

    Synapse does not keep it, but on that process itself: so it is read again.
    """
    if hs.config.worker.run_background_tasks:
        return hs.get_instance_name()
    require(_base, "read_config_files", "config_files")
    require(hs.config, "config_files")
    # A configuration need not be from files.
    files = hs.config.config_files
    options = _base.read_config_files(files) if files else {}
    return str(options.get("run_background_tasks_on") or _MAIN)
