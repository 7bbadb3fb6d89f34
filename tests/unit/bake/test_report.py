"""The report of an image: its parts as CycloneDX has them, and what has changed between two."""

import re
from pathlib import Path
from typing import Any

from scripts.bake.checks import Checked, Proof
from scripts.bake.report import carry_over, compare, find_report, keep_report, make_report
from scripts.bake.runs import Run
from tests.unit.bake.test_snapshots import make

NODE: dict[str, Any] = {
    "image": {"version": "v1", "model": {"name": "starter", "sha256": "ab" * 32}},
    "versions": {
        "kernel": "6.12",
        "packages": {"openssl": "3.5.1-1+deb13u1", "libstdc++6": "14.2.0"},
        "python": {"gpt4all": "2.0.0", "typing_extensions": "4.16"},
        "containers": {
            "traefik": {"image": "docker.io/library/traefik", "version": "v3", "digest": "sha256:" + "cd" * 32}
        },
    },
    "sizes_bytes": {"model": 3, "venv": 5},
    "failed_units": [],
    "logs": {"service": ["a line"]},
}


def report(tmp_path: Path, number: int = 1, node: object = NODE, problem: str | None = None) -> dict[str, Any]:
    run = Run("20261126-1200-0a1b2c", tmp_path, 0)
    proof = Proof([Checked("ready", problem, 1.0)], {"boot": {"model_s": 2.0}}, node)
    return make_report(make(number), None, run, {"probe": 1.0}, proof, "cx23 at fsn1")


def test_the_parts_are_told_as_cyclonedx(tmp_path: Path) -> None:
    """Each with a package URL or a digest by which a scanner knows it, and a reference of its own."""
    sbom = report(tmp_path)["sbom"]
    assert (sbom["bomFormat"], sbom["specVersion"]) == ("CycloneDX", "1.6")
    urls = [each.get("purl") for each in sbom["components"]]
    assert urls == [
        "pkg:deb/debian/openssl@3.5.1-1%2Bdeb13u1?distro=debian-13",
        "pkg:deb/debian/libstdc%2B%2B6@14.2.0?distro=debian-13",
        "pkg:pypi/gpt4all@2.0.0",
        "pkg:pypi/typing-extensions@4.16",
        f"pkg:oci/traefik@sha256%3A{'cd' * 32}?repository_url=docker.io%2Flibrary%2Ftraefik&tag=v3",
        None,
    ]
    assert sbom["components"][-1]["type"] == "machine-learning-model"
    assert sbom["components"][-1]["hashes"] == [{"alg": "SHA-256", "content": "ab" * 32}]
    references = [each["bom-ref"] for each in sbom["components"]]
    assert len(set(references)) == len(references)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT.*", sbom["metadata"]["timestamp"])


def test_logs_are_kept_of_what_failed_alone(tmp_path: Path) -> None:
    """They are long, and what went well needs none."""
    assert report(tmp_path)["logs"] is None
    assert report(tmp_path, problem="no")["logs"] == {"service": ["a line"]}


def test_a_node_that_told_nothing_has_a_report(tmp_path: Path) -> None:
    """With what is known without it."""
    told = report(tmp_path, node=None, problem="not ready")
    assert told["sbom"]["components"] == []
    assert told["checks"][0]["problem"] == "not ready"


def test_two_reports_are_compared_by_their_parts(tmp_path: Path) -> None:
    """What came, what went, what changed."""
    packages = {"openssl": "3.5.2", "curl": "8"}
    other = {**NODE, "versions": {**NODE["versions"], "packages": packages}, "sizes_bytes": {"model": 3, "venv": 6}}
    lines = compare(report(tmp_path), report(tmp_path, 2, other))
    assert lines == [
        "version: 'v1' → 'v2'",
        "+ deb/debian/curl 8",
        "- deb/debian/libstdc%2B%2B6 14.2.0",
        "deb/debian/openssl 3.5.1-1+deb13u1 → 3.5.2",
        "size of venv: 5 → 6 bytes",
    ]


def test_a_later_proof_keeps_what_the_bake_knew(tmp_path: Path) -> None:
    """Tree, tools and the bake's times stay; checks and what was measured again are the new ones."""
    baked = {
        **report(tmp_path),
        "tree": {"commit": "c0ffee"},
        "tools": {"packer": "1.11.2"},
        "times_s": {"layer": 9, "probe": 5},
    }
    proved = report(tmp_path, problem="late")
    kept = carry_over(proved, baked)
    assert (kept["tree"], kept["tools"]) == (baked["tree"], baked["tools"])
    assert kept["times_s"] == {"layer": 9, "probe": 1.0}
    assert kept["checks"] == proved["checks"]
    assert carry_over(proved, None) == proved


def test_reports_are_kept_by_image(state: Path) -> None:
    """And found on the machine that baked."""
    told = report(state)
    keep_report(state, told)
    assert find_report(state, 1) == told
    assert find_report(state, 2) is None
