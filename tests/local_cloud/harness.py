"""Owns the local cloud that integration tests talk to: started as its users start it, and gone when they are done."""

import fcntl
import ipaddress
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import requests
from hcloud import Client
from hcloud.servers import BoundServer

from scripts.bake.answers import given
from scripts.local_cloud.machines.network import find_overlap, tag_of, transfer_addresses
from tests.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "local"  # the default that everybody knows
_RANGES = Path("/run/lock/mini-llm-tests")
_START_TIMEOUT_S = 240.0  # the base image may have to be made
_STOP_TIMEOUT_S = 60.0


@dataclass
class LocalCloud:
    """A cloud that runs: its endpoint, and the process behind it."""

    endpoint: str
    state: Path
    process: "subprocess.Popen[bytes]"
    command: list[str]

    @property
    def environment(self) -> dict[str, str]:
        """What the printed export lines would set."""
        return {**os.environ, "HCLOUD_ENDPOINT": self.endpoint, "HCLOUD_TOKEN": TOKEN}

    @property
    def name_server(self) -> str:
        """The address that it answers for names at."""
        return transfer_addresses(tag_of(self.state))[1]

    def client(self) -> Client:
        return Client(TOKEN, api_endpoint=self.endpoint, poll_interval=0.1)

    def output(self) -> str:
        return (self.state.parent / "cloud.log").read_text()

    def restart(self) -> None:
        """Starts it again, after a kill or a stop."""
        self.process = _start(self.command, self.state.parent / "cloud.log")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """Ends it as Ctrl-C does."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            self.process.wait(_STOP_TIMEOUT_S)


@contextmanager
def free_addresses() -> Iterator[str]:
    """A range of addresses that no other test has meanwhile, be it of this run or of one beside it."""
    _RANGES.mkdir(parents=True, exist_ok=True)  # where no systemd made it
    for number in range(256):
        with (_RANGES / str(number)).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            addresses = f"198.19.{number}.0/24"
            routes = subprocess.run(["ip", "-json", "-4", "route", "show"], capture_output=True, text=True, check=True)
            if find_overlap(ipaddress.IPv4Network(addresses), routes.stdout):
                continue  # of a cloud whose test was killed, or of somebody's own
            yield addresses
            return
    raise AssertionError(f"all ranges are taken; who holds {_RANGES}?")


@contextmanager
def running_cloud(folder: Path, *arguments: str) -> Iterator[LocalCloud]:
    """A cloud with its state in a folder; afterwards nothing of it is left, also when the test failed."""
    with free_addresses() as addresses:
        yield from _running_cloud(folder, addresses, *arguments)


def _running_cloud(folder: Path, addresses: str, *arguments: str) -> Iterator[LocalCloud]:
    port, state = free_port(), folder / "cloud"
    common = ["--state", str(state)]
    command = [sys.executable, "-m", "scripts.local_cloud", "run", *common]
    command += ["--port", str(port), "--addresses", addresses, *arguments]
    cloud = None
    try:
        cloud = LocalCloud(f"http://127.0.0.1:{port}/v1", state, _start(command, folder / "cloud.log"), command)
        yield cloud
    finally:
        try:
            if cloud is not None:
                cloud.stop()
        finally:
            if cloud is not None and cloud.process.poll() is None:
                cloud.kill()
            subprocess.run(
                [sys.executable, "-m", "scripts.local_cloud", "clean", *common],
                cwd=ROOT,
                check=True,
                capture_output=True,
                timeout=_STOP_TIMEOUT_S,
            )


def _start(command: list[str], log_path: Path) -> "subprocess.Popen[bytes]":
    told = ["setpriv", "--pdeathsig", "TERM", *command]  # a worker of the tests may be killed: then it stops by itself
    with log_path.open("ab") as log:
        begin = log.tell()
        process = subprocess.Popen(told, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    end_s = time.monotonic() + _START_TIMEOUT_S
    try:
        while time.monotonic() < end_s:
            text = log_path.read_bytes()[begin:].decode(errors="replace")
            if re.search(r"^export HCLOUD_TOKEN=", text, re.MULTILINE):
                return process
            if process.poll() is not None:
                raise AssertionError(f"the local cloud ended with {process.returncode}:\n{text}")
            time.sleep(0.05)
        raise AssertionError(f"the local cloud did not start within {_START_TIMEOUT_S:.0f} s")
    except BaseException:
        process.kill()  # nobody else knows of it yet
        process.wait()
        raise


def ssh(key: Path, address: str, command: str, patience_s: float = 30.0) -> str:
    """What a command on a server prints; waits for the server to let root in. Fails with what SSH said."""
    options = ["StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR", "ConnectTimeout=2"]
    words = ["ssh", "-i", str(key), *(word for option in options for word in ("-o", option)), f"root@{address}"]
    end_s = time.monotonic() + patience_s
    while True:
        done = subprocess.run([*words, command], capture_output=True, text=True, timeout=300)
        # 255 is SSH's own failure: not there yet.
        if done.returncode != 255 or time.monotonic() > end_s:
            assert done.returncode == 0, done.stdout + done.stderr
            return done.stdout
        time.sleep(0.1)


@contextmanager
def running_inside(namespace: str, words: list[str], first_line: str) -> Iterator[None]:
    """A program in a network namespace, from the first line that it prints; it ends with this."""
    command = ["ip", "netns", "exec", namespace, *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == f"{first_line}\n"
            yield
        finally:
            process.terminate()


def cut_off(cloud: LocalCloud, *names: str) -> None:
    """Cuts servers off from everything outside the cloud, and connects all others; ``*`` is all of them."""
    url = cloud.endpoint.removesuffix("/v1") + "/_local/network"
    headers = {"Authorization": f"Bearer {TOKEN}"}
    answer = requests.put(url, json={"cut_off": list(names)}, headers=headers, timeout=10)
    assert (answer.status_code, answer.json()) == (200, {"cut_off": list(names)})


def address_of(server: BoundServer) -> str:
    """The public IPv4 address that a server was made with."""
    return given(given(server.public_net).ipv4).ip


def wait_until_off(client: Client, server: BoundServer, patience_s: float = 30.0) -> None:
    """A shutdown's success says only that the button was pressed."""
    end_s = time.monotonic() + patience_s
    while client.servers.get_by_id(given(server.id)).status != "off":
        assert time.monotonic() < end_s, "the server did not go off"
        time.sleep(0.05)


def make_key(folder: Path) -> Path:
    """A new private key; the public one lies beside it."""
    path = folder / "id_ed25519"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True)
    return path


def traces(state: Path) -> dict[str, list[str]]:
    """What of this host belongs to a state directory, by kind; kinds without any are left out."""
    tag = tag_of(state)

    def lines(*command: str) -> list[str]:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()

    processes = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_text().replace("\0", " ")
        except OSError:
            continue  # it ended meanwhile
        if f"mlc-{tag}" in words:
            processes.append(words)
    found = {
        "mounts": [line for line in Path("/proc/mounts").read_text().splitlines() if str(state) in line or tag in line],
        "loops": [line for line in lines("losetup", "--all") if str(state) in line],
        "links": [line for line in lines("ip", "-o", "link") if tag in line],
        "namespaces": [line for line in lines("ip", "netns") if tag in line],
        "rules": [line for line in lines("nft", "list", "tables") if tag in line],
        "groups": [str(path) for path in Path("/sys/fs/cgroup").glob(f"**/mlc-{tag}")],
        "runtime": [str(path) for path in Path("/run").glob(f"systemd/nspawn/*/mlc-{tag}*")],
        "processes": processes,
    }
    return {kind: items for kind, items in found.items() if items}
