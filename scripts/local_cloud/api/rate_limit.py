"""Owns the allowance of requests: so many an hour, refilled steadily."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Allowance:
    """What is left after a request; ``full_at`` is when all of it is back, in seconds since 1970."""

    limit: int
    remaining: int
    full_at: int
    granted: bool

    def headers(self) -> dict[str, str]:
        """The headers that tell clients."""
        return {
            "RateLimit-Limit": str(self.limit),
            "RateLimit-Remaining": str(self.remaining),
            "RateLimit-Reset": str(self.full_at),
        }


class RateLimiter:
    """One bucket for the project, refilled in an hour."""

    def __init__(self, per_hour: int, now: Callable[[], float] = time.time):
        self._limit, self._now = per_hour, now
        self._lock = threading.Lock()
        self._left, self._at = float(per_hour), now()

    def take(self) -> Allowance:
        """Takes one request out of the allowance, if there is one."""
        with self._lock:
            now = self._now()
            refill_per_s = self._limit / 3600
            self._left = min(float(self._limit), self._left + max(0.0, now - self._at) * refill_per_s)
            self._at = now
            granted = self._left >= 1
            if granted:
                self._left -= 1
            full_at = now + (self._limit - self._left) / refill_per_s
            return Allowance(self._limit, int(self._left), int(full_at), granted)
