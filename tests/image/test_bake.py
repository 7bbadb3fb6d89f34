"""bake.py on the whole image over the local cloud: from nothing to promoted, again, changed, hurt on the way, bad.

The model is one of the catalogue, as the README bakes it, which a server fetches. On a model hub it is 4.66 GB: the
small file at a hub of ours that stands for it has another address, size and MD5, and no more.
"""

import json
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from hashlib import md5, sha256
from pathlib import Path
from typing import Any

import pytest

from scripts.bake.answers import given
from scripts.local_cloud.machines.network import tag_of, transfer_addresses
from tests.absent import did_not_run
from tests.commands import find_command
from tests.image.bakery import LONG_TOKEN, Bakery, git, running_bakery
from tests.image.harness import disk_of
from tests.image.registry import make_certificate
from tests.model_hub import point_entry, running_hub
from tests.programs import ProgramMissing
from tests.service.harness import write_small_model
from tests.typed import type_command

MODEL = "llama-3-8b-instruct"
_BAKE_S = 600.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that stands for the catalogue's."""
    return write_small_model(tmp_path_factory.mktemp("hub"))


@pytest.fixture(scope="module")
def bakery(host: None, tools: None, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bakery]:
    """A cloud of its own, and a copy of this tree, whose catalogue names a hub that the cloud's servers reach."""
    folder = tmp_path_factory.mktemp("bakery")
    try:
        with running_bakery(folder) as made:
            address, _ = transfer_addresses(tag_of(made.cloud.state))
            certificate, key = make_certificate(folder, f"IP:{address}")
            with made.authorities.open("a") as authorities:
                authorities.write(certificate.read_text())
            with running_hub(model.parent, address, certificate, key) as hub:
                catalogue = made.tree / "service" / "models.json"
                entries = json.loads(catalogue.read_text())
                point_entry(entries, MODEL, f"{hub}/{model.name}", model.read_bytes())
                catalogue.write_text(json.dumps(entries))
                git(made.tree, "commit", "-qam", "a small file stands for the model")
                yield replace(made, more=["--model", MODEL, *made.more])
    except ProgramMissing as error:
        did_not_run(error)


@pytest.fixture(scope="module")
def first(bakery: Bakery) -> dict[str, Any]:
    """What the first bake told: three runs of Packer, a probe, verified and promoted."""
    process = bakery.start("build", "--promote", "--json")
    seen: set[str] = set()
    looked_at: set[str] = set()
    while process.poll() is None:
        seen |= _who_holds(LONG_TOKEN, process.pid, looked_at)
        time.sleep(0.3)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert seen == set()
    assert {"packer", "packer-plugin-h"} <= looked_at  # the kernel cuts names at 15 characters
    return {**json.loads(out), "lines": err}


def _who_holds(secret: str, bake: int, looked_at: set[str]) -> set[str]:
    """Processes below the bake that have the secret in words or environment; the bake itself has it in the latter.

    ``looked_at`` gets the names of all that were asked.
    """
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # it ended meanwhile
    found = set()
    for process in parents:
        line = [process]
        while line[-1] in parents:
            line.append(parents[line[-1]])
        for name in ("cmdline", "environ") if bake in line else ():
            try:
                holds = secret.encode() in Path(f"/proc/{process}/{name}").read_bytes()
                called = Path(f"/proc/{process}/comm").read_text().strip()
                looked_at.add(called)
                if holds and (name, process) != ("environ", bake):
                    found.add(f"{name} of {called}")
            except OSError:
                continue
    return found


def test_from_nothing_to_promoted(bakery: Bakery, first: dict[str, Any], model: Path) -> None:
    """Layers, probe, label, channel, Terraform's file; what was there meanwhile is gone."""
    image = first["image"]
    assert not first["reused"]
    assert image["channels"] == {"stable": 1}
    assert image["verified_at"] is not None
    told = json.loads((bakery.tree / "terraform/image.auto.tfvars.json").read_text())
    assert told == {"image_id": image["id"], "image_version": image["version"]}
    told = bakery.tell("list")
    assert [each["layer"] for each in told["images"]] == ["model", "stack", "service"]
    assert image["parent"] == str(told["images"][1]["id"])
    labels = given(bakery.cloud.client().images.get_by_id(image["id"]).labels)
    assert labels["model-digest"] == f"md5-{md5(model.read_bytes(), usedforsecurity=False).hexdigest()}"
    assert (
        image["commit"] == subprocess.check_output(["git", "-C", bakery.tree, "rev-parse", "HEAD"], text=True).strip()
    )
    assert bakery.leftovers() == []
    for phase in ("preflight", "layer model", "layers base to stack", "layer service", "probe", "checks", "label"):
        assert f"phase {phase} done in " in first["lines"]


