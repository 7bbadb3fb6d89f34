"""Owns the fault plan of an apply: calls of a rollout meet what passes and what does not, and Terraform is killed.

``python -m tests.bake.launch_fault_plan`` runs all of it, with Terraform, its real provider and stand-in nodes, and
prints what became of each case; it ends with 1 if one went wrong. What passes is what hcloud-go tries again: the
rollout succeeds. What does not makes an apply fail: the old node serves on, and the next apply heals it, after
``sweep.py`` where Terraform was killed. `Case` names are stable, so that a sample can name them.
"""

import argparse
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tests.bake.harness import Bench, parse_pattern, running_bench
from tests.image.harness import DOMAIN
from tests.image.launch import KEYS, Deployment, api_key, deployment
from tests.image.registry import make_certificate

_MOMENTS = 10
# What hcloud-go tries again: client_handler_retry.go in https://github.com/hetznercloud/hcloud-go.
_PASSING: dict[str, dict[str, Any]] = {
    "409 conflict": {"kind": "error", "status": 409, "code": "conflict", "message": "conflict"},
    "429 rate_limit_exceeded": {"kind": "error", "status": 429, "code": "rate_limit_exceeded", "message": "slowly"},
    "502 bad_gateway": {"kind": "error", "status": 502, "code": "bad_gateway", "message": "bad gateway"},
    "504 timeout": {"kind": "error", "status": 504, "code": "timeout", "message": "timeout"},
}
_FATAL: dict[str, dict[str, Any]] = {
    "403 forbidden": {"kind": "error", "status": 403, "code": "forbidden", "message": "insufficient permissions"},
    "reset": {"kind": "reset"},
    "lost_answer": {"kind": "lost_answer"},
}
_COMMANDS = ("create_server", "start_server", "attach_to_network", "assign_floating_ip", "delete_server")


@dataclass(frozen=True)
class Site:
    """A kind of call, ids left open, and how often a clean rollout makes it."""

    method: str
    path: str
    count: int


@dataclass(frozen=True)
class Clean:
    """A rollout that nothing befell."""

    sites: list[Site]
    took_s: float


@dataclass
class Stage:
    """A deployment of one stand-in node, and the bench whose cloud it is on; ``number`` makes each apply a rollout."""

    bench: Bench
    made: Deployment
    number: int = 2  # of the parallel requests, as the key has it at first

    def next_values(self) -> dict[str, Any]:
        self.number += 1
        return {"api_keys": [{**api_key("alice"), "limits": {"parallel": self.number}}]}

    def rollout(self) -> tuple[int, str]:
        """An apply that makes another node."""
        self.made.values |= self.next_values()
        return self.made.run("apply", "-auto-approve", "-input=false")

    def find_wrong(self, nodes: int | None = 1) -> list[str]:
        """What is not as it should be between two applies."""
        address = self.made.outputs()["ipv4_address"]
        wrong = [] if self.made.generate(address, KEYS["alice"]) == 200 else ["nobody serves"]
        found = len(self.made.node_names())
        return wrong + ([f"there are {found} nodes"] if nodes not in (None, found) else [])

    def heal(self) -> list[str]:
        """The next apply, without faults; what is wrong after it."""
        self.bench.plan()
        code, said = self.made.run("apply", "-auto-approve", "-input=false")
        wrong = [] if code == 0 else [f"the next apply ended with {code}:\n{said[-1500:]}"]
        wrong += self.find_wrong()
        return wrong + (["a plan is not empty"] if not wrong and self.made.changes() else [])


@dataclass(frozen=True)
class Case:
    """One way to be hit; ``run`` returns what was wrong afterwards."""

    group: str
    name: str
    run: Callable[[Stage], list[str]]


@contextmanager
def running_stage(bench: Bench, folder: Path, program: str) -> Iterator[Stage]:
    """A baked image of the small tree, launched once; nothing is left of it afterwards."""
    done = bench.run("build", "--promote")
    assert done.code == 0, str(done)
    [image] = bench.verified()
    chain, key = make_certificate(folder, f"DNS:{DOMAIN}", f"DNS:monitoring.{DOMAIN}")
    certificate = {"chain": chain.read_text(), "key": key.read_text()}
    with deployment(folder, bench.cloud, program, chain, certificate=certificate, image_id=image.id) as made:
        made.apply()
        yield Stage(bench, made)


