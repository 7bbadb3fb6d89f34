"""Owns the servers' network: one namespace for the cloud, one for each server, routes, NAT, and the names of it all.

Nothing is shared between servers: each has a link of its own to the cloud's namespace, which routes. A floating
address is one more route in that namespace, and what a server sends under an address whose route does not lead back
to its link is dropped. Links there are named after servers (``link_name``), so that rules can name them. Private
networks have namespaces of their own.
"""

import hashlib
import ipaddress
import json
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from scripts.local_cloud.machine_interface import FirewallRule, MachineFailed, MachineSpec
from scripts.local_cloud.machines import firewall, host_settings
from scripts.local_cloud.machines.host import run, run_ip, succeeds
from scripts.local_cloud.machines.host_settings import NAMESPACES
from scripts.local_cloud.machines.private_networks import PrivateNetworks

GATEWAY_IPV4 = "172.31.1.1"
GATEWAY_IPV6 = "fe80::1"
METADATA_ADDRESS = "169.254.169.254"
_PREFIX = "mlc-"
_UPLINK = "uplink"
_SHORTEST_PREFIX = 8
_IPV6 = Path("/proc/sys/net/ipv6/conf/all/forwarding")
_CLOUD_RULES = """
table inet {table} {{
    chain own_address_only {{
        type filter hook prerouting priority raw
        ip6 saddr fe80::/10 accept
        ip6 saddr :: accept
        fib saddr . iif oif missing drop
    }}
    set cut_off {{
        type ifname
    }}
    chain outside {{
        type filter hook forward priority filter
        iifname @cut_off oifname "{uplink}" ct direction original counter drop
    }}
}}
"""
# Others on the host's network are kept out, even though the host now forwards: the cloud is for the host alone.
_HOST_RULES = """
table inet {table} {{
    chain forward {{
        type filter hook forward priority filter
        oifname "{link}" ct state != {{ established, related }} drop
    }}
    chain postrouting {{
        type nat hook postrouting priority srcnat
        ip saddr {range} oifname != "{link}" masquerade
    }}
}}
"""


def tag_of(state: Path) -> str:
    """Six hex digits that name everything on the host which belongs to a state directory."""
    return hashlib.sha256(str(state.resolve()).encode()).hexdigest()[:6]


def link_name(server_id: int) -> str:
    """The cloud's end of a server's public link."""
    return f"s{server_id}"


def mac_address(server_id: int) -> str:
    """The address of a server's public interface; of the kind that nobody sells."""
    return "96:00:" + ":".join(f"{byte:02x}" for byte in (server_id % 2**32).to_bytes(4, "big"))


