"""The command line: wrong words, refusals and results, each with its exit code."""

import errno
import io
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scripts.bake import command
from scripts.bake.answers import given
from scripts.bake.cloud import Access, Cloud
from scripts.bake.command import main
from scripts.bake.console import Console
from scripts.bake.errors import Exit
from scripts.bake.housekeeping import plan_pruning, prune
from scripts.bake.snapshots import Snapshot, holders
from tests.unit.local_cloud.conftest import Cloud as LocalCloud

Bake = Callable[..., tuple[int, str, str]]
DEAD = "20200101-1200-0a1b2c"
VERIFIED = {"verified_at": "20261126T120000Z"}


@pytest.fixture
def bake(
    cloud: Cloud, state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Bake:
    """Runs a verb against the cloud in process: exit code, standard output, standard error."""
    for name in ("signal",):
        monkeypatch.setattr(command.signal, name, lambda *words: None)
    monkeypatch.setattr(command, "find_access", lambda: Access("http://127.0.0.1:8899/v1", "local"))
    monkeypatch.setattr(command, "Cloud", lambda access: cloud)
    monkeypatch.setenv("MINI_LLM_STATE_DIR", str(state))
    tree = tmp_path / "tree"
    tree.mkdir()

    def run(*words: str) -> tuple[int, str, str]:
        code = main([*words, "--tree", str(tree)])
        told = capsys.readouterr()
        return code, told.out, told.err

    return run


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ([], "VERB"),
        (["bake"], "invalid choice: 'bake'"),
        (["build", "--again", "top"], "invalid choice: 'top'"),
        (["build", "--channel", "verified-at"], "argument --channel: must be 1 to 32 letters"),
        (["build", "--version", "a b"], "argument --version: must be 1 to 63 letters"),
        (["build", "--pins-file", "/none"], "/none is no file"),
        (["build", "--tree", "/none"], "/none is no folder"),
        (["promote"], "ID"),
        (["promote", "x"], "invalid int value: 'x'"),
        (["prune", "--keep", "-1"], "argument --keep: "),
        (["list", "--what"], "unrecognized arguments: --what"),
    ],
)
def test_wrong_words(words: list[str], problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One line of what is wrong, one of where to look."""
    with pytest.raises(SystemExit) as ended:
        main(words)
    told = capsys.readouterr().err
    assert ended.value.code == Exit.USAGE
    assert problem in told
    assert "--help shows what there is" in told


@pytest.mark.parametrize(
    "verb", ["build", "verify", "promote", "rollback", "list", "show", "prune", "sweep", "pins", "cost"]
)
def test_each_verb_has_a_help_with_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    """And tells its exit codes."""
    with pytest.raises(SystemExit) as ended:
        main([verb, "--help"])
    told = capsys.readouterr().out
    assert ended.value.code == 0
    assert f"example: bake.py {verb}" in told
    assert "exit codes:" in told
    assert "--json" in told


def test_a_refusal_is_two_lines_and_a_code(bake: Bake) -> None:
    """For programs it is JSON on standard output as well."""
    code, out, err = bake("promote", "99")
    assert (code, out) == (Exit.REFUSED, "")
    assert err.splitlines() == [
        "error: there is no image 99 of mini-llm in this project",
        "  bake.py list shows them",
    ]
    code, out, _ = bake("rollback", "--json")
    assert json.loads(out)["exit"] == code == Exit.REFUSED


def test_list_and_promote(bake: Bake, make_snapshot: Callable[..., Snapshot]) -> None:
    """Who holds what."""
    assert bake("list")[1] == "there is no snapshot yet\n"
    image, layer = make_snapshot(**VERIFIED), make_snapshot(layer="stack")
    unfinished = make_snapshot(deadline="1", run=DEAD)
    assert bake("promote", str(layer.id))[0] == Exit.REFUSED
    assert bake("promote", str(unfinished.id))[0] == Exit.REFUSED
    assert bake("promote", str(unfinished.id), "--unverified", str(image.id))[0] == Exit.REFUSED
    code, out, _ = bake("promote", str(image.id))
    assert code == Exit.DONE
    assert "terraform -chdir=terraform apply" in out
    told = json.loads(bake("list", "--json")[1])
    assert told["channels"] == {"stable": image.id}
    assert [each["id"] for each in told["images"]] == [image.id, layer.id, unfinished.id]
    shown = bake("list")[1]
    assert "holds stable, verified 2026-11-26 12:00" in shown
    assert f"not finished (available), of run {DEAD}" in shown
    assert bake("show", str(image.id))[0] == Exit.REFUSED


def test_nothing_is_deleted_without_a_yes(
    bake: Bake, cloud: Cloud, local: LocalCloud, make_snapshot: Callable[..., Snapshot]
) -> None:
    """Nobody at the terminal is a no."""
    local.make_server(f"mini-llm-bake-{DEAD}")
    old, new = make_snapshot(**VERIFIED), make_snapshot(**VERIFIED)
    for words in (("sweep",), ("prune", "--keep", "1")):
        code, _, err = bake(*words)
        assert code == Exit.REFUSED
        assert "--yes" in err
    assert len(cloud.servers()) == 2
    code, out, _ = bake("sweep", "--yes", "--json")
    assert (code, json.loads(out)["problems"]) == (Exit.DONE, [])
    assert len(cloud.servers()) == 1
    code, out, _ = bake("prune", "--keep", "1", "--yes", "--json")
    assert json.loads(out)["gone"] == [old.id]
    assert [each.id for each in cloud.snapshots()] == [new.id]
    assert bake("prune")[1].endswith("nothing to prune\n")
    assert bake("sweep")[1] == "nothing was left by dead runs\n"


def test_what_was_promoted_after_prune_has_shown_it_stays(cloud: Cloud, make_snapshot: Callable[..., Snapshot]) -> None:
    """Each one is looked at again right before it goes; a server that was launched meanwhile counts, too."""
    promoted, launched, gone, _ = (make_snapshot(**VERIFIED) for _ in range(4))
    plan = plan_pruning(cloud, 1, ())
    assert [each.id for each in plan.going] == [promoted.id, launched.id, gone.id]
    cloud.relabel(promoted, stable="1")
    server_type = given(cloud.client.server_types.get_by_name("cx23"))
    cloud.client.servers.create("node", server_type, cloud.client.images.get_by_id(launched.id))
    assert [each.id for each in prune(cloud, plan, 1, ())] == [gone.id]
    assert holders(cloud.snapshots(), "stable")[0].id == promoted.id


def test_cost_counts_snapshots_and_the_servers_that_run_them(
    bake: Bake, local: LocalCloud, make_snapshot: Callable[..., Snapshot]
) -> None:
    """By the price list, net."""
    image = make_snapshot(**VERIFIED)
    local.make_server("node", image=str(image.id))
    told = json.loads(bake("cost", "--json")[1])
    rows = {row["what"]: row["eur_per_month"] for row in told["rows"]}
    assert rows["server node (cx23)"] == pytest.approx(5.49)
    assert rows["service snapshot"] == pytest.approx(1.25 * told["price_per_gb_month_eur"], abs=1e-4)
    assert told["eur_per_month"] == pytest.approx(sum(rows.values()), abs=1e-4)


@pytest.mark.parametrize("prices", [[], None])
def test_cost_of_a_server_whose_type_is_not_sold_any_more(
    bake: Bake,
    cloud: Cloud,
    local: LocalCloud,
    make_snapshot: Callable[..., Snapshot],
    monkeypatch: pytest.MonkeyPatch,
    prices: list[Any] | None,
) -> None:
    """It is shown all the same: by what the server itself tells of its type, or as unknown."""
    image = make_snapshot(**VERIFIED)
    local.make_server("node", image=str(image.id))
    servers = cloud.servers()
    if prices is not None:
        for each in servers:
            given(each.server_type).prices = prices
    monkeypatch.setattr(cloud, "servers", lambda: servers)
    monkeypatch.setattr(cloud, "server_types", list)
    shown = bake("cost")[1]
    assert ("unknown  server node (cx23)" if prices == [] else "5.49  server node (cx23)") in shown


def test_pins_of_this_tree(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with what fixes it and where it lives."""
    monkeypatch.setattr(command.signal, "signal", lambda *words: None)
    assert main(["pins", "--json"]) == Exit.DONE
    told = json.loads(capsys.readouterr().out)
    kinds = {pin["kind"] for pin in told["pins"]}
    assert kinds == {"base", "container", "model", "python"}
    assert all(pin["fixed_by"] for pin in told["pins"])


class _Gone(io.StringIO):
    """A terminal or a reader that is no more; a disk without room."""

    def __init__(self, number: int):
        super().__init__()
        self._number = number

    def write(self, text: str) -> int:
        raise OSError(self._number, os.strerror(self._number))


def test_a_reader_that_has_seen_enough_is_no_traceback(bake: Bake, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of ``list | head -1``; a full disk is told."""
    left: list[bool] = []
    monkeypatch.setattr(command, "_leave_stdout", lambda: left.append(True))
    for number, told in ((errno.EPIPE, ""), (errno.ENOSPC, "error: standard output: No space left on device\n")):
        with monkeypatch.context() as patched:
            patched.setattr(sys, "stdout", _Gone(number))
            assert main(["list"]) == Exit.FAILED
        assert bake("list")[2] == told
    assert left == [True, True]


def test_a_terminal_that_is_gone_keeps_nothing_from_ending_well(
    bake: Bake, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a run would not come to taking back what it has made."""
    for stream in (None, _Gone(errno.EIO), _Gone(errno.EPIPE)):
        with monkeypatch.context() as patched:
            patched.setattr(sys, "stderr", stream)
            with Console(state, "test").phase("layer"):
                pass
            assert main(["show", "1", "--json"]) == Exit.REFUSED
    assert bake("list")[1].count("there is no report") == 3  # each of them as JSON, and nothing else


def test_a_full_disk_is_told_in_a_line(bake: Bake, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it is met."""

    def fill() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/var/lib/state")

    monkeypatch.setattr(command, "state_folder", fill)
    code, _, err = bake("cost")
    assert (code, err.splitlines()[0]) == (Exit.FAILED, "error: /var/lib/state: No space left on device")


@pytest.mark.parametrize("ignored", [True, False])
def test_a_hangup_takes_back_what_was_made_unless_it_is_to_be_ignored(
    bake: Bake, monkeypatch: pytest.MonkeyPatch, ignored: bool
) -> None:
    """An SSH connection that broke is as good as Ctrl-C; nohup is there to say otherwise."""
    handled: dict[int, object] = {}
    before = signal.SIG_IGN if ignored else signal.SIG_DFL
    monkeypatch.setattr(command.signal, "signal", handled.__setitem__)
    monkeypatch.setattr(command.signal, "getsignal", lambda number: handled.get(number, before))
    bake("list")
    assert (signal.SIGHUP in handled) is not ignored


def test_an_update_is_none_to_another_model(
    bake: Bake, cloud: Cloud, make_snapshot: Callable[..., Snapshot], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who promotes and names no model gets the one that the channel has; the starter where nobody holds it."""
    asked: list[str] = []

    def build(wishes: Any, *more: object) -> None:
        asked.append(wishes.model)
        raise command.Refused("not in this test")

    monkeypatch.setattr(command, "build", build)
    bake("build", "--promote")
    image = make_snapshot(model="llama-3-8b-instruct", **VERIFIED)
    bake("promote", str(image.id))
    (tmp_path / "own.gguf").touch()
    for words in (["--promote"], [], ["--promote", "--channel", "beta"]):
        bake("build", *words)
    assert asked == ["starter", "llama-3-8b-instruct", "starter", "starter"]
    asked.clear()
    # What is named is not asked for; and a file gets no other model's name.
    monkeypatch.setattr(cloud, "snapshots", lambda: pytest.fail("the cloud was asked"))
    for words in (["--model", "mine"], ["--model-file", str(tmp_path / "own.gguf")]):
        bake("build", "--promote", *words)
    assert asked == ["mine", "starter"]
