"""Owns the bake that the image's tests share: Packer over the local cloud, and nodes made from its snapshot."""

import hashlib
import json
import os
import secrets
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hcloud import Client
from hcloud.images import BoundImage, Image
from hcloud.networks import BoundNetwork, Network
from hcloud.server_types import ServerType
from hcloud.servers import BoundServer
from hcloud.ssh_keys import BoundSSHKey

from scripts.local_cloud.machines.network import tag_of, transfer_addresses
from tests.image.registry import kept_storage, make_certificate, running_registry
from tests.local_cloud.harness import LocalCloud, address_of, ssh
from tests.ports import free_port
from tests.programs import (
    ALERTMANAGER,
    GRAFANA_STAND_IN,
    NODE_EXPORTER,
    PACKER,
    PACKER_PLUGIN_HCLOUD,
    PROMETHEUS,
    TRAEFIK,
    obtain,
)

ROOT = Path(__file__).resolve().parents[2]
DOMAIN = "llm.test"
# What the image's containers hold in tests; Grafana cannot be had there.
CONTAINERS = {
    "traefik": TRAEFIK,
    "prometheus": PROMETHEUS,
    "alertmanager": ALERTMANAGER,
    "node-exporter": NODE_EXPORTER,
    "grafana": GRAFANA_STAND_IN,
}
_BAKE_TIMEOUT_S = 900
# Where an index is reached through a network that inspects TLS, its authority stands among the host's.
_HOST_AUTHORITIES = Path("/etc/ssl/certs/ca-certificates.crt")


def packer_environment(folder: Path) -> dict[str, str]:
    """Variables with which Packer is on the PATH and has its plugin. Raises ProgramMissing."""
    program, plugin = obtain(PACKER), obtain(PACKER_PLUGIN_HCLOUD)
    (folder / "bin").mkdir(exist_ok=True)
    (folder / "bin" / "packer").unlink(missing_ok=True)
    (folder / "bin" / "packer").symlink_to(program)
    own = {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "PACKER_PLUGIN_PATH": str(folder / "plugins"),
        "PACKER_CONFIG_DIR": str(folder),
        "CHECKPOINT_DISABLE": "1",
    }
    _run_packer({**os.environ, **own}, "plugins", "install", "--path", str(plugin), "github.com/hetznercloud/hcloud")
    return own