def transfer_addresses(tag: str) -> tuple[str, str]:
    """Two link-local addresses, the host's and the cloud's, for the link between them."""
    number = int(tag, 16)
    first = (169 << 24) + (254 << 16) + ((16 + number % 128) << 8) + (number // 128) % 128 * 2
    return str(ipaddress.IPv4Address(first)), str(ipaddress.IPv4Address(first + 1))


def transfer_addresses_ipv6(tag: str) -> tuple[str, str]:
    """The same for IPv6, from the range for networks of one's own."""
    return f"fd6d:6c63:{tag[:2]}:{tag[2:]}::1", f"fd6d:6c63:{tag[:2]}:{tag[2:]}::2"


def namespaces_of(tag: str, names: list[str]) -> list[str]:
    """Those of the host's namespaces that belong to this cloud, its servers' before its own."""
    own = f"{_PREFIX}{tag}"
    return sorted((name for name in names if name == own or name.startswith(f"{own}-")), key=len, reverse=True)


def find_overlap(wanted: ipaddress.IPv4Network, routes: str) -> str | None:
    """The destination of a route of the host, from ``ip -json route``, that has addresses in a range; None if none."""
    for route in json.loads(routes):
        if route["dst"] == "default":
            continue
        network = ipaddress.IPv4Network(route["dst"])
        # A route for half of the world stands for the default one, which VPNs leave in its place.
        if network.prefixlen >= _SHORTEST_PREFIX and network.overlaps(wanted):
            return str(network)
    return None


class Network:
    """What a cloud has of the host's network, by its tag; everything is found again by name after a kill."""

    def __init__(self, tag: str, public_range: str, log: Callable[[str], None], forgets_moved: bool = False) -> None:
        """``forgets_moved`` is how servers' firewalls take moved flows; see ``firewall.table``."""
        self.tag = tag
        self._forgets_moved = forgets_moved
        self.namespace = f"{_PREFIX}{tag}"
        self.private = PrivateNetworks(self.namespace)
        self._range = ipaddress.IPv4Network(public_range)
        self._host_link = f"{_PREFIX}{tag}"
        self._table = f"mlc_{tag}"
        self._log = log
        self._floating: dict[str, int] = {}  # network -> server
        self._cut_off: set[int] = set()
        self._routing = threading.Lock()

    def server_namespace(self, server_id: int) -> str:
        return f"{self.namespace}-{server_id}"

    def open(self) -> None:
        """Makes the cloud's namespace, its link to the host, routes and NAT; raises MachineFailed."""
        host, cloud = transfer_addresses(self.tag)
        if taken := find_overlap(self._range, run(["ip", "-json", "-4", "route", "show"])):
            raise MachineFailed(
                f"{self._range} is in use on this host (it has a route to {taken}), by another local cloud or a VPN "
                "perhaps; choose another range with --addresses"
            )
        host_settings.claim(self.tag)
        run(["ip", "netns", "add", self.namespace])
        run_ip(
            f"link add {self._host_link} type veth peer name {_UPLINK} netns {self.namespace}",
            f"address add {host} peer {cloud} dev {self._host_link}",
            f"link set {self._host_link} up",
        )
        self._in_cloud(
            ["sysctl", "-q", "net.ipv4.ip_forward=1", "net.ipv4.conf.all.rp_filter=1"]
            + (["net.ipv6.conf.all.forwarding=1", "net.ipv6.conf.default.accept_dad=0"] if _IPV6.exists() else [])
        )
        run_ip(
            "link set lo up",
            f"address add {METADATA_ADDRESS}/32 dev lo",
            f"address add {cloud} peer {host} dev {_UPLINK}",
            f"link set {_UPLINK} up",
            f"route add default via {host}",
            f"route add unreachable {self._range}",
            namespace=self.namespace,
        )
        run_ip(f"route add {self._range} via {cloud} src {host}")
        self._open_ipv6()
        self._in_cloud(["nft", "-f", "-"], stdin=_CLOUD_RULES.format(table=self._table, uplink=_UPLINK))
        run(["nft", "-f", "-"], stdin=_HOST_RULES.format(table=self._table, link=self._host_link, range=self._range))
        self._say_if_host_drops()

    def close(self) -> None:
        """Removes all of it, a killed predecessor's too; what is not there is no error."""
        self._floating.clear()
        self._cut_off.clear()
        self.private.forget()
        for path in self.namespaces():
            self._remove_namespace(path.name)
        succeeds(["ip", "link", "delete", self._host_link])  # goes with the namespace, but a little later
        succeeds(["nft", "delete", "table", "inet", self._table])
        host_settings.give_back(self.tag)

    def namespaces(self) -> list[Path]:
        """The namespaces that are there, the servers' before the cloud's own."""
        names = [path.name for path in NAMESPACES.iterdir()] if NAMESPACES.is_dir() else []
        return [NAMESPACES / name for name in namespaces_of(self.tag, names)]

    def add_server(self, spec: MachineSpec) -> None:
        """Makes a server's namespace with its eth0, and the routes to it; replaces what is left of an earlier one."""
        self.remove_server(spec.server_id, spec.ipv6_network)
        inside = self.server_namespace(spec.server_id)
        link = link_name(spec.server_id)
        run(["ip", "netns", "add", inside])
        run_ip(
            f"link add {link} type veth peer name eth0 address {mac_address(spec.server_id)} netns {inside}",
            f"address add {GATEWAY_IPV4}/32 dev {link}",
            f"link set {link} up",
            *([f"route replace {spec.ipv4}/32 dev {link} src {GATEWAY_IPV4}"] if spec.ipv4 else []),
            namespace=self.namespace,
        )
        if spec.ipv6_network and _IPV6.exists():
            run_ip(
                f"address add {GATEWAY_IPV6}/64 dev {link} nodad",
                f"route replace {spec.ipv6_network} dev {link}",
                namespace=self.namespace,
            )
            # A server need not wait until it knows that nobody else has its address.
            run(["ip", "netns", "exec", inside, "sysctl", "-q", "net.ipv6.conf.eth0.accept_dad=0"])
            self._route_from_host(spec.ipv6_network)
        with self._routing:
            for network, server_id in self._floating.items():
                if server_id == spec.server_id:
                    self._lead(network, link)
        self.private.lay(spec.server_id, inside)

    def remove_server(self, server_id: int, ipv6_network: str | None) -> None:
        """Removes a server's link, namespace and routes; what is not there is no error."""
        succeeds(["ip", "-n", self.namespace, "link", "delete", link_name(server_id)])  # its routes go with it
        self.private.take_up(server_id)
        if ipv6_network:
            succeeds(["ip", "route", "delete", ipv6_network, "dev", self._host_link])
        if (NAMESPACES / self.server_namespace(server_id)).exists():
            self._remove_namespace(self.server_namespace(server_id))

    def route(self, address: str, server_id: int | None) -> None:
        """Leads a floating address or network to a server, also at its later starts, or to nobody."""
        network = str(ipaddress.ip_network(address, strict=False))
        with self._routing:
            self._floating.pop(network, None)
            if server_id is not None:
                self._floating[network] = server_id
            if server_id is not None and self._has_link(server_id):
                self._lead(network, link_name(server_id))
            else:
                succeeds(["ip", "-n", self.namespace, "route", "delete", network])
                if server_id is None:
                    succeeds(["ip", "route", "delete", network, "dev", self._host_link])

    def filter(self, server_id: int, rules: Iterable[FirewallRule] | None) -> None:
        """Replaces a server's firewall, or takes it away; its link need not be there."""
        text = (
            firewall.removal(server_id)
            if rules is None
            else firewall.table(server_id, link_name(server_id), rules, self._forgets_moved)
        )
        self._in_cloud(["nft", "-f", "-"], stdin=text)

    def cut_off(self, server_id: int, cut: bool) -> None:
        """Keeps what a server itself begins from leaving the cloud, or lets it; its link need not be there."""
        element = f'element inet {self._table} cut_off {{ "{link_name(server_id)}" }}\n'
        self._in_cloud(["nft", "-f", "-"], stdin=f"add {element}" + ("" if cut else f"delete {element}"))
        (self._cut_off.add if cut else self._cut_off.discard)(server_id)

    @property
    def name_server_address(self) -> str:
        """Where the cloud's name server is reached, by the host and by servers; no other cloud has it."""
        return transfer_addresses(self.tag)[1]

    def is_cut_off(self, server_id: int | None) -> bool:
        """Whether a server is kept from reaching the outside; nobody is not."""
        return server_id in self._cut_off

    def find_floating(self, address: str) -> int | None:
        """The server that a floating address is led to, or None."""
        wanted = ipaddress.ip_network(address)
        with self._routing:
            return next((each for network, each in self._floating.items() if network == str(wanted)), None)

    def _has_link(self, server_id: int) -> bool:
        return succeeds(["ip", "-n", self.namespace, "link", "show", link_name(server_id)])

    def _lead(self, network: str, link: str) -> None:
        ipv6 = ":" in network
        source = "" if ipv6 else f" src {GATEWAY_IPV4}"
        run_ip(f"route replace {network} dev {link}{source}", namespace=self.namespace)
        if ipv6 or not ipaddress.IPv4Network(network).subnet_of(self._range):
            self._route_from_host(network)

    def _route_from_host(self, network: str) -> None:
        host, cloud = transfer_addresses_ipv6(self.tag) if ":" in network else transfer_addresses(self.tag)
        run_ip(f"route replace {network} via {cloud} dev {self._host_link} src {host}")

    def _open_ipv6(self) -> None:
        if not _IPV6.exists():
            return
        # The host does not begin to forward IPv6: it might lose its own address. So servers learn at once that there is
        # no way out, instead of waiting for answers.
        host, cloud = transfer_addresses_ipv6(self.tag)
        run_ip(f"address add {host}/126 dev {self._host_link} nodad")
        run_ip(
            f"address add {cloud}/126 dev {_UPLINK} nodad",
            "route add unreachable ::/0",
            namespace=self.namespace,
        )

    def _say_if_host_drops(self) -> None:
        try:
            chain = run(["nft", "list", "chain", "ip", "filter", "FORWARD"])
        except MachineFailed:
            return  # the host has no such chain
        if "policy drop" in chain and self._host_link not in chain:
            self._log(
                "this host's firewall forwards nothing by itself (Docker sets that), so servers do not reach the "
                f"network outside; let them: iptables -I FORWARD -i {self._host_link} -j ACCEPT; "
                f"iptables -I FORWARD -o {self._host_link} -j ACCEPT"
            )

    def _in_cloud(self, command: list[str], stdin: str | None = None) -> None:
        run(["ip", "netns", "exec", self.namespace, *command], stdin=stdin)

    def _remove_namespace(self, name: str) -> None:
        if not succeeds(["ip", "netns", "delete", name]):  # made by half: a file without its mount
            (NAMESPACES / name).unlink(missing_ok=True)
