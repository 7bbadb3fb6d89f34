"""What dead runs leave is found and goes, and nothing else ever does."""

from collections.abc import Callable
from pathlib import Path

import pytest

from scripts.bake import leftovers
from scripts.bake.cloud import Cloud
from scripts.bake.errors import Interrupted
from scripts.bake.leftovers import find_leftovers, remove, take_back
from scripts.bake.runs import new_run
from scripts.bake.snapshots import Snapshot
from tests.unit.bake.conftest import InProcess
from tests.unit.local_cloud.conftest import PUBLIC_KEY
from tests.unit.local_cloud.conftest import Cloud as LocalCloud

DEAD = "20200101-1200-0a1b2c"
FAR_S = str(2**40)


@pytest.fixture
def dead(local: LocalCloud, make_snapshot: Callable[..., Snapshot]) -> set[str]:
    """One of each that a dead run can leave, with and without labels."""
    labels = {"product": "mini-llm", "run": DEAD}
    local.make_server(f"mini-llm-bake-{DEAD}")
    local.make_server("named-otherwise", labels=labels)
    local.post("/ssh_keys", {"name": "packer-5f", "public_key": PUBLIC_KEY, "labels": labels})
    make_snapshot(run=DEAD, deadline=FAR_S)
    make_snapshot(run="somebody", deadline="1000")
    return {f"mini-llm-bake-{DEAD}", "named-otherwise", "packer-5f"}


def test_all_of_a_dead_run_goes(cloud: Cloud, state: Path, dead: set[str]) -> None:
    """Servers and keys by label or name, snapshots by run or deadline."""
    found = find_leftovers(cloud, state)
    assert {each.name for each in found.servers} | {each.name for each in found.keys} == dead
    assert len(found.snapshots) == 2
    assert len(found.lines()) == len(found) == 5
    assert remove(cloud, found) == []
    assert len(find_leftovers(cloud, state)) == 0
    assert [each.name for each in cloud.servers()] == ["origin"]


def test_nothing_else_is_looked_at(
    cloud: Cloud, local: LocalCloud, state: Path, make_snapshot: Callable[..., Snapshot]
) -> None:
    """A live run's, what was finished, other people's, and names that only look alike."""
    with new_run(state) as run:
        labels = {"product": "mini-llm", "run": run.id}
        local.make_server(run.probe_name, labels=labels)
        local.post("/ssh_keys", {"name": run.key_name, "public_key": PUBLIC_KEY, "labels": labels})
        make_snapshot(run=run.id, deadline=FAR_S)
        make_snapshot(run=DEAD, verified_at="20261126T120000Z")
        make_snapshot(run=DEAD, layer="stack")
        local.make_server("mini-llm-bake-by-hand")
        local.make_server(f"x-mini-llm-bake-{DEAD}")
        local.make_server("other", labels={"product": "other", "run": DEAD})
        assert find_leftovers(cloud, state).lines() == []


def test_what_a_bake_goes_on_from_is_spared(cloud: Cloud, state: Path, make_snapshot: Callable[..., Snapshot]) -> None:
    """A whole snapshot of the wanted inputs; the sweep of a person takes it."""
    made = make_snapshot(run=DEAD, deadline=FAR_S, input="wanted")
    assert find_leftovers(cloud, state, ["wanted"]).snapshots == []
    assert [each.id for each in find_leftovers(cloud, state).snapshots] == [made.id]


def test_what_was_adopted_after_the_look_stays(
    cloud: Cloud, state: Path, make_snapshot: Callable[..., Snapshot]
) -> None:
    """A sweep looks once more before it deletes a snapshot."""
    adopted, finished = make_snapshot(run=DEAD, deadline="1"), make_snapshot(run=DEAD, deadline="1")
    found = find_leftovers(cloud, state)
    assert len(found.snapshots) == 2
    cloud.relabel(adopted, run="20261126-1200-ffffff")
    cloud.relabel(finished, "deadline", verified_at="20261126T120000Z")
    assert remove(cloud, found) == []
    assert {each.id for each in cloud.snapshots()} == {adopted.id, finished.id}


def test_a_run_takes_back_its_own(cloud: Cloud, local: LocalCloud, state: Path, dead: set[str]) -> None:
    """Not what others left, which may be somebody's business."""
    with new_run(state) as run:
        local.make_server(run.probe_name)
        local.post(
            "/ssh_keys", {"name": "packer-6f", "public_key": PUBLIC_KEY.replace("H1z", "H2z"), "labels": run.labels}
        )
        assert take_back(cloud, run) == []
        assert {each.name for each in cloud.servers()} == {"origin", *dead} - {"packer-5f"}
        assert [each.name for each in cloud.ssh_keys()] == ["packer-5f"]


def test_a_server_that_was_asked_for_is_waited_for(
    cloud: Cloud, local: LocalCloud, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C leaves the call, not what it asks for; and where none was asked for nobody waits."""
    with new_run(state) as run:
        slept: list[float] = []

        def sleep(seconds: float) -> None:
            slept.append(seconds)
            if len(slept) == 2:
                local.make_server(run.probe_name)

        monkeypatch.setattr(leftovers.time, "sleep", sleep)
        assert take_back(cloud, run) == []
        assert slept == []
        cloud.unanswered = True
        assert take_back(cloud, run) == []
        assert slept[:2] == [1.0, 1.0]
        assert run.probe_name not in {each.name for each in cloud.servers()}


def test_what_cannot_be_removed_is_told(
    cloud: Cloud, local: LocalCloud, state: Path, dead: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And does not keep the rest from going."""
    number = next(each.id for each in cloud.servers() if each.name == "named-otherwise")
    local.post(f"/servers/{number}/actions/change_protection", {"delete": True, "rebuild": True})
    problems = remove(cloud, find_leftovers(cloud, state))
    assert len(problems) == 1
    assert "protected" in problems[0]
    assert leftovers.describe(problems).startswith("not removed, bake.py sweep will: ")
    assert [each.name for each in cloud.servers()] == ["origin", "named-otherwise"]


def test_ctrl_c_while_something_is_removed_ends_it(cloud: Cloud, state: Path, way: InProcess, dead: set[str]) -> None:
    """It is no deletion that has failed: the rest stays, and no bake goes on to label and promote."""
    found = find_leftovers(cloud, state)

    def interrupt(request: object) -> None:
        raise Interrupted("interrupted by SIGINT")

    way.faults = [interrupt]
    with pytest.raises(Interrupted):
        remove(cloud, found)
    way.faults = [interrupt]
    with new_run(state) as run, pytest.raises(Interrupted):
        take_back(cloud, run)
    assert len(find_leftovers(cloud, state)) == 5
