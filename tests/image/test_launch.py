"""Terraform, with its real provider, launches nodes from the image over the local cloud, and replaces them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from hcloud.images import BoundImage
from hcloud.zones import BoundZone

from tests.image.acme import AcmeServer
from tests.image.harness import DOMAIN, ROOT
from tests.image.registry import make_certificate
from tests.image.test_image import reachable_acme_server
from tests.local_cloud.harness import LocalCloud

_APPLY_TIMEOUT_S = 600
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
            said, _ = process.communicate(timeout=_APPLY_TIMEOUT_S)
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
            process.communicate(timeout=_APPLY_TIMEOUT_S)

    def sweep(self) -> str:
        """Removes what stands in no state; what was said."""
        command = [sys.executable, str(ROOT / "scripts/sweep.py"), "--folder", str(self.folder), "--yes"]
        command += ["--deployment", "launch", "--program", self.program]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=_APPLY_TIMEOUT_S)
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
        told = f"{DOMAIN}:443:{address if ':' not in address else f'[{address}]'}"
        return _run_curl([*self._words(key, timeout_s), "--resolve", told], timeout_s)

    def generate_by_name(self, key: str, *words: str, timeout_s: float = 10.0) -> int:
        """The same at whatever address the cloud's name server tells this host's own resolver."""
        resolver = self.folder / "resolv.conf"
        resolver.write_text(f"nameserver {self.cloud.name_server}\n")
        with_resolver = 'mount --bind "$0" /etc/resolv.conf && exec "$@"'  # for this one process
        command = ["unshare", "--mount", "sh", "-c", with_resolver, str(resolver)]
        return _run_curl([*command, *self._words(key, timeout_s), *words], timeout_s)

    def _words(self, key: str, timeout_s: float) -> list[str]:
        body = json.dumps({"prompt": "x", "max_tokens": 1})
        command = ["curl", "-s", "--max-time", f"{timeout_s}", "-o", "/dev/null", "-w", "%{http_code}"]
        command += ["--cacert", str(self.authority), "-H", f"Authorization: Bearer {key}"]
        return [*command, "-H", "Content-Type: application/json", "-d", body, f"https://{DOMAIN}/generate"]

    def node_names(self) -> list[str]:
        """The deployment's servers."""
        servers = self.cloud.client().servers.get_all(label_selector="deployment=launch")
        return sorted(each.name for each in servers)


def _run_curl(command: list[str], timeout_s: float) -> int:
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s + 10)
    return int(done.stdout or 0)


@pytest.fixture(scope="module")
def program() -> str:
    """Terraform or OpenTofu, or a word that the tests did not run."""
    found = shutil.which("terraform") or shutil.which("tofu")
    if found is None:
        pytest.skip("did not run: neither terraform nor tofu is installed")
    return found


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
            pytest.skip("did not run: Terraform's provider hetznercloud/hcloud could not be had by terraform init")
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


@pytest.fixture(scope="module")
def launched(
    cloud: LocalCloud, image: BoundImage, program: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Deployment]:
    """A deployment with a certificate of its own, with nothing applied yet."""
    folder = tmp_path_factory.mktemp("launch")
    chain, key = make_certificate(folder, f"DNS:{DOMAIN}", f"DNS:monitoring.{DOMAIN}")
    certificate = {"chain": chain.read_text(), "key": key.read_text()}
    with deployment(folder, cloud, program, chain, certificate=certificate, image_id=image.id) as made:
        yield made


@dataclass
class Load:
    """New connections, one after the other, each a generation; every status that was seen, with its time."""

    deployment: Deployment
    address: str
    seen: list[tuple[float, int]] = field(default_factory=list)

    @contextmanager
    def running(self) -> Iterator["Load"]:
        """Asks meanwhile."""
        over = threading.Event()

        def ask() -> None:
            while not over.is_set():
                begin_s = time.monotonic()
                status = self.deployment.generate(self.address, KEYS["alice"])
                self.seen.append((time.monotonic() - begin_s, status))
                over.wait(0.1)

        thread = threading.Thread(target=ask)
        thread.start()
        try:
            yield self
        finally:
            over.set()
            thread.join()


