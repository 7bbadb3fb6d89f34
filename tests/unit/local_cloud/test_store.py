"""What the state on disk keeps."""

import sqlite3
import threading
from pathlib import Path
from typing import Any, cast

import pytest

from scripts.local_cloud.store import Store, StoreUnusable


def fill_disk(store: Store) -> None:
    """Leaves a store no room to grow, as a full disk does."""
    pages = store._connection.execute("PRAGMA page_count").fetchone()[0]
    store._connection.execute(f"PRAGMA max_page_count = {pages}")


def empty_disk(store: Store) -> None:
    """Gives it room again."""
    store._connection.execute("PRAGMA max_page_count = 1000000")


def test_documents_are_found_again_by_another_process(tmp_path: Path) -> None:
    """What was written is there without the first store having been closed, as after a SIGKILL."""
    first = Store(tmp_path / "state")
    first.put("server", {"id": 7, "name": "a"})
    second = Store(tmp_path / "state")
    assert second.find("server", 7) == {"id": 7, "name": "a"}
    assert second.find("image", 7) is None
    first.close()
    second.close()


def test_the_latest_are_told_by_id(tmp_path: Path) -> None:
    """The newest of a kind, oldest of them first; others do not count."""
    store = Store(tmp_path / "state")
    for number in (3, 1, 2):
        store.put("action", {"id": number})
    store.put("image", {"id": 9})
    assert [each["id"] for each in store.read_latest("action", 2)] == [2, 3]
    assert [each["id"] for each in store.read_latest("action", 5)] == [1, 2, 3]
    store.close()


def test_ids_rise_and_never_come_again(tmp_path: Path) -> None:
    """Neither deleting nor a restart brings an id back."""
    store = Store(tmp_path / "state")
    first = store.next_id()
    store.put("server", {"id": first})
    store.delete("server", first)
    store.close()
    store = Store(tmp_path / "state")
    assert store.next_id() == first + 1
    store.close()


def test_a_transaction_is_kept_whole_or_not_at_all(tmp_path: Path) -> None:
    """An exception undoes all writes of the outermost block."""
    store = Store(tmp_path / "state")

    def write() -> None:
        with store.transaction():
            store.put("server", {"id": 1})
            with store.transaction():
                store.put("server", {"id": 2})
            raise KeyError

    with pytest.raises(KeyError):
        write()
    assert store.read_all("server") == []
    store.close()


def test_transactions_of_threads_do_not_mix(tmp_path: Path) -> None:
    """Reading and writing back inside one block loses nothing."""
    store = Store(tmp_path / "state")
    store.put("counter", {"id": 1, "value": 0})

    def count() -> None:
        for _ in range(50):
            with store.transaction():
                value = (store.find("counter", 1) or {})["value"]
                store.change("counter", 1, value=value + 1)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.find("counter", 1) == {"id": 1, "value": 200}
    store.close()


def test_a_file_that_is_no_state_is_refused(tmp_path: Path) -> None:
    """The error says which file."""
    (tmp_path / "state").write_text("something else " * 100)
    with pytest.raises(StoreUnusable, match="state"):
        Store(tmp_path / "state")


def test_only_the_owner_can_read_the_file(tmp_path: Path) -> None:
    """Passwords stand in it."""
    Store(tmp_path / "state").close()
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o600


def test_a_full_disk_costs_a_transaction_and_nothing_later(tmp_path: Path) -> None:
    """What does not fit is refused whole; what was there can be read, and written again once there is room."""
    store = Store(tmp_path / "state")
    store.put("server", {"id": 1, "name": "before"})
    fill_disk(store)

    def write() -> None:
        with store.transaction():
            store.change("server", 1, name="during")
            store.put("server", {"id": 2, "user_data": "x" * 100_000})

    with pytest.raises(sqlite3.OperationalError, match="full"):
        write()
    assert store.read_all("server") == [{"id": 1, "name": "before"}]
    empty_disk(store)
    store.put("server", {"id": 2, "user_data": "x" * 100_000})
    assert [each["id"] for each in store.read_all("server")] == [1, 2]
    store.close()


def test_a_transaction_that_cannot_be_committed_is_undone(tmp_path: Path) -> None:
    """As when the log's file meets a full disk at the very end; the next transaction begins as usual."""
    store = Store(tmp_path / "state")
    connection = store._connection

    class Refusing:
        def __getattr__(self, name: str) -> Any:
            return getattr(connection, name)

        def execute(self, statement: str, *values: Any) -> sqlite3.Cursor:
            if statement == "COMMIT":
                raise sqlite3.OperationalError("disk I/O error")
            return connection.execute(statement, *values)

    store._connection = cast(sqlite3.Connection, Refusing())
    with pytest.raises(sqlite3.OperationalError, match="disk I/O error"):
        store.put("server", {"id": 1})
    store._connection = connection
    assert store.read_all("server") == []
    store.put("server", {"id": 2})
    assert store.read_all("server") == [{"id": 2}]
    store.close()


def test_what_waits_for_a_transactions_end_is_called_once(tmp_path: Path) -> None:
    """After the outermost block, and only the half that came true; the next transaction begins with nothing."""
    store, seen = Store(tmp_path / "state"), []

    def wait(name: str) -> None:
        store.at_end(lambda: seen.append(f"{name} kept"), lambda: seen.append(f"{name} undone"))

    with store.transaction():
        with store.transaction():
            wait("inner")
        wait("outer")
        assert seen == []
    assert seen == ["inner kept", "outer kept"]

    def break_off() -> None:
        with store.transaction():
            wait("broken")
            raise KeyError

    with pytest.raises(KeyError):
        break_off()
    assert seen[2:] == ["broken undone"]
    store.put("server", {"id": 1})
    assert len(seen) == 3
    store.close()
