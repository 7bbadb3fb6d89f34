"""Owns the attempts of a program inside the service's unit at what the unit forbids; prints what became of each.

Runs in a node in place of the service: ``python3 probe.py`` prints one JSON object, each attempt's name with "refused"
or "possible".
"""

import ctypes
import errno
import json
import mmap
import os
import socket
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

_LIBC = ctypes.CDLL(None, use_errno=True)
_STATE = Path("/var/lib/mini-llm")
_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_SYS_FINIT_MODULE, _SYS_BPF, _SYS_PTRACE, _SYS_KEXEC_LOAD, _SYS_PERF = 313, 321, 101, 246, 298  # x86-64
_PTRACE_ATTACH = 16


class Refused(Exception):
    """The kernel said no."""


def call(result: int) -> None:
    """Raises Refused if a call of the C library failed."""
    if result == -1:
        raise Refused(errno.errorcode[ctypes.get_errno()])


def write(path: str) -> Callable[[], object]:
    return lambda: Path(path).write_text("x")


def read(path: str) -> Callable[[], object]:
    return lambda: Path(path).open("rb").read(1)


def open_socket(family: int, kind: int = socket.SOCK_STREAM, protocol: int = 0) -> Callable[[], object]:
    return lambda: socket.socket(family, kind, protocol).close()


def see_others() -> None:
    mine = os.getuid()
    if all(path.stat().st_uid == mine for path in Path("/proc").glob("[0-9]*")):
        raise Refused("only its own processes are there")


def see_network() -> None:
    lines = Path("/proc/net/dev").read_text().splitlines()[2:]
    if [line.split(":")[0].strip() for line in lines] == ["lo"]:
        raise Refused("there is no network")


def run_from(folder: str) -> Callable[[], object]:
    def attempt() -> None:
        with tempfile.TemporaryDirectory(dir=folder) as made:
            program = Path(made) / "program"
            program.write_bytes(Path("/usr/bin/true").read_bytes())
            program.chmod(0o755)
            subprocess.run([program], check=True)

    return attempt


def make_setuid() -> None:
    path = _STATE / "setuid"
    path.touch()
    try:
        path.chmod(0o4755)
    finally:
        path.unlink()


def write_code() -> None:
    mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC).close()


ATTEMPTS: dict[str, Callable[[], object]] = {
    "write to /etc": write("/etc/mini-llm/x"),
    "write to /usr": write("/usr/x"),
    "write to the service": write("/opt/mini-llm/service/x"),
    "write to the model": lambda: Path("/opt/mini-llm/models/starter.gguf").open("r+b").close(),
    "write to the keys": write("/run/mini-llm/keys.json"),
    "write to the home of root": write("/root/x"),
    "write a kernel setting": write("/proc/sys/kernel/hostname"),
    "write to a control group": write("/sys/fs/cgroup/cgroup.procs"),
    "read the password file": read("/etc/shadow"),
    "read the facts": read("/etc/mini-llm/facts.yaml"),
    "read the user-data": read("/var/lib/cloud/instance/user-data.txt"),
    "read the seed": read("/var/lib/cloud/seed/nocloud/user-data"),
    "read a host key": read("/etc/ssh/ssh_host_ed25519_key"),
    "read another's memory": read("/proc/1/mem"),
    "read the kernel's log": read("/dev/kmsg"),
    "read physical memory": read("/dev/mem"),
    "open an IPv4 socket": open_socket(socket.AF_INET),
    "open an IPv6 socket": open_socket(socket.AF_INET6),
    "open a raw socket": open_socket(socket.AF_INET, socket.SOCK_RAW, 1),
    "open a packet socket": open_socket(socket.AF_PACKET, socket.SOCK_RAW),
    "open a netlink socket": open_socket(socket.AF_NETLINK, socket.SOCK_RAW),
    "see a network": see_network,
    "see others' processes": see_others,
    "load a module": lambda: call(_LIBC.syscall(_SYS_FINIT_MODULE, 0, b"", 0)),
    "load a BPF program": lambda: call(_LIBC.syscall(_SYS_BPF, 0, None, 0)),
    "load another kernel": lambda: call(_LIBC.syscall(_SYS_KEXEC_LOAD, 0, 0, None, 0)),
    "measure the kernel": lambda: call(_LIBC.syscall(_SYS_PERF, None, 0, -1, -1, 0)),
    "trace a process": lambda: call(_LIBC.syscall(_SYS_PTRACE, _PTRACE_ATTACH, 1, None, None)),
    "mount": lambda: call(_LIBC.mount(b"none", b"/tmp", b"tmpfs", 0, None)),
    "make a user namespace": lambda: call(_LIBC.unshare(_CLONE_NEWUSER)),
    "make a network namespace": lambda: call(_LIBC.unshare(_CLONE_NEWNET)),
    "become root": lambda: os.setuid(0),
    "change the root": lambda: os.chroot("/tmp"),
    "set the clock": lambda: call(_LIBC.clock_settime(0, ctypes.byref((ctypes.c_long * 2)(0, 0)))),
    "set the host's name": lambda: call(_LIBC.sethostname(b"x", 1)),
    "reboot": lambda: call(_LIBC.reboot(0)),
    "take real-time priority": lambda: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1)),
    "change its personality": lambda: call(_LIBC.personality(0x0400000)),
    "make memory writable and executable": write_code,
    "make a setuid file": make_setuid,
    "run a program from its state": run_from("/var/lib/mini-llm"),
    "run a program from /tmp": run_from("/tmp"),
}


def attempt(what: Callable[[], object]) -> str:
    """Tries in a child, for some attempts may end it."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            what()
            os.write(writer, b"possible")
        except (Refused, OSError, ValueError, subprocess.SubprocessError):
            os.write(writer, b"refused")
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    # A child that was killed has said nothing.
    return os.read(reader, 100).decode() or "refused"


if __name__ == "__main__":
    print(json.dumps({name: attempt(what) for name, what in ATTEMPTS.items()}))
