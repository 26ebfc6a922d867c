"""Fixtures: the servers, users and rooms the tests work with."""

import itertools
import signal
from collections.abc import Generator, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from harness.client import Client
from harness.homeserver import Homeserver, open_homeservers
from harness.postgres import PostgresServer
from harness.proxy import Fault
from harness.redis import RedisServer
from harness.remote import RemoteServer
from tests.scheduling import StayWithDeployment
from tests.support import DEPLOYMENTS, GRACE_PERIOD, MakeHomeserver

# How long an example takes says how busy the machine is.
settings.register_profile("tests", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tests")

_LOG_POSITIONS = pytest.StashKey[dict[int, dict[str, int]]]()
_LONGEST_LOG = 20_000


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options that choose the deployments, and the Synapses."""
    parser.addoption(
        "--deployments",
        default=",".join(DEPLOYMENTS),
        help=f"the deployments to test, of {', '.join(DEPLOYMENTS)} (default: all)",
    )
    parser.addoption(
        "--own-flag",
        help="those of the deployments on which Synapse's own sticky events are switched on too, "
        "for the module to take their place (default: none)",
    )
    parser.addoption(
        "--peer-python",
        help="a Python with another Synapse and the module, for federations of different releases",
    )
    parser.addoption(
        "--kills",
        type=int,
        default=8,
        help="how often a process is killed under load, in each deployment (default: 8, "
        "which is once each process of a worker deployment)",
    )
    parser.addoption(
        "--repeats",
        action="store_true",
        help="run tests also where they only repeat what they show elsewhere",
    )


def _chosen_deployments(config: pytest.Config, option: str = "--deployments") -> list[str]:
    chosen = [name.strip() for name in config.getoption(option).split(",")]
    unknown = set(chosen) - set(DEPLOYMENTS)
    if unknown:
        raise pytest.UsageError(f"{option}: there is no {', '.join(sorted(unknown))}")
    # In a fixed order, so that a test run is the same however it was asked for.
    return [name for name in DEPLOYMENTS if name in chosen]


def pytest_configure() -> None:
    """Let processes that are started from here end with Ctrl-C, as from a terminal."""
    # A shell that starts the tests in its background has them, and all below, ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that uses a deployment once on each of those chosen."""
    if "deployment" in metafunc.fixturenames:
        chosen = _chosen_deployments(metafunc.config)
        marker = metafunc.definition.get_closest_marker("deployments")
        if marker is not None:
            chosen = [name for name in chosen if name in marker.args]
        metafunc.parametrize("deployment", chosen, indirect=True, scope="session")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out repetitions. Begin with the slow tests if several processes run them."""
    if not config.getoption("--repeats"):
        left_out = [item for item in items if _only_repeats(item)]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def _only_repeats(item: pytest.Item) -> bool:
    callspec: Any = getattr(item, "callspec", None)
    parameters = callspec.params if callspec is not None else {}
    kinds = {parameters.get("deployment"), parameters.get("kind")}
    return any(kinds & set(marker.args) for marker in item.iter_markers("repeats"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    """Let each process of pytest-xdist stay with a deployment."""
    return StayWithDeployment(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Note where the logs end before the test."""
    item.stash[_LOG_POSITIONS] = {
        id(homeserver): homeserver.log_position() for homeserver in open_homeservers()
    }


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Attach to a failure what Synapse complained about since the test began."""
    report = yield
    if report.failed:
        positions = item.stash.get(_LOG_POSITIONS, {})
        for homeserver in open_homeservers():
            problems = homeserver.problems_since(positions.get(id(homeserver), {}))
            if problems:
                title = f"Problems logged by {homeserver.server_name}"
                report.sections.append((title, problems[-_LONGEST_LOG:]))
    return report


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """The PostgreSQL server of this test run."""
    with PostgresServer() as server:
        yield server


@pytest.fixture
def own_postgres() -> Iterator[PostgresServer]:
    """A PostgreSQL server of one test alone, which it may stop."""
    with PostgresServer() as server:
        yield server


@pytest.fixture(scope="session")
def redis() -> Iterator[RedisServer]:
    """The Redis server of this test run."""
    with RedisServer() as server:
        yield server


def _server_arguments(request: pytest.FixtureRequest, kind: str) -> dict[str, Any]:
    """What a homeserver of that kind of deployment is made with."""
    arguments: dict[str, Any] = {"database": "sqlite"}
    if kind != "sqlite":
        arguments["database"] = request.getfixturevalue("postgres").create_database()
    if kind == "workers":
        arguments["workers"] = True
        arguments["redis_port"] = request.getfixturevalue("redis").port
    if request.config.getoption("--own-flag"):
        arguments["own_flag"] = kind in _chosen_deployments(request.config, "--own-flag")
    return arguments


@pytest.fixture(scope="session")
def deployment(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Homeserver]:
    """A running deployment that all tests of its kind share."""
    homeserver = Homeserver(
        directory=tmp_path_factory.mktemp(request.param),
        federation=True,
        proxied=True,
        module_config={"federation_grace_period": GRACE_PERIOD},
        **_server_arguments(request, request.param),
    )
    try:
        homeserver.start()
        yield homeserver
    finally:
        homeserver.close()


@pytest.fixture
def homeserver(deployment: Homeserver) -> Homeserver:
    """The shared deployment, with all of its processes running and in reach."""
    return _in_reach(deployment)


@pytest.fixture
def make_homeserver(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[MakeHomeserver]:
    """Makes a homeserver for one test alone, not started yet, and closed after the test.

    `kind` is the kind of deployment; the other arguments are those of `Homeserver`. The test
    is skipped when that kind was not chosen with `--deployments`.
    """
    made: list[Homeserver] = []
    numbers = itertools.count(1)

    def make(kind: str = "sqlite", **arguments: Any) -> Homeserver:
        if kind not in _chosen_deployments(request.config):
            pytest.skip(f"needs the deployment {kind}")
        directory = tmp_path_factory.mktemp(f"own{next(numbers)}")
        homeserver = Homeserver(
            **{"directory": directory, **_server_arguments(request, kind), **arguments}
        )
        made.append(homeserver)
        return homeserver

    yield make
    for homeserver in made:
        homeserver.close()


@pytest.fixture
def remote() -> Iterator[RemoteServer]:
    """A server of the tests' own, elsewhere in the federation."""
    with RemoteServer() as server:
        yield server


@pytest.fixture(scope="session")
def peer_python(request: pytest.FixtureRequest) -> str:
    """A Python with another Synapse and the module."""
    path: str | None = request.config.getoption("--peer-python")
    if path is None:
        pytest.skip("needs --peer-python, which `make test` gives")
    return path


def _running(**arguments: Any) -> Iterator[Homeserver]:
    homeserver = Homeserver(federation=True, proxied=True, **arguments)
    try:
        homeserver.start()
        yield homeserver
    finally:
        homeserver.close()


@pytest.fixture(scope="session")
def mixed_deployment(
    peer_python: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Homeserver]:
    """A server with the module, and another Synapse."""
    yield from _running(
        directory=tmp_path_factory.mktemp("mixed"),
        python=peer_python,
        module_config={"federation_grace_period": GRACE_PERIOD},
    )


@pytest.fixture(scope="session")
def other_deployment(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Homeserver]:
    """A second server with the module; of the other release, if there is `--peer-python`."""
    if request.config.getoption("--peer-python"):
        yield request.getfixturevalue("mixed_deployment")
        return
    yield from _running(
        directory=tmp_path_factory.mktemp("other"),
        module_config={"federation_grace_period": GRACE_PERIOD},
    )


@pytest.fixture(scope="session")
def stock_deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Homeserver]:
    """A server that knows nothing of sticky events."""
    yield from _running(directory=tmp_path_factory.mktemp("stock"), module=False)


