"""Owns the state on disk: JSON documents by kind and id in one SQLite file, and the counter that ids come from."""

import json
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Document = dict[str, Any]

# Below stand the ids of what every account is born with: locations, server types, system images.
_FIRST_ID = 100_001

_SCHEMA = """
CREATE TABLE IF NOT EXISTS documents (
    kind TEXT NOT NULL, id INTEGER NOT NULL, document TEXT NOT NULL, PRIMARY KEY (kind, id)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS counter (last_id INTEGER NOT NULL);
"""


class StoreUnusable(Exception):
    """The state file cannot be opened or is not one."""


class Store:
    """Documents that survive a SIGKILL; one lock for all, held by ``transaction`` from first read to last write."""

    def __init__(self, path: Path):
        """Opens or makes the file at ``path``, readable by its owner only; raises StoreUnusable."""
        self._lock = threading.RLock()
        self._depth = 0
        self._waiting: list[tuple[Callable[[], None], Callable[[], None]]] = []
        try:
            path.touch(mode=0o600, exist_ok=True)  # passwords of servers stand in it
            self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        except (OSError, sqlite3.Error) as error:
            raise StoreUnusable(f"{path}: {error}") from error
        try:
            # With a write-ahead log a killed process loses nothing that was committed, and needs no fsync for that.
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = NORMAL")
            self._connection.executescript(_SCHEMA)
            if self._connection.execute("SELECT count(*) FROM counter").fetchone()[0] == 0:
                self._connection.execute("INSERT INTO counter VALUES (?)", (_FIRST_ID - 1,))
        except sqlite3.Error as error:
            self._connection.close()
            raise StoreUnusable(f"{path}: {error}") from error

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Holds the lock alone: nobody else reads or writes meanwhile, and each write inside stands for itself."""
        with self._lock:
            yield

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Holds the lock; all writes inside are kept together, or none of them if an exception leaves the block.

        Raises sqlite3.Error if they cannot be written, as on a full disk.
        """
        with self._lock:
            if self._depth == 0:
                self._connection.execute("BEGIN IMMEDIATE")
            self._depth += 1
            try:
                yield
                if self._depth == 1:
                    self._connection.execute("COMMIT")
            except BaseException:
                if self._depth == 1:
                    if self._connection.in_transaction:  # SQLite itself ends some that fail
                        self._connection.execute("ROLLBACK")
                    self._end([undone for _, undone in reversed(self._waiting)])
                raise
            finally:
                self._depth -= 1
            if self._depth == 0:
                self._end([kept for kept, _ in self._waiting])

    def at_end(self, kept: Callable[[], None], undone: Callable[[], None]) -> None:
        """Inside a transaction: calls ``kept`` once all of it is on the disk, or ``undone`` if none of it will be.

        Whatever a refused request must not do belongs into ``kept``. Both are called with the lock held.
        """
        assert self._depth, "there is no transaction"
        self._waiting.append((kept, undone))

    def _end(self, calls: list[Callable[[], None]]) -> None:
        self._waiting.clear()
        for call in calls:
            call()

    def next_id(self) -> int:
        """A new id, never handed out before."""
        with self.transaction():
            query = "UPDATE counter SET last_id = last_id + 1 RETURNING last_id"
            last_id: int = self._connection.execute(query).fetchall()[0][0]
            return last_id

    def find(self, kind: str, document_id: int) -> Document | None:
        """The document, or None."""
        if not 0 <= document_id < 2**63:
            return None
        with self._lock:
            query = "SELECT document FROM documents WHERE kind = ? AND id = ?"
            row = self._connection.execute(query, (kind, document_id)).fetchone()
        return json.loads(row[0]) if row else None

    def read_all(self, kind: str) -> list[Document]:
        """Every document of a kind, by id."""
        with self._lock:
            query = "SELECT document FROM documents WHERE kind = ? ORDER BY id"
            rows = self._connection.execute(query, (kind,)).fetchall()
        return [json.loads(row[0]) for row in rows]

    def read_latest(self, kind: str, count: int) -> list[Document]:
        """The documents of a kind with the highest ids, by id."""
        with self._lock:
            query = "SELECT document FROM documents WHERE kind = ? ORDER BY id DESC LIMIT ?"
            rows = self._connection.execute(query, (kind, count)).fetchall()
        return [json.loads(row[0]) for row in reversed(rows)]

    def put(self, kind: str, document: Document) -> None:
        """Writes a document under its own ``id``."""
        with self.transaction():
            query = "INSERT OR REPLACE INTO documents VALUES (?, ?, ?)"
            self._connection.execute(query, (kind, document["id"], json.dumps(document)))

    def change(self, kind: str, document_id: int, **values: Any) -> Document | None:
        """Replaces fields of a document and returns it; None if there is no such document."""
        with self.transaction():
            document = self.find(kind, document_id)
            if document is not None:
                document.update(values)
                self.put(kind, document)
        return document

    def delete(self, kind: str, document_id: int) -> None:
        """Forgets a document; one that is not there is no error."""
        with self.transaction():
            self._connection.execute("DELETE FROM documents WHERE kind = ? AND id = ?", (kind, document_id))

    def close(self) -> None:
        """Closes the file; call it last."""
        with self._lock:
            self._connection.close()
