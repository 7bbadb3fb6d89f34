"""Owns what this host lets an engine have: threads (affinity, CPU quota) and memory (free, cgroup limit)."""

import os
from collections.abc import Iterator
from pathlib import Path

_REST_OF_HOST_BYTES = 1_000_000_000
_SMALL_WEIGHTS_BYTES = 32 * 2**20


def _read_words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []


def _ancestors(mount: Path, group: str) -> list[Path]:
    """The group's folder and those above it up to the mount: a quota of any of them holds.

    Inside a container the path that /proc names lies outside the mount; the mount itself is the group then.
    """
    relative = Path(group.lstrip("/"))
    folders = [mount / relative, *(mount / parent for parent in relative.parents)]
    return [folder for folder in dict.fromkeys(folders) if folder.is_dir()] or [mount]


def _groups(controller: str, proc_cgroup: Path, cgroup_root: Path) -> Iterator[tuple[int, Path]]:
    """This process's groups that the controller may limit, as (cgroup version, folder), ancestors included."""
    try:
        lines = proc_cgroup.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        hierarchy, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if hierarchy == "0" and not controllers:
            version, mounts = 2, (cgroup_root, cgroup_root / "unified")
        elif controller in controllers.split(","):
            version, mounts = 1, (cgroup_root / controller, cgroup_root / controllers)
        else:
            continue
        for mount in dict.fromkeys(mounts):
            for folder in _ancestors(mount, group):
                yield version, folder


def cgroup_cpu_quota(
    proc_cgroup: Path = Path("/proc/self/cgroup"), cgroup_root: Path = Path("/sys/fs/cgroup")
) -> float | None:
    """CPUs that the tightest cgroup quota allows (v1 and v2, ancestors included), or None without a quota.

    Source of the formats: the kernel's Documentation/admin-guide/cgroup-v2.rst (``cpu.max``) and
    Documentation/scheduler/sched-bwc.rst (``cpu.cfs_quota_us``, ``cpu.cfs_period_us``).
    """
    quotas = []
    for version, folder in _groups("cpu", proc_cgroup, cgroup_root):
        if version == 2:
            words = _read_words(folder / "cpu.max")
        else:
            words = _read_words(folder / "cpu.cfs_quota_us") + _read_words(folder / "cpu.cfs_period_us")
        if len(words) == 2 and words[0] not in ("max", "-1"):
            quotas.append(int(words[0]) / int(words[1]))
    return min(quotas) if quotas else None


def usable_threads(affinity: int, quota: float | None) -> int:
    """Threads for the engine, at least 1: the affinity mask, cut by a quota rounded down.

    Rounded down because threads beyond the quota are throttled together with all others, in the middle of a token.
    """
    if quota is None:
        return max(1, affinity)
    return max(1, min(affinity, int(quota)))


def threads_here() -> int:
    """``usable_threads`` for this process as it runs now."""
    return usable_threads(len(os.sched_getaffinity(0)), cgroup_cpu_quota())


def threads_for(weights_bytes: int) -> int:
    """Threads for a model: ``threads_here``, but one where a token takes no longer than it takes to wake another CPU.

    llama.cpp begins its threads anew for each token. Tokens/s measured on two virtual CPUs, with one thread
    and with two: 3 MB of weights 3,000 and 130, 27 MB 180 to 250 and 70 to 160, 77 MB 70 and 126, 282 MB 14 and 25.
    """
    return 1 if weights_bytes < _SMALL_WEIGHTS_BYTES else threads_here()


def cgroup_memory_available_bytes(
    proc_cgroup: Path = Path("/proc/self/cgroup"), cgroup_root: Path = Path("/sys/fs/cgroup")
) -> int | None:
    """Bytes that the tightest memory limit (v1 and v2, ancestors included) leaves, or None without a limit.

    Page cache that the group holds can be given back, so it does not count as used.
    """
    left = []
    for version, folder in _groups("memory", proc_cgroup, cgroup_root):
        names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        limit, used = (_read_words(folder / name) for name in names)
        # v1 writes "no limit" as a number just below 2**63
        if limit and used and limit[0] != "max" and int(limit[0]) < 1 << 60:
            stat = _read_words(folder / "memory.stat")
            files = dict(zip(stat[::2], stat[1::2], strict=False))
            cache = int(files.get("total_inactive_file", files.get("inactive_file", 0)))
            left.append(max(0, int(limit[0]) - int(used[0]) + cache))
    return min(left) if left else None


def memory_for_engine_bytes() -> int:
    """Bytes that an engine may take: MemAvailable, cut by the cgroup's limit, less what the rest of the host needs.

    The rest is 1 GB (proxy, metrics, containers that start after the engine), on small hosts a quarter.
    """
    words = _read_words(Path("/proc/meminfo"))
    machine = int(words[words.index("MemAvailable:") + 1]) * 1024
    group = cgroup_memory_available_bytes()
    available = machine if group is None else min(machine, group)
    return available - min(_REST_OF_HOST_BYTES, available // 4)
