"""Owns the storage of disks and images: copy-on-write in a btrfs file that grows, or plain directories without it."""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from scripts.local_cloud.machine_interface import MachineFailed, PoolFull
from scripts.local_cloud.machines.host import HostUnfit, check_pool_tools, run, succeeds

GIB = 1024**3
_FIRST_SIZE = 4 * GIB
_STEP = 4 * GIB
_LOW = 2 * GIB  # a server can write a GiB before the watcher looks again
_HOST_RESERVE = 2 * GIB  # for the host's own work, and for the pools of others
_MOUNT_OPTIONS = "loop,noatime,nodiscard"  # a discarded block is a hole in the file
_MOUNTS = 2  # the place and, over it, the file
_COPY_TIMEOUT_S = 1800.0
_BUSY_TIMEOUT_S = 3.0


def grown_size(size: int, free: int, host_free: int) -> int | None:
    """The next size of a pool of ``size`` bytes, or None if it is large enough; raises PoolFull without room for it.

    All in bytes; ``free`` is what the pool's own file system has left, ``host_free`` what the host's has.
    """
    if free >= _LOW:
        return None
    step = min(_STEP, host_free - _HOST_RESERVE)
    if step < GIB // 4:
        raise PoolFull(
            f"the disk is full: {host_free / 1e9:.1f} GB are free beside the pool, of which {_HOST_RESERVE / 1e9:.1f} "
            "stay with the host; delete servers, snapshots or other files"
        )
    return size + step


