"""Owns deployments by the calls that Terraform's files come to: where its provider cannot be had, a rollout runs all
the same. What it cannot show, Terraform's own tests do: state, plans, variables and their words."""

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from ipaddress import IPv6Network
from itertools import pairwise
from pathlib import Path
from typing import Any

from hcloud import APIException
from hcloud.firewalls import BoundFirewall, FirewallRule
from hcloud.floating_ips import BoundFloatingIP
from hcloud.locations import Location
from hcloud.networks import BoundNetwork, NetworkSubnet
from hcloud.server_types import ServerType
from hcloud.servers import BoundServer
from hcloud.ssh_keys import BoundSSHKey

from tests.image.harness import DOMAIN, ROOT
from tests.image.launch import generate
from tests.local_cloud.harness import LocalCloud, address_of, wait_until_off

_EVERYWHERE = ["0.0.0.0/0", "::/0"]
_PROOF_TIMEOUT_S = 400
_STOP_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Rollout:
    """What was said of the new node's proof, and how long each part took; ``moved_at_s`` is of the monotonic clock."""

    said: str
    created_s: float
    proved_s: float
    moved_s: float
    drained_s: float
    gone_s: float
    moved_at_s: float

    @property
    def total_s(self) -> float:
        return self.created_s + self.proved_s + self.moved_s + self.drained_s + self.gone_s