def test_the_files_are_formatted_and_valid(program: str, tmp_path: Path, cloud: LocalCloud) -> None:
    """And wrong values are told before anything is asked of the cloud."""
    assert subprocess.run([program, f"-chdir={ROOT / 'terraform'}", "fmt", "-check", "-recursive"]).returncode == 0
    with deployment(tmp_path, cloud, program, Path("/dev/null"), image_id=1, acme={"email": "a@example.org"}) as made:
        code, said = made.run("validate")
        assert code == 0, said
        for example in (ROOT / "terraform" / "examples").glob("*.tfvars"):
            code, said = made.run("plan", "-input=false", f"-var-file={example}")
            assert code == 0, said
            assert '"https://llm.example.org"' in said
        for values, message in (
            ({"domain": "LLM"}, "The domain must be a name"),
            ({"api_keys": []}, "There must be at least one of the api_keys"),
            ({"api_keys": [api_key("alice"), api_key("alice")]}, "have the same name"),
            ({"ssh_sources": ["home"]}, "must be networks"),
            ({"image_id": 0}, "bake.py promote ID, writes it"),
            ({"acme": None}, "One of acme"),
            ({"dns_zone": "other.test"}, "The domain must be the dns_zone or a name in it"),
            ({"dns_zone": "m.test"}, "The domain must be the dns_zone or a name in it"),
            ({"dns_zone": "llm.test"}, "was not found"),
        ):
            wrong = Deployment(made.folder, cloud, program, {**made.values, **values}, made.authority)
            code, said = wrong.run("plan", "-input=false")
            assert code == 1
            assert message in " ".join(said.replace("│", "").split())
        (made.folder / "test.auto.tfvars.json").unlink()


def test_from_nothing(launched: Deployment) -> None:
    """One apply, and the name answers at both addresses, with its certificate; a second plan has nothing to do."""
    said = launched.apply()
    assert "serves after" in said
    told = launched.outputs()
    for address in (told["ipv4_address"], told["ipv6_address"]):
        assert launched.generate(address, KEYS["alice"]) == 200
    assert launched.generate(told["ipv4_address"], KEYS["berta"]) == 401
    assert launched.node_names() == [told["node"]["name"]]
    assert launched.changes() == ""
    for secret in (launched.values["certificate"]["key"].splitlines()[1], *KEYS.values()):
        assert secret not in said


def test_drift_is_told(launched: Deployment) -> None:
    """Nothing at first but that no channel names the image; then what somebody did behind Terraform's back."""
    client, image = launched.cloud.client(), launched.values["image_id"]
    command = [
        sys.executable,
        str(ROOT / "scripts/drift.py"),
        "--folder",
        str(launched.folder),
        "--deployment",
        "launch",
    ]
    token = {"HCLOUD_TOKEN": "local".ljust(64, "0")}

    def look() -> tuple[int, list[dict[str, str]]]:
        done = subprocess.run(
            [*command, "--program", launched.program, "--json", "--price", "0.0088"],
            env={**launched.cloud.environment, **token},
            capture_output=True,
            text=True,
            timeout=_APPLY_TIMEOUT_S,
        )
        assert done.returncode in (0, 1), done.stderr
        return done.returncode, json.loads(done.stdout)["drift"]

    assert look() == (1, [{"what": "image", "told": "nobody holds the channel stable"}])
    snapshot = client.images.get_by_id(image)
    kept = snapshot.labels
    snapshot.update(labels={**kept, "stable": "1", "verified-at": "20261126T120000Z"})
    (launched.folder / "image.auto.tfvars.json").write_text(json.dumps({"image_id": image}))
    try:
        assert look() == (0, [])
        client.firewalls.get_by_name("launch").set_rules([])
        assert look() == (1, [{"what": "plan", "told": "hcloud_firewall.node: update"}])
        launched.apply()
        assert look() == (0, [])
    finally:
        client.images.get_by_id(image).update(labels=kept)
        (launched.folder / "image.auto.tfvars.json").unlink()


