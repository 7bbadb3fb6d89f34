"""Owns the audit of an image: finds what belongs to one server, or to who baked it, and must be in no image.

``python3 audit_image.py ROOT [--running] [--out FILE]`` prints each finding as a line, writes all of them as JSON if
told where, and ends with 1 if there was any. A unit runs it before anything is made at a server's first boot, and tests
run it on a snapshot.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

# Globs below the root that must match nothing, and why.
_MUST_NOT_EXIST = (
    ("etc/ssh/ssh_host_*", "a host key: every server would have the same"),
    ("root/.ssh/authorized_keys", "somebody's key for root"),
    ("home/*/.ssh/authorized_keys", "somebody's key"),
    ("root/.*_history", "a history of commands"),
    ("home/*/.*_history", "a history of commands"),
    ("root/.cache", "a cache of who baked"),
    *((f"root/{name}", "settings of who baked") for name in (".config", ".docker", ".netrc", ".aws", ".gitconfig")),
    ("var/lib/cloud/instance", "cloud-init's memory of another server"),
    ("var/lib/cloud/instances/*", "cloud-init's memory of another server"),
    ("var/lib/systemd/random-seed", "randomness that every server would share"),
    ("var/lib/systemd/credential.secret", "a secret that every server would share"),
    ("var/lib/dbus/machine-id", "an identity"),
    ("etc/hostname", "the name of who baked"),
    ("var/lib/docker/engine-id", "an identity"),
    ("var/lib/apt/lists/*Packages*", "lists of packages, old by the time of the first boot"),
    ("var/cache/apt/archives/*.deb", "downloaded packages"),
    ("var/log/apt/*", "a log of the bake"),
    ("var/log/*.log", "a log of the bake"),
    ("var/log/[wb]tmp*", "a log of logins"),
    ("var/log/journal/*/*", "a log of the bake"),
    ("var/tmp/*", "something left over"),
    ("usr/local/share/ca-certificates/*", "an authority that is not Debian's"),
    ("etc/mini-llm/facts.yaml", "the facts of another server"),
    ("var/lib/mini-llm/keys.json", "keys of another server"),
    ("var/lib/mini-llm-traefik/*", "certificates of another server"),
    ("var/lib/mini-llm-prometheus/*", "metrics of another server"),
    ("var/lib/mini-llm-alertmanager/*", "alerts of another server"),
    ("var/lib/mini-llm-*.*", "data of another server that were put aside"),
    ("var/lib/mini-llm-node/*", "what another server remembers"),
    ("var/lib/mini-llm/audit/*", "an audit log of another server"),
    ("var/lib/mini-llm/counters*", "counters of another server"),
)
# Below these a local cloud, or who installs a server by hand, puts the user-data before the first boot.
_SEEDS = "var/lib/cloud/seed/*"
_NO_IDENTITY = ("", "uninitialized")
_SEARCHED = (
    *("etc", "home", "root", "srv"),
    *("opt/mini-llm/service", "usr/lib/mini-llm", "usr/share/mini-llm", "var/lib/mini-llm"),
)
_LARGEST_SEARCHED_BYTES = 1 << 20
_SECRETS = (
    (re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----(?:\s|\\n)+[A-Za-z0-9+/=]{40}"), "a private key"),
    (re.compile(rb"\bmllm_[A-Za-z0-9_-]{32,}"), "a key of the service"),
    (re.compile(rb"HCLOUD_TOKEN\s*=\s*['\"]?[A-Za-z0-9]{64}"), "a cloud token"),
)
# What its packages bring themselves, such as test vectors; nobody's secret.
_HARMLESS = ("etc/ssl/certs",)


def audit(root: Path, running: bool = False) -> list[str]:
    """What is wrong with the image whose files lie below ``root``, one line each.

    In a ``running`` server systemd has written a machine-id before anybody could look; that it took this boot for the
    first (the unit's condition) says that the image brought none.
    """
    findings = [
        f"/{path.relative_to(root)}: {why}" for glob, why in _MUST_NOT_EXIST for path in sorted(root.glob(glob))
    ]
    identity = root / "etc/machine-id"
    if not running:
        findings += [f"/{path.relative_to(root)}: the user-data of another server" for path in root.glob(_SEEDS)]
    hosts = root / "etc/hosts"
    if hosts.exists() and "127.0.1.1" in hosts.read_text():
        findings.append("/etc/hosts: the name of who baked")
    if not running and identity.exists() and identity.read_text().strip() not in _NO_IDENTITY:
        findings.append("/etc/machine-id: an identity")
    return [*findings, *_find_passwords(root / "etc/shadow"), *_find_secrets(root)]


def _find_passwords(shadow: Path) -> Iterator[str]:
    for line in shadow.read_text().splitlines() if shadow.exists() else []:
        name, password, *_ = line.split(":")
        if not password.startswith(("!", "*")):
            yield f"/etc/shadow: {name} has {'a' if password else 'an empty'} password"


def _find_secrets(root: Path) -> Iterator[str]:
    for searched in _SEARCHED:
        for folder, _, names in os.walk(root / searched):
            for name in names:
                path = Path(folder) / name
                relative = path.relative_to(root).as_posix()
                if path.is_symlink() or not path.is_file() or path.stat().st_size > _LARGEST_SEARCHED_BYTES:
                    continue
                if relative.startswith(_HARMLESS):
                    continue
                content = path.read_bytes()
                for pattern, what in _SECRETS:
                    if pattern.search(content):
                        yield f"/{relative}: {what}"


def main(arguments: list[str]) -> int:
    """Prints what was found and writes it down."""
    parser = argparse.ArgumentParser(description="Find what must be in no image.")
    parser.add_argument("root", type=Path, help="where the image's files lie")
    parser.add_argument("--running", action="store_true", help="the image has just booted for the first time")
    parser.add_argument("--out", type=Path, help="file for the result as JSON")
    options = parser.parse_args(arguments)
    findings = audit(options.root, options.running)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"findings": findings}, indent=1) + "\n")
    for finding in findings:
        print(finding)
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