def test_its_report(bakery: Bakery, first: dict[str, Any], model: Path) -> None:
    """Thirteen checks, the boot, what it is made of: Debian, Python, containers, the model by its SHA-256."""
    report = bakery.tell("show", str(first["image"]["id"]))
    assert [each for each in report["checks"] if each["problem"]] == []
    assert len(report["checks"]) == 13
    assert report["boot"]["model_s"] < report["boot"]["first_token_s"]
    assert report["sizes_bytes"]["model"] >= model.stat().st_size
    parts = report["sbom"]["components"]
    urls = [each.get("purl", each["name"]) for each in parts]
    for start in ("pkg:deb/debian/docker.io@", "pkg:pypi/gpt4all@", "pkg:oci/traefik@sha256"):
        assert any(each.startswith(start) for each in urls), start
    [found] = [each["hashes"] for each in parts if each["name"] == MODEL]
    assert found == [{"alg": "SHA-256", "content": sha256(model.read_bytes()).hexdigest()}]


def test_no_secret_stays(bakery: Bakery, first: dict[str, Any]) -> None:
    """Neither the token nor a key, in log, report, or what else lies in the state folder."""
    files = [path for path in bakery.state.rglob("*") if path.is_file()]
    assert {"bake.log", "packer.out", f"{first['image']['id']}.json"} <= {path.name for path in files}
    for path in files:
        if path.name != "lock":
            content = path.read_bytes()
            assert LONG_TOKEN.encode() not in content, path
            assert b"PRIVATE KEY" not in content, path
            assert b"mllm_" not in content, path


def test_nothing_has_changed(bakery: Bakery, first: dict[str, Any]) -> None:
    """No server, no Packer; the same image. By the README's own command."""
    calls = bakery.cloud.state / "calls.jsonl"
    before = len(calls.read_text().splitlines()) if calls.exists() else 0
    command = find_command("make bake BAKE=").removesuffix('"')
    options = " ".join(["--tree", str(bakery.tree), *bakery.more[2:], "--json"])
    said = type_command(f'{command} {options}"', _BAKE_S, environment=bakery.environment)
    told = json.loads(said[said.index("{") :])
    assert told["reused"]
    assert told["image"]["id"] == first["image"]["id"]
    assert told["times_s"] == {}
    if calls.exists():
        made = [json.loads(line) for line in calls.read_text().splitlines()[before:]]
        assert [each for each in made if each["method"] != "GET"] == []


def test_a_change_of_the_service_on_a_bad_day(bakery: Bakery, first: dict[str, Any]) -> None:
    """One layer, although calls fail on the way, and the answers of those that make something are lost."""
    bakery.change("service/stops.py", "# another\n")
    bakery.lay_faults(
        {"path": "/v1/servers", "method": "POST", "kind": "error", "status": 503, "call": 1},
        {"path": "/v1/servers", "method": "POST", "kind": "lost_answer", "call": 2},
        {"path": "/v1/servers/*/actions/create_image", "method": "POST", "kind": "lost_answer", "call": 1},
        {"path": "/v1/actions/*", "method": "GET", "kind": "error", "status": 429, "call": 2},
        {"path": "/v1/images/*", "method": "PUT", "kind": "error", "status": 423, "call": 1},
    )
    told = bakery.tell("build")
    bakery.lay_faults()
    assert not told["reused"]
    assert [phase for phase in told["times_s"] if phase.startswith("layer")] == ["layer service"]
    assert bakery.leftovers() == []
    images = [each for each in bakery.tell("list")["images"] if each["input"] == told["image"]["input"]]
    assert len(images) == 1
    changes = bakery.tell("show", str(told["image"]["id"]), "--diff", str(first["image"]["id"]))["changes"]
    assert any(line.startswith("commit: ") for line in changes)
    bakery.tell("promote", str(told["image"]["id"]))
    assert bakery.tell("list")["channels"] == {"stable": told["image"]["id"]}
    bakery.tell("rollback")
    assert bakery.tell("list")["channels"] == {"stable": first["image"]["id"]}


