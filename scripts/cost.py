#!/usr/bin/env python3
"""Shows what a deployment costs: euros a month by resource, and euros by 1,000 tokens beside hosted models.

Prices are the cloud's own list. The tokens come from the node's Prometheus (--monitoring-user), or from --tokens-per-s.
Exit code 0, 2 for wrong usage, 3 if the cloud could not be asked or a price is not known.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

try:
    from hcloud.server_types import BoundServerType
    from hcloud.servers import BoundServer

    from scripts.bake.answers import given
    from scripts.bake.cloud import Cloud, find_access
    from scripts.bake.console import table
    from scripts.bake.errors import BakeError, Refused
    from scripts.bake.housekeeping import price_of_server
    from scripts.bake.prices import Price, price_of_address, price_of_type, price_per_gb_month
    from scripts.bake.runs import write_json
    from scripts.deployment import Deployment, add_place, find_domain, held_by, own_addresses, read_deployment
    from scripts.node import NotTold, Way, add_options, query, read_way
except ModuleNotFoundError as error:
    sys.exit(f"error: Python has no module {error.name}; run `make bake`, which sets up .venv, and use its Python")

_BLIND = 3  # 2 is argparse's own, for wrong usage
_HOURS_A_MONTH = 730.0
_HOSTED = ROOT / "scripts" / "hosted_prices.json"
_TERRAFORM_FILE = "prices.auto.tfvars.json"
# Names of service/metrics.py. The engine has one slot, so tokens by its busy seconds are what it does at full use.
_GENERATED = "sum(increase(llm_tokens_generated_total[1d]))"
_PROMPT = "sum(increase(llm_prompt_tokens_total[1d]))"
_SPEED = f"{_GENERATED} / sum(increase(llm_inference_duration_seconds_sum[1d]))"


@dataclass(frozen=True)
class Row:
    """A resource and what it costs a month; None where the price list does not have it."""

    what: str
    name: str
    price: Price | None


@dataclass(frozen=True)
class Use:
    """What a node has done: tokens of the last day or of its whole life, if that is shorter, and how fast it is."""

    tokens_per_s: float | None
    generated: float | None
    prompt: float | None
    hours: float
    silence: str | None  # why the node did not tell


@dataclass(frozen=True)
class Hosted:
    """What a hosted model would have taken for the same tokens, and where its price was seen."""

    provider: str
    model: str
    eur_per_1000_tokens: float
    date: str
    source: str


@dataclass(frozen=True)
class Cost:
    """Everything that is shown, in euros; by 1,000 tokens means generated ones, with the prompts that led to them."""

    deployment: str
    rows: list[Row]
    total: Price
    use: Use
    prompt_per_generated: float
    prompt_share_is_measured: bool
    eur_per_1000_tokens_full_use: float | None
    eur_per_1000_tokens_last_day: float | None
    hosted: list[Hosted]
    usd_per_eur: float
    rate_date: str


def price_rows(found: Deployment, types: list[BoundServerType], pricing: dict[str, Any]) -> Iterator[Row]:
    """Every resource of the deployment, and the product's snapshots."""
    places = {each.id: given(given(each.location).name) for each in found.servers}
    for server in found.servers:
        price = price_of_server(server, types, "monthly")
        yield Row(f"server {given(server.server_type).name}", given(server.name), price)
    for own in found.primary_ips:
        place = places.get(own.assignee_id) or (given(own.location.name) if own.location else "")
        price = price_of_address(pricing, "primary_ips", given(own.type), place)
        yield Row(f"primary {own.type}", str(own.ip), price)
    for kept in found.floating_ips:
        price = price_of_address(pricing, "floating_ips", given(kept.type), given(given(kept.home_location).name))
        yield Row(f"floating {kept.type}", str(kept.ip), price)
    for volume in found.volumes:
        size_gb = given(volume.size)
        price = price_per_gb_month(pricing, "volume").times(size_gb)
        yield Row(f"volume {size_gb} GB", given(volume.name), price)
    per_gb = price_per_gb_month(pricing)
    for each in found.snapshots:
        name = f"{each.id} {each.version}".rstrip()
        yield Row(f"snapshot {each.size_gb:.2f} GB", name, per_gb.times(each.size_gb))


