"""Clouds of tests never share a range of addresses, whoever runs beside them."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.local_cloud import harness
from tests.local_cloud.harness import ROOT, free_addresses

_HOLDS = """
import sys
from tests.local_cloud.harness import free_addresses
with free_addresses() as addresses:
    print(addresses, flush=True)
    sys.stdin.read()
"""


def test_a_range_has_one_holder(host: None) -> None:
    """In this process and in another one, which gives it back when it ends."""
    words = [sys.executable, "-c", _HOLDS]
    with subprocess.Popen(words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None
            theirs = other.stdout.readline().strip()
            with free_addresses() as first, free_addresses() as second:
                assert len({theirs, first, second}) == 3
        finally:
            other.kill()


def test_a_range_that_the_host_reaches_otherwise_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a test that was killed, whose cloud goes on."""
    told = '[{"dst": "default"}, {"dst": "198.19.0.0/24"}, {"dst": "198.19.1.7"}]'
    monkeypatch.setattr(harness, "_RANGES", tmp_path)
    monkeypatch.setattr(subprocess, "run", lambda words, **_: subprocess.CompletedProcess(words, 0, told))
    with free_addresses() as addresses:
        assert addresses == "198.19.2.0/24"
