"""Owns what keys and addresses may use: requests a minute, generated tokens a day, requests at the same time.

Each limit is counted for the key and for the address, in a storage of the library ``limits``: requests a minute in its
moving windows, tokens a day in its counters. This node's own is in ``counters.py``; one that several nodes share can
take its place.
"""

import math
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple, Protocol

from service.access import Caller, identify_address
from service.errors import FieldOutOfBounds, LimitReached, StateUnwritable
from service.keys import Limits

_MINUTE_S = 60
_DAY_S = 86_400
_DAYS_KEPT = 2


class _Subject(NamedTuple):
    """Somebody who is counted: ``kind`` is key or address, ``identity`` names the counters."""

    kind: str
    identity: str
    limits: Limits


class Use(NamedTuple):
    """What a subject has used of a limit and when that is reset, in seconds from now; for headers and ``/usage``."""

    policy: str
    limit: int
    used: int
    window_s: int
    reset_s: float


class SharedCounters(Protocol):
    """What is asked of a storage of the library ``limits``; times are seconds since the epoch."""

    def incr(self, key: str, expiry: int, amount: int = 1) -> int: ...

    def get(self, key: str) -> int: ...

    def acquire_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool: ...

    def get_moving_window(self, key: str, limit: int, expiry: int) -> tuple[float, int]: ...


