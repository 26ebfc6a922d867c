"""Says in the log which event is checked against the current state. For Synapse, not for pytest.

Copied into a homeserver's directory, which is where Synapse finds it.
"""

import logging
from typing import Any

from synapse.module_api import ModuleApi

from synapse_sticky.seams.authorisation import CurrentStateCheck

logger = logging.getLogger(__name__)


class ShowChecks:
    """To be loaded before the module."""

    def __init__(self, config: dict[str, Any], api: ModuleApi) -> None:
        allows = CurrentStateCheck.allows

        async def shown(self: CurrentStateCheck, event_id: str) -> bool:
            logger.info("Checked: %s", event_id)
            return await allows(self, event_id)

        CurrentStateCheck.allows = shown  # type: ignore[method-assign]