@pytest.fixture(scope="session")
def own_deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Homeserver]:
    """A server with Synapse's own implementation switched on."""
    yield from _running(
        directory=tmp_path_factory.mktemp("own"),
        module=False,
        extra_config={"experimental_features": {"msc4354_enabled": True}},
    )


def _in_reach(homeserver: Homeserver) -> Homeserver:
    homeserver.ensure_running()
    homeserver.proxy.set_fault(Fault.NONE)
    return homeserver


@pytest.fixture
def mixed_peer(mixed_deployment: Homeserver) -> Homeserver:
    """A server with the module on another Synapse, running and in reach."""
    return _in_reach(mixed_deployment)


@pytest.fixture
def stock_peer(stock_deployment: Homeserver) -> Homeserver:
    """A server that knows nothing of sticky events, running and in reach."""
    return _in_reach(stock_deployment)


@pytest.fixture
def own_peer(own_deployment: Homeserver) -> Homeserver:
    """A server with Synapse's own sticky events, running and in reach."""
    return _in_reach(own_deployment)


@pytest.fixture
def alice(homeserver: Homeserver) -> Client:
    """A new user."""
    return homeserver.register()


@pytest.fixture
def bob(homeserver: Homeserver) -> Client:
    """Another new user."""
    return homeserver.register()


@pytest.fixture
def room(alice: Client, bob: Client) -> str:
    """A public room that alice has created and bob has joined."""
    room_id = alice.create_room(preset="public_chat")
    bob.join(room_id)
    return room_id


@pytest.fixture
def encrypted_room(alice: Client, bob: Client) -> str:
    """A room with encryption, that bob has joined."""
    event = {
        "type": "m.room.encryption",
        "state_key": "",
        "content": {"algorithm": "m.megolm.v1.aes-sha2"},
    }
    room_id = alice.create_room(preset="public_chat", initial_state=[event])
    bob.join(room_id)
    return room_id
