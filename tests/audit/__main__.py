"""Owns `make audit`: which weaknesses of pinned packages are known, and, if nobody could be asked, that it did not run.

pip-audit itself takes a package of which its database knows nothing at all for one without weaknesses, and so calls the
answers of a mirror that has no such database a success.
"""

import json
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from tests.tree import ROOT, list_files

_TIMEOUT_S = 600
_CLEAN, _WEAK, _NOT_RUN = 0, 1, 2


@dataclass(frozen=True)
class Verdict:
    """What is told, and the exit code: 0 nothing is known, 1 something is, 2 not all could be looked up."""

    code: int
    lines: list[str] = field(default_factory=list)


def list_locks() -> list[str]:
    """Every file that pins packages by hash: those with a list of wishes beside them."""
    files = list_files()
    return [name for name in files if name.endswith("requirements.txt") and name.replace(".txt", ".in") in files]


def judge(dependencies: Iterable[dict[str, Any]]) -> Verdict:
    """A verdict on pip-audit's findings, a document a package."""
    looked_up, unknown, weak = set(), set(), []
    for each in dependencies:
        if "skip_reason" in each:
            unknown.add(each["name"])
            continue
        looked_up.add(each["name"])
        for found in each["vulns"]:
            mended = ", ".join(found["fix_versions"]) or "no version"
            weak.append(f"{each['name']} {each['version']}: {found['id']}, mended in {mended}")
    lines = sorted(set(weak))
    if unknown or not looked_up:
        lines.append(f"audit: {len(unknown)} packages could NOT be looked up; nothing is known of them")
    if not looked_up:
        lines.append("audit: it did not run: the package index here has no list of weaknesses")
    else:
        lines.append(f"audit: {len(looked_up)} packages looked up, {len(set(weak))} known weaknesses")
    return Verdict(_WEAK if weak else _NOT_RUN if unknown or not looked_up else _CLEAN, lines)


def ask(locks: list[str]) -> Verdict:
    """What pip-audit finds in the locks, by PyPI's own list of weaknesses."""
    command = [sys.executable, "-m", "pip_audit", "--progress-spinner=off", "--disable-pip", "--require-hashes"]
    command += ["--format=json", *(word for name in locks for word in ("-r", str(ROOT / name)))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S)
    try:
        dependencies = json.loads(done.stdout)["dependencies"]
    except ValueError:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        return Verdict(_NOT_RUN, [f"audit: it did not run: {last[:300]}"])
    return judge(dependencies)


def main() -> int:
    """For a person, and for CI by the exit code."""
    locks = list_locks()
    print(f"audit: {', '.join(locks)}")
    try:
        verdict = ask(locks)
    except subprocess.TimeoutExpired:
        verdict = Verdict(_NOT_RUN, [f"audit: it did not run: no answer within {_TIMEOUT_S} s"])
    print("\n".join(verdict.lines))
    return verdict.code


if __name__ == "__main__":
    sys.exit(main())
