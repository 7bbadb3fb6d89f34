"""Owns what servers are told at 169.254.169.254: the cloud's metadata service, which knows a caller by its address."""

import ctypes
import json
import os
import socket
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from scripts.local_cloud.machine_interface import MachineFailed, MachineSpec, PrivateLink
from scripts.local_cloud.machines.network import METADATA_ADDRESS
from scripts.local_cloud.machines.seed import network_config, vendor_data

_CLONE_NEWNET = 0x40000000
_ROOT = "/hetzner/v1"
_REGIONS = {"fsn1": "eu-central", "nbg1": "eu-central", "hel1": "eu-central", "ash": "us-east", "hil": "us-west"}
_DEFAULT_REGION = "eu-central"
_CALLER_TIMEOUT_S = 10.0
_CALLS_AT_ONCE = 16


def answer(path: str, spec: MachineSpec, resolvers: list[str], links: Mapping[int, PrivateLink]) -> str | None:
    """The text at a path for a server, or None where there is nothing; ``links`` are its private ones by number."""
    path = path.partition("?")[0].rstrip("/")
    if path == f"{_ROOT}/userdata":
        return spec.user_data
    if path == f"{_ROOT}/metadata":
        return _document(spec, resolvers)
    if path == f"{_ROOT}/metadata/private-networks":
        return private_networks(links)
    return _values(spec).get(path.removeprefix(f"{_ROOT}/metadata/")) if path.startswith(_ROOT) else None


def region_of(location: str) -> str:
    """The network zone of a location."""
    return _REGIONS.get(location, _DEFAULT_REGION)


def private_networks(links: Mapping[int, PrivateLink]) -> str:
    """The interfaces that cloud-init leaves alone, as YAML."""
    texts = []
    for number, link in sorted(links.items()):
        fields = {
            "ip": link.ip,
            "alias_ips": json.dumps(list(link.alias_ips)),
            "interface_num": number,
            "mac_address": link.mac_address,
            "network_id": link.network_id,
            "network_name": json.dumps(link.network_name),
            "network": link.ip_range,
            "subnet": link.subnet,
            "gateway": link.gateway,
        }
        texts.append("- " + "  ".join(f"{name}: {value}\n" for name, value in fields.items()))
    return "".join(texts) or "[]\n"


def _values(spec: MachineSpec) -> dict[str, str]:
    return {
        "hostname": spec.name,
        "instance-id": str(spec.server_id),
        "public-ipv4": spec.ipv4 or "",
        "availability-zone": f"{spec.location}-dc1",
        "region": region_of(spec.location),
        "public-keys": json.dumps(list(spec.public_keys)),
    }


def _document(spec: MachineSpec, resolvers: list[str]) -> str:
    values = _values(spec)
    fields: dict[str, object] = {
        "availability-zone": values["availability-zone"],
        "hostname": spec.name,
        "instance-id": spec.server_id,
        "local-ipv4": "",
        "network-config": network_config(spec, resolvers),
        "public-ipv4": spec.ipv4 or "",
        "public-keys": list(spec.public_keys),
        "region": values["region"],
        "vendor_data": vendor_data(spec),
    }
    # A value in JSON is one in YAML too.
    return "".join(f"{name}: {json.dumps(value, ensure_ascii=False)}\n" for name, value in fields.items())


def listen_in(namespace: Path, address: str, port: int) -> socket.socket:
    """A listening socket in another network namespace; raises MachineFailed."""
    made: list[socket.socket] = []
    failed: list[OSError] = []

    def enter() -> None:
        # Only this thread moves there, and it ends right away; a socket stays where it was made.
        try:
            with namespace.open("rb") as file:
                if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), _CLONE_NEWNET) != 0:
                    number = ctypes.get_errno()
                    raise OSError(number, os.strerror(number))
            made.append(socket.create_server((address, port), backlog=64))
        except OSError as error:
            failed.append(error)

    thread = threading.Thread(target=enter, name="enter-namespace")
    thread.start()
    thread.join()
    if failed:
        raise MachineFailed(f"metadata at {address}:{port}: {failed[0].strerror}") from failed[0]
    return made[0]


class CallerServer(ThreadingHTTPServer):
    """A thread for each caller, and few of them for each server: one that never ends its requests costs no others."""

    daemon_threads = True

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._calls: Counter[str] = Counter()
        self._counting = threading.Lock()

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


class MetadataService:
    """Serves until closed.

    ``find`` gives the running server that has an address, or None; ``find_private`` its private links by number.
    """

    def __init__(
        self,
        namespace: Path,
        find: Callable[[str], MachineSpec | None],
        resolvers: Callable[[], list[str]],
        find_private: Callable[[int], Mapping[int, PrivateLink]],
    ) -> None:
        class Handler(BaseHTTPRequestHandler):
            timeout = _CALLER_TIMEOUT_S

            def do_GET(self) -> None:
                spec = find(self.client_address[0])
                text = answer(self.path, spec, resolvers(), find_private(spec.server_id)) if spec else None
                body = ("not found" if text is None else text).encode()
                self.send_response(404 if text is None else 200)
                self.send_header("Content-Type", "text/plain; charset=utf-8")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments: object) -> None:
                pass  # nobody reads it

        listening = listen_in(namespace, METADATA_ADDRESS, 80)
        self._server = CallerServer((METADATA_ADDRESS, 80), Handler, bind_and_activate=False)
        self._server.socket.close()
        self._server.socket = listening
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.1}, name="metadata", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stops listening."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
