# SPDX-License-Identifier: AGPL-3.0-or-later
"""Starts a real Synapse with the module, in a temporary directory, and tries it.

Only that runs every check of the seams: they look at a homeserver that is being set up. It
listens on a Unix socket, has an empty SQLite database, and knows no other server.
"""

import contextlib
import hashlib
import hmac
import json
import re
import secrets
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from synapse_sticky.command.checks import ERROR
from synapse_sticky.command.files import MODULE
from synapse_sticky.command.http import Client, Place, Refused, Unreachable
from synapse_sticky.command.live import Live
from synapse_sticky.command.report import Report, sentence

_START_S: Final = 120
_STOP_S: Final = 15
_ADMIN: Final = "/_synapse/admin/v1/register"
_OURS: Final = re.compile(r"(synapse_sticky (?:does not fit|needs) .*)")


class DoesNotFit(Exception):
    """Synapse did not start with the module, or delivers no sticky events. The text says why."""


def try_module(python: str, environment: Mapping[str, str]) -> None:
    """Start the Synapse of a Python environment with the module, and deliver a sticky event.

    Raises:
        DoesNotFit: saying why in a sentence or two.
    """
    # A path of a socket has 107 characters at most.
    with tempfile.TemporaryDirectory(prefix="synapse-sticky-", dir=_short_directory()) as name:
        directory = Path(name)
        secret = secrets.token_hex(16)
        place = Place("the Synapse on trial", str(directory / "socket"))
        _write_configuration(directory, secret)
        with _running(python, directory, environment) as (process, log):
            _wait_until_started(process, log, place)
            _try_exchange(Client(place, _register(Client(place), secret)))


def _short_directory() -> str | None:
    return "/tmp" if len(tempfile.gettempdir()) > 60 and Path("/tmp").is_dir() else None


def _write_configuration(directory: Path, secret: str) -> None:
    options = {
        "server_name": "trial.invalid",
        "report_stats": False,
        "pid_file": str(directory / "pid"),
        "signing_key_path": str(directory / "signing.key"),
        "media_store_path": str(directory / "media"),
        "trusted_key_servers": [],
        "suppress_key_server_warning": True,
        "registration_shared_secret": secret,
        "macaroon_secret_key": secret,
        "form_secret": secret,
        "bcrypt_rounds": 4,
        "background_updates": {"sleep_enabled": False},
        "database": {"name": "sqlite3", "args": {"database": str(directory / "database")}},
        "listeners": [
            {
                "type": "http",
                "path": str(directory / "socket"),
                "resources": [{"names": ["client", "federation"]}],
            }
        ],
        "modules": [{"module": MODULE, "config": {}}],
    }
    # JSON is YAML too.
    (directory / "homeserver.yaml").write_text(json.dumps(options), encoding="utf-8")


@contextlib.contextmanager
def _running(
    python: str, directory: Path, environment: Mapping[str, str]
) -> Iterator[tuple["subprocess.Popen[bytes]", Path]]:
    log = directory / "log"
    command = [python, "-m", "synapse.app.homeserver", "-c", str(directory / "homeserver.yaml")]
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            cwd=directory,
            env=dict(environment),
            # Ctrl-C is for this command, which ends the process itself.
            start_new_session=True,
        )
    try:
        yield process, log
    finally:
        process.terminate()
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_started(process: "subprocess.Popen[bytes]", log: Path, place: Place) -> None:
    deadline = time.monotonic() + _START_S
    client = Client(place, timeout_s=5)
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise DoesNotFit(_complaint(log))
        try:
            client.get("/_matrix/client/versions")
            return
        except (Unreachable, Refused):
            time.sleep(0.2)
    raise DoesNotFit(f"Synapse did not answer within {_START_S} s after its start.")


def _complaint(log: Path) -> str:
    """Return the last message of Synapse; that of our own checks if there is one."""
    text = log.read_text(encoding="utf-8", errors="replace")
    found = _OURS.findall(text)
    if found:
        return sentence(found[-1])
    lines = [line.strip() for line in text.splitlines() if line.strip(" *")]
    return sentence(f"Synapse did not start: {lines[-1] if lines else 'it said nothing'}")


def _register(client: Client, secret: str) -> str:
    """Return the token of a new admin."""
    password = secrets.token_hex(16)
    nonce = client.get(_ADMIN)["nonce"]
    proof = "\0".join((nonce, "trial", password, "admin"))
    answer = client.post(
        _ADMIN,
        {
            "nonce": nonce,
            "username": "trial",
            "password": password,
            "admin": True,
            "mac": hmac.new(secret.encode(), proof.encode(), hashlib.sha1).hexdigest(),
        },
    )
    token: str = answer["access_token"]
    return token


def _try_exchange(client: Client) -> None:
    report = Report()
    Live(report, client, timeout_s=30, output=None).run()
    wrong = [f"{f.id}: {f.text}" for f in report.findings if f.level is ERROR]
    if wrong:
        raise DoesNotFit("Synapse starts with the module, but " + " ".join(wrong))
