"""Owns what one node counts for the library ``limits``: counters that outlive the process, windows that need not.

Counters are kept in memory and written behind to one SQLite file, all of a moment in one transaction: a killed process
loses what was counted within the last 20 ms. A power cut may lose more (SQLite's write-ahead log is only synchronised
at its checkpoints). Moving windows lie in memory alone: they are over within a minute.
"""

import sqlite3
import threading
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from limits.storage import MovingWindowSupport, Storage

from service.errors import StateUnwritable

_LONGEST_WAIT_S = 2.0  # for a worker that takes over while the old one still counts
_PURGE_EVERY_S = 3600.0
_WRITE_EVERY_S = 0.02
_ADD = (
    "INSERT INTO counters VALUES (?, ?, ?) ON CONFLICT (name) DO UPDATE SET amount = amount + excluded.amount"
    " RETURNING amount"
)
_INHERITED = "inherited/"  # before a counter's name: what of it came from another node
_MOST_WINDOWS = 100_000  # addresses cost nothing, memory does; beyond it the one that longest took no entry goes


class NodeStorage(Storage, MovingWindowSupport):
    """Counters and windows; every method may be called from any thread, and raises StateUnwritable if the file fails.

    The library's own storage in memory keeps every key that it ever saw, and starts a thread at each request.
    """

    STORAGE_SCHEME = None

    def __init__(self, path: Path):
        super().__init__()
        self._path = path
        self._lock, self._database_lock = threading.Lock(), threading.Lock()
        self._purged_s = 0.0
        self._amounts: dict[str, int] = {}  # as the file last said, by counter
        self._changes: dict[str, tuple[int, float]] = {}  # not in the file yet: amount and expiry (epoch, seconds)
        self._failure: StateUnwritable | None = None
        self._flush_lock = threading.Lock()
        self._changed, self._closed = threading.Event(), False
        self._writer: threading.Thread | None = None
        self._windows_lock = threading.Lock()
        # Times of requests, by a clock that does not jump; in the order in which keys last took an entry.
        self._windows: dict[str, deque[float]] = {}
        try:
            self._database = sqlite3.connect(
                path, timeout=_LONGEST_WAIT_S, isolation_level=None, check_same_thread=False
            )
        except sqlite3.Error as error:
            raise StateUnwritable(f"the counters in {path} cannot be used: {error}") from error
        try:
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute("PRAGMA synchronous=NORMAL")
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS counters (name TEXT PRIMARY KEY, amount INTEGER NOT NULL, expires_s REAL"
                " NOT NULL) WITHOUT ROWID"
            )
            path.chmod(0o600)
        except (sqlite3.Error, OSError) as error:
            self._database.close()
            raise StateUnwritable(f"the counters in {path} cannot be used: {error}") from error

    @property
    def base_exceptions(self) -> type[Exception]:
        return StateUnwritable

    def incr(self, key: str, expiry: int, amount: int = 1) -> int:
        """Adds to a counter, which begins at 0 and is forgotten ``expiry`` seconds later; returns what it is now."""
        if self._failure is not None:
            self.flush()  # raises it again, unless it is over
        known = self._amount(key)
        with self._lock:
            changed, _ = self._changes.get(key, (0, 0.0))
            self._changes[key] = (changed + amount, time.time() + expiry)
            if self._writer is None:
                self._writer = threading.Thread(target=self._write_behind, name="counters", daemon=True)
                self._writer.start()
        if not self._changed.is_set():
            self._changed.set()
        return known + amount

    def inherit(self, amounts: Mapping[str, tuple[int, float]]) -> None:
        """Takes over what another node has counted so far: amount and expiry (seconds since the epoch) by counter.

        What was taken over before is known, so the same may be told again and again, with later amounts.
        """
        for name, (amount, expires_s) in amounts.items():
            taken, known = f"{_INHERITED}{name}", self._amount(name)
            more = amount - self._amount(taken)
            with self._lock:
                self._amounts.setdefault(name, known)
                for each in (name, taken) if more else ():  # together, so that they reach the file together
                    self._changes[each] = (self._changes.get(each, (0, 0.0))[0] + more, expires_s)
        self.flush()

    def get(self, key: str) -> int:
        return self._amount(key)

    def _amount(self, key: str) -> int:
        with self._lock:
            if key in self._amounts:
                return self._amounts[key] + self._changes.get(key, (0, 0.0))[0]
        rows = self._execute("SELECT amount FROM counters WHERE name = ?", key)
        with self._lock:
            self._amounts.setdefault(key, int(rows[0][0]) if rows else 0)
            return self._amounts[key] + self._changes.get(key, (0, 0.0))[0]

    def flush(self) -> None:
        """Returns once everything counted so far is in the file. Raises StateUnwritable."""
        with self._flush_lock:
            with self._lock:
                changes = dict(self._changes)
            try:
                amounts = self._write(changes)
            except StateUnwritable as error:
                self._failure = error
                raise
            with self._lock:
                self._failure = None
                for name, (amount, _) in changes.items():
                    self._amounts[name] = amounts[name]
                    left, expires_s = self._changes[name]
                    if left == amount:
                        del self._changes[name]
                    else:
                        self._changes[name] = (left - amount, expires_s)

    def _write(self, changes: dict[str, tuple[int, float]]) -> dict[str, int]:
        """Adds changes to the file, which another worker may write to as well; returns what the counters are then."""
        amounts, now_s = {}, time.time()
        try:
            with self._database_lock:
                self._database.execute("BEGIN IMMEDIATE")
                for name, (amount, expires_s) in changes.items():
                    row = self._database.execute(_ADD, (name, amount, expires_s)).fetchone()
                    amounts[name] = int(row[0])
                if now_s - self._purged_s > _PURGE_EVERY_S:
                    self._purged_s = now_s
                    self._database.execute("DELETE FROM counters WHERE expires_s < ?", (now_s,))
                    with self._lock:
                        self._amounts.clear()
                self._database.execute("COMMIT")
        except sqlite3.Error as error:
            with suppress(sqlite3.Error), self._database_lock:
                self._database.execute("ROLLBACK")
            raise StateUnwritable(f"the counters in {self._path} cannot be used: {error}") from error
        return amounts

    def _write_behind(self) -> None:
        while not self._closed:
            self._changed.wait()
            time.sleep(_WRITE_EVERY_S)
            self._changed.clear()
            try:
                self.flush()
            except StateUnwritable:
                pass  # kept in _failure for whoever counts next, and tried again then

    def get_expiry(self, key: str) -> float:
        self.flush()
        rows = self._execute("SELECT expires_s FROM counters WHERE name = ?", key)
        return float(rows[0][0]) if rows else time.time()

    def acquire_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        """Takes entries in a key's window of the last ``expiry`` seconds; tells whether there was room for them."""
        now_s = time.monotonic()
        with self._windows_lock:
            window = self._window(key, now_s - expiry)
            if window:
                self._windows[key] = window
            if len(window) + amount > limit:
                return False
            window.extend([now_s] * amount)
            self._windows[key] = window
            for oldest in list(islice(self._windows, 2)):
                # Two looks at each new entry: what is over goes at least as fast as new keys come.
                over = self._windows[oldest][-1] < now_s - expiry
                if over or len(self._windows) > _MOST_WINDOWS:
                    del self._windows[oldest]
            return True

    def get_moving_window(self, key: str, limit: int, expiry: int) -> tuple[float, int]:
        """When the oldest entry of a key's window was taken (seconds since the epoch), and how many there are."""
        now_s = time.monotonic()
        epoch_s = time.time() - now_s
        with self._windows_lock:
            window = self._windows.get(key)
            if window is None or window[0] < now_s - expiry:
                window = self._window(key, now_s - expiry)
                if window:
                    self._windows[key] = window
            return (epoch_s + window[0], len(window)) if window else (epoch_s + now_s, 0)

    def _window(self, key: str, since_s: float) -> "deque[float]":
        """A key's window without what is over; taken out, so that whoever puts it back puts it last."""
        window = self._windows.pop(key, None) or deque()
        while window and window[0] < since_s:
            window.popleft()
        return window

    def check(self) -> bool:
        self._execute("SELECT 1")
        return True

    def reset(self) -> int | None:
        self.flush()
        with self._windows_lock:
            self._windows.clear()
        with self._lock:
            self._amounts.clear()
        return len(self._execute("DELETE FROM counters RETURNING name"))

    def clear(self, key: str) -> None:
        self.flush()
        with self._lock:
            self._amounts.pop(key, None)
        with self._windows_lock:
            self._windows.pop(key, None)
        self._execute("DELETE FROM counters WHERE name = ?", key)

    def close(self) -> None:
        """Writes what is left and closes the file; nothing may be counted afterwards."""
        try:
            if not self._closed:
                self.flush()
        finally:
            self._closed = True
            self._failure = StateUnwritable(f"the counters in {self._path} were closed")
            with self._database_lock:
                self._database.close()
            self._changed.set()

    def _execute(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        try:
            with self._database_lock:
                return self._database.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            raise StateUnwritable(f"the counters in {self._path} cannot be used: {error}") from error
