"""The tutorial works as it stands there, but for what a machine of the tests does not have."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from harness.homeserver import Homeserver
from tests.support import MakeHomeserver

PAGE = Path(__file__).parents[1] / "docs" / "tutorial.md"


def _blocks(text: str) -> list[str]:
    return re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def _run(commands: list[str], homeserver: Homeserver, replaced: dict[str, str]) -> str:
    script = "\n".join(["set -eo pipefail", *commands])
    for name, real in replaced.items():
        assert name in script, name
        script = script.replace(name, real)
    done = subprocess.run(
        ["bash", "-c", script],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=homeserver.directory,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.slow
@pytest.mark.any_synapse
def test_the_commands(make_homeserver: MakeHomeserver) -> None:
    """Synapse takes the configuration, and a call is seen to begin and to end."""
    text = PAGE.read_text(encoding="utf-8")
    (settings,) = re.findall(r"<<'END'\n\n(# Delayed events.*?)^END$", text, re.M | re.S)
    homeserver = make_homeserver(extra_config=yaml.safe_load(settings))
    homeserver.start()
    blocks = _blocks(text)
    (first,) = [n for n, block in enumerate(blocks) if "client/versions" in block]
    # From there, but for what is about nginx.
    commands = [block for block in blocks[first:] if "nginx" not in block]
    said = _run(
        commands,
        homeserver,
        {
            "/opt/synapse/bin/register_new_matrix_user": f"{sys.executable} -m "
            "synapse._scripts.register_new_matrix_user",
            "/etc/synapse/homeserver.yaml": str(homeserver.directory / "homeserver.yaml"),
            "/var/lib/synapse/homeserver.log": str(homeserver.directory / "main.log"),
            "http://localhost:8008": homeserver.main_url,
            "@alice:example.com": f"@alice:{homeserver.server_name}",
            # In less time.
            "delay=30000": "delay=5000",
            "sleep 35": "sleep 8",
        },
    )
    for feature in ("4354", "4140"):
        assert f'"org.matrix.msc{feature}": true' in said
    assert "This process: stores events" in said
    assert '"livekit_service_url":"https://matrix-rtc.example.com/livekit/jwt"' in said
    assert '"sticky_key":"alice-phone"' in said
    alice = f"@alice:{homeserver.server_name}"
    seen = re.findall(rf"{alice} (is in|has left) (\d+) s more$", said, re.MULTILINE)
    assert [what for what, _ in seen] == ["is in", "is in", "has left"]
    assert all(3_500 < int(more_s) <= 3_600 for _, more_s in seen)
