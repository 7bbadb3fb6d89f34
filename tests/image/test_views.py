"""Status and cost of a real node: over the cloud's API, and over HTTPS by its name at its own address."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hcloud.images import Image
from hcloud.server_types import ServerType

from tests.image.harness import DOMAIN, ROOT, Node
from tests.image.launch import deployment
from tests.local_cloud.harness import LocalCloud

OWN = {"product": "mini-llm", "deployment": "views"}
_SCRAPED_TWICE_S = 90.0  # what increases shows from the second scrape on


def show(
    cloud: LocalCloud, script: str, *words: str, password: str = "", folder: Path | None = None
) -> tuple[int, str]:
    """Exit code of a command, and what it printed; whatever it complains of fails the test."""
    command = [sys.executable, str(ROOT / "scripts" / script), "--deployment", "views", *words]
    if folder is not None:
        command += ["--folder", str(folder)]
    own = {"MONITORING_PASSWORD": password} if password else {}
    done = subprocess.run(
        command, env={**cloud.environment, **own}, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL
    )
    assert done.stderr == ""
    return done.returncode, done.stdout


@pytest.fixture(scope="module")
def asked(cloud: LocalCloud, served: Node) -> tuple[str, ...]:
    """The node as one of a deployment, and the options that it is asked with."""
    served.server.update(labels=OWN)
    return ("--domain", DOMAIN, "--authority", str(served.authority), "--monitoring-user", "operator")


def test_status_of_a_node(cloud: LocalCloud, served: Node, asked: tuple[str, ...], tmp_path: Path) -> None:
    """Ready, its report, its certificate; a server beside it that is off is a line, and not well."""

    def look(*words: str, password: str = served.password) -> tuple[int, dict[str, Any]]:
        code, told = show(cloud, "status.py", *words, "--json", password=password, folder=tmp_path)
        return code, json.loads(told)

    served.ask("/generate", {"prompt": "x", "max_tokens": 1})  # the boot's timeline ends with the first token
    code, told = look(*asked)
    [node] = told["nodes"]
    assert (code, told["well"], node["ready"], node["state"]) == (0, True, True, "running")
    assert node["addresses"][0] == served.address
    assert node["eur_per_hour"] == 0.0088
    assert 28 < node["told"]["certificate_days"] <= 30
    report = node["told"]["report"]
    assert (report["model"], report["version"], report["audit_findings"]) == ("starter", "test-1", 0)
    assert report["failed_units"] == []
    assert 0 < node["told"]["first_answer_s"] < 60
    [used] = [each for each in told["snapshots"] if each["runs_on"]]
    assert used["runs_on"] == [node["name"]]

    code, told = look(*asked, password="wrong")
    assert (code, told["nodes"][0]["ready"]) == (0, True)
    assert told["nodes"][0]["told"]["silence"] == "the monitoring does not take operator's password"

    code, told = look(*asked[:2])  # an authority that nobody knows
    assert (code, told["nodes"][0]["ready"]) == (1, False)
    assert "self-signed certificate" in told["nodes"][0]["told"]["problem"]

    made = cloud.client().servers.create(
        "views-off", ServerType(name="cx23"), Image(name="debian-13"), labels=OWN, start_after_create=False
    )
    try:
        made.action.wait_until_finished()
        code, text = show(cloud, "status.py", *asked, password=served.password, folder=tmp_path)
        assert code == 1
        assert "it is off" in text
        assert "30 days left" in text or "29 days left" in text
    finally:
        made.server.delete().wait_until_finished()


def test_status_of_a_node_that_does_not_answer(cloud: LocalCloud, served: Node, asked: tuple[str, ...]) -> None:
    """One line says so, within seconds."""
    served.run("systemctl stop docker.socket docker")
    try:
        begin_s = time.monotonic()
        code, text = show(cloud, "status.py", *asked, password=served.password)
        assert code == 1
        assert f"{served.address} does not answer over HTTPS" in text
        assert time.monotonic() - begin_s < 30
    finally:
        served.run("systemctl start docker mini-llm-stack mini-llm-monitoring")
        served.wait_ready()


def test_cost_of_a_node(cloud: LocalCloud, served: Node, asked: tuple[str, ...]) -> None:
    """By what Prometheus has counted, once it has seen it twice."""
    end_s = time.monotonic() + _SCRAPED_TWICE_S
    while True:
        assert served.ask("/generate", {"prompt": "Once upon", "max_tokens": 32})[0] == 200
        code, told = show(cloud, "cost.py", *asked, "--json", password=served.password)
        assert code == 0, told
        found = json.loads(told)
        if found["use"]["generated"] and found["use"]["tokens_per_s"]:
            break
        assert time.monotonic() < end_s, found["use"]
        time.sleep(2)
    rows = {row["what"]: row["price"]["net_eur"] for row in found["rows"]}
    assert (rows["server cx23"], rows["primary ipv4"]) == (5.49, 0.5)
    assert found["total"]["net_eur"] == pytest.approx(sum(row["price"]["net_eur"] for row in found["rows"]))
    speed = found["use"]["tokens_per_s"]
    assert speed > 1
    full_use = found["total"]["net_eur"] / (speed * 3600 * 730) * 1000
    assert found["eur_per_1000_tokens_full_use"] == pytest.approx(full_use)
    assert found["eur_per_1000_tokens_last_day"] > full_use
    assert found["prompt_share_is_measured"]
    text = show(cloud, "cost.py", *asked, password=served.password)[1]
    assert "Groq: Llama 3.1 8B Instant" in text


def test_terraform_tells_what_a_month_costs(cloud: LocalCloud, program: str, tmp_path: Path) -> None:
    """Once the prices were fetched; before that it says nothing."""
    with deployment(tmp_path, cloud, program, Path("/dev/null"), image_id=1, acme={"email": "a@example.org"}) as made:
        code, said = made.run("plan", "-input=false")
        assert code == 0, said
        assert "monthly_cost_eur" not in said
        assert show(cloud, "cost.py", "--terraform", folder=made.folder)[0] == 0
        code, said = made.run("plan", "-input=false")
        assert code == 0, said
        # cx23 5.49, its IPv4 0.50, floating addresses 3.00 and 1.00.
        assert "+ monthly_cost_eur = 9.99" in " ".join(said.split())
