"""Owns the life of a running server: a systemd-nspawn process from power-on until its container has ended."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from scripts.local_cloud.machine_interface import MachineFailed
from scripts.local_cloud.machines.console import copy_console, last_line
from scripts.local_cloud.machines.host import find_tool

_PROC = Path("/proc")
_EXIT_REBOOT = 133  # systemd-nspawn --keep-unit: the container asked to be started again
_INIT_TIMEOUT_S = 60.0  # a second on a quiet host
_KILL_TIMEOUT_S = 10.0
_POLL_S = 0.01
_LAST_WORDS_S = 2.0  # for a console to be copied to its end once its container has ended
# What Docker needs beyond the defaults.
_CAPABILITIES = "CAP_NET_ADMIN,CAP_NET_RAW,CAP_IPC_LOCK"
_SYSTEM_CALLS = "add_key keyctl request_key bpf @mount"
_CAP_SYS_RESOURCE = 24
_POWER_BUTTON = signal.SIGRTMIN + 4  # systemd starts poweroff.target


@dataclass(frozen=True)
class Launch:
    """What a container is started with: its root, its network namespace, and where its console goes."""

    server_id: int
    machine: str
    hostname: str
    directory: Path
    namespace: Path
    console: Path
    groups: tuple[Path, ...]


@dataclass
class _Running:
    launch: Launch
    process: subprocess.Popen[bytes]
    console: threading.Thread
    init_pid: int = 0
    booted: bool = False
    unplugged: bool = False
    ended: threading.Event = field(default_factory=threading.Event)


def machine_name(tag: str, server_id: int) -> str:
    """What systemd-nspawn calls a server; tells whose it is."""
    return f"mlc-{tag}-{server_id}"


def command(launch: Launch, bounding_capabilities: int) -> list[str]:
    """The words that start a container, which dies with the thread that started it."""
    nspawn = [
        "systemd-nspawn",
        f"--machine={launch.machine}",
        f"--directory={launch.directory}",
        f"--hostname={launch.hostname}",
        f"--network-namespace-path={launch.namespace}",
        "--boot",
        "--register=no",
        "--keep-unit",
        "--console=read-only",
        "--resolv-conf=off",
        "--timezone=off",
        "--link-journal=no",
        f"--capability={_CAPABILITIES}",
        f"--system-call-filter={_SYSTEM_CALLS}",
    ]
    if not bounding_capabilities >> _CAP_SYS_RESOURCE & 1:
        nspawn.append("--drop-capability=CAP_SYS_RESOURCE")  # asking for what nobody can give would hang the start
    # A process must be in its groups before it forks; nothing but a shell can do that after the fork and before it.
    # It writes 0, itself: in its own namespace it does not know what others call it.
    join = 'for file in $GROUPS_TO_JOIN; do echo 0 > "$file" || exit 1; done; exec "$@"'
    # When systemd-nspawn is killed its container lives on, unless it is the first process of a namespace.
    cage = ["unshare", "--pid", "--fork", "--kill-child=KILL", "--mount-proc", "--propagation", "slave"]
    return ["setpriv", "--pdeathsig", "KILL", *cage, "sh", "-c", join, "sh", *nspawn]


def environment(launch: Launch) -> dict[str, str]:
    """What systemd-nspawn reads from its environment: control groups of version 2, a network of the server's own."""
    return {
        "PATH": os.defpath + ":/usr/sbin:/sbin",
        "GROUPS_TO_JOIN": " ".join(str(path) for path in launch.groups),
        "UNIFIED_CGROUP_HIERARCHY": "1",
        "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1",
        "SYSTEMD_NSPAWN_API_VFS_WRITABLE": "network",
    }


def bounding_capabilities(status: str) -> int:
    """The bits of what this process can give to others, from the text of ``/proc/self/status``."""
    return next(int(line.split()[1], 16) for line in status.splitlines() if line.startswith("CapBnd:"))


