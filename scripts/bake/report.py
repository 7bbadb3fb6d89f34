"""Owns the report of an image: its parts, as CycloneDX too, how long it took, what was checked; and comparisons."""

import importlib.metadata
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from scripts.bake.checks import Proof
from scripts.bake.inputs import Tree
from scripts.bake.runs import Run, read_json, write_json
from scripts.bake.snapshots import Snapshot


def make_report(
    snapshot: Snapshot,
    tree: Tree | None,
    run: Run,
    times_s: Mapping[str, float],
    proof: Proof,
    place: str,
    packer: str = "",
) -> dict[str, Any]:
    """The report's document; ``place`` is the type and location of the node that was asked."""
    node = proof.node or {}
    versions = node.get("versions") or {}
    return {
        "image": describe(snapshot),
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "run": run.id,
        "tree": None if tree is None else {"commit": tree.commit, "dirty": tree.dirty, "inputs": dict(tree.digests)},
        "tools": {
            "packer": packer or None,
            "hcloud": importlib.metadata.version("hcloud"),
            "python": platform.python_version(),
        },
        "times_s": dict(times_s),
        "probe": place,
        "boot": (proof.version or {}).get("boot"),
        "checks": [{"name": each.name, "problem": each.problem, "took_s": each.took_s} for each in proof.checks],
        "sizes_bytes": node.get("sizes_bytes"),
        "kernel": versions.get("kernel"),
        "sbom": make_sbom(snapshot, node),
        "logs": node.get("logs") if proof.problems else None,
    }


def describe(snapshot: Snapshot) -> dict[str, Any]:
    """A snapshot as JSON."""
    return {
        "id": snapshot.id,
        "layer": snapshot.layer,
        "version": snapshot.version,
        "description": snapshot.description,
        "created": snapshot.created.astimezone(UTC).isoformat(timespec="seconds"),
        "status": snapshot.status,
        "size_gb": snapshot.size_gb,
        "disk_gb": snapshot.disk_gb,
        "model": snapshot.model,
        "commit": snapshot.commit,
        "parent": snapshot.parent,
        "input": snapshot.input,
        "run": snapshot.run,
        "deadline_s": snapshot.deadline_s,
        "verified_at": None if snapshot.verified_at is None else snapshot.verified_at.isoformat(),
        "withdrawn": snapshot.withdrawn or None,
        "channels": dict(snapshot.channels),
    }


def make_sbom(snapshot: Snapshot, node: Mapping[str, Any]) -> dict[str, Any]:
    """What is in the image, as CycloneDX 1.6 (https://cyclonedx.org/docs/1.6/json/), from the node's own lists."""
    versions = node.get("versions") or {}
    model = (node.get("image") or {}).get("model")
    components: list[dict[str, Any]] = [
        _component("library", name, version, f"pkg:deb/debian/{quote(name)}@{quote(version)}?distro=debian-13")
        for name, version in (versions.get("packages") or {}).items()
    ]
    components += [
        _component("library", name, version, f"pkg:pypi/{quote(name.lower().replace('_', '-'))}@{quote(version)}")
        for name, version in (versions.get("python") or {}).items()
    ]
    for name, pin in (versions.get("containers") or {}).items():
        registry, _, path = pin["image"].partition("/")
        more = f"?repository_url={quote(registry + '/' + path, safe='')}&tag={quote(pin['version'])}"
        purl = f"pkg:oci/{quote(path.rpartition('/')[2])}@{quote(pin['digest'])}{more}"
        components.append({**_component("container", name, pin["version"], purl), "hashes": [_hash(pin["digest"])]})
    if model:
        digest = _hash(f"sha256:{model['sha256']}")
        components.append(
            {"type": "machine-learning-model", "name": model["name"], "bom-ref": "model", "hashes": [digest]}
        )
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "timestamp": datetime.now(UTC).isoformat(timespec="seconds"),
            "component": {
                "type": "operating-system",
                "name": "mini-llm image",
                "version": snapshot.version,
                "bom-ref": f"image-{snapshot.id}",
            },
        },
        "components": components,
    }


def _component(kind: str, name: str, version: str, purl: str) -> dict[str, Any]:
    return {"type": kind, "name": name, "version": version, "purl": purl, "bom-ref": purl}


def _hash(digest: str) -> dict[str, str]:
    return {"alg": "SHA-256", "content": digest.removeprefix("sha256:")}


def report_path(state: Path, image: int) -> Path:
    """Where an image's report lies."""
    return state / "reports" / f"{image}.json"


def keep_report(state: Path, document: Mapping[str, Any]) -> Path:
    """Writes a report down. Raises OSError."""
    path = report_path(state, document["image"]["id"])
    write_json(path, document)
    return path


def find_report(state: Path, image: int) -> dict[str, Any] | None:
    """An image's report, if the bake ran on this machine."""
    found = read_json(report_path(state, image))
    return found if isinstance(found, dict) else None


def carry_over(document: Mapping[str, Any], earlier: Mapping[str, Any] | None) -> dict[str, Any]:
    """A later proof's report, with what only the bake itself knew: tree, tools and the times of its phases."""
    if not earlier:
        return dict(document)
    known = {name: earlier[name] for name in ("tree", "tools") if earlier.get(name)}
    return {**document, **known, "times_s": {**earlier.get("times_s", {}), **document["times_s"]}}


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between two reports, a line each: components first, then sizes and times."""
    lines = [
        f"{name}: {before[name]!r} → {after[name]!r}"
        for before, after in ((old["image"], new["image"]),)
        for name in ("version", "commit", "model", "size_gb")
        if before[name] != after[name]
    ]
    before, after = _versions(old), _versions(new)
    lines += [f"+ {name} {after[name]}" for name in sorted(after.keys() - before.keys())]
    lines += [f"- {name} {before[name]}" for name in sorted(before.keys() - after.keys())]
    lines += [
        f"{name} {before[name]} → {after[name]}"
        for name in sorted(before.keys() & after.keys())
        if before[name] != after[name]
    ]
    for title, field, unit in (("size of", "sizes_bytes", "bytes"), ("time of", "times_s", "s"), ("boot", "boot", "s")):
        sizes, others = old.get(field) or {}, new.get(field) or {}
        lines += [
            f"{title} {name}: {sizes[name]} → {others[name]} {unit}"
            for name in sorted(sizes.keys() & others.keys())
            if sizes[name] != others[name]
        ]
    return lines


def _versions(report: Mapping[str, Any]) -> dict[str, str]:
    return {
        each.get("purl", each["name"]).partition("@")[0].removeprefix("pkg:"): each.get("version")
        or each["hashes"][0]["content"][:12]
        for each in report["sbom"]["components"]
    }
