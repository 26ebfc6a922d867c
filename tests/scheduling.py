"""Which process runs which test, where pytest-xdist has several.

Each process starts the servers of a deployment that it runs a test on, and stops them once it
runs one on another. So a process stays with a deployment as long as there are tests for it.
"""

import re
from collections import Counter
from collections.abc import Collection
from functools import cache

from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]
from xdist.workermanage import WorkerController  # type: ignore[import-untyped]

from tests.support import DEPLOYMENTS

# Among the parameters that pytest puts behind a test's name.
_DEPLOYMENT = re.compile(rf"[\[-]({'|'.join(DEPLOYMENTS)})[]-]")


@cache
def deployment_of(test: str) -> str:
    """The deployment that a test runs on; empty if it needs none, or servers of its own."""
    match = _DEPLOYMENT.search(test)
    return match.group(1) if match else ""


def choose(waiting: Collection[str], current: str | None, begun: Collection[str]) -> str:
    """The test that a process gets next.

    Args:
        waiting: the tests that no process has, in order.
        current: the deployment that the process is at.
        begun: the deployments that any process has been at.
    """
    left = Counter(deployment_of(test) for test in waiting)
    if current not in left:
        # Where several help each other, they help with what takes longest.
        current = max(left, key=lambda deployment: (deployment not in begun, left[deployment]))
    return next(test for test in waiting if deployment_of(test) == current)


class StayWithDeployment(LoadScopeScheduling):  # type: ignore[misc]
    """Gives each process one test after the other."""

    def _split_scope(self, nodeid: str) -> str:
        return nodeid

    def _assign_work_unit(self, node: WorkerController) -> None:
        begun = {node: [*map(deployment_of, tests)] for node, tests in self.assigned_work.items()}
        current = begun[node][-1] if begun[node] else None
        test = choose(self.workqueue, current, {name for names in begun.values() for name in names})
        self.workqueue.move_to_end(test, last=False)
        super()._assign_work_unit(node)
