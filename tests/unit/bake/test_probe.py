"""What a probe is told is what a node takes, and the checks see what is wrong."""

import asyncio
import hashlib
import json
import ssl
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, cast

import bcrypt
import jsonschema
import pytest
import requests
import yaml

from scripts.bake import checks
from scripts.bake.checks import prove
from scripts.bake.inputs import Model
from scripts.bake.probe import DOMAIN, MONITORING, Probe, ProbeFacts, make_facts, make_public_key

ROOT = Path(__file__).resolve().parents[3]
STARTER = Model("starter", "", 3_000_000, 2)
GOLDEN = json.loads((ROOT / "service/starter/starter.json").read_text())["golden"]


@pytest.fixture
def facts(tmp_path: Path) -> ProbeFacts:
    return make_facts(tmp_path)


def test_the_facts_are_right(facts: ProbeFacts, tmp_path: Path) -> None:
    """By the schema that the node checks them with; each secret is there as its hash alone."""
    assert facts.user_data.startswith("#cloud-config\n")
    assert len(facts.user_data.encode()) < 32 << 10
    [file] = yaml.safe_load(facts.user_data)["write_files"]
    assert (file["path"], file["permissions"]) == ("/etc/mini-llm/facts.yaml", "0600")
    told = yaml.safe_load(file["content"])
    jsonschema.validate(told, json.loads((ROOT / "cloud-init/facts.schema.json").read_text()))
    assert told["api_keys"][0]["sha256"] == hashlib.sha256(facts.api_key.encode()).hexdigest()
    assert bcrypt.checkpw(facts.password.encode(), told["monitoring"]["password_hash"].encode())
    for secret in (facts.api_key, facts.password):
        assert secret not in facts.user_data
    chain, key = tmp_path / "chain", tmp_path / "key"
    chain.write_text(told["certificate"]["chain"])
    key.write_text(told["certificate"]["key"])
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(chain, key)
    names = ssl._ssl._test_decode_cert(str(chain))["subjectAltName"]  # type: ignore[attr-defined]  # Python's own
    assert {name for _, name in names} == {DOMAIN, MONITORING}


def test_each_probe_has_secrets_of_its_own(facts: ProbeFacts, tmp_path: Path) -> None:
    """Nothing of one opens another."""
    other = make_facts(tmp_path)
    assert other.api_key != facts.api_key
    assert other.password != facts.password
    assert make_public_key().startswith("ssh-ed25519 AAAA")
    assert make_public_key() != make_public_key()


class FakeProbe:
    """A node that is all right, unless told otherwise: answers by path, each to be replaced."""

    address = "192.0.2.1"

    def __init__(self) -> None:
        self.ready: str | None = None
        self.version: Any = {"image": {"version": "v1"}, "boot": {"model_s": 2.0}}
        self.response = GOLDEN["response"]
        self.events = [{"response": "a"}, {"done": True}]
        self.status_of_strangers, self.metrics_status, self.plain = 401, 404, (301, f"https://{DOMAIN}/generate")
        self.targets = [{"labels": {"job": "service"}, "health": "up"}]
        self.counted: list[Any] = [{}]
        self.alerts: list[Any] = []
        self.node: Any = {"audit": {"findings": []}, "failed_units": []}

    def as_probe(self) -> Probe:
        """It, in the place of a real one."""
        return cast(Probe, self)

    def wait_ready(self, patience_s: float) -> str | None:
        return self.ready

    def ask(self, path: str, key: str | None = "", **more: Any) -> requests.Response:
        if path == "/version":
            return _answer(200, self.version)
        if path == "/metrics":
            return _answer(self.metrics_status, {})
        if key != "":
            return _answer(self.status_of_strangers, {})
        if more["json"].get("stream"):
            return _answer(200, "".join(f"data: {json.dumps(each)}\n\n" for each in self.events))
        return _answer(200, {"response": self.response})

    def ask_plain(self, path: str) -> requests.Response:
        answer = _answer(self.plain[0], {})
        answer.headers["Location"] = self.plain[1]
        return answer

    def see(self, path: str, **parameters: str) -> Any:
        return {
            "/prometheus/api/v1/targets": {"data": {"activeTargets": self.targets}},
            "/prometheus/api/v1/query": {"data": {"result": self.counted}},
            "/prometheus/api/v1/alerts": {"data": {"alerts": self.alerts}},
            "/alertmanager/api/v2/alerts": [],
            "/node": self.node,
        }[path]


def _answer(status: int, body: Any) -> requests.Response:
    answer = requests.Response()
    answer.status_code = status
    answer._content = (body if isinstance(body, str) else json.dumps(body)).encode()
    return answer


