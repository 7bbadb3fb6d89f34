"""Firewalls that really filter, and floating addresses that really move, through Hetzner's own client."""

import re
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hcloud import Client
from hcloud.firewalls import FirewallResource, FirewallRule
from hcloud.images import Image
from hcloud.locations import Location
from hcloud.networks import NetworkSubnet
from hcloud.server_types import ServerType
from hcloud.servers import BoundServer

from scripts.bake.answers import given
from scripts.local_cloud.machines.network import tag_of, transfer_addresses
from tests.local_cloud.harness import LocalCloud, address_of, cut_off, running_cloud, ssh

EVERYWHERE = ["0.0.0.0/0", "::/0"]
# A program that answers each connection with the server's name.
ANSWER = "systemd-run --quiet --unit answer-{port} /usr/bin/python3 -c '{program}'"
PROGRAM = (
    "import socket\n"
    's = socket.create_server(("", {port}))\n'
    "while True:\n"
    "    c = s.accept()[0]; c.sendall(socket.gethostname().encode()); c.close()\n"
)


@pytest.fixture(scope="module")
def servers(cloud: LocalCloud, key: Path) -> Iterator[list[BoundServer]]:
    """Two servers that answer on the ports 8000 and 9000."""
    client = cloud.client()
    known = client.ssh_keys.create("network", key.with_suffix(".pub").read_text())
    made = [
        client.servers.create(name, ServerType(name="cx23"), Image(name="debian-13"), ssh_keys=[known])
        for name in ("left", "right")
    ]
    for one in made:
        for port in (8000, 9000):
            ssh(key, address_of(one.server), ANSWER.format(port=port, program=PROGRAM.format(port=port)))
    yield [one.server for one in made]
    for one in made:
        one.server.delete().wait_until_finished()


def ask(address: str, port: int) -> str | None:
    """Who answers; None if nobody does."""
    for _ in range(20):
        try:
            with socket.create_connection((address, port), timeout=1) as connection:
                return connection.recv(100).decode()
        except ConnectionRefusedError:
            continue  # the program is still starting
        except OSError:
            return None
    return None


def test_a_firewall_filters(cloud: LocalCloud, servers: list[BoundServer], key: Path) -> None:
    """What no rule lets in is dropped, at once and live; what is taken away again filters no more."""
    client, (left, right) = cloud.client(), servers
    rule = FirewallRule(direction="in", protocol="tcp", port="8000", source_ips=EVERYWHERE, destination_ips=[])
    assert [ask(address_of(left), port) for port in (8000, 9000)] == ["left", "left"]
    made = client.firewalls.create("web", [rule], resources=[FirewallResource("server", server=left)])
    for action in given(made.actions):
        action.wait_until_finished()
    assert [ask(address_of(left), port) for port in (8000, 9000)] == ["left", None]
    assert ask(address_of(right), 9000) == "right"
    # A flow that goes out has its answers, though nothing else comes in.
    shown = given(client.servers.get_by_id(given(left.id)).public_net).firewalls
    assert [(one.firewall.id, one.status) for one in given(shown)] == [(made.firewall.id, "applied")]
    wider = FirewallRule(direction="in", protocol="tcp", port="8000-9000", source_ips=EVERYWHERE, destination_ips=[])
    for action in made.firewall.set_rules([wider]):
        action.wait_until_finished()
    assert ask(address_of(left), 9000) == "left"
    for action in made.firewall.remove_from_resources([FirewallResource("server", server=left)]):
        action.wait_until_finished()
    made.firewall.delete()
    assert ssh(key, address_of(left), "hostname").strip() == "left"


def test_a_firewall_for_going_out(cloud: LocalCloud, servers: list[BoundServer], key: Path) -> None:
    """With a rule for going out, everything else stays inside; answers to what came in still leave."""
    client, (left, right) = cloud.client(), servers
    rules = [
        FirewallRule(direction="in", protocol="tcp", port="22", source_ips=EVERYWHERE, destination_ips=[]),
        FirewallRule(direction="out", protocol="tcp", port="8000", source_ips=[], destination_ips=EVERYWHERE),
    ]
    made = client.firewalls.create("out", rules, resources=[FirewallResource("server", server=left)])
    for action in given(made.actions):
        action.wait_until_finished()
    look = "timeout 2 bash -c 'cat < /dev/tcp/{address}/{port}' || echo nobody"
    seen = [ssh(key, address_of(left), look.format(address=address_of(right), port=port)) for port in (8000, 9000)]
    assert [one.strip() for one in seen] == ["right", "nobody"]
    for action in made.firewall.remove_from_resources([FirewallResource("server", server=left)]):
        action.wait_until_finished()
    made.firewall.delete()


