"""What the local machines decide before they touch the host: names, seeds, growth, and what belongs to whom."""

import ipaddress
import json
import os
import socket
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from scripts.local_cloud.machine_interface import FirewallRule, MachineFailed, MachineSpec, PoolFull, PrivateLink
from scripts.local_cloud.machines import (
    base_image,
    cgroups,
    console,
    container,
    firewall,
    host,
    inner_sockets,
    metadata,
    network,
    pool,
    private_networks,
    seed,
)
from scripts.local_cloud.machines.machines import LocalMachines

KEY = "ssh-ed25519 AAAA someone"
SPEC = MachineSpec(
    server_id=42,
    name="web-1",
    ipv4="198.18.0.7",
    ipv6_network="2001:db8:1:2::/64",
    public_keys=(KEY,),
    root_password=None,
    user_data="#cloud-config\nruncmd: [true]\n",
    cores=2,
    memory_gb=4.0,
    location="fsn1",
)
RESOLVERS = ["192.0.2.53"]
LAUNCH = container.Launch(
    server_id=42,
    machine="mlc-abcdef-42",
    hostname="web-1",
    directory=Path("/state/pool/servers/42"),
    namespace=Path("/run/netns/mlc-abcdef-42"),
    console=Path("/state/consoles/42.log"),
    groups=(Path("/groups/a/cgroup.procs"),),
)


def replaced(**fields: object) -> MachineSpec:
    return MachineSpec(**{**SPEC.__dict__, **fields})


def test_the_tag_belongs_to_the_state_directory(tmp_path: Path) -> None:
    """Two directories have different tags; one has the same under each of its names."""
    (tmp_path / "link").symlink_to(tmp_path / "a")
    (tmp_path / "a").mkdir()
    assert network.tag_of(tmp_path / "a") == network.tag_of(tmp_path / "link")
    assert network.tag_of(tmp_path / "a") != network.tag_of(tmp_path / "b")
    assert len(network.tag_of(tmp_path)) == 6


def test_names_of_links_fit_the_kernel() -> None:
    """A link's name has at most 15 characters, whatever the server's id."""
    assert len(network.link_name(10**9)) <= 15
    assert len(network.Network("abcdef", "198.18.0.0/16", print).namespace) <= 15


def test_transfer_addresses_are_link_local_and_differ_by_tag() -> None:
    """The link between host and cloud takes addresses that no one routes, never that of the metadata."""
    for tag in ("000000", "abcdef", "ffffff"):
        first, second = network.transfer_addresses(tag)
        assert first != second
        assert first.startswith("169.254.")
        assert network.METADATA_ADDRESS not in (first, second)
    assert network.transfer_addresses("000001") != network.transfer_addresses("000002")


def test_mac_addresses_follow_the_id() -> None:
    """A server keeps its interface's address over power-offs."""
    assert network.mac_address(42) == "96:00:00:00:00:2a"


def test_namespaces_of_a_cloud_are_told_from_others() -> None:
    """Only names with the cloud's own tag are its own, and all others go before the one that is only its tag."""
    names = ["mlc-abcdef", "mlc-abcdef-1", "mlc-abcdef-n9", "mlc-abcdeff", "mlc-123456-1", "blue"]
    assert network.namespaces_of("abcdef", names) == ["mlc-abcdef-n9", "mlc-abcdef-1", "mlc-abcdef"]


def test_the_seed_says_who_the_server_is() -> None:
    """Metadata name the instance, the host and its keys; user-data goes as it came."""
    documents = seed.documents(SPEC, RESOLVERS)
    about = json.loads(documents["meta-data"])
    assert about == {"instance-id": "42", "local-hostname": "web-1", "public-keys": [KEY]}
    assert documents["user-data"] == SPEC.user_data


def test_a_server_without_user_data_gets_an_empty_one() -> None:
    """cloud-init takes the seed only if there is a file of user-data that it can read."""
    assert seed.documents(replaced(user_data=""), [])["user-data"].startswith("#cloud-config\n")


