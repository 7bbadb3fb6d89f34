"""Owns how a server's firewall is said to the kernel: one table of rules a server, in the cloud's namespace."""

from collections.abc import Iterable, Iterator
from ipaddress import IPv4Network, IPv6Network, collapse_addresses, ip_network

from scripts.local_cloud.machine_interface import FirewallRule

_ADDRESS = {"in": "saddr", "out": "daddr"}


def table_name(server_id: int) -> str:
    """What the table with a server's rules is called."""
    return f"server_{server_id}"


def removal(server_id: int) -> str:
    """The text that takes a server's table away, be it there or not."""
    name = table_name(server_id)
    return f"table inet {name}\ndelete table inet {name}\n"


def table(server_id: int, link: str, rules: Iterable[FirewallRule]) -> str:
    """The text that replaces a server's table; ``link`` is the cloud's end of its public link.

    Flows that have begun go on in both directions. What goes out is free unless there is a rule for it.
    """
    rules = tuple(rules)
    directions = {"in": f'oifname "{link}"', "out": f'iifname "{link}"'}
    if not any(rule.direction == "out" for rule in rules):
        del directions["out"]
    lines = [f"table inet {table_name(server_id)} {{"]
    for direction in directions:
        lines += [f"chain public_{direction} {{", "ct state { established, related } accept"]
        lines += [line for rule in rules if rule.direction == direction for line in _lines(rule)]
        lines += ["drop", "}"]
    lines += ["chain forward {", "type filter hook forward priority filter"]
    lines += [f"{match} jump public_{direction}" for direction, match in directions.items()]
    lines += ["}", "}"]
    return removal(server_id) + "\n".join(lines) + "\n"


def _lines(rule: FirewallRule) -> Iterator[str]:
    networks = [ip_network(network, strict=False) for network in rule.networks]
    side = _ADDRESS[rule.direction]
    # Networks of one rule may overlap, which a set in the kernel must not.
    for network in collapse_addresses(network for network in networks if isinstance(network, IPv4Network)):
        yield f"ip {side} {network} {_protocol(rule, rule.protocol)} accept"
    for network in collapse_addresses(network for network in networks if isinstance(network, IPv6Network)):
        yield f"ip6 {side} {network} {_protocol(rule, 'icmpv6' if rule.protocol == 'icmp' else rule.protocol)} accept"


def _protocol(rule: FirewallRule, name: str) -> str:
    ports = f" th dport {rule.ports[0]}-{rule.ports[1]}" if rule.ports else ""
    return f"meta l4proto {name}{ports}"
