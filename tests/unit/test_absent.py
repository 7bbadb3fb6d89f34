"""A test that lacks something is skipped by a person's run and fails in CI, but for what CI cannot have."""

import pytest

from tests.absent import did_not_run


@pytest.mark.parametrize(
    ("ci", "may", "ends"),
    [
        ("", False, pytest.skip.Exception),
        ("false", False, pytest.skip.Exception),
        ("true", False, pytest.fail.Exception),
        ("true", True, pytest.skip.Exception),
    ],
)
def test_what_becomes_of_it(monkeypatch: pytest.MonkeyPatch, ci: str, may: bool, ends: type[BaseException]) -> None:
    """With the reason in both cases."""
    monkeypatch.setenv("CI", ci)
    with pytest.raises(ends, match=r"did not run.*curl is not installed"):
        did_not_run("curl is not installed", may_in_ci=may)
