"""Which runs are over: the one question on which the removal of other people's things hangs."""

import fcntl
import os
from pathlib import Path

import pytest

from scripts.bake.runs import LONGEST_RUN_S, is_over, new_run, run_of_server

NAME = "20261126-1200-0a1b2c"
BEGUN_S = 1795694400.0  # 2026-11-26 12:00 UTC


def test_a_run_is_alive_until_it_ends(state: Path) -> None:
    """By its lock alone, whatever the clock says."""
    with new_run(state) as run:
        assert not is_over(state, run.id, now_s=run.deadline_s + 1e9)
        assert run.labels == {"product": "mini-llm", "run": run.id, "deadline": str(run.deadline_s)}
    assert is_over(state, run.id)


def test_another_machines_run_is_over_by_its_deadline(state: Path) -> None:
    """Nothing of it lies here, so only the date in its name tells."""
    assert not is_over(state, NAME, now_s=BEGUN_S + LONGEST_RUN_S)
    assert is_over(state, NAME, now_s=BEGUN_S + LONGEST_RUN_S + 1)


@pytest.mark.parametrize("name", ["", "by-hand", "20261126-1200", "20269999-1200-0a1b2c", f"{NAME}x", f"x{NAME}"])
def test_what_is_no_name_of_a_run_is_never_over(state: Path, name: str) -> None:
    """Nobody's things are taken for a dead run's."""
    assert not is_over(state, name, now_s=1e12)


def test_servers_by_their_names(state: Path) -> None:
    """Only in the exact form."""
    assert run_of_server(f"mini-llm-bake-{NAME}") == NAME
    assert run_of_server(f"mini-llm-probe-{NAME}") == NAME
    for name in (
        "mini-llm-bake-by-hand",
        f"my-mini-llm-bake-{NAME}",
        f"mini-llm-bake-{NAME}-2",
        f"mini-llm-node-{NAME}",
    ):
        assert run_of_server(name) is None


def test_a_lock_of_another_process_counts(state: Path) -> None:
    """As that of a bake beside this one."""
    (state / "runs" / NAME).mkdir()
    lock = os.open(state / "runs" / NAME / "lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)
    assert not is_over(state, NAME, now_s=1e12)
    os.close(lock)
    assert is_over(state, NAME, now_s=BEGUN_S)
