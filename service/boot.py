"""Owns the timeline of a node's boot: what its units have noted in a folder, and what the service notes itself."""

import os
import time
from pathlib import Path

# The units' own are files of these names, in seconds since the host's start.
_NOTED = ("userspace", "facts", "certificate")
# What is told, and in which order.
EVENTS = ("userspace", "facts", "service", "model", "first_token", "certificate")


def now_s() -> float:
    """Seconds since the host's kernel started, as the units count them."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _begun_s(pid: int) -> float:
    """When a process began, as `now_s` counts: field 22 of its line (man 5 proc); psutil's time is of whole seconds."""
    line = Path(f"/proc/{pid}/stat").read_text()
    return int(line.rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")


class Timeline:
    """When each thing first happened at this boot, in seconds since its begin (the file ``begin`` in the folder)."""

    def __init__(self, folder: Path):
        self._folder = folder
        # Of the process that systemd started, not of the worker that it forked.
        self._seen_s = {"service": _begun_s(os.getppid())}

    def note(self, event: str) -> None:
        """Something has happened, now; only the first time counts."""
        if event not in self._seen_s:
            self._seen_s[event] = now_s()

    def tell(self) -> dict[str, float | None]:
        """Seconds by event, null for what has not happened, or was not noted: the last restart of the service, not the
        boot, is what a service that was restarted tells of itself.
        """
        begin_s = self._read("begin")
        times_s = {**self._seen_s, **{name: self._read(name) for name in _NOTED}}
        return {
            f"{name}_s": None if begin_s is None or at_s is None else round(at_s - begin_s, 2)
            for name, at_s in ((name, times_s.get(name)) for name in EVENTS)
        }

    def _read(self, name: str) -> float | None:
        try:
            return float((self._folder / name).read_text())
        except (OSError, ValueError):  # not noted, or not yet
            return None
