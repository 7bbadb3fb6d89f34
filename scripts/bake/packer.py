"""Owns the runs of Packer: which program, what it is told, what it says, and how it ends."""

import contextlib
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from scripts.bake.errors import LayerFailed, Refused
from scripts.bake.runs import LONGEST_RUN_S, Run, note_packer

_log = logging.getLogger(__name__)
_running: list[int] = []  # process groups, for who leaves without waiting
_OLDEST = (1, 11, 0)
_HINT = "install it: https://developer.hashicorp.com/packer/install"
_COMMAND_TIMEOUT_S = 120
_TAKE_BACK_PATIENCE_S = 90.0  # in which an interrupted Packer takes back what it made
_LOOK_S = 0.1
_LAST_LINES = 15
# What a provisioner's script ends with when something outside did not answer (sysexits.h: EX_TEMPFAIL).
_TRY_AGAIN_STATUS = 75
_SCRIPT_STATUS = re.compile(r"Script exited with non-zero exit status: (\d+)")


@dataclass(frozen=True)
class PackerEnded(Exception):
    """Packer gave up; ``script_status`` is what a provisioner's script ended with, None if that was not the reason."""

    lines: list[str]
    script_status: int | None

    @property
    def passes(self) -> bool:
        """Whether a script says itself that it may go well at another time."""
        return self.script_status == _TRY_AGAIN_STATUS


def require_packer(template: Path, environment: Mapping[str, str]) -> str:
    """Packer's version, with its plugin installed; it sees no token, for it asks the cloud nothing. Raises Refused."""
    environment = {**environment, "HCLOUD_TOKEN": "not-asked-for"}
    program = shutil.which("packer", path=environment.get("PATH"))
    if program is None:
        raise Refused("packer is not on the PATH", _HINT)
    told = _run(["packer", "version"], environment).stdout
    match = re.search(r"v(\d+)\.(\d+)\.(\d+)", told)
    if match is None or tuple(map(int, match.groups())) < _OLDEST:
        raise Refused(f"this Packer is {told.splitlines()[0] if told else 'unknown'}; 1.11 or newer is needed", _HINT)
    # Without its plugin Packer cannot read the template; `init` would ask the outside also where the plugin is there.
    for command in (["init", str(template)], None):
        done = _run(["packer", "validate", str(template)], environment)
        if done.returncode == 0:
            return match[0].removeprefix("v")
        if command is not None:
            _run(["packer", *command], environment)
    lines = (done.stdout + done.stderr).strip().splitlines()
    raise Refused(
        f"Packer cannot use the template: {lines[0] if lines else 'it does not say why'}",
        f"have its plugin installed: packer init {template}",
    )


def _run(command: list[str], environment: Mapping[str, str]) -> "subprocess.CompletedProcess[str]":
    try:
        return subprocess.run(
            command,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_COMMAND_TIMEOUT_S,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = error.strerror if isinstance(error, OSError) else f"it is not done within {_COMMAND_TIMEOUT_S} s"
        raise Refused(f"{' '.join(command)}: {reason}", _HINT) from error


def build(
    run: Run,
    template: Path,
    variables: Mapping[str, object],
    environment: Mapping[str, str],
    show: Callable[[str], None],
) -> None:
    """Runs ``packer build`` to its end; each line that it says goes to the log and to ``show``.

    Raises PackerEnded if it failed, Refused if it cannot be started. Interrupted, it lets Packer take back its things.
    """
    told = run.folder / "variables.pkrvars.json"
    told.write_text(json.dumps(variables))
    output = run.folder / "packer.out"
    command = ["packer", "build", "-machine-readable", f"-var-file={told}", str(template)]
    with output.open("wb") as file:
        try:
            # In a session of its own: Ctrl-C at the terminal is for the bake, which hands it on once.
            process = subprocess.Popen(
                command,
                env={**environment, "CHECKPOINT_DISABLE": "1"},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            raise Refused(f"packer cannot be started: {error.strerror}", _HINT) from error
    said: list[str] = []
    try:
        _running.append(process.pid)
        note_packer(run, process.pid)
        with output.open("rb") as file:
            rest = b""
            while True:
                over = process.poll() is not None
                rest = _read_lines(rest + file.read(), lambda line: _say(line, said, show))
                if over:
                    break
                if time.time() > run.deadline_s:  # from here on other machines take what it made for left over
                    raise LayerFailed(
                        f"Packer is not done by the run's deadline, {LONGEST_RUN_S // 3600} hours after its begin",
                        "look at what it last said",
                    )
                show("")  # it may say nothing for minutes
                time.sleep(_LOOK_S)
    finally:
        _end(process)
        with contextlib.suppress(ValueError):  # interrupted before it was noted
            _running.remove(process.pid)
        (run.folder / "packer.json").unlink(missing_ok=True)
    if process.returncode:
        statuses = [match[1] for line in said if (match := _SCRIPT_STATUS.search(line))]
        raise PackerEnded(said[-_LAST_LINES:], int(statuses[-1]) if statuses else None)


def kill_running() -> None:
    """Ends every Packer of this process at once; what they made stays."""
    for group in _running:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)


def _end(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is not None:
        return
    # To all of its session, as a terminal would: Packer's outermost process does not hand it on.
    os.killpg(process.pid, signal.SIGINT)
    try:
        process.wait(_TAKE_BACK_PATIENCE_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _read_lines(content: bytes, take: Callable[[str], None]) -> bytes:
    *lines, rest = content.split(b"\n")
    for line in lines:
        take(line.decode(errors="replace"))
    return rest


def _say(line: str, said: list[str], show: Callable[[str], None]) -> None:
    """One line of Packer's machine-readable output: time, target, type, data.

    https://developer.hashicorp.com/packer/docs/commands#machine-readable-output
    """
    parts = line.split(",", 4)
    if len(parts) < 5 or parts[2] != "ui":
        return
    text = parts[4].replace("%!(PACKER_COMMA)", ",").replace("\\r", "").replace("\\n", "\n")
    for each in text.split("\n"):
        plain = re.sub(r"\x1b\[[0-9;]*m", "", each).strip()
        plain = re.sub(r"^(==> )?mini-llm\.hcloud\.\w+: *", "", plain)
        if plain:
            said.append(plain)
            _log.info("packer says: %s", plain)
            show(plain)
