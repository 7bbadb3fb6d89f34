"""Owns deployments by this project's Terraform files, with the real provider, over the local cloud."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from scripts.bake.answers import given
from tests.absent import did_not_run
from tests.image.acme import AcmeServer
from tests.image.harness import DOMAIN, ROOT
from tests.local_cloud.harness import LocalCloud

APPLY_TIMEOUT_S = 600
_INIT_TIMEOUT_S = 60
MONITORING_HASH = "$apr1$f8Vn0cXw$ydb6HbE6kHTv.sEmvvcK/1"
KEYS = {name: f"mllm_{name * 8}{'0' * 24}" for name in ("alice", "berta", "carla")}


@dataclass
class Deployment:
    """A folder with this project's Terraform files, its variables, and the cloud that it deploys to."""

    folder: Path
    cloud: LocalCloud
    program: str
    values: dict[str, Any]
    authority: Path

    @property
    def environment(self) -> dict[str, str]:
        """What the programs find the cloud by; Terraform's provider wants a token of 64 characters."""
        token = "local".ljust(64, "0")
        return {**self.cloud.environment, "HCLOUD_TOKEN": token, "TF_IN_AUTOMATION": "1", "CHECKPOINT_DISABLE": "1"}

    def _start(self, *words: str) -> "subprocess.Popen[str]":
        (self.folder / "test.auto.tfvars.json").write_text(json.dumps(self.values))
        return subprocess.Popen(
            [self.program, *words, "-no-color"],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, *words: str) -> tuple[int, str]:
        """Exit code and all that was said."""
        with self._start(*words) as process:
            try:
                said, _ = process.communicate(timeout=APPLY_TIMEOUT_S)
            except BaseException:
                os.killpg(process.pid, signal.SIGINT)  # it ends what it is at, and writes its state
                process.communicate(timeout=APPLY_TIMEOUT_S)
                raise
        return process.returncode, said

    def apply(self, **values: Any) -> str:
        """Applies with these variables from now on; what was said."""
        self.values |= values
        code, said = self.run("apply", "-auto-approve", "-input=false")
        assert code == 0, said
        return said

    def kill(self, after_s: float, **values: Any) -> None:
        """Applies with these variables from now on, and is killed in the midst of it."""
        self.values |= values
        with self._start("apply", "-auto-approve", "-input=false") as process:
            time.sleep(after_s)
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate(timeout=APPLY_TIMEOUT_S)

    def sweep(self) -> str:
        """Removes what stands in no state; what was said."""
        command = [sys.executable, str(ROOT / "scripts/sweep.py"), "--folder", str(self.folder), "--yes"]
        command += ["--deployment", "launch", "--program", self.program]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=APPLY_TIMEOUT_S)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def changes(self) -> str:
        """What a plan would do; empty if nothing."""
        code, said = self.run("plan", "-detailed-exitcode", "-input=false")
        assert code in (0, 2), said
        return said if code else ""

    def outputs(self) -> dict[str, Any]:
        """All of them."""
        code, said = self.run("output", "-json")
        assert code == 0, said
        return {name: told["value"] for name, told in json.loads(said).items()}

    def generate(self, address: str, key: str, timeout_s: float = 10.0) -> int:
        """Status of a one-token generation by the name at an address, with its certificate verified; 0 for none."""
        return generate(self.authority, address, key, timeout_s)

    def generate_by_name(self, key: str, *words: str, timeout_s: float = 10.0) -> int:
        """The same at whatever address the cloud's name server tells this host's own resolver."""
        resolver = self.folder / "resolv.conf"
        resolver.write_text(f"nameserver {self.cloud.name_server}\n")
        with_resolver = 'mount --bind "$0" /etc/resolv.conf && exec "$@"'  # for this one process
        command = ["unshare", "--mount", "--propagation", "slave", "sh", "-c", with_resolver, str(resolver)]
        return _run_curl([*command, *_words(self.authority, key, timeout_s), *words], timeout_s)

    def node_names(self) -> list[str]:
        """The deployment's servers."""
        servers = self.cloud.client().servers.get_all(label_selector="deployment=launch")
        return sorted(given(each.name) for each in servers)