class Limiter:
    """Counts; one for the whole service.

    ``clock`` gives seconds since the epoch. ``predict_end_s(identity)`` tells in how many seconds the next request of
    a key (by name) or an address ends, as far as is known.
    """

    def __init__(
        self,
        address_limits: Limits,
        counters: SharedCounters,
        predict_end_s: Callable[[str], float] = lambda identity: 1.0,
        clock: Callable[[], float] = time.time,
    ):
        self._address_limits, self._counters = address_limits, counters
        self._predict_end_s, self._clock = predict_end_s, clock
        self._lock = threading.Lock()
        self._parallel: defaultdict[str, int] = defaultdict(int)
        self._held: defaultdict[str, int] = defaultdict(int)  # tokens that running requests reserved and may give back
        self._unsettled: defaultdict[str, int] = defaultdict(int)  # corrections that could not be written yet

    def count_address(self, address: str) -> None:
        """Counts a request before it is known whose it is. Raises LimitReached."""
        self._count_request(self._address_subject(address))

    def count_key(self, caller: Caller) -> None:
        """Counts a request of a known caller. Raises LimitReached."""
        self._count_request(_key_subject(caller))

    def enter(self, caller: Caller) -> "Lease":
        """Takes one of the places that the caller may have at the same time. Raises LimitReached."""
        subjects = (_key_subject(caller), self._address_subject(caller.address))
        with self._lock:
            for subject in subjects:
                most = subject.limits.parallel
                if most is not None and self._parallel.get(subject.identity, 0) >= most:
                    raise LimitReached(
                        f"{subject.kind}_parallel",
                        f"the {subject.kind} may have {most} requests at the same time",
                        max(1.0, self._predict_end_s(subject.identity)),
                    )
            for subject in subjects:
                self._parallel[subject.identity] += 1
        return Lease(self, subjects)

    def uses(self, caller: Caller) -> list[Use]:
        """Where the caller stands with every limit of a key or an address that counts for it."""
        return self._uses(_key_subject(caller)) + self._uses(self._address_subject(caller.address))

    def key_uses(self, name: str, limits: Limits) -> list[Use]:
        """Where a key stands."""
        return self._uses(_Subject("key", f"key:{name}", limits))

    def tokens_today(self, name: str) -> int:
        """Tokens that a key has used or reserved since midnight, UTC."""
        return self._counters.get(self._day_counter(f"key:{name}"))

    def _address_subject(self, address: str) -> _Subject:
        return _Subject("address", identify_address(address), self._address_limits)

    def _count_request(self, subject: _Subject) -> None:
        most = subject.limits.requests_per_minute
        if most is None:
            return
        window = _window(subject)
        if not self._counters.acquire_entry(window, most, _MINUTE_S):
            oldest_s, _ = self._counters.get_moving_window(window, most, _MINUTE_S)
            raise LimitReached(
                f"{subject.kind}_requests",
                f"the {subject.kind} may send {most} requests a minute",
                max(0.0, oldest_s + _MINUTE_S - self._clock()),  # it leaves the window then, and makes room for one
            )

    def _uses(self, subject: _Subject) -> list[Use]:
        found = []
        limits = subject.limits
        most = limits.requests_per_minute
        if most is not None:
            oldest_s, used = self._counters.get_moving_window(_window(subject), most, _MINUTE_S)
            wait_s = max(0.0, oldest_s + _MINUTE_S - self._clock())
            found.append(Use(f"{subject.kind}-requests", most, used, _MINUTE_S, wait_s))
        if limits.tokens_per_day is not None:
            used = min(limits.tokens_per_day, self._counters.get(self._day_counter(subject.identity)))
            found.append(Use(f"{subject.kind}-tokens", limits.tokens_per_day, used, _DAY_S, self._to_midnight_s()))
        return found

    def _day_counter(self, identity: str) -> str:
        day = int(self._clock() // _DAY_S)
        return f"tokens/{day}/{identity}"

    def _to_midnight_s(self) -> float:
        return _DAY_S - self._clock() % _DAY_S

    def _tokens_left(self, subject: _Subject) -> int | None:
        most = subject.limits.tokens_per_day
        return None if most is None else max(0, most - self._counters.get(self._day_counter(subject.identity)))

    def _reserve(self, subject: _Subject, tokens: int) -> str:
        """Counts the tokens and returns the counter's name; called with the lock held."""
        most = subject.limits.tokens_per_day
        counter = self._day_counter(subject.identity)
        self._settle()
        if most is not None and tokens > most:
            bound = f"must be at most {most}, which is all that the {subject.kind} has a day"
            raise FieldOutOfBounds("max_tokens", bound)
        used = self._counters.incr(counter, _DAYS_KEPT * _DAY_S, tokens)
        if most is not None and used > most:
            left = max(0, most - self._counters.incr(counter, _DAYS_KEPT * _DAY_S, -tokens))
            held = self._held.get(subject.identity, 0)
            wait_s = self._predict_end_s(subject.identity) if tokens <= left + held else self._to_midnight_s()
            raise LimitReached(
                f"{subject.kind}_tokens",
                f"max_tokens asks for {tokens}, but the {subject.kind} has {left} of its {most} tokens a day left"
                + (f" and {held} more reserved by its running requests" if held else ""),
                max(1.0, wait_s),
            )
        self._held[subject.identity] += tokens
        return counter

    def _settle(self) -> None:
        """Writes corrections, of requests that have ended, to their counters; called with the lock held."""
        while self._unsettled:
            counter, tokens = next(iter(self._unsettled.items()))
            self._counters.incr(counter, _DAYS_KEPT * _DAY_S, tokens)
            del self._unsettled[counter]


class Lease:
    """What one request has taken; ``release`` must be called however it ends."""

    def __init__(self, limiter: Limiter, subjects: tuple[_Subject, ...]):
        self._limiter, self._subjects = limiter, subjects
        self._reserved: list[tuple[str, str]] = []  # identity, counter
        self._tokens = 0
        self._released = False

    def tokens_left(self) -> int | None:
        """How many tokens the tightest of the daily limits leaves; None without one."""
        left = [tokens for subject in self._subjects if (tokens := self._limiter._tokens_left(subject)) is not None]
        return min(left, default=None)

    def reserve(self, tokens: int) -> None:
        """Counts tokens that may be generated, before they are. Raises LimitReached or FieldOutOfBounds."""
        limiter = self._limiter
        with limiter._lock:
            self._tokens = tokens
            for subject in self._subjects:
                # Keys are always counted, so that their use can be told; addresses only where that is needed.
                if subject.kind == "key" or subject.limits.tokens_per_day is not None:
                    self._reserved.append((subject.identity, limiter._reserve(subject, tokens)))

    def release(self, tokens_used: int) -> None:
        """Gives back the place, and the tokens that were reserved and not generated; more than once does no harm."""
        limiter = self._limiter
        with limiter._lock:
            if self._released:
                return
            self._released = True
            for subject in self._subjects:
                _take(limiter._parallel, subject.identity, 1)
            for identity, counter in self._reserved:
                _take(limiter._held, identity, self._tokens)
                if tokens_used != self._tokens:
                    limiter._unsettled[counter] += tokens_used - self._tokens
            try:
                limiter._settle()
            except StateUnwritable:
                pass  # the next reservation tries again, and is refused as long as nothing can be counted


def _take(counts: dict[str, int], identity: str, amount: int) -> None:
    """Lowers a count, and forgets whoever has none left."""
    left = counts[identity] - amount
    if left > 0:
        counts[identity] = left
    else:
        del counts[identity]


def _window(subject: _Subject) -> str:
    return f"requests/{subject.identity}"


def _key_subject(caller: Caller) -> _Subject:
    return _Subject("key", caller.identity, caller.limits)


def render_headers(uses: list[Use]) -> dict[str, str]:
    """RateLimit-Policy and RateLimit: draft-ietf-httpapi-ratelimit-headers-10, a quota, its window, what is left."""
    if not uses:
        return {}
    policies, states = [], []
    for use in uses:
        unit = ';qu="tokens"' if use.policy.endswith("-tokens") else ""
        policies.append(f'"{use.policy}";q={use.limit};w={use.window_s}{unit}')
        states.append(f'"{use.policy}";r={max(0, use.limit - use.used)};t={math.ceil(use.reset_s)}')
    return {"RateLimit-Policy": ", ".join(policies), "RateLimit": ", ".join(states)}