@pytest.fixture
def open_ports(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What the scan finds."""
    found = [22, 80, 443]

    async def scan(address: str) -> list[int]:
        return found

    monkeypatch.setattr(checks, "_open_ports", scan)
    monkeypatch.setattr(checks, "_SCRAPE_PATIENCE_S", 0.0)
    return found


def problems(probe: FakeProbe) -> list[str]:
    return prove(probe.as_probe(), STARTER, ROOT, "v1", 1.0, lambda text: None).problems


def test_a_good_node_passes(open_ports: list[int]) -> None:
    """Every check ran, and what the node told is handed on."""
    proof = prove(FakeProbe().as_probe(), STARTER, ROOT, "v1", 1.0, lambda text: None)
    assert proof.problems == []
    assert len(proof.checks) == 13
    assert proof.version["boot"] == {"model_s": 2.0}
    assert proof.node["failed_units"] == []


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        ({"version": {"image": {"version": "v0"}, "boot": {"model_s": 2.0}}}, "version: the image calls itself 'v0'"),
        (
            {"version": {"image": {"version": "v1"}, "boot": {"model_s": 99.0}}},
            "boot: the model was ready 99.0 s",
        ),
        ({"version": {"image": {"version": "v1"}, "boot": {"model_s": None}}}, "boot: the timeline does not say"),
        ({"version": []}, "version: the node's answer makes no sense"),
        ({"response": "Something else."}, "generation: to 'How do I run the benchmarks?' it says 'Something else.'"),
        ({"response": " "}, "generation: the model says nothing"),
        ({"events": [{"response": "a"}]}, "stream: the stream has 1 events"),
        ({"status_of_strangers": 200}, "keys: POST /generate by a wrong key says 200"),
        ({"metrics_status": 200}, "https: /metrics is routed to the outside"),
        ({"plain": (200, "")}, "https: port 80 says 200"),
        ({"targets": [{"labels": {"job": "node"}, "health": "down"}]}, "metrics: not scraped: node"),
        ({"targets": []}, "metrics: not scraped: nothing at all"),
        ({"counted": []}, "metrics: the tokens that were generated are not counted"),
        ({"alerts": [{"labels": {"alertname": "DiskFull"}, "state": "firing"}]}, "alerts: alerts: DiskFull"),
        ({"node": {"audit": {"findings": ["/root/x: a key"]}, "failed_units": []}}, "audit: /root/x: a key"),
        ({"node": {"audit": None, "failed_units": []}}, "audit: the node has no result"),
        ({"node": {"audit": {"findings": []}, "failed_units": ["docker.service"]}}, "units: failed: docker.service"),
    ],
)
def test_what_is_wrong_is_seen(open_ports: list[int], wrong: dict[str, Any], problem: str) -> None:
    """By the check that is meant for it, in a line that says what was seen."""
    probe = FakeProbe()
    for name, value in wrong.items():
        assert hasattr(probe, name)
        setattr(probe, name, value)
    assert any(line.startswith(problem) for line in problems(probe)), problems(probe)


def test_ports(open_ports: list[int]) -> None:
    """One more than there should be, or one less."""
    open_ports.append(8080)
    assert problems(FakeProbe()) == ["ports: open to everybody: 8080"]
    open_ports[:] = [22, 80]
    assert problems(FakeProbe()) == ["ports: closed: 443"]


class Connected:
    """What a port that is open gives."""

    def close(self) -> None:
        """Nothing is connected."""


@pytest.mark.parametrize("late_s", [0.0, 5.0])
def test_a_busy_host_is_scanned_with_more_time(monkeypatch: pytest.MonkeyPatch, late_s: float) -> None:
    """Where the port that must be open is late, others may be as well; one that is open is found all the same."""

    async def connect(address: str, port: int) -> tuple[None, Connected]:
        if port in (22, 443, 8080):
            return None, Connected()
        raise ConnectionRefusedError

    async def wait_for(connecting: Coroutine[Any, Any, Any], timeout_s: float) -> Any:
        if timeout_s < late_s:
            connecting.close()
            raise TimeoutError
        return await connecting

    monkeypatch.setattr(checks.asyncio, "open_connection", connect)
    monkeypatch.setattr(checks.asyncio, "wait_for", wait_for)
    assert asyncio.run(checks._open_ports("192.0.2.1")) == [22, 443, 8080]


def test_a_scan_that_hears_nothing_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no proof that nothing is open."""

    async def connect(address: str, port: int) -> None:
        raise TimeoutError

    monkeypatch.setattr(checks.asyncio, "open_connection", connect)
    with pytest.raises(checks.Wrong, match="closed: 443, or this machine is too busy to scan"):
        asyncio.run(checks._open_ports("192.0.2.1"))


def test_a_node_that_is_never_ready_is_asked_for_its_report_all_the_same(open_ports: list[int]) -> None:
    """What it says of itself is what a person needs then."""
    probe = FakeProbe()
    probe.ready = "/ready says 503: the facts are wrong"
    proof = prove(probe.as_probe(), STARTER, ROOT, "v1", 1.0, lambda text: None)
    assert [each.name for each in proof.checks] == ["ready", "node", "audit", "units"]
    assert "the facts are wrong" in proof.problems[0]
    assert proof.node == probe.node
