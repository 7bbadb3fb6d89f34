"""Owns the bake that the image's tests share: Packer over the local cloud, and nodes made from its snapshot."""

import hashlib
import json
import secrets
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
from hcloud import Client
from hcloud.images import BoundImage, Image
from hcloud.server_types import ServerType
from hcloud.servers import BoundServer
from hcloud.ssh_keys import BoundSSHKey

from tests.local_cloud.harness import TOKEN, LocalCloud, ssh
from tests.programs import PACKER, PACKER_PLUGIN_HCLOUD, obtain

ROOT = Path(__file__).resolve().parents[2]
_BAKE_TIMEOUT_S = 900
# Where an index is reached through a network that inspects TLS, its authority stands among the host's.
_HOST_AUTHORITIES = Path("/etc/ssl/certs/ca-certificates.crt")


def packer(folder: Path, environment: dict[str, str], *words: str) -> str:
    """Runs Packer with its plugin in place; returns what it said. Raises ProgramMissing; fails with its words."""
    program, plugin = obtain(PACKER), obtain(PACKER_PLUGIN_HCLOUD)
    own = {"PACKER_PLUGIN_PATH": str(folder / "plugins"), "PACKER_CONFIG_DIR": str(folder), "CHECKPOINT_DISABLE": "1"}
    told = {**environment, **own}
    for command in (["plugins", "install", "--path", str(plugin), "github.com/hetznercloud/hcloud"], list(words)):
        done = subprocess.run(
            [program, *command], cwd=ROOT, env=told, capture_output=True, text=True, timeout=_BAKE_TIMEOUT_S
        )
        assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def bake(cloud: LocalCloud, folder: Path, **variables: str) -> BoundImage:
    """Bakes with these variables of the template; the snapshot."""
    words = [f"-var={name}={value}" for name, value in variables.items()]
    if _HOST_AUTHORITIES.exists():
        words.append(f"-var=extra_ca_file={_HOST_AUTHORITIES}")
    packer(folder, cloud.environment, "build", "-color=false", *words, "image")
    return cloud.client().images.get_all(type="snapshot", sort="id:desc")[0]


@dataclass(frozen=True)
class Node:
    """A server from the image, with a way in and a key of its service."""

    server: BoundServer
    address: str
    key_file: Path
    api_key: str

    def run(self, command: str) -> str:
        return ssh(self.key_file, self.address, command)

    def ask(
        self, path: str, body: dict[str, Any] | None = None, key: str | None = None, more: str = ""
    ) -> tuple[int, str]:
        """Status and body of a request made on the node itself; nothing else reaches the service yet."""
        words = f"curl -s {more} -w '\\n%{{http_code}}' -H 'Authorization: Bearer {key or self.api_key}'"
        if body is not None:
            words += f" -H 'Content-Type: application/json' -d '{json.dumps(body)}'"
        answer, _, status = self.run(f"{words} http://127.0.0.1:8080{path}").rpartition("\n")
        return int(status), answer

    def wait_ready(self, patience_s: float = 60.0) -> dict[str, Any]:
        """What /ready says once it is ready."""
        end_s = time.monotonic() + patience_s
        while True:
            status, answer = self.ask("/ready")
            if status == 200:
                return dict(json.loads(answer))
            assert time.monotonic() < end_s, answer
            time.sleep(0.2)


def facts_file(content: str) -> str:
    """User-data with these facts."""
    lines = "".join(f"      {line}\n" for line in content.splitlines())
    head = "#cloud-config\nwrite_files:\n  - path: /etc/mini-llm/facts.yaml\n    permissions: '0600'\n    content: |\n"
    return head + lines


@contextmanager
def node(
    client: Client, image: BoundImage | Image, known: BoundSSHKey, key_file: Path, facts: str | None = None
) -> Iterator[Node]:
    """A node with one API key, or with the facts given; deleted afterwards."""
    api_key = f"mllm_{secrets.token_hex(16)}"
    digest = hashlib.sha256(api_key.encode()).hexdigest()
    right = f"api_keys: [{{name: first, sha256: {digest}, scopes: [generate, metrics]}}]\nprice_eur_per_hour: 0.0136\n"
    made = client.servers.create(
        f"node-{secrets.token_hex(3)}",
        ServerType(name="cx23"),
        image,
        ssh_keys=[known],
        user_data=facts_file(right if facts is None else facts),
    )
    try:
        for action in (made.action, *made.next_actions):
            action.wait_until_finished()
        yield Node(made.server, str(made.server.public_net.ipv4.ip), key_file, api_key)
    finally:
        made.server.delete().wait_until_finished()


def cut_off(cloud: LocalCloud, *names: str) -> None:
    """Cuts servers off from everything outside the cloud; ``*`` is all of them."""
    url = cloud.endpoint.removesuffix("/v1") + "/_local/network"
    headers = {"Authorization": f"Bearer {TOKEN}"}
    requests.put(url, json={"cut_off": list(names)}, headers=headers, timeout=10).raise_for_status()


