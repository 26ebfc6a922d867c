# SPDX-License-Identifier: AGPL-3.0-or-later
"""What the module costs more, or less, than at another revision of this repository.

Everything that admins can decide is in use: settings in the rooms, an override, and a limit on
what users send that nobody reaches.
"""

import contextlib
import json
import random
import subprocess
import tarfile
import urllib.parse
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Final

from benchmarks.measure import Measurement, Scenario, measure
from benchmarks.progress import Progress
from benchmarks.results import Section, at_most
from benchmarks.scenarios import IdleSync, Send
from benchmarks.server import STICKY, Server
from benchmarks.world import World, build_world, copy_server
from harness.homeserver import MODULE
from synapse_sticky.protocol import ADMIN_API_PATH
from synapse_sticky.room_settings import SETTINGS_TYPE

KEY: Final = "change"
_REPOSITORY: Final = Path(__file__).parent.parent
_PACKAGE: Final = "synapse_sticky"
_BEFORE: Final = "before"
_AGAIN: Final = "again"
_AFTER: Final = "after"
_UNREACHED: Final = {"per_second": 100_000, "burst_count": 100_000}
_BOUND: Final = 1.02
# The bound is less than what two processes may differ by that do the same: as long as they live
# one is a little slower. So each kind of request is measured in several lives of the processes.
_LIVES: Final = 8
_PATIENCE: Final = 3


def measure_change(
    directory: Path,
    revision: str,
    rooms: int,
    rounds: int,
    requests: int,
    budget_s: float,
    progress: Progress,
    show: Callable[[Measurement], None],
) -> Section:
    """Make the same requests to the module of a revision, twice, and to the module as it is.

    Args:
        revision: whatever git understands.
        rooms: that the user is in who syncs.
        rounds: of each kind of request, at most.
        requests: to each server in each round.
        budget_s: how long each kind may take.
        show: told of each measurement.
    """
    code = directory / "code"
    commit = _take_out(revision, code)
    world = build_world(directory / "template", rooms, 2, progress.step)
    with contextlib.ExitStack() as stack:
        servers = []
        for name, path in ((_BEFORE, code), (_AGAIN, code), (_AFTER, _REPOSITORY)):
            server = _copy(world, name, directory / name, path)
            stack.callback(server.close)
            server.start()
            _decide(server, world, path)
            servers.append(server)
        order = random.Random(KEY)
        measured = [Measurement(scenario) for scenario in _scenarios(world, rooms)]
        for life in range(_LIVES):
            progress.line(f"Life {life + 1} of {_LIVES} of the processes")
            # Who starts first is slower, whatever code it has.
            for server in order.sample(servers, len(servers)):
                server.restart()
            for result in measured:
                result.add(
                    measure(
                        result.scenario,
                        servers,
                        rounds * _PATIENCE // _LIVES,
                        requests,
                        budget_s * _PATIENCE / _LIVES,
                        progress.step,
                    )
                )
        for result in measured:
            show(result)
    return _section(measured, commit)


def _take_out(revision: str, directory: Path) -> str:
    """Write the package as it was at a revision; returns the short name of its commit."""
    git = ("git", "-C", str(_REPOSITORY))
    named = subprocess.run(
        [*git, "rev-parse", "--short", f"{revision}^{{commit}}"], capture_output=True, check=False
    )
    if named.returncode:
        raise SystemExit(named.stderr.decode().strip())
    commit = named.stdout.decode().strip()
    archive = subprocess.run(
        [*git, "archive", commit, _PACKAGE], stdout=subprocess.PIPE, check=True
    ).stdout
    with tarfile.open(fileobj=BytesIO(archive)) as files:
        # The first releases of Python 3.10 and 3.11 have none.
        files.extraction_filter = getattr(tarfile, "data_filter", None)
        files.extractall(directory)
    return commit


def _has_control(code: Path) -> bool:
    """Whether this package has limits on what users send, settings, and the admin API."""
    return (code / _PACKAGE / "control").is_dir()


def _copy(world: World, name: str, directory: Path, code: Path) -> Server:
    config = {"local_rate_limit": _UNREACHED} if _has_control(code) else {}
    return copy_server(
        world.directory,
        name,
        STICKY,
        directory,
        # As it is: the harness adds options that not every revision knows.
        extra_config={"modules": [{"module": MODULE, "config": config}]},
        environment={"PYTHONPATH": str(code)},
    )


def _decide(server: Server, world: World, code: Path) -> None:
    """Let the room's admin and the server's decide something."""
    server.as_client(world.reader).send_state(world.small_room, SETTINGS_TYPE, {"enabled": True})
    if _has_control(code):
        path = f"{ADMIN_API_PATH}/rooms/{urllib.parse.quote(world.gap_room)}/settings"
        admin = server.register("admin", admin=True)
        server.exchange("PUT", path, admin, json.dumps({"enabled": True}).encode())


def _scenarios(world: World, rooms: int) -> list[Scenario]:
    room = world.small_room
    return [
        Send(world, "change_send", "Plain send", room),
        Send(world, "change_sticky_send", "Sticky send", room, sticky=True),
        IdleSync(world, "change_idle_sync", f"`/sync` with nothing new, user in {rooms} rooms"),
    ]


def _section(measured: list[Measurement], commit: str) -> Section:
    rows = "\n".join(
        f"| {m.scenario.title} | {m.cpu_ratio(_AFTER, _BEFORE)} | {m.cpu_ratio(_AGAIN, _BEFORE)} "
        f"| {m.wall_ratio(_AFTER, _BEFORE)} | {m.wall_ratio(_AGAIN, _BEFORE)} |"
        for m in measured
    )
    text = f"""\
The module as it is, to the module at commit `{commit}`, with the room's settings, an override of
another room and a limit on what users send. The other columns compare two processes of that
commit: what they differ from 1.00 by is what this measurement cannot tell apart. The processes are
started {_LIVES} times, and each ratio is the median of these lives.

| Request | CPU | CPU: the commit / itself | Time to answer | Time to answer: the commit / itself |
| --- | --- | --- | --- | --- |
{rows}"""
    targets = [
        at_most(f"{m.scenario.title}, to commit {commit}", m.cpu_ratio(_AFTER, _BEFORE), _BOUND)
        for m in measured
    ]
    return Section(KEY, "Compared with another revision", text, targets)
