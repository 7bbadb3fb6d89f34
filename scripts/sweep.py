#!/usr/bin/env python3
"""Removes what an apply that was killed has left: resources of a deployment that stand in no state. `sweep.py --help`.

Without `--yes` it only tells. Exit code 0 if nothing is (or was) left, 1 if something is, 2 for wrong usage, 3 if it
could not look.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

try:
    from scripts.bake.answers import given
    from scripts.bake.cloud import Cloud, find_access
    from scripts.bake.errors import BakeError, Refused
    from scripts.bake.snapshots import SELECTOR
    from scripts.deployment import add_place, held_by
    from scripts.drift import run_terraform
except ModuleNotFoundError as error:
    sys.exit(f"error: Python has no module {error.name}; run `make bake`, which sets up .venv, and use its Python")

_LEFT, _BLIND = 1, 3  # 2 is argparse's own, for wrong usage
_DELETED_WITHIN_S = 120.0
# What Terraform's types are called at the cloud, in the order in which they can go.
_KINDS = {
    "hcloud_server": "servers",
    "hcloud_firewall": "firewalls",
    "hcloud_network": "networks",
    "hcloud_ssh_key": "ssh_keys",
    "hcloud_floating_ip": "floating_ips",
}
# Records have no number of their own: zone, name and type are what they are known by.
_RECORDS = "hcloud_zone_rrset"


@dataclass(frozen=True)
class Resource:
    """Something of the deployment at the cloud; ``holds`` are floating addresses that lead to it."""

    type: str
    id: int | str
    name: str
    holds: tuple[str, ...] = ()
    protected: bool = False


def require_rest(program: str, folder: Path, terraform: Callable[..., list[str]]) -> None:
    """Raises Refused while an apply holds the state: what that has made may not stand there yet."""
    try:
        terraform(program, folder, "plan", "-json", "-refresh=false", "-input=false", "-lock=true")
    except Refused as refusal:
        if "state lock" in str(refusal):
            raise Refused(
                "an apply is under way, or one that was killed has left its lock",
                "let it end; where none runs: terraform force-unlock, which its own message explains",
            ) from refusal
        # Whatever else a plan may fail by, nobody else is at work.


def _id_of(kind: str, attributes: dict[str, Any]) -> int | str:
    if kind == _RECORDS:
        return "/".join(attributes[name] for name in ("zone", "name", "type"))
    return int(attributes["id"])


def read_state(text: str) -> set[tuple[str, int | str]]:
    """Type and id of all that a state knows, what is to be deleted yet as well. Raises Refused.

    https://developer.hashicorp.com/terraform/language/state: the form of ``terraform state pull``.
    """
    try:
        document = json.loads(text or "{}")
        return {
            (resource["type"], _id_of(resource["type"], instance["attributes"]))
            for resource in document.get("resources", [])
            if resource["type"] in (*_KINDS, _RECORDS)
            for instance in resource["instances"]
        }
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise Refused("the state is none that this program can read", "terraform state pull") from error


def list_resources(cloud: Cloud, deployment: str) -> list[Resource]:
    """What bears the deployment's labels. Raises BakeError."""
    selector = f"{SELECTOR},deployment={deployment}"
    addresses = cloud.labelled("floating_ips", selector)
    numbered = [
        Resource(
            kind,
            each.id,
            each.name,
            tuple(given(one.ip) for one in held_by(each, addresses)) if kind == "hcloud_server" else (),
            bool((getattr(each, "protection", None) or {}).get("delete")),
        )
        for kind, collection in _KINDS.items()
        for each in (addresses if kind == "hcloud_floating_ip" else cloud.labelled(collection, selector))
    ]
    records = [
        (f"{zone}/{name}/{of_type}", f"{name}.{zone} {of_type}") for zone, name, of_type in cloud.records(selector)
    ]
    # First: what still led to an address that is given up would lead to whoever gets it next.
    return [*(Resource(_RECORDS, place, name) for place, name in records), *numbered]


def find_left(resources: Iterable[Resource], known: set[tuple[str, int | str]]) -> list[Resource]:
    """What stands in no state. Raises Refused where that is not a leftover but another state's deployment."""
    resources = list(resources)
    for each in resources:
        if each.holds and (each.type, each.id) not in known:
            raise Refused(
                f"{each.name} stands not in this state, but {', '.join(each.holds)} leads to it",
                "it serves: is this the right folder, and the right --deployment?",
            )
    return [each for each in resources if (each.type, each.id) not in known]


def remove(cloud: Cloud, left: Iterable[Resource]) -> Iterator[Resource]:
    """Deletes them; yields each that is gone. Raises BakeError."""
    for each in left:
        end_s = time.time() + _DELETED_WITHIN_S
        if isinstance(each.id, str):
            zone, name, of_type = each.id.split("/")
            cloud.delete_record(zone, name, of_type, end_s)
        else:
            cloud.delete_labelled(_KINDS[each.type], each.id, each.name, end_s)
        yield each


def _parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="sweep.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_place(parser)
    parser.add_argument("--program", default="terraform", help="terraform or tofu")
    parser.add_argument("--yes", action="store_true", help="remove it, not only tell")
    return parser.parse_args(words)


def main(words: list[str]) -> int:
    """Looks, tells and removes; the boundary where errors become lines."""
    options = _parse(words)
    try:
        cloud = Cloud(find_access())
        require_rest(options.program, options.folder, run_terraform)
        # First the cloud, then the state: what is made in between is in neither's way.
        resources = list_resources(cloud, options.deployment)
        known = read_state("\n".join(run_terraform(options.program, options.folder, "state", "pull")))
        left = find_left(resources, known)
        kept = [each for each in left if each.protected]
        left = [each for each in left if not each.protected]
        for each in kept:
            print(
                f"stays, for it is protected: {_describe(each)}; OPERATING.md tells how to take it into the state again"
            )
        for each in left if not options.yes else ():
            print(f"left: {_describe(each)}")
        for each in remove(cloud, left) if options.yes else ():
            print(f"removed: {_describe(each)}")
    except BakeError as error:
        print(f"error: {error}" + (f"\n  {error.hint}" if error.hint else ""), file=sys.stderr)
        return _BLIND
    except KeyboardInterrupt:
        return 130  # as a shell tells it
    if not left and not kept:
        print("nothing is left that stands in no state")
    return _LEFT if kept or (left and not options.yes) else 0


def _describe(each: Resource) -> str:
    return f"{each.type.removeprefix('hcloud_').replace('_', ' ')} {each.name} ({each.id})"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
