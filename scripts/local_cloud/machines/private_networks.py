"""Owns private networks: a namespace for each, which routes between its members and leads nowhere else.

Networks may overlap, since nothing leads from one to another. A member has a link of its own to the network's
namespace; what it sends under an address that is not led back to that link is dropped, and what it sends to all is
heard by nobody. The address and the routes inside are set before the server boots: what a DHCP client does on Hetzner.
"""

import threading
from collections.abc import Mapping
from dataclasses import dataclass

from scripts.local_cloud.machine_interface import PrivateLink
from scripts.local_cloud.machines.host import run, run_ip, succeeds
from scripts.local_cloud.machines.host_settings import NAMESPACES

MTU = 1450
_EVERYWHERE = "0.0.0.0/0"
_SETTINGS = ("net.ipv4.ip_forward=1", "net.ipv4.conf.all.rp_filter=1", "net.ipv4.conf.default.rp_filter=1")


@dataclass
class _Member:
    links: dict[int, PrivateLink]  # by number, from 1
    namespace: str | None = None  # where the interfaces are, while it is on


def interface_name(number: int) -> str:
    """What a server calls its private interfaces, by their number from 1 on; as on the real cloud."""
    return f"enp{6 + number}s0"


def link_name(server_id: int) -> str:
    """The network's end of a server's link."""
    return f"p{server_id}"


def number_links(before: Mapping[int, PrivateLink], links: tuple[PrivateLink, ...]) -> dict[int, PrivateLink]:
    """The links by the numbers of their interfaces: that of a network stays, a new one gets the first that is free."""
    kept = {link.network_id: number for number, link in before.items()}
    numbers: dict[int, PrivateLink] = {kept[link.network_id]: link for link in links if link.network_id in kept}
    for link in links:
        if link.network_id not in kept:
            numbers[next(number for number in range(1, len(links) + 1) if number not in numbers)] = link
    return numbers


def inner_commands(number: int, link: PrivateLink) -> list[str]:
    """What is set inside a server: one address, and all else behind the gateway.

    A way to everywhere is for the server's owner to set, and no member is its own gateway.
    """
    name, own = interface_name(number), {link.ip, *link.alias_ips}
    beyond = [to for to, gateway in link.routes if to != _EVERYWHERE and gateway not in own]
    return [
        f"address add {link.ip}/32 dev {name}",
        f"link set {name} up",
        f"route add {link.gateway}/32 dev {name} scope link",
        *(f"route add {to} via {link.gateway} dev {name}" for to in (link.ip_range, *beyond)),
    ]


def router_commands(server_id: int, link: PrivateLink) -> list[str]:
    """What leads to a member in its network: its addresses, and the network's routes by way of them."""
    name, own = link_name(server_id), (link.ip, *link.alias_ips)
    led = [(to, gateway) for to, gateway in link.routes if gateway in own]
    return [
        f"route replace unreachable {link.ip_range}",
        *(f"route replace {address}/32 dev {name} src {link.gateway}" for address in own),
        *(f"route replace {to} via {gateway} dev {name} onlink" for to, gateway in led),
    ]


def _is_same(one: PrivateLink | None, other: PrivateLink | None) -> bool:
    """Whether the interface can stay."""
    return (
        one is not None
        and other is not None
        and (one.network_id, one.ip, one.mac_address) == (other.network_id, other.ip, other.mac_address)
    )


class PrivateNetworks:
    """The private networks of a cloud, whose own namespace's name begins theirs; safe for use by several threads."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._members: dict[int, _Member] = {}
        self._lock = threading.Lock()

    def namespace(self, network_id: int) -> str:
        return f"{self._prefix}-n{network_id}"

    def find_interfaces(self, server_id: int) -> dict[int, PrivateLink]:
        """A server's links by the number of their interface."""
        with self._lock:
            member = self._members.get(server_id)
            return dict(member.links) if member else {}

    def replace(self, server_id: int, links: tuple[PrivateLink, ...]) -> None:
        """Replaces a server's links, now if it is on, and at its later starts; raises MachineFailed."""
        with self._lock:
            member = self._members.setdefault(server_id, _Member({}))
            before, member.links = member.links, number_links(member.links, links)
            if member.namespace is not None:
                for number, link in before.items():
                    if not _is_same(link, member.links.get(number)):
                        self._cut(server_id, link)
                for number, link in member.links.items():
                    if _is_same(before.get(number), link):
                        self._lead(server_id, link)
                    else:
                        self._connect(server_id, member.namespace, number, link)
            elif not links:
                del self._members[server_id]
            used = {link.network_id for each in self._members.values() for link in each.links.values()}
            for link in before.values():
                if link.network_id not in used:
                    succeeds(["ip", "netns", "delete", self.namespace(link.network_id)])

    def lay(self, server_id: int, namespace: str) -> None:
        """Makes the interfaces of a server that is about to start; raises MachineFailed."""
        with self._lock:
            member = self._members.setdefault(server_id, _Member({}))
            member.namespace = namespace
            for number, link in member.links.items():
                self._connect(server_id, namespace, number, link)

    def take_up(self, server_id: int) -> None:
        """Removes the interfaces of a server that is off; what is not there is no error."""
        with self._lock:
            member = self._members.get(server_id)
            if member is not None:
                member.namespace = None
                for link in member.links.values():
                    self._cut(server_id, link)
                if not member.links:
                    del self._members[server_id]

    def forget(self) -> None:
        """Knows of no server any more; the namespaces are for others to remove."""
        with self._lock:
            self._members.clear()

    def _connect(self, server_id: int, inside: str, number: int, link: PrivateLink) -> None:
        self._open(link.network_id)
        self._cut(server_id, link)  # what is left of a try that failed
        outside, name = link_name(server_id), interface_name(number)
        peer = f"peer name {name} mtu {MTU} address {link.mac_address} netns {inside}"
        run_ip(
            f"link add {outside} mtu {MTU} type veth {peer}",
            f"address add {link.gateway}/32 dev {outside}",
            f"link set {outside} up multicast off",
            namespace=self.namespace(link.network_id),
        )
        run_ip(*inner_commands(number, link), namespace=inside)
        self._lead(server_id, link)

    def _lead(self, server_id: int, link: PrivateLink) -> None:
        run_ip(
            f"route flush dev {link_name(server_id)}",
            *router_commands(server_id, link),
            namespace=self.namespace(link.network_id),
        )

    def _cut(self, server_id: int, link: PrivateLink) -> None:
        succeeds(["ip", "-n", self.namespace(link.network_id), "link", "delete", link_name(server_id)])

    def _open(self, network_id: int) -> None:
        name = self.namespace(network_id)
        if (NAMESPACES / name).exists():
            return
        run(["ip", "netns", "add", name])
        run(["ip", "netns", "exec", name, "sysctl", "-q", *_SETTINGS])
        run_ip("link set lo up", namespace=name)
