"""A rollout's tunnel in the kernel: two ends in namespaces, an address that moves, connections that began before."""

import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from scripts.local_cloud.machine_interface import MachineSpec, PrivateLink
from scripts.local_cloud.machines.host import run, run_ip
from scripts.local_cloud.machines.network import Network
from tests.image.harness import ROOT

_ROOTFS = ROOT / "image" / "rootfs"
_RANGE, _FLOATING = "198.51.100.0/24", ("198.51.100.200", "fd4d:4c4c:4d:ff::1")
_OLD, _NEW = 1, 2
_PORT = 443
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
# Docker's firewall is not here, and iptables need not be.
_END = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(_ROOTFS / "usr/lib/mini-llm")!r})
import tunnel

def ask(command, text=""):
    return "" if command[0] in ("iptables", "ip6tables") else tunnel.run(command, text)

which, own, peer, memory, *addresses = sys.argv[1:]
ends = tunnel.Ends(own, peer)
if which == "old":
    tunnel.open_old(ends, addresses, Path(memory), ask)
else:
    tunnel.open_new(ends, "eth0", addresses, Path(memory), ask)
"""
_STRAY = """
import socket, sys
for family, address in ((socket.AF_INET, sys.argv[1]), (socket.AF_INET6, sys.argv[2] + "%rollout")):
    with socket.socket(family, socket.SOCK_DGRAM) as stray:
        stray.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"rollout")
        stray.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        stray.connect((address, 9))
        stray.send(b"")
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
    return namespace


@contextmanager
def _serving(namespace: str, name: str) -> Iterator[None]:
    command = ["ip", "netns", "exec", namespace, sys.executable, "-c", _SERVER, name]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "listens\n"
            yield
        finally:
            process.kill()


@pytest.fixture
def network() -> Iterator[Network]:
    """A cloud with two servers and what floats; the address leads to the old one."""
    with ExitStack() as leaving:
        made = Network(secrets.token_hex(3), _RANGE, print)
        leaving.callback(made.close)
        made.open()
        for number, name in ((_OLD, "old"), (_NEW, "new")):
            leaving.enter_context(_serving(_add_node(made, number), name))
        _lead(made, _OLD)
        yield made


def _lead(network: Network, number: int) -> None:
    network.route(f"{_FLOATING[0]}/32", number)
    network.route(f"{_FLOATING[1]}/64", number)


def _open_ends(network: Network, folder: Path) -> None:
    for which, own, peer in (("old", _OLD, _NEW), ("new", _NEW, _OLD)):
        words = [which, _inside(own), _inside(peer), str(folder / which), *_FLOATING]
        run(["ip", "netns", "exec", network.server_namespace(own), sys.executable, "-c", _END, *words])


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
        _open_ends(network, tmp_path)
        assert _say(begun, "two") == "old two"  # nothing has moved yet
        inside = network.server_namespace(_NEW)
        for number in range(10):  # whatever else comes through: neighbours are asked for, a stray packet
            run(
                [
                    "ip",
                    "netns",
                    "exec",
                    inside,
                    sys.executable,
                    "-c",
                    _STRAY,
                    f"169.254.77.{number + 4}",
                    f"fe80::{number + 4}",
                ]
            )
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
