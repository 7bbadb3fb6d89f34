"""Owns the baseline of ``make bench-image``: the usual way to a model on a server (``usual_way/``), step by step."""

import json
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from hcloud import Client
from hcloud.images import Image
from hcloud.server_types import ServerType
from hcloud.ssh_keys import BoundSSHKey

from tests.image.acme import AcmeServer
from tests.image.harness import DOMAIN
from tests.local_cloud.harness import address_of, ssh

_SCRIPTS = Path(__file__).with_name("usual_way")
_CONTAINERS = ("traefik", "prometheus", "grafana")
_PATIENCE_S = 120.0


def usual_way(
    client: Client, known: BoundSSHKey, key: Path, model: Path, acme: AcmeServer, pins_file: Path, authorities: Path
) -> dict[str, float]:
    """Seconds of each step from the call that creates plain Debian to the first token over HTTPS; together the whole.

    ``pins_file`` names the registry's images; ``authorities`` are those whom the server trusts as it fetches.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        registry = _write_settings(folder, acme, pins_file)
        shutil.copy(authorities, folder / "authorities.crt")
        shutil.copy(acme.authority, folder / "acme.pem")
        root = folder / "root.pem"
        acme.write_root(root)
        begun_s = time.monotonic()
        made = client.servers.create("by-hand", ServerType(name="cx23"), Image(name="debian-13"), ssh_keys=[known])
        try:
            address = address_of(made.server)
            acme.point(DOMAIN, address)
            trusted = f"/etc/docker/certs.d/{registry}"
            ssh(key, address, f"mkdir -p by-hand {trusted}")
            steps = {"boot to SSH": time.monotonic() - begun_s}
            copied_s = time.monotonic()
            _copy(key, address, *sorted(_SCRIPTS.glob("*.*")), *sorted(folder.iterdir()), model)
            steps["copy"] = time.monotonic() - copied_s
            # Where an index is reached through a network that inspects TLS, its authority stands among the host's.
            begin = f"cd by-hand && cp authorities.crt {trusted}/ca.crt && export PIP_CERT=$PWD/authorities.crt"
            said = ssh(key, address, f"{begin} && sh set_up.sh {model.name}")
            for line in said.splitlines():
                step, took_ms = line.split()
                steps[step.replace("_", " ")] = int(took_ms) / 1000
            _wait_for_token(address, root)
            steps["load and certificate to first token"] = time.monotonic() - begun_s - sum(steps.values())
            return steps
        finally:
            made.server.delete().wait_until_finished()


def _write_settings(folder: Path, acme: AcmeServer, pins_file: Path) -> str:
    """Writes what compose.yaml takes from ``.env``; returns the registry's address."""
    pins = json.loads(pins_file.read_text())["images"]
    lines = [f"{name.upper()}={pins[name]['image']}@{pins[name]['digest']}\n" for name in _CONTAINERS]
    (folder / ".env").write_text("".join([*lines, f"ACME_SERVER={acme.directory}\n"]))
    return str(pins["traefik"]["image"]).partition("/")[0]


def _copy(key: Path, address: str, *files: Path) -> None:
    options = ["-q", "-i", str(key), "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"]
    subprocess.run(["scp", *options, *files, f"root@{address}:by-hand/"], check=True, timeout=300)


def _wait_for_token(address: str, root: Path) -> None:
    """Asks until an answer comes by a certificate that the ACME server issued."""
    words = ["curl", "--silent", "--fail", "--max-time", "60", "--cacert", str(root)]
    words += ["--resolve", f"{DOMAIN}:443:{address}", "--header", "Content-Type: application/json"]
    words += ["--data", json.dumps({"prompt": "What is mini-llm?", "max_tokens": 1}), f"https://{DOMAIN}/generate"]
    end_s = time.monotonic() + _PATIENCE_S
    while (asked := subprocess.run(words, capture_output=True, text=True, timeout=90)).returncode:
        assert time.monotonic() < end_s, f"no token by the usual way: curl ended with {asked.returncode}"
        time.sleep(0.1)
    assert json.loads(asked.stdout)["response"], "an answer without a token"
