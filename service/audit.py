"""Owns the audit log: lines chained by their hashes, how they are kept, and how it is found where they were changed.

A line is a JSON object. Its last member ``hash`` is the SHA-256 of the bytes before that member, and ``prev`` is the
hash of the line before. ``head.json`` remembers the last line that is surely on the disk: what is missing up to it was
taken away, what is torn after it was lost with the power. Nobody can tell from a folder alone that all of it, with its
head, was made anew; ``last_link``, noted elsewhere and given to ``verify`` as ``after``, can.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import socket
import stat
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from service.errors import AuditUnwritable, ServiceError

ZEROS = "0" * 64  # what the first line of all goes on from
ROTATE_BYTES = 64 * 1024 * 1024
KEEP_FILES = 32
SYNC_INTERVAL_S = 1.0
LOCK_TIMEOUT_S = 2.0  # the lock is held for microseconds, unless its holder was stopped
REFUSALS_A_MINUTE = 600
LINE_BYTES = 64 * 1024
MAX_TOLD = 1000  # problems and notes of a report; more are counted
_CUT_CHARACTERS = 256  # of each fact, if a line would be too long
_TAIL_BYTES = 4 * 1024 * 1024  # more than is ever written between two syncs

_NAME = re.compile(r"audit-(\d{12})\.jsonl")
_HASH = re.compile(r"[0-9a-f]{64}")
# Read as they were written, byte by byte: there is no second way to write the same, and hostile JSON costs nothing.
_HEAD = re.compile(rb'\{"seq":([1-9]\d{0,11}),"hash":"([0-9a-f]{64})"\}\n')
_BODY = re.compile(
    rb'\{"seq":([1-9]\d{0,11}),"time":"[0-9TZ:.-]{24}",("event":"([^"]*)".*),"prev":"([0-9a-f]{64})"', re.DOTALL
)
_END = re.compile(rb',"hash":"([0-9a-f]{64})"\}\n')
_END_BYTES = 76
_MORE_THAN_A_LINE = re.compile(rb'.*,"prev":"[0-9a-f]{64}","hash":"[0-9a-f]{64}"\}.', re.DOTALL)
_TOLD_EVENTS = (b"begin", b"dropped", b"recovered", b"lines-missing", b"head-missing")

_encode = json.JSONEncoder(separators=(",", ":"), default=str).encode


# Reading


class _Raw(NamedTuple):
    """One line of a file as it stands there; ``data`` holds its first ``LINE_BYTES`` at most."""

    number: int
    offset: int
    data: bytes
    ended: bool
    nul: bool


class _Line(NamedTuple):
    """One line whose hash fits; ``facts`` is JSON without its braces."""

    seq: int
    event: bytes
    facts: bytes
    prev: str
    hash: str


def _log_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_file())


def _first_seq(path: Path) -> int | None:
    """The sequence number that a file's name promises for its first line."""
    name = _NAME.fullmatch(path.name)
    return int(name[1]) if name else None


def _read_head(folder: Path) -> tuple[int, str] | None:
    try:
        with (folder / "head.json").open("rb") as file:
            head = _HEAD.fullmatch(file.read(256))
    except FileNotFoundError:
        return None
    return (int(head[1]), head[2].decode()) if head else None


def _raw_lines(path: Path, start: int, end: int) -> Iterator[_Raw]:
    """The lines of one file between two offsets, in bounded memory."""
    with path.open("rb") as file:
        file.seek(start)
        number = 0
        while start < end and (data := file.readline(min(LINE_BYTES, end - start))):
            piece, size, nul = data, len(data), b"\0" in data
            while not piece.endswith(b"\n") and (piece := file.readline(min(LINE_BYTES, end - start - size))):
                size, nul = size + len(piece), nul or b"\0" in piece
            number += 1
            yield _Raw(number, start, data, (piece or data).endswith(b"\n"), nul)
            start += size


def _read_line(data: bytes) -> _Line | str:
    """The line, or what is wrong with it."""
    end = _END.fullmatch(data, max(0, len(data) - _END_BYTES))
    if end is not None and hashlib.sha256(data[:-_END_BYTES]).hexdigest().encode() == end[1]:
        body = _BODY.fullmatch(data, 0, len(data) - _END_BYTES)
        if body is not None:
            return _Line(int(body[1]), body[3], body[2], body[4].decode(), end[1].decode())
    try:
        json.loads(data)
    except (ValueError, RecursionError):
        return "is not JSON"
    return "is changed: its hash does not fit"


