"""Owns how the cloud listens inside a network namespace: sockets made there, and a server that no caller can use up."""

import ctypes
import os
import socket
import threading
from collections import Counter
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

from scripts.local_cloud.machine_interface import MachineFailed

_CLONE_NEWNET = 0x40000000
_CALLS_AT_ONCE = 16
_BACKLOG = 64


def listen_in(namespace: Path, address: str, port: int, kind: socket.SocketKind = socket.SOCK_STREAM) -> socket.socket:
    """A socket in another network namespace that takes connections, or datagrams; raises MachineFailed."""
    made: list[socket.socket] = []
    failed: list[OSError] = []

    def enter() -> None:
        # Only this thread moves there, and it ends right away; a socket stays where it was made.
        try:
            with namespace.open("rb") as file:
                if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), _CLONE_NEWNET) != 0:
                    number = ctypes.get_errno()
                    raise OSError(number, os.strerror(number))
            made.append(_bind(address, port, kind))
        except OSError as error:
            failed.append(error)

    thread = threading.Thread(target=enter, name="enter-namespace")
    thread.start()
    thread.join()
    if failed:
        protocol = "TCP" if kind == socket.SOCK_STREAM else "UDP"
        raise MachineFailed(f"{address}, {protocol} port {port}: {failed[0].strerror}") from failed[0]
    return made[0]


def _bind(address: str, port: int, kind: socket.SocketKind) -> socket.socket:
    if kind == socket.SOCK_STREAM:
        return socket.create_server((address, port), backlog=_BACKLOG)
    bound = socket.socket(socket.AF_INET, kind)
    try:
        bound.bind((address, port))
    except OSError:
        bound.close()
        raise
    return bound


class CallerServer(ThreadingHTTPServer):
    """A thread for each caller, and few of them for each server: one that never ends its requests costs no others."""

    daemon_threads = True

    def __init__(self, listening: socket.socket, handler: Any) -> None:
        """Serves at a socket that listens already, by handlers of any protocol."""
        super().__init__(listening.getsockname(), handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listening
        self._calls: Counter[str] = Counter()
        self._counting = threading.Lock()
        self._thread = threading.Thread(
            target=self.serve_forever, kwargs={"poll_interval": 0.1}, name=handler.__qualname__, daemon=True
        )

    def start(self) -> None:
        """Serves from now on."""
        self._thread.start()

    def stop(self) -> None:
        """Listens no more."""
        self.shutdown()
        self._thread.join()
        self.server_close()

    def verify_request(self, request: object, client_address: Any) -> bool:
        with self._counting:
            if self._calls[client_address[0]] >= _CALLS_AT_ONCE:
                return False
            self._calls[client_address[0]] += 1
            return True

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._counting:
                self._calls[client_address[0]] -= 1

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a caller that hangs up is none of the cloud's business
