"""Limits of keys and addresses: counted, reserved, given back, reset, and told truthfully."""

import sqlite3
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest
from limits.storage import MemoryStorage

from service.access import Caller
from service.counters import NodeStorage
from service.errors import FieldOutOfBounds, LimitReached, StateUnwritable
from service.keys import Limits
from service.limits import Limiter, render_headers

DAY_S = 86_400
NOON_S = 20_000 * DAY_S + DAY_S / 2


class Clock:
    def __init__(self) -> None:
        self.now_s = NOON_S

    def __call__(self) -> float:
        return self.now_s


def caller(name: str = "alice", address: str = "203.0.113.1", **limits: int) -> Caller:
    return Caller(name, address, frozenset({"generate"}), Limits(**limits))


def limiter(clock: Clock | None = None, ends_s: float = 7.0, **address_limits: int) -> Limiter:
    clock = clock or Clock()
    return Limiter(Limits(**address_limits), MemoryStorage(), lambda identity: ends_s, clock)


def take(limits: Limiter, who: Caller, tokens: int, used: int | None = None) -> None:
    lease = limits.enter(who)
    try:
        lease.reserve(tokens)
    finally:
        lease.release(0 if used is None else used)


def test_requests_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    """A moving window: refused with the time at which the oldest request leaves it, and taken again then."""
    now_s = [NOON_S]
    monkeypatch.setattr("time.time", lambda: now_s[0])
    limits = Limiter(Limits(), MemoryStorage(), clock=lambda: now_s[0])
    who = caller(requests_per_minute=2)
    limits.count_key(who)
    now_s[0] += 20
    limits.count_key(who)
    with pytest.raises(LimitReached) as caught:
        limits.count_key(who)
    assert caught.value.reason == "key_requests"
    assert caught.value.retry_after_s == pytest.approx(40, abs=0.01)
    now_s[0] += 40.1
    limits.count_key(who)
    with pytest.raises(LimitReached):
        limits.count_key(who)


def test_keys_and_addresses_are_counted_apart() -> None:
    """One key's requests are not another's; an address is counted whatever key comes from it."""
    limits = limiter(requests_per_minute=3)
    limits.count_key(caller("alice", requests_per_minute=1))
    limits.count_key(caller("bob", requests_per_minute=1))
    for _ in range(3):
        limits.count_address("203.0.113.1")
    with pytest.raises(LimitReached, match="address"):
        limits.count_address("203.0.113.1")
    limits.count_address("203.0.113.2")


def test_parallel_requests() -> None:
    """Places are taken and given back; a release counts once; the wait is what the scheduler predicts."""
    limits = limiter(ends_s=7.0)
    who = caller(parallel=2)
    first, second = limits.enter(who), limits.enter(who)
    with pytest.raises(LimitReached) as caught:
        limits.enter(who)
    assert (caught.value.reason, caught.value.retry_after_s) == ("key_parallel", 7.0)
    limits.enter(caller("bob", parallel=1)).release(0)
    first.release(0)
    first.release(0)
    third = limits.enter(who)
    with pytest.raises(LimitReached):
        limits.enter(who)
    second.release(0)
    third.release(0)


def test_parallel_requests_of_an_address() -> None:
    """Several keys from one address share its places; a refusal takes no place of the key."""
    limits = limiter(parallel=1)
    lease = limits.enter(caller("alice"))
    with pytest.raises(LimitReached, match="address"):
        limits.enter(caller("bob", parallel=1))
    lease.release(0)
    limits.enter(caller("bob", parallel=1)).release(0)


def test_tokens_are_reserved_and_settled() -> None:
    """What is reserved is gone at once; what was not generated comes back at the end."""
    limits = limiter()
    who = caller(tokens_per_day=100)
    lease = limits.enter(who)
    lease.reserve(60)
    assert limits.tokens_today("alice") == 60
    other = limits.enter(who)
    assert other.tokens_left() == 40
    with pytest.raises(LimitReached) as caught:
        other.reserve(50)
    assert caught.value.retry_after_s == 7.0  # the running request may give back enough
    other.release(0)
    lease.release(10)
    assert limits.tokens_today("alice") == 10
    take(limits, who, 90, used=90)
    with pytest.raises(LimitReached) as caught:
        take(limits, who, 1)
    assert caught.value.reason == "key_tokens"
    assert caught.value.retry_after_s == DAY_S / 2
    assert limits.tokens_today("alice") == 100


