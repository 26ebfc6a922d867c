"""Says in the log which event is checked against the current state. For Synapse, not for pytest.

Copied into a homeserver's directory, which is where Synapse finds it.
"""

import logging
from collections.abc import Collection
from typing import Any

from synapse.module_api import ModuleApi

from synapse_sticky.seams.authorisation import CurrentStateCheck

logger = logging.getLogger(__name__)


class ShowChecks:
    """To be loaded before the module."""

    def __init__(self, config: dict[str, Any], api: ModuleApi) -> None:
        allowed = CurrentStateCheck.allowed

        async def shown(self: CurrentStateCheck, event_ids: Collection[str]) -> set[str]:
            for event_id in event_ids:
                logger.info("Checked: %s", event_id)
            return await allowed(self, event_ids)

        CurrentStateCheck.allowed = shown  # type: ignore[method-assign]