def record(stage: Stage) -> Clean:
    """A clean rollout. Fails with what was wrong with it."""
    last = max((call["number"] for call in stage.bench.calls()), default=0)
    begin_s = time.monotonic()
    code, said = stage.rollout()
    took_s = time.monotonic() - begin_s
    assert code == 0, said
    calls = stage.bench.calls(after=last)
    assert stage.find_wrong() == []
    counts = Counter((call["method"], re.sub(r"/\d+(?=/|$)", "/*", call["path"])) for call in calls)
    return Clean([Site(*where, count) for where, count in sorted(counts.items())], took_s)


def _passing(stage: Stage, faults: list[dict[str, Any]]) -> list[str]:
    stage.bench.plan(*faults)
    code, said = stage.rollout()
    stage.bench.plan()
    wrong = [] if code == 0 else [f"the apply ended with {code}:\n{said[-1500:]}"]
    return wrong + (stage.find_wrong() if not wrong else stage.heal())


def _fatal(stage: Stage, fault: dict[str, Any]) -> list[str]:
    stage.bench.plan(fault)
    code, _ = stage.rollout()
    stage.bench.plan()
    wrong = stage.find_wrong(nodes=None)
    if code == 0 and not wrong:
        return stage.find_wrong()
    stage.made.sweep()
    return wrong + stage.heal()


def _killed(stage: Stage, after_s: float) -> list[str]:
    stage.made.kill(after_s, **stage.next_values())
    wrong = stage.find_wrong(nodes=None)
    stage.made.sweep()
    return wrong + stage.heal()


def list_cases(clean: Clean) -> list[Case]:
    """All of them, in order."""
    cases = []
    for name, fault in _PASSING.items():
        for site in clean.sites:
            faults = [{"method": site.method, "path": site.path, "call": 1, **fault}]
            cases.append(Case("passing", f"{name}, {site.method} {site.path}", partial(_passing, faults=faults)))
    for name, fault in _FATAL.items():
        for site in clean.sites:
            if site.method != "GET":
                where = {"method": site.method, "path": site.path, "call": 1}
                cases.append(Case("fatal", f"{name}, {site.method} {site.path}", partial(_fatal, fault=where | fault)))
    for command in _COMMANDS:
        failed = {"method": "*", "path": "/v1/**", "kind": "action_failed", "command": command, "times": 1}
        cases.append(Case("fatal", f"action_failed {command}", partial(_fatal, fault=failed)))
    for number in range(_MOMENTS):
        after_s = clean.took_s * (number + 0.5) / _MOMENTS
        cases.append(Case("killed", f"moment {number + 1} of {_MOMENTS}", partial(_killed, after_s=after_s)))
    return cases


def main(words: list[str]) -> int:
    """Runs the plan; prints what became of each case."""
    parser = argparse.ArgumentParser(prog="launch_fault_plan", description=__doc__)
    only_help = "a regular expression; only cases whose group and name have it"
    parser.add_argument("--only", type=parse_pattern, default="", help=only_help)
    options = parser.parse_args(words)
    program = shutil.which("terraform") or shutil.which("tofu")
    if program is None:
        parser.error("neither terraform nor tofu is installed")
    failed = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with running_bench(folder) as bench, running_stage(bench, folder, program) as stage:
            clean = record(stage)
            print(f"a clean rollout: {clean.took_s:.1f} s, {sum(site.count for site in clean.sites)} calls", flush=True)
            cases = [case for case in list_cases(clean) if options.only.search(f"{case.group}: {case.name}")]
            if not cases:
                parser.error(f"--only {options.only.pattern!r}: no case has it")
            for case in cases:
                begin_s = time.monotonic()
                wrong = case.run(stage)
                failed += bool(wrong)
                told = "good" if not wrong else "WRONG: " + "\n  ".join(wrong)
                print(f"{case.group}: {case.name}: {told} ({time.monotonic() - begin_s:.1f} s)", flush=True)
            left = stage.made.sweep().strip()
    print(f"{len(cases)} cases, {failed} failed; {left}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
