"""Owns how the cloud's price list is read: what a server, an address and a gigabyte cost, net and gross, in euros."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Price:
    """Euros; for an hour or a month, as who asked for it knows."""

    net_eur: float
    gross_eur: float

    def times(self, count: float) -> "Price":
        """The price of so many."""
        return Price(self.net_eur * count, self.gross_eur * count)


def read_price(told: Mapping[str, Any]) -> Price:
    """A price as the API has it, in strings of decimals."""
    return Price(float(told["net"]), float(told["gross"]))


def price_of_type(prices: Iterable[Mapping[str, Any]] | None, location: str, period: str) -> Price | None:
    """What a server type costs at a location, ``hourly`` or ``monthly``; None where the list has left it out."""
    return next((read_price(each[f"price_{period}"]) for each in prices or [] if each["location"] == location), None)


def price_of_address(pricing: Mapping[str, Any], group: str, kind: str, location: str) -> Price | None:
    """What an address costs a month; the group is ``floating_ips`` or ``primary_ips``, the kind ipv4 or ipv6."""
    prices = next((each["prices"] for each in pricing.get(group, []) if each["type"] == kind), None)
    return price_of_type(prices, location, "monthly")


def price_per_gb_month(pricing: Mapping[str, Any], what: str = "image") -> Price:
    """What a gigabyte costs a month: of a snapshot (``image``) or of a ``volume``."""
    return read_price(pricing[what]["price_per_gb_month"])
