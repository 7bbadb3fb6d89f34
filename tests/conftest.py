"""Owns what is so of all tests: their environment, marks, time limits and lanes, and what a run tells by tier."""

import os
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

import pytest

# What `make test` would hand on to each make that a test runs, which then says and does other things than a person's.
for _makes_own in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "MAKEOVERRIDES"):
    os.environ.pop(_makes_own, None)

# Tier -> what it needs; a test is of the first whose paths its own begins with.
TIERS = {
    "unit": ("nothing", ("tests/unit/",)),
    "service": ("a Python package index; Chromium for its page", ("tests/service/",)),
    "cloud": ("root, Debian's packages", ("tests/local_cloud/",)),
    "nix": ("root, Debian's packages; nothing is built", ("tests/nix/",)),
    "launch": (
        "root, Debian's packages, Go, Terraform and its provider",
        (
            *("tests/image/test_launch", "tests/image/test_opentofu", "tests/image/test_rollout"),
            *("tests/image/test_views", "tests/bake/test_launch_faults"),
        ),
    ),
    "image": ("root, Debian's packages, Go", ("tests/image/", "tests/bake/")),
}

_TIMEOUTS_S = {
    "local_cloud": 900,
    "nix": 900,
    "bake": 900,
    "image": 2700,
}  # by folder, builds among it; else pyproject.toml's


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        folder = item.nodeid.split("/")[1]
        if folder != "unit":
            item.add_marker(pytest.mark.integration)
        if folder in _TIMEOUTS_S:
            item.add_marker(pytest.mark.timeout(_TIMEOUTS_S[folder]))


@dataclass
class _Tier:
    counts: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    took_s: float = 0.0


def _tier_of(path: str) -> str:
    return next((name for name, (_, begins) in TIERS.items() if path.startswith(begins)), "other")


def summarize(reports: Iterable[pytest.TestReport]) -> list[str]:
    """The table's lines, then each test that did not run, with its reason; set-up and tear-down count as time."""
    tiers: dict[str, _Tier] = defaultdict(_Tier)
    not_run: dict[str, list[str]] = defaultdict(list)
    for report in reports:
        tier = tiers[_tier_of(report.nodeid)]
        tier.took_s += report.duration
        if report.outcome == "skipped":
            tier.counts["skipped"] += 1
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            not_run[reason.removeprefix("Skipped: ")].append(report.nodeid)
        elif report.outcome == "failed" or report.when == "call":
            tier.counts[report.outcome] += 1
    lines = [f"{'tier':8} {'passed':>7} {'failed':>7} {'not run':>8} {'took':>8}  needs"]
    for name, (needs, _) in {**TIERS, "other": ("", ())}.items():
        if name in tiers:
            counts, took_s = tiers[name].counts, tiers[name].took_s
            numbers = f"{counts['passed']:7} {counts['failed']:7} {counts['skipped']:8} {took_s:6.0f} s"
            lines.append(f"{name:8} {numbers}  {needs}".rstrip())
    for reason, names in not_run.items():
        lines += [reason, *(f"  {name}" for name in names)]
    return lines


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    stats = terminalreporter.stats
    every = [each for kind in stats.values() for each in kind if isinstance(each, pytest.TestReport)]
    if every:
        terminalreporter.section("by tier")
        for line in summarize(every):
            terminalreporter.write_line(line)
