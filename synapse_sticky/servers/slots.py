# SPDX-License-Identifier: AGPL-3.0-or-later
"""How many servers are sent to at once, and which one is next. No Synapse, no clock."""


class Slots:
    """Gives out a number of slots, first come, first served.

    Servers where the last try failed come after all others.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._taken: set[str] = set()
        self._waiting: dict[str, None] = {}
        self._failing: dict[str, None] = {}

    def take(self, server_name: str, *, is_failing: bool) -> bool:
        """Take a slot for a server; False if it has to wait for one."""
        queue, other = self._waiting, self._failing
        if is_failing:
            queue, other = other, queue
        other.pop(server_name, None)
        queue.setdefault(server_name)
        if server_name != self.next():
            return False
        del queue[server_name]
        self._taken.add(server_name)
        return True

    def next(self) -> str | None:
        """Return the server that can take a slot now, None if there is no slot or no server."""
        if len(self._taken) >= self._limit:
            return None
        return next(iter(self._waiting or self._failing), None)

    def give_back(self, server_name: str) -> None:
        """The server does not need its slot any more; it may wait for the next one already."""
        self._taken.discard(server_name)

    def leave(self, server_name: str) -> None:
        """The server does not wait any more."""
        self._waiting.pop(server_name, None)
        self._failing.pop(server_name, None)
