"""Owns the programs that integration tests run: the one on the PATH if it fits, else built once from its Go module."""

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_FOLDER = Path(__file__).parent
_BUILD_TIMEOUT_S = 1800


@dataclass(frozen=True)
class Program:
    """A program by its name; the folder of the same name pins its module and all that it needs."""

    name: str
    version: str
    package: str
    on_path: tuple[str, ...] = ()  # how it tells its version; empty if it is never found there
    tags: str = ""  # of Go's build
    variable: str = ""  # of its code, as its releases are built with it: NAME=VALUE


PACKER = Program("packer", "1.11.2", "github.com/hashicorp/packer", ("packer", "version"))
PACKER_PLUGIN_HCLOUD = Program(
    "packer-plugin-hcloud",
    "1.0.5",
    "github.com/hashicorp/packer-plugin-hcloud",
    variable="github.com/hashicorp/packer-plugin-hcloud/version.VersionPrerelease=",  # not one in development
)
# Never from the PATH: they go into containers that hold nothing else.
TRAEFIK = Program("traefik", "3.6.12", "github.com/traefik/traefik/v3/cmd/traefik")
# Without its discovery of other people's clouds, which is four fifths of its build; its module counts v3.15 as v0.315.
PROMETHEUS = Program("prometheus", "3.15.0", "github.com/prometheus/prometheus/cmd/prometheus", tags="remove_all_sd")
# The newest whose module holds its own pages; the image's is 0.34.
ALERTMANAGER = Program("alertmanager", "0.31.1", "github.com/prometheus/alertmanager/cmd/alertmanager")
NODE_EXPORTER = Program("node-exporter", "1.12.1", "github.com/prometheus/node_exporter")
OPENTOFU = Program("opentofu", "1.12.6", "github.com/opentofu/opentofu/cmd/tofu", ("tofu", "version"))
# Built by tests/bench/peer_builds.py: it is of Go and C++, and needs libraries beside it.
OLLAMA = Program("ollama", "0.17.4", "github.com/ollama/ollama")
# Not Grafana: it says so to whoever asks, in its place behind Traefik.
GRAFANA_STAND_IN = Program("grafana-stand-in", "2", "mini-llm/tests/programs/grafana-stand-in")


class ProgramMissing(Exception):
    """The program is not there and cannot be built; the message says what to install."""


def find_kept(name: str) -> Path | None:
    """What the user's cache has by that name, if it has it."""
    path = _cache() / name
    return path if path.exists() else None


def list_kept(pattern: str) -> list[Path]:
    """What the user's cache has by such names, the newest last; neither locks nor what is being built."""
    found = [each for each in _cache().glob(pattern) if each.suffix not in (".lock", ".building")]
    return sorted(found, key=lambda each: each.stat().st_mtime)


def forget_old(pattern: str, left: int) -> None:
    """Removes of what the user's cache has by such names all but the newest."""
    for old in list_kept(pattern)[:-left]:
        if old.is_dir():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.unlink(missing_ok=True)


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mini-llm" / "programs"


def keep(name: str, build: Callable[[Path], None]) -> Path:
    """What the user's cache has by that name: a file or a folder, which ``build`` makes once at the path it gets.

    What it needs beside that goes into the path's parent, which is removed. Raises what ``build`` raises.
    """
    cache = _cache()
    built = cache / name
    if built.exists():
        return built
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not built.exists():
            print(f"making {name}, once; it may take minutes", file=sys.stderr, flush=True)
            folder = cache / f"{name}.building"
            shutil.rmtree(folder, ignore_errors=True)  # of one that was killed
            folder.mkdir()
            try:
                build(folder / "draft")
                (folder / "draft").replace(built)
            finally:
                shutil.rmtree(folder)
    return built


def obtain(program: Program) -> Path:
    """The program's file; a first build takes minutes and is kept in the user's cache. Raises ProgramMissing."""
    found = shutil.which(program.on_path[0]) if program.on_path else None
    if found is not None:
        told = subprocess.run(program.on_path, capture_output=True, text=True, timeout=30).stdout
        if program.version in told:
            return Path(found)
    name = f"{program.name}-{program.version}{'-released' if program.variable else ''}"
    return keep(name, lambda draft: _build(program, draft))


def _build(program: Program, draft: Path) -> None:
    go = shutil.which("go")
    if go is None:
        raise ProgramMissing(f"{program.name} {program.version} is not here: install it, or Go 1.26 to build it")
    flags = f"-s -w {f'-X={program.variable}' if program.variable else ''}"
    command = [go, "build", "-mod=readonly", "-trimpath", f"-ldflags={flags}", f"-tags={program.tags}"]
    done = subprocess.run(
        [*command, "-o", str(draft), program.package],
        cwd=_FOLDER / program.name,
        env={**os.environ, "CGO_ENABLED": "0"},  # a file that needs no library
        capture_output=True,
        text=True,
        timeout=_BUILD_TIMEOUT_S,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise ProgramMissing(f"{program.name} {program.version} could not be built: {last}")
