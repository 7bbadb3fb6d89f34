"""Owns the tunnel between two nodes while addresses move: answers in flight on the old one are not cut.

A floating address moves at once, and with it the packets of all connections that are open: the node that gets them has
never seen them. It hands packets of unknown flows to the old node, which answers by way of the new one, the only one
that may send under the address by then. Large load balancers call it a second chance for unknown flows.

``python3 tunnel.py OWN PEER LEASE ADDRESSES`` keeps the old node's end open, between two private addresses, as long as
somebody touches the file LEASE once a minute; the file ADDRESSES lists those that move. ``python3 tunnel.py close``
takes away what an end that was killed has left.
"""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

INTERFACE = "rollout"
_MTU = 1400  # of the private network's 1450, without the tunnel's own headers
_VXLAN_ID, _VXLAN_PORT = 7, 4789
TABLE, _MARK = "107", "0x4d4c"
_MARKED_PRIORITY, MOVED_PRIORITY = 19999, 20000
# Inside the tunnel: the old node's end and the new one's.
_OLD, _NEW = ("169.254.77.1", "fe80::77:1"), ("169.254.77.2", "fe80::77:2")
_LEASE_S = 60.0
_SETTINGS = Path("/proc/sys/net")
# What is different as long as the tunnel is open; what was before comes back.
_BOTH = {
    # Packets of flows whose beginning was not seen are invalid: handed on by the new node, dropped by the old one.
    "netfilter/nf_conntrack_tcp_loose": "0",
}
_NEW_ONLY = {
    "ipv4/ip_forward": "1",
    "ipv6/conf/all/forwarding": "1",
    # The kernel believes redirects again once it forwards no longer; so this one comes back after those.
    "ipv4/conf/all/accept_redirects": "0",
}

Run = Callable[[list[str], str], str]


@dataclass(frozen=True)
class Ends:
    """The two private addresses, this node's first."""

    own: str
    peer: str


def run(command: list[str], text: str = "") -> str:
    """What a command prints; raises SubprocessError."""
    done = subprocess.run(command, check=True, input=text, capture_output=True, text=True, timeout=10)
    return done.stdout


def family_of(address: str) -> str:
    return "-6" if ":" in address else "-4"


def _link_commands(ends: Ends, inside: tuple[str, str], other: tuple[str, str]) -> Iterator[str]:
    """The tunnel's own link, and a table of routes that leads everything through it."""
    yield (
        f"link add {INTERFACE} mtu {_MTU} type vxlan id {_VXLAN_ID} local {ends.own} remote {ends.peer}"
        f" dstport {_VXLAN_PORT} nolearning"
    )
    yield f"address add {inside[0]}/30 dev {INTERFACE}"
    yield f"link set {INTERFACE} addrgenmode none up"
    yield f"-6 address add {inside[1]}/64 dev {INTERFACE} nodad"
    yield f"route replace default via {other[0]} dev {INTERFACE} table {TABLE}"
    yield f"-6 route replace default via {other[1]} dev {INTERFACE} table {TABLE}"


def old_commands(ends: Ends, addresses: Iterable[str]) -> list[str]:
    """Words for ``ip``: the old node's end. What is marked goes through it, of what is sent under these addresses.

    Not all that is marked: the tunnel's own packets carry the mark on.
    """
    marked = f"fwmark {_MARK} lookup {TABLE} priority {_MARKED_PRIORITY}"
    return [
        *_link_commands(ends, _OLD, _NEW),
        *(f"{family_of(address)} rule add from {address} {marked}" for address in addresses),
    ]


def new_commands(ends: Ends, link: str) -> list[str]:
    """Words for ``ip``: the new node's end; what is marked goes through it, though its address is this node's own."""
    mine = [f"{family} rule add iif {link} fwmark {_MARK} lookup {TABLE} priority 1" for family in ("-4", "-6")]
    # The rule for one's own addresses is the very first otherwise. Without "iif" the tunnel's packets, which carry
    # the mark on, would go around in circles.
    after = [f"{family} rule {words}" for family in ("-4", "-6") for words in ("add lookup local priority 10",)]
    first = [f"{family} rule delete priority 0" for family in ("-4", "-6")]
    return [*_link_commands(ends, _NEW, _OLD), *after, *mine, *first]


def closing_commands(rules: str, family: str) -> list[str]:
    """Words for ``ip`` that take the rules of either end away, from what ``ip rule`` prints of a family."""
    lines = [line.split(":", 1) for line in rules.splitlines() if ":" in line]
    if not lines:
        return []  # this kernel knows no such family
    priorities = [int(priority) for priority, _ in lines]
    ours = [int(number) for number, words in lines if f"lookup {TABLE}" in words]
    commands = [f"{family} rule add lookup local priority 0"] if 0 not in priorities else []
    commands += [f"{family} rule delete priority {number}" for number in ours]
    commands += [f"{family} rule delete priority 10" for number, words in lines if number.strip() == "10"]
    return [*commands, f"{family} route flush table {TABLE}"]


