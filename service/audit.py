"""Owns the writing of the audit log: lines chained by hashes, synced, rotated, and taken up again after a kill."""

import contextlib
import errno
import fcntl
import hashlib
import os
import socket
import stat
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from service.audit_lines import (
    HASH,
    LINE_BYTES,
    ZEROS,
    Line,
    belongs,
    first_seq,
    hash_bytes,
    lock,
    log_files,
    raw_lines,
    read_head,
    read_line,
    read_tail,
)
from service.errors import AuditUnwritable
from service.json_text import render_time, to_json

ROTATE_BYTES = 64 * 1024 * 1024
KEEP_FILES = 32
SYNC_INTERVAL_S = 1.0
REFUSALS_A_MINUTE = 120  # some 60 MB a day, whoever wants to fill the log
_CUT_CHARACTERS = 256  # of each fact, if a line would be too long


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
        if begin is not None and not HASH.fullmatch(begin):
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
        self._notes: deque[bytes] = deque(maxlen=1000)
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
        self._write(_text(event, facts))

    def note(self, event: str, **facts: Any) -> bool:
        """Adds one line, now or, if that is not possible, before the next line that is; tells whether it was now.

        For what has happened and cannot be undone any more; the newest thousand such lines are kept.
        """
        try:
            self._write(_text(event, facts))
        except AuditUnwritable:
            self._notes.append(_text(event, {**facts, "happened": render_time(self._clock())}))
            return False
        return True

    def _write(self, text: bytes | None) -> None:
        with self._lock:
            if self._failure is not None:
                raise self._unwritable(self._failure) from self._failure
            self._start()
            try:
                lock(self._folder_descriptor)
                try:
                    if not self._is_as_left() and not self._take_up():
                        self._catch_up()
                    while self._notes:
                        self._append(self._notes[0])
                        self._notes.popleft()
                    if text is not None:
                        self._append(text)
                finally:
                    fcntl.flock(self._folder_descriptor, fcntl.LOCK_UN)
            except OSError as error:
                raise self._unwritable(error) from error

    def refuse(self, **facts: Any) -> None:
        """Adds a line ``refused``; beyond 120 a minute they are only counted, since anybody can cause them."""
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
            if self._notes:
                self._write(None)
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
            lock(self._folder_descriptor)
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

    def _take_up(self) -> bool:
        """Goes on behind the lines that another process has added since; tells whether there is nothing else to it."""
        if self._size < 0:
            return False  # what was written last is not known
        try:
            status = os.stat(self._path)  # noqa: PTH116 (as in _is_as_left)
        except FileNotFoundError:
            return False
        if status.st_ino != self._inode or status.st_size < self._size or not status.st_mode & stat.S_IWUSR:
            return False
        seq, digest, size = self._seq, self._hash, self._size
        for raw in raw_lines(Path(self._path), size, status.st_size):
            line = read_line(raw.data)
            if not isinstance(line, Line) or (line.seq, line.prev) != (seq + 1, digest):
                return False
            seq, digest, size = line.seq, line.hash, raw.offset + len(raw.data)
        if size != status.st_size:
            return False
        self._seq, self._hash, self._size = seq, digest, size
        return True

    def _catch_up(self) -> None:
        """Finds where the log stands, and tells in the log what has happened to it."""
        there, held = self._folder.stat(), os.fstat(self._folder_descriptor)
        if (there.st_ino, there.st_dev) != (held.st_ino, held.st_dev):
            raise FileNotFoundError(errno.ENOENT, "another folder has taken its place")
        known = max((self._seq, self._hash), read_head(self._folder) or (0, ZEROS), key=lambda link: link[0])
        files = [path for path in log_files(self._folder) if not known[0] or belongs(path, known[0])]
        if not files:
            self._seq, self._hash = known if known[0] else (0, self._begin)
            self._open_new()
            if known[0]:
                self._put(_text("lines-missing", {"first": 1, "last": known[0]}))
            else:
                self._put(_text("begin", {"node": self._node}))
            return
        path, status = files[-1], files[-1].stat()
        tail = read_tail(path, status.st_size, known)
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
            lost = {"lost_bytes": self._size - tail.torn_at, "lost_sha256": hash_bytes(path, tail.torn_at)}
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
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | flags, 0o600)
        if os.geteuid() == 0:  # keys are added by root too; the service must go on with what root has begun
            owner = os.fstat(self._folder_descriptor)
            os.fchown(descriptor, owner.st_uid, owner.st_gid)
        return descriptor

    def _open_new(self) -> None:
        path = self._folder / f"audit-{self._seq + 1:012d}.jsonl"
        self._use(path, self._create(path, os.O_EXCL | os.O_APPEND))
        os.fsync(self._folder_descriptor)

    def _append(self, text: bytes) -> None:
        if self._size and self._size + len(text) > self._rotate_bytes:
            # On the disk before the next file is: so what is torn is always in the newest, and known to the head.
            os.fsync(self._descriptor)
            self._make_head(self._seq, self._hash).replace(self._folder / "head.json")
            os.fchmod(self._descriptor, 0o400)  # tells other processes, too
            self._size = -1  # should the next step fail, the log is looked at again
            self._open_new()
            self._drop = True
        self._put(text)

    def _put(self, text: bytes) -> None:
        """Writes one line with one call, or nothing."""
        now, previous = render_time(self._clock()), self._hash.encode()
        body = b'{"seq":%d,"time":"%b",%b,"prev":"%b"' % (self._seq + 1, now.encode(), text, previous)
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
                if (read_head(self._folder) or (0, ZEROS))[0] < seq:
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
        files = log_files(self._folder)
        old, kept = files[: -self._keep_files], files[-self._keep_files :]
        if not old:
            self._drop = False
            return
        with self._held():
            if not self._is_as_left():
                self._catch_up()
            # Said before it is done: files that are gone without such a line were taken away.
            self._put(_text("dropped", {"last": (first_seq(kept[0]) or 1) - 1}))
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


def _text(event: str, facts: dict[str, Any]) -> bytes:
    """Event and facts as JSON without its braces."""
    facts = {name: value for name, value in facts.items() if value is not None}
    if not facts.keys().isdisjoint(("seq", "time", "prev", "hash")):
        raise ValueError("seq, time, prev and hash are the chain's own")
    text = to_json({"event": event, **facts})[1:-1]
    if len(text) > LINE_BYTES - 512:
        cut = {name: str(value)[:_CUT_CHARACTERS] for name, value in facts.items()}
        text = to_json({"event": event, **cut})[1:-1]
        if len(text) > LINE_BYTES - 512:
            raise ValueError(f"{len(facts)} facts are too many for one line")
    return text