def is_container_of(tag: str, words: list[str]) -> bool:
    """Tells whether a process's command line is that of a container of this cloud."""
    named = f"--machine={machine_name(tag, 0)[:-1]}"
    return bool(words) and Path(words[0]).name == "systemd-nspawn" and any(word.startswith(named) for word in words)


class Containers:
    """The running containers of one cloud; safe for use by several threads.

    ``on_end`` is called as soon as a container has ended, before anyone who waits for that hears of it, to take away
    what it leaves; ``on_off`` after that, and only if nobody pulled the plug.
    """

    def __init__(
        self, on_end: Callable[[int], None], on_off: Callable[[int], None], log: Callable[[str], None]
    ) -> None:
        self._on_end = on_end
        self._on_off = on_off
        self._log = log
        self._running: dict[int, _Running] = {}
        self._lock = threading.Lock()
        self._capabilities = bounding_capabilities((_PROC / "self/status").read_text())
        self._spawner: ThreadPoolExecutor | None = None

    def open(self) -> None:
        """Makes the thread that starts containers; they die with it, and it lives as long as this program."""
        self._spawner = ThreadPoolExecutor(max_workers=1, thread_name_prefix="spawner")

    def start(self, launch: Launch) -> None:
        """Starts a container and returns once its init runs; raises MachineFailed."""
        with self._lock:
            if launch.server_id in self._running:
                raise MachineFailed(f"server {launch.server_id} is running already")
            running = _Running(launch, *self._spawn(launch))
            self._running[launch.server_id] = running
        threading.Thread(target=self._watch, args=(running,), name=launch.machine, daemon=True).start()
        try:
            self._await_init(running)
        except MachineFailed:
            running.process.kill()
            running.ended.wait(_KILL_TIMEOUT_S)
            raise
        running.booted = True

    def press_power_button(self, server_id: int) -> None:
        """Asks a container's init to power off; one that is off already is no error."""
        running = self._running.get(server_id)
        if running and running.process.poll() is None:
            # To init itself: systemd-nspawn takes a second SIGTERM as an order to kill.
            _send(running.init_pid, _POWER_BUTTON)

    def pull_plug(self, server_id: int) -> None:
        """Ends a container at once and returns when it is off; raises MachineFailed if it does not end."""
        running = self._running.get(server_id)
        if not running:
            return
        running.unplugged = True
        give_up_s = time.monotonic() + _KILL_TIMEOUT_S
        while not running.ended.is_set():
            if time.monotonic() > give_up_s:
                raise MachineFailed(f"server {server_id} does not end (process {running.process.pid})")
            if running.process.poll() is None:
                _send(running.init_pid, signal.SIGKILL)
            if not running.ended.wait(1.0):
                running.process.kill()  # it has no init yet, or the plug was pulled while it rebooted

    def is_running(self, server_id: int) -> bool:
        return server_id in self._running

    def wait_off(self, server_id: int, timeout_s: float) -> bool:
        """Waits until a container has ended; tells whether it has."""
        running = self._running.get(server_id)
        return running is None or running.ended.wait(timeout_s)

    def all_running(self) -> list[int]:
        with self._lock:
            return list(self._running)

    def close(self) -> None:
        """Ends the thread that started containers, and with it any that still runs."""
        if self._spawner is not None:
            self._spawner.shutdown()
            self._spawner = None

    def _spawn(self, launch: Launch) -> "tuple[subprocess.Popen[bytes], threading.Thread]":
        words = command(launch, self._capabilities)

        def fork() -> "subprocess.Popen[bytes]":
            return subprocess.Popen(
                [find_tool(words[0]) or words[0], *words[1:]],
                bufsize=0,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=environment(launch),
                cwd="/",
                start_new_session=True,
            )

        spawner = self._spawner
        if spawner is None:
            raise MachineFailed("the local cloud is stopping")
        try:
            process = spawner.submit(fork).result()
        except OSError as error:
            raise MachineFailed(f"server {launch.server_id}: {error.strerror}") from error
        except RuntimeError as error:  # it ends at this moment
            raise MachineFailed("the local cloud is stopping") from error

        def say_long() -> None:
            self._log(f"server {launch.server_id} filled its console's file, which begins anew")

        console = threading.Thread(
            target=copy_console,
            args=(process.stdout, launch.console, say_long),
            name=f"{launch.machine}-console",
            daemon=True,
        )
        console.start()
        return process, console

    def _await_init(self, running: _Running) -> None:
        give_up_s = time.monotonic() + _INIT_TIMEOUT_S
        while time.monotonic() < give_up_s:
            running.init_pid = _init_of(running.process.pid)
            if running.init_pid:
                return
            if running.process.poll() is not None:
                running.console.join(_LAST_WORDS_S)
                raise MachineFailed(f"server {running.launch.server_id}: {last_line(running.launch.console)}")
            time.sleep(_POLL_S)
        raise MachineFailed(f"server {running.launch.server_id} has no init after {_INIT_TIMEOUT_S:g} s")

    def _watch(self, running: _Running) -> None:
        server_id = running.launch.server_id
        while running.process.wait() == _EXIT_REBOOT and not running.unplugged:
            running.console.join(_LAST_WORDS_S)
            try:
                running.init_pid = 0
                running.process, running.console = self._spawn(running.launch)
                self._await_init(running)
            except MachineFailed as error:
                self._log(f"server {server_id} does not come back from its reboot: {error}")
                running.process.kill()
                break
        running.console.join(_LAST_WORDS_S)  # its file goes with the server, and must not come back
        try:
            self._on_end(server_id)
        except MachineFailed as error:
            self._log(f"server {server_id}: {error}")
        with self._lock:
            self._running.pop(server_id, None)
        running.ended.set()
        if running.booted and not running.unplugged:
            self._on_off(server_id)


