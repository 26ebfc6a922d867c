# SPDX-License-Identifier: AGPL-3.0-or-later
"""Synapse's own queues for other servers tell us here what they do.

A receiving server takes one transaction at a time from another one, so Synapse's queues
take turns with us: see ``servers/turns.py``.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import lru_cache
from typing import Any, Final, Protocol

from synapse.events import EventBase
from synapse.federation.transport.client import TransportLayerClient
from synapse.server import HomeServer
from synapse.types import JsonDict

from synapse_sticky.hooks.guard import run_within, wrap
from synapse_sticky.seams.checks import require
from synapse_sticky.seams.events import has_stickiness, sticky_duration_ms
from synapse_sticky.seams.failures import shielded
from synapse_sticky.seams.federation import Accepted, Answer
from synapse_sticky.seams.metrics import ACCEPTED_BY_SERVERS, Metrics

# A little longer than the listener waits.
_MAX_WAIT_MS: Final = 12_500

_NOT_WAITED: Final = "Cannot first send a server the sticky events that it missed"
_NO_TURNS: Final = "Cannot take turns with Synapse's own sending"
_SENT_AGAIN: Final = (
    "Cannot take note of the events that servers have; they are sent sticky events once more"
)


@lru_cache(maxsize=256)
def _is_sticky(event: EventBase) -> bool:
    """Whether an event is sticky for any time; it goes to many servers at about the same time."""
    return has_stickiness(event) and bool(sticky_duration_ms(event))


class Listener(Protocol):
    """Is told of the transactions of Synapse's own queues. Nothing here may raise."""

    def makes_wait(self, server_name: str) -> bool:
        """Return whether a transaction to a server has anything to wait for."""

    async def before_transaction(self, server_name: str, counts: Mapping[str, int]) -> None:
        """Wait before the transaction, for a bounded time.

        Args:
            counts: how many events it has, by room.
        """

    def transaction_begins(self, server_name: str) -> None:
        """The transaction is sent now."""

    def transaction_ended(self, server_name: str, arrived: bool) -> None:
        """The transaction has ended."""

    def on_accepted(self, server_name: str, accepted: Iterable[Accepted]) -> None:
        """A server has answered to events.

        Plain ones too: all that was accepted counts for what the server has to read.
        """


def follow_queues(hs: HomeServer, metrics: Metrics, listener: Listener) -> None:
    """Tell of each transaction of Synapse's own queues, which take turns with us."""
    sender: Any = hs.get_federation_sender()
    require(sender, "_transaction_manager")
    manager = sender._transaction_manager
    require(manager, "_transport_layer")
    transport = manager._transport_layer
    require(manager, "send_new_transaction", "destination", "pdus", "edus")
    require(TransportLayerClient, "send_transaction", "transaction")
    original_send_new_transaction = manager.send_new_transaction
    original_send_transaction = transport.send_transaction
    # What is on its way: one transaction at a time to each server.
    in_flight: dict[str, list[EventBase]] = {}

    async def send_new_transaction(
        destination: str, pdus: list[EventBase], edus: Any, *args: Any, **kwargs: Any
    ) -> None:
        if listener.makes_wait(destination):
            counts = Counter(event.room_id for event in pdus)
            await run_within(
                hs, _MAX_WAIT_MS, _NOT_WAITED, listener.before_transaction, destination, counts
            )
        with shielded(_NO_TURNS):
            listener.transaction_begins(destination)
        arrived = False
        if pdus:
            in_flight[destination] = pdus
        try:
            await original_send_new_transaction(destination, pdus, edus, *args, **kwargs)
            arrived = True
        finally:
            in_flight.pop(destination, None)
            with shielded(_NO_TURNS):
                listener.transaction_ended(destination, arrived)

    async def send_transaction(transaction: Any, *args: Any, **kwargs: Any) -> JsonDict:
        response: JsonDict = await original_send_transaction(transaction, *args, **kwargs)
        events = in_flight.pop(transaction.destination, None)
        if events:
            with shielded(_SENT_AGAIN):
                accepted = _accepted(events, Answer.of(response))
                count = sum(len(part.sticky_ids) for part in accepted)
                metrics.count(ACCEPTED_BY_SERVERS, count, sender="synapse")
                listener.on_accepted(transaction.destination, accepted)
        return response

    wrap(manager, "send_new_transaction", send_new_transaction)
    manager._transport_layer = _Followed(transport, send_transaction)


class _Followed:
    """What sends transactions, as the queues see it. Others go on to use the original."""

    def __init__(self, transport: Any, send_transaction: Callable[..., Any]) -> None:
        self.send_transaction = send_transaction
        self._transport = transport

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


def follow_returns(hs: HomeServer, callback: Callable[[str], None]) -> None:
    """Call back with the name of a server that seems to be back, before its queue runs."""
    sender: Any = hs.get_federation_sender()
    require(sender, "wake_destination", "destination")
    original = sender.wake_destination

    def wake_destination(destination: str) -> None:
        with shielded("Cannot note that a server is back; it is sent sticky events later"):
            callback(destination)
        original(destination)

    wrap(sender, "wake_destination", wake_destination)


def _accepted(events: Iterable[EventBase], answer: Answer) -> Collection[Accepted]:
    by_room: dict[str, Accepted] = {}
    for event in events:
        if event.event_id in answer.accepted:
            accepted = by_room.setdefault(event.room_id, Accepted(event.room_id))
            accepted.event_ids.append(event.event_id)
            if _is_sticky(event):
                accepted.sticky_ids.append(event.event_id)
    return by_room.values()
