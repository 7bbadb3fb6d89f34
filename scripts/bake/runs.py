"""Owns runs: their names, which also stand in what they make at the cloud, and which of them are alive on this machine.

A run is a folder below the state folder, with its log, and a lock that the kernel gives back however the run ends.
What a run makes is made through its own process alone, Packer's calls too, so whoever gets the lock knows that
nothing comes after.
"""

import contextlib
import fcntl
import json
import os
import re
import secrets
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from scripts.bake.errors import Refused
from scripts.bake.snapshots import PRODUCT

# No bake lasts longer; what is older and was made by another machine is nobody's any more.
LONGEST_RUN_S = 6 * 3600
_PATTERN = re.compile(r"(\d{8}-\d{4})-[0-9a-f]{6}")
_SERVER = re.compile(r"mini-llm-(?:bake|probe)-(?P<run>\d{8}-\d{4}-[0-9a-f]{6})")
_RUNS_KEPT = 20


@dataclass(frozen=True)
class Run:
    """A run of this process: ``deadline_s`` is Unix time."""

    id: str
    folder: Path
    deadline_s: int

    @property
    def log(self) -> Path:
        """All that was said."""
        return self.folder / "bake.log"

    @property
    def labels(self) -> dict[str, str]:
        """Of all that it makes."""
        return {"product": PRODUCT, "run": self.id, "deadline": str(self.deadline_s)}

    @property
    def key_name(self) -> str:
        """Of the SSH key, at the cloud."""
        return f"mini-llm-bake-{self.id}"

    @property
    def probe_name(self) -> str:
        """Of the server that proves an image."""
        return f"mini-llm-probe-{self.id}"


def state_folder() -> Path:
    """Where runs, reports and what earlier bakes took are kept. Raises Refused."""
    told = os.environ.get("MINI_LLM_STATE_DIR")
    base = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    folder = Path(told) if told else base / "mini-llm" / "bake"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        (folder / "runs").mkdir(exist_ok=True)
        (folder / "reports").mkdir(exist_ok=True)
    except OSError as error:
        raise Refused(
            f"{folder} cannot be made: {error.strerror}", "set MINI_LLM_STATE_DIR to a folder of yours"
        ) from error
    return folder


@contextmanager
def new_run(state: Path) -> Iterator[Run]:
    """A run with a name that nobody else has. Raises Refused if the state folder cannot be written."""
    now = datetime.now(UTC)
    name = f"{now:%Y%m%d-%H%M}-{secrets.token_hex(3)}"
    folder = state / "runs" / name
    try:
        folder.mkdir(mode=0o700)
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise Refused(
            f"{folder} cannot be written: {error.strerror}", "make room, or set MINI_LLM_STATE_DIR"
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _forget_old(state)
        yield Run(name, folder, int(now.timestamp()) + LONGEST_RUN_S)
    finally:
        os.close(lock)


def run_of_server(name: str) -> str | None:
    """The run that a server's or key's name tells, None if it is not one of ours."""
    match = _SERVER.fullmatch(name)
    return match["run"] if match else None


def is_over(state: Path, run: str, now_s: float | None = None) -> bool:
    """Whether nothing can work for a run any more: known of this machine's own, of others' by their deadline alone.

    A name that is none is never over.
    """
    begun_s = _begun_s(run)
    if begun_s is None:
        return False
    lock_path = state / "runs" / run / "lock"
    with contextlib.suppress(FileNotFoundError):
        lock = os.open(lock_path, os.O_RDWR)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        else:
            return True
        finally:
            os.close(lock)
    return (time.time() if now_s is None else now_s) > begun_s + LONGEST_RUN_S


def _begun_s(run: str) -> float | None:
    match = _PATTERN.fullmatch(run)
    try:
        return datetime.strptime(match[1], "%Y%m%d-%H%M").replace(tzinfo=UTC).timestamp() if match else None
    except ValueError:  # digits, but no date
        return None


def stop_orphans(state: Path) -> None:
    """Ends the Packers of runs that were killed: they reach the cloud no more, but would go on with their server."""
    for path in (state / "runs").glob("*/packer.json"):
        if not is_over(state, path.parent.name):
            continue
        told = read_json(path)
        if isinstance(told, dict) and told.get("begun") and _begun(told["pid"]) == told["begun"]:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(told["pid"], signal.SIGKILL)
        path.unlink(missing_ok=True)


def note_packer(run: Run, pid: int) -> None:
    """Writes down which process is the run's Packer, for who comes after a kill."""
    write_json(run.folder / "packer.json", {"pid": pid, "begun": _begun(pid)})


def _begun(pid: int) -> str | None:
    """When a process began: a number that another one of the same id does not have; None without one."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _forget_old(state: Path) -> None:
    folders = sorted(folder for folder in (state / "runs").iterdir() if _PATTERN.fullmatch(folder.name))
    for folder in folders[:-_RUNS_KEPT]:
        # Only when the date in its name is enough to tell that it is over.
        if is_over(state, folder.name) and (_begun_s(folder.name) or 0) + LONGEST_RUN_S < time.time():
            shutil.rmtree(folder, ignore_errors=True)


def read_json(path: Path) -> Any:
    """What a file of the state folder says, None if there is none that can be read."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def write_json(path: Path, document: Any) -> None:
    """Writes a file whole or not at all. Raises OSError."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    unfinished.write_text(json.dumps(document, indent=1) + "\n")
    unfinished.replace(path)
