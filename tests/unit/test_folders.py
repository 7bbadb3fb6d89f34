"""ARCHITECTURE.md tells of each folder why it is there."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_NOT_OURS = {".git", ".venv", ".cache", "__pycache__", ".pytest_cache", ".ruff_cache", ".mypy_cache", ".terraform"}


def test_every_folder_has_a_line() -> None:
    """And every line a folder; what lies deeper than two may be part of what is above it."""
    table = (ROOT / "ARCHITECTURE.md").read_text().partition("## Folders")[2].partition("\n## ")[0]
    told = re.findall(r"^\| `([^`]+)/` \|", table, re.MULTILINE)
    assert len(told) == len(set(told))
    assert [name for name in told if not (ROOT / name).is_dir()] == []
    there = {
        str(folder.relative_to(ROOT))
        for pattern in ("*", "*/*")
        for folder in ROOT.glob(pattern)
        if folder.is_dir() and _NOT_OURS.isdisjoint(folder.relative_to(ROOT).parts)
    }
    assert there - set(told) == set()
