"""The Makefile's commands for who changes the project, as they are typed, each kept short."""

from tests.typed import type_command

_PATIENCE_S = 300


def test_make_test() -> None:
    """Style, types, and the files of tests that are named; the table of tiers at its end."""
    said = type_command("make test TESTS=tests/unit/test_commands.py", _PATIENCE_S)
    assert "= by tier =" in said
    assert " passed in " in said


def test_make_unit() -> None:
    """The same without what needs more than this tree; of its tests those of one file."""
    said = type_command("make unit", _PATIENCE_S, PYTEST_ADDOPTS="-k test_commands")
    assert "= by tier =" in said
    assert " passed, " in said
