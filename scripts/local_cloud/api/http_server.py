"""Owns the HTTP server: threads on a loopback address that hand the client's socket to the application."""

import threading
from collections.abc import Callable, Iterable
from ipaddress import ip_address
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from scripts.local_cloud.api.faults import SOCKET

# A client that sends nothing for so long is cut off, so that it does not keep a thread for ever.
_SILENCE_LIMIT_S = 60.0


class NotLoopback(Exception):
    """The address is one that others could reach."""


class _Handler(WSGIRequestHandler):
    timeout = _SILENCE_LIMIT_S

    def get_environ(self) -> dict[str, Any]:
        return {**super().get_environ(), SOCKET: self.connection}

    def address_string(self) -> str:
        return str(self.client_address[0])  # the name behind it would have to be looked up

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # its name in the base class
        """Says nothing: the fault plan's record holds every call."""


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def server_bind(self) -> None:
        # The base class looks the host's name up, which can take long and is of no use here.
        super(WSGIServer, self).server_bind()
        name, self.server_port = self.server_address[:2]
        self.server_name = str(name)
        self.setup_environ()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing of clients that went away; what the application breaks on, it logs itself."""


class HttpServer:
    """Serves one application; it listens from its making on, so that ``port`` 0 can be asked what it became."""

    def __init__(self, app: Callable[..., Iterable[bytes]], host: str = "127.0.0.1", port: int = 8899):
        """Raises NotLoopback, or OSError if the port is taken."""
        if not ip_address(host).is_loopback or ":" in host:
            raise NotLoopback(f"{host} is not an IPv4 loopback address")
        self._server = _Server((host, port), _Handler)
        self._server.set_app(app)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), name="http", daemon=True)
        self.host, self.port = host, self._server.server_port

    @property
    def endpoint(self) -> str:
        """The URL that clients are given."""
        return f"http://{self.host}:{self.port}/v1"

    def start(self) -> None:
        """Begins to answer, in threads."""
        self._thread.start()

    def stop(self) -> None:
        """Takes no more connections and returns; answers under way are still sent while the process lives."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()