@dataclass
class ApiDeployment:
    """What terraform/main.tf declares, made and replaced in the same order; ``node`` is the one that serves."""

    folder: Path
    cloud: LocalCloud
    authority: Path
    facts: dict[str, Any]
    image_id: int
    network: BoundNetwork
    firewall: BoundFirewall
    ssh_key: BoundSSHKey
    labels: dict[str, str]
    addresses: dict[str, BoundFloatingIP]
    node: BoundServer | None = None

    def outputs(self) -> dict[str, Any]:
        """Those of terraform/outputs.tf that tests look at."""
        told: dict[str, Any] = {
            "ipv4_address": str(self.addresses["ipv4"].ip),
            "ipv6_address": str(IPv6Network(self.addresses["ipv6"].ip)[1]),  # of its 2^64
        }
        if self.node is not None:
            told["node"] = {"name": self.node.name, "ipv4": address_of(self.node)}
        return told

    def roll_out(self, **facts: Any) -> Rollout:
        """Another node takes the place of the one that serves, if there is one.

        Raises AssertionError with the reason if it is not proved; until the addresses have moved, the old one serves.
        """
        self.facts |= facts
        old, proof_key, at_s = self.node, f"mllm_{secrets.token_hex(32)}", [time.monotonic()]
        new = self._create_node(proof_key)
        at_s.append(time.monotonic())
        said = self._prove("gate", address_of(new), proof_key)
        at_s.append(time.monotonic())
        for kind in ("ipv6", "ipv4"):  # in this order, as terraform/main.tf tells
            self.addresses[kind].assign(new).wait_until_finished()
        self.node = new
        at_s.append(time.monotonic())
        said += self._prove("served", self.outputs()["ipv4_address"], proof_key)
        at_s.append(time.monotonic())
        if old is not None:
            old.shutdown().wait_until_finished()
            wait_until_off(self.cloud.client(), old, _STOP_TIMEOUT_S)
            old.delete().wait_until_finished()
        at_s.append(time.monotonic())
        created_s, proved_s, moved_s, drained_s, gone_s = (end_s - begin_s for begin_s, end_s in pairwise(at_s))
        return Rollout(said, created_s, proved_s, moved_s, drained_s, gone_s, moved_at_s=at_s[3])

    def _create_node(self, proof_key: str) -> BoundServer:
        proof = {
            "sha256": sha256(proof_key.encode()).hexdigest(),
            "expires": (datetime.now(UTC) + timedelta(hours=168)).strftime("%Y-%m-%dT%H:%M:%SZ"),
        }
        told = self.outputs()
        addresses = {"ipv4": told["ipv4_address"], "ipv6": told["ipv6_address"]}
        facts = json.dumps({**self.facts, "addresses": addresses, "proof": proof})
        template = (ROOT / "cloud-init" / "launch.yaml.tftpl").read_text()
        made = self.cloud.client().servers.create(
            f"launch-{secrets.token_hex(4)}",
            ServerType(name="cx23"),
            self.cloud.client().images.get_by_id(self.image_id),
            ssh_keys=[self.ssh_key],
            firewalls=[self.firewall],
            networks=[self.network],
            labels={**self.labels, "image": str(self.image_id)},
            location=Location(name="fsn1"),
            user_data=template.replace("${jsonencode(facts)}", json.dumps(facts)),
        )
        for action in (made.action, *made.next_actions):
            action.wait_until_finished()
        return made.server

    def _prove(self, stage: str, address: str, proof_key: str) -> str:
        order = {
            "PROOF_STAGE": stage,
            "PROOF_ADDRESS": address,
            "PROOF_DOMAIN": DOMAIN,
            "PROOF_KEY": proof_key,
            "PROOF_TIMEOUT_S": str(_PROOF_TIMEOUT_S),
            "PROOF_CERTIFICATE": "valid" if stage == "served" or "certificate" in self.facts else "any",
            "PROOF_AUTHORITY": str(self.authority),
        }
        done = subprocess.run(
            [sys.executable, str(ROOT / "scripts" / "prove_node.py")],
            env={**os.environ, **order},
            capture_output=True,
            text=True,
            timeout=_PROOF_TIMEOUT_S + 60,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def generate(self, address: str, key: str) -> int:
        """Status of a one-token generation by the name at an address, its certificate verified; 0 for none."""
        return generate(self.authority, address, key)


@contextmanager
def api_deployment(
    folder: Path, cloud: LocalCloud, authority: Path, image_id: int, ssh_public_key: str, **facts: Any
) -> Iterator[ApiDeployment]:
    """Addresses, network and firewall, with no node yet; all of it is gone afterwards."""
    client, name = cloud.client(), f"launch-{secrets.token_hex(3)}"
    labels, undo = {"product": "mini-llm", "deployment": name}, []
    try:
        key = client.ssh_keys.create(name, ssh_public_key, labels=labels)
        undo.append(key.delete)
        rules = [
            FirewallRule(direction="in", protocol="tcp", port=port, source_ips=_EVERYWHERE, destination_ips=[])
            for port in ("22", "80", "443")
        ]
        rules.append(FirewallRule(direction="in", protocol="icmp", source_ips=_EVERYWHERE, destination_ips=[]))
        # The client's documentation says that labels are a dict, its annotation that they are one text.
        firewall = client.firewalls.create(name, rules=rules, labels=labels).firewall  # type: ignore[arg-type]
        undo.append(firewall.delete)
        subnet = NetworkSubnet(type="cloud", network_zone="eu-central", ip_range="10.77.0.0/24")
        network = client.networks.create(name, "10.77.0.0/24", subnets=[subnet], labels=labels)
        undo.append(network.delete)
        addresses = {}
        for kind in ("ipv4", "ipv6"):
            made = client.floating_ips.create(
                kind, name=f"{name}-{kind}", home_location=Location(name="fsn1"), labels=labels
            )
            addresses[kind] = made.floating_ip
            undo.append(made.floating_ip.delete)
        everything = {"domain": DOMAIN, **facts}
        yield ApiDeployment(folder, cloud, authority, everything, image_id, network, firewall, key, labels, addresses)
    finally:
        for server in client.servers.get_all(label_selector=f"deployment={name}"):
            server.delete().wait_until_finished()
        end_s = time.monotonic() + 10
        while undo:
            try:
                undo[-1]()
                undo.pop()
            except APIException:  # a server that was just deleted holds on for a moment
                if time.monotonic() > end_s:
                    raise
                time.sleep(0.5)
