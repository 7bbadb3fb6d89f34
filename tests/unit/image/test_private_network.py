"""Which interfaces lead to private networks, what the filter is told of them, and who sees to an address."""

from pathlib import Path

import pytest

from scripts.local_cloud.machine_interface import PrivateLink
from scripts.local_cloud.machines.metadata import private_networks
from tests.image.scripts import load_script

private_network = load_script("rootfs/usr/lib/mini-llm/private_network.py")
FIRST, SECOND = "86:00:00:00:00:0a", "86:00:00:00:00:0b"


class Node:
    """What a node has and is told; time is what the test says."""

    def __init__(self, folder: Path):
        self.devices, self.networkd = folder / "devices", folder / "networkd"
        for path in (self.devices, self.networkd):
            path.mkdir()
        self.commands: list[str] = []
        self.configured: set[str] = set()
        self.time_s = 0.0
        self.set = folder / "private.nft"
        self.networks = private_network.PrivateNetworks(
            folder, self.networkd, self.devices, self.run, self.configured.__contains__, lambda: self.time_s
        )

    def run(self, command: list[str]) -> None:
        self.commands.append(command[0])

    def plug(self, name: str, mac: str) -> None:
        (self.devices / name).mkdir()
        (self.devices / name / "address").write_text(f"{mac}\n")

    def unplug(self, name: str) -> None:
        (self.devices / name / "address").unlink()
        (self.devices / name).rmdir()


@pytest.fixture
def node(tmp_path: Path) -> Node:
    """A node with its public interface alone."""
    made = Node(tmp_path)
    made.plug("eth0", "96:00:00:00:00:01")
    made.plug("lo", "00:00:00:00:00:00")
    return made


def test_the_metadata_say_whose_interfaces_lead_there() -> None:
    """As the cloud writes them; without a network there is none."""
    link = PrivateLink(
        network_id=1,
        network_name="a: b",
        ip="10.0.1.2",
        alias_ips=("10.0.1.3",),
        mac_address=FIRST.upper(),
        ip_range="10.0.0.0/16",
        subnet="10.0.1.0/24",
        gateway="10.0.0.1",
        routes=(),
    )
    assert private_network.read_macs(private_networks({1: link})) == {FIRST}
    assert private_network.read_macs(private_networks({})) == set()


@pytest.mark.parametrize("text", ["not found", "- ip: 1", "5", "- mac_address: x\n", "- mac_address: '\"}'", "["])
def test_what_is_no_list_of_networks_is_not_believed(text: str) -> None:
    """Whoever answers; what the filter knows stays."""
    with pytest.raises(ValueError, match="the metadata of private networks"):
        private_network.read_macs(text)


def test_an_interface_is_known_by_its_hardware_address(node: Node) -> None:
    """Under any name, also when it comes late or is called otherwise later; the filter is told what is new, once."""
    node.networks.follow(set())
    assert node.set.read_text() == "flush set inet node private\n"
    node.networks.follow({FIRST})  # told before it is there
    node.plug("whatever", FIRST)
    node.plug("other", SECOND)
    node.configured |= {"whatever", "renamed"}
    for _ in range(3):
        node.networks.follow({FIRST})
    assert node.set.read_text().splitlines()[1:] == ['add element inet node private { "whatever" }']
    assert node.commands == ["nft", "nft"]
    node.unplug("whatever")
    node.plug("renamed", FIRST)
    node.networks.follow({FIRST})
    assert '{ "renamed" }' in node.set.read_text()
    node.networks.follow(set())
    assert node.set.read_text() == "flush set inet node private\n"


def test_a_name_that_would_be_more_than_one_is_left_out(node: Node) -> None:
    """The kernel takes quotes and braces in names; nft would read them."""
    node.plug('a" } x', FIRST)
    node.networks.follow({FIRST})
    assert node.set.read_text() == "flush set inet node private\n"


def test_what_nobody_configures_is_configured_by_dhcp(node: Node) -> None:
    """After a while, for the node's system may do so itself; and no more once the network is gone."""
    node.plug("mine", FIRST)
    node.plug("theirs", SECOND)
    node.configured.add("theirs")
    for node.time_s in (0.0, 5.0, 11.0):
        node.networks.follow({FIRST, SECOND})
    assert list(node.networkd.iterdir()) == []
    for node.time_s in (13.0, 14.0):
        node.networks.follow({FIRST, SECOND})
    [file] = node.networkd.iterdir()
    assert f"[Match]\nMACAddress={FIRST}\n" in file.read_text()
    assert node.commands == ["nft", "systemctl"]
    node.configured.add("mine")
    node.networks.follow({FIRST, SECOND})
    assert file.exists()
    node.unplug("mine")
    node.networks.follow({SECOND})
    assert list(node.networkd.iterdir()) == []
    assert node.commands == ["nft", "systemctl", "nft", "systemctl"]


def test_a_filter_that_could_not_be_told_is_told_again(node: Node) -> None:
    """Its table may not be there yet."""

    def fail(command: list[str]) -> None:
        raise OSError(command[0])

    node.plug("mine", FIRST)
    node.configured.add("mine")
    node.networks.run = fail
    with pytest.raises(OSError, match="nft"):
        node.networks.follow({FIRST})
    node.networks.run = node.run
    node.networks.follow({FIRST})
    assert node.commands == ["nft"]
