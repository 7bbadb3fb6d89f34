"""Owns what an image must show before it is called verified; all of it is asked of a node that was booted from it."""

import asyncio
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

from scripts.bake.inputs import Model
from scripts.bake.probe import Probe
from scripts.bake.runs import read_json

# The boot itself, and what a first read of a fresh disk brings, slower than any that was seen.
_BOOT_BUDGET_S = 20.0
_READ_RATE_BYTES_PER_S = 100e6
# The known answer reads all weights for some forty tokens: 8B took 2 s a GB on two cores, and hosts differ.
_ANSWER_RATE_BYTES_PER_S = 150e6
_SCRAPE_PATIENCE_S = 60.0  # four rounds of Prometheus
_QUESTION = "Name three colours."  # to a model whose answer is not known beforehand
_QUESTION_TOKENS = 16
_OPEN, _NEEDED, _HEARD = {22, 80, 443}, {80, 443}, 443
# All that have a meaning for everybody, and where programs of this kind listen.
_PORTS = sorted(
    {
        *range(1, 1025),
        *(1433, 1521, 2049, 3306, 5000, 5432, 5601, 5672, 6060, 6379, 7946, 10250, 11434, 15672, 27017, 32768),
        *(*range(2370, 2385), *range(3000, 3010), *range(8000, 8101), 8443, 8888, *range(9000, 9330)),
    }
)
_PORT_TIMEOUT_S, _LONGEST_PORT_TIMEOUT_S, _PORTS_AT_ONCE = 1.5, 12.0, 400


class Wrong(Exception):
    """A check did not pass; the message says what was seen."""


@dataclass(frozen=True)
class Checked:
    """What a check found: ``problem`` is None if all was well."""

    name: str
    problem: str | None
    took_s: float


@dataclass(frozen=True)
class Proof:
    """All checks of one node, and what it told of itself meanwhile; None where it told nothing."""

    checks: list[Checked]
    version: Any
    node: Any

    @property
    def problems(self) -> list[str]:
        """A line for each check that did not pass."""
        return [f"{each.name}: {each.problem}" for each in self.checks if each.problem is not None]


def boot_patience_s(model: Model) -> float:
    """How long a boot may last, from the first process to the first token."""
    return _BOOT_BUDGET_S + model.size_bytes / _READ_RATE_BYTES_PER_S + model.size_bytes / _ANSWER_RATE_BYTES_PER_S


def prove(
    probe: Probe, model: Model, tree: Path, version: str, create_patience_s: float, show: Callable[[str], None]
) -> Proof:
    """Runs every check; one that fails does not keep the others from telling what they see.

    ``create_patience_s`` is what a server takes until its first process, beside the boot.
    """
    told: dict[str, Any] = {}
    checks: list[Checked] = []

    def run(name: str, check: Callable[[], None]) -> bool:
        show(name)
        begin_s = time.monotonic()
        try:
            check()
            problem = None
        except Wrong as wrong:
            problem = str(wrong)
        except (requests.RequestException, ValueError, LookupError, TypeError, AttributeError) as error:
            problem = f"the node's answer makes no sense: {type(error).__name__}: {error}"[:300]
        checks.append(Checked(name, problem, round(time.monotonic() - begin_s, 2)))
        return problem is None

    with ThreadPoolExecutor(1) as pool:
        if run("ready", lambda: _check_ready(probe, boot_patience_s(model) + create_patience_s)):
            scan = pool.submit(asyncio.run, _open_ports(probe.address))
            run("version", lambda: _check_version(probe, version))
            run("generation", lambda: _check_generation(probe, model, tree))
            # After it, for then the timeline is whole.
            run("boot", lambda: told.update(version=_check_boot(probe, boot_patience_s(model))))
            run("stream", lambda: _check_stream(probe))
            run("keys", lambda: _check_keys(probe))
            run("https", lambda: _check_https(probe))
            run("metrics", lambda: _check_metrics(probe))
            run("alerts", lambda: _check_alerts(probe))
            run("ports", lambda: _check_ports(scan.result()))
        run("node", lambda: told.update(node=_see_node(probe)))
        run("audit", lambda: _check_audit(told.get("node")))
        run("units", lambda: _check_units(told.get("node")))
    return Proof(checks, told.get("version"), told.get("node"))


def _check_ready(probe: Probe, patience_s: float) -> None:
    if heard := probe.wait_ready(patience_s):
        raise Wrong(f"not ready within {patience_s:.0f} s: {heard}")


def _check_version(probe: Probe, version: str) -> None:
    told = probe.ask("/version").json()
    if told["image"]["version"] != version:
        raise Wrong(f"the image calls itself {told['image']['version']!r}, not {version!r}")


def _check_boot(probe: Probe, budget_s: float) -> Any:
    """What /version tells: its timeline begins with the first process, ``model_s`` is the known answer."""
    told = probe.ask("/version").json()
    took_s = told["boot"]["model_s"]
    if took_s is None:
        raise Wrong("the timeline does not say when the model was ready")
    if took_s > budget_s:
        raise Wrong(f"the model was ready {took_s:.1f} s after the first process, the budget is {budget_s:.1f} s")
    return told


def _generate(probe: Probe, prompt: str, max_tokens: int, **more: Any) -> requests.Response:
    body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, **more}
    answer = probe.ask("/generate", json=body)
    if answer.status_code != 200:
        raise Wrong(f"POST /generate says {answer.status_code}: {answer.text[:200]}")
    return answer