def _run_packer(environment: dict[str, str], *words: str) -> str:
    done = subprocess.run(
        ["packer", *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=_BAKE_TIMEOUT_S
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def packer(folder: Path, environment: dict[str, str], *words: str) -> str:
    """Runs Packer with its plugin in place; returns what it said. Raises ProgramMissing; fails with its words."""
    return _run_packer({**environment, **packer_environment(folder)}, *words)


@contextmanager
def stand_in_registry(cloud: LocalCloud, folder: Path) -> Iterator[tuple[Path, Path]]:
    """A registry that has what tests put into containers: the file that pins it, and the authorities to trust."""
    host, _ = transfer_addresses(tag_of(cloud.state))  # where servers reach this host
    with running_registry(folder, host, free_port(), kept_storage(CONTAINERS)) as registry:
        pins = json.loads((ROOT / "image" / "pins.json").read_text())
        for name, program in CONTAINERS.items():
            own = {"version": program.version, "digest": registry.digest_of(name)}
            pins["images"][name] = {"image": f"{registry.address}/{name}", **own}
        pins_file, authorities = folder / "pins.json", folder / "authorities.crt"
        pins_file.write_text(json.dumps(pins))
        authorities.write_text(_HOST_AUTHORITIES.read_text() + registry.authority.read_text())
        yield pins_file, authorities


def bake(cloud: LocalCloud, folder: Path, **variables: str) -> BoundImage:
    """Bakes with these variables of the template, and container images from a registry of our own; the snapshot."""
    with stand_in_registry(cloud, folder) as (pins_file, authorities):
        words = [f"-var={name}={value}" for name, value in variables.items()]
        words += [f"-var=pins_file={pins_file}", f"-var=extra_ca_file={authorities}"]
        packer(folder, cloud.environment, "build", "-color=false", *words, "image")
    return cloud.client().images.get_all(type=["snapshot"], sort=["id:desc"])[0]


def disk_of(cloud: LocalCloud, image: BoundImage) -> Path:
    """The snapshot's own files, as root of this host sees them."""
    return cloud.state / "pool" / "images" / str(image.id)


@dataclass(frozen=True)
class Node:
    """A server from the image, with a way in and a key of its service."""

    server: BoundServer
    address: str
    key_file: Path
    api_key: str
    password: str  # of the monitoring's user
    authority: Path  # of its certificate, which it brought itself

    def run(self, command: str) -> str:
        """What a command on the node prints."""
        return ssh(self.key_file, self.address, command)

    def curl(self, path: str, *words: str, scheme: str = "https", host: str = DOMAIN) -> tuple[int, str]:
        """Status and body of a request to the node by its name, from outside; 0 where nobody answers."""
        options = ["-s", "--max-time", "60", "-w", "\n%{http_code}", "--cacert", str(self.authority)]
        options += [word for port in (80, 443) for word in ("--resolve", f"{host}:{port}:{self.address}")]
        done = subprocess.run(
            ["curl", *options, *words, f"{scheme}://{host}{path}"], capture_output=True, text=True, timeout=90
        )
        body, _, status = done.stdout.rpartition("\n")
        return int(status), body

    def ask(
        self, path: str, body: dict[str, Any] | None = None, key: str | None = None, *words: str
    ) -> tuple[int, str]:
        """Status and body of a request with a key."""
        more = ["-H", f"Authorization: Bearer {key or self.api_key}", *words]
        if body is not None:
            more += ["-H", "Content-Type: application/json", "-d", json.dumps(body)]
        return self.curl(path, *more)

    def see(self, path: str, *words: str) -> Any:
        """What the monitoring says to its user, as JSON; fails with what it said instead."""
        own = ("-u", f"operator:{self.password}")
        status, body = self.curl(path, *own, *words, host=f"monitoring.{DOMAIN}")
        assert status == 200, (path, status, body)
        return json.loads(body)

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The series that Prometheus answers with."""
        answer = self.see("/prometheus/api/v1/query", "--get", "--data-urlencode", f"query={expression}")
        return list(answer["data"]["result"])

    def wait_ready(self, patience_s: float = 60.0) -> dict[str, Any]:
        """What /ready says once it is ready."""
        end_s = time.monotonic() + patience_s
        while True:
            status, answer = self.ask("/ready")
            if status == 200:
                return dict(json.loads(answer))
            assert time.monotonic() < end_s, answer
            time.sleep(0.2)


def _hash_password(password: str) -> str:
    done = subprocess.run(["openssl", "passwd", "-apr1", "-stdin"], input=password, capture_output=True, text=True)
    return done.stdout.strip()


def facts_file(content: str) -> str:
    """User-data with these facts."""
    lines = "".join(f"      {line}\n" for line in content.splitlines())
    head = "#cloud-config\nwrite_files:\n  - path: /etc/mini-llm/facts.yaml\n    permissions: '0600'\n    content: |\n"
    return head + lines


@contextmanager
def node(
    client: Client,
    image: BoundImage | Image,
    known: BoundSSHKey,
    key_file: Path,
    facts: str | None = None,
    acme: dict[str, str] | None = None,
    more: dict[str, Any] | None = None,
    networks: list[Network | BoundNetwork] | None = None,
) -> Iterator[Node]:
    """A node with one API key and a certificate of its own, or one to order; or with the facts given. Deleted after.

    ``more`` are further facts beside these.
    """
    api_key, password = f"mllm_{secrets.token_hex(16)}", secrets.token_hex(16)
    with tempfile.TemporaryDirectory() as folder:
        chain, secret = make_certificate(Path(folder), f"DNS:{DOMAIN}", f"DNS:monitoring.{DOMAIN}")
        right: dict[str, Any] = {
            "domain": DOMAIN,
            "certificate": {"chain": chain.read_text(), "key": secret.read_text()},
            "api_keys": [
                {
                    "name": "first",
                    "sha256": hashlib.sha256(api_key.encode()).hexdigest(),
                    "scopes": ["generate", "metrics"],
                }
            ],
            "monitoring": {"user": "operator", "password_hash": _hash_password(password)},
            "price_eur_per_hour": 0.0136,
            **(more or {}),
        }
        if acme is not None:
            del right["certificate"]
            right["acme"] = acme
        made = client.servers.create(
            f"node-{secrets.token_hex(3)}",
            ServerType(name="cx23"),
            image,
            ssh_keys=[known],
            networks=networks,
            user_data=facts_file(json.dumps(right) if facts is None else facts),
        )
        try:
            for action in (made.action, *made.next_actions):
                action.wait_until_finished()
            yield Node(made.server, address_of(made.server), key_file, api_key, password, chain)
        finally:
            made.server.delete().wait_until_finished()
