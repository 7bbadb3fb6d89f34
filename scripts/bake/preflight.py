"""Owns what is looked at before anything is made or paid: tree, offers, disks, prices, limits that were hit."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hcloud.server_types import BoundServerType

from scripts.bake.answers import given
from scripts.bake.errors import Refused
from scripts.bake.inputs import Tree
from scripts.bake.prices import price_of_type, price_per_gb_month
from scripts.bake.runs import read_json, write_json
from scripts.bake.snapshots import shorten

# Where Hetzner's x86 types of the cheapest line stand; the order is the one in which they are tried.
_LOCATIONS = ("fsn1", "nbg1", "hel1")
_BAKES_TRIED = 4


@dataclass(frozen=True)
class Place:
    """A type at a location, with what it costs in euros net."""

    server_type: str
    location: str
    disk_gb: int
    eur_per_hour: float


@dataclass(frozen=True)
class Places:
    """Where the bake's server and the probe may stand, in the order in which they are tried."""

    bake: list[Place]
    probe: list[Place]


def find_places(
    offered: Iterable[BoundServerType], tree: Tree, locations: list[str], bake_type: str, node_type: str
) -> Places:
    """What is offered and fits. The bake's disk is never larger than the node's, or the image would not fit there.

    Raises Refused if nothing does, or a name is not one.
    """
    types = {given(each.name): each for each in offered if each.architecture == "x86"}
    for name in filter(None, (bake_type, node_type)):
        if name not in types:
            raise Refused(f"there is no server type {name} for x86", f"there are {', '.join(sorted(types))}")
    wanted = locations or list(_LOCATIONS)

    def places(chosen: Iterable[BoundServerType]) -> list[Place]:
        return [
            Place(given(each.name), location, given(each.disk), _prices(each, location)[0])
            for each in chosen
            for location in wanted
            if _is_offered(each, location, each.name in (bake_type, node_type))
        ]

    memory_gb = tree.model.memory_gb
    by_price = sorted(types.values(), key=lambda each: min((_prices(each, place)[1] for place in wanted), default=0))
    fitting = [each for each in by_price if given(each.memory) >= memory_gb and given(each.disk) >= tree.model.disk_gb]
    nodes = [types[node_type]] if node_type else fitting
    probe = places(nodes)[: _BAKES_TRIED * len(wanted)]
    if not probe:
        raise Refused(
            f"no server type with {memory_gb} GB of memory and a disk of {tree.model.disk_gb} GB is offered at "
            f"{', '.join(wanted)}, for the model {tree.model.name}",
            "name other locations (--location) or a type (--node-type)",
        )
    smallest_gb = min(place.disk_gb for place in probe)
    bakes = [types[bake_type]] if bake_type else [each for each in fitting if given(each.disk) <= smallest_gb]
    for each in bakes if bake_type else ():
        _check_disk(each, tree, smallest_gb)
    bake = places(bakes)[: _BAKES_TRIED * len(wanted)]
    if not bake:
        raise Refused(
            f"no server type to bake on is offered at {', '.join(wanted)}", "name others: --location, --server-type"
        )
    return Places(bake, probe)


def _check_disk(chosen: BoundServerType, tree: Tree, smallest_gb: int) -> None:
    disk_gb = given(chosen.disk)
    if disk_gb < tree.model.disk_gb:
        raise Refused(
            f"the disk of {chosen.name} has {disk_gb} GB, {tree.model.disk_gb} GB are needed", "name a larger type"
        )
    if disk_gb > smallest_gb:
        raise Refused(
            f"an image baked on {chosen.name} ({disk_gb} GB) does not fit on a node of {smallest_gb} GB",
            "bake on a type with a smaller disk (--server-type), or launch a larger one (--node-type)",
        )


def _prices(offered: BoundServerType, location: str) -> tuple[float, float]:
    hourly, monthly = (price_of_type(offered.prices, location, period) for period in ("hourly", "monthly"))
    return (hourly.net_eur if hourly else float("inf")), (monthly.net_eur if monthly else float("inf"))


def _is_offered(offered: BoundServerType, location: str, by_name: bool) -> bool:
    """Whether it can be had there; what is about to go only for who asked for it by name."""
    return any(
        each.location.name == location and each.available is not False and (by_name or each.deprecation is None)
        for each in offered.locations or []
    )


def price_of_bake(places: Places, servers: int, snapshot_gb: float, pricing: Mapping[str, Any]) -> dict[str, float]:
    """Euros net: once, for ``servers`` that bake and one probe (each a whole hour), and a month of the snapshot."""
    per_gb = price_per_gb_month(pricing).net_eur
    return {
        "once_eur": round(servers * places.bake[0].eur_per_hour + places.probe[0].eur_per_hour, 4),
        "monthly_eur": round(snapshot_gb * per_gb, 4),
    }


def check_tree(tree: Tree, dirty_allowed: bool) -> None:
    """Raises Refused if the tree is not what its commit says."""
    if tree.dirty and not dirty_allowed:
        shown = ", ".join(tree.dirty[:3]) + (f" and {len(tree.dirty) - 3} more" if len(tree.dirty) > 3 else "")
        raise Refused(
            f"the tree differs from its commit: {shown}",
            "commit it, or say --dirty: the image is then labelled so",
        )


def remember_limit(state: Path, project: str, servers: int, now_s: float) -> None:
    """Notes that the project's limit was hit with so many servers there: no API tells it beforehand."""
    kept = read_json(state / "limits.json") or {}
    write_json(state / "limits.json", {**kept, project: {"servers": servers, "at_s": round(now_s)}})


def warn_of_limit(state: Path, project: str, servers: int) -> str | None:
    """A line about a limit that an earlier run has hit with no more servers than there are now, or None."""
    hit = (read_json(state / "limits.json") or {}).get(project)
    if not hit or servers < hit["servers"]:
        return None
    return f"warning: with {hit['servers']} servers the project's limit was hit before, and {servers} are there now"


def forget_limit(state: Path, project: str) -> None:
    """A server could be made: the limit has been raised."""
    kept = read_json(state / "limits.json") or {}
    if kept.pop(project, None) is not None:
        write_json(state / "limits.json", kept)


def project_id(token: str) -> str:
    """A name for the project that tells nothing of its token."""
    return shorten(hashlib.sha256(b"mini-llm project " + token.encode()).hexdigest())[:12]
