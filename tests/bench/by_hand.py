"""Owns the baseline of ``make bench-image``: the usual way to a model on a server (``usual_way/``), step by step."""

import subprocess
import time
from pathlib import Path

import requests
from hcloud import Client
from hcloud.images import Image
from hcloud.server_types import ServerType
from hcloud.ssh_keys import BoundSSHKey

from tests.local_cloud.harness import address_of, ssh

_SCRIPTS = Path(__file__).with_name("usual_way")
# Where an index is reached through a network that inspects TLS, its authority stands among the host's.
_HOST_AUTHORITIES = Path("/etc/ssl/certs/ca-certificates.crt")
_PATIENCE_S = 120.0


def usual_way(client: Client, known: BoundSSHKey, key: Path, model: Path) -> dict[str, float]:
    """Seconds of each step from the call that creates plain Debian to the first token over HTTP; together the whole."""
    begun_s = time.monotonic()
    made = client.servers.create("by-hand", ServerType(name="cx23"), Image(name="debian-13"), ssh_keys=[known])
    try:
        address = address_of(made.server)
        ssh(key, address, "mkdir by-hand")
        steps = {"boot to SSH": time.monotonic() - begun_s}
        copied_s = time.monotonic()
        _copy(key, address, *sorted(_SCRIPTS.glob("*.*")), model, _HOST_AUTHORITIES)
        steps["copy"] = time.monotonic() - copied_s
        trust = f"PIP_CERT=/root/by-hand/{_HOST_AUTHORITIES.name}"
        said = ssh(key, address, f"cd by-hand && {trust} sh set_up.sh {model.name}")
        for line in said.splitlines():
            name, took_ms = line.split()
            steps[name.replace("_", " ")] = int(took_ms) / 1000
        _wait_for_token(f"http://{address}:8000/generate")
        steps["load to first token"] = time.monotonic() - begun_s - sum(steps.values())
        return steps
    finally:
        made.server.delete().wait_until_finished()


def _copy(key: Path, address: str, *files: Path) -> None:
    options = ["-q", "-i", str(key), "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"]
    subprocess.run(["scp", *options, *files, f"root@{address}:by-hand/"], check=True, timeout=300)


def _wait_for_token(url: str) -> None:
    end_s = time.monotonic() + _PATIENCE_S
    while True:
        try:
            answer = requests.post(url, json={"prompt": "What is mini-llm?", "max_tokens": 1}, timeout=60)
            answer.raise_for_status()
            assert answer.json()["response"], "an answer without a token"
            return
        except requests.ConnectionError:
            assert time.monotonic() < end_s, "no token by the usual way"
            time.sleep(0.1)
