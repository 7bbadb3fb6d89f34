#!/usr/bin/env python3
"""Shows a deployment: its servers at the cloud, what each node says of itself, addresses, snapshots in use.

Exit code 0 if there is a node and every node is ready, 1 if not, 2 for wrong usage, 3 if the cloud could not be asked.
A node that does not answer is a line of the table and keeps none of the others out of it.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

try:
    from hcloud.servers import BoundServer

    from scripts.bake.answers import given
    from scripts.bake.cloud import Cloud, find_access
    from scripts.bake.console import table
    from scripts.bake.errors import BakeError
    from scripts.bake.housekeeping import price_of_server
    from scripts.bake.prices import Price
    from scripts.bake.snapshots import Snapshot, channels, holders
    from scripts.deployment import (
        Deployment,
        add_place,
        find_domain,
        held_by,
        own_addresses,
        read_deployment,
    )
    from scripts.node import NotTold, Way, add_options, read_boot, read_certificate, read_way, see, why_not_ready
except ModuleNotFoundError as error:
    sys.exit(f"error: Python has no module {error.name}; run `make bake`, which sets up .venv, and use its Python")

_NOT_READY, _BLIND = 1, 3  # 2 is argparse's own, for wrong usage
_AT_ONCE = 8


@dataclass(frozen=True)
class Report:
    """What of a node's report a table has room for; what the node could not tell is None."""

    model: str | None
    version: str | None
    audit_findings: int | None
    failed_units: list[str]


@dataclass(frozen=True)
class Told:
    """What a node itself says; ``problem`` is None if it is ready, ``silence`` why not all was told that was asked."""

    problem: str | None
    certificate_days: float | None = None
    first_answer_s: float | None = None
    report: Report | None = None
    silence: str | None = None


@dataclass(frozen=True)
class Node:
    """A server of the deployment, as cloud and node have it; ``told`` is None for one that was not asked."""

    name: str
    id: int
    image: int | None
    version: str
    server_type: str
    location: str
    state: str
    age_s: float
    addresses: list[str]
    floating: list[str]
    eur_per_hour: float | None
    told: Told | None

    @property
    def ready(self) -> bool:
        """Whether it is known to be."""
        return self.told is not None and self.told.problem is None


@dataclass(frozen=True)
class Status:
    """Everything that is shown."""

    deployment: str
    domain: str | None
    nodes: list[Node]
    addresses: list[dict[str, Any]]
    snapshots: list[dict[str, Any]]

    @property
    def well(self) -> bool:
        """Whether somebody serves, and nobody should who does not."""
        return bool(self.nodes) and all(each.ready for each in self.nodes)


def read_report(told: Any) -> Report:
    """The part of a node's report that is shown. Raises NotTold if it is none."""
    if not isinstance(told, dict) or "failed_units" not in told:
        raise NotTold("the node's report makes no sense")
    image, audit = told.get("image") or {}, told.get("audit") or {}
    findings = audit.get("findings")
    return Report(
        (image.get("model") or {}).get("name"),
        image.get("version"),
        None if findings is None else len(findings),
        list(told["failed_units"]),
    )


def ask(address: str, way: Way) -> Told:
    """What a node says of itself; whatever goes wrong is told in its place."""
    try:
        certificate = read_certificate(address, way)
        problem = why_not_ready(address, way)
    except NotTold as reason:
        return Told(str(reason))
    if problem is None and certificate.problem is not None:
        problem = f"its certificate is not valid for {way.domain}: {certificate.problem}"
    silence, first_answer_s, report = [], None, None
    if problem is None:
        try:
            boot = read_boot(address, way)
            # The model's known answer is one, too, where nobody has asked yet.
            first_answer_s = boot.get("first_token_s") or boot.get("model_s")
        except NotTold as reason:
            silence.append(str(reason))
    if way.user:
        try:
            report = read_report(see(address, way, "/node"))
        except (NotTold, AttributeError, TypeError) as reason:
            silence.append(str(reason))
    return Told(problem, round(certificate.days_left, 1), first_answer_s, report, "; ".join(silence) or None)


def _node(
    server: BoundServer,
    found: Deployment,
    price: Price | None,
    versions: dict[int, str],
    told: Told | None,
    now: datetime,
) -> Node:
    image = None if server.image is None else server.image.id
    return Node(
        given(server.name),
        given(server.id),
        image,
        versions.get(image or 0, ""),
        given(given(server.server_type).name),
        given(given(server.location).name),
        given(server.status),
        round((now - given(server.created)).total_seconds()),
        own_addresses(server),
        [str(each.ip) for each in held_by(server, found.floating_ips)],
        None if price is None else price.net_eur,
        told,
    )


def _addresses(found: Deployment) -> list[dict[str, Any]]:
    names = {given(each.id): each.name for each in found.servers}
    return [
        {
            "name": each.name,
            "address": each.ip,
            "leads_to": None if each.server is None else names.get(given(each.server.id), str(each.server.id)),
            "protected": bool(each.protection and each.protection.get("delete")),
        }
        for each in found.floating_ips
    ]


def _snapshots(snapshots: list[Snapshot], nodes: Iterable[Node]) -> list[dict[str, Any]]:
    running: dict[int, list[str]] = {}
    for node in nodes:
        running.setdefault(node.image or 0, []).append(node.name)
    held = {name: next(iter(holders(snapshots, name)), None) for name in channels(snapshots)}
    rows = [
        {
            "id": each.id,
            "version": each.version,
            "model": each.model,
            "size_gb": round(each.size_gb, 2),
            "runs_on": running.get(each.id, []),
            "holds": [name for name, holder in held.items() if holder is not None and holder.id == each.id],
        }
        for each in snapshots
    ]
    return [row for row in rows if row["runs_on"] or row["holds"]]


