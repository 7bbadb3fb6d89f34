"""Owns what one node counts for the library ``limits``: counters that outlive the process, windows that need not.

Counters lie in one SQLite file. A counter is on its way to the disk before the request that it counts goes on, so a
killed process loses none. A power cut may lose those of the last moments (SQLite's write-ahead log is only synchronised
at its checkpoints). Moving windows lie in memory: they are over within a minute.
"""

import sqlite3
import threading
import time
from collections import deque
from itertools import islice
from pathlib import Path
from typing import Any

from limits.storage import MovingWindowSupport, Storage

from service.errors import StateUnwritable

_LONGEST_WAIT_S = 2.0  # for a worker that takes over while the old one still counts
_PURGE_EVERY_S = 3600.0
_MOST_WINDOWS = 100_000  # addresses cost nothing, memory does; beyond it the window that was longest not asked for goes


class NodeStorage(Storage, MovingWindowSupport):
    """Counters and windows; every method may be called from any thread, and raises StateUnwritable if the file fails.

    The library's own storage in memory keeps every key that it ever saw, and starts a thread at each request.
    """

    STORAGE_SCHEME = None

    def __init__(self, path: Path):
        super().__init__()
        self._path = path
        self._lock = threading.Lock()
        self._purged_s = 0.0
        self._windows_lock = threading.Lock()
        self._windows: dict[str, deque[float]] = {}  # times of requests, in the order in which keys were last asked for
        try:
            self._database = sqlite3.connect(
                path, timeout=_LONGEST_WAIT_S, isolation_level=None, check_same_thread=False
            )
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute("PRAGMA synchronous=NORMAL")
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS counters (name TEXT PRIMARY KEY, amount INTEGER NOT NULL, expires_s REAL"
                " NOT NULL) WITHOUT ROWID"
            )
            path.chmod(0o600)
        except (sqlite3.Error, OSError) as error:
            raise StateUnwritable(f"the counters in {path} cannot be used: {error}") from error

    @property
    def base_exceptions(self) -> type[Exception]:
        return StateUnwritable

    def incr(self, key: str, expiry: int, amount: int = 1) -> int:
        """Adds to a counter, which begins at 0 and is forgotten ``expiry`` seconds later; returns what it is now."""
        now_s = time.time()
        if now_s - self._purged_s > _PURGE_EVERY_S:
            self._purged_s = now_s
            self._execute("DELETE FROM counters WHERE expires_s < ?", now_s)
        rows = self._execute(
            "INSERT INTO counters VALUES (?, ?, ?) ON CONFLICT (name) DO UPDATE SET amount = amount + excluded.amount"
            " RETURNING amount",
            key,
            amount,
            now_s + expiry,
        )
        return int(rows[0][0])

    def get(self, key: str) -> int:
        rows = self._execute("SELECT amount FROM counters WHERE name = ?", key)
        return int(rows[0][0]) if rows else 0

    def get_expiry(self, key: str) -> float:
        rows = self._execute("SELECT expires_s FROM counters WHERE name = ?", key)
        return float(rows[0][0]) if rows else time.time()

    def acquire_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        """Takes entries in a key's window of the last ``expiry`` seconds; tells whether there was room for them."""
        now_s = time.time()
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
        now_s = time.time()
        with self._windows_lock:
            window = self._window(key, now_s - expiry)
            if window:
                self._windows[key] = window
            return (window[0], len(window)) if window else (now_s, 0)

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
        with self._windows_lock:
            self._windows.clear()
        return len(self._execute("DELETE FROM counters RETURNING name"))

    def clear(self, key: str) -> None:
        with self._windows_lock:
            self._windows.pop(key, None)
        self._execute("DELETE FROM counters WHERE name = ?", key)

    def close(self) -> None:
        """Closes the file; nothing may be counted afterwards."""
        with self._lock:
            self._database.close()

    def _execute(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        try:
            with self._lock:
                return self._database.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            raise StateUnwritable(f"the counters in {self._path} cannot be used: {error}") from error