def price_list(types: list[BoundServerType], pricing: dict[str, Any]) -> dict[str, Any]:
    """The price list as Terraform's variable monthly_prices_eur takes it, net."""
    places = sorted({price["location"] for each in types for price in each.prices or []})
    groups = {
        "primary_ipv4": ("primary_ips", "ipv4"),
        "floating_ipv4": ("floating_ips", "ipv4"),
        "floating_ipv6": ("floating_ips", "ipv6"),
    }

    def by_place(price_at: Callable[[str], Price | None]) -> dict[str, float]:
        found = {place: price_at(place) for place in places}
        return {place: price.net_eur for place, price in found.items() if price is not None}

    def of_type(prices: list[dict[str, Any]] | None) -> dict[str, float]:
        return by_place(lambda place: price_of_type(prices, place, "monthly"))

    return {
        "servers": {each.name: of_type(each.prices) for each in types},
        **{name: by_place(partial(price_of_address, pricing, *group)) for name, group in groups.items()},
    }


def choose_node(found: Deployment) -> BoundServer | None:
    """The node that serves: who holds an address, or the only one."""
    holding = [each for each in found.servers if held_by(each, found.floating_ips)]
    return next(iter(holding or found.servers), None)


def measure(node: BoundServer | None, way: Way | None, now: datetime) -> Use:
    """What the node's Prometheus knows; without an answer the reason."""
    hours = 24.0 if node is None else min(24.0, (now - given(node.created)).total_seconds() / 3600)
    if node is None:
        return Use(None, None, None, hours, "there is no node")
    if way is None or not way.user:
        return Use(None, None, None, hours, "it was not asked: --monitoring-user, and --domain if no file has it")
    addresses = own_addresses(node)
    try:
        if not addresses:
            raise NotTold("it has no address of its own")
        speed, generated, prompt = (query(addresses[0], way, each) for each in (_SPEED, _GENERATED, _PROMPT))
    except NotTold as reason:
        return Use(None, None, None, hours, str(reason))
    return Use(speed or None, generated, prompt, hours, None)


def read_hosted(prompt_per_generated: float, path: Path = _HOSTED) -> tuple[list[Hosted], dict[str, Any]]:
    """Hosted models by their price for 1,000 generated tokens and their prompts, cheapest first; the exchange rate."""
    told = json.loads(path.read_text())
    rates = {"EUR": 1.0, "USD": told["exchange"]["usd_per_eur"]}
    priced = [
        Hosted(
            each["provider"],
            each["model"],
            (each["output_per_million"] + each["input_per_million"] * prompt_per_generated)
            / 1000
            / rates[each["currency"]],
            each["date"],
            each["source"],
        )
        for each in told["models"]
    ]
    return sorted(priced, key=lambda each: each.eur_per_1000_tokens), told["exchange"]


def count_up(
    found: Deployment, types: list[BoundServerType], pricing: dict[str, Any], use: Use, assumed_prompt: float
) -> Cost:
    """What it all comes to. Raises Refused if the price list is not in euros."""
    if pricing["currency"] != "EUR":
        raise Refused(f"the cloud's price list is in {pricing['currency']}, not in euros")
    rows = list(price_rows(found, types, pricing))
    known = [row.price for row in rows if row.price is not None]
    total = Price(sum(each.net_eur for each in known), sum(each.gross_eur for each in known))
    measured = use.prompt is not None and bool(use.generated)
    prompt = (use.prompt or 0.0) / (use.generated or 1.0) if measured else assumed_prompt
    hosted, exchange = read_hosted(prompt)
    month_at_full_use = (use.tokens_per_s or 0.0) * 3600 * _HOURS_A_MONTH
    spent = total.net_eur / _HOURS_A_MONTH * use.hours
    return Cost(
        found.name,
        rows,
        total,
        use,
        prompt,
        measured,
        total.net_eur / month_at_full_use * 1000 if month_at_full_use else None,
        spent / use.generated * 1000 if use.generated else None,
        hosted,
        exchange["usd_per_eur"],
        exchange["date"],
    )


def _eur(value: float | None, digits: int = 2) -> str:
    return "unknown" if value is None else f"{value:.{digits}f}"


