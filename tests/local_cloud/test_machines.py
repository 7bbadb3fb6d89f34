"""Real servers on this host: boot, log in, power off, snapshot, and nothing left behind.

Needs root and the tools that HostUnfit names; takes about a minute, and two more where the base image is not built yet.
"""

import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from scripts.local_cloud.machine_interface import FirewallRule, MachineFailed, MachineSpec
from scripts.local_cloud.machines.host import HostUnfit
from scripts.local_cloud.machines.machines import LocalMachines
from scripts.local_cloud.machines.pool import Pool
from tests.local_cloud.harness import free_addresses, traces

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 60.0
HOLDER = """
import sys, time
from pathlib import Path
from scripts.local_cloud.machine_interface import MachineSpec
from scripts.local_cloud.machines.host import HostUnfit
from scripts.local_cloud.machines.machines import LocalMachines
machines = LocalMachines(Path(sys.argv[1]), address_range=sys.argv[2])
machines.prepare()
machines.create_disk(31, "debian-13")
machines.start(MachineSpec(31, "held", sys.argv[3], None, (), None, "", 1, 1.0, "fsn1"))
print("running", flush=True)
time.sleep(600)
"""


@dataclass
class Cloud:
    """Machines under test, whom they called, and the key of who logs in."""

    machines: LocalMachines
    off: "queue.Queue[int]"
    key: Path
    state: Path
    network: str  # the first three numbers of its addresses

    def spec(self, server_id: int, user_data: str = "") -> MachineSpec:
        return MachineSpec(
            server_id=server_id,
            name=f"server-{server_id}",
            ipv4=f"{self.network}.{server_id}",
            ipv6_network=f"2001:db8:77:{server_id:x}::/64",
            public_keys=(self.key.with_suffix(".pub").read_text().strip(),),
            root_password=None,
            user_data=user_data,
            cores=1,
            memory_gb=2.0,
            location="fsn1",
        )

    def ssh(self, server_id: int, command: str) -> "subprocess.CompletedProcess[str]":
        options = ["StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR", "BatchMode=yes"]
        words = [word for option in [*options, "ConnectTimeout=3"] for word in ("-o", option)]
        target = f"root@{self.network}.{server_id}"
        return subprocess.run(
            ["ssh", "-i", str(self.key), *words, target, command],
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )

    def output(self, server_id: int, command: str) -> str:
        done = self.ssh(server_id, command)
        assert done.returncode == 0, done.stderr + done.stdout
        return done.stdout.strip()

    def await_login(self, server_id: int) -> None:
        give_up_s = time.monotonic() + PATIENCE_S
        while (done := self.ssh(server_id, "true")).returncode != 0:
            assert time.monotonic() < give_up_s, done.stderr + self.machines.console(server_id).read_text()[-2000:]
            time.sleep(0.1)


def _first(addresses: str) -> str:
    return addresses.replace(".0/24", ".1")


def host_settings() -> list[str]:
    names = ("net/ipv4/ip_forward", "fs/inotify/max_user_instances")
    return [(Path("/proc/sys") / name).read_text() for name in names]


@pytest.fixture
def addresses() -> Iterator[str]:
    """For machines of a test's own."""
    with free_addresses() as free:
        yield free


