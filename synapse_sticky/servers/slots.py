# SPDX-License-Identifier: AGPL-3.0-or-later
"""How many servers are sent to at once, and which one is next. No Synapse, no clock."""


class Slots:
    """Gives out a number of slots, first come, first served.

    Servers where the last try failed come after all others. A server that waits does nothing
    else meanwhile, so that it can use its slot as soon as it has one.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        # The servers that have a slot, each with a number that no other slot given out has.
        self._held: dict[str, int] = {}
        self._given = 0
        self._waiting: dict[str, None] = {}
        self._failing: dict[str, None] = {}

    def request(self, server_name: str, *, is_failing: bool) -> None:
        """Let a server wait for a slot, unless it has one."""
        if server_name not in self._held:
            queue = self._failing if is_failing else self._waiting
            queue.setdefault(server_name)

    def give(self) -> tuple[str, int] | None:
        """Give a slot to the server that waits longest.

        Returns:
            That server, and the number of its slot; None if there is no slot or no server.
        """
        queue = self._waiting or self._failing
        if len(self._held) >= self._limit or not queue:
            return None
        server_name = next(iter(queue))
        del queue[server_name]
        self._given += 1
        self._held[server_name] = self._given
        return server_name, self._given

    def has(self, server_name: str) -> bool:
        """Return whether a server has a slot."""
        return server_name in self._held

    def is_waiting(self, server_name: str) -> bool:
        """Return whether a server waits for a slot."""
        return server_name in self._waiting or server_name in self._failing

    def take_back(self, server_name: str, number: int | None = None) -> None:
        """A server does not need its slot any more, or only not the one with this number."""
        if number in (None, self._held.get(server_name)):
            self._held.pop(server_name, None)