def generate(authority: Path, address: str, key: str, timeout_s: float = 10.0) -> int:
    """Status of a one-token generation by the name at an address, its certificate verified; 0 where nobody answers."""
    told = f"{DOMAIN}:443:{address if ':' not in address else f'[{address}]'}"
    return _run_curl([*_words(authority, key, timeout_s), "--resolve", told], timeout_s)


def _words(authority: Path, key: str, timeout_s: float) -> list[str]:
    body = json.dumps({"prompt": "x", "max_tokens": 1})
    command = ["curl", "-s", "--max-time", f"{timeout_s}", "-o", "/dev/null", "-w", "%{http_code}"]
    command += ["--cacert", str(authority), "-H", f"Authorization: Bearer {key}"]
    return [*command, "-H", "Content-Type: application/json", "-d", body, f"https://{DOMAIN}/generate"]


def _run_curl(command: list[str], timeout_s: float) -> int:
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s + 10)
    return int(done.stdout or 0)


def find_program(folder: Path) -> tuple[str | None, str]:
    """Terraform or OpenTofu, if it can have the provider of terraform/versions.tf; else None, and why."""
    why = "neither terraform nor tofu is installed"
    for program in filter(None, (shutil.which("terraform"), shutil.which("tofu"))):
        with tempfile.TemporaryDirectory(dir=folder) as place:
            shutil.copy(ROOT / "terraform" / "versions.tf", place)
            try:
                done = subprocess.run([program, "init"], cwd=place, capture_output=True, timeout=_INIT_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                done = None
        if done is not None and done.returncode == 0:
            return program, ""
        why = "Terraform's provider hetznercloud/hcloud could not be had by terraform init"
    return None, why


@contextmanager
def deployment(folder: Path, cloud: LocalCloud, program: str, authority: Path, **values: Any) -> Iterator[Deployment]:
    """This project's Terraform files in a place of their own; what they made is gone afterwards."""
    work = folder / "terraform"
    work.mkdir()
    # Not the lock file: a provider that a mirror serves may have another checksum than the release's.
    for path in (ROOT / "terraform").glob("*.tf"):
        shutil.copy(path, work)
    for name in ("cloud-init", "scripts"):
        (folder / name).symlink_to(ROOT / name)
    common = {
        "name": "launch",
        "domain": DOMAIN,
        "api_keys": [api_key("alice")],
        "python": sys.executable,
        "proof_authority": str(authority),
        "ready_timeout_s": 120,
    }
    made = Deployment(work, cloud, program, {**common, **values}, authority)
    code, said = made.run("init", "-input=false")
    if code:
        # Terraform's words, and OpenTofu's.
        missing = ("Failed to query available provider", "Could not retrieve", "Failed to resolve provider")
        if any(words in said for words in missing):
            did_not_run("Terraform's provider hetznercloud/hcloud could not be had by terraform init", may_in_ci=True)
        raise AssertionError(said)
    try:
        yield made
    finally:
        made.values["protect_address"] = False
        made.run("apply", "-auto-approve", "-input=false", "-target=hcloud_floating_ip.service")
        code, said = made.run("destroy", "-auto-approve", "-input=false")
        assert code == 0, said


def api_key(name: str) -> dict[str, Any]:
    return {"name": name, "sha256": sha256(KEYS[name].encode()).hexdigest(), "limits": {"parallel": 2}}


def apply_with_names(made: Deployment, server: AcmeServer) -> str:
    """The first apply where records are made by hand: the addresses, the names, then the rest; the IPv4 address."""
    code, said = made.run("apply", "-auto-approve", "-input=false", "-target=hcloud_floating_ip.service")
    assert code == 0, said
    addresses = {each.name: each.ip for each in made.cloud.client().floating_ips.get_all()}
    address = given(addresses["launch-ipv4"])
    for name in (DOMAIN, f"monitoring.{DOMAIN}"):
        server.point(name, address)
    made.apply()
    return address
