"""Owns who is attached to which network: the private addresses of servers, and what the machines are told of them.

An attachment is on record from the moment that it begins, so that its addresses are taken; ``pending`` until it holds.
"""

from collections.abc import Iterable
from ipaddress import AddressValueError, IPv4Address, IPv4Network
from typing import Any

from scripts.local_cloud.api.errors import InvalidInput, LimitExceeded, StateRefused
from scripts.local_cloud.machine_interface import PrivateLink
from scripts.local_cloud.store import Store

Document = dict[str, Any]

PUBLIC_GATEWAY = IPv4Address("172.31.1.1")
SERVER_LIMIT = 3  # networks of one server
ALIASES_LIMIT = 5
_MEMBERS_LIMIT = 100
_KIND = "attachment"


def parse_address(value: object) -> IPv4Address | None:
    """An address from its text, None if it is none."""
    try:
        return IPv4Address(value) if isinstance(value, str) else None
    except AddressValueError:
        return None


def find_gateway(network: Document) -> IPv4Address:
    """The first address of a network, behind which everything lies."""
    return IPv4Network(network["ip_range"])[1]


def find_of_server(store: Store, server_id: int) -> list[Document]:
    """The attachments of a server, the oldest first."""
    return [each for each in store.read_all(_KIND) if each["server_id"] == server_id]


def find_of_network(store: Store, network_id: int) -> list[Document]:
    """The attachments to a network, the oldest first."""
    return [each for each in store.read_all(_KIND) if each["network_id"] == network_id]


def find_attachment(store: Store, server_id: int, network_id: int) -> Document | None:
    """A server's attachment to a network."""
    return next((each for each in find_of_server(store, server_id) if each["network_id"] == network_id), None)


def show_private_net(store: Store, server_id: int) -> list[Document]:
    """What a server's document says about its networks."""
    return [
        {"network": each["network_id"], **{name: each[name] for name in ("ip", "alias_ips", "mac_address")}}
        for each in find_of_server(store, server_id)
        if not each["pending"]
    ]


def find_subnet(network: Document, address: IPv4Address, zone: str | None = None) -> Document | None:
    """The subnet that an address is in, of this zone if one is given."""
    return next(
        (
            subnet
            for subnet in network["subnets"]
            if address in IPv4Network(subnet["ip_range"]) and zone in (None, subnet["network_zone"])
        ),
        None,
    )


def _list_used(store: Store, network_id: int, but: int | None = None) -> set[IPv4Address]:
    found = [each for each in find_of_network(store, network_id) if each["server_id"] != but]
    return {IPv4Address(ip) for each in found for ip in (each["ip"], *each["alias_ips"])}


def _is_reserved(network: Document, subnet: Document, address: IPv4Address) -> bool:
    whole, part = IPv4Network(network["ip_range"]), IPv4Network(subnet["ip_range"])
    ends = (whole[0], whole[-1], part[0], part[-1])
    return address in (*ends, find_gateway(network), PUBLIC_GATEWAY)


def _require_available(network: Document, addresses: Iterable[IPv4Address], used: set[IPv4Address], zone: str) -> None:
    taken = set(used)
    for address in addresses:
        subnet = find_subnet(network, address, zone)
        if subnet is None or _is_reserved(network, subnet, address) or address in taken:
            raise StateRefused("ip_not_available", f"IP {address} is not available in network {network['id']}")
        taken.add(address)


def require_aliases(store: Store, attachment: Document, network: Document, aliases: list[str], zone: str) -> None:
    """Raises StateRefused if the server of an attachment cannot have these alias IPs instead of its own."""
    used = _list_used(store, network["id"], but=attachment["server_id"]) | {IPv4Address(attachment["ip"])}
    _require_available(network, map(IPv4Address, aliases), used, zone)


def _choose(network: Document, subnets: list[Document], used: set[IPv4Address]) -> IPv4Address:
    for subnet in subnets:
        for address in IPv4Network(subnet["ip_range"]).hosts():
            if address not in used and not _is_reserved(network, subnet, address):
                return address
    raise StateRefused("no_subnet_available", f"network {network['id']} has no subnet with a free IP for the server")


