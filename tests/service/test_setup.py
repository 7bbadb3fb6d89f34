"""That an environment made by another Python is made anew, and not mixed with this one's."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import setup_venv

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("change", "ours"),
    [
        ("pass", True),
        ("sys.version = sys.version.replace('3.', '4.', 1)", False),
        ("sys.base_prefix = '/elsewhere'", False),
        ("sys.exit(1)", False),
    ],
)
def test_an_environment_is_ours_if_this_python_made_it(tmp_path: Path, change: str, ours: bool) -> None:
    """The same version built by somebody else has other modules."""
    python = tmp_path / "python"
    script = f'exec {sys.executable} -c "import sys; {change}; exec(sys.argv[1])" "$2"'
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    assert setup_venv.is_ours(str(python)) is ours


def test_an_environment_that_is_not_there_is_not_ours(tmp_path: Path) -> None:
    """As on a clean clone."""
    assert not setup_venv.is_ours(str(tmp_path / "python"))


@pytest.mark.skipif(os.geteuid() != 0, reason="did not run: only root can work for others")
def test_as_root_the_checkout_stays_with_whom_it_belongs_to(tmp_path: Path) -> None:
    """Environment, linters and caches are its owner's, or they would be in his way; among root's own, nobody else's."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    own = _would_run(tmp_path)
    assert "runuser" not in own
    assert "chown" not in own
    shutil.chown(tmp_path / "Makefile", "nobody")
    lines = _would_run(tmp_path).splitlines()
    as_owner = "runuser -u nobody -- env HOME="
    assert [line.startswith(as_owner) for line in lines[:2]] == [True, True]
    assert "setup_venv.py" in lines[0]
    linters = re.findall(r"-m (?:ruff|mypy) ", lines[1])
    assert linters
    assert lines[1].count(as_owner) == len(linters)
    assert "chown -R nobody: .cache .pytest_cache" in lines[1]


def _would_run(folder: Path) -> str:
    done = subprocess.run(["make", "-n", "unit"], cwd=folder, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    return done.stdout
