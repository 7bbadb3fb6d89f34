"""ARCHITECTURE.md tells of each folder why it is there."""

import re
from pathlib import PurePosixPath

from tests.tree import ROOT, list_files


def test_every_folder_has_a_line() -> None:
    """And every line a folder; what lies deeper than two may be part of what is above it."""
    table = (ROOT / "ARCHITECTURE.md").read_text().partition("## Folders")[2].partition("\n## ")[0]
    told = re.findall(r"^\| `([^`]+)/` \|", table, re.MULTILINE)
    assert len(told) == len(set(told))
    folders = {str(parent) for name in list_files() for parent in PurePosixPath(name).parents} - {"."}
    assert set(told) - folders == set()
    assert {name for name in folders if name.count("/") < 2} - set(told) == set()