def test_the_network_is_a_single_address_and_a_gateway_outside_of_it() -> None:
    """As on the real cloud: /32, the gateway 172.31.1.1, and ::1 of the /64."""
    interface, resolver = json.loads(seed.documents(SPEC, RESOLVERS)["network-config"])["config"]
    assert interface["name"] == "eth0"
    assert interface["subnets"] == [
        {"type": "static", "address": "198.18.0.7/32", "gateway": "172.31.1.1"},
        {"type": "static6", "address": "2001:db8:1:2::1/64", "gateway": "fe80::1"},
    ]
    assert resolver == {"type": "nameserver", "address": RESOLVERS}


def test_a_server_may_have_no_public_address() -> None:
    """Then its interface is named and has none."""
    config: Any = seed.network_config(replaced(ipv4=None, ipv6_network=None), [])["config"]
    assert len(config) == 1
    assert config[0]["subnets"] == []


def test_password_login_is_for_servers_that_were_given_a_password() -> None:
    """Root logs in by key alone unless the cloud has made up a password, which must then be changed."""
    by_key = json.loads(seed.vendor_data(SPEC).removeprefix("#cloud-config\n"))
    by_password = json.loads(seed.vendor_data(replaced(root_password="geheim")).removeprefix("#cloud-config\n"))
    assert by_key == {"ssh_pwauth": False, "disable_root": False}
    assert by_password["ssh_pwauth"] is True
    assert by_password["chpasswd"]["expire"] is True
    assert by_password["chpasswd"]["users"][0]["password"] == "geheim"


def test_the_seed_is_written_anew_at_each_start(tmp_path: Path) -> None:
    """A second start with other data leaves nothing of the first, such as leave to log in by password."""
    seed.write(tmp_path, replaced(root_password="geheim"), RESOLVERS)
    assert (tmp_path / "etc/ssh/sshd_config.d/05-root-password.conf").exists()
    seed.write(tmp_path, replaced(user_data="#!/bin/sh\n"), [])
    assert not (tmp_path / "etc/ssh/sshd_config.d/05-root-password.conf").exists()
    assert (tmp_path / "var/lib/cloud/seed/nocloud/user-data").read_text() == "#!/bin/sh\n"
    assert "nameserver" not in (tmp_path / "etc/resolv.conf").read_text()


def test_a_resolver_file_of_the_servers_own_stays(tmp_path: Path) -> None:
    """Who has set up name resolution inside keeps it."""
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/resolv.conf").write_text("nameserver 192.0.2.99\n")
    seed.write(tmp_path, SPEC, RESOLVERS)
    assert (tmp_path / "etc/resolv.conf").read_text() == "nameserver 192.0.2.99\n"


@pytest.mark.parametrize("kind", ["a pipe", "a terabyte", "a directory", "a link"])
def test_whatever_a_server_made_of_its_resolver_file_stays(tmp_path: Path, kind: str) -> None:
    """None of them is followed, waited for, or read whole."""
    path = tmp_path / "etc/resolv.conf"
    path.parent.mkdir()
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a terabyte":
        path.write_text("nameserver 192.0.2.99\n")
        os.truncate(path, 1 << 40)
    elif kind == "a directory":
        path.mkdir()
    else:
        path.symlink_to("../run/resolv.conf")
    before = path.lstat()
    seed.write(tmp_path, SPEC, RESOLVERS)
    assert (path.lstat().st_ino, path.lstat().st_size) == (before.st_ino, before.st_size)


def test_links_on_a_disk_do_not_lead_to_the_hosts_files(tmp_path: Path) -> None:
    """A directory that a server has replaced by a link is refused, and a link in place of a file is replaced."""
    outside, disk = tmp_path / "outside", tmp_path / "disk"
    outside.mkdir()
    disk.mkdir()
    (outside / "file").write_text("the host's")
    (disk / "var").symlink_to(outside)
    with pytest.raises(MachineFailed):
        seed.write_inside(disk, "var/lib/file", "x", mode=0o600)
    (disk / "file").symlink_to(outside / "file")
    seed.write_inside(disk, "file", "x", mode=0o600)
    assert (outside / "file").read_text() == "the host's"
    assert not (disk / "file").is_symlink()


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("/hetzner/v1/metadata/hostname", "web-1"),
        ("/hetzner/v1/metadata/instance-id", "42"),
        ("/hetzner/v1/metadata/public-ipv4", "198.18.0.7"),
        ("/hetzner/v1/metadata/region", "eu-central"),
        ("/hetzner/v1/metadata/availability-zone", "fsn1-dc1"),
        ("/hetzner/v1/metadata/public-keys", json.dumps([KEY])),
        ("/hetzner/v1/userdata", SPEC.user_data),
        ("/hetzner/v1/metadata/nothing", None),
        ("/", None),
    ],
)
def test_metadata_paths(path: str, text: str | None) -> None:
    """Each path answers with what it names, others with nothing."""
    assert metadata.answer(path, SPEC, RESOLVERS, {}) == text


