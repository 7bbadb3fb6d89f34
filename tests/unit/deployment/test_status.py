"""Status: everything of a deployment is shown and nothing of another, and what fails is a line."""

import json
from pathlib import Path
from typing import Any

import pytest

from scripts import status
from scripts.bake.cloud import Cloud
from scripts.bake.snapshots import Snapshot
from scripts.deployment import find_domain
from scripts.node import Certificate, NotTold, Way
from scripts.status import Report, Told, ask, lines, look, main, read_report
from tests.local_cloud.harness import address_of
from tests.unit.local_cloud.conftest import Cloud as LocalCloud

WAY = Way("llm.example.org", user="operator", password="p")
REPORT = {
    "image": {"version": "1.2", "model": {"name": "starter"}},
    "audit": {"findings": []},
    "boot": {"facts_s": 0.5},
    "failed_units": ["x.service"],
}


def options(folder: Path, *words: str) -> Any:
    return status._parse(["--folder", str(folder), *words])


def test_a_deployment_in_one_view(cloud: Cloud, two_nodes: Snapshot, tmp_path: Path) -> None:
    """A node that does not answer is a line, and keeps nothing else out."""
    silent = "192.0.2.9 does not answer over HTTPS (TimeoutError)"
    told = {0: Told(None, 80.2, 1.75, read_report(REPORT)), 1: Told(silent)}
    asked: list[str] = []

    def asking(address: str, way: Way) -> Told:
        asked.append(address)
        return told[address != address_of(seen[0])]

    seen = sorted(cloud.servers(), key=lambda each: str(each.name))[:2]
    found = look(options(tmp_path, "--domain", "llm.example.org"), cloud, asking)
    assert sorted(asked) == sorted(address_of(each) for each in seen)
    first, second = found.nodes
    assert (first.name, first.image, first.version, first.server_type) == ("mini-llm-a", two_nodes.id, "1.2", "cx23")
    assert (first.location, first.state, first.eur_per_hour) == ("fsn1", "running", 0.0088)
    assert first.floating == [each["address"] for each in found.addresses]
    assert second.floating == []
    assert (first.ready, second.ready, found.well) == (True, False, False)
    assert found.addresses[0]["protected"]
    assert found.addresses[0]["leads_to"] == "mini-llm-a"
    [used] = found.snapshots
    assert (used["id"], used["runs_on"], used["holds"]) == (two_nodes.id, ["mini-llm-a", "mini-llm-b"], ["stable"])
    text = "\n".join(lines(found))
    assert "other" not in text
    assert silent in text
    assert "80 days left" in text
    for cell in ("starter", "clean", "1.8 s", "x.service"):
        assert cell in text


def test_who_is_not_asked(cloud: Cloud, local: LocalCloud, two_nodes: Snapshot, tmp_path: Path) -> None:
    """A server that is off, and all of them where nobody knows the domain."""
    number = next(each.id for each in cloud.servers() if each.name == "mini-llm-b")
    local.succeed(f"/servers/{number}/actions/poweroff")
    found = look(options(tmp_path), cloud)
    assert [each.told for each in found.nodes] == [None, Told("it is off")]
    assert not found.well
    assert "name it with --domain" in lines(found)[-1]


def test_without_a_node(cloud: Cloud, tmp_path: Path) -> None:
    """It is said, and is not well."""
    found = look(options(tmp_path, "--deployment", "none"), cloud)
    assert lines(found) == ["there is no node of none"]
    assert not found.well


@pytest.mark.parametrize(
    ("report", "shown"),
    [
        (REPORT, Report("starter", "1.2", 0, ["x.service"])),
        ({"failed_units": []}, Report(None, None, None, [])),
        ({"image": None, "audit": {}, "failed_units": []}, Report(None, None, None, [])),
    ],
)
def test_a_report_may_have_gaps(report: dict[str, Any], shown: Report) -> None:
    """What a node could not tell is not shown."""
    assert read_report(report) == shown


def test_what_a_node_says_is_one_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever goes wrong: silence, no certificate that anybody would take, a report that is none."""
    good = Certificate(80.24, None)
    monkeypatch.setattr(status, "read_certificate", lambda address, way: good)
    monkeypatch.setattr(status, "why_not_ready", lambda address, way: None)
    monkeypatch.setattr(status, "see", lambda address, way, path: REPORT)
    for token_s, first_s in ((1.75, 1.75), (None, 1.5)):
        boot = {"model_s": 1.5, "first_token_s": token_s}
        monkeypatch.setattr(status, "read_boot", lambda address, way, boot=boot: boot)
        assert ask("192.0.2.1", Way("llm.example.org")) == Told(None, 80.2, first_s)
        assert ask("192.0.2.1", WAY) == Told(None, 80.2, first_s, read_report(REPORT))
    monkeypatch.setattr(status, "see", lambda address, way, path: {"image": "?", "failed_units": []})
    assert ask("192.0.2.1", WAY).silence
    monkeypatch.setattr(status, "read_certificate", lambda address, way: Certificate(3, "self-signed certificate"))
    told = ask("192.0.2.1", Way("llm.example.org"))
    assert told.problem == "its certificate is not valid for llm.example.org: self-signed certificate"

    def silent(address: str, way: Way) -> Certificate:
        raise NotTold("192.0.2.1 does not answer over HTTPS (TimeoutError)")

    monkeypatch.setattr(status, "read_certificate", silent)
    assert ask("192.0.2.1", WAY) == Told("192.0.2.1 does not answer over HTTPS (TimeoutError)")


def test_the_domain_is_terraforms(tmp_path: Path) -> None:
    """From the file that Terraform would take it from last."""
    assert find_domain(tmp_path) is None
    (tmp_path / "terraform.tfvars").write_text('# domain = "no.example.org"\n  domain = "a.example.org"\n')
    assert find_domain(tmp_path) == "a.example.org"
    (tmp_path / "b.auto.tfvars.json").write_text(json.dumps({"domain": "b.example.org"}))
    (tmp_path / "c.auto.tfvars.json").write_text(json.dumps({"image_id": 1}))
    assert find_domain(tmp_path) == "b.example.org"


def test_exit_codes(
    cloud: Cloud,
    two_nodes: Snapshot,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Ready, not ready, wrong usage, nothing seen."""
    words = ["--folder", str(tmp_path), "--domain", "llm.example.org", "--json"]
    monkeypatch.setattr(status, "find_access", lambda: None)
    monkeypatch.setattr(status, "Cloud", lambda access: cloud)
    real = status.look
    monkeypatch.setattr(status, "look", lambda options, cloud: real(options, cloud, lambda address, way: Told(None, 9)))
    assert main(words) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["well"]
    assert [each["ready"] for each in told["nodes"]] == [True, True]
    monkeypatch.setattr(status, "look", lambda options, cloud: real(options, cloud, lambda address, way: Told("no")))
    assert main(words) == 1
    for wrong in (["--folder", "/none"], ["--authority", "/none"]):
        with pytest.raises(SystemExit) as ended:
            main(wrong)
        assert ended.value.code == 2
    monkeypatch.undo()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("HCLOUD_TOKEN", raising=False)
    assert main(["--folder", str(tmp_path)]) == 3
    assert "there is no token" in capsys.readouterr().err
