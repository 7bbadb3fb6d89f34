"""That an environment made by another Python is made anew, and not mixed with this one's."""

import sys
from pathlib import Path

import pytest

from scripts import setup_venv


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
