"""A node and its private networks: known to the filter under any name, from the boot on or late, and configured."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hcloud.images import BoundImage
from hcloud.networks import BoundNetwork, NetworkSubnet
from hcloud.ssh_keys import BoundSSHKey

from scripts.bake.answers import given
from scripts.local_cloud.machines.network import tag_of
from scripts.local_cloud.machines.private_networks import link_name
from tests.image.harness import Node, node
from tests.local_cloud.harness import LocalCloud, running_inside

RANGE = "10.9.0.0/16"
DHCP_SERVER = Path(__file__).with_name("dhcp.py")
# Answers one connection after the other, at all of the node's addresses.
LISTEN = (
    'systemd-run --quiet /usr/bin/python3 -c \'import socket; s = socket.create_server(("", 9999))\n'
    "while True: s.accept()[0].close()'"
)
REACH = "timeout 2 bash -c 'exec 3<>/dev/tcp/{}/9999' 2>/dev/null && echo reached || echo nobody"


@pytest.fixture
def network(cloud: LocalCloud) -> Iterator[BoundNetwork]:
    """A private network; gone afterwards."""
    subnet = NetworkSubnet(type="cloud", network_zone="eu-central", ip_range="10.9.1.0/24")
    made = cloud.client().networks.create("inner", RANGE, subnets=[subnet])
    yield made
    made.delete()


def private_set(own: Node) -> list[str]:
    """What the filter knows."""
    listed = json.loads(own.run("nft --json list set inet node private"))["nftables"]
    return list(next(one["set"] for one in listed if "set" in one).get("elem", []))


def wait_for_set(own: Node, expected: list[str], patience_s: float = 30.0) -> None:
    """Until the filter knows these and no others."""
    end_s = time.monotonic() + patience_s
    while (seen := private_set(own)) != expected:
        assert time.monotonic() < end_s, (seen, own.run("journalctl --no-pager -u mini-llm-private-network"))
        time.sleep(0.2)


def private_address(cloud: LocalCloud, own: Node) -> str:
    [link] = given(cloud.client().servers.get_by_id(given(own.server.id)).private_net)
    return str(link.ip)


@contextmanager
def running_dhcp_server(cloud: LocalCloud, own: Node, network: BoundNetwork, address: str) -> Iterator[None]:
    """At the network's end of the node's link; the local cloud itself has none."""
    namespace = f"mlc-{tag_of(cloud.state)}-n{network.id}"
    words = [sys.executable, str(DHCP_SERVER), link_name(given(own.server.id)), "10.9.0.1", address, RANGE]
    with running_inside(namespace, words, "listening"):
        yield


def test_the_filter_knows_private_networks(
    cloud: LocalCloud, image: BoundImage, known: BoundSSHKey, key: Path, network: BoundNetwork
) -> None:
    """Of a node that begins with one and of one that gets it late, under any name; and a rule may name them."""
    client = cloud.client()
    with (
        node(client, image, known, key, networks=[network]) as early,
        node(client, image, known, key) as late,
    ):
        late.wait_ready()
        wait_for_set(early, ["enp7s0"])
        assert private_set(late) == []
        late.server.attach_to_network(network).wait_until_finished()
        begun_s = time.monotonic()
        wait_for_set(late, ["enp7s0"])
        print(f"a network that came late was known after {time.monotonic() - begun_s:.1f} s")
        # What a rule opens there stays closed to the outside.
        late.run(f"nft insert rule inet node input iifname @private tcp dport 9999 accept; {LISTEN}")
        end_s = time.monotonic() + 10
        while early.run(REACH.format(private_address(cloud, late))).strip() != "reached":
            assert time.monotonic() < end_s
        assert early.run(REACH.format(late.address)).strip() == "nobody"
        # The table comes and goes, and the set is what it was.
        for verb in ("reload", "restart"):
            late.run(f"systemctl {verb} nftables")
            assert private_set(late) == ["enp7s0"]
        late.run("ip link set enp7s0 down; ip link set enp7s0 name inner0; ip link set inner0 up")
        wait_for_set(late, ["inner0"])
        late.server.detach_from_network(network).wait_until_finished()
        wait_for_set(late, [])
        # Nobody else has configured this one by now, so the node does.
        address = private_address(cloud, early)
        early.run("systemctl is-active systemd-networkd || true; ip address flush dev enp7s0")
        with running_dhcp_server(cloud, early, network, address):
            early.run("systemctl restart mini-llm-private-network")
            end_s = time.monotonic() + 60
            while address not in (seen := early.run("ip -4 -o address show dev enp7s0")):
                assert time.monotonic() < end_s, early.run(
                    "journalctl --no-pager -u mini-llm-private-network -u systemd-networkd; networkctl status enp7s0"
                )
                time.sleep(0.5)
            assert "dynamic" in seen
            assert "10.9.0.0/16 via 10.9.0.1 dev enp7s0" in early.run("ip route")
            assert "default" not in early.run("ip route show dev enp7s0")
        assert private_set(early) == ["enp7s0"]
        for own in (early, late):
            assert own.run("systemctl --failed --no-legend").strip() == ""
            assert own.ask("/health")[0] == 200
