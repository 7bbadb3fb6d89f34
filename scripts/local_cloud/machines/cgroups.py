"""Owns the servers' control groups: one each, in every hierarchy that the host has, with the limits of its type."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_LIMITING = ("memory", "cpu")
_PERIOD_US = 100_000
_LEAVE_TIMEOUT_S = 2.0


@dataclass(frozen=True)
class Hierarchy:
    """Where control groups are mounted, and the controllers there; version 2 is ``unified``."""

    root: Path
    controllers: frozenset[str]
    unified: bool


def hierarchies(mounts: str) -> list[Hierarchy]:
    """The hierarchies that a server is put into, from the text of ``/proc/mounts``.

    Version 1 controllers that limit nothing here are left out: a server would only have to be put in and taken out.
    """
    found = []
    for line in mounts.splitlines():
        _, root, kind, options, *_ = line.split()
        if kind == "cgroup2":
            found.append(Hierarchy(Path(root), frozenset(), unified=True))
        elif kind == "cgroup":
            words = frozenset(options.split(","))
            if words & {*_LIMITING, "name=systemd"}:
                found.append(Hierarchy(Path(root), words & frozenset(_LIMITING), unified=False))
    return found


class ControlGroups:
    """The control groups of one cloud, ``mlc-TAG/SERVER`` in each hierarchy."""

    def __init__(self, tag: str, log: Callable[[str], None]) -> None:
        self._name = f"mlc-{tag}"
        self._hierarchies = hierarchies(Path("/proc/mounts").read_text())
        self._log = log
        self._said: set[str] = set()

    def make(self, server_id: int, cores: int, memory_gb: float) -> list[Path]:
        """Makes a server's groups with its limits and returns the files that a process joins them by."""
        joins = []
        limited: set[str] = set()
        for hierarchy in self._hierarchies:
            group = hierarchy.root / self._name / str(server_id)
            try:
                group.mkdir(parents=True, exist_ok=True)
                limited |= _limit(hierarchy, group, cores, memory_gb)
            except OSError as error:
                self._say_once(f"{group}: {error.strerror}")
                continue
            joins.append(group / "cgroup.procs")
        if len(limited) < len(_LIMITING):
            self._say_once(f"no limits on servers' {' and '.join(sorted({*_LIMITING} - limited))}: the host has none")
        return joins

    def remove(self, server_id: int) -> None:
        """Removes a server's groups, whose processes have ended; what is not there is no error."""
        for hierarchy in self._hierarchies:
            _remove_tree(hierarchy.root / self._name / str(server_id))

    def close(self) -> None:
        """Removes all groups, a killed predecessor's too."""
        for hierarchy in self._hierarchies:
            _remove_tree(hierarchy.root / self._name)

    def _say_once(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            self._log(line)


def _limit(hierarchy: Hierarchy, group: Path, cores: int, memory_gb: float) -> set[str]:
    memory = str(int(memory_gb * 1024**3))
    if not hierarchy.unified:
        if "memory" in hierarchy.controllers:
            (group / "memory.limit_in_bytes").write_text(memory)
        if "cpu" in hierarchy.controllers:
            (group / "cpu.cfs_period_us").write_text(str(_PERIOD_US))
            (group / "cpu.cfs_quota_us").write_text(str(cores * _PERIOD_US))
        return set(hierarchy.controllers)
    available = (hierarchy.root / "cgroup.controllers").read_text().split()
    wanted = [name for name in _LIMITING if name in available]
    for parent in (hierarchy.root, group.parent):
        for name in wanted:
            (parent / "cgroup.subtree_control").write_text(f"+{name}")
    if "memory" in wanted:
        (group / "memory.max").write_text(memory)
    if "cpu" in wanted:
        (group / "cpu.max").write_text(f"{cores * _PERIOD_US} {_PERIOD_US}")
    return set(wanted)


def _remove_tree(group: Path) -> None:
    if not group.is_dir():
        return
    give_up_s = time.monotonic() + _LEAVE_TIMEOUT_S
    for directory in sorted((path for path in [group, *group.rglob("*/")]), key=lambda path: -len(path.parts)):
        while directory.is_dir():
            try:
                directory.rmdir()
            except OSError:  # its last process has been reaped by nobody yet
                if time.monotonic() > give_up_s:
                    return
                time.sleep(0.01)
