"""`make audit` never passes for packages that nobody could look up."""

from typing import Any

import pytest

from tests.audit.__main__ import judge, list_locks

CLEAN = {"name": "falcon", "version": "1.0", "vulns": []}
WEAK = {"name": "idna", "version": "3.0", "vulns": [{"id": "PYSEC-1", "fix_versions": ["3.7"], "aliases": []}]}
UNKNOWN = {"name": "limits", "skip_reason": "Dependency not found on PyPI and could not be audited"}


@pytest.mark.parametrize(
    ("found", "code", "told"),
    [
        ([CLEAN, CLEAN], 0, "audit: 1 packages looked up, 0 known weaknesses"),
        ([CLEAN, WEAK], 1, "idna 3.0: PYSEC-1, mended in 3.7"),
        ([WEAK, UNKNOWN], 1, "audit: 1 packages could NOT be looked up; nothing is known of them"),
        ([CLEAN, UNKNOWN], 2, "audit: 1 packages could NOT be looked up; nothing is known of them"),
        ([UNKNOWN], 2, "audit: it did not run: the package index here has no list of weaknesses"),
        ([], 2, "audit: it did not run: the package index here has no list of weaknesses"),
    ],
)
def test_the_verdict(found: list[dict[str, Any]], code: int, told: str) -> None:
    """Clean only if each was looked up and none is weak; the same package of two locks counts once."""
    verdict = judge(found)
    assert verdict.code == code
    assert told in verdict.lines


def test_every_lock_is_asked_about() -> None:
    """Those of the service, of the scripts, and of whatever tests and trains them."""
    assert {"service/requirements.txt", "scripts/requirements.txt", "tests/requirements.txt"} <= set(list_locks())
