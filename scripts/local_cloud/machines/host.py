"""Owns what is asked of the host: which tools must be there, and how a program is run on it."""

import os
import shlex
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from scripts.local_cloud.machine_interface import MachineFailed

TOOLS = {  # program -> Debian package that brings it
    "systemd-nspawn": "systemd-container",
    "ip": "iproute2",
    "nft": "nftables",
    "mount": "mount",
    "losetup": "mount",
    "setpriv": "util-linux",
    "unshare": "util-linux",
    "sysctl": "procps",
    "tar": "tar",
}
POOL_TOOLS = {"btrfs": "btrfs-progs", "mkfs.btrfs": "btrfs-progs"}
IMAGE_TOOLS = {"mmdebstrap": "mmdebstrap", "arch-test": "arch-test"}
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_ADMIN_DIRECTORIES = ("/usr/local/sbin", "/usr/sbin", "/sbin")  # not on the PATH of everyone who may become root


class HostUnfit(Exception):
    """The host cannot run servers; the message says what would change that."""


def find_tool(name: str) -> str | None:
    """The path of a program, or None where it is not installed."""
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(_ADMIN_DIRECTORIES))


def check_host() -> None:
    """Raises HostUnfit unless servers can run here: Linux, root, and the tools that every part needs."""
    if os.uname().sysname != "Linux":
        raise HostUnfit("servers are Linux containers: this needs a Linux machine")
    if os.geteuid() != 0:
        raise HostUnfit("servers are system containers, which only root can start: try again with sudo")
    require_tools(TOOLS)


def check_image_tools() -> None:
    """Raises HostUnfit unless the base image can be built here."""
    require_tools(IMAGE_TOOLS)
    if not KEYRING.exists():
        raise HostUnfit(f"{KEYRING} is missing; install it: {install_line(['debian-archive-keyring'])}")


def check_pool_tools() -> None:
    """Raises HostUnfit unless copy-on-write storage can be had here."""
    require_tools(POOL_TOOLS)


def require_tools(tools: dict[str, str], find: Callable[[str], str | None] = find_tool) -> None:
    """Raises HostUnfit, naming the line that installs what is missing of ``tools`` (program -> package)."""
    missing = [tool for tool in tools if find(tool) is None]
    if missing:
        packages = sorted({tools[tool] for tool in missing})
        raise HostUnfit(f"{', '.join(missing)} not found; install it: {install_line(packages)}")


def install_line(packages: Sequence[str]) -> str:
    """What a person types to install Debian packages."""
    return f"sudo apt-get install --no-install-recommends {' '.join(packages)}"


def run(
    command: Sequence[str | Path], *, stdin: str | None = None, timeout_s: float = 60.0, keep_open: Sequence[int] = ()
) -> str:
    """Runs a program to its end and returns what it printed; raises MachineFailed if it is missing or fails.

    ``keep_open`` are files, such as locks, that the program shares until it ends, even if this one is killed.
    """
    words = [str(word) for word in command]
    shown = shlex.join(words)
    try:
        done = subprocess.run(
            [find_tool(words[0]) or words[0], *words[1:]],
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            pass_fds=tuple(keep_open),
            check=False,
        )
    except OSError as error:
        raise MachineFailed(f"{shown}: {error.strerror}") from error
    except subprocess.TimeoutExpired as error:
        raise MachineFailed(f"{shown}: not done after {timeout_s:g} s") from error
    if done.returncode != 0:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["(it said nothing)"]
        # ip ends with which line of its batch failed, after why.
        said = " / ".join(lines[-2:]) if lines[-1].startswith("Command failed") else lines[-1]
        raise MachineFailed(f"{shown}: exit code {done.returncode}: {said}")
    return done.stdout


def succeeds(command: Sequence[str | Path], *, stdin: str | None = None) -> bool:
    """Runs a program whose failure means that there was nothing to do; tells whether it did something."""
    try:
        run(command, stdin=stdin)
    except MachineFailed:
        return False
    return True


def run_ip(*commands: str, namespace: str | None = None) -> None:
    """Runs commands of ``ip``, one after the other, in a network namespace or the host's; raises MachineFailed."""
    where = ["-n", namespace] if namespace else []
    run(["ip", *where, "-batch", "-"], stdin="".join(f"{command}\n" for command in commands))
