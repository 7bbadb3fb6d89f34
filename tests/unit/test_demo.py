"""The demo says in one line why it cannot run, and tells truly what was seen."""

import os
import shutil
import signal
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import cast

import pytest

from scripts.bake.errors import CloudFailed, Refused
from scripts.local_cloud.machine_interface import MachineFailed
from scripts.local_cloud.machines.host import HostUnfit
from tests import demo
from tests.image.bakery import Bakery


def refuse(message: str) -> Callable[[], None]:
    def check() -> None:
        raise HostUnfit(message)

    return check


@pytest.mark.parametrize("name", ["check_host", "check_image_tools", "check_pool_tools"])
def test_a_machine_that_cannot_run_it_is_told_why_and_what_instead(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """Before anything is made."""
    for each in ("check_host", "check_image_tools", "check_pool_tools"):
        monkeypatch.setattr(demo, each, lambda: None)
    monkeypatch.setattr(demo, name, refuse("servers are system containers, which only root can start"))
    monkeypatch.setattr(demo, "clean", lambda: pytest.fail("something was touched"))
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    monkeypatch.setenv("MINI_LLM_DEMO", "")  # main sets it; this takes it back
    assert demo.main() == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first == "error: servers are system containers, which only root can start"
    assert "make serve" in second


def test_a_small_disk_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """With what is needed and what is there."""
    for each in ("check_host", "check_image_tools", "check_pool_tools"):
        monkeypatch.setattr(demo, each, lambda: None)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 2e9})())
    with pytest.raises(demo.CannotRun, match="needs 15 GB of disk, 2 are free"):
        demo.check_machine()


@pytest.mark.parametrize(
    ("wrong", "left", "code"),
    [([], {}, 0), (["9 requests failed in the rollout"], {}, 1), ([], {"links": ["mlc-1"]}, 1)],
)
def test_what_should_not_have_been_fails_the_demo(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    wrong: list[str],
    left: object,
    code: int,
    tmp_path: Path,
) -> None:
    """A failed request, a drift, something left behind; the table is shown all the same."""

    def story(told: demo.Story, ends: ExitStack) -> None:
        told.lines.append(("Roll it out while clients stream", 1.0, "what was seen"))
        told.wrong += wrong

    monkeypatch.setattr(demo, "check_machine", lambda: None)
    monkeypatch.setattr(demo, "clean", lambda: None)
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    monkeypatch.setenv("MINI_LLM_DEMO", "")  # main sets it; this takes it back
    monkeypatch.setattr(demo, "run_story", story)
    monkeypatch.setattr(demo, "traces", lambda state: left)
    monkeypatch.setattr(demo, "_FOLDER", tmp_path / "demo")
    assert demo.main() == code
    said = capsys.readouterr()
    assert "what was seen" in said.out
    assert said.err.count("error: ") == code


def test_a_step_that_fails_is_no_line_of_the_table() -> None:
    """It was not seen."""
    story = demo.Story()
    with pytest.raises(ValueError, match="no"), story.step("one"):
        raise ValueError("no")
    assert story.lines == []


def test_of_an_apply_the_proof_is_shown() -> None:
    """Terraform's own words around it are not."""
    said = "node: Creating...\nx (local-exec): llm.test serves after 2 s: 'a'\nApply complete! Resources: 1 added."
    assert demo.prove_lines(said) == "llm.test serves after 2 s: 'a'\nApply complete! Resources: 1 added."


def test_one_demo_a_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The second one would take what the first has made for something that was left."""
    monkeypatch.setattr(demo, "_FOLDER", tmp_path / "cache" / "demo")
    with demo.locked(), pytest.raises(demo.CannotRun, match="another demo runs"), demo.locked():
        pytest.fail("both ran")
    with demo.locked():
        assert (tmp_path / "cache" / "demo.lock").exists()


def test_what_cannot_be_kept_ends_no_demo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It is told; the next one bakes it again."""

    def full(bakery: object) -> None:
        raise MachineFailed("tar: no space left on device")

    monkeypatch.setattr(demo, "keep_layers", full)
    demo.keep_for_the_next(cast(Bakery, None))
    assert "are not kept for the next demo: tar: no space left" in capsys.readouterr().out


@pytest.mark.parametrize("why", [demo.CannotRun, CloudFailed, Refused, MachineFailed])
def test_what_is_left_is_told_however_it_ended(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    why: Callable[[str], Exception],
) -> None:
    """And the folder stays, by which the next demo finds it."""

    def story(told: demo.Story, ends: ExitStack) -> None:
        raise why("the node does not serve")

    monkeypatch.setattr(demo, "check_machine", lambda: None)
    monkeypatch.setattr(demo, "clean", lambda: None)
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    monkeypatch.setenv("MINI_LLM_DEMO", "")
    monkeypatch.setattr(demo, "run_story", story)
    monkeypatch.setattr(demo, "traces", lambda state: {"namespaces": ["mlc-1"]})
    monkeypatch.setattr(demo, "_FOLDER", tmp_path / "demo")
    assert demo.main() == 1
    said = capsys.readouterr().err
    assert "error: the node does not serve" in said
    assert "left behind, and removed by the next demo: namespaces: mlc-1" in said
    assert (tmp_path / "demo").is_dir()


def test_processes_are_known_by_their_mark(tmp_path: Path) -> None:
    """Neither this one, nor who looks at the demo's files, nor one that has ended, nor another checkout's."""
    environments = {
        "7": f"A=1\0{demo._MARK}\0B=2\0",
        "8": f"PWD={demo._FOLDER}\0",
        "9": f"{demo._MARK}-of-another\0",
        str(os.getpid()): f"{demo._MARK}\0",
    }
    for name, text in environments.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "environ").write_text(text)
    (tmp_path / "10").mkdir()
    assert demo.find_marked(tmp_path) == [7]


def test_what_was_killed_is_ended_kindly_and_then_for_good(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whoever ends at the first word is not killed."""
    left, sent = [7, 8], []

    def kill(process: int, number: int) -> None:
        sent.append((process, signal.Signals(number).name))
        if process == 7 or number == signal.SIGKILL:
            left.remove(process)

    monkeypatch.setattr(demo, "_FOLDER", tmp_path / "demo")
    monkeypatch.setattr(demo, "_END_WITHIN_S", 0.3)
    monkeypatch.setattr(demo, "find_marked", lambda: list(left))
    monkeypatch.setattr(demo, "traces", lambda state: {})
    monkeypatch.setattr(os, "kill", kill)
    demo.clean()
    assert sent == [(7, "SIGTERM"), (8, "SIGTERM"), (8, "SIGKILL")]
    assert left == []
