"""A TCP proxy in front of a homeserver, which can be told to misbehave."""

import contextlib
import enum
import selectors
import socket
import ssl
import tempfile
import threading
import time
from pathlib import Path

from harness.certificate import write_certificate


class Fault(enum.Enum):
    """What the proxy does with connections."""

    NONE = enum.auto()
    # Closed as soon as they are accepted.
    CLOSE = enum.auto()
    # Closed once the other side has begun to answer: what was asked for has happened.
    CUT_ANSWERS = enum.auto()
    # Accepted, and nothing else.
    HANG = enum.auto()
    # Every request is answered with 500.
    ERROR = enum.auto()


class FaultyProxy:
    """Passes connections to a port of 127.0.0.1 on to another, until it is closed.

    Attributes:
        port: where it listens.
        delay_s: how long everything that is sent takes on its way.
    """

    def __init__(self, port: int, target_port: int) -> None:
        self.port = port
        self.target_port = target_port
        self.delay_s: float = 0
        self._fault = Fault.NONE
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", self.port), backlog=128)
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        with tempfile.TemporaryDirectory() as directory:
            paths = Path(directory) / "tls.crt", Path(directory) / "tls.key"
            write_certificate(*paths)
            self._tls.load_cert_chain(*paths)

        self._thread.start()

    def close(self) -> None:
        """Stop listening, and close all connections."""
        self._stop.set()
        # Wakes the thread that accepts.
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
        self._thread.join(5)
        self._listener.close()
        self.set_fault(Fault.HANG)

    def set_fault(self, fault: Fault) -> None:
        """From now on do this; connections from before are closed, if that is a change."""
        with self._lock:
            if fault is self._fault:
                return
            self._fault = fault
            connections, self._open = self._open, set()
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while not self._stop.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with self._lock:
            fault = self._fault
            self._open.add(connection)
        with connection, contextlib.suppress(OSError):
            if fault is Fault.HANG:
                while connection.recv(65536):
                    pass
            elif fault is Fault.ERROR:
                self._answer_errors(connection)
            elif fault is not Fault.CLOSE:
                self._pass_on(connection, cut_answers=fault is Fault.CUT_ANSWERS)
        with self._lock:
            self._open.discard(connection)

    def _answer_errors(self, connection: socket.socket) -> None:
        with self._tls.wrap_socket(connection, server_side=True) as stream:
            stream.recv(65536)
            body = b'{"errcode":"M_UNKNOWN","error":"The test wants it so"}'
            head = (
                "HTTP/1.1 500 Internal Server Error\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
            )
            stream.sendall(head.encode() + body)

    def _pass_on(self, connection: socket.socket, cut_answers: bool) -> None:
        with (
            socket.create_connection(("127.0.0.1", self.target_port), timeout=5) as target,
            selectors.DefaultSelector() as selector,
        ):
            target.settimeout(None)
            with self._lock:
                self._open.add(target)
            other = {connection: target, target: connection}
            for end in other:
                selector.register(end, selectors.EVENT_READ)
            # The handshake is no answer yet: that begins after the request's body.
            asked = 0
            try:
                while True:
                    for key, _ in selector.select():
                        side = key.fileobj
                        assert isinstance(side, socket.socket)
                        data = side.recv(65536)
                        if not data:
                            return
                        if side is connection:
                            asked += len(data)
                        elif cut_answers and asked > _HANDSHAKE_BYTES:
                            return
                        if self.delay_s:
                            time.sleep(self.delay_s)
                        other[side].sendall(data)
            finally:
                with self._lock:
                    self._open.discard(target)


# A client's part of a TLS handshake is smaller, and a transaction larger.
_HANDSHAKE_BYTES = 1_200