@pytest.fixture(scope="module")
def cloud(host: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    key = tmp_path_factory.mktemp("key") / "id"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    state = tmp_path_factory.mktemp("cloud") / "state"
    off: queue.Queue[int] = queue.Queue()
    with free_addresses() as addresses:
        machines = LocalMachines(state, address_range=addresses, on_off=off.put, log=print)
        try:
            machines.prepare()
            yield Cloud(machines, off, key, state, addresses.removesuffix(".0/24"))
        finally:
            machines.clean()


@pytest.fixture(scope="module")
def server(cloud: Cloud) -> int:
    """A server that has booted and takes logins."""
    cloud.machines.create_disk(11, "debian-13")
    cloud.machines.start(cloud.spec(11, "#cloud-config\nruncmd: [touch /root/first-boot]\n"))
    cloud.await_login(11)
    return 11


def test_a_server_boots_whole(cloud: Cloud, server: int) -> None:
    """systemd finds nothing that failed, cloud-init nothing to complain about, and user-data has been obeyed."""
    assert cloud.output(server, "cloud-init status --wait").endswith("status: done")
    assert cloud.output(server, "systemctl is-system-running --wait") == "running"
    assert cloud.output(server, "ls /root") == "first-boot"
    assert cloud.output(server, "hostname") == f"server-{server}"
    assert cloud.machines.is_running(server)


def test_root_logs_in_by_key_only(cloud: Cloud, server: int) -> None:
    """sshd offers nothing but keys."""
    settings = cloud.output(server, "sshd -T").splitlines()
    assert "permitrootlogin without-password" in settings
    assert "passwordauthentication no" in settings


def test_a_server_has_the_addresses_of_the_real_cloud(cloud: Cloud, server: int) -> None:
    """A single IPv4 address behind 172.31.1.1, ::1 of its IPv6 network; the host reaches both."""
    assert f"{cloud.network}.{server}/32" in cloud.output(server, "ip -o -4 address show eth0")
    assert cloud.output(server, "ip route show default").startswith("default via 172.31.1.1 dev eth0")
    socket.create_connection((f"2001:db8:77:{server:x}::1", 22), timeout=3).close()


def test_users_of_this_host_have_no_way_to_a_disk(cloud: Cloud, server: int) -> None:
    """What root of a server leaves for everybody, such as a setuid program, is out of reach of others here."""
    assert (cloud.state / "pool" / "servers" / str(server)).is_dir()
    for path in (cloud.state / "pool", cloud.state / "pool.img"):
        assert path.stat().st_mode & 0o077 == 0


def test_the_package_mirror_is_reached_through_the_host(cloud: Cloud, server: int) -> None:
    """The first source in apt's list answers."""
    command = "curl -sSf -m 20 -o /dev/null $(grep -m1 -o 'http[^ ]*' /etc/apt/sources.list)/dists/trixie/Release"
    cloud.output(server, command)


def test_metadata_know_who_asks(cloud: Cloud, server: int) -> None:
    """Each path answers with what the cloud knows of the asking server."""
    base = "curl -sSf -m 5 http://169.254.169.254/hetzner/v1"
    assert cloud.output(server, f"{base}/metadata/instance-id") == str(server)
    assert cloud.output(server, f"{base}/metadata/hostname") == f"server-{server}"
    assert f'public-ipv4: "{cloud.network}.{server}"' in cloud.output(server, f"{base}/metadata")
    assert "first-boot" in cloud.output(server, f"{base}/userdata")
    assert cloud.ssh(server, f"{base}/metadata/nothing").returncode == 22


def test_another_servers_address_is_of_no_use(cloud: Cloud, server: int) -> None:
    """What a server sends under an address that is not its own is dropped."""
    ask = "curl -sS -m 2 http://169.254.169.254/hetzner/v1/metadata/hostname"
    forge = f"ip address add {cloud.network}.200/32 dev lo; {ask} --interface {cloud.network}.200"
    assert cloud.ssh(server, forge).returncode == 28
    assert cloud.output(server, f"ip address delete {cloud.network}.200/32 dev lo; {ask}") == f"server-{server}"


def answers(address: str) -> bool:
    try:
        socket.create_connection((address, 22), timeout=0.5).close()
    except OSError:
        return False
    return True


def test_a_firewall_filters_at_once(cloud: Cloud, server: int) -> None:
    """Without a fitting rule nothing begins from outside; what the server begins goes on; a rule opens, none closes."""
    address = f"{cloud.network}.{server}"
    ssh = FirewallRule("in", "tcp", ("0.0.0.0/0",), (22, 22))
    try:
        cloud.machines.set_firewall(server, ())
        assert not answers(address)
        cloud.machines.set_firewall(server, (ssh, FirewallRule("in", "icmp", ("0.0.0.0/0", "::/0"), None)))
        assert answers(address)
        assert not answers(f"2001:db8:77:{server:x}::1")
        test_the_package_mirror_is_reached_through_the_host(cloud, server)
        cloud.machines.set_firewall(server, (ssh, FirewallRule("out", "esp", ("192.0.2.1/32",), None)))
        assert cloud.ssh(server, "curl -s -m 2 http://1.1.1.1/").returncode == 28
    finally:
        cloud.machines.set_firewall(server, None)
    assert answers(f"2001:db8:77:{server:x}::1")


def test_a_floating_address_reaches_whom_it_is_led_to(cloud: Cloud, server: int) -> None:
    """It answers while it is led to a server that carries it, IPv4 and IPv6, and to nobody after."""
    floating, network = f"{cloud.network}.150", "2001:db8:77:ffff::/64"
    cloud.output(server, f"ip address add {floating}/32 dev eth0; ip address add 2001:db8:77:ffff::1/64 dev eth0 nodad")
    for address in (floating, network):
        cloud.machines.route_address(address, server)
    assert answers(floating)
    assert answers("2001:db8:77:ffff::1")
    cloud.machines.route_address(floating, 999)  # one that is off
    cloud.machines.route_address(network, None)
    assert not answers(floating)
    assert not answers("2001:db8:77:ffff::1")
    cloud.machines.route_address(floating, server)
    assert answers(floating)
    cloud.machines.route_address(floating, None)
    cloud.machines.route_address(floating, None)
    assert not answers(floating)
    cloud.output(server, f"ip address delete {floating}/32 dev eth0")


def test_a_reboot_inside_is_no_power_off(cloud: Cloud, server: int) -> None:
    """The server comes back, keeps its disk, and nobody hears that it was off."""
    before = cloud.output(server, "cat /proc/sys/kernel/random/boot_id; date > /root/mark; sync")
    cloud.ssh(server, "systemctl reboot")
    give_up_s = time.monotonic() + PATIENCE_S
    while cloud.ssh(server, "cat /proc/sys/kernel/random/boot_id").stdout.strip() in ("", before):
        assert time.monotonic() < give_up_s
        time.sleep(0.2)
    assert "mark" in cloud.output(server, "ls /root")
    assert cloud.off.empty()


def test_a_snapshot_boots_as_another_server(cloud: Cloud, server: int) -> None:
    """poweroff inside is noticed; the copy carries the disk's content, and has host keys and a name of its own.

    The machine-id is new because it was sealed, as on the real cloud.
    """
    host_key = cloud.output(server, "cat /etc/ssh/ssh_host_ed25519_key.pub")
    identity = cloud.output(server, "cat /etc/machine-id")
    cloud.ssh(server, "echo kept > /root/kept; cloud-init clean --logs --machine-id --seed; systemctl poweroff")
    assert cloud.off.get(timeout=PATIENCE_S) == server
    assert not cloud.machines.is_running(server)
    assert 0.1 < cloud.machines.snapshot(server, 501) < 2.0
    cloud.machines.create_disk(12, 501)
    cloud.machines.start(cloud.spec(12))
    cloud.await_login(12)
    assert cloud.output(12, "cat /root/kept") == "kept"
    assert cloud.output(12, "hostname") == "server-12"
    assert cloud.output(12, "cat /etc/ssh/ssh_host_ed25519_key.pub") != host_key
    assert cloud.output(12, "cat /etc/machine-id") != identity
    with pytest.raises(MachineFailed, match="is running"):
        cloud.machines.delete_disk(12)
    cloud.machines.shutdown(12)
    cloud.machines.shutdown(12)  # an impatient second press is no order to kill
    assert cloud.machines.wait_off(12, PATIENCE_S)
    assert cloud.off.get(timeout=PATIENCE_S) == 12
    assert "Reached target poweroff.target" in cloud.machines.console(12).read_text()
    cloud.machines.delete_disk(12)
    cloud.machines.delete_image(501)
    cloud.machines.delete_image(501)


def test_a_pulled_plug_is_not_reported(cloud: Cloud) -> None:
    """Who calls power_off knows; the machine is off when the call returns, and a second one is no error."""
    cloud.machines.create_disk(13, "debian-13")
    cloud.machines.start(cloud.spec(13))
    cloud.machines.power_off(13)
    assert not cloud.machines.is_running(13)
    cloud.machines.power_off(13)
    assert cloud.off.empty()
    cloud.machines.delete_disk(13)
    cloud.machines.delete_disk(13)


def test_what_is_not_there_is_said(cloud: Cloud) -> None:
    """Unknown images and servers fail with a line for people."""
    with pytest.raises(MachineFailed, match="no system image debian-12"):
        cloud.machines.create_disk(14, "debian-12")
    with pytest.raises(MachineFailed, match="is not there"):
        cloud.machines.create_disk(14, 999)
    with pytest.raises(MachineFailed, match="has no disk"):
        cloud.machines.start(cloud.spec(14))


def test_one_state_directory_has_one_owner(cloud: Cloud) -> None:
    """A second cloud with the same directory is refused and takes nothing down."""
    with pytest.raises(MachineFailed, match="another local cloud"):
        LocalMachines(cloud.state).prepare()
    with pytest.raises(MachineFailed, match="another local cloud"):
        LocalMachines(cloud.state).clean()
    assert "mounts" in traces(cloud.state)


def test_a_stop_leaves_disks_and_nothing_else(host: None, tmp_path: Path, addresses: str) -> None:
    """A closed cloud has no trace on the host but its directory, and the next one finds its disk."""
    state = tmp_path / "state"
    before = host_settings()
    spec = MachineSpec(21, "gone", _first(addresses), None, (), None, "", 1, 1.0, "fsn1")
    machines = LocalMachines(state, address_range=addresses, log=print)
    try:
        machines.prepare()
        machines.create_disk(21, "debian-13")
        machines.start(spec)
        everything = {"mounts", "loops", "links", "namespaces", "rules", "groups", "processes"}
        assert set(traces(state)) >= everything - {"mounts", "loops"}
        with ExitStack() as looks:
            for device in traces(state).get("loops", ()):  # somebody looks at it for a moment, as udev does
                looks.enter_context(Path(device.partition(":")[0]).open("rb"))
            threading.Timer(1.0, looks.close).start()
            machines.close()
        assert traces(state) == {}
        machines = LocalMachines(state, address_range=addresses, log=print)
        machines.prepare()
        machines.start(spec)
        machines.close()
        machines.prepare()  # the same one may be opened again
        machines.start(spec)
    finally:
        machines.clean()
    assert traces(state) == {}
    assert not state.exists()
    assert host_settings() == before


def test_the_pool_goes_though_others_have_its_mounts(host: None, tmp_path: Path) -> None:
    """A container of another cloud, begun meanwhile, has a copy of all of the mounts; the pool's goes there too."""
    pool = Pool(tmp_path / "state", print)
    (tmp_path / "state").mkdir()
    with ExitStack() as others:
        try:
            for _ in range(2):  # new, and there already
                pool.open()
                cage = ("unshare", "--mount", "--propagation", "slave")
                other = others.enter_context(subprocess.Popen([*cage, "cat"], stdin=subprocess.PIPE))
                others.callback(other.kill)
                give_up_s = time.monotonic() + 5.0
                while Path(f"/proc/{other.pid}/comm").read_text() != "cat\n":
                    assert time.monotonic() < give_up_s
                    time.sleep(0.01)
                pool.close()
                assert traces(tmp_path / "state") == {}
        finally:
            pool.close()


def test_a_killed_cloud_is_swept(host: None, tmp_path: Path, addresses: str) -> None:
    """After SIGKILL the servers are dead already, and clean removes what else is left."""
    state = tmp_path / "state"
    before = host_settings()
    words = [sys.executable, "-c", HOLDER, str(state), addresses, _first(addresses)]
    holder = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=dict(os.environ))
    sweeper = LocalMachines(state, address_range=addresses)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "running\n"
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        holder.stdout.close()
        give_up_s = time.monotonic() + 5.0
        while "processes" in traces(state):
            assert time.monotonic() < give_up_s
            time.sleep(0.05)
        assert "namespaces" in traces(state)
    finally:
        holder.kill()
        holder.wait()
        sweeper.clean()
    assert traces(state) == {}
    assert not state.exists()
    assert host_settings() == before


def test_a_host_without_copy_on_write_has_plain_copies(
    host: None, tmp_path: Path, addresses: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says so once; servers, snapshots and servers from them are there all the same, and go without a trace."""

    def missing() -> None:
        raise HostUnfit("mkfs.btrfs not found; install it: …")

    monkeypatch.setattr("scripts.local_cloud.machines.pool.check_pool_tools", missing)
    state = tmp_path / "state"
    said: list[str] = []
    machines = LocalMachines(state, address_range=addresses, log=said.append)
    try:
        machines.prepare()
        assert [line for line in said if "plain copies" in line] == [
            "disks are plain copies, slow and large: mkfs.btrfs not found; install it: …"
        ]
        machines.create_disk(41, "debian-13")
        (state / "pool/servers/41/srv/kept").write_text("kept")
        assert 0.1 < machines.snapshot(41, 51) < 2
        machines.delete_disk(41)
        machines.create_disk(42, 51)
        assert (state / "pool/servers/42/srv/kept").read_text() == "kept"
        machines.start(MachineSpec(42, "plain", _first(addresses), None, (), None, "", 1, 1.0, "fsn1"))
        assert machines.is_running(42)
        machines.close()
        assert traces(state) == {}
    finally:
        machines.clean()
    assert not state.exists()
