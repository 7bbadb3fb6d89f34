"""Owns what firewalls mean for servers: which rules are allowed, which servers have them, what gets through."""

import re
from collections.abc import Iterable
from ipaddress import AddressValueError, NetmaskValueError, ip_network
from typing import Any

from scripts.local_cloud.api.bodies import Fields
from scripts.local_cloud.api.labels import parse_selector
from scripts.local_cloud.machine_interface import FirewallRule
from scripts.local_cloud.store import Store

Document = dict[str, Any]

SERVER_LIMIT = 5  # firewalls that one server can have

_RULES_LIMIT = 50
_NETWORKS_LIMIT = 100
_EFFECTIVE_RULES_LIMIT = 500
_DESCRIPTION_LIMIT = 255
_DIRECTIONS = ("in", "out")
_PROTOCOLS = ("tcp", "udp", "icmp", "esp", "gre")
_PROTOCOLS_WITH_PORTS = ("tcp", "udp")
_LAST_PORT = 65535
_PORTS = re.compile(r"([1-9][0-9]{0,4})(?:-([1-9][0-9]{0,4}))?")
_CIDR = re.compile(r"[0-9A-Fa-f:.]+/[0-9]{1,3}")


def _parse_ports(text: str) -> tuple[int, int] | None:
    """The first and the last port; None if the text names none."""
    if text == "any":
        return 1, _LAST_PORT
    match = _PORTS.fullmatch(text)
    if match is None:
        return None
    first, last = int(match[1]), int(match[2] or match[1])
    return (first, last) if first <= last <= _LAST_PORT else None


def _parse_network(value: object) -> str | None:
    """A CIDR in its canonical form; None if it is none, or has bits of a host."""
    if not isinstance(value, str) or not _CIDR.fullmatch(value):
        return None
    try:
        return str(ip_network(value))
    except (AddressValueError, NetmaskValueError, ValueError):
        return None


def _read_networks(rule: Fields, name: str, needed: bool) -> list[str]:
    values = rule.items(name)
    if not needed and values:
        rule.blame(name, "must be empty for this direction")
    elif needed and not values:
        rule.blame(name, "must not be empty for this direction")
    elif len(values) > _NETWORKS_LIMIT:
        rule.blame(name, f"must be at most {_NETWORKS_LIMIT}")
    networks = [_parse_network(value) for value in values]
    if None in networks:
        rule.blame(name, "must be CIDR blocks without host bits, such as 10.0.1.0/24 or 2001:db8::1/128")
    return [network for network in networks if network is not None]


def _read_rule(rule: Fields) -> Document:
    direction = rule.one_of("direction", _DIRECTIONS, required=True)
    protocol = rule.one_of("protocol", _PROTOCOLS, required=True)
    port, description = rule.text("port"), rule.text("description")
    if protocol in _PROTOCOLS_WITH_PORTS:
        if port is None or _parse_ports(port) is None:
            rule.blame("port", f"must be a port, a range such as 80-85, or any, from 1 to {_LAST_PORT}")
    elif protocol is not None and port is not None:
        rule.blame("port", f"must not be given for {protocol}")
    if description is not None and len(description) > _DESCRIPTION_LIMIT:
        rule.blame("description", f"must be at most {_DESCRIPTION_LIMIT} characters")
    return {
        "direction": direction,
        "protocol": protocol,
        "port": port,
        "source_ips": _read_networks(rule, "source_ips", direction == "in") if direction else [],
        "destination_ips": _read_networks(rule, "destination_ips", direction == "out") if direction else [],
        "description": description,
    }


def read_rules(fields: Fields) -> list[Document]:
    """The rules of a body as the API shows them; what is wrong with any is noted."""
    rules, given = [], fields.items("rules")
    if len(given) > _RULES_LIMIT:
        fields.blame("rules", f"must be at most {_RULES_LIMIT}")
        return []
    for number, each in enumerate(given):
        if not isinstance(each, dict):
            fields.blame("rules", f"rule {number} must be an object")
            continue
        rule = Fields(each)
        rules.append(_read_rule(rule))
        for problem in rule.list_problems():
            fields.blame("rules", f"rule {number}: {problem}")
    if sum(len(rule["source_ips"]) + len(rule["destination_ips"]) for rule in rules) > _EFFECTIVE_RULES_LIMIT:
        fields.blame("rules", f"must be at most {_EFFECTIVE_RULES_LIMIT} in effect, one for each CIDR block")
    return rules


def matches_selector(firewall: Document, server: Document) -> bool:
    """Whether one of the firewall's label selectors chooses the server."""
    return any(parse_selector(selector)(server["labels"]) for selector in firewall["selectors"])


def choose_firewalls(firewalls: Iterable[Document], server: Document) -> list[Document]:
    """Those of the firewalls that the server has: the ones applied to it come first, then those of selectors."""
    direct, selected = [], []
    for firewall in firewalls:
        if server["id"] in firewall["servers"]:
            direct.append(firewall)
        elif matches_selector(firewall, server):
            selected.append(firewall)
    return (direct + selected)[:SERVER_LIMIT]


def find_effective_rules(store: Store, server: Document) -> tuple[FirewallRule, ...] | None:
    """What all firewalls of a server let through together; None if it has no firewall."""
    firewalls = choose_firewalls(store.read_all("firewall"), server)
    if not firewalls:
        return None
    return tuple(
        FirewallRule(
            direction=rule["direction"],
            protocol=rule["protocol"],
            networks=tuple(rule["source_ips"] if rule["direction"] == "in" else rule["destination_ips"]),
            ports=None if rule["port"] is None else _parse_ports(rule["port"]),
        )
        for firewall in firewalls
        for rule in firewall["rules"]
    )


def _change(store: Store, firewall_id: int, server_id: int, **listed: bool) -> None:
    """Puts a server into these lists of a firewall, or takes it out of them."""
    with store.transaction():
        firewall = store.find("firewall", firewall_id)
        if firewall is None:
            return
        for name, wanted in listed.items():
            others = [each for each in firewall[name] if each != server_id]
            firewall[name] = [*others, server_id] if wanted else others
        store.put("firewall", firewall)


def enlist(store: Store, firewall_id: int, server_id: int) -> None:
    """A server has the firewall from now on."""
    _change(store, firewall_id, server_id, servers=True)


def delist(store: Store, firewall_id: int, server_id: int) -> None:
    """A server does not have the firewall any more, unless a selector gives it."""
    _change(store, firewall_id, server_id, servers=False, pending=False)


def await_change(store: Store, firewall_id: int, server_id: int) -> None:
    """The machine is still to be told what the record says."""
    _change(store, firewall_id, server_id, pending=True)


def settle(store: Store, firewall_id: int, server_id: int) -> None:
    """The machine was told, or will not be."""
    _change(store, firewall_id, server_id, pending=False)


def forget_server(store: Store, server_id: int) -> None:
    """A server is gone."""
    for firewall in store.read_all("firewall"):
        if server_id in firewall["servers"] or server_id in firewall["pending"]:
            delist(store, firewall["id"], server_id)