def test_midnight_resets_and_settles_the_day_of_the_reservation() -> None:
    """A request that runs over midnight is settled in the day in which it was reserved."""
    clock = Clock()
    limits = limiter(clock)
    who = caller(tokens_per_day=100)
    lease = limits.enter(who)
    lease.reserve(80)
    clock.now_s += DAY_S / 2
    take(limits, who, 100, used=100)
    lease.release(5)
    assert limits.tokens_today("alice") == 100
    clock.now_s -= 1
    assert limits.tokens_today("alice") == 5


def test_more_than_a_whole_day_is_out_of_bounds() -> None:
    """What can never be granted is no matter of waiting, and costs nothing."""
    limits = limiter()
    with pytest.raises(FieldOutOfBounds, match="at most 100"):
        take(limits, caller(tokens_per_day=100), 101)
    assert limits.tokens_today("alice") == 0


def test_refused_address_gives_the_keys_tokens_back() -> None:
    """When the address has no tokens left, what the key had reserved already is returned."""
    limits = limiter(tokens_per_day=10)
    take(limits, caller("bob"), 10, used=10)
    with pytest.raises(LimitReached, match="address"):
        take(limits, caller("alice", tokens_per_day=100), 5)
    assert limits.tokens_today("alice") == 0


def test_many_threads_never_pass_a_limit() -> None:
    """However many reserve at once, no more is granted than there is, and all of it can be."""
    limits = limiter()
    who = caller(tokens_per_day=100)
    granted = []

    def ask() -> None:
        for _ in range(20):
            lease = limits.enter(who)
            try:
                lease.reserve(3)
                granted.append(3)
                lease.release(3)
            except LimitReached:
                lease.release(0)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(granted) == limits.tokens_today("alice") == 99


def test_headers() -> None:
    """Both limits of the key and those of the address, each with what is left and when it is reset."""
    limits = limiter(requests_per_minute=9)
    who = caller(tokens_per_day=100, requests_per_minute=5)
    take(limits, who, 30, used=30)
    headers = render_headers(limits.uses(who))
    assert headers["RateLimit-Policy"] == (
        '"key-requests";q=5;w=60, "key-tokens";q=100;w=86400;qu="tokens", "address-requests";q=9;w=60'
    )
    assert '"key-tokens";r=70;t=43200' in headers["RateLimit"]
    assert render_headers(limits.uses(caller())) != headers
    assert render_headers([]) == {}


def test_counters_outlive_their_storage(tmp_path: Path) -> None:
    """What was counted is there when the file is opened again, also when it was never closed."""
    path = tmp_path / "counters.sqlite3"
    first = NodeStorage(path)
    assert first.incr("a", 100, 5) == 5
    assert first.incr("a", 100, -2) == 3
    first.flush()
    second = NodeStorage(path)  # while the first is open, as a worker that takes over
    assert second.get("a") == 3
    assert second.incr("a", 100) == 4
    second.flush()
    assert first.incr("a", 100) == 4  # it cannot know yet
    first.flush()
    assert first.get("a") == 5
    assert second.get("b") == 0
    assert path.stat().st_mode & 0o777 == 0o600
    first.close()
    second.close()