def test_a_floating_address_moves(cloud: LocalCloud, servers: list[BoundServer], key: Path) -> None:
    """It leads to the server that it is assigned to, which must carry it; reassigned, to the other, at once."""
    client: Client = cloud.client()
    made = client.floating_ips.create("ipv4", name="service", home_location=Location(name="fsn1"))
    floating, service = made.floating_ip, given(made.floating_ip.ip)
    for server in servers:
        ssh(key, address_of(server), f"ip address add {service}/32 dev eth0")
    for server in servers:
        floating.assign(server).wait_until_finished()
        assert ask(service, 8000) == server.name
        assert given(client.floating_ips.get_by_id(given(floating.id)).server).id == server.id
    # Who does not have it may carry it, but nothing that is sent under it gets through.
    left, right = servers
    send = "timeout 2 bash -c 'exec 3<>/dev/tcp/{address}/8000; cat <&3' || echo nobody"
    script = f"ip route add {address_of(right)}/32 via 172.31.1.1 dev eth0 onlink src {service}; "
    script += send.format(address=address_of(right)) + f"; ip route del {address_of(right)}/32"
    assert ssh(key, address_of(left), script).strip() == "nobody"
    floating.unassign().wait_until_finished()
    assert ask(service, 8000) is None
    floating.delete()


def test_private_networks(cloud: LocalCloud, servers: list[BoundServer], key: Path) -> None:
    """Members reach each other through the gateway; whoever is in another network of the same range does not."""
    client, (left, right) = cloud.client(), servers
    subnet = NetworkSubnet(type="cloud", network_zone="eu-central", ip_range="10.7.1.0/24")
    inner, other = (client.networks.create(name, "10.7.0.0/16", subnets=[subnet]) for name in ("inner", "other"))
    known = given(client.ssh_keys.get_by_name("network"))
    third = client.servers.create(
        "third", ServerType(name="cx23"), Image(name="debian-13"), ssh_keys=[known], networks=[other]
    )
    try:
        for action in [third.action, *third.next_actions]:
            action.wait_until_finished()
        left.attach_to_network(inner, ip="10.7.1.5", alias_ips=["10.7.1.6"]).wait_until_finished()
        right.attach_to_network(inner).wait_until_finished()
        [shown] = given(client.servers.get_by_id(given(right.id)).private_net)
        assert (shown.ip, shown.network.id) == ("10.7.1.1", inner.id)
        look = "timeout 2 bash -c 'cat < /dev/tcp/10.7.1.5/8000' || echo nobody"
        seen = [ssh(key, address_of(one), look).strip() for one in (right, third.server)]
        assert seen == ["left", "nobody"]
        # The same subnet, and yet no neighbour: everything goes by the gateway, and nothing to all.
        state = ssh(key, address_of(right), "cat /sys/class/net/enp7s0/mtu; ip -4 -o address show dev enp7s0; ip route")
        assert state.startswith("1450\n")
        assert "10.7.1.1/32" in state
        assert "10.7.0.0/16 via 10.7.0.1 dev enp7s0" in state
        # An address of another member is not to be had by setting it.
        source = 'import socket; print(socket.create_connection(("10.7.1.5", 8000), 2, ("{}", 0)).recv(9).decode())'
        steal = "ip address add 10.7.1.77/32 dev enp7s0; python3 -c '{}' 2>/dev/null || echo nobody"
        tries = [steal.format(source.format(ip)) for ip in ("10.7.1.1", "10.7.1.77")]
        seen = [ssh(key, address_of(right), one).strip() for one in tries]
        assert seen == ["left", "nobody"]
        told = ssh(key, address_of(left), "curl -fsS http://169.254.169.254/hetzner/v1/metadata/private-networks")
        assert '- ip: 10.7.1.5\n  alias_ips: ["10.7.1.6"]\n  interface_num: 1\n' in told
        assert "network: 10.7.0.0/16\n  subnet: 10.7.1.0/24\n  gateway: 10.7.0.1\n" in told
        # It is there from the boot on, and gone with the network.
        right.reset().wait_until_finished()
        assert ssh(key, address_of(right), look).strip() == "left"
        inner.delete()
        assert "gone" in ssh(key, address_of(left), "sleep 1; ip link show enp7s0 || echo gone")
        assert client.servers.get_by_id(given(left.id)).private_net == []
    finally:
        third.server.delete().wait_until_finished()
        other.delete()


