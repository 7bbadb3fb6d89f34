"""Owns the counters that outlive the process: a storage for the library ``limits`` in one SQLite file.

A counter is on its way to the disk before the request that it counts goes on, so a killed process loses none. A power
cut may lose those of the last moments (SQLite's write-ahead log is only synchronised at its checkpoints).
"""

import sqlite3
import threading
import time
from pathlib import Path
from typing import Any

from limits.storage import Storage

from service.errors import StateUnwritable

_LONGEST_WAIT_S = 2.0  # for a worker that takes over while the old one still counts
_PURGE_EVERY_S = 3600.0


class SqliteStorage(Storage):
    """Counters that expire; every method may be called from any thread, and raises StateUnwritable if that fails."""

    STORAGE_SCHEME = None

    def __init__(self, path: Path):
        super().__init__()
        self._path = path
        self._lock = threading.Lock()
        self._purged_s = 0.0
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

    def check(self) -> bool:
        self._execute("SELECT 1")
        return True

    def reset(self) -> int | None:
        return len(self._execute("DELETE FROM counters RETURNING name"))

    def clear(self, key: str) -> None:
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