def enlist(
    store: Store,
    server_id: int,
    network: Document,
    zone: str,
    *,
    ip: str | None = None,
    aliases: list[str] | None = None,
    ip_range: str | None = None,
) -> Document:
    """Begins that a server is attached to a network; raises StateRefused, InvalidInput or LimitExceeded."""
    others = find_of_server(store, server_id)
    if any(each["network_id"] == network["id"] for each in others):
        raise StateRefused("server_already_attached", f"the server is already attached to network {network['id']}")
    if len(others) >= SERVER_LIMIT:
        raise LimitExceeded("server_network_limit")
    for each in others:
        other = store.find("network", each["network_id"])
        if other and IPv4Network(other["ip_range"]).overlaps(IPv4Network(network["ip_range"])):
            raise StateRefused("networks_overlap", f"network {network['id']} overlaps with network {other['id']}")
    if len(find_of_network(store, network["id"])) >= _MEMBERS_LIMIT:
        raise LimitExceeded("network_attached_servers_limit")
    subnets = [each for each in network["subnets"] if each["network_zone"] == zone]
    if ip_range is not None:
        subnets = [each for each in subnets if each["ip_range"] == ip_range]
        if ip is not None and not any(IPv4Address(ip) in IPv4Network(each["ip_range"]) for each in subnets):
            raise InvalidInput({"ip": ["must be in the subnet that ip_range names"]})
    if not subnets:
        raise StateRefused("no_subnet_available", f"network {network['id']} has no subnet in {zone}")
    used, wanted = _list_used(store, network["id"]), list(map(IPv4Address, aliases or []))
    chosen = IPv4Address(ip) if ip is not None else _choose(network, subnets, used | set(wanted))
    _require_available(network, [chosen, *wanted], used, zone)
    new_id = store.next_id()
    attachment = {
        "id": new_id,
        "server_id": server_id,
        "network_id": network["id"],
        "ip": str(chosen),
        "alias_ips": aliases or [],
        "mac_address": "86:00:" + ":".join(f"{byte:02x}" for byte in (new_id % 2**32).to_bytes(4, "big")),
        "pending": True,
    }
    store.put(_KIND, attachment)
    return attachment


def put_back(store: Store, attachment: Document) -> None:
    """Writes an attachment that was forgotten too early, or changed."""
    store.put(_KIND, attachment)


def settle(store: Store, attachment_id: int) -> None:
    """Ends the waiting of an attachment: it holds."""
    store.change(_KIND, attachment_id, pending=False)


def delist(store: Store, attachment_id: int) -> None:
    """Forgets an attachment."""
    store.delete(_KIND, attachment_id)


def forget_server(store: Store, server_id: int) -> None:
    """Forgets all attachments of a server."""
    for each in find_of_server(store, server_id):
        store.delete(_KIND, each["id"])


def forget_pending(store: Store) -> None:
    """Forgets the attachments that a stop of the cloud cut short."""
    for each in store.read_all(_KIND):
        if each["pending"]:
            store.delete(_KIND, each["id"])


def find_links(store: Store, server_id: int) -> tuple[PrivateLink, ...]:
    """What the machines are told of a server's networks."""
    links = []
    for each in find_of_server(store, server_id):
        network = store.find("network", each["network_id"])
        subnet = find_subnet(network, IPv4Address(each["ip"])) if network else None
        if network is None or subnet is None:
            continue
        links.append(
            PrivateLink(
                network_id=network["id"],
                network_name=network["name"],
                ip=each["ip"],
                alias_ips=tuple(each["alias_ips"]),
                mac_address=each["mac_address"],
                ip_range=network["ip_range"],
                subnet=subnet["ip_range"],
                gateway=str(find_gateway(network)),
                routes=tuple((route["destination"], route["gateway"]) for route in network["routes"]),
            )
        )
    return tuple(links)
