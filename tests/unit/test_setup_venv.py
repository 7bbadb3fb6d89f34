"""How requirement files are shared out among several pips."""

import re

from scripts.setup_venv import split_requirements
from tests.tree import ROOT

FILES = ["service", "service/starter", "scripts", "tests"]


def _names(text: str) -> list[str]:
    return re.findall(r"^([\w.-]+)==", text, re.MULTILINE)


def _hashes(texts: list[str]) -> set[str]:
    return {line.strip(" \\") for text in texts for line in text.splitlines() if "--hash" in line}


def test_each_package_is_installed_by_one_of_them_with_all_its_hashes() -> None:
    texts = [(ROOT / folder / "requirements.txt").read_text() for folder in FILES]
    parts = split_requirements(texts, 2)
    shared_out = [name for part in parts for name in _names(part)]
    assert not set(_names(parts[0])) & set(_names(parts[1]))
    assert set(shared_out) == {name for text in texts for name in _names(text)}
    assert min(len(_names(part)) for part in parts) >= len(shared_out) // 2
    assert _hashes(parts) == _hashes(texts)


def test_what_is_for_one_system_in_one_file_is_for_all_of_them_if_another_says_so() -> None:
    """As cffi is, which a test's library needs on Windows and the scripts need everywhere."""
    everywhere = "one==2 \\\n    --hash=sha256:bb \\\n    --hash=sha256:cc\n"
    elsewhere = "one==2 ; sys_platform == 'win32' \\\n    --hash=sha256:bb \\\n    --hash=sha256:cc\n"
    first, second = "# a comment\n" + everywhere, "two==1\n" + elsewhere + "    # via another\n"
    assert split_requirements([first, second, first], 1) == [everywhere + elsewhere + "two==1\n"]


def test_a_package_alone_leaves_nothing_to_the_other_one() -> None:
    assert split_requirements(["one==1\n"], 2) == ["one==1\n", ""]