def moved_command(address: str) -> str:
    """Words for ``ip`` on the old node: answers under an address that has moved go through the tunnel."""
    return f"{family_of(address)} rule add from {address} lookup {TABLE} priority {MOVED_PRIORITY}"


def render_answer(addresses: Sequence[str]) -> str:
    """The old node's table: once something comes through the tunnel, what is sent under that address goes there too.

    The address has moved then. Until the new node has said so, what is sent under it from here would be lost, and a
    handshake that the move came into would wait for its client's second or third try.
    """
    # By address, or the neighbours that the other end asks for would fill the sets.
    families = [("ip6", 6) if ":" in address else ("ip", 4) for address in addresses]
    heard = [
        f'iifname "{INTERFACE}" {ip} daddr {address} update @moved_{number} {{ {ip} daddr }}'
        for address, (ip, number) in zip(addresses, families, strict=True)
    ]
    lines = [
        "table inet rollout",
        "delete table inet rollout",
        "table inet rollout {",
        "set moved_4 { type ipv4_addr; flags dynamic; size 4; }",
        "set moved_6 { type ipv6_addr; flags dynamic; size 4; }",
        "chain prerouting {",
        "type filter hook prerouting priority mangle; policy accept;",
        *heard,
        "}",
        "chain output {",
        "type route hook output priority mangle; policy accept;",
        f"ip saddr @moved_4 meta mark set {_MARK}",
        f"ip6 saddr @moved_6 meta mark set {_MARK}",
        "}",
    ]
    return "\n".join([*lines, "}", ""])


def render_watch(link: str, addresses: Iterable[str], hand_on: bool) -> str:
    """The new node's table: it sees which addresses have arrived, and marks what is to be handed on."""
    lines = [
        "table inet rollout",
        "delete table inet rollout",
        "table inet rollout {",
        "set arrived_4 { type ipv4_addr; flags dynamic; size 4; }",
        "set arrived_6 { type ipv6_addr; flags dynamic; size 4; }",
        "set knocked { type ipv4_addr; flags dynamic; size 1024; }",
        "chain prerouting {",
        "type filter hook prerouting priority mangle; policy accept;",
        # What a server that wants to know whether the cloud's firewall lets unknown flows pass has sent.
        f'iifname "{link}" tcp dport 443 ct state invalid update @knocked {{ ip saddr }}',
    ]
    for address in addresses:
        ip, number = ("ip6", 6) if ":" in address else ("ip", 4)
        lines.append(f'iifname "{link}" {ip} daddr {address} update @arrived_{number} {{ {ip} daddr }}')
        if hand_on:
            lines.append(f'iifname "{link}" {ip} daddr {address} ct state invalid meta mark set {_MARK}')
    lines.append("}")
    if hand_on:
        lines += [
            # This node is no router but for these two ways.
            "chain forward {",
            "type filter hook forward priority filter; policy drop;",
            f'iifname "{link}" oifname "{INTERFACE}" accept',
            f'iifname "{INTERFACE}" oifname "{link}" accept',
            "}",
        ]
    return "\n".join([*lines, "}", ""])


def render_hold(addresses: Iterable[str], seconds: int) -> str:
    """The old node's table that lets nobody begin a connection for a while; the kernel ends it, whoever dies meanwhile.

    Clients try again by themselves after 1, 3 and 7 s, and reach the new node then.
    """
    ports = ", ".join(f"{port} timeout {seconds}s" for port in (80, 443))
    lines = [
        "table inet hold",
        "delete table inet hold",
        "table inet hold {",
        f"set ports {{ type inet_service; flags timeout; elements = {{ {ports} }}; }}",
        "chain input {",
        "type filter hook input priority -10; policy accept;",
    ]
    for address in addresses:
        ip = "ip6" if ":" in address else "ip"
        lines.append(f"{ip} daddr {address} tcp dport @ports tcp flags & (syn | ack) == syn drop")
    return "\n".join([*lines, "}", "}", ""])


def find_link(routes: str) -> str:
    """The link that leads outside, from what ``ip -o route show default`` prints. Raises ValueError."""
    words = routes.split()
    if "dev" not in words:
        raise ValueError("no link leads outside")
    return words[words.index("dev") + 1]


