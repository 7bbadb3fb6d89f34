"""Every command of README.md and OPERATING.md is run by a test, or is known not to be."""

import re

import pytest

from scripts import setup_host
from tests.commands import BY_HAND, COMMANDS, DOCUMENTS, ROOT, list_commands, split_shell


@pytest.mark.parametrize(
    ("script", "commands"),
    [
        ("one\n\n  two  three # not\n# nor\n", ["one", "two three"]),
        ("a \\\n  b; c\n", ["a b", "c"]),
        ("""say '#  not; a' "b#  c" d#e\n""", ["""say '#  not; a' "b#  c" d#e"""]),
        ("a # b; c\nd", ["a", "d"]),
    ],
)
def test_a_script_is_split_as_a_shell_does(script: str, commands: list[str]) -> None:
    """Quotes hold together what is in them."""
    assert split_shell(script) == commands


def test_commands_of_a_document() -> None:
    """Fenced, within the text across lines, in the table of bake.py's verbs; nothing of other languages."""
    text = (
        "Type `make\nserve` or `make`, not `event: x`.\n\n```sh\nmake cloud\n```\n\n```python\nmake no\n```\n\n"
        "| `bake.py …` | what |\n|---|---|\n| `list`, `show ID` | `this` |\n\n| `not` | x |\n"
    )
    assert list_commands(text) == ["make cloud", "make serve", "bake.py list", "bake.py show ID"]
    assert list_commands("`verify ID`, `verify --after` and `plan`") == ["verify --after"]


def test_every_command_is_accounted_for() -> None:
    """In one table, in which nothing is stale."""
    told = {command for name in DOCUMENTS for command in list_commands((ROOT / name).read_text())}
    assert sorted(told - set(COMMANDS)) == [], "commands without a test that runs them: write one, name it in COMMANDS"
    assert sorted(set(COMMANDS) - told) == [], "commands that no document has any more"


@pytest.mark.parametrize("told", sorted({each for each in COMMANDS.values() if not each.startswith(BY_HAND)}))
def test_the_named_test_exists(told: str) -> None:
    """A function of that name in that file."""
    path, _, name = told.partition("::")
    assert re.search(rf"^def {name}\(", (ROOT / path).read_text(), re.MULTILINE)


def test_the_cloud_s_packages_are_those_that_setup_installs() -> None:
    """The one line of the README that no test runs and a reader cannot do without."""
    [line] = [command for command in COMMANDS if command.startswith("sudo apt-get install ")]
    named = {word for word in line.split()[3:] if not word.startswith("-")}
    everywhere = {"mount", "procps", "tar", "util-linux"}  # no Debian is without them
    assert named | everywhere == {
        *setup_host.CLOUD.values(),
        *("debian-archive-keyring", "openssh-client", "hcloud-cli"),
    }