def _is_torn(raw: _Raw, seq: int) -> bool:
    """Whether this is what a power cut leaves of the line ``seq``: its first bytes, then nothing, or NULs."""
    start, first = raw.data.partition(b"\0")[0], b'{"seq":%d,"time":"' % seq
    return (
        (raw.nul or not raw.ended)
        and len(start) < LINE_BYTES
        and start[: len(first)] == first[: len(start)]
        and not _MORE_THAN_A_LINE.match(start)
    )


class _Tail(NamedTuple):
    """How a file ends: its last whole line, where a torn one begins, and whether the head's line is another one."""

    seq: int
    hash: str | None
    torn_at: int | None
    differs: bool


def _read_tail(path: Path, size: int, known: tuple[int, str]) -> _Tail:
    """Reads back as far as the line that is ``known``; sequence number 0 stands for none."""
    for start in (max(0, size - _TAIL_BYTES), 0):
        tail, oldest = _Tail((_first_seq(path) or 1) - 1, None, None, False), None
        for raw in islice(_raw_lines(path, start, size), 1 if start else 0, None):  # the first one may be half
            line = _read_line(raw.data)
            if isinstance(line, _Line):
                oldest = oldest or line.seq
                differs = tail.differs or (line.seq == known[0] and line.hash != known[1])
                tail = _Tail(line.seq, line.hash, None, differs)
            elif tail.torn_at is None and tail.seq >= known[0] and _is_torn(raw, tail.seq + 1):
                tail = tail._replace(torn_at=raw.offset)
                if known[0]:
                    break  # blocks may reach the disk out of order: whole lines after a hole are lost with it
        if oldest is not None and oldest <= known[0]:
            break
    return tail