def test_counters_expire(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A counter that is over does not stay in the file for ever."""
    now_s = [1000.0]
    monkeypatch.setattr("service.counters.time.time", lambda: now_s[0])
    storage = NodeStorage(tmp_path / "counters.sqlite3")
    storage.incr("old", 100)
    assert storage.get_expiry("old") == 1100
    now_s[0] += 5000
    storage.incr("new", 100)
    storage.flush()
    assert (storage.get("old"), storage.get("new")) == (0, 1)
    storage.clear("new")
    assert storage.reset() == 0
    assert storage.check()
    storage.close()


def test_counters_that_cannot_be_kept_are_an_error(tmp_path: Path) -> None:
    """A file that is no database, or in no folder, is told at once and not taken for zero."""
    (tmp_path / "rubbish").write_text("this is no database, " * 100)
    for path in (tmp_path / "rubbish", tmp_path / "none" / "x"):
        with pytest.raises(StateUnwritable):
            NodeStorage(path)
    storage = NodeStorage(tmp_path / "counters.sqlite3")
    storage.close()
    with pytest.raises(StateUnwritable):
        storage.incr("a", 100)


def test_file_that_fails_for_a_while_is_made_up_for(tmp_path: Path) -> None:
    """While the file is locked by somebody nothing is lost; who counts meanwhile is refused; later all is there."""
    storage = NodeStorage(tmp_path / "counters.sqlite3")
    storage._database.execute("PRAGMA busy_timeout=10")
    storage.incr("a", 100, 5)
    storage.flush()
    with closing(sqlite3.connect(tmp_path / "counters.sqlite3", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        storage.incr("a", 100, 2)
        with pytest.raises(StateUnwritable):
            storage.flush()
        with pytest.raises(StateUnwritable):
            storage.incr("a", 100)
        assert storage.get("a") == 7
        other.execute("ROLLBACK")
    assert storage.incr("a", 100) == 8
    storage.close()
    again = NodeStorage(tmp_path / "counters.sqlite3")
    assert again.get("a") == 8
    again.close()


def test_windows_of_this_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The window moves; what is over leaves no trace in memory, however many addresses there were."""
    now_s = [1000.0]
    monkeypatch.setattr("service.counters.time.monotonic", lambda: now_s[0])
    monkeypatch.setattr("service.counters.time.time", lambda: 7000.0 + now_s[0])
    storage = NodeStorage(tmp_path / "counters.sqlite3")
    assert [storage.acquire_entry("a", 2, 60) for _ in range(3)] == [True, True, False]
    assert storage.get_moving_window("a", 2, 60) == (8000.0, 2)
    now_s[0] += 30
    for number in range(5000):
        assert storage.acquire_entry(f"address {number}", 2, 60)
    assert not storage.acquire_entry("a", 2, 60)
    now_s[0] += 31
    assert storage.acquire_entry("a", 2, 60)
    now_s[0] += 60
    for number in range(3000):
        storage.acquire_entry(f"other {number}", 2, 60)
    assert len(storage._windows) <= 3001
    monkeypatch.setattr("service.counters._MOST_WINDOWS", 100)
    for number in range(3000):
        storage.acquire_entry(f"another {number}", 2, 60)
    assert len(storage._windows) <= 100
    storage.close()


def test_a_clock_that_jumps_back_shuts_nobody_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A window is a minute long, whatever the time of day."""
    run_s, day_s = [50.0], [8000.0]
    monkeypatch.setattr("service.counters.time.monotonic", lambda: run_s[0])
    monkeypatch.setattr("service.counters.time.time", lambda: day_s[0])
    storage = NodeStorage(tmp_path / "counters.sqlite3")
    assert [storage.acquire_entry("a", 2, 60) for _ in range(3)] == [True, True, False]
    run_s[0], day_s[0] = 80.0, 800.0
    assert storage.get_moving_window("a", 2, 60) == (770.0, 2)
    run_s[0] = 111.0
    assert storage.acquire_entry("a", 2, 60)
    storage.close()


def test_settlement_that_fails_is_made_up_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens that could not be given back at the end are given back before the next reservation."""
    storage = MemoryStorage()
    limits = Limiter(Limits(), storage, clock=Clock())
    who = caller(tokens_per_day=100)
    lease = limits.enter(who)
    lease.reserve(60)
    count = storage.incr

    def fail(*arguments: object) -> int:
        raise StateUnwritable("disk full")

    monkeypatch.setattr(storage, "incr", fail)
    lease.release(10)
    assert limits.tokens_today("alice") == 60
    monkeypatch.setattr(storage, "incr", count)
    take(limits, who, 90, used=5)
    assert limits.tokens_today("alice") == 15


def test_another_nodes_counts_are_taken_over_once(tmp_path: Path) -> None:
    """Told again they change nothing, later ones count on, what was given back there is given back here as well."""
    path, later_s = tmp_path / "counters", time.time() + 1000
    storage = NodeStorage(path)
    storage.incr("tokens/1/key:alice", 1000, 5)
    for amount, expected in ((70, 75), (70, 75), (90, 95), (80, 85)):
        storage.inherit({"tokens/1/key:alice": (amount, later_s)})
        assert storage.get("tokens/1/key:alice") == expected
    storage.close()
    again = NodeStorage(path)
    again.inherit({"tokens/1/key:alice": (82, later_s), "tokens/1/key:berta": (3, later_s)})
    assert again.get("tokens/1/key:alice") == 87
    assert again.get("tokens/1/key:berta") == 3
    again.close()