def look(options: argparse.Namespace, cloud: Cloud, asking: Callable[[str, Way], Told] = ask) -> Status:
    """Asks the cloud, then every node that runs, all at once. Raises BakeError if the cloud cannot be asked."""
    domain = options.domain or find_domain(options.folder)
    way = read_way(options, domain)
    found, types, now = read_deployment(cloud, options.deployment), cloud.server_types(), datetime.now(UTC)
    versions = {each.id: each.version for each in found.snapshots}

    def told_by(server: BoundServer) -> Told | None:
        if server.status != "running":
            return Told(f"it is {server.status}")
        addresses = own_addresses(server)
        if way is None:
            return None
        return asking(addresses[0], way) if addresses else Told("it has no address of its own")

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        answers = list(pool.map(told_by, found.servers))
    nodes = [
        _node(server, found, price_of_server(server, types, "hourly"), versions, told, now)
        for server, told in zip(found.servers, answers, strict=True)
    ]
    return Status(options.deployment, domain, nodes, _addresses(found), _snapshots(found.snapshots, nodes))


def _age(age_s: float) -> str:
    days, hours, minutes = int(age_s // 86400), int(age_s // 3600 % 24), int(age_s // 60 % 60)
    return f"{days} d {hours} h" if days else f"{hours} h {minutes} min"


def _or(value: object | None, otherwise: str = "?") -> str:
    return otherwise if value is None else str(value)


def _lines_of_nodes(nodes: Iterable[Node]) -> list[str]:
    heads = "node id image version type location state age own_addresses holds €/h ready"
    rows: list[tuple[object, ...]] = [tuple(head.replace("_", " ") for head in heads.split())]
    rows += [
        (
            each.name,
            each.id,
            _or(each.image, "gone"),
            each.version or "?",
            each.server_type,
            each.location,
            each.state,
            _age(each.age_s),
            " ".join(each.addresses) or "none",
            " ".join(each.floating) or "-",
            _or(each.eur_per_hour),
            "not asked" if each.told is None else each.told.problem or "yes",
        )
        for each in nodes
    ]
    return table(rows)


def _lines_of_reports(nodes: Iterable[Node]) -> list[str]:
    rows: list[tuple[object, ...]] = [
        ("node", "certificate", "first answer", "model", "image says", "audit", "failed units", "not told")
    ]
    for each in nodes:
        told = each.told
        if told is None or told.certificate_days is None:
            continue
        days = f"{told.certificate_days:.0f} days left"
        first = "-" if told.first_answer_s is None else f"{told.first_answer_s:.1f} s"
        if told.report is None:
            rows.append((each.name, days, first, "-", "-", "-", "-", told.silence or ""))
            continue
        report = told.report
        clean = {None: "none made", 0: "clean"}.get(report.audit_findings, f"{report.audit_findings} findings")
        units = ", ".join(report.failed_units) or "none"
        rows.append((each.name, days, first, _or(report.model), _or(report.version), clean, units, told.silence or ""))
    return table(rows)


def lines(status: Status) -> list[str]:
    """For a person."""
    told = _lines_of_nodes(status.nodes) or [f"there is no node of {status.deployment}"]
    parts = [told, _lines_of_reports(status.nodes)]
    parts.append(
        table(
            [
                ("address", "name", "leads to", "protected"),
                *(
                    (each["address"], each["name"], each["leads_to"] or "nobody", "yes" if each["protected"] else "no")
                    for each in status.addresses
                ),
            ]
        )
    )
    parts.append(
        table(
            [
                ("snapshot", "version", "model", "GB", "runs on", "holds"),
                *(
                    (
                        each["id"],
                        each["version"] or "?",
                        each["model"] or "?",
                        f"{each['size_gb']:.2f}",
                        " ".join(each["runs_on"]) or "-",
                        " ".join(each["holds"]) or "-",
                    )
                    for each in status.snapshots
                ),
            ]
        )
    )
    if status.domain is None and status.nodes:
        parts.append(["the nodes were not asked: Terraform's variable files have no domain; name it with --domain"])
    return "\n\n".join("\n".join(part) for part in parts if part).split("\n")


def _parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="status.py",
        description=__doc__,
        epilog="example: MONITORING_PASSWORD=… .venv/bin/python scripts/status.py --monitoring-user operator",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_place(parser)
    add_options(parser)
    parser.add_argument("--json", action="store_true", help="print the result as JSON, for programs")
    return parser.parse_args(words)


def main(words: list[str]) -> int:
    """Looks and tells; the boundary where errors become lines."""
    options = _parse(words)
    try:
        status = look(options, Cloud(find_access()))
    except BakeError as error:
        print(f"error: {error}" + (f"\n  {error.hint}" if error.hint else ""), file=sys.stderr)
        return _BLIND
    except KeyboardInterrupt:
        return 130  # as a shell tells it
    if options.json:
        nodes = [{**asdict(each), "ready": each.ready} for each in status.nodes]
        print(json.dumps({**asdict(status), "nodes": nodes, "well": status.well}, indent=1))
    else:
        print("\n".join(lines(status)))
    return 0 if status.well else _NOT_READY


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
