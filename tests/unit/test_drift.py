"""Drift: what differs is told, what does not is not, and what cannot be looked at is neither."""

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from scripts import drift
from scripts.bake.errors import Refused
from scripts.drift import Drift, Node, compare_image, compare_nodes, compare_prices, main, read_plan, run_terraform
from tests.unit.bake.test_snapshots import make

NODE = Node("n", 7, "cx23", "fsn1", "running")


def line(action: str) -> str:
    change = {"resource": {"addr": "hcloud_server.node"}, "action": action}
    return json.dumps({"type": "planned_change", "change": change})


def test_a_plan_is_read_by_its_changes() -> None:
    """What is only read or stays is no change; other lines are not looked at."""
    lines = ["Warning: x", '{"type": "version"}', line("no-op"), line("read"), line("replace")]
    assert list(read_plan(lines)) == [Drift("plan", "hcloud_server.node: replace")]


def test_the_image_that_runs_is_the_channels() -> None:
    """In Terraform's file as well."""
    snapshots = [make(7, channels={"stable": 1}), make(8)]
    assert list(compare_image(snapshots, "stable", 7, [NODE])) == []
    other = Node("n", 8, "cx23", "fsn1", "running")
    told = list(compare_image(snapshots, "stable", None, [other]))
    assert [each.what for each in told] == ["file", "image"]
    assert told[1].told == "n runs image 8 (v8), stable names 7 (v7)"
    assert [each.told for each in compare_image(snapshots, "beta", 7, [])] == ["nobody holds the channel beta"]


def test_one_node_runs() -> None:
    """None, two, or one that is off."""
    assert list(compare_nodes([NODE])) == []
    assert [each.told for each in compare_nodes([])] == ["there are 0 nodes: none"]
    assert [each.told for each in compare_nodes([NODE, NODE])] == ["there are 2 nodes: n, n"]
    assert [each.told for each in compare_nodes([Node("n", 7, "cx23", "fsn1", "off")])] == ["n is off"]


def test_the_price_is_the_lists() -> None:
    """If somebody told one."""
    prices = {("cx23", "fsn1"): 0.0088}
    assert list(compare_prices(None, [NODE], prices)) == []
    assert list(compare_prices(0.0088, [NODE], prices)) == []
    [told] = compare_prices(0.01, [NODE], prices)
    assert told.told == "price_eur_per_hour is 0.01, cx23 costs 0.0088 at fsn1"


def test_the_file_is_that_of_the_folder_that_was_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the folder is called."""
    (tmp_path / "image.auto.tfvars.json").write_text(json.dumps({"image_id": 7}))
    asked = SimpleNamespace(folder=tmp_path, program="terraform", channel="stable", deployment="mini-llm", price=None)
    cloud: Any = SimpleNamespace(snapshots=lambda: [make(7, channels={"stable": 1})])
    monkeypatch.setattr(drift, "list_nodes", lambda cloud, deployment: [NODE])
    monkeypatch.setattr(drift, "list_prices", lambda cloud: {})
    assert drift.look(asked, cloud, lambda *words: []) == []  # type: ignore[arg-type]  # only these are looked at


@pytest.mark.parametrize(
    ("code", "out", "err", "reason"),
    [
        (1, json.dumps({"@level": "error", "@message": "Error: no provider", "type": "diagnostic"}), "", "no provider"),
        (1, "", "Error: not here\n", "Error: not here"),
        (1, "", "", "it does not say why"),
    ],
)
def test_a_plan_that_fails_is_no_plan_without_changes(
    code: int, out: str, err: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is told with Terraform's own words."""
    done: Any = subprocess.CompletedProcess([], code, out, err)
    monkeypatch.setenv("HCLOUD_TOKEN", "local")
    monkeypatch.setattr(drift.subprocess, "run", lambda *words, **more: done)
    with pytest.raises(Refused, match=f"terraform plan failed: .*{reason}"):
        run_terraform("terraform", Path("/x"), "plan")


def test_terraform_gets_the_token_of_the_context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It knows none of the hcloud command's; and its hint is `init` where that is what is missing."""
    context = 'active_context = "a"\n[[contexts]]\nname = "a"\ntoken = "kept"\nendpoint = "http://127.0.0.1:1/v1/"\n'
    (tmp_path / "cli.toml").write_text(context)
    monkeypatch.delenv("HCLOUD_TOKEN", raising=False)
    monkeypatch.delenv("HCLOUD_ENDPOINT", raising=False)
    monkeypatch.setenv("HCLOUD_CONFIG", str(tmp_path / "cli.toml"))
    told = []

    def run(command: list[str], **more: Any) -> Any:
        told.append((more["env"]["HCLOUD_TOKEN"], more["env"]["HCLOUD_ENDPOINT"]))
        return subprocess.CompletedProcess(
            [], 1, "", 'Error: run "terraform init"' if len(told) == 1 else "Error: no definition"
        )

    monkeypatch.setattr(drift.subprocess, "run", run)
    for hint in ("terraform -chdir=/x init", "terraform -chdir=/x plan tells all of it"):
        with pytest.raises(Refused) as refused:
            run_terraform("terraform", Path("/x"), "plan")
        assert refused.value.hint == hint
    assert told == [("kept", "http://127.0.0.1:1/v1")] * 2


def test_what_cannot_be_looked_at_has_a_code_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cron must not take blindness for rest."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("HCLOUD_TOKEN", raising=False)
    assert main(["--folder", str(tmp_path)]) == 3
    assert "there is no token" in capsys.readouterr().err
    for words in (["--folder", "/none"], ["--channel", "verified-at"]):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 2
