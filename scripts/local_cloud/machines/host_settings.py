"""Owns what all clouds of one host change on it together: kernel settings, put back when the last of them has gone."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from scripts.local_cloud.machine_interface import MachineFailed
from scripts.local_cloud.machines.host import run
from scripts.local_cloud.machines.pool import is_mounted

NAMESPACES = Path("/run/netns")
_SHARED = Path("/run/mini-llm-local-cloud")  # gone after the host's next boot, as the settings are
_WANTED = {
    "net/ipv4/ip_forward": 1,
    # Each server holds half a dozen, each login to it three more, and all count as root's; the usual limit is 128.
    "fs/inotify/max_user_instances": 8192,
}


def claim(tag: str) -> None:
    """Makes the host fit for servers; the first cloud writes down how the host was, each that it is there."""
    with _locked():
        before = _SHARED / "before.json"
        if not before.exists():
            settings = {name: int(_setting(name).read_text()) for name in _WANTED if _setting(name).exists()}
            _write_whole(before, {"settings": settings, "namespaces_mounted": is_mounted(NAMESPACES)})
        (_SHARED / f"cloud-{tag}").touch()
        for name, wanted in _WANTED.items():
            if _setting(name).exists() and int(_setting(name).read_text()) < wanted:
                _setting(name).write_text(str(wanted))


def give_back(tag: str) -> None:
    """The last cloud puts the host back to how the first one found it; raises MachineFailed if that is not known."""
    with _locked():
        (_SHARED / f"cloud-{tag}").unlink(missing_ok=True)
        if any(_SHARED.glob("cloud-*")):
            return
        before = _SHARED / "before.json"
        if before.exists():
            try:
                found = json.loads(before.read_text())
                for name, value in found["settings"].items():
                    _setting(name).write_text(str(value))
            except (OSError, ValueError, KeyError) as error:
                raise MachineFailed(f"{before} does not tell the host's own settings any more: {error}") from error
            if not found["namespaces_mounted"] and is_mounted(NAMESPACES) and not any(NAMESPACES.iterdir()):
                run(["umount", NAMESPACES])
        for path in _SHARED.iterdir():
            path.unlink()
        _SHARED.rmdir()


def _setting(name: str) -> Path:
    return Path("/proc/sys") / name


def _write_whole(path: Path, content: dict[str, object]) -> None:
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(content))
    unfinished.rename(path)


@contextmanager
def _locked() -> Iterator[None]:
    lock = _SHARED / "lock"
    while True:
        _SHARED.mkdir(exist_ok=True)
        try:
            file = lock.open("w")
        except FileNotFoundError:
            continue  # the last cloud has just gone
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            # The last cloud takes the file away: who waited for it meanwhile holds a lock that nobody else sees.
            if lock.exists() and os.fstat(file.fileno()).st_ino == lock.stat().st_ino:
                yield
                return
