"""Terraform, with its real provider, launches nodes from the image over the local cloud, and replaces them."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hcloud.images import BoundImage
from hcloud.zones import BoundZone

from scripts.bake.answers import given
from tests.image.harness import DOMAIN, ROOT
from tests.image.launch import APPLY_TIMEOUT_S, KEYS, MONITORING_HASH, Deployment, api_key, apply_with_names, deployment
from tests.image.registry import make_certificate
from tests.image.test_image import reachable_acme_server
from tests.local_cloud.harness import LocalCloud, make_key, ssh

_EXAMPLE = ROOT / "terraform" / "examples" / "llm.tfvars"
_OF_THE_EXAMPLE = ("name", "domain", "api_keys")


def fill_in_example(folder: Path) -> Path:
    """The example's file with what it cannot be applied without."""
    path = folder / "example.tfvars"
    text = _EXAMPLE.read_text()
    assert "the SHA-256 of a key of yours" in text
    path.write_text(text.replace("the SHA-256 of a key of yours", api_key("alice")["sha256"]))
    return path


@pytest.fixture(scope="module")
def launched(
    cloud: LocalCloud, image: BoundImage, program: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Deployment]:
    """A deployment with a certificate of its own, with nothing applied yet."""
    folder = tmp_path_factory.mktemp("launch")
    chain, key = make_certificate(folder, f"DNS:{DOMAIN}", f"DNS:monitoring.{DOMAIN}")
    certificate = {"chain": chain.read_text(), "key": key.read_text()}
    named = {"image_id": image.id, "image_version": "test-1"}  # as bake.py promote writes it
    python = folder / "a python"  # as in a checkout whose path has a blank
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    with deployment(folder, cloud, program, chain, certificate=certificate, python=str(python), **named) as made:
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
        code, said = made.run("plan", "-input=false", f"-var-file={_EXAMPLE}")
        assert code == 1  # nothing of a stranger's is applied
        assert "each with the SHA-256 of a key: 64 hexadecimal digits" in " ".join(said.replace("│", "").split())
        code, said = made.run("plan", "-input=false", f"-var-file={fill_in_example(tmp_path)}")
        assert code == 0, said
        assert '"https://llm.example.org"' in said
        for values, message in (
            ({"domain": "LLM"}, "The domain must be a name"),
            ({"api_keys": []}, "There must be at least one of the api_keys"),
            ({"api_keys": [api_key("alice"), api_key("alice")]}, "have the same name"),
            ({"ssh_sources": ["home"]}, "must be networks"),
            ({"ssh_public_keys": {"me": "~/.ssh/id_ed25519.pub"}}, "must each be one line"),
            ({"ssh_public_keys": {"me": "ssh-ed25519 AAAA me", "alice": "ssh-ed25519 AAAA"}}, "are the same key"),
            ({"image_id": 0}, "bake.py promote ID, writes it"),
            ({"acme": None}, "One of acme"),
            ({"dns_zone": "other.test"}, "The domain must be the dns_zone or a name in it"),
            ({"dns_zone": "m.test"}, "The domain must be the dns_zone or a name in it"),
            ({"dns_zone": "llm.test"}, "was not found"),
            ({"existing_ssh_keys": ["laptop"]}, '(ssh key) was not found: name="laptop"'),
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
    assert told["image"] == {"id": launched.values["image_id"], "version": "test-1"}
    assert launched.node_names() == [told["node"]["name"]]
    assert launched.changes() == ""
    # What is printed can be typed; the shell knows the key.
    code, printed = launched.run("output", "-raw", "try")
    assert code == 0
    words = shlex.split(printed)
    assert words[:4] == ["curl", "-sS", f"https://{DOMAIN}/generate", "-H"]
    assert "Authorization: Bearer $KEY" in words
    assert json.loads(words[-1]) == {"prompt": "What is mini-llm?"}
    for secret in (launched.values["certificate"]["key"].splitlines()[1], *KEYS.values()):
        assert secret not in said


def test_another_template_of_user_data_is_another_node(launched: Deployment) -> None:
    """With a proof key of its own: the old one's has ended when its node was proved."""
    place = launched.folder.parent / "cloud-init"
    before = place.readlink()
    place.unlink()
    shutil.copytree(before, place)
    with (place / "launch.yaml.tftpl").open("a") as file:
        file.write("# changed\n")
    try:
        assert "terraform_data.node must be replaced" in launched.changes()
    finally:
        shutil.rmtree(place)
        place.symlink_to(before)
    assert launched.changes() == ""


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
            timeout=APPLY_TIMEOUT_S,
        )
        assert done.returncode in (0, 1), done.stderr
        return done.returncode, json.loads(done.stdout)["drift"]

    assert look() == (1, [{"what": "image", "told": "nobody holds the channel stable"}])
    snapshot = client.images.get_by_id(image)
    kept = given(snapshot.labels)
    snapshot.update(labels={**kept, "stable": "1", "verified-at": "20261126T120000Z"})
    (launched.folder / "image.auto.tfvars.json").write_text(json.dumps({"image_id": image}))
    try:
        assert look() == (0, [])
        given(client.firewalls.get_by_name("launch")).set_rules([])
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


