#!/usr/bin/env python3
"""Tells whether what runs is what should: plan, image, nodes, price. `drift.py --help`; fit for cron.

Exit code 0 if nothing differs, 1 with a line for each thing that does, 2 for wrong usage, 3 if it could not look.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

try:
    from scripts.bake.answers import given
    from scripts.bake.channels import tfvars_file
    from scripts.bake.cloud import Cloud, find_access
    from scripts.bake.errors import BakeError, Refused
    from scripts.bake.prices import read_price
    from scripts.bake.runs import read_json
    from scripts.bake.snapshots import DEFAULT_CHANNEL, Snapshot, holders, is_channel_name
    from scripts.deployment import add_place, own_servers
except ModuleNotFoundError as error:
    sys.exit(f"error: Python has no module {error.name}; run `make bake`, which sets up .venv, and use its Python")

_PLAN_TIMEOUT_S = 600
_DRIFTED, _BLIND = 1, 3  # 2 is argparse's own, for wrong usage
_HARMLESS = ("no-op", "read")


@dataclass(frozen=True)
class Drift:
    """One thing that is not as it should be."""

    what: str  # plan, image, file, nodes or price
    told: str


@dataclass(frozen=True)
class Node:
    """A server of a deployment, as the cloud has it."""

    name: str
    image: int | None
    server_type: str
    location: str
    status: str


def read_plan(lines: Iterable[str]) -> Iterator[Drift]:
    """What Terraform would change, from ``terraform plan -json``, a JSON document a line.

    https://developer.hashicorp.com/terraform/internals/machine-readable-ui
    """
    for line in lines:
        try:
            told = json.loads(line)
        except ValueError:
            continue  # a warning of the program itself, before it speaks JSON
        change = told.get("change") or {}
        if told.get("type") == "planned_change" and change.get("action") not in _HARMLESS:
            yield Drift("plan", f"{change['resource']['addr']}: {change['action']}")


def compare_image(
    snapshots: list[Snapshot], channel: str, file_image: int | None, nodes: Iterable[Node]
) -> Iterator[Drift]:
    """The channel's holder against Terraform's file and what the nodes were made from."""
    held = next(iter(holders(snapshots, channel)), None)
    if held is None:
        yield Drift("image", f"nobody holds the channel {channel}")
        return
    if file_image != held.id:
        yield Drift("file", f"Terraform's file names image {file_image or 'none'}, {channel} names {held.id}")
    versions = {each.id: each.version for each in snapshots}
    for node in nodes:
        if node.image != held.id:
            runs = f"{node.image} ({versions.get(node.image or 0, 'not of this product')})"
            yield Drift("image", f"{node.name} runs image {runs}, {channel} names {held.id} ({held.version})")


def compare_nodes(nodes: list[Node]) -> Iterator[Drift]:
    """One node that runs; a second one is there while a rollout is on, or after one that failed."""
    if len(nodes) != 1:
        yield Drift("nodes", f"there are {len(nodes)} nodes: {', '.join(node.name for node in nodes) or 'none'}")
    for node in nodes:
        if node.status != "running":
            yield Drift("nodes", f"{node.name} is {node.status}")


def compare_prices(
    told_eur: float | None, nodes: Iterable[Node], prices: dict[tuple[str, str], float]
) -> Iterator[Drift]:
    """The price that the cost metric counts with against the price list; nobody told one, nothing is compared."""
    for node in nodes:
        listed = prices.get((node.server_type, node.location))
        if told_eur is not None and listed is not None and abs(told_eur - listed) > 0.00005:
            yield Drift(
                "price", f"price_eur_per_hour is {told_eur}, {node.server_type} costs {listed} at {node.location}"
            )


def list_nodes(cloud: Cloud, deployment: str) -> list[Node]:
    """The deployment's servers, by their labels. Raises BakeError."""
    return [
        Node(
            given(each.name),
            None if each.image is None else each.image.id,
            given(given(each.server_type).name),
            given(given(each.location).name),
            given(each.status),
        )
        for each in own_servers(cloud, deployment)
    ]


