"""Owns the way out for a container that its own data keep from starting: they are put aside, if it then does start.

``python3 mend_data.py COUNTS NAME…`` looks how often Docker has started the containers of these names again, by the
file COUNTS since its last look. One that keeps ending is tried with an empty folder in place of
``/var/lib/mini-llm-NAME``. If it stays, the old folder becomes ``….damaged``, in the place of an earlier one; if it
does not, the data were not the reason: they are put back, and stay there until the next boot.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

_STATE = Path("/var/lib")
_AT_LEAST = 2  # starts since the last look
_SETTLED_S = 60.0
_TRIAL_S = 20.0
_PATIENCE_S = 60.0


@dataclass(frozen=True)
class Seen:
    """A container at one look."""

    id: str
    restarts: int
    running_s: float  # since its last start; 0 while it is not running


def docker(*words: str) -> str:
    """What Docker prints; raises SubprocessError."""
    done = subprocess.run(["docker", *words], check=True, capture_output=True, text=True, timeout=_PATIENCE_S)
    return done.stdout


def look_at(name: str, ask: Callable[..., str] = docker, now_s: Callable[[], float] = time.time) -> Seen:
    """A container as it is; raises SubprocessError, where there is none as well."""
    [told] = json.loads(ask("inspect", f"mini-llm-{name}-1"))
    state: dict[str, Any] = told["State"]
    steady = state["Running"] and not state["Restarting"]
    began = datetime.fromisoformat(state["StartedAt"])
    return Seen(told["Id"], told["RestartCount"], now_s() - began.timestamp() if steady else 0.0)


def keeps_ending(seen: Seen, before: dict[str, Any] | None) -> bool:
    """Whether it was started again more than once since the last look, and is not there for good by now."""
    if before is None or before["id"] != seen.id or before["tried"]:
        return False
    again: int = seen.restarts - before["restarts"]
    return again >= _AT_LEAST and seen.running_s < _SETTLED_S


def _beside(folder: Path) -> tuple[Path, Path]:
    """Where its content is during a trial, and where after one that helped."""
    return folder.with_name(f"{folder.name}.aside"), folder.with_name(f"{folder.name}.damaged")


def try_without_data(
    name: str,
    folder: Path,
    ask: Callable[..., str] = docker,
    look: Callable[[str], Seen] = look_at,
    wait: Callable[[float], None] = time.sleep,
) -> bool:
    """Whether the container stays with an empty folder; if not, its data are where they were."""
    aside, damaged = _beside(folder)
    ask("stop", f"mini-llm-{name}-1")
    shutil.rmtree(damaged, ignore_errors=True)  # the disk holds one of them at most
    status = folder.stat()
    folder.rename(aside)
    try:
        folder.mkdir()
        os.chown(folder, status.st_uid, status.st_gid)
        folder.chmod(status.st_mode & 0o7777)
    except OSError:  # of a full disk; the container goes on with what it had
        aside.rename(folder)
        ask("start", f"mini-llm-{name}-1")
        raise
    ask("start", f"mini-llm-{name}-1")
    wait(_TRIAL_S)
    seen = look(name)
    stays = seen.restarts == 0 and seen.running_s > 0
    if stays:
        aside.rename(damaged)
    else:
        ask("stop", f"mini-llm-{name}-1")
        shutil.rmtree(folder)
        aside.rename(folder)
        ask("start", f"mini-llm-{name}-1")
    return stays


def end_trial(folder: Path) -> None:
    """Of a trial that was cut off, the folder in its place stays, and what was put aside is kept."""
    aside, damaged = _beside(folder)
    if aside.exists():
        shutil.rmtree(damaged, ignore_errors=True)
        aside.rename(damaged)


def look_after(name: str, before: dict[str, Any] | None) -> dict[str, Any]:
    """One look, and a trial where it is due; what to remember. Raises OSError, SubprocessError."""
    folder = _STATE / f"mini-llm-{name}"
    end_trial(folder)
    seen = look_at(name)
    tried = before is not None and before["id"] == seen.id and before["tried"]
    if keeps_ending(seen, before):
        print(f"{name} keeps ending; it is tried without its data")
        tried = not try_without_data(name, folder)
        print(f"{name}: " + ("its data were not the reason" if tried else "it was its data, which are put aside"))
        seen = look_at(name)
    return {"id": seen.id, "restarts": seen.restarts, "tried": tried}


def main(counts: Path, names: list[str]) -> int:
    """Looks after each."""
    before = json.loads(counts.read_text()) if counts.exists() else {}
    now = {}
    for name in names:
        try:
            now[name] = look_after(name, before.get(name))
        except (OSError, ValueError, LookupError, subprocess.SubprocessError) as error:
            print(f"{name} cannot be looked after: {error}")
    counts.write_text(json.dumps(now) + "\n")
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # a file's, of which the stubs are not sure
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