def test_other_keys_are_another_node(launched: Deployment) -> None:
    """Which proves itself before the addresses move: every new connection is answered, then one node is left."""
    before = launched.outputs()
    with Load(launched, before["ipv4_address"]).running() as load:
        launched.apply(api_keys=[api_key("alice"), api_key("berta")])
    after = launched.outputs()
    assert after["ipv4_address"] == before["ipv4_address"]
    assert launched.node_names() == [after["node"]["name"]] != [before["node"]["name"]]
    assert launched.generate(after["ipv4_address"], KEYS["berta"]) == 200
    assert launched.changes() == ""
    failed = [(took_s, status) for took_s, status in load.seen if status != 200]
    print(f"{len(load.seen)} connections, {len(failed)} failed, slowest {max(load.seen)[0]:.2f} s")
    assert len(load.seen) > 20
    # A connection that is open when its address moves is cut; there is one at a time here, which lasts some hundredths.
    assert len(failed) <= 1, failed


def test_a_node_that_does_not_prove_itself_never_gets_the_address(launched: Deployment, tmp_path: Path) -> None:
    """The apply fails with the reason, the old node serves on, and the next one heals it."""
    good, told = launched.values["certificate"], launched.outputs()
    chain, key = make_certificate(tmp_path, "DNS:other.test")
    launched.values["certificate"] = {"chain": chain.read_text(), "key": key.read_text()}
    code, said = launched.run("apply", "-auto-approve", "-input=false")
    assert code == 1
    assert "the node does not serve: /ready says 503: " in said
    assert launched.generate(told["ipv4_address"], KEYS["alice"]) == 200
    assert len(launched.node_names()) == 2
    with Load(launched, told["ipv4_address"]).running() as load:
        launched.apply(certificate=good)
    failed = [(took_s, status) for took_s, status in load.seen if status != 200]
    print(f"healed: {len(load.seen)} connections, {len(failed)} failed, slowest {max(load.seen)[0]:.2f} s")
    assert len(failed) <= 1, failed
    assert len(launched.node_names()) == 1
    assert launched.changes() == ""


def test_a_node_is_replaced_by_name(launched: Deployment) -> None:
    """One that hangs, say: the same image, another name, no clash."""
    before = launched.node_names()
    code, said = launched.run("apply", "-auto-approve", "-input=false", "-replace=terraform_data.node")
    assert code == 0, said
    assert len(launched.node_names()) == 1
    assert launched.node_names() != before


def test_destroy_leaves_the_protected_addresses_alone(launched: Deployment) -> None:
    """They go once somebody has said so, and then nothing is left."""
    told = launched.outputs()
    code, said = launched.run("destroy", "-auto-approve", "-input=false")
    assert code == 1
    assert "protected" in said
    client = launched.cloud.client()
    assert launched.node_names() == []
    assert told["ipv4_address"] in [each.ip for each in client.floating_ips.get_all()]
    launched.values["protect_address"] = False
    code, said = launched.run("apply", "-auto-approve", "-input=false", "-target=hcloud_floating_ip.service")
    assert code == 0, said
    code, said = launched.run("destroy", "-auto-approve", "-input=false")
    assert code == 0, said
    assert client.floating_ips.get_all() == []
    assert client.networks.get_all() == []
    assert client.firewalls.get_all() == []


def apply_with_names(made: Deployment, server: AcmeServer) -> str:
    """The first apply where records are made by hand: the addresses, the names, then the rest; the IPv4 address."""
    code, said = made.run("apply", "-auto-approve", "-input=false", "-target=hcloud_floating_ip.service")
    assert code == 0, said
    addresses = {each.name: each.ip for each in made.cloud.client().floating_ips.get_all()}
    for name in (DOMAIN, f"monitoring.{DOMAIN}"):
        server.point(name, addresses["launch-ipv4"])
    made.apply()
    return str(addresses["launch-ipv4"])