def _hash_bytes(path: Path, start: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(start)
        while chunk := file.read(LINE_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _lock(descriptor: int) -> None:
    """Takes the lock between processes. Raises TimeoutError, because a stopped process must not stop the service."""
    deadline_s = 0.0
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            deadline_s = deadline_s or time.monotonic() + LOCK_TIMEOUT_S
            if time.monotonic() > deadline_s:
                raise TimeoutError(errno.ETIMEDOUT, "another process holds the log for too long") from None
            time.sleep(0.0005)


# Writing


class AuditLog:
    """The log of one node; any number of threads and processes may write to it. To be made after a fork, not before.

    ``begin`` is the hash that a new chain goes on from, such as another node's last; a chain that exists ignores it.
    """

    def __init__(
        self,
        folder: Path,
        *,
        begin: str | None = None,
        node: str | None = None,
        rotate_bytes: int = ROTATE_BYTES,
        keep_files: int = KEEP_FILES,
        clock: Callable[[], float] = time.time,
    ):
        if begin is not None and not _HASH.fullmatch(begin):
            raise ValueError("a chain begins from a hash: 64 hexadecimal digits in lower case")
        self._folder, self._begin, self._node = folder, begin or ZEROS, node or socket.gethostname()
        self._rotate_bytes, self._keep_files, self._clock = rotate_bytes, max(1, keep_files), clock
        self._lock, self._sync_lock, self._refusals_lock = threading.Lock(), threading.Lock(), threading.Lock()
        self._seq, self._hash = 0, ZEROS  # of the last line
        self._path, self._descriptor, self._inode, self._size = "", -1, 0, 0  # of the newest file
        self._synced_seq, self._drop = 0, True
        self._failure: OSError | None = None  # as long as it stands, nothing is written
        self._failed_for_good = False
        self._minute, self._refusals, self._refused_more = 0, 0, Counter[str]()
        self._stop, self._thread = threading.Event(), threading.Thread()
        self._folder_descriptor = -1
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            # The folder itself is the lock: there is no file that somebody could take for stale.
            self._folder_descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            with self._held():
                self._catch_up()
        except OSError as error:
            self._close_descriptors()
            raise self._unwritable(error) from error
        try:
            self.sync()
        except AuditUnwritable:
            self._close_descriptors()
            raise

    def start(self) -> None:
        """Starts the thread that syncs; the first line does so too."""
        with self._lock:
            self._start()

    def _start(self) -> None:
        if not self._thread.is_alive():
            self._thread = threading.Thread(target=self._keep_synced, name="audit-sync", daemon=True)
            self._thread.start()

    def write(self, event: str, **facts: Any) -> None:
        """Adds one line; a fact that is None is left out. Raises AuditUnwritable: then there is no such line."""
        text = _text(event, facts)
        with self._lock:
            if self._failure is not None:
                raise self._unwritable(self._failure) from self._failure
            self._start()
            try:
                _lock(self._folder_descriptor)
                try:
                    if not self._is_as_left():
                        self._catch_up()
                    self._append(text)
                finally:
                    fcntl.flock(self._folder_descriptor, fcntl.LOCK_UN)
            except OSError as error:
                raise self._unwritable(error) from error

    def refuse(self, **facts: Any) -> None:
        """Adds a line ``refused``; beyond 600 a minute they are only counted, since anybody can cause them."""
        with self._refusals_lock:
            self._tell_refused_more()
            self._refusals += 1
            if self._refusals > REFUSALS_A_MINUTE:
                kind = f"{facts.get('status')} {facts.get('reason')}"
                self._refused_more[kind if kind in self._refused_more or len(self._refused_more) < 64 else "other"] += 1
                return
        self.write("refused", **facts)

    def sync(self) -> None:
        """Returns once all lines so far are on the disk. Raises AuditUnwritable."""
        with self._sync_lock:
            try:
                self._sync()
                if self._drop:
                    self._drop_old_files()
            except OSError as error:
                raise self._unwritable(error) from error

    def close(self) -> None:
        """Syncs and ends; lines written later raise AuditUnwritable."""
        if self._descriptor < 0:
            return
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        try:
            with self._refusals_lock:
                self._tell_refused_more(closing=True)
            self.sync()
        finally:
            with self._lock:
                self._fail_for_good(OSError(errno.EBADF, "it was closed"))
                self._close_descriptors()

    def _close_descriptors(self) -> None:
        for descriptor in (self._descriptor, self._folder_descriptor):
            if descriptor >= 0:
                os.close(descriptor)
        self._descriptor = self._folder_descriptor = -1

    def _fail_for_good(self, error: OSError) -> OSError:
        self._failure, self._failed_for_good = error, True
        return error

    def _unwritable(self, error: OSError) -> AuditUnwritable:
        return AuditUnwritable(f"the audit log in {self._folder} cannot be written: {error.strerror or error}")

    @contextlib.contextmanager
    def _held(self) -> Iterator[None]:
        with self._lock:
            _lock(self._folder_descriptor)
            try:
                yield
            finally:
                fcntl.flock(self._folder_descriptor, fcntl.LOCK_UN)

    def _is_as_left(self) -> bool:
        """Whether the newest file is the one that this process knows: another may have written, or rotated."""
        try:
            now = os.stat(self._path)  # noqa: PTH116 (a Path costs twice the time)
        except FileNotFoundError:
            return False
        return now.st_size == self._size and now.st_ino == self._inode and bool(now.st_mode & stat.S_IWUSR)

    def _catch_up(self) -> None:
        """Finds where the log stands, and tells in the log what has happened to it."""
        there, held = self._folder.stat(), os.fstat(self._folder_descriptor)
        if (there.st_ino, there.st_dev) != (held.st_ino, held.st_dev):
            raise FileNotFoundError(errno.ENOENT, "another folder has taken its place")
        known = max((self._seq, self._hash), _read_head(self._folder) or (0, ZEROS), key=lambda link: link[0])
        # A file is begun when the head knows all lines before it; one with a later name is not of this log.
        files = [path for path in _log_files(self._folder) if not known[0] or (_first_seq(path) or 0) <= known[0] + 1]
        if not files:
            self._seq, self._hash = known if known[0] else (0, self._begin)
            self._open_new()
            if known[0]:
                self._put(_text("lines-missing", {"first": 1, "last": known[0]}))
            else:
                self._put(_text("begin", {"node": self._node}))
            return
        path, status = files[-1], files[-1].stat()
        tail = _read_tail(path, status.st_size, known)
        if tail.seq < known[0] or tail.differs:
            # Going on from what the head knows keeps the damage visible for ever, and a new file keeps its traces.
            self._seq, self._hash = max(tail.seq, known[0]), known[1]
            self._open_new()
            self._put(_text("lines-missing", {"first": min(tail.seq + 1, known[0]), "last": known[0]}))
            return
        self._seq = tail.seq
        self._hash = tail.hash or (known[1] if known[0] else self._begin)
        if not status.st_mode & stat.S_IWUSR:
            self._open_new()  # whoever rotated came no further
            return
        self._use(path, os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW))
        lost = {}
        if tail.torn_at is not None:
            lost = {"lost_bytes": self._size - tail.torn_at, "lost_sha256": _hash_bytes(path, tail.torn_at)}
            os.ftruncate(self._descriptor, tail.torn_at)
            self._size = tail.torn_at
        if self._seq == 0:
            self._put(_text("begin", {"node": self._node}))
        elif not known[0] and self._seq > 1:
            self._put(_text("head-missing", {}))
        if lost:
            self._put(_text("recovered", lost))

    def _use(self, path: Path, descriptor: int) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
        status = os.fstat(descriptor)
        self._path, self._descriptor, self._inode, self._size = str(path), descriptor, status.st_ino, status.st_size

    def _create(self, path: Path, flags: int) -> int:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | flags, 0o600)
        if os.geteuid() == 0:  # keys are added by root too; the service must go on with what root has begun
            owner = os.fstat(self._folder_descriptor)
            os.fchown(descriptor, owner.st_uid, owner.st_gid)
        return descriptor

    def _open_new(self) -> None:
        path = self._folder / f"audit-{self._seq + 1:012d}.jsonl"
        self._use(path, self._create(path, os.O_EXCL | os.O_APPEND))
        os.fsync(self._folder_descriptor)

    def _append(self, text: str) -> None:
        if self._size and self._size + len(text) > self._rotate_bytes:
            # On the disk before the next file is: so what is torn is always in the newest, and known to the head.
            os.fsync(self._descriptor)
            self._make_head(self._seq, self._hash).replace(self._folder / "head.json")
            os.fchmod(self._descriptor, 0o400)  # tells other processes, too
            self._size = -1  # should the next step fail, the log is looked at again
            self._open_new()
            self._drop = True
        self._put(text)

    def _put(self, text: str) -> None:
        """Writes one line with one call, or nothing."""
        now = datetime.fromtimestamp(self._clock(), UTC).isoformat(timespec="milliseconds")[:23]
        body = f'{{"seq":{self._seq + 1},"time":"{now}Z",{text},"prev":"{self._hash}"'.encode()
        digest = hashlib.sha256(body).hexdigest()
        line = b'%b,"hash":"%b"}\n' % (body, digest.encode())
        try:
            if os.write(self._descriptor, line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            size, self._size = self._size, -1
            os.ftruncate(self._descriptor, size)
            self._size = size
            raise
        self._size += len(line)
        self._seq, self._hash = self._seq + 1, digest

    def _keep_synced(self) -> None:
        while not self._stop.wait(SYNC_INTERVAL_S):
            try:
                with self._refusals_lock:
                    self._tell_refused_more()
                self.sync()
            except AuditUnwritable:
                pass  # whoever writes next is told

    def _sync(self) -> None:
        with self._lock:
            if self._failure is not None and self._failed_for_good:
                raise self._failure
            if self._synced_seq == self._seq and self._failure is None:
                return
            seq, digest = self._seq, self._hash
            descriptor = os.dup(self._descriptor)  # a rotation may close the other
        try:
            os.fsync(descriptor)
        except OSError as error:
            # The kernel forgets what it could not write and calls the next try a success.
            raise self._fail_for_good(
                OSError(error.errno, f"{error.strerror}; start again once the disk is sound")
            ) from error
        finally:
            os.close(descriptor)
        try:
            head = self._make_head(seq, digest)
            with self._held():
                # Another process may have synced later lines meanwhile.
                if (_read_head(self._folder) or (0, ZEROS))[0] < seq:
                    head.replace(self._folder / "head.json")
                else:
                    head.unlink()
        except OSError as error:
            self._failure = error
            raise
        self._failure, self._synced_seq = None, seq

    def _make_head(self, seq: int, digest: str) -> Path:
        path = self._folder / f"head-{os.getpid()}-{threading.get_ident()}.tmp"
        descriptor = self._create(path, os.O_TRUNC)
        try:
            os.write(descriptor, b'{"seq":%d,"hash":"%b"}\n' % (seq, digest.encode()))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        return path

    def _drop_old_files(self) -> None:
        for path in self._folder.glob("head-*.tmp"):
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime < time.time() - 60:  # of a process that was killed
                    path.unlink()
        files = _log_files(self._folder)
        old, kept = files[: -self._keep_files], files[-self._keep_files :]
        if not old:
            self._drop = False
            return
        with self._held():
            if not self._is_as_left():
                self._catch_up()
            # Said before it is done: files that are gone without such a line were taken away.
            self._put(_text("dropped", {"last": (_first_seq(kept[0]) or 1) - 1}))
        self._drop = False
        self._sync()
        for path in old:
            path.unlink(missing_ok=True)

    def _tell_refused_more(self, closing: bool = False) -> None:
        minute = int(self._clock() // 60)
        if minute == self._minute and not closing:
            return
        if self._refused_more:
            self.write("refused-more", counts=dict(self._refused_more))
            self._refused_more.clear()
        self._minute, self._refusals = minute, 0


def _text(event: str, facts: dict[str, Any]) -> str:
    """Event and facts as JSON without its braces."""
    facts = {name: value for name, value in facts.items() if value is not None}
    if not facts.keys().isdisjoint(("seq", "time", "prev", "hash")):
        raise ValueError("seq, time, prev and hash are the chain's own")
    text = _encode({"event": event, **facts})[1:-1]
    if len(text) > LINE_BYTES - 512:
        text = _encode({"event": event, **{name: str(value)[:_CUT_CHARACTERS] for name, value in facts.items()}})[1:-1]
        if len(text) > LINE_BYTES - 512:
            raise ValueError(f"{len(facts)} facts are too many for one line")
    return text


# Verifying


class Place(NamedTuple):
    """Where in the files something is; lines count from 1."""

    file: Path
    line: int


@dataclass(frozen=True)
class Problem:
    """One damage that no power cut explains, where it begins."""

    place: Place | None
    seq: int | None
    what: str


@dataclass(frozen=True)
class Torn:
    """A line that a power cut, or the end of its writer, has left unfinished; the next opening puts it right."""

    place: Place
    size_bytes: int


@dataclass(frozen=True)
class Chain:
    """The lines of one node; ``begins`` says what they go on from."""

    node: str | None
    begins: str
    files: int
    lines: int
    first_seq: int
    last_seq: int
    last_hash: str


@dataclass(frozen=True)
class Report:
    """What was found in all files given; ``untold`` counts the problems beyond the first thousand."""

    files: int
    lines: int
    chains: tuple[Chain, ...]
    problems: tuple[Problem, ...]
    torn: tuple[Torn, ...]
    notes: tuple[str, ...]
    untold: int

    @property
    def whole(self) -> bool:
        return not self.problems


class _Source(NamedTuple):
    """Files of one node in order, with the sizes they had when nobody wrote; a folder's come with its head."""

    path: Path
    files: list[tuple[Path, int]]
    head: tuple[int, str] | None
    folder: bool


class _Findings:
    """What the sources' lines have shown so far; ``wanted`` are hashes whose lines are to be found."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self.torn: list[Torn] = []
        self.notes: list[str] = []
        self.wanted: set[str] = set()
        self.found: dict[str, tuple[Place, int]] = {}
        self.untold = 0

    def problem(self, place: Place | None, seq: int | None, what: str) -> None:
        if len(self.problems) < MAX_TOLD:
            self.problems.append(Problem(place, seq, what))
        else:
            self.untold += 1


class _Follower:
    """Follows one source line by line and tells each damage once, however many lines do not fit because of it.

    A line with another number than expected decides nothing yet: the next line shows whether it stands in the wrong
    place itself, or lines before it are missing.
    """

    def __init__(self, source: _Source, findings: _Findings):
        self._findings = findings
        self._head = source.head or (0, ZEROS)
        self._expected = (_first_seq(source.files[0][0]) if source.files else None) or 0  # 0: any
        self._link: str | None = None  # the hash to go on from; None: unknown
        self._last = Place(source.files[0][0] if source.files else source.path, 0)
        self._stray: tuple[Place, _Line] | None = None
        self._damage: tuple[Place, str] | None = None
        self._damaged_lines = 0
        self._early: dict[int, str] = {}  # lines that stood before their place
        self._resume: tuple[int, str | None] | None = None  # where a block that stands too late is over
        self._gaps: list[tuple[int, int, Place]] = []
        self.begin: _Line | None = None
        self.lines, self.dropped = 0, 0

    @property
    def next_seq(self) -> int:
        return self._stray[1].seq + 1 if self._stray else max(1, self._expected) + self._damaged_lines

    @property
    def last(self) -> tuple[int, str]:
        return self._expected - 1, self._link or "unknown"

    def good(self, place: Place, line: _Line) -> None:
        self._expected = self._expected or max(1, line.seq - self._damaged_lines)
        if self._damage is not None:
            if line.seq >= self._expected:
                self._close_damage(line.seq - 1)
            else:
                self._close_damage(self._expected + self._damaged_lines - 1)
        stray, self._stray = self._stray, None
        if stray is None:
            self._take(place, line)
        elif self._fits(line):
            self._misplaced(*stray)
            self._accept(place, line)
        elif line.prev == stray[1].hash:
            self._jump(*stray)
            self._accept(place, line)
        elif self._expected < line.seq < stray[1].seq or stray[1].seq < self._expected == line.seq - 1:
            self._misplaced(*stray)
            self._jump(place, line)
        else:
            self._jump(*stray)
            self._take(place, line)

    def bad(self, place: Place, why: str) -> None:
        self._settle()
        self._damage = self._damage or (place, why)
        self._damaged_lines += 1

    def end(self) -> None:
        self._settle()
        while self._expected in self._early:
            self._expected, self._link = self._expected + 1, self._early.pop(self._expected)
        if self._damage is not None:
            self._close_damage(max(max(1, self._expected) + self._damaged_lines - 1, self._head[0]))
        elif self._head[0] >= max(1, self._expected):
            self._findings.problem(
                Place(self._last.file, self._last.line + 1),
                max(1, self._expected),
                f"the log is cut at its end: head.json knows of lines up to seq {self._head[0]}",
            )
        for first, last, place in self._gaps:
            what = f"line seq {first} is" if first == last else f"lines seq {first} to {last} are"
            self._findings.problem(place, first, f"{what} missing")

    def _fits(self, line: _Line) -> bool:
        while line.seq != self._expected and self._expected in self._early:
            self._expected, self._link = self._expected + 1, self._early.pop(self._expected)
        if self._resume == (line.seq, line.prev):
            self._expected, self._link, self._resume = line.seq, line.prev, None
        return line.seq == self._expected and self._link in (None, line.prev)

    def _take(self, place: Place, line: _Line) -> None:
        if self._fits(line):
            self._accept(place, line)
        elif line.seq == self._expected:
            what = "this line was written anew, with its hash: the next line goes on from another one"
            self._findings.problem(self._last, line.seq - 1, what)
            self._accept(place, line)
        else:
            self._stray = (place, line)

    def _accept(self, place: Place, line: _Line) -> None:
        if self.begin is None:
            self.begin = line
        self._see(place, line)
        self._expected, self._link, self._last = line.seq + 1, line.hash, place
        if line.facts.startswith(b'"event":"dropped"'):
            self.dropped = max(self.dropped, _number(_facts(line).get("last")))

    def _misplaced(self, place: Place, line: _Line) -> None:
        what = f"line seq {line.seq} stands in the wrong place: seq {self._expected} belongs here"
        self._findings.problem(place, line.seq, what)
        self._see(place, line)
        self._last = place
        if line.seq >= self._expected and len(self._early) < MAX_TOLD:
            self._early[line.seq] = line.hash

    def _jump(self, place: Place, line: _Line) -> None:
        """Goes on from a line with another number than expected."""
        if line.seq > self._expected:
            at_border = place.line == 1 and _first_seq(place.file) == line.seq and self._last.line > 0
            gap = Place(self._last.file, self._last.line + 1) if at_border else place
            if len(self._gaps) < MAX_TOLD:
                self._gaps.append((self._expected, line.seq - 1, gap))
            else:
                self._findings.untold += 1
        elif line.seq < self._expected:
            what = f"line seq {line.seq} and what follows stand in the wrong place: seq {self._expected} belongs here"
            self._findings.problem(place, line.seq, what)
            self._resume = (self._expected, self._link)
        self._accept(place, line)

    def _settle(self) -> None:
        stray, self._stray = self._stray, None
        if stray is not None and stray[1].seq > self._expected:
            self._jump(*stray)
        elif stray is not None:
            self._misplaced(*stray)

    def _close_damage(self, last: int) -> None:
        assert self._damage is not None
        (place, why), first = self._damage, max(1, self._expected)
        if last < first:
            self._findings.problem(place, None, f"a line that does not belong here {why}")
        elif last == first:
            self._findings.problem(place, first, f"line seq {first} {why}")
        else:
            self._findings.problem(place, first, f"line seq {first} {why}; up to seq {last} all are damaged or missing")
        if last >= first:
            self._expected, self._link = last + 1, None
        self._last = Place(place.file, place.line + self._damaged_lines - 1)
        self._damage, self._damaged_lines = None, 0

    def _see(self, place: Place, line: _Line) -> None:
        self.lines += 1
        if line.seq == self._head[0] and line.hash != self._head[1]:
            what = "head.json remembers another hash: it was changed, or the lines up to here were written anew"
            self._findings.problem(place, line.seq, what)
        if line.hash in self._findings.wanted:
            self._findings.found.setdefault(line.hash, (place, line.seq))
        if line.seq < self._expected:
            for number, (first, last, gap) in enumerate(self._gaps):
                if first <= line.seq <= last:
                    rest = [(first, line.seq - 1, gap), (line.seq + 1, last, gap)]
                    self._gaps[number : number + 1] = [one for one in rest if one[0] <= one[1]]
                    break
        if line.event in _TOLD_EVENTS and len(self._findings.notes) < MAX_TOLD:
            facts = json.dumps(line.facts.decode("utf-8", "replace"))[1:-1].replace('\\"', '"')  # no control characters
            self._findings.notes.append(f"{place.file}:{place.line} (seq {line.seq}): {facts}")


def _facts(line: _Line) -> dict[str, Any]:
    try:
        return dict(json.loads(b"{" + line.facts + b"}"))
    except (ValueError, TypeError, RecursionError):
        return {}


def _number(value: Any) -> int:
    return value if type(value) is int else 0


def _snapshot(folder: Path) -> _Source:
    """Which files there are, taken while nobody writes, so that no line is half there."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):  # its holder was stopped, so nobody writes
            _lock(descriptor)
        files = [(path, path.stat().st_size) for path in _log_files(folder)]
        return _Source(folder, files, _read_head(folder), True)
    finally:
        os.close(descriptor)  # and the lock with it


def _sources(paths: Iterable[Path], findings: _Findings) -> list[_Source]:
    """Folders, and files by the folder they lie in, since several files of one node follow each other."""
    folders: dict[Path, _Source] = {}
    loose: dict[Path, dict[Path, int]] = {}
    for path in paths:
        try:
            if path.is_dir():
                folders[path.resolve()] = source = _snapshot(path)
                if not source.files:
                    findings.problem(Place(path, 0), None, "this folder holds no audit log")
            elif path.is_file():
                size = path.stat().st_size
                loose.setdefault((path.parent if _NAME.fullmatch(path.name) else path).resolve(), {})[path] = size
                if not size:
                    findings.problem(Place(path, 0), None, "this file is empty")
            else:
                findings.problem(Place(path, 0), None, "this is neither a file nor a folder")
        except OSError as error:
            findings.problem(Place(path, 0), None, f"this cannot be read: {error.strerror}")
    files = [
        _Source(key, sorted(of_folder.items(), key=lambda file: file[0].name), None, False)
        for key, of_folder in loose.items()
        if key not in folders and key.parent not in folders
    ]
    return [*folders.values(), *files]


def _follow(source: _Source, findings: _Findings) -> _Follower:
    follower = _Follower(source, findings)
    for path, size in source.files:
        torn: tuple[Place, int] | None = None
        try:
            for raw in _raw_lines(path, 0, size):
                place, line = Place(path, raw.number), _read_line(raw.data)
                if torn is not None:  # not the last one, and no head to say that it is a power cut's
                    follower.bad(torn[0], "is damaged")
                    torn = None
                if isinstance(line, _Line):
                    follower.good(place, line)
                elif (
                    path == source.files[-1][0]
                    and follower.next_seq > (source.head or (0, ""))[0]
                    and _is_torn(raw, follower.next_seq)
                ):
                    torn = (place, size - raw.offset)
                    if source.head:
                        break  # as the opening does
                else:
                    follower.bad(place, line)
        except OSError as error:
            findings.problem(Place(path, 0), None, f"this cannot be read: {error.strerror}")
        if torn is not None:
            findings.torn.append(Torn(*torn))
    follower.end()
    return follower


def verify(paths: Iterable[Path], after: str | None = None) -> Report:
    """Follows all chains in files and folders, of one node or several, in any order; nothing in them makes it raise.

    ``after`` is a hash that was noted elsewhere, and that the log must go on from or hold.
    """
    findings = _Findings()
    sources = _sources([Path(path) for path in paths], findings)
    for source in sources:
        with contextlib.suppress(OSError):  # told when it is followed
            for raw in islice(_raw_lines(*source.files[0][:1], 0, source.files[0][1]), 3) if source.files else ():
                line = _read_line(raw.data)
                findings.wanted |= {line.prev} if isinstance(line, _Line) else set()
    findings.wanted |= {after} if after else set()
    followers = []
    for source in sources:
        told = len(findings.problems)
        followers.append(follower := _follow(source, findings))
        if source.folder and not source.head and follower.lines > 1:
            what = "head.json is missing or was changed: whether the log is cut at its end cannot be told"
            findings.problem(Place(source.path / "head.json", 0), None, what)
        findings.problems[told:] = sorted(findings.problems[told:], key=lambda one: one.place or Place(source.path, 0))
    chains = []
    for source, follower in zip(sources, followers, strict=True):
        if follower.begin is not None:
            chains.append(_chain(source, follower, findings))
    if after and after not in findings.found and after not in {one.begin.prev for one in followers if one.begin}:
        findings.problem(None, None, f"no line has, or goes on from, the hash {after}: the log was written anew or cut")
    return Report(
        files=sum(len(source.files) for source in sources),
        lines=sum(follower.lines for follower in followers),
        chains=tuple(chains),
        problems=tuple(findings.problems),
        torn=tuple(findings.torn),
        notes=tuple(findings.notes),
        untold=findings.untold,
    )


def _chain(source: _Source, follower: _Follower, findings: _Findings) -> Chain:
    begin = follower.begin
    assert begin is not None
    first = _first_seq(source.files[0][0]) or begin.seq
    if begin.prev == ZEROS:
        begins = "zeros"
    elif begin.prev in findings.found:
        place, seq = findings.found[begin.prev]
        begins = f"after hash {begin.prev} of {place.file} line {place.line} (seq {seq})"
    else:
        begins = f"after hash {begin.prev}, which is in none of the given files"
        if source.folder and first > 1 and follower.dropped < first - 1:
            what = f"lines seq {follower.dropped + 1} to {first - 1} are missing"
            findings.problem(Place(source.files[0][0], 1), follower.dropped + 1, f"{what}; no line says: dropped")
    node = _facts(begin).get("node") if begin.event == b"begin" else None
    last_seq, last_hash = follower.last
    return Chain(
        node=node if isinstance(node, str) else None,
        begins=begins,
        files=len(source.files),
        lines=follower.lines,
        first_seq=begin.seq,
        last_seq=last_seq,
        last_hash=last_hash,
    )


def describe_report(report: Report) -> list[str]:
    """The report for the command line, one finding a line."""
    lines = [f"{report.lines} lines in {report.files} files"]
    for chain in report.chains:
        node = f" of {json.dumps(chain.node)}" if chain.node else ""
        seqs = f"seq {chain.first_seq} to {chain.last_seq}"
        lines.append(f"chain{node}: {chain.lines} lines in {chain.files} files, {seqs}")
        lines += [f"  begins {chain.begins}", f"  ends with hash {chain.last_hash}"]
    lines += [f"note: {note}" for note in report.notes]
    for torn in report.torn:
        where = f"{torn.place.file}:{torn.place.line}"
        lines.append(f"torn: {where}: {torn.size_bytes} bytes of an unfinished line, as a power cut leaves it")
    for problem in report.problems:
        where = f"{problem.place.file}:{problem.place.line}: " if problem.place else ""
        lines.append(f"problem: {where}{problem.what}")
    if report.untold:
        lines.append(f"problem: {report.untold} more")
    lines.append("whole" if report.whole else f"NOT whole: {len(report.problems) + report.untold} problems")
    return lines


def last_link(folder: Path) -> tuple[int, str]:
    """Sequence number and hash of the last line: to be noted elsewhere, or for another node to begin from."""
    try:
        source = _snapshot(folder)
        known = source.head or (0, ZEROS)
        if source.files:
            path, size = source.files[-1]
            tail = _read_tail(path, size, known)
            if tail.hash is not None and tail.seq >= known[0]:
                return tail.seq, tail.hash
    except OSError as error:
        raise ServiceError(f"the audit log in {folder} cannot be read: {error.strerror}") from error
    if not known[0]:
        raise ServiceError(f"{folder} holds no audit log")
    return known
