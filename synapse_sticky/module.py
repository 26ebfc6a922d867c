# SPDX-License-Identifier: AGPL-3.0-or-later
"""The module that Synapse loads. It only wires the parts together."""

import logging
from functools import partial

from synapse.module_api import ModuleApi
from synapse.module_api.errors import ConfigError

from synapse_sticky.clients.delivery import Delivery
from synapse_sticky.config import StickyEventsConfig
from synapse_sticky.deliverable.index import StickyIndex
from synapse_sticky.deliverable.reader import IndexReader
from synapse_sticky.hooks import extremities, sending, sliding_sync, sync
from synapse_sticky.hooks.visibility import (
    filter_bundled_aggregations,
    lift_history_visibility,
    lift_history_visibility_for_servers,
)
from synapse_sticky.noticing.admission import Admission
from synapse_sticky.noticing.indexer import Indexer
from synapse_sticky.noticing.rechecks import Rechecks
from synapse_sticky.seams import events
from synapse_sticky.seams.authorisation import CurrentStateCheck
from synapse_sticky.seams.background import News, call_later, homeserver_of
from synapse_sticky.seams.checks import check_synapse_version
from synapse_sticky.seams.database import MigrationConnection
from synapse_sticky.seams.federation import Federation
from synapse_sticky.seams.streams import (
    Signal,
    StreamBounds,
    Waker,
    carry_position,
    on_new_events,
    on_stream_change,
)
from synapse_sticky.servers.debts import Debt, Debts
from synapse_sticky.servers.ledger import Ledger
from synapse_sticky.servers.looper import Looper
from synapse_sticky.storage.migrations import migrate
from synapse_sticky.storage.store import StickyStore, load_index

logger = logging.getLogger(__name__)


class StickyEventsModule:
    """Sticky events (MSC4354) for a Synapse that is not otherwise changed.

    To configure under ``modules`` of ``homeserver.yaml``, on every process.
    """

    def __init__(self, config: StickyEventsConfig, api: ModuleApi) -> None:
        check_synapse_version()
        hs = homeserver_of(api)
        if hs.config.experimental.msc4354_enabled:
            raise ConfigError(
                "Synapse's own sticky events and synapse_sticky exclude each other: remove "
                "`msc4354_enabled: true` from `experimental_features` in homeserver.yaml, or "
                "synapse_sticky from `modules`."
            )
        sending.check()
        sync.check()
        sliding_sync.check()

        news = News(hs)
        self._signal = Signal(hs, lambda: reader.on_signal())
        store = StickyStore(api, self._signal.send)
        source = events.EventSource(hs)
        index = _prepare_tables(MigrationConnection(hs), news.now_ts())
        reader = IndexReader(api, store, source, news, Waker(hs), index)
        delivery = Delivery(reader, source)
        federation = Federation(hs)

        carry_position(hs, lambda: reader.index.position)
        events.add_remaining_time(api, hs, reader.is_noticed, reader.expires_ts)
        lift_history_visibility(hs, reader.is_sticky)
        lift_history_visibility_for_servers(federation, reader.is_sticky)
        filter_bundled_aggregations(hs, reader.is_sticky)
        sending.install()
        sync.install(delivery, config.max_events_per_sync)
        sliding_sync.install(delivery)
        extremities.install(hs)
        reader.start(config)

        ledger: Ledger | None = None
        looper: Looper | None = None
        if federation.sends:
            ledger = Ledger(store, reader, config.federation_grace_period_ms)
            looper = Looper(api, reader, federation, ledger, config)
            looper.start(config)
        self._debts = Debts(store, reader, federation, ledger, looper)

        if api.should_run_background_tasks():
            check = CurrentStateCheck(hs)
            indexer = Indexer(
                api,
                store,
                StreamBounds(hs),
                Admission(check),
                Rechecks(check),
                reader,
                partial(call_later, hs),
            )
            if on_new_events(hs, indexer.on_new_events):
                indexer.expect_new_events()
            on_stream_change(hs, indexer.on_stream_change)
            indexer.start(config)

    async def debts(self) -> list[Debt]:
        """Which servers are owed sticky events, and why they are not paid yet.

        Of every server in the federation, on whichever process it is asked.
        """
        return await self._debts.all()

    @staticmethod
    def parse_config(config: object) -> StickyEventsConfig:
        """Called by Synapse with the module's ``config``.

        Raises:
            ConfigError: for any mistake, with the option's path.
        """
        return StickyEventsConfig.parse(config)


def _prepare_tables(connection: MigrationConnection, now_ts: int) -> StickyIndex:
    """Migrates our tables and reads them, before any listener starts."""
    try:
        migrate(connection)
        with connection.locked_transaction() as txn:
            return load_index(txn, now_ts)
    finally:
        connection.close()
