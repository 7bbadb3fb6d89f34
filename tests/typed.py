"""Owns commands of the documents as tests type them: in this checkout, as a person would."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from tests.tree import ROOT

_STOP_PATIENCE_S = 120.0
_SUDO = re.compile(r"^sudo ")


def type_command(
    command: str,
    timeout_s: float,
    *codes: int,
    cwd: Path = ROOT,
    environment: dict[str, str] | None = None,
    **more: str,
) -> str:
    """What it prints, errors too, where it ends with 0 or one of ``codes``; ``sudo`` is left out, tests are root's.

    ``more`` are variables. Whatever ends the waiting, a time that is over among it, ends the command as Ctrl-C does,
    and so does the end of who waits.
    """
    # Of the run that this is a part of neither make's nor pytest's own settings are for the command.
    given = os.environ if environment is None else environment
    own = {name: value for name, value in given.items() if not name.startswith(("MAKE", "MFLAGS", "PYTEST_"))}
    process = subprocess.Popen(
        ["setpriv", "--pdeathsig", "TERM", "sh", "-c", f"exec {_SUDO.sub('', command)}"],
        cwd=cwd,
        env={**own, "PYTHON": os.path.realpath(sys.executable), **more},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=timeout_s)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
            try:
                process.communicate(timeout=_STOP_PATIENCE_S)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
    assert process.returncode in (0, *codes), said
    return said


def measure(command: str, timeout_s: float, *names: str) -> dict[str, float]:
    """The first number behind each figure's name in what a bench prints; a goal may be missed beside other tests."""
    said = type_command(command, timeout_s, 2)
    assert "Traceback" not in said, said
    found = {name: re.findall(rf"^ *{re.escape(name)} .*?(\d+(?:\.\d+)?)", said, re.MULTILINE) for name in names}
    assert {name: len(numbers) for name, numbers in found.items()} == dict.fromkeys(names, 1), said
    return {name: float(number) for name, [number] in found.items()}
