"""Owns what becomes of a test that lacks something: it says by name that it did not run, and in CI it fails."""

from typing import NoReturn

import pytest

from scripts.setup_host import is_ci


def did_not_run(reason: object, *, may_in_ci: bool = False) -> NoReturn:
    """Ends a test, or all that need a fixture. ``may_in_ci`` is for what no set-up can bring there.

    Raises pytest's own exceptions of a skip, and of a failure.
    """
    if is_ci() and not may_in_ci:
        pytest.fail(f"did not run, and in CI it must: {reason}")
    pytest.skip(f"did not run: {reason}")