def test_killed_in_the_checks(bakery: Bakery, first: dict[str, Any]) -> None:
    """The next build goes on from the candidate: no Packer, one image, and nothing of the dead run stays."""
    bakery.change("service/stops.py", "# and another\n")
    process = bakery.start("build")
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("phase checks"):
            process.send_signal(signal.SIGKILL)
            break
    process.communicate()
    assert len(bakery.leftovers()) == 3  # the probe, its key, the candidate
    told = bakery.tell("build")
    assert not any(phase.startswith("layer") for phase in told["times_s"])
    assert told["image"]["verified_at"] is not None
    assert bakery.leftovers() == []


def test_a_bake_that_is_interrupted_leaves_nothing(bakery: Bakery, first: dict[str, Any]) -> None:
    """While Packer works, as when the tests are interrupted: the bakery ends it before its cloud goes."""
    bakery.change("service/stops.py", "# and a line for nobody\n")
    process = bakery.start("build")
    assert process.stderr is not None
    assert any(line.startswith("phase layer service") for line in process.stderr)
    bakery.stop()
    assert process.returncode == 130
    assert bakery.leftovers() == []


def test_the_cloud_says_no_to_the_probe(bakery: Bakery, first: dict[str, Any]) -> None:
    """A clear line with what support asks for, and nothing is left once it is swept."""
    bakery.change("service/stops.py", "# and one more\n")
    bakery.lay_faults({"path": "/v1/servers", "method": "POST", "kind": "error", "status": 403, "call": 2})
    code, _, err = bakery.run("build")
    bakery.lay_faults()
    assert code == 4
    assert "resource_limit_exceeded, correlation id " in err
    assert "the full log: " in err
    bakery.tell("sweep", "--yes")
    assert bakery.leftovers() == []


def test_an_image_with_an_open_door_and_a_key_inside_is_never_verified(bakery: Bakery, first: dict[str, Any]) -> None:
    """Seen from outside by the scan, from inside by the audit; it is gone afterwards, and its report tells why."""
    rules = bakery.tree / "image/rootfs/etc/nftables.conf"
    assert "{ 22, 80, 443 }" in rules.read_text()
    rules.write_text(rules.read_text().replace("{ 22, 80, 443 }", "{ 22, 80, 443, 8099 }"))
    unit = bakery.tree / "image/rootfs/etc/systemd/system/mini-llm-report.socket"
    unit.write_text(unit.read_text().replace("[Socket]\n", "[Socket]\nListenStream=8099\n"))
    (bakery.tree / "image/rootfs/root/.aws").mkdir(parents=True)
    (bakery.tree / "image/rootfs/root/.aws/credentials").write_text("aws_access_key_id = x\n")
    git(bakery.tree, "add", "-A")
    git(bakery.tree, "commit", "-qm", "bad")
    before = {each["id"] for each in bakery.tell("list")["images"]}
    code, _, err = bakery.run("build", "--promote")
    assert code == 1
    assert "ports: open to everybody: 8099" in err
    assert "audit: /root/.aws: settings of who baked" in err
    told = bakery.tell("list")
    assert {each["id"] for each in told["images"]} == before
    assert told["channels"] == {"stable": first["image"]["id"]}
    assert bakery.leftovers() == []


def test_packer_alone(bakery: Bakery, model: Path) -> None:
    """The README's command without bake.py, of the layers the model's: a snapshot with the file, and what it is."""
    command = find_command("packer build ").removesuffix(" image")
    options = f"-var last_layer=model -var extra_ca_file={bakery.authorities}"
    type_command(f"{command} {options} image", _BAKE_S, cwd=bakery.tree, environment=bakery.environment)
    [made] = bakery.cloud.client().images.get_all(type=["snapshot"], label_selector="layer=model,version=1")
    placed = json.loads((disk_of(bakery.cloud, made) / "opt/mini-llm/models/model.json").read_text())
    assert (placed["name"], placed["sha256"]) == (MODEL, sha256(model.read_bytes()).hexdigest())