def test_the_whole_metadata_is_one_field_a_line() -> None:
    """Every line is a YAML field whose value is JSON."""
    text = metadata.answer("/hetzner/v1/metadata", SPEC, RESOLVERS, {})
    assert text is not None
    fields = {line.split(": ", 1)[0]: json.loads(line.split(": ", 1)[1]) for line in text.splitlines()}
    assert fields["instance-id"] == 42
    assert fields["network-config"]["version"] == 1
    assert fields["vendor_data"].startswith("#cloud-config")


def test_a_firewall_lets_in_what_its_rules_say() -> None:
    """Rules are said once for each network, IPv6 by its own names; what is not named is dropped, all may go out."""
    rules = (
        FirewallRule("in", "tcp", ("0.0.0.0/0", "10.0.0.0/8", "::/0"), (80, 81)),
        FirewallRule("in", "icmp", ("2001:db8::/32",), None),
    )
    text = firewall.table(7, "s7", rules)
    assert "ip saddr 0.0.0.0/0 meta l4proto tcp th dport 80-81 accept\n" in text
    assert "10.0.0.0/8" not in text
    assert "ip6 saddr ::/0 meta l4proto tcp th dport 80-81 accept\n" in text
    assert "ip6 saddr 2001:db8::/32 meta l4proto icmpv6 accept\n" in text
    assert 'oifname "s7" jump public_in' in text
    assert "public_out" not in text


def test_a_rule_for_going_out_closes_that_way_too() -> None:
    """Then only what is named goes out, by its destination."""
    text = firewall.table(7, "s7", (FirewallRule("out", "udp", ("192.0.2.1/32",), (53, 53)),))
    assert 'iifname "s7" jump public_out' in text
    assert "ip daddr 192.0.2.1/32 meta l4proto udp th dport 53-53 accept\n" in text
    assert 'iifname "s7" meta l4proto { tcp, udp } th dport 53 jump public_out' in text  # to the cloud's name server
    assert text.count("\ndrop\n") == 2


def test_a_firewall_may_know_only_the_flows_that_began_at_its_server() -> None:
    """Marks tell two servers apart, and for each the flows that come to it from those that it begins."""
    rules = (FirewallRule("in", "tcp", ("0.0.0.0/0",), (80, 80)),)
    text = firewall.table(100_001, "s100001", rules, forgets_moved=True)
    assert "ct state { established, related } ct mark & 0xffff == 0x86a3 accept\n" in text
    assert "ct direction reply ct mark & 0xffff0000 == 0x86a30000 accept\n" in text
    assert 'iifname "s100001" jump public_out' in text
    assert text.count("\ndrop\n") == 1  # what it begins itself is free
    assert "0x86a3 " not in firewall.table(100_002, "s100002", rules, forgets_moved=True)
    assert "ct mark" not in firewall.table(100_001, "s100001", rules)


def test_a_pool_with_room_does_not_grow() -> None:
    """Two GiB free are enough."""
    assert pool.grown_size(4 * pool.GIB, 3 * pool.GIB, 100 * pool.GIB) is None


def test_a_pool_grows_by_steps() -> None:
    """Little free in it, much on the host: four GiB more."""
    assert pool.grown_size(4 * pool.GIB, pool.GIB, 100 * pool.GIB) == 8 * pool.GIB


def test_a_pool_never_takes_more_than_the_host_has() -> None:
    """What it grows by fits on the host, beside what the host keeps."""
    assert pool.grown_size(4 * pool.GIB, pool.GIB, 5 * pool.GIB) == 7 * pool.GIB


