"""What a run tells at its end: each tier's counts and time, and each test that did not run with its reason."""

from pathlib import Path
from typing import Any, Literal

import pytest

from tests.conftest import summarize


def report(
    path: str, when: Literal["setup", "call", "teardown"], outcome: Any, reason: Any = None
) -> pytest.TestReport:
    return pytest.TestReport(path, (path, 1, "test"), {}, outcome, reason, when, duration=1.5)


def test_tiers_are_told_with_what_did_not_run() -> None:
    """A test counts once, by its call, or by the set-up that failed; all of its time counts."""
    skipped = ("tests/image/test_launch.py", 1, "Skipped: did not run: neither terraform nor tofu is installed")
    told = summarize(
        [
            *(report("tests/unit/test_app.py::a", when, "passed") for when in ("setup", "call", "teardown")),
            report("tests/unit/test_app.py::b", "setup", "failed"),
            report("tests/image/test_launch.py::c", "setup", "skipped", skipped),
            report("tests/image/test_image.py::d", "call", "passed"),
        ]
    )
    assert [line.split()[:6] for line in told[1:4]] == [
        ["unit", "1", "1", "0", "6", "s"],
        ["launch", "0", "0", "1", "2", "s"],
        ["image", "1", "0", "0", "2", "s"],
    ]
    assert told[4:] == [
        "did not run: neither terraform nor tofu is installed",
        "  tests/image/test_launch.py::c",
    ]


def test_every_test_has_a_tier() -> None:
    """A new folder of tests needs a line in the table."""
    root = Path(__file__).resolve().parents[2]
    files = [path.relative_to(root) for path in (root / "tests").rglob("test_*.py")]
    assert len({path.parts[1] for path in files}) >= 6
    assert "other" not in "".join(summarize([report(f"{path}::x", "call", "passed") for path in files]))