def list_prices(cloud: Cloud) -> dict[tuple[str, str], float]:
    """Euros net an hour, by type and location. Raises BakeError."""
    return {
        (given(each.name), price["location"]): read_price(price["price_hourly"]).net_eur
        for each in cloud.server_types()
        for price in each.prices or []
    }


def run_terraform(program: str, folder: Path, *words: str) -> list[str]:
    """Lines of a command of Terraform. Raises Refused with its own words if it fails."""
    access = find_access()  # Terraform knows nothing of the hcloud command's contexts
    environment = {**os.environ, "HCLOUD_TOKEN": access.token, "HCLOUD_ENDPOINT": access.endpoint}
    command = [program, f"-chdir={folder}", *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PLAN_TIMEOUT_S, env=environment)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Refused(
            f"{program} cannot be run: {error}", "install Terraform or OpenTofu, or name it: --program"
        ) from error
    if done.returncode not in (0, 2):
        said = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        errors = [json.loads(line)["@message"] for line in said if line.startswith("{") and '"error"' in line]
        missing = any(re.search(r"\b(terraform|tofu) init\b", line) for line in said)
        raise Refused(
            f"terraform {words[0]} failed: {(errors or said or ['it does not say why'])[0]}",
            f"terraform -chdir={folder} init" if missing else f"terraform -chdir={folder} {words[0]} tells all of it",
        )
    return done.stdout.splitlines()


def look(options: argparse.Namespace, cloud: Cloud, terraform: Callable[..., list[str]]) -> list[Drift]:
    """Everything that differs. Raises BakeError if something cannot be looked at."""
    plan = terraform(
        options.program, options.folder, "plan", "-json", "-input=false", "-lock=false", "-detailed-exitcode"
    )
    values = [read_json(path) or {} for path in sorted(options.folder.glob("*.auto.tfvars.json"))]
    named = {name: value for told in values for name, value in told.items()}
    kept = read_json(tfvars_file(options.folder, options.channel)) or {}
    nodes = list_nodes(cloud, options.deployment)
    return [
        *read_plan(plan),
        *compare_image(cloud.snapshots(), options.channel, kept.get("image_id"), nodes),
        *compare_nodes(nodes),
        *compare_prices(options.price or named.get("price_eur_per_hour"), nodes, list_prices(cloud)),
    ]


def _parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="drift.py",
        description=__doc__,
        epilog="example for cron, which has no HCLOUD_TOKEN but the context of the hcloud command:\n"
        "  17 * * * * cd mini-llm && told=$(.venv/bin/python scripts/drift.py 2>&1)"
        ' || echo "$told" | mail -s drift me@example.org',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_place(parser)
    parser.add_argument("--channel", default=DEFAULT_CHANNEL, help=f"whose image should run ({DEFAULT_CHANNEL})")
    parser.add_argument("--price", type=float, help="euros an hour that the facts name, if terraform.tfvars has it")
    parser.add_argument("--program", default="terraform", help="terraform or tofu")
    parser.add_argument("--json", action="store_true", help="print the result as JSON, for programs")
    options = parser.parse_args(words)
    if not is_channel_name(options.channel):
        parser.error(f"--channel: {options.channel} is no name of a channel")
    return options


def main(words: list[str]) -> int:
    """Looks and tells; the boundary where errors become lines."""
    options = _parse(words)
    try:
        found = look(options, Cloud(find_access()), run_terraform)
    except BakeError as error:
        print(f"error: {error}" + (f"\n  {error.hint}" if error.hint else ""), file=sys.stderr)
        return _BLIND
    except KeyboardInterrupt:
        return 130  # as a shell tells it
    if options.json:
        print(json.dumps({"drift": [asdict(each) for each in found]}, indent=1))
    else:
        for each in found:
            print(f"{each.what:6} {each.told}")
        if not found:
            print("nothing differs")
    return _DRIFTED if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