def kill_leftovers(tag: str, namespaces: list[Path]) -> list[int]:
    """Ends what a killed cloud left running and returns its process ids; raises MachineFailed if some does not end.

    That is the containers by their name, and all who live in the servers' network namespaces.
    """
    found = sorted({*_containers_of(tag), *_living_in(namespaces)})
    for pid in found:
        _send(pid, signal.SIGKILL)
    give_up_s = time.monotonic() + _KILL_TIMEOUT_S
    while any(_is_alive(pid) for pid in found):
        if time.monotonic() > give_up_s:
            raise MachineFailed(f"processes {[pid for pid in found if _is_alive(pid)]} do not end")
        time.sleep(_POLL_S)
    return found


def _containers_of(tag: str) -> Iterator[int]:
    for pid in _processes():
        try:
            words = (_PROC / str(pid) / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue  # it ended meanwhile
        if is_container_of(tag, words):
            yield pid


def _living_in(namespaces: list[Path]) -> Iterator[int]:
    wanted = {(path.stat().st_dev, path.stat().st_ino) for path in namespaces}
    for pid in _processes():
        try:
            status = (_PROC / str(pid) / "ns/net").stat()
        except OSError:
            continue  # it ended meanwhile
        if (status.st_dev, status.st_ino) in wanted:
            yield pid


def _processes() -> list[int]:
    return [int(path.name) for path in _PROC.iterdir() if path.name.isdigit()]


def _init_of(pid: int) -> int:
    """The container's init among the descendants of a process, or 0 while there is none."""
    for child in _children(pid):
        try:
            status = (_PROC / str(child) / "status").read_text()
        except OSError:
            continue  # it ended meanwhile
        if is_init(status):
            return child
        deeper = _init_of(child)
        if deeper:
            return deeper
    return 0


def is_init(status: str) -> bool:
    """Tells whether a process, by the text of its ``/proc/PID/status``, is the first of a booted system."""
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return fields["NSpid"].split()[1:][-1:] == ["1"] and fields["Name"].strip() in ("systemd", "init")


def _children(pid: int) -> list[int]:
    try:
        return [int(word) for word in (_PROC / f"{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []  # it ended meanwhile


def _send(pid: int, number: int) -> None:
    if pid > 0:  # 0 is an init that does not run yet
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass  # it has just ended


def _is_alive(pid: int) -> bool:
    try:
        return (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
