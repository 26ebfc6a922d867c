# SPDX-License-Identifier: AGPL-3.0-or-later
"""How many servers are sent to at once, and which one is next. No Synapse, no clock."""

from typing import Final

# How many transactions may be on their way: for each slot, and at least. A server that does not
# answer gives its slot back, but the transaction takes a megabyte until it ends.
_ON_THEIR_WAY: Final = 4
_LEAST_ON_THEIR_WAY: Final = 100


class Slots:
    """Gives out a number of slots, first come, first served.

    No slot is given out while too many transactions are on their way. Servers where the last try
    failed begin only half of those.

    Servers where the last try failed come after all others. A server that waits does nothing
    else meanwhile, so that it can use its slot as soon as it has one.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        # The servers that have a slot, each with a number that no other slot given out has.
        self._held: dict[str, int] = {}
        self._given = 0
        self._on_their_way = 0
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
        most = max(self._limit * _ON_THEIR_WAY, _LEAST_ON_THEIR_WAY)
        if queue is self._failing:
            most //= 2
        if len(self._held) >= self._limit or self._on_their_way >= most or not queue:
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

    def began(self) -> None:
        """A transaction is on its way."""
        self._on_their_way += 1

    def ended(self) -> None:
        """A transaction has ended."""
        self._on_their_way -= 1

    def take_back(self, server_name: str, number: int | None = None) -> None:
        """A server does not need its slot any more, or only not the one with this number."""
        if number in (None, self._held.get(server_name)):
            self._held.pop(server_name, None)