def test_a_lost_state_is_made_anew_around_the_addresses(launched: Deployment) -> None:
    """As OPERATING.md tells: what has the deployment's name goes, addresses are imported, an apply makes the rest."""
    client, before = launched.cloud.client(), launched.outputs()
    for path in launched.folder.glob("terraform.tfstate*"):
        path.unlink()
    for server in client.servers.get_all(label_selector="deployment=launch"):
        server.delete().wait_until_finished()
    assert given(client.networks.get_by_name("launch")).delete()
    assert given(client.firewalls.get_by_name("launch")).delete()
    blocks = re.findall(r"(?ms)^import \{.*?^\}$", (ROOT / "OPERATING.md").read_text())
    assert len(blocks) == 2
    ids = {each.type: str(each.id) for each in client.floating_ips.get_all()}
    text = "\n".join(blocks).replace("1001", ids["ipv4"]).replace("1002", ids["ipv6"])
    (launched.folder / "import.tf").write_text(text)
    launched.apply()
    (launched.folder / "import.tf").unlink()
    after = launched.outputs()
    assert after["ipv4_address"] == before["ipv4_address"]
    assert after["ipv6_address"] == before["ipv6_address"]
    assert launched.generate(after["ipv4_address"], KEYS["alice"]) == 200
    assert launched.changes() == ""


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


def test_with_an_ordered_certificate(cloud: LocalCloud, image: BoundImage, program: str, tmp_path: Path) -> None:
    """The node proves itself at its own address, gets the addresses, and then has its certificate ordered.

    Who may log in has a key at the project already, which is left there.
    """
    key, keys = make_key(tmp_path), cloud.client().ssh_keys
    keys.create("laptop", key.with_suffix(".pub").read_text())
    with ExitStack() as after, reachable_acme_server(cloud, tmp_path) as (server, acme):
        after.callback(lambda: given(keys.get_by_name("laptop")).delete())  # fails where the deployment took it along
        root = tmp_path / "root.pem"
        server.write_root(root)
        values = {"image_id": image.id, "acme": acme, "existing_ssh_keys": ["laptop"]}
        with deployment(tmp_path, cloud, program, root, **values) as made:
            address = apply_with_names(made, server)
            assert made.generate(address, KEYS["alice"]) == 200
            assert made.changes() == ""
            told = made.outputs()
            assert ssh(key, told["node"]["ipv4"], "id -un").strip() == "root"
            # Others are asked under the node's own address, not under the one that may lead elsewhere.
            asked = ssh(key, told["node"]["ipv4"], "ip -6 route get 2001:db8::1; ip -6 address show scope global")
            assert told["ipv6_address"] in asked
            assert " src " in asked
            assert f"src {told['ipv6_address']}" not in asked
            # The same key under another number makes no other node.
            assert given(keys.get_by_name("laptop")).delete()
            keys.create("laptop", key.with_suffix(".pub").read_text())
            assert made.changes() == ""


def test_the_example_as_it_is(cloud: LocalCloud, image: BoundImage, program: str, tmp_path: Path) -> None:
    """Copied beside main.tf, a key's hash filled in, nothing else said but where certificates come from: it serves."""
    with reachable_acme_server(cloud, tmp_path) as (server, acme):
        root = tmp_path / "root.pem"
        server.write_root(root)
        with deployment(tmp_path, cloud, program, root, image_id=image.id, acme=acme) as made:
            made.values = {name: value for name, value in made.values.items() if name not in _OF_THE_EXAMPLE}
            shutil.copy(fill_in_example(tmp_path), made.folder / "terraform.tfvars")
            code, said = made.run("apply", "-auto-approve", "-input=false", "-target=hcloud_floating_ip.service")
            assert code == 0, said
            [address] = [each.ip for each in cloud.client().floating_ips.get_all() if each.type == "ipv4"]
            for name in ("llm.example.org", "monitoring.llm.example.org"):
                server.point(name, given(address))
            assert f"llm.example.org at {address} serves after" in made.apply()
            assert made.outputs()["url"] == "https://llm.example.org"
            [node] = cloud.client().servers.get_all(label_selector="deployment=mini-llm")
            assert given(node.server_type).name == "cx33"
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
            assert sorted((each.id, each.ttl, given(each.records)[0].value) for each in found) == [
                (f"{name}/{kind}", 300, addresses[kind]) for name in ("@", "monitoring") for kind in ("A", "AAAA")
            ]
            assert made.changes() == ""
            # As when an apply is killed between making them and writing it down: Terraform takes over no record.
            code, said = made.run("state", "rm", "hcloud_zone_rrset.service")
            assert code == 0, said
            swept = made.sweep()
            assert swept.count("removed: ") == swept.count("removed: zone rrset ") == 4, swept
            made.apply()
            made.apply(monitoring=None)
            left = cloud.client().zones.get(DOMAIN).get_rrset_all(label_selector="deployment=launch")
            assert sorted(each.id for each in left) == ["@/A", "@/AAAA"]
            assert made.generate_by_name(KEYS["alice"]) == 200