def test_with_an_ordered_certificate(cloud: LocalCloud, image: BoundImage, program: str, tmp_path: Path) -> None:
    """The node proves itself at its own address, gets the addresses, and then has its certificate ordered."""
    with reachable_acme_server(cloud, tmp_path) as (server, acme):
        root = tmp_path / "root.pem"
        server.write_root(root)
        with deployment(tmp_path, cloud, program, root, image_id=image.id, acme=acme) as made:
            address = apply_with_names(made, server)
            assert made.generate(address, KEYS["alice"]) == 200
            assert made.changes() == ""


@contextmanager
def zone(cloud: LocalCloud, name: str) -> Iterator[BoundZone]:
    """A zone of the account, with what it begins with; it is empty again when it goes."""
    made = cloud.client().zones.create(name=name, mode="primary")
    made.action.wait_until_finished()
    try:
        yield made.zone
        assert sorted(each.id for each in made.zone.get_rrset_all()) == ["@/NS", "@/SOA"]
    finally:
        made.zone.delete().action.wait_until_finished()


@pytest.mark.parametrize(
    ("zone_name", "domain", "monitoring", "names"),
    [
        ("names.test", "names.test", True, ["@", "monitoring"]),
        ("names.test", "llm.names.test", True, ["llm", "monitoring.llm"]),
        ("names.test", "a.names.test.names.test", False, ["a.names.test"]),
        (None, "names.test", True, []),
    ],
)
def test_records_are_named_as_the_zone_names_them(
    program: str,
    tmp_path: Path,
    cloud: LocalCloud,
    zone_name: str | None,
    domain: str,
    monitoring: bool,
    names: list[str],
) -> None:
    """A and AAAA of each; none where no zone is told."""
    values: dict[str, Any] = {
        "image_id": 1,
        "acme": {"email": "a@example.org"},
        "domain": domain,
        "dns_zone": zone_name,
    }
    values["monitoring"] = {"user": "operator", "password_hash": MONITORING_HASH} if monitoring else None
    with zone(cloud, "names.test"), deployment(tmp_path, cloud, program, Path("/dev/null"), **values) as made:
        code, said = made.run("plan", "-input=false", "-out=plan")
        assert code == 0, said
        planned = json.loads(made.run("show", "-json", "plan")[1])["planned_values"]["root_module"]["resources"]
        records = [each["values"] for each in planned if each["type"] == "hcloud_zone_rrset"]
        assert sorted((each["name"], each["type"]) for each in records) == [
            (name, kind) for name in names for kind in ("A", "AAAA")
        ]


def test_with_records_in_a_zone(cloud: LocalCloud, image: BoundImage, program: str, tmp_path: Path) -> None:
    """One apply: the records lead to the addresses, the certificate is ordered by them, and the name answers."""
    with (
        zone(cloud, DOMAIN),
        reachable_acme_server(cloud, tmp_path, f"{cloud.name_server}:53") as (server, acme),
    ):
        root = tmp_path / "root.pem"
        server.write_root(root)
        monitoring = {"user": "operator", "password_hash": MONITORING_HASH}
        values = {"image_id": image.id, "acme": acme, "dns_zone": DOMAIN, "monitoring": monitoring}
        with deployment(tmp_path, cloud, program, root, **values) as made:
            made.apply()
            for family in ("-4", "-6"):
                assert made.generate_by_name(KEYS["alice"], family) == 200
            assert made.generate_by_name(KEYS["berta"]) == 401
            found = cloud.client().zones.get(DOMAIN).get_rrset_all(label_selector="deployment=launch")
            told = made.outputs()
            addresses = {"A": told["ipv4_address"], "AAAA": told["ipv6_address"]}
            assert sorted((each.id, each.ttl, each.records[0].value) for each in found) == [
                (f"{name}/{kind}", 300, addresses[kind]) for name in ("@", "monitoring") for kind in ("A", "AAAA")
            ]
            assert made.changes() == ""
            made.apply(monitoring=None)
            left = cloud.client().zones.get(DOMAIN).get_rrset_all(label_selector="deployment=launch")
            assert sorted(each.id for each in left) == ["@/A", "@/AAAA"]
            assert made.generate_by_name(KEYS["alice"]) == 200