def test_servers_are_cut_off_from_the_outside(cloud: LocalCloud, servers: list[BoundServer], key: Path) -> None:
    """One by its name or all of them; they still reach each other, and the host still reaches them."""
    left, right = servers
    outside, _ = transfer_addresses(tag_of(cloud.state))
    with socket.create_server((outside, 0), backlog=64) as listener:
        look = "timeout 2 bash -c 'exec 3<>/dev/tcp/{0}/{1}' && echo reached || echo nobody"
        port = listener.getsockname()[1]

        def seen() -> list[str]:
            return [ssh(key, address_of(one), look.format(outside, port)).strip() for one in servers]

        assert seen() == ["reached", "reached"]
        cut_off(cloud, "left")
        assert seen() == ["nobody", "reached"]
        tag = tag_of(cloud.state)
        chain = ["ip", "netns", "exec", f"mlc-{tag}", "nft", "list", "chain", "inet", f"mlc_{tag}", "outside"]
        counted = subprocess.run(chain, capture_output=True, text=True, check=True).stdout
        assert re.search(r"counter packets [1-9]\d* bytes [1-9]\d* drop", counted), counted
        assert ssh(key, address_of(left), look.format(address_of(right), 22)).strip() == "reached"
        cut_off(cloud, "*")
        assert seen() == ["nobody", "nobody"]
        left.reset().wait_until_finished()  # it holds over a start, and for whoever comes later
        assert seen() == ["nobody", "nobody"]
        cut_off(cloud)
        assert seen() == ["reached", "reached"]


def test_flows_of_a_moved_address(host: None, tmp_path: Path, key: Path) -> None:
    """By default the new server hears of the old one's flow and resets it; told so, its firewall drops it unseen."""
    echo = (
        "import socket, socketserver\n"
        "class Echo(socketserver.BaseRequestHandler):\n"
        "    def handle(self):\n"
        "        while self.request.recv(100):\n"
        "            self.request.sendall(socket.gethostname().encode())\n"
        'socketserver.ThreadingTCPServer(("", 8001), Echo).serve_forever()\n'
    )
    rules = [
        FirewallRule(direction="in", protocol="tcp", port=port, source_ips=EVERYWHERE, destination_ips=[])
        for port in ("22", "8001")
    ]
    for arguments, moved in ((), "reset"), (("--forget-moved-flows",), "silence"):
        folder = tmp_path / moved
        folder.mkdir()
        with running_cloud(folder, *arguments) as own:
            client = own.client()
            known = client.ssh_keys.create("known", key.with_suffix(".pub").read_text())
            wall = client.firewalls.create("wall", rules).firewall
            floating = client.floating_ips.create("ipv4", home_location=Location(name="fsn1")).floating_ip
            pair = [
                client.servers.create(
                    name, ServerType(name="cx23"), Image(name="debian-13"), ssh_keys=[known], firewalls=[wall]
                ).server
                for name in ("first", "second")
            ]
            for one in pair:
                ssh(key, address_of(one), f"ip address add {floating.ip}/32 dev eth0")
                ssh(key, address_of(one), f"systemd-run --quiet /usr/bin/python3 -c '{echo}'")
            # What a server begins itself has its answers, at a server with a firewall too.
            look = f"for i in $(seq 50); do timeout 2 bash -c '</dev/tcp/{address_of(pair[1])}/8001' && break; done"
            ssh(key, address_of(pair[0]), look)
            floating.assign(pair[0]).wait_until_finished()
            with socket.create_connection((floating.ip, 8001), timeout=2) as connection:

                def talk(connection: socket.socket = connection) -> str:
                    try:
                        connection.sendall(b"x")
                        return connection.recv(100).decode()
                    except TimeoutError:
                        return "silence"
                    except ConnectionResetError:
                        return "reset"

                assert talk() == "first"
                floating.assign(pair[1]).wait_until_finished()
                assert talk() == moved
                with socket.create_connection((floating.ip, 8001), timeout=2) as fresh:
                    assert talk(fresh) == "second"
                if moved == "silence":
                    floating.assign(pair[0]).wait_until_finished()
                    assert talk().startswith("first")  # where it began it goes on
