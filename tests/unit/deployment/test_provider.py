"""Terraform's provider is pinned by version and by checksums, which belong together."""

import re
from pathlib import Path

_TERRAFORM = Path(__file__).parents[3] / "terraform"


def test_the_lock_file_is_of_the_version_that_is_asked_for() -> None:
    """Version and constraint are those of versions.tf, and each platform's package has both of its checksums."""
    asked = re.compile(r'source\s*=\s*"hetznercloud/hcloud"\s*version\s*=\s*"([^"]+)"')
    wanted = asked.search((_TERRAFORM / "versions.tf").read_text())
    assert wanted is not None
    lock = (_TERRAFORM / ".terraform.lock.hcl").read_text()
    assert re.findall(r'^provider "(.+)" {$', lock, re.MULTILINE) == ["registry.terraform.io/hetznercloud/hcloud"]
    assert re.findall(r'^  (?:version|constraints) += "(.+)"$', lock, re.MULTILINE) == [wanted[1], wanted[1]]
    unpacked = re.findall(r'"h1:([A-Za-z0-9+/]{43}=)"', lock)
    packed = re.findall(r'"zh:([0-9a-f]{64})"', lock)
    assert len(set(packed)) == len(set(unpacked)) == len(packed) == len(unpacked) > 1
