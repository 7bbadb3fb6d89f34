"""Owns the words between the API and the machines behind it: what a server is made of, and what can be done to it."""

from dataclasses import dataclass
from typing import Literal, Protocol


@dataclass(frozen=True)
class MachineSpec:
    """All that a server needs at power-on; the API keeps it and hands it over each time.

    ``ipv4`` is the public address; ``ipv6_network`` the /64 whose address ``::1`` the server has; None where it has
    none. ``public_keys`` are OpenSSH lines for root. ``root_password`` is None if keys were given.
    """

    server_id: int
    name: str
    ipv4: str | None
    ipv6_network: str | None
    public_keys: tuple[str, ...]
    root_password: str | None
    user_data: str
    cores: int
    memory_gb: float
    location: str


@dataclass(frozen=True)
class FirewallRule:
    """One thing that a firewall lets through; ``networks`` are CIDRs, sources inwards and destinations outwards.

    ``ports`` are the first and the last one, None for protocols without any.
    """

    direction: Literal["in", "out"]
    protocol: Literal["tcp", "udp", "icmp", "esp", "gre"]
    networks: tuple[str, ...]
    ports: tuple[int, int] | None


@dataclass(frozen=True)
class PrivateLink:
    """A server's interface in a private network: its addresses, and what lies behind the network's gateway.

    ``ip_range`` is that of the network and ``subnet`` the part of it which ``ip`` is from, both CIDRs. ``routes`` are
    the network's own, each a destination (CIDR) and the member's address that what goes there is handed to.
    """

    network_id: int
    network_name: str
    ip: str
    alias_ips: tuple[str, ...]
    mac_address: str
    ip_range: str
    subnet: str
    gateway: str
    routes: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class RecordSet:
    """What DNS says of one name and one type, such as ``TXT``.

    ``name`` is whole, without a dot at its end; ``values`` are as in zone files, names in them relative to the zone
    unless a dot ends them.
    """

    name: str
    type: str
    ttl_s: int
    values: tuple[str, ...]


@dataclass(frozen=True)
class Zone:
    """A part of the DNS; ``record_sets`` hold a SOA of its own name, and no two of the same name and type."""

    name: str
    record_sets: tuple[RecordSet, ...]


class Machines(Protocol):
    """Servers and images by the ids that the API gave them; any method may be called from any thread.

    Two calls for the same server never overlap: the API locks it. Every method raises MachineFailed with one line
    for people if the host does not do what is asked; PoolFull, a kind of it, if the disk is full.
    """

    def create_disk(self, server_id: int, image: int | str) -> None:
        """Makes a server's disk from a snapshot (its id) or a system image (its name, such as ``debian-13``)."""
        ...

    def delete_disk(self, server_id: int) -> None:
        """Removes the disk of a server that is off; one that is not there is no error."""
        ...

    def start(self, spec: MachineSpec) -> None:
        """Powers on; returns once the machine's init runs, long before SSH answers."""
        ...

    def shutdown(self, server_id: int) -> None:
        """Presses the power button and returns at once; the server goes off when its own programs have ended."""
        ...

    def power_off(self, server_id: int) -> None:
        """Pulls the plug; returns once the machine is off. One that is off already is no error."""
        ...

    def is_running(self, server_id: int) -> bool: ...

    def wait_off(self, server_id: int, timeout_s: float) -> bool:
        """Waits until a machine is off; tells whether it is."""
        ...

    def route_address(self, address: str, server_id: int | None) -> None:
        """Leads a floating address (IPv4, or the /64 of IPv6) to a server, be it on or off, or to nobody; at once.

        What was said holds until the local cloud ends; it says everything anew at its start.
        """
        ...

    def set_firewall(self, server_id: int, rules: tuple[FirewallRule, ...] | None) -> None:
        """Replaces what filters a server's public traffic, be it on or off; None takes the filter away; at once.

        With rules, what comes in is dropped unless a rule or a known flow lets it through; what goes out only if there
        is a rule for going out. Holds until the disk is deleted or the local cloud ends.
        """
        ...

    def set_private_links(self, server_id: int, links: tuple[PrivateLink, ...]) -> None:
        """Replaces a server's interfaces in private networks, be it on or off; at once.

        An interface whose network and address stay is not interrupted; the routes inside a running server stay as they
        are until its next start. Holds until the disk is deleted or the local cloud ends.
        """
        ...

    def cut_off(self, server_id: int, cut: bool) -> None:
        """Keeps what a server begins from reaching anything outside the cloud, be it on or off, or lets it; at once.

        Other servers, the metadata and whoever reaches the server from the host are not concerned. Holds until the disk
        is deleted or the local cloud ends.
        """
        ...

    def set_zone(self, zone: Zone) -> None:
        """Has the cloud's name server answer for a zone, in place of what it said before; at once.

        Holds until the local cloud ends.
        """
        ...

    def remove_zone(self, name: str) -> None:
        """Has the cloud's name server not know a zone any more; one that it does not know is no error."""
        ...

    def snapshot(self, server_id: int, image_id: int) -> float:
        """Copies a disk into an image; returns what the image holds, in GB. Works on a running machine too."""
        ...

    def delete_image(self, image_id: int) -> None:
        """Removes an image; one that is not there is no error."""
        ...


class MachineFailed(Exception):
    """The host did not do what was asked."""


class PoolFull(MachineFailed):
    """There is no room for another disk or image."""
