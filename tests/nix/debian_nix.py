"""Owns Nix as a program: Debian 13's packages of it, unpacked once and kept in the user's cache."""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from scripts.local_cloud.machine_interface import MachineFailed
from scripts.local_cloud.machines import host
from scripts.local_cloud.machines.base_image import host_mirror
from tests.programs import ProgramMissing

_SUITE = "trixie"
_PACKAGE = "nix-bin"
_UNPACK_TIMEOUT_S = 600.0
_RUN_TIMEOUT_S = 60.0
_SETTINGS = """\
experimental-features = nix-command flakes
flake-registry =
substituters =
build-users-group =
max-jobs = 0
"""


@dataclass(frozen=True)
class Nix:
    """Nix with a store of its own, that fetches nothing and builds nothing."""

    root: Path  # Debian's files
    work: Path

    @property
    def store(self) -> Path:
        return self.work / "nix" / "store"

    def run(self, *words: str | Path) -> "subprocess.CompletedProcess[str]":
        """Runs ``nix`` with words that begin with a command; what it said is in the answer, whatever the exit code."""
        libraries = next(self.root.glob("usr/lib/*-linux-gnu"))
        # By its own loader: the host's C library may be older than Debian 13's.
        loader = next(self.root.glob("usr/lib*/ld-linux-*"))
        command, *rest = words
        return subprocess.run(
            [
                *(loader, "--library-path", libraries, self.root / "usr/bin/nix"),
                *(command, "--store", self.work, "--offline", *rest),
            ],
            env={"HOME": str(self.work), "NIX_CONF_DIR": str(self.work), "NIX_CONFIG": _SETTINGS},
            capture_output=True,
            text=True,
            timeout=_RUN_TIMEOUT_S,
        )


def obtain_nix(work: Path) -> Nix:
    """Nix, that works in a folder; unpacking it takes a quarter of a minute, once. Raises HostUnfit, ProgramMissing."""
    sources = host_mirror(Path("/etc/apt")).lines()
    key = hashlib.sha256("\0".join((_SUITE, _PACKAGE, *sources)).encode()).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mini-llm" / "programs"
    root = cache / f"nix-{key}"
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f"{root.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not root.exists():
            host.check_image_tools()
            if os.geteuid() != 0:
                raise host.HostUnfit("Debian's packages of Nix are unpacked by root: try again with sudo")
            print("unpacking Nix from Debian's packages, once", file=sys.stderr, flush=True)
            draft = cache / f"{root.name}.draft"
            shutil.rmtree(draft, ignore_errors=True)
            unpack = [
                *("unshare", "--mount", "--propagation", "slave"),  # so that its mounts go with it when it is killed
                *("mmdebstrap", "--quiet", "--mode=root", "--variant=extract", f"--include={_PACKAGE}"),
                *(_SUITE, str(draft), *sources),
            ]
            try:
                host.run(unpack, timeout_s=_UNPACK_TIMEOUT_S, keep_open=[lock.fileno()])
            except MachineFailed as error:
                raise ProgramMissing(f"Nix could not be had from Debian 13's packages: {error}") from error
            draft.rename(root)
    return Nix(root, work)
