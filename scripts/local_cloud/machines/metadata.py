"""Owns what servers are told at 169.254.169.254: the cloud's metadata service, which knows a caller by its address."""

import json
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler
from pathlib import Path

from scripts.local_cloud.machine_interface import MachineSpec, PrivateLink
from scripts.local_cloud.machines.inner_sockets import CallerServer, listen_in
from scripts.local_cloud.machines.network import METADATA_ADDRESS
from scripts.local_cloud.machines.seed import network_config, vendor_data

_ROOT = "/hetzner/v1"
_REGIONS = {"fsn1": "eu-central", "nbg1": "eu-central", "hel1": "eu-central", "ash": "us-east", "hil": "us-west"}
_DEFAULT_REGION = "eu-central"
_CALLER_TIMEOUT_S = 10.0


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

        self._server = CallerServer(listen_in(namespace, METADATA_ADDRESS, 80), Handler)
        self._server.start()

    def close(self) -> None:
        """Stops listening."""
        self._server.stop()