class Pool:
    """Directories by name under ``state/pool``: ``base/…``, ``servers/…``, ``images/…``; copies cost nothing on btrfs.

    The file holds all of its blocks from the start and gives none back: a write that finds the host's disk full would
    end the file system for every server. Safe for use by several threads.
    """

    def __init__(self, state: Path, log: Callable[[str], None]) -> None:
        self.root = state / "pool"
        self._file = state / "pool.img"
        self._unfinished_file = state / "pool.unfinished"
        self._log = log
        self._growing = threading.Lock()
        self._copy_on_write = False

    def open(self) -> None:
        """Mounts the pool, made first if there is none; raises MachineFailed, or HostUnfit if a tool is missing."""
        self.root.mkdir(parents=True, exist_ok=True)
        self._copy_on_write = self._file.exists() or (not any(self.root.iterdir()) and self._make_file())
        if self._copy_on_write:
            check_pool_tools()
            if _mounts_at(self.root) != _MOUNTS:  # 0 or, if a kill came between the two, 1
                self.close()
                allocate(self._file, self._file.stat().st_size)  # a kill may have come while it grew
                self._mount(self._file)
            run(["btrfs", "filesystem", "resize", "max", self.root])  # a kill may have come between the two steps
        # A program that root of a server gave to everybody (setuid) must not be within reach of this host's users.
        self.root.chmod(0o700)
        for kind in ("base", "servers", "images"):
            (self.root / kind).mkdir(exist_ok=True)
        for path in self.root.glob("*/*.unfinished"):  # a kill came between
            self.delete(str(path.relative_to(self.root)))

    def close(self) -> None:
        """Unmounts the pool, its loop device with it; what it holds stays in its file. None mounted is no error."""
        give_up_s = time.monotonic() + _BUSY_TIMEOUT_S
        while is_mounted(self.root):
            try:
                run(["umount", self.root])
            except MachineFailed:  # the kernel takes a moment to forget containers that have just ended
                if time.monotonic() > give_up_s:
                    raise
                time.sleep(0.05)
        give_up_s = time.monotonic() + _BUSY_TIMEOUT_S
        # The kernel lets the device go when nobody looks at it any more, as udev does at the changes of each, and what
        # has a private copy of this host's mounts keeps it for as long as it runs.
        while self._file.exists() and self._loop_devices() and time.monotonic() < give_up_s:
            time.sleep(0.05)

    def erase(self) -> None:
        """Removes all disks and images; the pool must be closed. Where there is none, that is no error."""
        if is_mounted(self.root):
            raise MachineFailed(f"{self.root} is still in use")
        for path in (self._file, self._unfinished_file):
            path.unlink(missing_ok=True)
        if self.root.exists():
            run(["rm", "-rf", "--one-file-system", self.root], timeout_s=_COPY_TIMEOUT_S)

    def keep_only(self, kind: str, name: str) -> None:
        """Removes all of a kind but one."""
        for path in (self.root / kind).iterdir():
            if path.name != name:
                self.delete(f"{kind}/{path.name}")

    def path(self, name: str) -> Path:
        return self.root / name

    def exists(self, name: str) -> bool:
        return self.path(name).is_dir()

    def unpack(self, tar: Path, name: str) -> None:
        """Makes a directory from a tar, whole or not at all; raises MachineFailed, or PoolFull."""
        self.make_room()
        unfinished = f"{name}.unfinished"
        self.delete(unfinished)
        self._make_directory(unfinished)
        extract = ["tar", "--extract", "--numeric-owner", "--xattrs", "--xattrs-include=*", "--same-permissions"]
        run([*extract, "--file", tar, "--directory", self.path(unfinished)], timeout_s=_COPY_TIMEOUT_S)
        self.path(unfinished).rename(self.path(name))

    def copy(self, source: str, target: str) -> None:
        """Copies a directory, whole or not at all; raises MachineFailed, or PoolFull."""
        if not self.exists(source):
            raise MachineFailed(f"{self.path(source)} is not there")
        if self.exists(target):
            raise MachineFailed(f"{self.path(target)} is there already")
        self.make_room()
        if self._copy_on_write:
            run(["btrfs", "subvolume", "snapshot", self.path(source), self.path(target)])
            return
        unfinished = f"{target}.unfinished"
        self.delete(unfinished)
        run(["cp", "-a", "--reflink=auto", self.path(source), self.path(unfinished)], timeout_s=_COPY_TIMEOUT_S)
        self.path(unfinished).rename(self.path(target))

    def delete(self, name: str) -> None:
        """Removes a directory; one that is not there is no error."""
        path = self.path(name)
        if not path.is_dir():
            return
        if self._copy_on_write and succeeds(["btrfs", "subvolume", "delete", path]):
            return
        # A subvolume made inside (by Docker, by systemd) must go before the one that holds it; rm removes both.
        run(["rm", "-rf", path], timeout_s=_COPY_TIMEOUT_S)

    def held_gb(self, name: str) -> float:
        """What a directory holds, in GB, shared blocks included."""
        return int(run(["du", "-s", "-x", "--block-size=1", self.path(name)]).split()[0]) / 1e9

    def make_room(self) -> None:
        """Grows the pool if little is free in it; raises PoolFull without room for that, MachineFailed if it broke."""
        if not self._copy_on_write:
            if free_bytes(self.root) < _HOST_RESERVE:
                raise PoolFull(f"the disk is full: {free_bytes(self.root) / 1e9:.1f} GB are free at {self.root}")
            return
        with self._growing:
            if self.is_read_only():
                raise MachineFailed(
                    "the pool of disks can only be read since a write failed (the kernel's log says why); "
                    "stop the local cloud and start it again"
                )
            size = self._file.stat().st_size
            wanted = grown_size(size, free_bytes(self.root), free_bytes(self._file.parent))
            if wanted is None:
                return
            allocate(self._file, wanted)
            run(["losetup", "--set-capacity", self._loop_device()])
            run(["btrfs", "filesystem", "resize", "max", self.root])
            self._log(f"the pool grew to {wanted / 1e9:.1f} GB")

    def is_read_only(self) -> bool:
        """Tells whether nothing can be written any more, as after an error of the disk below."""
        return self.root.exists() and bool(os.statvfs(self.root).f_flag & os.ST_RDONLY)

    def _make_file(self) -> bool:
        try:
            check_pool_tools()
        except HostUnfit as error:
            self._log(f"disks are plain copies, slow and large: {error}")
            return False
        unfinished = self._unfinished_file
        unfinished.unlink(missing_ok=True)
        unfinished.touch(mode=0o600)  # it holds what only root of a server may read
        try:
            allocate(unfinished, min(_FIRST_SIZE, max(GIB, free_bytes(self._file.parent) - _HOST_RESERVE)))
            # Its content is on this one disk anyway: a second copy of the metadata would only double the writes.
            run(["mkfs.btrfs", "--quiet", "--nodiscard", "--metadata", "single", "--data", "single", unfinished])
            self._mount(unfinished)
            self.close()
        except MachineFailed as error:
            self.close()
            unfinished.unlink()
            if isinstance(error, PoolFull):
                raise
            self._log(f"disks are plain copies, slow and large: {error}")
            return False
        unfinished.rename(self._file)
        return True

    def _mount(self, file: Path) -> None:
        # Whatever gets mounts of its own while the pool is there (a container, ``ip netns exec``) takes the pool along
        # and would keep its loop device until its own end. An unmounting reaches it there if the place is shared, which
        # this host's / need not be; so the place is made a mount too.
        run(["mount", "--bind", "--make-private", self.root, self.root])
        run(["mount", "--make-shared", self.root])
        run(["mount", "-t", "btrfs", "-o", _MOUNT_OPTIONS, file, self.root])

    def _make_directory(self, name: str) -> None:
        if self._copy_on_write:
            run(["btrfs", "subvolume", "create", self.path(name)])
        else:
            self.path(name).mkdir()

    def _loop_devices(self) -> list[str]:
        return run(["losetup", "--associated", self._file, "--noheadings", "--output", "NAME"]).split()

    def _loop_device(self) -> str:
        devices = self._loop_devices()
        if not devices:
            raise MachineFailed(f"{self._file} has no loop device any more")
        return devices[0]


def allocate(path: Path, size: int) -> None:
    """Makes a file of ``size`` bytes that all have their place on the disk; raises PoolFull and leaves it as it was."""
    with path.open("ab") as file:
        before = os.fstat(file.fileno()).st_size
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            file.truncate(before)
            raise PoolFull(
                f"the disk is full: {path} cannot have {size / 1e9:.1f} GB ({error.strerror}); delete other files"
            ) from error


def free_bytes(path: Path) -> int:
    """What the file system of ``path`` has left for its user, in bytes."""
    usage = os.statvfs(path)
    return usage.f_bavail * usage.f_frsize


def is_mounted(path: Path) -> bool:
    """Tells whether a file system is mounted at exactly this directory."""
    return _mounts_at(path) > 0


def _mounts_at(path: Path) -> int:
    return mount_points(Path("/proc/self/mountinfo").read_text()).count(str(path.resolve()))


def mount_points(mountinfo: str) -> list[str]:
    """Where file systems are mounted, oldest first, from the text of ``/proc/self/mountinfo``."""
    fields = (line.split()[4] for line in mountinfo.splitlines())
    return [field.encode().decode("unicode_escape") for field in fields]
