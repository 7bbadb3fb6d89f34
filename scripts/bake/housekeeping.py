"""Owns what stays and what it costs: prune, and the cost of what is kept."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hcloud.server_types import BoundServerType
from hcloud.servers import BoundServer

from scripts.bake.answers import given
from scripts.bake.cloud import Cloud
from scripts.bake.leftovers import find_leftovers
from scripts.bake.prices import Price, price_of_type, price_per_gb_month
from scripts.bake.snapshots import Snapshot, keep_reasons

NEWEST_KEPT = 3


@dataclass(frozen=True)
class Pruning:
    """What goes and what stays, and what a month of that which goes costs, in euros net."""

    going: list[Snapshot]
    staying: list[tuple[Snapshot, str]]
    saves_eur_per_month: float

    def lines(self) -> list[str]:
        """For a person."""
        return [
            *(f"stays  {each.id}  {each.layer:8}{each.version:28}{reason}" for each, reason in self.staying),
            *(f"goes   {each.id}  {each.layer:8}{each.version:28}{each.size_gb:.2f} GB" for each in self.going),
            f"saves {self.saves_eur_per_month:.2f} euros a month",
        ]


def plan_pruning(cloud: Cloud, newest: int, wanted_inputs: Collection[str]) -> Pruning:
    """Looks at every snapshot of the product."""
    snapshots = cloud.snapshots()
    reasons = keep_reasons(snapshots, _running(cloud), newest, wanted_inputs)
    going = [each for each in snapshots if each.id not in reasons]
    per_gb = price_per_gb_month(cloud.pricing()).net_eur
    return Pruning(
        going,
        [(each, reasons[each.id]) for each in snapshots if each.id in reasons],
        round(sum(each.size_gb for each in going) * per_gb, 4),
    )


def _running(cloud: Cloud) -> list[int]:
    return [given(each.image.id) for each in cloud.servers() if each.image is not None]


def prune(cloud: Cloud, plan: Pruning, newest: int, wanted_inputs: Collection[str]) -> list[Snapshot]:
    """Removes what goes, but for what got a reason to stay since it was shown. Returns what is gone."""
    gone = []
    for seen in plan.going:
        # All of them are looked at again for each: a bake, a promotion or a launch may be at work beside.
        again = plan_pruning(cloud, newest, wanted_inputs)
        if seen.id in {each.id for each in again.going}:
            cloud.delete_snapshot(seen)
            gone.append(seen)
    return gone


def price_of_server(server: BoundServer, types: Iterable[BoundServerType], period: str) -> Price | None:
    """What a server costs, ``hourly`` or ``monthly``; a type that is not sold any more may have left the list."""
    listed = {each.name: each.prices for each in types}
    own = given(server.server_type)
    prices = listed.get(own.name) or own.prices
    return price_of_type(prices, given(given(server.location).name), period)


def cost(cloud: Cloud, state: Path) -> dict[str, Any]:
    """Euros net a month of what this product keeps at the cloud, and of what dead runs left there."""
    per_gb = price_per_gb_month(cloud.pricing()).net_eur
    types = cloud.server_types()
    leftovers = find_leftovers(cloud, state)
    rows: list[dict[str, Any]] = [
        {
            "id": each.id,
            "what": f"{each.layer} snapshot",
            "version": each.version,
            "size_gb": round(each.size_gb, 3),
            "eur_per_month": round(each.size_gb * per_gb, 4),
        }
        for each in cloud.snapshots()
    ]
    images = {row["id"]: row["version"] for row in rows}
    rows += [
        {
            "id": each.id,
            "what": f"server {each.name} ({given(each.server_type).name})",
            "version": images[each.image.id],
            "size_gb": None,
            "eur_per_month": None if (price := price_of_server(each, types, "monthly")) is None else price.net_eur,
        }
        for each in cloud.servers()
        if each.image is not None and each.image.id in images
    ]
    return {
        "rows": rows,
        "eur_per_month": round(sum(float(row["eur_per_month"] or 0) for row in rows), 4),
        "price_per_gb_month_eur": per_gb,
        "left_by_dead_runs": leftovers.lines(),
    }
