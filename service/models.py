"""Owns which model files there are, how they are fetched, and how a file is known to be whole."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self, TextIO

from service.errors import FetchFailed, FetchGaveUp, ModelRefused

CATALOGUE = Path(__file__).with_name("models.json")
STARTER_DIR = Path(__file__).with_name("starter")
STARTER_NAME = "starter"

SHA256 = re.compile(r"[0-9a-f]{64}")
CHUNK_BYTES = 64 * 1024
HASH_CHUNK_BYTES = 1024 * 1024
DISK_RESERVE_BYTES = 64 * 1024 * 1024  # left free beside a download, for logs and other writers
CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 30.0
MAX_BARREN_TRIES = 6  # in a row; each that brings a thousandth of the file starts the count again
MAX_PAUSE_S = 30.0
PROGRESS_INTERVAL_S = 5.0
# A change within the clock's granularity of the hashing leaves the same timestamps; 2 s is the coarsest of
# them (FAT). Git calls this problem "racily clean" (Documentation/technical/racy-git).
RACY_NS = 2_000_000_000


@dataclass(frozen=True)
class Entry:
    """A published model file of the catalogue, with at least one of its digests.

    ``ram_gb`` is the publisher's advice for a whole machine. ``unloadable`` says why the engine cannot load
    it.
    """

    name: str
    file: str
    url: str
    size_bytes: int
    ram_gb: float
    md5: str | None = None
    sha256: str | None = None
    unloadable: str | None = None


@dataclass(frozen=True)
class ModelFile:
    """Where a model file is, or will be once fetched; ``sha256`` is what it must be, if that is known."""

    path: Path
    sha256: str | None
    entry: Entry | None


@dataclass(frozen=True)
class Verified:
    """An open model file with the digest of its content; ``hashed`` is False if a stamp spared that."""

    file: BufferedReader
    sha256: str
    size_bytes: int
    hashed: bool


def load_catalogue(path: Path = CATALOGUE) -> dict[str, Entry]:
    """Return the entries of the catalogue by name; raises ValueError if one lacks a digest or HTTPS."""
    entries = [Entry(**item) for item in json.loads(path.read_text(encoding="utf-8"))]
    for entry in entries:
        if not entry.url.startswith("https://"):
            raise ValueError(f"{entry.name}: the address is not HTTPS")
        if entry.md5 is None and entry.sha256 is None:
            raise ValueError(f"{entry.name}: no digest")
        if os.sep in entry.file:
            raise ValueError(f"{entry.name}: the file name holds a folder")
    return {entry.name: entry for entry in entries}


def resolve(text: str, cache_dir: Path) -> ModelFile:
    """Return the file that ``text`` means: ``starter``, a name of the catalogue, or the path of a file.

    A name comes first: a file of the same name in the working folder is meant by ``./name``. A file of the
    catalogue need not be there yet, ``fetch`` brings it. Raises ModelRefused with the list of names for a
    text that is neither a name nor looks like a path, and for a model that this engine cannot load.
    """
    catalogue = load_catalogue()
    if text == STARTER_NAME:
        return _resolve_starter()
    if text in catalogue:
        entry = catalogue[text]
        if entry.unloadable is not None:
            raise ModelRefused(f"model {text} cannot be served: {entry.unloadable}")
        path = cache_dir / entry.file
        return ModelFile(path, entry.sha256 or _recorded_sha256(path), entry)
    path = Path(text).expanduser()
    if os.sep in text or path.suffix == ".gguf" or path.exists():
        return ModelFile(path, None, None)
    names = [STARTER_NAME, *(entry.name for entry in catalogue.values() if entry.unloadable is None)]
    raise ModelRefused(f"there is no model {text!r}; give the path of a GGUF file or one of: {', '.join(names)}")


def _resolve_starter() -> ModelFile:
    description = STARTER_DIR / "starter.json"
    try:
        starter = json.loads(description.read_text(encoding="utf-8"))
        return ModelFile(STARTER_DIR / starter["file"], starter["sha256"], None)
    except FileNotFoundError as error:
        raise ModelRefused("the starter model is not in this copy of the service") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelRefused(f"the description of the starter model cannot be read: {error}") from error


def _record_of(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _recorded_sha256(path: Path) -> str | None:
    """Return the digest recorded beside a file that was verified by a digest of another kind."""
    try:
        text = _record_of(path).read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return None
    found = SHA256.match(text)
    return found.group() if found else None


# Fetching


def fetch(entry: Entry, cache_dir: Path, show: TextIO, pause: Callable[[float], None] = time.sleep) -> Path:
    """Bring a file of the catalogue into ``cache_dir`` and return its path; does nothing if it is there
    already.

    What arrives is kept in ``<file>.part``, so that a later call goes on where this one was cut. The file
    gets its name only after its size and digest were verified and it is safely on the disk. One process
    fetches a file at a time, others wait. ``show`` gets a progress bar if it is a terminal, else a line
    every few seconds; ``pause`` waits between two tries. Raises FetchFailed if it could not be brought,
    ModelRefused if it is not the file that was published; KeyboardInterrupt passes through after a line
    that says how it goes on.
    """
    target = cache_dir / entry.file
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with _lock(cache_dir / f"{entry.file}.lock", entry, show):
            if not _is_whole(target, entry):
                _download(entry, target, show, pause)
    except OSError as error:
        raise FetchFailed(f"{entry.name} cannot be kept in {cache_dir}: {error.strerror or error}") from error
    return target


@contextlib.contextmanager
def _lock(path: Path, entry: Entry, show: TextIO) -> Iterator[None]:
    """Hold an exclusive lock; the kernel gives it up with the process, however that ends."""
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another process fetches {entry.name}; waiting for it", file=show, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _is_whole(target: Path, entry: Entry) -> bool:
    """Tell whether the file is there; one that was put there by hand is hashed once."""
    try:
        if target.stat().st_size != entry.size_bytes:
            return False
    except FileNotFoundError:
        return False
    if entry.sha256 is not None or _recorded_sha256(target) is not None:
        return True
    digests = _digest(target, entry)
    if digests["md5"] != entry.md5:
        return False
    _record_sha256(target, digests["sha256"])
    return True


def _download(entry: Entry, target: Path, show: TextIO, pause: Callable[[float], None]) -> None:
    part = _Part(target.with_name(target.name + ".part"))
    try:
        _check_disk(entry, part)
        _fill(entry, part, show, pause)
    except KeyboardInterrupt:
        message = f"stopped at {_gigabytes(part.size_bytes())} of {_gigabytes(entry.size_bytes)}"
        print(f"\n{message}; the next try goes on from there", file=show, flush=True)
        raise
    digests = _digest(part.path, entry)
    for kind in ("sha256", "md5"):
        published = getattr(entry, kind)
        if published is not None and digests[kind] != published:
            part.delete()
            raise ModelRefused(
                f"{entry.name} is not the published file: its {kind.upper()} is {digests[kind][:12]}..., "
                f"not {published[:12]}...; it was deleted"
            )
    part.sync()
    if entry.sha256 is None:
        _record_sha256(target, digests["sha256"])
    part.path.replace(target)
    _sync_folder(target.parent)
    part.forget_etag()
    print(f"{entry.name}: {_gigabytes(entry.size_bytes)}, verified, {target}", file=show, flush=True)


def _check_disk(entry: Entry, part: "_Part") -> None:
    missing = entry.size_bytes - part.size_bytes() + DISK_RESERVE_BYTES
    free = shutil.disk_usage(part.path.parent).free
    if free < missing:
        raise FetchFailed(
            f"{entry.name} needs {_gigabytes(missing)} more in {part.path.parent}, {_gigabytes(free)} is free"
        )


class _Part:
    """The file that a download grows in, and the ETag of the content it was begun with."""

    def __init__(self, path: Path):
        self.path = path
        self._etag_path = path.with_name(path.name + ".etag")

    def size_bytes(self) -> int:
        try:
            return self.path.stat().st_size
        except FileNotFoundError:
            return 0

    def etag(self) -> str | None:
        try:
            return self._etag_path.read_text(encoding="latin-1")
        except FileNotFoundError:
            return None

    def begin(self, etag: str | None) -> None:
        """Empty the part and note what it is going to hold a beginning of."""
        self.delete()
        # A weak ETag does not promise equal bytes, so it cannot vouch for a range (RFC 9110, 13.1.5).
        if etag is not None and not etag.startswith("W/"):
            self._etag_path.write_text(etag, encoding="latin-1")

    def delete(self) -> None:
        self.path.unlink(missing_ok=True)
        self.forget_etag()

    def forget_etag(self) -> None:
        self._etag_path.unlink(missing_ok=True)

    def sync(self) -> None:
        with self.path.open("rb") as file:
            os.fsync(file.fileno())


class _CutError(Exception):
    """One try ended early for a reason that may pass; ``wait_s`` is what the server asked for."""

    def __init__(self, why: str, wait_s: float = 0.0):
        super().__init__(why)
        self.wait_s = wait_s


def _fill(entry: Entry, part: _Part, show: TextIO, pause: Callable[[float], None]) -> None:
    """Ask the server for what is missing, again after each cut, until the part has its full size."""
    barren = 0
    with _Progress(entry, part.size_bytes(), show) as progress:
        while part.size_bytes() != entry.size_bytes:
            before = part.size_bytes()
            try:
                _receive(entry, part, progress)
            except _CutError as cut:
                gained = part.size_bytes() - before
                barren = 0 if gained * 1000 >= entry.size_bytes else barren + 1
                if barren >= MAX_BARREN_TRIES:
                    raise FetchGaveUp(
                        f"{entry.name} could not be fetched: {cut}; {_gigabytes(part.size_bytes())} of "
                        f"{_gigabytes(entry.size_bytes)} are kept and the next try goes on from there"
                    ) from cut
                wait_s = min(max(2.0**barren, cut.wait_s), MAX_PAUSE_S)
                progress.tell(f"{entry.name}: {cut}; trying again in {wait_s:.0f} s")
                pause(wait_s)


def _receive(entry: Entry, part: _Part, progress: "_Progress") -> None:
    """Make one request and append what it brings; raises _CutError if it ended early."""
    # Imported here because only a fetch needs it, and the web server's process never fetches.
    import requests
    import urllib3

    start = part.size_bytes()
    headers = {"Accept-Encoding": "identity"}
    etag = part.etag()
    if 0 < start < entry.size_bytes and etag is not None:
        headers |= {"Range": f"bytes={start}-", "If-Range": etag}
    try:
        with requests.get(
            entry.url, headers=headers, stream=True, timeout=(CONNECT_TIMEOUT_S, READ_TIMEOUT_S)
        ) as response:
            start = _begin_answer(entry, part, response, start)
            progress.at(start)
            with part.path.open("ab") as file:
                while chunk := response.raw.read(CHUNK_BYTES):
                    start += len(chunk)
                    if start > entry.size_bytes:
                        part.delete()
                        raise ModelRefused(f"{entry.name} is larger than the published file; it was deleted")
                    _append(file, chunk, entry, part)
                    progress.at(start)
    except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
        raise _CutError(f"the connection failed ({type(error).__name__})") from error
    if start < entry.size_bytes:
        raise _CutError("the connection ended early")


def _begin_answer(entry: Entry, part: _Part, response: Any, start: int) -> int:
    """Judge the head of an answer and return the offset at which its body begins."""
    hops = [hop.url for hop in [*response.history, response]]
    if entry.url.startswith("https://") and not all(hop.startswith("https://") for hop in hops):
        raise FetchFailed(f"{entry.name}: the server sends on to an address that is not HTTPS")
    if response.status_code == 206:
        if response.headers.get("Content-Range") == f"bytes {start}-{entry.size_bytes - 1}/{entry.size_bytes}":
            return start
        part.delete()
        raise _CutError("the server answered with another range than asked for")
    if response.status_code == 200:
        # The first try, a server that knows no ranges, or content that is not what the part was begun with.
        length = response.headers.get("Content-Length")
        if length is not None and length.isdecimal() and int(length) != entry.size_bytes:
            raise FetchFailed(
                f"{entry.name}: the server offers {length} bytes, the published file has {entry.size_bytes}"
            )
        part.begin(response.headers.get("ETag"))
        return 0
    if response.status_code == 416:
        part.delete()
        raise _CutError("the server does not have the range asked for")
    if response.status_code in (408, 429) or response.status_code >= 500:
        asked = response.headers.get("Retry-After", "")
        raise _CutError(f"the server answered {response.status_code}", float(asked) if asked.isdecimal() else 0.0)
    raise FetchFailed(f"{entry.name} could not be fetched: the server answered {response.status_code}")


def _append(file: BinaryIO, chunk: bytes, entry: Entry, part: _Part) -> None:
    try:
        file.write(chunk)
        file.flush()
    except OSError as error:
        why = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror
        raise FetchFailed(
            f"{entry.name} could not be written to {part.path.parent}: {why}; what has arrived is kept"
        ) from error


class _Progress:
    """Shows how far a download is: a bar on a terminal, lines elsewhere."""

    def __init__(self, entry: Entry, start: int, show: TextIO):
        self._entry = entry
        self._show = show
        self._bar: Any = None
        self._next_line_s = 0.0
        self._position = start

    def __enter__(self) -> Self:
        if self._show.isatty():
            # Imported here for the same reason as requests; gpt4all brings it.
            from tqdm import tqdm

            self._bar = tqdm(
                total=self._entry.size_bytes, initial=self._position, desc=self._entry.name,
                unit="B", unit_scale=True, file=self._show,
            )  # fmt: skip
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def at(self, position: int) -> None:
        """Take note of the bytes that are there now; fewer than before if the download began anew."""
        if self._bar is not None:
            self._bar.update(position - self._position)
        elif time.monotonic() >= self._next_line_s:
            self._next_line_s = time.monotonic() + PROGRESS_INTERVAL_S
            share = 100 * position // self._entry.size_bytes
            done = f"{_gigabytes(position)} of {_gigabytes(self._entry.size_bytes)}"
            print(f"{self._entry.name}: {done} ({share} %)", file=self._show, flush=True)
        self._position = position

    def tell(self, line: str) -> None:
        if self._bar is not None:
            self._bar.write(line, file=self._show)
        else:
            print(line, file=self._show, flush=True)


def _digest(path: Path, entry: Entry) -> dict[str, str]:
    """Return the SHA-256 of a file and, only if nothing better was published of it, its MD5, in one pass."""
    digests = {"sha256": hashlib.sha256()}
    if entry.sha256 is None:
        digests["md5"] = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(HASH_CHUNK_BYTES):
            for digest in digests.values():
                digest.update(chunk)
    return {kind: digest.hexdigest() for kind, digest in digests.items()}


def _record_sha256(target: Path, sha256: str) -> None:
    record = _record_of(target)
    fresh = record.with_name(record.name + ".new")
    fresh.write_text(f"{sha256}  {target.name}\n", encoding="ascii")  # as sha256sum writes and checks it
    fresh.replace(record)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _gigabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.2f} GB" if size_bytes >= 10_000_000 else f"{size_bytes / 1e6:.3f} MB"


# Verifying


def open_verified(path: Path, sha256: str | None, stamp_dir: Path) -> Verified:
    """Open a model file once and make sure that the content behind this very descriptor has the right
    SHA-256.

    With ``sha256`` None the digest is found out and returned. The engine must load
    ``/proc/self/fd/<fileno>`` of the returned file, never the path: whatever is put at the path afterwards
    is another file.

    A file is hashed the first time. A stamp in ``stamp_dir``, bound to device, inode, size, and the times
    of the last change of content and of attributes in nanoseconds, spares that later. It is not believed if
    one of these differs, if it or its folder belongs to somebody else or is writable by others; and none is
    written for a file that changed within the last two seconds, for a second change could leave the same
    times.

    This protects from a file that was replaced, damaged, cut, edited or restored with its old times
    (``touch`` cannot set the time of the last attribute change), and from a swap between check and load. It
    does not protect from root, from a clock set back between two changes, from writes to the block device
    below the file system, or from somebody who may write to the file and does it after the check: its owner
    should be its only writer.

    Raises ModelRefused if the file is missing, unreadable, no regular file, empty, changes while it is
    hashed, or has another digest.
    """
    if sha256 is not None and not SHA256.fullmatch(sha256.lower()):
        raise ModelRefused(f"the expected digest of {path} is not a SHA-256: {sha256[:70]!r}")
    file = _open_regular(path)
    try:
        before = os.fstat(file.fileno())
        if before.st_size == 0:
            raise ModelRefused(f"the model file {path} is empty")
        found = _read_stamp(stamp_dir, before)
        hashed = found is None
        if found is None:
            started_ns = time.time_ns()
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
            try:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as error:
                raise ModelRefused(f"the model file {path} cannot be read: {error.strerror}") from error
            if _identity(os.fstat(file.fileno())) != _identity(before):
                raise ModelRefused(f"the model file {path} changed while it was verified")
            if started_ns - before.st_ctime_ns >= RACY_NS:
                _write_stamp(stamp_dir, before, found)
        if sha256 is not None and found != sha256.lower():
            raise ModelRefused(
                f"the model file {path} is not the expected one: its SHA-256 is {found[:12]}..., "
                f"not {sha256.lower()[:12]}..."
            )
        file.seek(0)
    except BaseException:
        file.close()
        raise
    return Verified(file, found, before.st_size, hashed)


def _open_regular(path: Path) -> BufferedReader:
    try:
        # Non-blocking, because opening a FIFO would otherwise wait for a writer for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except FileNotFoundError as error:
        raise ModelRefused(f"there is no model file {path}") from error
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ModelRefused(f"the model file {path} cannot be opened: {why}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ModelRefused(f"the model file {path} is not a regular file")
    os.set_blocking(descriptor, True)
    return os.fdopen(descriptor, "rb")


def _identity(status: os.stat_result) -> dict[str, int]:
    return {
        "device": status.st_dev,
        "inode": status.st_ino,
        "size_bytes": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "ctime_ns": status.st_ctime_ns,
    }


def _stamp_name(status: os.stat_result) -> str:
    return f"{status.st_dev}-{status.st_ino}.json"


@contextlib.contextmanager
def _open_stamp_dir(stamp_dir: Path) -> Iterator[int]:
    """Open the folder of the stamps; raises PermissionError if others could have put something into it."""
    descriptor = os.open(stamp_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        _require_own(os.fstat(descriptor))
        yield descriptor
    finally:
        os.close(descriptor)


def _require_own(status: os.stat_result) -> None:
    if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError("it belongs to somebody else or is writable by others")


def _read_stamp(stamp_dir: Path, status: os.stat_result) -> str | None:
    """Return the digest that a believable stamp holds for exactly this file, or None."""
    try:
        with _open_stamp_dir(stamp_dir) as folder:
            descriptor = os.open(
                _stamp_name(status), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder
            )
        with os.fdopen(descriptor, "rb") as file:
            stamp_status = os.fstat(descriptor)
            _require_own(stamp_status)
            if not stat.S_ISREG(stamp_status.st_mode):
                return None
            stamp = json.loads(file.read(4096))
    except (OSError, ValueError, RecursionError):
        # No stamp, or none to believe: either way the file is hashed.
        return None
    if not isinstance(stamp, dict):
        return None
    sha256 = stamp.pop("sha256", None)
    if stamp != _identity(status) or not isinstance(sha256, str) or not SHA256.fullmatch(sha256):
        return None
    return sha256


def _write_stamp(stamp_dir: Path, status: os.stat_result, sha256: str) -> None:
    content = json.dumps(_identity(status) | {"sha256": sha256}).encode()
    name = _stamp_name(status)
    fresh = f"{name}.{os.getpid()}.new"
    try:
        stamp_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _open_stamp_dir(stamp_dir) as folder:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(fresh, dir_fd=folder)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            with os.fdopen(os.open(fresh, flags, 0o600, dir_fd=folder), "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(fresh, name, src_dir_fd=folder, dst_dir_fd=folder)
    except OSError:
        # A stamp only saves time; without a place for it the file is hashed at every start.
        return
