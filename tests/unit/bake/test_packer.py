"""Packer as a program: what it is given, and that it never outlives what started it."""

import errno
import os
import signal
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from scripts.bake import packer
from scripts.bake.errors import LayerFailed, Refused
from scripts.bake.runs import new_run

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


class _Endless:
    """A Packer that works on until it is told to end."""

    def __init__(self, command: list[str], **more: Any):
        self.pid, self.returncode = 4711, None
        self.ended = False
        _Endless.last = self

    last: "_Endless"

    def poll(self) -> int | None:
        return 1 if self.ended else None

    def wait(self, patience_s: float | None = None) -> int:
        assert self.ended
        return 1


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Which process groups got which signal."""
    every: list[tuple[int, int]] = []

    def end(group: int, number: int) -> None:
        every.append((group, number))
        _Endless.last.ended = True

    monkeypatch.setattr(packer.subprocess, "Popen", _Endless)
    monkeypatch.setattr(packer.os, "killpg", end)
    monkeypatch.setattr(packer.time, "sleep", lambda seconds: None)
    return every


def build(state: Path, deadline_s: int) -> None:
    with new_run(state) as run:
        packer.build(replace(run, deadline_s=deadline_s), Path("image"), {}, {}, lambda line: None)


def test_packer_ends_also_if_it_cannot_be_written_down(
    state: Path, ended: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a full disk, or at a signal at just this moment."""

    def fail(run: object, pid: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(packer, "note_packer", fail)
    with pytest.raises(OSError, match="full"):
        build(state, 2**40)
    assert ended == [(4711, signal.SIGINT)]
    assert packer._running == []


def test_packer_ends_at_the_runs_deadline(state: Path, ended: list[tuple[int, int]]) -> None:
    """From then on a sweep on another machine takes its server, and one on this machine its snapshot."""
    with pytest.raises(LayerFailed, match="deadline, 6 hours"):
        build(state, 1000)
    assert ended == [(4711, signal.SIGINT)]
