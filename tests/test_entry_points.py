"""Synapse's tools: they read its configuration or its database, and are no servers."""

import secrets
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import yaml

from harness.client import Client
from harness.homeserver import Homeserver
from harness.processes import ManagedProcess
from harness.wait import eventually
from tests.support import (
    HOUR_MS,
    MakeHomeserver,
    assert_once,
    follow_until_seen,
    send_plain,
    send_sticky,
)

pytestmark = pytest.mark.slow

CONFIG = "homeserver.yaml"


def run(homeserver: Homeserver, *command: str | Path) -> str:
    """Run a tool of Synapse's where its configuration is, and return what it printed."""
    ended = subprocess.run(
        [sys.executable, "-m", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        cwd=homeserver.directory,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout
    assert "Traceback" not in ended.stdout
    return ended.stdout


def without_modules(homeserver: Homeserver) -> str:
    """Write the configuration once more, without any module, and return the file's name."""
    path = homeserver.directory / CONFIG
    config = yaml.safe_load(path.read_text())
    del config["modules"]
    (homeserver.directory / "plain.yaml").write_text(yaml.safe_dump(config))
    return "plain.yaml"


def files_in(directory: Path) -> dict[str, str]:
    """The files below a directory, and what they contain."""
    return {
        str(path.relative_to(directory)): path.read_text()
        for path in directory.rglob("*")
        if path.is_file()
    }


# O1
def test_tools_that_load_modules_or_use_the_database(make_homeserver: MakeHomeserver) -> None:
    """They do with the module what they do without."""
    homeserver = make_homeserver()
    homeserver.start()
    alice, room, sent = with_history(homeserver)
    name = f"registered-{secrets.token_hex(4)}"
    new_user = ("-c", CONFIG, "-u", name, "-p", "password", "--no-admin", homeserver.main_url)
    run(homeserver, "synapse._scripts.register_new_matrix_user", *new_user)
    homeserver.stop()

    exports = []
    for number, config in enumerate((without_modules(homeserver), CONFIG)):
        export = homeserver.directory / f"export{number}"
        command = ("-c", config, "export-data", alice.user_id, "--output-directory", export)
        run(homeserver, "synapse.app.admin_cmd", *command)
        exports.append(files_in(export))
    without, with_module = exports
    assert any(sent[0] in content for content in without.values())
    assert with_module == without

    update = ("--database-config", CONFIG, "--run-background-updates")
    run(homeserver, "synapse._scripts.update_synapse_database", *update)
    run(homeserver, "synapse.app.homeserver", "-c", CONFIG, "--generate-keys")
    generate = ("--generate-config", "--report-stats=no", "--server-name", homeserver.server_name)
    run(homeserver, "synapse.app.homeserver", "-c", CONFIG, *generate)
    run(homeserver, "synapse._scripts.review_recent_signups", "-c", CONFIG)
    run(homeserver, "synapse._scripts.hash_password", "-c", CONFIG, "-p", "password")

    # They have left everything in its place.
    position = homeserver.log_position()
    homeserver.start()
    assert_once(follow_until_seen(alice, room, sent), room, sent)
    assert homeserver.problems_since(position) == ""


def with_history(homeserver: Homeserver) -> tuple[Client, str, list[str]]:
    """A user, a room, and what the user has sent there that is sticky."""
    alice = homeserver.register()
    room = alice.create_room()
    sent = send_sticky(alice, room, 2, sticky_ms=HOUR_MS)
    send_plain(alice, room, 1)
    follow_until_seen(alice, room, sent)
    return alice, room, sent


# O1
def test_launcher_that_forks(make_homeserver: MakeHomeserver) -> None:
    """Complement starts all processes of Synapse as forks of one that has imported them."""
    homeserver = make_homeserver()
    homeserver.start()
    alice, room, sent = with_history(homeserver)
    homeserver.stop()
    launcher = ManagedProcess(
        [
            *(sys.executable, "-m", "synapse.app.complement_fork_starter", CONFIG),
            *("synapse.app.homeserver", "-c", CONFIG),
        ],
        homeserver.directory / "launcher.log",
        directory=homeserver.directory,
    )
    try:
        url = f"{homeserver.main_url}/health"

        def is_up() -> bool:
            assert launcher.exit_code is None, launcher.read_output()
            try:
                return homeserver.http.get(url).is_success
            except httpx.TransportError:
                return False

        eventually(is_up, 120, "Synapse, forked")
        sent += send_sticky(alice, room)
        assert_once(follow_until_seen(alice, room, sent), room, sent)
    finally:
        launcher.stop(signal.SIGTERM)
    assert " WARNING synapse_sticky" not in launcher.read_output()
    assert " ERROR synapse_sticky" not in launcher.read_output()
