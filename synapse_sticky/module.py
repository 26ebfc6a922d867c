# SPDX-License-Identifier: AGPL-3.0-or-later
"""The module that Synapse loads. It only wires the parts together."""

from functools import partial

from synapse.module_api import ModuleApi

from synapse_sticky.admin import page
from synapse_sticky.admin.api import AdminApi
from synapse_sticky.admin.lag import Lag
from synapse_sticky.admin.metrics import Measurements
from synapse_sticky.admin.start import log_start
from synapse_sticky.clients.delivery import Delivery
from synapse_sticky.config import StickyEventsConfig
from synapse_sticky.control.gate import Gate
from synapse_sticky.control.overrides import Overrides
from synapse_sticky.control.settings import Settings
from synapse_sticky.deliverable.index import StickyIndex
from synapse_sticky.deliverable.reader import RECORDED, STORED, IndexReader, load_index
from synapse_sticky.hooks import (
    admin_requests,
    extremities,
    outgoing,
    sending,
    sliding_sync,
    sync,
)
from synapse_sticky.hooks.callbacks import CreatorCallbacks, SenderCallbacks
from synapse_sticky.hooks.classes import check_servlets
from synapse_sticky.hooks.guard import Retries
from synapse_sticky.hooks.notifier import (
    on_messages,
    on_ordinary_events,
    on_server_back,
    on_sticky_events,
    on_stream_change,
)
from synapse_sticky.hooks.token import carry_position
from synapse_sticky.hooks.unsigned import add_remaining_time
from synapse_sticky.hooks.upgrades import follow_upgrades
from synapse_sticky.hooks.visibility import (
    filter_bundled_aggregations,
    hide_state_beside_lifted_events,
    lift_history_visibility,
    lift_history_visibility_for_servers,
)
from synapse_sticky.noticing.admission import Admission
from synapse_sticky.noticing.announcements import Announcements
from synapse_sticky.noticing.backlog import Backlog
from synapse_sticky.noticing.indexer import Indexer
from synapse_sticky.noticing.rechecks import Rechecks
from synapse_sticky.noticing.reviews import Reviews
from synapse_sticky.noticing.throttle import Throttle
from synapse_sticky.seams.authorisation import CurrentStateCheck
from synapse_sticky.seams.background import Broadcast, Clock, homeserver_of
from synapse_sticky.seams.checks import (
    check_listed_once,
    fitting,
    warn_of_untested_synapse,
)
from synapse_sticky.seams.database import MigrationConnection
from synapse_sticky.seams.events import EventSource
from synapse_sticky.seams.federation import Federation
from synapse_sticky.seams.instances import name_of_indexer
from synapse_sticky.seams.metrics import Metrics
from synapse_sticky.seams.own import take_the_place_of_synapses_own
from synapse_sticky.seams.pulling import Pulling, has_federation
from synapse_sticky.seams.rates import Limiter, Rates
from synapse_sticky.seams.room_state import RoomState
from synapse_sticky.seams.rooms import Rooms
from synapse_sticky.seams.signal import Messenger, Signal
from synapse_sticky.seams.streams import StreamBounds, Waker
from synapse_sticky.seams.tables import SynapseTables, begin_sequences, check_tables
from synapse_sticky.servers.debts import Debt, Debts
from synapse_sticky.servers.ledger import Ledger
from synapse_sticky.servers.looper import RETRY, Looper
from synapse_sticky.servers.obstacles import Obstacles
from synapse_sticky.servers.puller import Puller
from synapse_sticky.storage.migrations import migrate
from synapse_sticky.storage.obstacles import ObstacleStore
from synapse_sticky.storage.overrides import OverrideRow, OverrideStore, read_overrides
from synapse_sticky.storage.reports import Reports
from synapse_sticky.storage.store import StickyStore


