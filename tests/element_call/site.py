"""All that Element Call is given but Synapse: its files, a page around it, and no media server."""

import base64
import json
import shutil
import socket
import subprocess
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from harness.client import JsonDict
from harness.processes import free_port

HERE = Path(__file__).parent
MODULES = HERE / "node_modules"

# How long somebody who fell silent takes part, and how often one says that it is there.
LEAVE_DELAY_S = 6
RESTART_S = 1.5


class Site:
    """A web server with the host page, Element Call, and an endpoint that gives tokens for media.

    The media server that the tokens are for takes connections, and never says anything.

    Attributes:
        url: the address of the host page.
        other_service: where it gives such tokens too, other than Element Call's configuration says.
        token_requests: the bodies of the requests for a token.
    """

    def __init__(self, directory: Path) -> None:
        self._bundle = directory / "host.js"
        _bundle_host(self._bundle)
        self._media = socket.create_server(("127.0.0.1", free_port()))
        self._server = ThreadingHTTPServer(("127.0.0.1", free_port()), partial(_Handler, self))
        self._root = f"http://127.0.0.1:{self._server.server_port}"
        self.url = f"{self._root}/host.html"
        self.other_service = f"{self._root}/other-livekit"
        self.token_requests: list[JsonDict] = []
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def configuration(self) -> JsonDict:
        """Return the `config.json` of Element Call."""
        leave = {"delay_ms": LEAVE_DELAY_S * 1000, "restart_ms": int(RESTART_S * 1000)}
        return {
            "matrix_rtc_mode": "matrix_2_0",
            "livekit": {"livekit_service_url": f"{self._root}/livekit"},
            "matrix_rtc_session": {"delayed_leave": leave},
        }

    def find_file(self, path: str) -> Path | None:
        """Return the file that has a path."""
        places = {
            "/host.html": HERE / "host.html",
            "/host.js": self._bundle,
            "/element-call": MODULES / "@element-hq" / "element-call-embedded" / "dist",
            # The SDK's encryption asks for its WebAssembly there.
            "/pkg": MODULES / "@matrix-org" / "matrix-sdk-crypto-wasm" / "pkg",
        }
        for start, place in places.items():
            if path == start or path.startswith(f"{start}/"):
                return place / path.removeprefix(start).removeprefix("/")
        return None

    def give_token(self, body: JsonDict) -> JsonDict:
        """Return the address of the media server, and a token for it that proves nothing."""
        self.token_requests.append(body)
        # Element Call reads these in it.
        claims = {"sub": "somebody", "video": {"room": "a-room", "roomJoin": True}}
        parts = [
            base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=")
            for part in ({"alg": "none"}, claims)
        ]
        host, port = self._media.getsockname()
        return {"url": f"ws://{host}:{port}", "jwt": ".".join([*parts, "signature"])}

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._media.close()


class _Handler(SimpleHTTPRequestHandler):
    def __init__(self, site: Site, *arguments: Any) -> None:
        self._site = site
        super().__init__(*arguments)

    def translate_path(self, path: str) -> str:
        found = self._site.find_file(path.partition("?")[0])
        return str(found or HERE / "nothing")

    def do_GET(self) -> None:
        if self.path == "/element-call/config.json":
            self._answer(200, self._site.configuration())
        else:
            super().do_GET()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path.endswith("/get_token"):
            self._answer(200, self._site.give_token(json.loads(body)))
        else:
            # Nor does it manage delayed leaves, which Element Call asks for.
            self._answer(404, {"errcode": "M_UNRECOGNIZED", "error": "Not here"})

    def _answer(self, status: int, content: JsonDict) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        pass


def _bundle_host(bundle: Path) -> None:
    """Write one file with `host.mjs` and all that it imports."""
    node = shutil.which("node")
    assert node is not None, "there is no Node"
    assert MODULES.is_dir(), "`make test-element-call` installs Element Call"
    command = [node, str(MODULES / "esbuild" / "bin" / "esbuild"), "host.mjs"]
    options = ["--bundle", "--format=esm", "--log-level=error", f"--outfile={bundle}"]
    subprocess.run([*command, *options], cwd=HERE, check=True)