def test_a_full_host_is_said_so() -> None:
    """The message tells what is free and what to do."""
    with pytest.raises(PoolFull, match=r"the disk is full: 2\.\d GB are free"):
        pool.grown_size(4 * pool.GIB, pool.GIB // 2, 2 * pool.GIB)
    assert pool.grown_size(8 * pool.GIB, 4 * pool.GIB, 0) is None  # what the pool has is its own


def test_all_of_a_pool_has_its_place_on_the_disk(tmp_path: Path) -> None:
    """A hole in the file would be a write that finds the disk full, and the end of the file system in it."""
    pool.allocate(tmp_path / "pool", 1 << 20)
    with (tmp_path / "pool").open("r+b") as file:
        file.truncate(3 << 20)
    pool.allocate(tmp_path / "pool", 2 << 20)
    status = (tmp_path / "pool").stat()
    assert status.st_size == 3 << 20
    assert 2 << 20 <= status.st_blocks * 512 < 3 << 20


def test_a_pool_that_finds_no_room_stays_as_it_was(tmp_path: Path) -> None:
    """More than any disk has: refused with the path and what to do, and nothing is taken."""
    pool.allocate(tmp_path / "pool", 1 << 20)
    with pytest.raises(PoolFull, match=r"the disk is full: .*/pool cannot have .* delete other files"):
        pool.allocate(tmp_path / "pool", 1 << 60)  # refused at once: what nearly fits would fill the disk for a moment
    assert (tmp_path / "pool").stat().st_size == 1 << 20
    assert (tmp_path / "pool").stat().st_blocks * 512 < 2 << 20


def feed(path: Path, *chunks: bytes) -> list[str]:
    """What was told while a console said this."""
    reader, writer = os.pipe()
    for chunk in chunks:
        os.write(writer, chunk)
    os.close(writer)
    told: list[str] = []
    console.copy_console(os.fdopen(reader, "rb", buffering=0), path, lambda: told.append("long"))
    return told


def test_a_consoles_file_begins_anew_when_a_server_fills_it(tmp_path: Path) -> None:
    """One that is long is emptied and told, others go on."""
    path = tmp_path / "1.log"
    assert feed(path, b"one\n") == []
    assert feed(path, b"two\n") == []
    assert path.read_bytes() == b"one\ntwo\n"
    os.truncate(path, 17 << 20)
    assert feed(path, b"three\n") == ["long"]
    assert path.read_bytes() == b"three\n"


def test_a_console_that_cannot_be_written_is_heard_to_its_end(tmp_path: Path) -> None:
    """Who speaks must neither end nor wait because a disk is full."""
    assert feed(Path("/dev/full"), b"x" * 30_000, b"y" * 30_000) == []
    assert feed(tmp_path / "no-such-folder" / "1.log", b"x") == []


def test_the_last_line_of_a_console_is_found_without_reading_all_of_it(tmp_path: Path) -> None:
    """A terabyte of it, too; a console without a word, or none at all, is told so."""
    path = tmp_path / "1.log"
    assert console.last_line(path) == "it ended without a word"
    path.touch()
    assert console.last_line(path) == "it ended without a word"
    os.truncate(path, 1 << 40)
    with path.open("ab") as file:
        file.write(b"\nwhy it ended \r\n\n")
    assert console.last_line(path) == "why it ended"


def test_routes_of_the_host_keep_a_range_from_being_taken_twice() -> None:
    """Wider and narrower ones count; the default route and the halves that a VPN puts in its place do not."""
    wanted = ipaddress.IPv4Network("198.18.0.0/16")

    def overlap(*destinations: str) -> str | None:
        return network.find_overlap(wanted, json.dumps([{"dst": each, "dev": "x"} for each in destinations]))

    assert overlap("default", "0.0.0.0/1", "128.0.0.0/1", "10.0.0.0/8", "198.19.0.0/16") is None
    assert overlap("default", "198.18.0.0/16") == "198.18.0.0/16"
    assert overlap("198.18.7.9") == "198.18.7.9/32"
    assert overlap("198.0.0.0/8") == "198.0.0.0/8"
    assert network.find_overlap(wanted, "[ ]") is None


def test_a_server_has_few_calls_to_the_metadata_at_once() -> None:
    """The next one is turned away until one has ended; other servers do not notice."""
    server = inner_sockets.CallerServer(socket.socket(), BaseHTTPRequestHandler)
    try:
        taken = [server.verify_request(None, ("198.18.0.7", port)) for port in range(40)]
        assert taken == [True] * 16 + [False] * 24
        assert server.verify_request(None, ("198.18.0.8", 1))
        ours, theirs = socket.socketpair()
        theirs.close()
        server.process_request_thread(ours, ("198.18.0.7", 1))
        assert server.verify_request(None, ("198.18.0.7", 50))
        assert not server.verify_request(None, ("198.18.0.7", 51))
    finally:
        server.server_close()


def test_a_log_that_fails_keeps_nothing_from_being_taken_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The terminal may be gone when a server does not go off in time."""

    def gone(line: str) -> None:
        raise BrokenPipeError

    machines = LocalMachines(tmp_path, log=gone)
    taken_down: list[bool] = []
    monkeypatch.setattr("scripts.local_cloud.machines.machines._ORDERLY_STOP_S", 0)
    monkeypatch.setattr(machines._containers, "all_running", lambda: [1])
    monkeypatch.setattr(machines, "_take_down", lambda: taken_down.append(True))
    machines._hold()
    with pytest.raises(BrokenPipeError):
        machines.close()
    assert taken_down == [True]
    machines._let_go()


def test_mount_points_are_read_with_their_blanks() -> None:
    """The kernel writes a blank as \\040."""
    text = "22 1 0:20 / / rw - ext4 /dev/a rw\n30 22 7:0 / /a\\040b/pool rw shared:1 - btrfs /dev/loop0 rw\n"
    assert pool.mount_points(text) == ["/", "/a b/pool"]


def test_containers_are_known_by_their_command_line() -> None:
    """Only systemd-nspawn with a machine of this cloud's name is one of its containers."""
    words = ["systemd-nspawn", "--machine=mlc-abcdef-7", "--boot"]
    assert container.is_container_of("abcdef", words)
    assert container.is_container_of("abcdef", ["/usr/bin/systemd-nspawn", *words[1:]])
    assert not container.is_container_of("123456", words)
    assert not container.is_container_of("abcdef", ["grep", "--machine=mlc-abcdef-7"])
    assert not container.is_container_of("abcdef", [])


def test_init_is_the_first_process_of_an_inner_namespace() -> None:
    """Neither the host's own init nor what leads to the container's is taken for it."""
    assert container.is_init("Name:\tsystemd\nNSpid:\t4711\t12\t1\n")
    assert not container.is_init("Name:\tsystemd\nNSpid:\t1\n")
    assert not container.is_init("Name:\tsystemd-nspawn\nNSpid:\t4710\t1\n")
    assert not container.is_init("Name:\tsystemd\nNSpid:\t4711\t12\t30\n")


def test_a_capability_that_nobody_can_give_is_dropped() -> None:
    """Asking for CAP_SYS_RESOURCE where it is missing would hang the start."""
    drop = "--drop-capability=CAP_SYS_RESOURCE"
    assert drop in container.command(LAUNCH, container.bounding_capabilities("CapBnd:\t000001fffeffffff\n"))
    assert drop not in container.command(LAUNCH, container.bounding_capabilities("CapBnd:\t000001ffffffffff\n"))


def test_limits_go_to_the_hierarchies_that_have_them() -> None:
    """Version 1 controllers that limit nothing here are left alone."""
    mounts = (
        "cgroup /sys/fs/cgroup/cpu cgroup rw,relatime,cpu,cpuacct 0 0\n"
        "cgroup /sys/fs/cgroup/pids cgroup rw,relatime,pids 0 0\n"
        "cgroup /sys/fs/cgroup/systemd cgroup rw,relatime,name=systemd 0 0\n"
        "cgroup2 /sys/fs/cgroup/unified cgroup2 rw,relatime 0 0\n"
        "tmpfs /tmp tmpfs rw 0 0\n"
    )
    found = cgroups.hierarchies(mounts)
    assert [str(hierarchy.root) for hierarchy in found] == [
        "/sys/fs/cgroup/cpu",
        "/sys/fs/cgroup/systemd",
        "/sys/fs/cgroup/unified",
    ]
    assert found[0].controllers == {"cpu"}
    assert found[2].unified


def test_a_missing_tool_is_named_with_the_line_that_installs_it() -> None:
    """Every missing package stands in the line, once."""
    with pytest.raises(host.HostUnfit, match=r"a, b not found; install it: sudo apt-get install .* one$"):
        host.require_tools({"a": "one", "b": "one", "c": "two"}, find=lambda name: "/bin/c" if name == "c" else None)


def test_the_mirror_is_the_hosts_own(tmp_path: Path) -> None:
    """Both forms of apt's settings are read; sources that are no Debian mirror are passed over."""
    (tmp_path / "sources.list.d").mkdir()
    assert base_image.host_mirror(tmp_path).lines() == []
    (tmp_path / "sources.list").write_text("# deb http://no/debian x main\ndeb http://other.example/tool stable main\n")
    (tmp_path / "sources.list.d/debian.sources").write_text(
        "Types: deb\nURIs: http://mirror.example/debian/\n\nTypes: deb\nURIs: http://mirror.example/debian-security\n"
    )
    assert base_image.host_mirror(tmp_path).lines() == [
        "deb http://mirror.example/debian trixie main",
        "deb http://mirror.example/debian trixie-updates main",
        "deb http://mirror.example/debian-security trixie-security main",
    ]


def test_the_images_name_changes_with_its_content() -> None:
    """Another mirror makes another image."""
    here, there = base_image.Mirror(None, None), base_image.Mirror("http://mirror.example/debian", None)
    assert base_image.content_key(here) == base_image.content_key(here)
    assert base_image.content_key(here) != base_image.content_key(there)


LINK = PrivateLink(
    network_id=9,
    network_name="inner",
    ip="10.0.1.5",
    alias_ips=("10.0.1.6",),
    mac_address="86:00:00:00:00:07",
    ip_range="10.0.0.0/16",
    subnet="10.0.1.0/24",
    gateway="10.0.0.1",
    routes=(("10.9.0.0/24", "10.0.1.6"), ("0.0.0.0/0", "10.0.1.7"), ("10.8.0.0/24", "10.0.1.7")),
)


def test_private_interfaces_keep_their_numbers() -> None:
    """One that goes leaves the others where they are; a new one takes its place."""
    first, second, third = (replace(LINK, network_id=number) for number in (1, 2, 3))
    numbers = private_networks.number_links({}, (first, second))
    assert numbers == {1: first, 2: second}
    assert private_networks.number_links(numbers, (second,)) == {2: second}
    assert private_networks.number_links({2: second}, (second, third)) == {2: second, 1: third}
    assert [private_networks.interface_name(number) for number in (1, 2)] == ["enp7s0", "enp8s0"]


def test_a_member_is_told_what_lies_behind_the_gateway() -> None:
    """The network and its routes, but not a way to everywhere, and nothing that it leads to itself."""
    commands = private_networks.inner_commands(1, LINK)
    assert "address add 10.0.1.5/32 dev enp7s0" in commands
    assert [each for each in commands if " via " in each] == [
        "route add 10.0.0.0/16 via 10.0.0.1 dev enp7s0",
        "route add 10.8.0.0/24 via 10.0.0.1 dev enp7s0",
    ]


def test_a_network_leads_to_a_member_and_to_what_is_behind_it() -> None:
    """Its addresses, and the routes whose gateway it is."""
    assert private_networks.router_commands(42, LINK) == [
        "route replace unreachable 10.0.0.0/16",
        "route replace 10.0.1.5/32 dev p42 src 10.0.0.1",
        "route replace 10.0.1.6/32 dev p42 src 10.0.0.1",
        "route replace 10.9.0.0/24 via 10.0.1.6 dev p42 onlink",
    ]


def test_private_networks_in_the_metadata() -> None:
    """One entry an interface, in the form of the real cloud."""
    assert metadata.answer("/hetzner/v1/metadata/private-networks", SPEC, RESOLVERS, {}) == "[]\n"
    assert metadata.answer("/hetzner/v1/metadata/private-networks", SPEC, RESOLVERS, {2: LINK}) == (
        "- ip: 10.0.1.5\n"
        '  alias_ips: ["10.0.1.6"]\n'
        "  interface_num: 2\n"
        "  mac_address: 86:00:00:00:00:07\n"
        "  network_id: 9\n"
        '  network_name: "inner"\n'
        "  network: 10.0.0.0/16\n"
        "  subnet: 10.0.1.0/24\n"
        "  gateway: 10.0.0.1\n"
    )
