"""The audit finds what must be in no image, each thing by itself, and nothing in a tree that is clean."""

import json
from pathlib import Path

import pytest

from tests.image.scripts import ROOT, load_script

audit_image = load_script("rootfs/usr/lib/mini-llm/audit_image.py")
PRIVATE_KEY = "-----BEGIN OPENSSH PRIVATE KEY-----\n" + "A" * 64 + "\n"  # of the shape alone


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A root as an image should have it."""
    for folder in ("etc/ssh", "root", "var/lib/mini-llm/golden", "var/log/journal", "opt/mini-llm/service"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "etc/machine-id").write_text("uninitialized\n")
    (tmp_path / "etc/shadow").write_text("root:!*:20000:0:99999:7:::\ndaemon:*:20000::::::\n")
    (tmp_path / "etc/link").symlink_to("/etc/shadow")
    return tmp_path


def test_a_clean_image_has_no_findings(tree: Path) -> None:
    """Links are not followed out of it."""
    assert audit_image.audit(tree) == []
    assert audit_image.main([str(tree), "--out", str(tree / "result.json")]) == 0
    assert (tree / "result.json").read_text() == '{\n "findings": []\n}\n'


@pytest.mark.parametrize(
    ("path", "content", "finding"),
    [
        ("etc/ssh/ssh_host_ed25519_key", "x", "a host key: every server would have the same"),
        ("root/.ssh/authorized_keys", "x", "somebody's key for root"),
        ("home/me/.bash_history", "x", "a history of commands"),
        ("root/.cache/pip/x", "x", "a cache of who baked"),
        ("var/lib/cloud/instances/i-1/user-data.txt", "x", "cloud-init's memory of another server"),
        ("var/lib/systemd/random-seed", "x", "randomness that every server would share"),
        ("var/lib/apt/lists/mirror_Packages", "x", "lists of packages, old by the time of the first boot"),
        ("var/cache/apt/archives/a.deb", "x", "downloaded packages"),
        ("var/log/dpkg.log", "x", "a log of the bake"),
        ("var/log/journal/0123/system.journal", "x", "a log of the bake"),
        ("usr/local/share/ca-certificates/own.crt", "x", "an authority that is not Debian's"),
        ("etc/mini-llm/facts.yaml", "x", "the facts of another server"),
        ("etc/hostname", "x", "the name of who baked"),
        ("etc/machine-id", "0123456789abcdef0123456789abcdef\n", "an identity"),
        ("etc/shadow", "root:$y$j9T$x:20000::::::\n", "root has a password"),
        ("etc/shadow", "root::20000::::::\n", "root has an empty password"),
        ("opt/mini-llm/service/key.pem", PRIVATE_KEY, "a private key"),
        ("srv/note", "mllm_" + "a" * 32, "a key of the service"),
        ("srv/note", "key=mllm_" + "0a" * 24, "a key of the service"),
        ("srv/note", "mllm_" + "a" * 31 + "-", "a key of the service"),
        ("srv/facts.json", json.dumps({"key": PRIVATE_KEY}), "a private key"),
        ("root/.docker/config.json", "x", "settings of who baked"),
        ("root/.config/hcloud/cli.toml", "x", "settings of who baked"),
        ("root/.netrc", "x", "settings of who baked"),
        ("var/lib/mini-llm-traefik/acme.json", "x", "certificates of another server"),
        ("var/lib/mini-llm-prometheus.damaged/wal", "x", "data of another server that were put aside"),
        ("var/lib/mini-llm-node/facts_of.json", "x", "what another server remembers"),
        ("var/lib/cloud/seed/nocloud/user-data", "x", "the user-data of another server"),
        ("var/log/wtmp", "x", "a log of logins"),
        ("etc/hosts", "127.0.1.1 mini-llm-bake-by-hand\n", "the name of who baked"),
        ("root/.env", "HCLOUD_TOKEN=" + "a" * 64, "a cloud token"),
    ],
)
def test_what_belongs_to_one_server_is_found(tree: Path, path: str, content: str, finding: str) -> None:
    """With its place and the reason."""
    (tree / path).parent.mkdir(parents=True, exist_ok=True)
    (tree / path).write_text(content)
    [found] = audit_image.audit(tree)
    assert found.endswith(f": {finding}")
    assert audit_image.main([str(tree)]) == 1


def test_on_a_real_server_it_looks_before_randomness_is_kept() -> None:
    """No container has that unit, so no test here would meet the file that it makes."""
    lines = (ROOT / "image/rootfs/etc/systemd/system/mini-llm-audit.service").read_text().splitlines()
    after = {word for line in lines if line.startswith("Before=") for word in line.removeprefix("Before=").split()}
    assert "systemd-random-seed.service" in after
