"""The fault plans' command lines."""

from collections.abc import Callable

import pytest

from tests.bake import fault_plan, launch_fault_plan


@pytest.mark.parametrize("main", [fault_plan.main, launch_fault_plan.main])
def test_a_wrong_pattern_is_told(main: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything is started, and without a traceback."""
    with pytest.raises(SystemExit) as ended:
        main(["--only", "["])
    assert ended.value.code == 2
    assert "'[' is no regular expression: unterminated character set" in capsys.readouterr().err
