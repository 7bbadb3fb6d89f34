"""Clients of the real API drive the local one unchanged: hcloud for Python, the hcloud CLI, Packer, Terraform."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hcloud import APIException, Client
from hcloud.actions import Action
from hcloud.images import Image
from hcloud.locations import Location
from hcloud.server_types import ServerType
from hcloud.servers import BoundServer
from hcloud.ssh_keys import BoundSSHKey

from scripts.bake.answers import given
from scripts.setup_host import CLOUD
from tests.absent import did_not_run
from tests.commands import ROOT, blocks, find_command
from tests.local_cloud.harness import LocalCloud, address_of, make_key, running_cloud, ssh, wait_until_off
from tests.programs import PACKER, PACKER_PLUGIN_HCLOUD, ProgramMissing, obtain

SMALL, DEBIAN = ServerType(name="cx23"), Image(name="debian-13")


@pytest.fixture(scope="module")
def client(cloud: LocalCloud) -> Client:
    return cloud.client()


@pytest.fixture(scope="module")
def known_key(client: Client, key: Path) -> BoundSSHKey:
    return client.ssh_keys.create("known", key.with_suffix(".pub").read_text())


@contextmanager
def server(client: Client, name: str, image: Image, key: BoundSSHKey, **fields: Any) -> Iterator[BoundServer]:
    """A server that runs, and is deleted afterwards."""
    made = client.servers.create(name, SMALL, image, ssh_keys=[key], **fields)
    try:
        for action in (made.action, *made.next_actions):
            action.wait_until_finished()
        yield made.server
    finally:
        made.server.delete().wait_until_finished()


def test_hcloud_python_from_server_to_snapshot_to_server(client: Client, key: Path, known_key: BoundSSHKey) -> None:
    """cloud-init does as told, metadata answer, a snapshot holds the disk; its host keys are made anew."""
    user_data = "#cloud-config\nwrite_files:\n  - {path: /srv/told, content: by user-data}\n"
    with server(client, "first", DEBIAN, known_key, user_data=user_data, labels={"role": "first"}) as first:
        assert client.servers.get_all(label_selector="role=first")[0].id == first.id
        ask = "cloud-init status --wait >/dev/null; hostname; cat /srv/told"
        seen = ssh(key, address_of(first), ask)
        assert seen.startswith("first\nby user-data")
        metadata = ssh(key, address_of(first), "curl -sf http://169.254.169.254/hetzner/v1/metadata/instance-id")
        assert metadata.strip() == str(first.id)
        host_key = ssh(key, address_of(first), "cat /etc/ssh/ssh_host_ed25519_key.pub")
        first.shutdown().wait_until_finished()
        wait_until_off(client, first)
        made = first.create_image("of the first", labels={"kind": "test"})
        made.action.wait_until_finished()
    image = client.images.get_by_id(given(made.image.id))
    assert (image.status, image.type, image.name) == ("available", "snapshot", None)
    assert given(image.image_size) > 0.1
    with server(client, "second", image, known_key) as second:
        assert "by user-data" in ssh(key, address_of(second), "cat /srv/told")
        assert ssh(key, address_of(second), "hostname").strip() == "second"
        assert ssh(key, address_of(second), "cat /etc/ssh/ssh_host_ed25519_key.pub") != host_key
    image.delete()
    assert client.images.get_all(type=["snapshot"]) == []


def test_hcloud_python_power_and_rebuild(client: Client, key: Path, known_key: BoundSSHKey) -> None:
    """Off, on, reset and rebuild do what they say to the real machine."""
    with server(client, "powered", DEBIAN, known_key) as powered:
        ssh(key, address_of(powered), "touch /srv/mark && sync")
        powered.power_off().wait_until_finished()
        assert client.servers.get_by_id(given(powered.id)).status == "off"
        powered.power_on().wait_until_finished()
        ssh(key, address_of(powered), "test -e /srv/mark")
        powered.reset().wait_until_finished()
        ssh(key, address_of(powered), "test -e /srv/mark")
        powered.rebuild(DEBIAN).action.wait_until_finished()
        ssh(key, address_of(powered), "test ! -e /srv/mark")
        with pytest.raises(APIException) as caught:
            client.servers.create("powered", SMALL, DEBIAN)
        assert caught.value.code == "uniqueness_error"


def test_power_off_from_inside_is_seen(client: Client, key: Path, known_key: BoundSSHKey) -> None:
    """A server that goes off by itself is off for the API too."""
    with server(client, "tired", DEBIAN, known_key) as tired:
        # A second later: had it cut this very connection, SSH's failure would be tried again at a server that is off.
        ssh(key, address_of(tired), "systemd-run --quiet sh -c 'sleep 1; systemctl poweroff'")
        wait_until_off(client, tired)


def test_hcloud_cli(cloud: LocalCloud, client: Client, key: Path, known_key: BoundSSHKey) -> None:
    """Debian's hcloud creates, shows, snapshots and deletes."""
    if shutil.which("hcloud") is None:
        did_not_run("the hcloud CLI is not installed (Debian: sudo apt-get install hcloud-cli)")

    def hcloud(*words: str) -> str:
        done = subprocess.run(["hcloud", *words], env=cloud.environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    hcloud("server", "create", "--name", "cli", "--type", "cx23", "--image", "debian-13", "--ssh-key", "known")
    told = json.loads(hcloud("server", "describe", "cli", "-o", "json"))
    assert told["status"] == "running"
    assert ssh(key, told["public_net"]["ipv4"]["ip"], "hostname").strip() == "cli"
    hcloud("server", "add-label", "cli", "made=by-hand")
    assert "made=by-hand" in hcloud("server", "list", "-o", "columns=name,labels")
    assert "cli" in hcloud("server", "list", "-l", "made=by-hand")
    address = client.floating_ips.create("ipv4", name="address-cli", home_location=Location(name="fsn1")).floating_ip
    assert "address-cli" in hcloud("floating-ip", "list")
    address.delete()
    hcloud("server", "poweroff", "cli")
    hcloud("server", "create-image", "--type", "snapshot", "--description", "by hand", "cli")
    assert "by hand" in hcloud("image", "list", "--type", "snapshot")
    hcloud("server", "delete", "cli")
    for _ in range(100):  # it does not wait for the action
        if "cli" not in hcloud("server", "list"):
            break
    assert "cli" not in hcloud("server", "list")
    [image] = client.images.get_all(type=["snapshot"])
    hcloud("image", "delete", str(image.id))


def test_what_the_readme_installs(client: Client, key: Path, known_key: BoundSSHKey) -> None:
    """On plain Debian, root's line brings every program of a local cloud and of its client."""
    install = find_command("sudo apt-get install ").removeprefix("sudo ")
    wanted = " ".join(["hcloud", "ssh", *CLOUD])
    with server(client, "host", DEBIAN, known_key) as plain:
        told = ssh(
            key,
            address_of(plain),
            "cloud-init status --wait >/dev/null; export DEBIAN_FRONTEND=noninteractive && apt-get -qq update && "
            f"{install} -qq >/dev/null && for each in {wanted}; do command -v $each >/dev/null || echo $each; done; "
            "ls /usr/share/keyrings/debian-archive-keyring*",
        )
    assert all(line.startswith("/usr/share/keyrings/debian-archive-keyring") for line in told.splitlines()), told


def test_the_lines_of_the_readme(cloud: LocalCloud, client: Client, tmp_path: Path) -> None:
    """Those for another terminal, as they are printed, in one shell: a server is made, and lets its owner in.

    Only the cloud's port is another, and what is asked behind the last line.
    """
    if shutil.which("hcloud") is None:
        did_not_run("the hcloud CLI is not installed (Debian: sudo apt-get install hcloud-cli)")
    [lines] = [block for block in blocks((ROOT / "README.md").read_text(), "sh") if "export HCLOUD_ENDPOINT" in block]
    assert "http://127.0.0.1:8899/v1" in lines
    script = lines.rstrip().replace("http://127.0.0.1:8899/v1", cloud.endpoint) + " hostname"
    try:
        done = subprocess.run(
            ["sh", "-ec", script],
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.endswith("\nweb-1\n")
    finally:
        for one in client.servers.get_all(name="web-1"):
            one.delete().wait_until_finished()
        for key in client.ssh_keys.get_all(name="me"):
            key.delete()


PACKER_TEMPLATE = """
packer {
  required_plugins {
    hcloud = { source = "github.com/hetznercloud/hcloud", version = ">= PINNED" }
  }
}
source "hcloud" "trivial" {
  image           = "debian-13"
  location        = "fsn1"
  server_type     = "cx23"
  ssh_username    = "root"
  snapshot_name   = "trivial"
  snapshot_labels = { purpose = "test" }
}
build {
  sources = ["source.hcloud.trivial"]
  provisioner "shell" { inline = ["echo baked > /srv/baked"] }
}
"""


def test_packer_bakes_a_snapshot_that_boots(host: None, tmp_path: Path, key: Path) -> None:
    """With its hcloud plugin, which knows fields that the API has dropped since."""
    try:
        packer, plugin = obtain(PACKER), obtain(PACKER_PLUGIN_HCLOUD)
    except ProgramMissing as error:
        did_not_run(error)
    template = PACKER_TEMPLATE.replace("PINNED", PACKER_PLUGIN_HCLOUD.version)
    (tmp_path / "trivial.pkr.hcl").write_text(template)
    with running_cloud(tmp_path, "--old-clients") as cloud:
        environment = {**cloud.environment, "PACKER_PLUGIN_PATH": str(tmp_path / "plugins"), "CHECKPOINT_DISABLE": "1"}
        environment["PACKER_CONFIG_DIR"] = str(tmp_path)
        for words in (
            ["plugins", "install", "--path", str(plugin), "github.com/hetznercloud/hcloud"],
            ["validate", "trivial.pkr.hcl"],
            ["build", "-color=false", "trivial.pkr.hcl"],
        ):
            done = subprocess.run(
                [packer, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
            )
            assert done.returncode == 0, done.stdout + done.stderr
        client = cloud.client()
        [image] = client.images.get_all(type=["snapshot"])
        assert (image.description, image.labels) == ("trivial", {"purpose": "test"})
        assert client.ssh_keys.get_all() == []
        known = client.ssh_keys.create("known", key.with_suffix(".pub").read_text())
        with server(client, "booted", image, known) as booted:
            assert ssh(key, address_of(booted), "cat /srv/baked").strip() == "baked"


def test_terraform_plans_no_changes(cloud: LocalCloud, client: Client, tmp_path: Path) -> None:
    """The real provider creates, finds nothing to change, changes in place, replaces and destroys."""
    terraform = shutil.which("terraform") or shutil.which("tofu")
    if terraform is None:
        did_not_run("neither terraform nor tofu is installed", may_in_ci=True)
    environment = {**cloud.environment, "HCLOUD_TOKEN": "local".ljust(64, "0"), "TF_IN_AUTOMATION": "1"}
    environment["HCLOUD_POLL_INTERVAL"] = "100ms"
    configuration = (Path(__file__).parent / "terraform.tf").read_text()
    own_key = make_key(tmp_path)

    def run(*words: str, name: str = "one", label: str = "first", code: int = 0) -> str:
        values = {"TF_VAR_name": name, "TF_VAR_label": label, "TF_VAR_image": str(image.id)}
        told = {**environment, **values, "TF_VAR_public_key": own_key.with_suffix(".pub").read_text()}
        done = subprocess.run([terraform, *words], cwd=tmp_path, env=told, capture_output=True, text=True, timeout=300)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout

    def addresses() -> list[str]:
        return [address_of(one) for one in client.servers.get_all(label_selector="made=by-terraform")]

    made = client.servers.create("model", SMALL, DEBIAN, start_after_create=False)
    made.action.wait_until_finished()
    imaged = made.server.create_image("for terraform")
    imaged.action.wait_until_finished()
    image = imaged.image
    made.server.delete().wait_until_finished()
    (tmp_path / "main.tf").write_text(configuration)
    start = subprocess.run(
        [terraform, "init", "-input=false"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    if start.returncode and "hetznercloud/hcloud" in start.stderr:
        did_not_run("Terraform's provider hetznercloud/hcloud could not be had by terraform init", may_in_ci=True)
    assert start.returncode == 0, start.stderr
    try:
        run("apply", "-auto-approve")
        assert "No changes" in run("plan", "-detailed-exitcode")
        [address] = addresses()
        assert ssh(own_key, address, "hostname").strip() == "one"
        run("apply", "-auto-approve", name="two", label="second")
        assert addresses() == [address]
        run("plan", "-detailed-exitcode", name="two", label="second")
        run("apply", "-auto-approve", "-replace=hcloud_server.node", name="two", label="second")
        run("plan", "-detailed-exitcode", name="two", label="second")
        assert ssh(own_key, address, "hostname").strip() == "two"
    finally:
        run("destroy", "-auto-approve")
    assert addresses() == []
    image.delete()


def test_both_ways_of_polling(client: Client, known_key: BoundSSHKey) -> None:
    """One action at a time, and several by their ids."""
    made = client.servers.create("polled", SMALL, DEBIAN, ssh_keys=[known_key], start_after_create=False)
    made.action.wait_until_finished()
    assert client.actions.get_by_id(made.action.id).status == Action.STATUS_SUCCESS
    answer = client.request(method="GET", url="/actions", params={"id": [made.action.id], "sort": "status"})
    assert [one["id"] for one in answer["actions"]] == [made.action.id]
    made.server.delete().wait_until_finished()


@pytest.mark.parametrize("name", ["HCLOUD_TOKEN", "HCLOUD_ENDPOINT"])
def test_export_lines_are_the_ones_that_hold(cloud: LocalCloud, name: str) -> None:
    """What is printed at the start can be pasted."""
    assert f"export {name}={cloud.environment[name]}" in cloud.output().splitlines()
