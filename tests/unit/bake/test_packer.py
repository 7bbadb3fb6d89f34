"""Packer as a program: what it is given, and that it never outlives what started it."""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from scripts.bake import packer
from scripts.bake.errors import Refused

TOKEN = "a-token-that-nobody-else-may-have"


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What programs were started with; all of them do well."""
    every: list[dict[str, Any]] = []

    def run(command: list[str], **more: Any) -> "subprocess.CompletedProcess[str]":
        every.append({"command": command, **more})
        return subprocess.CompletedProcess(command, 0, "Packer v1.14.2\n", "")

    monkeypatch.setattr(packer.shutil, "which", lambda name, path: name)
    monkeypatch.setattr(packer.subprocess, "run", run)
    return every


def test_packer_is_looked_at_without_the_token(seen: list[dict[str, Any]]) -> None:
    """Neither its version nor its plugin has to do with the cloud."""
    assert packer.require_packer(Path("image"), {**os.environ, "HCLOUD_TOKEN": TOKEN}) == "1.14.2"
    assert [each["command"][1] for each in seen] == ["version", "validate"]
    assert TOKEN not in str(seen)


def test_a_program_that_does_not_end_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another program of this name may wait for its input; ours may for a network that swallows all."""

    def run(command: list[str], **more: Any) -> None:
        assert more["stdin"] == subprocess.DEVNULL
        raise subprocess.TimeoutExpired(command, more["timeout"])

    monkeypatch.setattr(packer.shutil, "which", lambda name, path: name)
    monkeypatch.setattr(packer.subprocess, "run", run)
    with pytest.raises(Refused, match="packer version: it is not done within 120 s"):
        packer.require_packer(Path("image"), {})
