"""Who is owed what, shown over HTTP. For Synapse, not for pytest.

Copied into a homeserver's directory, which is where Synapse finds it.
"""

import json
from typing import Any

import attr
from synapse.module_api import ModuleApi
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET

from synapse_sticky import StickyEventsModule
from synapse_sticky.config import StickyEventsConfig

PATH = "/_synapse/client/debts"


class ModuleThatShowsDebts(StickyEventsModule):
    """The module, with what it says of debts at `PATH`."""

    def __init__(self, config: StickyEventsConfig, api: ModuleApi) -> None:
        super().__init__(config, api)
        api.register_web_resource(PATH, _Debts(self, api))


class _Debts(Resource):
    isLeaf = True

    def __init__(self, module: StickyEventsModule, api: ModuleApi) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._module = module
        self._api = api

    def render_GET(self, request: Any) -> Any:
        self._api.run_as_background_process("debts", self._answer, request)
        return NOT_DONE_YET

    async def _answer(self, request: Any) -> None:
        try:
            debts = [
                {**attr.asdict(debt), "reason": debt.reason.value}
                for debt in await self._module.debts()
            ]
        except Exception as error:
            request.setResponseCode(500)
            debts = [{"error": repr(error)}]
        request.setHeader(b"Content-Type", b"application/json")
        request.write(json.dumps(debts).encode())
        request.finish()
