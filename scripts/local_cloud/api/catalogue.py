"""Owns what every account is born with: locations, server types and their prices, system images."""

from dataclasses import dataclass
from decimal import Decimal
from typing import Any

Document = dict[str, Any]

INCLUDED_TRAFFIC_BYTES = 20 * 1024**4
_VAT_RATE = Decimal("0.19")
# An hour costs so that a monthly price is reached within 26 days, which is about what the real price list does.
_BILLED_HOURS = 624


@dataclass(frozen=True)
class Location:
    """A site, as GET /locations shows it."""

    id: int
    name: str
    description: str
    country: str
    city: str
    latitude: float
    longitude: float
    network_zone: str
    datacenter: str

    def render(self) -> Document:
        """The document of the API."""
        return {
            "id": self.id,
            "name": self.name,
            "description": self.description,
            "country": self.country,
            "city": self.city,
            "latitude": self.latitude,
            "longitude": self.longitude,
            "network_zone": self.network_zone,
        }

    def render_datacenter(self) -> Document:
        """What servers and primary IPs held until July 2026, for clients from before."""
        return {
            "id": self.id,
            "name": self.datacenter,
            "description": f"{self.city} virtual DC",
            "location": self.render(),
            "server_types": {"supported": [], "available": [], "available_for_migration": []},
        }


def render_price(net: Decimal) -> Document:
    """A price in euros, with and without tax."""
    return {"net": f"{net:.10f}", "gross": f"{net * (1 + _VAT_RATE):.10f}"}


@dataclass(frozen=True)
class ServerType:
    """A size of server; memory and disk in GB, the price in euros a month without tax."""

    id: int
    name: str
    category: str
    cpu_type: str
    cores: int
    memory_gb: float
    disk_gb: int
    price_monthly: Decimal

    def render_prices(self, locations: tuple[Location, ...]) -> list[Document]:
        """What it costs, for each location."""
        return [
            {
                "location": location.name,
                "price_hourly": render_price(round(self.price_monthly / _BILLED_HOURS, 4)),
                "price_monthly": render_price(self.price_monthly),
                "included_traffic": INCLUDED_TRAFFIC_BYTES,
                "price_per_tb_traffic": render_price(Decimal(1)),
            }
            for location in locations
        ]

    def render(self, locations: tuple[Location, ...]) -> Document:
        """The document of the API."""
        offered = [
            {"id": location.id, "name": location.name, "deprecation": None, "available": True, "recommended": True}
            for location in locations
        ]
        return {
            "id": self.id,
            "name": self.name,
            "description": self.name.upper(),
            "category": self.category,
            "cores": self.cores,
            "memory": self.memory_gb,
            "disk": self.disk_gb,
            "deprecated": False,
            "deprecation": None,
            "prices": self.render_prices(locations),
            "storage_type": "local",
            "cpu_type": self.cpu_type,
            "architecture": "x86",
            "included_traffic": 0,
            "locations": offered,
        }


@dataclass(frozen=True)
class SystemImage:
    """An operating system that servers are made from; ``disk_size_gb`` is the smallest disk that it fits."""

    id: int
    name: str
    description: str
    os_flavor: str
    os_version: str
    disk_size_gb: int
    created: str

    def render(self) -> Document:
        """The document of the API."""
        return {
            "id": self.id,
            "type": "system",
            "status": "available",
            "name": self.name,
            "description": self.description,
            "image_size": None,
            "disk_size": self.disk_size_gb,
            "created": self.created,
            "created_from": None,
            "bound_to": None,
            "os_flavor": self.os_flavor,
            "os_version": self.os_version,
            "rapid_deploy": True,
            "protection": {"delete": False},
            "deprecated": None,
            "deprecation": None,
            "deleted": None,
            "labels": {},
            "architecture": "x86",
        }


@dataclass(frozen=True)
class Catalogue:
    """All of it; lookups take what clients send, an id in digits or a name."""

    locations: tuple[Location, ...]
    server_types: tuple[ServerType, ...]
    system_images: tuple[SystemImage, ...]

    def find_location(self, reference: str) -> Location | None:
        """The location with this id or name, or None."""
        return next((each for each in self.locations if reference in (each.name, str(each.id))), None)

    def find_server_type(self, reference: str) -> ServerType | None:
        """The server type with this id or name, or None."""
        return next((each for each in self.server_types if reference in (each.name, str(each.id))), None)

    def render_pricing(self) -> Document:
        """The document of GET /pricing."""
        monthly = {"ipv4": Decimal("0.50"), "ipv6": Decimal(0)}
        floating = {"ipv4": Decimal("3.00"), "ipv6": Decimal("1.00")}
        names = [location.name for location in self.locations]
        return {
            "currency": "EUR",
            "vat_rate": f"{_VAT_RATE * 100:.6f}",
            "image": {"price_per_gb_month": render_price(Decimal("0.014"))},
            "floating_ip": {"price_monthly": render_price(floating["ipv4"])},
            "floating_ips": [
                {
                    "type": kind,
                    "prices": [{"location": name, "price_monthly": render_price(net)} for name in names],
                }
                for kind, net in floating.items()
            ],
            "primary_ips": [
                {
                    "type": kind,
                    "prices": [
                        {
                            "location": name,
                            "price_hourly": render_price(round(net / _BILLED_HOURS, 4)),
                            "price_monthly": render_price(net),
                        }
                        for name in names
                    ],
                }
                for kind, net in monthly.items()
            ],
            "server_backup": {"percentage": "20.0000000000"},
            "server_types": [
                {"id": each.id, "name": each.name, "prices": each.render_prices(self.locations)}
                for each in self.server_types
            ],
            "load_balancer_types": [],
            "volume": {"price_per_gb_month": render_price(Decimal("0.0440"))},
            "traffic": {"price_per_tb": render_price(Decimal(0))},
        }


CATALOGUE = Catalogue(
    locations=(
        Location(
            1, "fsn1", "Falkenstein DC Park 1", "DE", "Falkenstein", 50.47612, 12.370071, "eu-central", "fsn1-dc14"
        ),
        Location(2, "nbg1", "Nuremberg DC Park 1", "DE", "Nuremberg", 49.452102, 11.076665, "eu-central", "nbg1-dc3"),
        Location(3, "hel1", "Helsinki DC Park 1", "FI", "Helsinki", 60.169855, 24.938379, "eu-central", "hel1-dc2"),
    ),
    server_types=(
        ServerType(96, "ccx13", "General Purpose", "dedicated", 2, 8.0, 80, Decimal("42.99")),
        ServerType(109, "cpx22", "Regular Performance", "shared", 2, 4.0, 80, Decimal("19.49")),
        ServerType(110, "cpx32", "Regular Performance", "shared", 4, 8.0, 160, Decimal("35.49")),
        ServerType(111, "cpx42", "Regular Performance", "shared", 8, 16.0, 320, Decimal("69.49")),
        ServerType(114, "cx23", "Cost-Optimized", "shared", 2, 4.0, 40, Decimal("5.49")),
        ServerType(115, "cx33", "Cost-Optimized", "shared", 4, 8.0, 80, Decimal("8.49")),
        ServerType(116, "cx43", "Cost-Optimized", "shared", 8, 16.0, 160, Decimal("15.99")),
        ServerType(117, "cx53", "Cost-Optimized", "shared", 16, 32.0, 320, Decimal("29.49")),
    ),
    system_images=(SystemImage(302, "debian-13", "Debian 13", "debian", "13", 5, "2025-08-12T08:00:00Z"),),
)