def _set(settings: dict[str, str], memory: Path | None = None) -> None:
    """Writes settings of the kernel; what they were goes to ``memory``, unless it is known there."""
    if memory is not None and not memory.exists():
        memory.write_text("".join(f"{name} {(_SETTINGS / name).read_text().strip()}\n" for name in settings))
    for name, value in settings.items():
        (_SETTINGS / name).write_text(value)


def _permit(peer: str, ask: Run) -> None:
    ask(["nft", "-f", "-"], f"flush set inet node peers\nadd element inet node peers {{ {peer} }}\n")


def open_old(ends: Ends, addresses: Sequence[str], memory: Path, ask: Run = run) -> None:
    """Opens the old node's end; raises OSError, SubprocessError."""
    _clear(ask)
    _set(_BOTH, memory)
    _permit(ends.peer, ask)
    for words in old_commands(ends, addresses):
        ask(["ip", *words.split()], "")
    _set({f"ipv4/conf/{INTERFACE}/rp_filter": "0"})
    ask(["nft", "-f", "-"], render_answer(addresses))


def open_new(ends: Ends, link: str, addresses: Iterable[str], memory: Path, ask: Run = run) -> None:
    """Opens the new node's end, and hands on from then on; raises OSError, SubprocessError."""
    _clear(ask)
    _set(_BOTH | _NEW_ONLY, memory)
    _permit(ends.peer, ask)
    for words in new_commands(ends, link):
        ask(["ip", *words.split()], "")
    # What comes through the tunnel is sent under an address of this node's own.
    _set({f"ipv4/conf/{INTERFACE}/rp_filter": "0", f"ipv4/conf/{INTERFACE}/accept_local": "1"})
    ask(["nft", "-f", "-"], render_watch(link, addresses, hand_on=True))


def watch(link: str, addresses: Iterable[str], ask: Run = run) -> None:
    """Sees addresses arrive, without a tunnel; raises SubprocessError."""
    ask(["nft", "-f", "-"], render_watch(link, addresses, hand_on=False))


def close(memory: Path, ask: Run = run) -> None:
    """Takes away all that either end has made; what is not there is no error."""
    _clear(ask)
    if memory.exists():
        _set(dict(line.split(" ", 1) for line in memory.read_text().splitlines()))
        memory.unlink()


def is_open() -> bool:
    """Whether this node has an end of a tunnel; a reboot, or the end's own failure, takes it away."""
    try:
        socket.if_nametoindex(INTERFACE)
    except OSError:
        return False
    return True


def _clear(ask: Run) -> None:
    """All but the settings: an end that is opened again must not take unknown flows for new ones in between."""
    for family in ("-4", "-6"):
        try:
            commands = closing_commands(ask(["ip", family, "rule"], ""), family)
        except subprocess.SubprocessError:
            continue  # without IPv6 there are none of its rules
        for words in commands:
            _try(ask, ["ip", *words.split()])
    _try(ask, ["ip", "link", "delete", INTERFACE])
    _try(ask, ["nft", "-f", "-"], "table inet rollout\ndelete table inet rollout\n")
    _try(ask, ["nft", "-f", "-"], "flush set inet node peers\n")


def _try(ask: Run, command: list[str], text: str = "") -> None:
    try:
        ask(command, text)
    except subprocess.SubprocessError:
        pass  # it was not there


def tell_ready() -> None:
    """Tells systemd that this unit is up: https://www.freedesktop.org/software/systemd/man/sd_notify.html."""
    if path := os.environ.get("NOTIFY_SOCKET"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as telling:
            telling.connect(f"\0{path[1:]}" if path.startswith("@") else path)
            telling.send(b"READY=1")


def keep_open(ends: Ends, lease: Path, addresses: Path, memory: Path) -> None:
    """The old node's end, until nobody wants it any more."""
    open_old(ends, addresses.read_text().split(), memory)
    tell_ready()
    print(f"the tunnel to {ends.peer} is open")
    # By a clock that does not jump: that the lease was touched is seen by its time being another one.
    touched, heard_s = lease.stat().st_mtime_ns, time.monotonic()
    while time.monotonic() - heard_s < _LEASE_S:
        time.sleep(_LEASE_S / 10)
        if (now := lease.stat().st_mtime_ns) != touched:
            touched, heard_s = now, time.monotonic()
    print(f"{ends.peer} has not been heard of for {_LEASE_S:.0f} s; the tunnel is closed")


MEMORY = Path("/run/mini-llm-rollout/settings")

if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # a file's, of which the stubs are not sure
    if sys.argv[1:] == ["close"]:
        close(MEMORY)
    else:
        own, peer, lease, addresses = sys.argv[1:]
        keep_open(Ends(own, peer), Path(lease), Path(addresses), MEMORY)
