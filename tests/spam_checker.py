"""A module for Synapse, used by a test, that refuses events of other servers that say "spam"."""

from typing import Any

from synapse.module_api import NOT_SPAM, ModuleApi
from synapse.module_api.errors import Codes


class RefuseSpam:
    """Refuses what has the text "spam"."""

    def __init__(self, config: Any, api: ModuleApi) -> None:
        api.register_spam_checker_callbacks(
            check_event_for_spam=self.check,
            should_drop_federated_event=self.drop,
        )

    async def check(self, event: Any) -> Any:
        """Soft-fails spam of other servers, and refuses that of our users."""
        return Codes.FORBIDDEN if event.content.get("body") == "spam" else NOT_SPAM

    async def drop(self, event: Any) -> bool:
        """Nothing is dropped unseen."""
        return False
