"""A rollout's tunnel in the kernel: two ends in namespaces, an address that moves, connections that began before."""

import secrets
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from scripts.local_cloud.machine_interface import MachineSpec, PrivateLink
from scripts.local_cloud.machines.host import run, run_ip
from scripts.local_cloud.machines.network import Network
from tests.image.harness import ROOT
from tests.local_cloud.harness import running_inside

_ROOTFS = ROOT / "image" / "rootfs"
_RANGE, _FLOATING = "198.51.100.0/24", ("198.51.100.200", "fd4d:4c4c:4d:ff::1")
_OLD, _NEW = 1, 2
_PORT = 443
_SETTINGS = (
    "cd /proc/sys/net; grep -s . ipv4/ip_forward ipv[46]/conf/all/forwarding ipv[46]/conf/all/accept_redirects"
    " netfilter/nf_conntrack_tcp_loose"
)
# Repeats what it is sent, and says who it is; a number gets as many bytes, and "later" its answer after a second.
_SERVER = f"""
import asyncio, sys

async def serve(reader, writer):
    while line := (await reader.readline()).decode().strip():
        if line == "later":
            await asyncio.sleep(1)
        writer.write(b"x" * int(line) if line.isdigit() else f"{{sys.argv[1]}} {{line}}\\n".encode())

async def main():
    async with await asyncio.start_server(serve, ["0.0.0.0", "::"], {_PORT}) as server:
        print("listens", flush=True)
        await server.serve_forever()

asyncio.run(main())
"""
_END = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(_ROOTFS / "usr/lib/mini-llm")!r})
import tunnel

what, own, peer, memory, *addresses = sys.argv[1:]
ends = tunnel.Ends(own, peer)
if what == "old":
    tunnel.open_old(ends, addresses, Path(memory))
elif what == "new":
    tunnel.open_new(ends, "eth0", addresses, Path(memory))
else:
    tunnel.close(Path(memory))
"""
# Neighbours are asked for in a dozen groups.
_STRAY = """
import socket
for number in range(4, 16):
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as stray:
        stray.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"rollout")
        stray.sendto(b"", (f"fe80::{number}%rollout", 9))
"""


def _inside(number: int) -> str:
    return f"10.77.0.{number + 1}"


def _add_node(network: Network, number: int) -> str:
    """A server's namespace with its addresses, as a node has them; what it is called."""
    ipv4, ipv6 = f"198.51.100.{10 + number}", f"fd4d:4c4c:4d:{number}::"
    network.add_server(MachineSpec(number, f"node-{number}", ipv4, f"{ipv6}/64", (), None, "", 1, 1.0, "fsn1"))
    hardware, net = f"86:00:00:00:00:0{number}", "10.77.0.0/24"
    link = PrivateLink(1, "net", _inside(number), (), hardware, net, net, "10.77.0.1", ())
    network.private.replace(number, (link,))
    namespace = network.server_namespace(number)
    run_ip(
        "link set lo up",
        f"address add {ipv4}/32 dev eth0",
        f"address add {_FLOATING[0]}/32 dev eth0",
        f"address add {ipv6}1/64 dev eth0",
        f"address add {_FLOATING[1]}/128 dev eth0",
        "link set eth0 up",
        "route add 172.31.1.1/32 dev eth0 scope link",
        "route add default via 172.31.1.1 dev eth0",
        "route add default via fe80::1 dev eth0",
        namespace=namespace,
    )
    run(["ip", "netns", "exec", namespace, "nft", "-f", str(_ROOTFS / "etc/nftables.conf")])
    run(["ip", "netns", "exec", namespace, "nft", "add element inet node private { enp7s0 }"])
    run(["ip", "netns", "exec", namespace, "sysctl", "-q", "net.ipv4.conf.all.accept_redirects=0"])
    return namespace


@pytest.fixture
def network() -> Iterator[Network]:
    """A cloud with two servers and what floats; the address leads to the old one."""
    with ExitStack() as leaving:
        made = Network(secrets.token_hex(3), _RANGE, print)
        leaving.callback(made.close)
        made.open()
        for number, name in ((_OLD, "old"), (_NEW, "new")):
            server = [sys.executable, "-c", _SERVER, name]
            leaving.enter_context(running_inside(_add_node(made, number), server, "listens"))
        _lead(made, _OLD)
        yield made


def _lead(network: Network, number: int) -> None:
    network.route(f"{_FLOATING[0]}/32", number)
    network.route(f"{_FLOATING[1]}/64", number)


def _tunnel(network: Network, folder: Path, number: int, what: str) -> None:
    words = [what, _inside(number), _inside(_OLD + _NEW - number), str(folder / f"{number}"), *_FLOATING]
    run(["ip", "netns", "exec", network.server_namespace(number), sys.executable, "-c", _END, *words])


def _describe(network: Network, number: int) -> str:
    """What a tunnel could have left in a node's kernel."""
    look = f"ip -4 rule; ip -6 rule; ip -o link; nft list tables; {_SETTINGS}"
    return run(["ip", "netns", "exec", network.server_namespace(number), "sh", "-c", look])


def _say(connection: socket.socket, word: str) -> str:
    connection.sendall(f"{word}\n".encode())
    return connection.recv(100).decode().strip()


@pytest.mark.parametrize("address", _FLOATING)
def test_an_address_that_is_heard_through_the_tunnel_answers_through_it(
    network: Network, tmp_path: Path, address: str
) -> None:
    """At once, before the old node is told that it has moved: a handshake in flight goes on, and so does who waits."""
    with ExitStack() as leaving:
        begun, waiting = (
            leaving.enter_context(socket.create_connection((address, _PORT), timeout=5)) for _ in range(2)
        )
        assert _say(begun, "one") == "old one"
        before = {number: _describe(network, number) for number in (_OLD, _NEW)}
        _tunnel(network, tmp_path, _OLD, "old")
        _tunnel(network, tmp_path, _NEW, "new")
        assert _say(begun, "two") == "old two"  # nothing has moved yet
        run(["ip", "netns", "exec", network.server_namespace(_NEW), sys.executable, "-c", _STRAY])
        waiting.sendall(b"later\n")
        _lead(network, _NEW)
        for each in (begun, waiting):
            each.settimeout(2.0)
        start_s = time.monotonic()
        assert _say(begun, "three") == "old three"
        print(f"answered after {time.monotonic() - start_s:.3f} s")
        assert waiting.recv(100) == b"old later\n"
        begun.sendall(b"200000\n")  # more than a packet of the tunnel holds
        left = 200_000
        while left:
            left -= len(begun.recv(left))
        new = leaving.enter_context(socket.create_connection((address, _PORT), timeout=5))
        assert _say(new, "four") == "new four"
    for number in (_OLD, _NEW):
        _tunnel(network, tmp_path, number, "close")
        assert _describe(network, number) == before[number]
    _lead(network, _OLD)  # a rollout that came to nothing
    with socket.create_connection((address, _PORT), timeout=5) as again:
        assert _say(again, "five") == "old five"