def lines(cost: Cost) -> list[str]:
    """For a person."""
    priced = [(row.what, row.name, row.price) for row in cost.rows]
    rows: list[tuple[object, ...]] = [("resource", "name", "€/month net", "gross")]
    for what, name, price in [*priced, ("all", "", cost.total)]:
        net_eur, gross_eur = (None, None) if price is None else (price.net_eur, price.gross_eur)
        rows.append((what, name, _eur(net_eur), _eur(gross_eur)))
    use = cost.use
    speed = "unknown" if use.tokens_per_s is None else f"{use.tokens_per_s:.1f} tokens/s"
    day = "unknown" if use.generated is None else f"{use.generated:.0f} tokens in {use.hours:.0f} h"
    share = "as measured" if cost.prompt_share_is_measured else "as assumed: --prompt-tokens"
    tokens: list[tuple[object, ...]] = [
        ("1,000 tokens", "€ net", "by"),
        (f"{cost.deployment}, full use", _eur(cost.eur_per_1000_tokens_full_use, 5), speed),
        (f"{cost.deployment}, last day", _eur(cost.eur_per_1000_tokens_last_day, 5), day),
        *(
            (f"{each.provider}: {each.model}", _eur(each.eur_per_1000_tokens, 5), f"price of {each.date}")
            for each in cost.hosted
        ),
    ]
    return [
        *table(rows),
        "",
        *table(tokens),
        f"1,000 generated tokens and the {1000 * cost.prompt_per_generated:.0f} of their prompts, {share}; "
        f"{cost.usd_per_eur} dollars a euro ({cost.rate_date}); sources in scripts/{_HOSTED.name}",
        *([f"the node did not tell its tokens: {use.silence}"] if use.silence else []),
    ]


def _positive(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError("must be a number above 0")
    return number


def _parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="cost.py",
        description=__doc__,
        epilog="example: MONITORING_PASSWORD=… .venv/bin/python scripts/cost.py --monitoring-user operator",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_place(parser)
    parser.add_argument("--tokens-per-s", type=_positive, help="speed at full use, instead of the measured one")
    parser.add_argument(
        "--prompt-tokens", type=_positive, default=1.0, help="by generated token, where nothing is measured (1)"
    )
    parser.add_argument(
        "--terraform", action="store_true", help=f"write the price list to {_TERRAFORM_FILE}, for monthly_cost_eur"
    )
    add_options(parser)
    parser.add_argument("--json", action="store_true", help="print the result as JSON, for programs")
    return parser.parse_args(words)


def look(options: argparse.Namespace, cloud: Cloud, asking: Callable[..., Use] = measure) -> Cost:
    """Asks the cloud and the node. Raises BakeError if the cloud cannot be asked."""
    way = read_way(options, options.domain or find_domain(options.folder))
    found, types, pricing = read_deployment(cloud, options.deployment), cloud.server_types(), cloud.pricing()
    if options.terraform:
        path = options.folder / _TERRAFORM_FILE
        try:
            write_json(path, {"monthly_prices_eur": price_list(types, pricing)})
        except OSError as error:
            raise Refused(f"{path} cannot be written: {error.strerror}") from error
    use = asking(choose_node(found), way, datetime.now(UTC))
    if options.tokens_per_s:
        use = Use(options.tokens_per_s, use.generated, use.prompt, use.hours, use.silence)
    return count_up(found, types, pricing, use, options.prompt_tokens)


def main(words: list[str]) -> int:
    """Looks and tells; the boundary where errors become lines."""
    options = _parse(words)
    try:
        cost = look(options, Cloud(find_access()))
    except BakeError as error:
        print(f"error: {error}" + (f"\n  {error.hint}" if error.hint else ""), file=sys.stderr)
        return _BLIND
    except KeyboardInterrupt:
        return 130  # as a shell tells it
    print(json.dumps(asdict(cost), indent=1) if options.json else "\n".join(lines(cost)))
    unknown = [row.name for row in cost.rows if row.price is None]
    if unknown:
        print(f"error: the price list has no price for {', '.join(unknown)}", file=sys.stderr)
    return _BLIND if unknown else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
