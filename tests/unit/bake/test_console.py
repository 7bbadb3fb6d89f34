"""What a person sees on a terminal."""

import io
import os
import sys
from pathlib import Path

import pytest

from scripts.bake import console as console_module
from scripts.bake.console import Console


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_time_goes_on_while_nothing_is_said(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A snapshot may take minutes of which Packer says one line; what it said stays, and no line is wrapped."""
    now_s = 100.0
    monkeypatch.setattr(console_module.time, "monotonic", lambda: now_s)
    monkeypatch.setattr(console_module.os, "get_terminal_size", lambda number: os.terminal_size((30, 24)))
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    console = Console(state, "test")
    with console.phase("layer"):
        console.show("Creating snapshot, which takes its time")
        for _ in range(20):
            now_s += 0.1
            console.show("")
        drawn = terminal.getvalue().split("\r\x1b[K")
    assert len(drawn) < 10
    assert drawn[-1] == "layer 2 s  Creating snapshot,"