def _check_generation(probe: Probe, model: Model, tree: Path) -> None:
    """The known answer; of a model without one, the same one twice: the node has checked its own at the start."""
    golden = (
        (read_json(tree / "service" / "starter" / "starter.json") or {}).get("golden") if model.is_starter else None
    )
    question = (golden["prompt"], golden["max_tokens"]) if golden else (_QUESTION, _QUESTION_TOKENS)
    answer = _generate(probe, *question).json()["response"]
    wanted = golden["response"] if golden else _generate(probe, *question).json()["response"]
    if not answer.strip():
        raise Wrong("the model says nothing")
    if answer != wanted:
        raise Wrong(f"to {question[0]!r} it says {answer[:80]!r}, not {wanted[:80]!r}")


def _check_stream(probe: Probe) -> None:
    lines = _generate(probe, _QUESTION, _QUESTION_TOKENS, stream=True).text.splitlines()
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    if len(events) < 2 or not events[-1].get("done"):
        raise Wrong(f"the stream has {len(events)} events, the last one is {str(events[-1:])[:200]}")


def _check_keys(probe: Probe) -> None:
    body = {"prompt": _QUESTION, "max_tokens": 1}
    for name, key in (("a wrong key", "mllm_" + "0" * 48), ("no key", None)):
        status = probe.ask("/generate", key, json=body).status_code
        if status != 401:
            raise Wrong(f"POST /generate by {name} says {status}, not 401")


def _check_https(probe: Probe) -> None:
    plain = probe.ask_plain("/generate")
    if plain.status_code not in (301, 308) or not plain.headers.get("Location", "").startswith("https://"):
        raise Wrong(f"port 80 says {plain.status_code} and does not lead to HTTPS")
    if (status := probe.ask("/metrics").status_code) != 404:
        raise Wrong(f"/metrics is routed to the outside: {status}")


def _check_metrics(probe: Probe) -> None:
    """Every target is scraped, and the generation of before is counted."""

    def look() -> str | None:
        targets = probe.see("/prometheus/api/v1/targets")["data"]["activeTargets"]
        down = sorted(each["labels"]["job"] for each in targets if each["health"] != "up")
        if down or not targets:
            return f"not scraped: {', '.join(down) or 'nothing at all'}"
        counted = _query(probe, "sum(llm_tokens_generated_total) > 0")
        return None if counted else "the tokens that were generated are not counted"

    _wait_for(look)


def _check_alerts(probe: Probe) -> None:
    """There are rules, and nothing fires by them."""

    def look() -> str | None:
        if not _query(probe, "sum(prometheus_rule_group_rules) > 0"):
            return "there is no rule that could fire"
        alerts = probe.see("/prometheus/api/v1/alerts")["data"]["alerts"]
        names = {each["labels"]["alertname"] for each in alerts if each["state"] == "firing"}
        names |= {each["labels"]["alertname"] for each in probe.see("/alertmanager/api/v2/alerts")}
        return f"alerts: {', '.join(sorted(names))}" if names else None

    _wait_for(look)


def _query(probe: Probe, expression: str) -> Any:
    return probe.see("/prometheus/api/v1/query", query=expression)["data"]["result"]


def _wait_for(look: Callable[[], str | None]) -> None:
    end_s = time.monotonic() + _SCRAPE_PATIENCE_S
    while True:
        try:
            problem = look()
        except requests.RequestException as error:  # monitoring starts after the service
            problem = f"the monitoring does not answer: {error}"[:300]
        if problem is None:
            return
        if time.monotonic() > end_s:
            raise Wrong(problem)
        time.sleep(0.5)


async def _open_ports(address: str) -> list[int]:
    """Ports that let somebody connect. Raises Wrong where the one that must be open is not heard of beside the others.

    A busy host is late for open ports too: what is asked together counts only if that one answered among it, else it is
    asked again with more time.
    """

    async def try_port(port: int, timeout_s: float) -> bool:
        try:
            _, writer = await asyncio.wait_for(asyncio.open_connection(address, port), timeout_s)
        except (OSError, TimeoutError):
            return False
        writer.close()
        return True

    found: set[int] = set()
    for start in range(0, len(_PORTS), _PORTS_AT_ONCE):
        together = _PORTS[start : start + _PORTS_AT_ONCE]
        timeout_s, heard = _PORT_TIMEOUT_S, False
        while not heard:
            if timeout_s > _LONGEST_PORT_TIMEOUT_S:
                raise Wrong(f"closed: {_HEARD}, or this machine is too busy to scan")
            *tried, heard = await asyncio.gather(*(try_port(port, timeout_s) for port in (*together, _HEARD)))
            timeout_s *= 2
        found |= {port for port, is_open in zip(together, tried, strict=True) if is_open}
    again = sorted(_NEEDED - found)
    found |= {port for port in again if await try_port(port, _LONGEST_PORT_TIMEOUT_S)}
    return sorted(found)


def _check_ports(found: list[int]) -> None:
    if extra := sorted(set(found) - _OPEN):
        raise Wrong(f"open to everybody: {', '.join(map(str, extra))}")
    if missing := sorted(_NEEDED - set(found)):
        raise Wrong(f"closed: {', '.join(map(str, missing))}")


def _see_node(probe: Probe) -> dict[str, Any]:
    told = probe.see("/node")
    if not isinstance(told, dict):
        raise Wrong(f"the node's report is none: {str(told)[:80]!r}")
    return told


def _check_audit(node: Any) -> None:
    if not node or not node.get("audit"):
        raise Wrong("the node has no result of the image's audit")
    if findings := node["audit"]["findings"]:
        raise Wrong("; ".join(findings[:5]))


def _check_units(node: Any) -> None:
    if failed := (node or {"failed_units": ["no report"]})["failed_units"]:
        raise Wrong(f"failed: {', '.join(failed)}")
