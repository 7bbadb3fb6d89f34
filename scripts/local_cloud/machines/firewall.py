"""Owns how a server's firewall is said to the kernel: one table of rules a server, in the cloud's namespace."""

from collections.abc import Iterable, Iterator
from ipaddress import IPv4Network, IPv6Network, collapse_addresses, ip_network

from scripts.local_cloud.machine_interface import FirewallRule

NAMES_PORT = 53  # of the cloud's name server

_ADDRESS = {"in": "saddr", "out": "daddr"}


def table_name(server_id: int) -> str:
    """What the table with a server's rules is called."""
    return f"server_{server_id}"


def removal(server_id: int) -> str:
    """The text that takes a server's table away, be it there or not."""
    name = table_name(server_id)
    return f"table inet {name}\ndelete table inet {name}\n"


def table(server_id: int, link: str, rules: Iterable[FirewallRule], forgets_moved: bool = False) -> str:
    """The text that replaces a server's table; ``link`` is the cloud's end of its public link.

    Flows that have begun go on in both directions. What goes out is free unless there is a rule for it. With
    ``forgets_moved`` a flow goes on only where it began: as if each server's firewall were on a host of its own, which
    knows nothing of a flow that a moved address brings along, and drops what belongs to it.
    """
    rules = tuple(rules)
    filtered = {"in"} | {rule.direction for rule in rules}
    sides = {"in": f'oifname "{link}"', "out": f'iifname "{link}"'}
    if "out" not in filtered and not forgets_moved:
        del sides["out"]
    lines = [f"table inet {table_name(server_id)} {{"]
    for direction in sides:
        lines += [f"chain public_{direction} {{"]
        lines += _known_flows(server_id, direction) if forgets_moved else ["ct state { established, related } accept"]
        if direction in filtered:
            lines += [line for rule in rules if rule.direction == direction for line in _lines(rule)]
            lines += ["drop"]
        lines += ["}"]
    lines += ["chain forward {", "type filter hook forward priority filter"]
    lines += [f"{side} jump public_{direction}" for direction, side in sides.items()]
    lines += ["}"]
    if "out" in filtered:  # the name server is in the cloud's own namespace, to which nothing is forwarded
        lines += ["chain input {", "type filter hook input priority filter"]
        lines += [f'iifname "{link}" meta l4proto {{ tcp, udp }} th dport {NAMES_PORT} jump public_out', "}"]
    lines += ["}"]
    return removal(server_id) + "\n".join(lines) + "\n"


def _known_flows(server_id: int, direction: str) -> list[str]:
    """What comes before the rules where flows are known to the server that they began at.

    A flow between two servers is known to both: each has a half of the flow's mark.
    """
    number = server_id % 0xFFFF + 1  # a flow that nobody knows has 0
    halves = {"in": (0x0000FFFF, number), "out": (0xFFFF0000, number << 16)}
    (mask, mark), (answer_mask, answer_mark) = halves[direction], halves["out" if direction == "in" else "in"]
    return [
        "ct state invalid drop",
        f"ct direction reply ct mark & {answer_mask:#x} == {answer_mark:#x} accept",
        "ct direction reply drop",
        f"ct state {{ established, related }} ct mark & {mask:#x} == {mark:#x} accept",
        "tcp flags & (fin | syn | rst | ack) != syn drop",
        f"ct mark set ct mark & {mask ^ 0xFFFFFFFF:#x} | {mark:#x}",
    ]


def _lines(rule: FirewallRule) -> Iterator[str]:
    networks = [ip_network(network, strict=False) for network in rule.networks]
    side = _ADDRESS[rule.direction]
    # Networks of one rule may overlap, which a set in the kernel must not.
    for ipv4 in collapse_addresses(network for network in networks if isinstance(network, IPv4Network)):
        yield f"ip {side} {ipv4} {_protocol(rule, rule.protocol)} accept"
    for ipv6 in collapse_addresses(network for network in networks if isinstance(network, IPv6Network)):
        yield f"ip6 {side} {ipv6} {_protocol(rule, 'icmpv6' if rule.protocol == 'icmp' else rule.protocol)} accept"


def _protocol(rule: FirewallRule, name: str) -> str:
    ports = f" th dport {rule.ports[0]}-{rule.ports[1]}" if rule.ports else ""
    return f"meta l4proto {name}{ports}"
