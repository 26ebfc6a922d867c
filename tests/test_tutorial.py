"""The commands of the tutorial and of the pages on how to do something work as they stand there.

All but those for which there is nothing on a machine of the tests: packages, proxies, backups.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from harness.client import quote
from harness.homeserver import Homeserver
from harness.remote import RemoteServer
from harness.wait import eventually
from tests.federation import create_room
from tests.support import MakeHomeserver, is_recorded, send_sticky

DOCS = Path(__file__).parents[1] / "docs"
PAGE = DOCS / "tutorial.md"
API = "/_synapse/client/synapse_sticky/admin/v1"


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


@pytest.mark.deployments("sqlite")
@pytest.mark.parametrize("page", ["switch-a-room", "call-without-participants", "missing-event"])
def test_how_to(homeserver: Homeserver, remote: RemoteServer, page: str) -> None:
    """Each page in one go, in a room with a sticky event that another server is in."""
    admin = homeserver.register(admin=True)
    room = create_room(admin)
    remote.join(homeserver, room, "carol")
    (sent,) = send_sticky(admin, room)
    eventually(lambda: is_recorded(homeserver, sent), what="the event")
    blocks = _blocks((DOCS / "how-to" / f"{page}.md").read_text(encoding="utf-8"))
    assert len(blocks) >= 3
    room_in_path = quote(room)
    known = {
        "https://matrix.example.com": homeserver.main_url,
        "%21call%3Aexample.com": room_in_path,
        "syt_...": admin.access_token,
        "matrix.example.org": remote.server_name,
    }
    begin = [
        f"export API={homeserver.main_url}{API} ROOM={room_in_path} TOKEN={admin.access_token}",
        f"export AUTH='Authorization: Bearer {admin.access_token}'",
    ]
    used = {name: real for name, real in known.items() if name in "".join(blocks)}
    # Every request succeeds, but that to end a back-off: there is none.
    blocks = [
        block if "reset_connection" in block else block.replace("curl -sS", "curl -sS --fail")
        for block in blocks
    ]
    said = _run([*begin, *blocks], homeserver, used)
    assert said
    assert "M_UNRECOGNIZED" not in said
    if page == "call-without-participants":
        assert f"{room} 0" in said or f"{room} 1" in said
        assert admin.user_id in said