class StickyEventsModule:
    """Sticky events (MSC4354) for a Synapse that is not otherwise changed.

    To configure under ``modules`` of ``homeserver.yaml``, on every process.
    """

    @fitting()
    def __init__(self, config: StickyEventsConfig, api: ModuleApi) -> None:
        warn_of_untested_synapse()
        hs = homeserver_of(api)
        if hs.config.worker.worker_app == "synapse.app.admin_cmd":
            # A tool that ends once it has done its work, and serves nobody.
            return
        check_listed_once(hs, StickyEventsModule)
        take_the_place_of_synapses_own(hs)
        sending.check()
        sync.check()
        sliding_sync.check()

        clock, metrics = Clock(hs), Metrics.of(hs)
        signal, control_signal = Signal(hs, "signal"), Signal(hs, "control")
        store = StickyStore(api, signal.send)
        tables = SynapseTables(api)
        source = EventSource(hs, clock)
        tables_version, index, decided = _prepare_tables(MigrationConnection(hs), clock.now_ts())
        broadcast = Broadcast(hs, clock)
        messenger, waker, bounds = Messenger(hs), Waker(hs), StreamBounds(hs)
        reader = IndexReader(
            api, store, tables, source, clock, broadcast, messenger, bounds, waker, index
        )
        signal.subscribe(reader.on_signal)
        messages = {STORED: reader.on_stored_elsewhere, RECORDED: reader.on_recorded_elsewhere}
        on_messages(hs, messages)
        overrides = Overrides(
            api, clock, OverrideStore(api, lambda txn: control_signal.send(txn, None))
        )
        overrides.load(decided)
        control_signal.subscribe(overrides.on_signal)
        overrides.start()
        room_state = RoomState(hs, tables)
        self._settings = Settings(overrides, room_state, config.enabled_by_default)
        delivery = Delivery(clock, reader, source)
        federation = Federation(hs, clock, metrics)

        limit = config.local_rate_limit
        rates = Rates(hs, "sticky_local_rate_limit", limit) if limit is not None else None
        SenderCallbacks(hs, Gate(self._settings, rates, metrics)).install(hs, api)
        CreatorCallbacks(config.enabled_in_new_rooms).install(api)
        follow_upgrades(hs, self._settings)
        carry_position(hs, lambda: reader.index.position)
        add_remaining_time(
            api, hs, clock, reader.noticed_until_ts, reader.sticky_until_ts, reader.has_passed
        )
        lift_history_visibility(hs, reader.live_among)
        hide_state_beside_lifted_events(hs)
        lift_history_visibility_for_servers(hs, federation, reader.live_among)
        filter_bundled_aggregations(hs)
        sending.install(hs)
        retries = Retries(clock, waker)
        sync.install(
            hs,
            delivery,
            source,
            retries,
            metrics,
            reader.live_among,
            config.max_events_per_sync,
        )
        sliding_sync.install(hs, delivery, source, retries, metrics)
        check_servlets()
        extremities.install(hs)
        reader.start(config)

        obstacles = ObstacleStore(api)
        ledger: Ledger | None = None
        looper: Looper | None = None
        if federation.sends:
            ledger = Ledger(
                clock,
                store,
                reader,
                config.federation_grace_period_ms,
                bounds.current().events,
            )
            new_broadcast = partial(Broadcast, hs, clock)
            looper = Looper(api, clock, reader, federation, ledger, config, metrics, new_broadcast)
            looper.start(config)
            outgoing.follow_queues(hs, metrics, looper)
            outgoing.follow_returns(hs, looper.on_back)
            on_messages(hs, {RETRY: looper.retry})
            Obstacles(api, obstacles, federation, looper).start(config)
        self._debts = Debts(
            clock,
            store,
            obstacles,
            reader,
            federation,
            ledger,
            looper,
            config.federation_grace_period_ms,
        )
        reports = Reports(api)
        Measurements(
            api, clock, metrics, reports, bounds, reader, ledger, looper, self._debts
        ).start()

        def retry(server_name: str) -> None:
            if federation.sends_to(server_name) and looper is not None:
                looper.retry(server_name)
            else:
                messenger.send(RETRY, lambda: server_name)

        admin_api = AdminApi(
            api,
            clock,
            reports,
            self._debts,
            self._settings,
            Rooms(hs, tables),
            Lag(clock, store, tables, bounds, reader),
            name_of_indexer(hs),
            retry,
        )
        admin_requests.install(hs, api, [*admin_api.routes(), *page.routes()])

        if api.should_run_background_tasks():
            check = CurrentStateCheck(hs)
            limit = config.remote_rate_limit
            throttle = Throttle(
                Limiter(hs, "sticky_remote", limit) if limit is not None else None,
                config.max_held_per_server,
            )
            admission = Admission(check, self._settings, throttle, api.is_mine)
            reviews, rechecks = Reviews(), Rechecks(check)
            indexer = Indexer(
                api,
                clock,
                store,
                tables,
                bounds,
                admission,
                rechecks,
                reviews,
                Backlog(clock, store, admission, throttle, reviews, rechecks),
                room_state,
                Announcements(api, clock, store, messenger),
                reader,
                metrics,
            )
            if bounds.is_only_writer:
                indexer.expect_new_events()
                on_ordinary_events(hs, indexer.on_ordinary_events)
            on_stream_change(hs, indexer.on_stream_change)
            overrides.subscribe(indexer.on_decisions)
            indexer.start(config)
            pull = config.pull_after_outage
            if pull is not None and has_federation(hs):
                pulling = Pulling(hs, clock, metrics)
                puller = Puller(
                    api, clock, pull, store, reader, self._settings, tables, bounds, pulling
                )
                on_server_back(hs, puller.on_server_back)
                puller.start()
        if bounds.is_writer:
            on_sticky_events(hs, clock, bounds, reader.on_stored)
        log_start(
            tables_version,
            stores=bounds.is_writer,
            notices=api.should_run_background_tasks(),
            sends=federation.sends,
        )

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


def _prepare_tables(
    connection: MigrationConnection, now_ts: int
) -> tuple[int, StickyIndex, list[OverrideRow]]:
    """Check Synapse's tables, migrate ours and read them, before any listener starts."""
    try:
        with connection.transaction() as txn:
            check_tables(txn)
            if connection.is_postgres:
                begin_sequences(txn)
        version = migrate(connection)
        with connection.transaction() as txn:
            return version, load_index(txn, now_ts), read_overrides(txn)
    finally:
        connection.close()
