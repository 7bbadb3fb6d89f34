"""Owns who works when: a bounded queue over the engine's slots, predictions of its waits, deadlines and draining.

It knows nothing of HTTP nor of the engine beyond the number of slots and the speeds it is told.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from service.errors import Unavailable

_SPEED_MEMORY = 0.3  # weight of the newest measurement in the running averages
_FIRST_PREFILL_TOKENS_PER_S = 20.0  # before anything was measured: an 8B on a small host
_FIRST_DECODE_TOKENS_PER_S = 5.0


@dataclass(frozen=True)
class Work:
    """What one request will ask of the engine, in tokens."""

    prompt_tokens: int
    max_tokens: int


class Speed:
    """Running averages of what the engine did: prefill and decode rates, and how much of ``max_tokens`` is used."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.prefill_tokens_per_s = _FIRST_PREFILL_TOKENS_PER_S
        self.decode_tokens_per_s = _FIRST_DECODE_TOKENS_PER_S
        self._share_used = 1.0

    def learn(
        self,
        prefill_tokens: int,
        prefill_s: float,
        completion_tokens: int,
        decode_s: float,
        max_tokens: int | None,
    ) -> None:
        """Takes in one generation (durations in seconds); ``max_tokens`` is None if it was cut from outside."""
        with self._lock:
            if prefill_tokens > 0 and prefill_s > 0:
                self.prefill_tokens_per_s += _SPEED_MEMORY * (
                    prefill_tokens / prefill_s - self.prefill_tokens_per_s
                )
            if completion_tokens > 0 and decode_s > 0:
                self.decode_tokens_per_s += _SPEED_MEMORY * (
                    completion_tokens / decode_s - self.decode_tokens_per_s
                )
            if max_tokens is not None:
                self._share_used += _SPEED_MEMORY * (min(1.0, completion_tokens / max_tokens) - self._share_used)

    def expected_s(self, work: Work) -> float:
        """How long such a request usually takes."""
        return (
            work.prompt_tokens / self.prefill_tokens_per_s
            + work.max_tokens * self._share_used / self.decode_tokens_per_s
        )

    def longest_s(self, work: Work) -> float:
        """How long it takes if it uses all its tokens."""
        return work.prompt_tokens / self.prefill_tokens_per_s + work.max_tokens / self.decode_tokens_per_s


class Ticket:
    """A place in the queue, later a slot; it must be released, however the request ends."""

    def __init__(self, scheduler: "Scheduler"):
        self._scheduler = scheduler
        self.turn = threading.Event()
        self.released = False
        self.work: Work | None = None
        self.admitted_s = scheduler.clock()
        self.started_s: float | None = None

    def wait_turn(self, timeout_s: float) -> bool:
        """Waits for the slot at most ``timeout_s``; tells whether it is this request's turn."""
        return self.turn.wait(timeout_s)

    def declare(self, work: Work, deadline_s: float | None) -> None:
        """Tells what the request will cost and by when, counted from its admission, it must be done.

        Raises Unavailable at once if the deadline will not be met as far as the measured speed tells.
        """
        self._scheduler.declare(self, work, deadline_s)

    def release(self) -> None:
        """Gives the place or the slot back; more than once does no harm."""
        self._scheduler.release(self)


class Scheduler:
    """First come, first served over ``slots``, with at most ``queue_size`` waiting."""

    def __init__(self, queue_size: int, clock: Callable[[], float] = time.monotonic):
        self.clock = clock
        self.speed = Speed()
        self._queue_size = queue_size
        self._slots = 1
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._waiting: deque[Ticket] = deque()
        self._running: set[Ticket] = set()
        self._draining = False

    def set_slots(self, slots: int) -> None:
        """Takes the engine's number of slots, known once it has loaded."""
        with self._lock:
            self._slots = slots
            self._promote()

    def admit(self) -> Ticket:
        """Takes a place. Raises Unavailable when draining or full."""
        with self._lock:
            if self._draining:
                raise Unavailable("draining", "the service is draining; ask another node", 1.0)
            if len(self._running) >= self._slots and len(self._waiting) >= self._queue_size:
                wait_s = self._predict_place_s()
                raise Unavailable(
                    "queue_full",
                    f"{len(self._waiting)} requests are waiting already; a place is free in about {wait_s:.0f} s",
                    wait_s,
                )
            ticket = Ticket(self)
            self._waiting.append(ticket)
            self._promote()
            return ticket

    def declare(self, ticket: Ticket, work: Work, deadline_s: float | None) -> None:
        """See ``Ticket.declare``."""
        with self._lock:
            ticket.work = work
            if deadline_s is None:
                return
            ahead_s = self._predict_start_s(ticket)
        done_s = ahead_s + self.speed.longest_s(work)
        if done_s > deadline_s:
            raise Unavailable(
                "deadline",
                f"the deadline is in {deadline_s:.1f} s, but the answer would be ready in about {done_s:.1f} s "
                f"(of which {ahead_s:.1f} s of waiting)",
                max(1.0, ahead_s),
            )

    def release(self, ticket: Ticket) -> None:
        """See ``Ticket.release``."""
        with self._lock:
            if ticket.released:
                return
            ticket.released = True
            self._running.discard(ticket)
            if ticket in self._waiting:
                self._waiting.remove(ticket)
            self._promote()
            self._idle.notify_all()

    def drain(self) -> None:
        """From now on nothing is admitted; what was admitted goes on. Takes no lock: a signal handler calls it."""
        self._draining = True

    @property
    def draining(self) -> bool:
        return self._draining

    def wait_idle(self, timeout_s: float) -> bool:
        """Waits until nothing runs or waits; tells whether that is so."""
        with self._idle:
            return self._idle.wait_for(lambda: not self._running and not self._waiting, timeout_s)

    def counts(self) -> tuple[int, int]:
        """Requests in slots, requests waiting."""
        with self._lock:
            return len(self._running), len(self._waiting)

    def predicted_wait_s(self) -> float:
        """How long a request that came now would wait for its slot."""
        with self._lock:
            return self._predict_start_s(None)

    def _promote(self) -> None:
        while self._waiting and len(self._running) < self._slots:
            ticket = self._waiting.popleft()
            ticket.started_s = self.clock()
            self._running.add(ticket)
            ticket.turn.set()

    def _remaining_s(self, ticket: Ticket) -> float:
        if ticket.work is None:
            return 0.0
        elapsed_s = self.clock() - ticket.started_s if ticket.started_s is not None else 0.0
        return max(0.0, self.speed.expected_s(ticket.work) - elapsed_s)

    def _predict_start_s(self, ticket: Ticket | None) -> float:
        """Work ahead of a ticket (None: of one that comes now), spread over the slots."""
        if ticket in self._running:
            return 0.0
        ahead_s = sum(self._remaining_s(one) for one in self._running)
        for other in self._waiting:
            if other is ticket:
                break
            ahead_s += self._remaining_s(other)
        return ahead_s / self._slots

    def _predict_place_s(self) -> float:
        """When the next running request is done, and so the next place free; a whole second at least."""
        return max(1.0, min((self._remaining_s(one) for one in self._running), default=1.0))
