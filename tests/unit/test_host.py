"""Threads and memory from made-up /proc and cgroup trees."""

from pathlib import Path

import pytest

from service.engine.host import (
    cgroup_cpu_quota,
    cgroup_memory_available_bytes,
    memory_for_engine_bytes,
    threads_for,
    threads_here,
    usable_threads,
)


def tree(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def quota(tmp_path: Path, cgroup: str, files: dict[str, str]) -> float | None:
    tree(tmp_path, {"proc": cgroup, **files})
    return cgroup_cpu_quota(tmp_path / "proc", tmp_path / "fs")


def test_v2_quota_of_an_ancestor_holds(tmp_path: Path) -> None:
    """cgroup v2: the tightest cpu.max from the group up to the root."""
    files = {"fs/a/b/cpu.max": "max 100000", "fs/a/cpu.max": "150000 100000", "fs/cpu.max": "800000 100000"}
    assert quota(tmp_path, "0::/a/b\n", files) == 1.5


def test_v1_quota(tmp_path: Path) -> None:
    """cgroup v1: quota over period, with controllers mounted together."""
    files = {"fs/cpu,cpuacct/x/cpu.cfs_quota_us": "250000", "fs/cpu,cpuacct/x/cpu.cfs_period_us": "100000"}
    assert quota(tmp_path, "4:cpu,cpuacct:/x\n1:name=systemd:/\n", files) == 2.5


def test_v1_without_a_quota(tmp_path: Path) -> None:
    """cgroup v1 writes -1 for no quota."""
    files = {"fs/cpu/cpu.cfs_quota_us": "-1", "fs/cpu/cpu.cfs_period_us": "100000"}
    assert quota(tmp_path, "4:cpu:/\n", files) is None


def test_container_sees_its_quota_at_the_mount(tmp_path: Path) -> None:
    """In a container the named path does not exist below the mount; the mount is the group."""
    assert quota(tmp_path, "0::/docker/abc\n", {"fs/cpu.max": "50000 100000"}) == 0.5


def test_without_cgroups(tmp_path: Path) -> None:
    """No /proc file, no quota."""
    assert cgroup_cpu_quota(tmp_path / "none", tmp_path) is None


@pytest.mark.parametrize(
    ("affinity", "limit", "threads"), [(8, None, 8), (8, 2.0, 2), (8, 2.9, 2), (8, 0.5, 1), (2, 6.0, 2), (0, None, 1)]
)
def test_threads(affinity: int, limit: float | None, threads: int) -> None:
    """The affinity mask, cut by the quota rounded down, at least one."""
    assert usable_threads(affinity, limit) == threads


def test_memory_limits(tmp_path: Path) -> None:
    """The tightest limit less what is used, with page cache that can be given back counted as free."""
    files = {
        "fs/a/memory.max": "1000",
        "fs/a/memory.current": "700",
        "fs/a/memory.stat": "anon 300\ninactive_file 400\n",
        "fs/memory.max": "max",
        "fs/memory.current": "5",
    }
    tree(tmp_path, {"proc": "0::/a\n", **files})
    assert cgroup_memory_available_bytes(tmp_path / "proc", tmp_path / "fs") == 700


def test_memory_v1_no_limit(tmp_path: Path) -> None:
    """cgroup v1 writes a huge number for no limit."""
    files = {"fs/memory/memory.limit_in_bytes": "9223372036854771712", "fs/memory/memory.usage_in_bytes": "5"}
    tree(tmp_path, {"proc": "4:memory:/\n", **files})
    assert cgroup_memory_available_bytes(tmp_path / "proc", tmp_path / "fs") is None


def test_a_tiny_model_has_one_thread() -> None:
    """What a token takes of it is less than another thread's beginning; every other model has all that there are."""
    assert threads_for(3_000_000) == 1
    assert threads_for(77_000_000) == threads_here()


def test_here() -> None:
    """On this host both answers are positive."""
    assert threads_here() >= 1
    assert memory_for_engine_bytes() > 0
