"""Owns who works when: a bounded, fair queue over the engine's slots, predictions of its waits, deadlines, draining.

It knows nothing of HTTP nor of the engine beyond the number of slots and the speeds it is told, and of the owner of a
request nothing but that it is another than the next.
"""

import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

from service.errors import Unavailable

_SPEED_MEMORY = 0.5  # weight of the newest measurement in the running averages
_SPEED_HOLDS_S = 60.0  # a busy neighbour may have left since


@dataclass(frozen=True)
class Work:
    """What one request will ask of the engine, in tokens; an answer of a length that nobody named may end anywhere."""

    prompt_tokens: int
    max_tokens: int
    max_tokens_named: bool = True


class Speed:
    """Running averages of what the engine did: seconds a token in prefill and decode, and how much is used.

    ``clock`` gives seconds; used to tell how old the newest measurement is.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._prefill_s: float | None = None
        self._decode_s: float | None = None
        self._share_used = 1.0
        self._learnt_s: float | None = None

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
            self._learnt_s = self._clock()
            if prefill_tokens > 0:
                self._prefill_s = _blend(self._prefill_s, prefill_s / prefill_tokens)
            if completion_tokens > 0:
                self._decode_s = _blend(self._decode_s, decode_s / completion_tokens)
            if max_tokens is not None:
                self._share_used = _blend(self._share_used, min(1.0, completion_tokens / max_tokens))

    def is_known(self) -> bool:
        """Whether there is a measurement that is not too old to refuse a request for."""
        return self._learnt_s is not None and self._clock() - self._learnt_s < _SPEED_HOLDS_S

    def tokens_per_second(self) -> float | None:
        """How fast one request's answer is written, averaged over the last ones; None before anything was measured."""
        return 1 / self._decode_s if self._decode_s else None

    def expected_s(self, work: Work) -> float:
        """How long such a request usually takes; 0 before anything was measured."""
        return self._predict_s(work, self._share_used)

    def longest_s(self, work: Work) -> float:
        """How long it takes if it uses all its tokens; 0 before anything was measured."""
        return self._predict_s(work, 1.0)

    def needed_s(self, work: Work) -> float:
        """How long it takes with all the tokens that somebody named; 0 before anything was measured."""
        return self._predict_s(work, 1.0 if work.max_tokens_named else 0.0)

    def _predict_s(self, work: Work, share_used: float) -> float:
        return work.prompt_tokens * (self._prefill_s or 0.0) + work.max_tokens * share_used * (self._decode_s or 0.0)


def _blend(average: float | None, newest: float) -> float:
    return newest if average is None else average + _SPEED_MEMORY * (newest - average)


class Ticket:
    """A place in the queue, later a slot; it must be released, however the request ends."""

    def __init__(self, scheduler: "Scheduler", owner: str, address: str):
        self._scheduler = scheduler
        self.owner, self.address = owner, address
        self.turn = threading.Event()
        self.released = False
        self.work: Work | None = None
        self.admitted_s = scheduler.clock()
        self.started_s: float | None = None

    def is_of(self, identity: str) -> bool:
        """Whether it belongs to this owner, or came from this address."""
        return identity in (self.owner, self.address)

    def wait_turn(self, timeout_s: float) -> bool:
        """Waits for the slot at most ``timeout_s``; tells whether it is this request's turn."""
        return self.turn.wait(timeout_s)

    def declare(self, work: Work, deadline_s: float | None) -> None:
        """Tells what the request will cost and by when, counted from its admission, it must be done.

        Only now can it get its turn: one that is still being counted must not hold a slot idle.
        Raises Unavailable at once if the deadline will not be met as far as the measured speed tells. Without a recent
        measurement nobody is refused: it could never be corrected.
        """
        self._scheduler.declare(self, work, deadline_s)

    def release(self) -> None:
        """Gives the place or the slot back; more than once does no harm."""
        self._scheduler.release(self)


class Scheduler:
    """Turns over ``slots`` go from owner to owner, an owner's requests in order; at most ``queue_size`` wait.

    A quarter of the places is kept for owners who have nothing waiting, so that one who fills the queue does not shut
    the others out of it.
    """

    def __init__(self, queue_size: int, clock: Callable[[], float] = time.monotonic):
        self.clock = clock
        self.speed = Speed(clock)
        self._queue_size = queue_size
        self._kept_places = queue_size // 4
        self._slots = 1
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._waiting: list[Ticket] = []  # in order of arrival
        self._running: set[Ticket] = set()
        self._turns = 0
        self._last_turn: dict[str, int] = {}  # of owners who have something waiting or running
        self._draining = False

    def set_slots(self, slots: int) -> None:
        """Takes the engine's number of slots, known once it has loaded."""
        with self._lock:
            self._slots = slots
            self._promote()

    def admit(self, owner: str = "", address: str = "") -> Ticket:
        """Takes a place. Raises Unavailable when draining or full."""
        with self._lock:
            if self._draining:
                raise Unavailable("draining", "the service is draining; ask another node", 1.0)
            self._check_place(owner)
            ticket = Ticket(self, owner, address)
            self._waiting.append(ticket)
            return ticket

    def declare(self, ticket: Ticket, work: Work, deadline_s: float | None) -> None:
        """See ``Ticket.declare``."""
        with self._lock:
            if deadline_s is not None and self.speed.is_known():
                ahead_s = self._predict_start_s(ticket)
                needed_s = self.speed.needed_s(work)
                done_s = ahead_s + needed_s
                if done_s > deadline_s:
                    raise Unavailable(
                        "deadline",
                        f"the deadline is in {deadline_s:.1f} s, but the answer would be ready in about {done_s:.1f} s "
                        f"(of which {ahead_s:.1f} s of waiting)",
                        max(1.0, ahead_s) if needed_s <= deadline_s else None,
                    )
            ticket.work = work
            self._promote()

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
            self._forget_owners()
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
        """How long the first request of a new owner would wait for its slot if it came now."""
        with self._lock:
            return self._predict_start_s(None)

    def predicted_end_s(self, identity: str) -> float:
        """In how many seconds the next request of an owner or an address is done; 0 if it has none."""
        with self._lock:
            ends_s = [self._remaining_s(ticket) for ticket in self._running if ticket.is_of(identity)]
            ahead_s = self._running_s()
            for ticket in self._order():
                ahead_s += self._remaining_s(ticket)
                if ticket.is_of(identity):
                    ends_s.append(ahead_s / self._slots)
                    break
        return min(ends_s, default=0.0)

    def _check_place(self, owner: str) -> None:
        waiting = len(self._running) + len(self._waiting) - self._slots
        kept = self._kept_places if any(ticket.owner == owner for ticket in self._waiting) else 0
        if waiting < 0 or waiting < self._queue_size - kept:
            return
        wait_s = self._predict_place_s()
        places = "" if waiting >= self._queue_size else ", and the last places are for those who have none waiting"
        raise Unavailable(
            "queue_full",
            f"{waiting} requests are waiting already{places}; a place is free in about {wait_s:.0f} s",
            wait_s,
        )

    def _promote(self) -> None:
        """The owner with the fewest running goes next, of these the one whose last turn is longest ago."""
        while len(self._running) < self._slots and (ready := [one for one in self._waiting if one.work is not None]):
            ticket = ready[0]
            if len(ready) > 1:
                held = Counter(one.owner for one in self._running)
                ticket = min(ready, key=lambda one: (held[one.owner], self._last_turn.get(one.owner, 0)))
            self._waiting.remove(ticket)
            self._turns += 1
            self._last_turn[ticket.owner] = self._turns
            ticket.started_s = self.clock()
            self._running.add(ticket)
            ticket.turn.set()

    def _forget_owners(self) -> None:
        """Forgets the turns of owners who are gone, once nobody waits whose own last turn is longer ago.

        Sooner, whoever comes again at once would pass for somebody who never had a turn.
        """
        if not self._waiting:
            here = {ticket.owner for ticket in self._running}
            self._last_turn = {owner: turn for owner, turn in self._last_turn.items() if owner in here}
            return
        here = {ticket.owner for ticket in (*self._waiting, *self._running)}
        oldest = min(self._last_turn.get(ticket.owner, 0) for ticket in self._waiting)
        self._last_turn = {owner: turn for owner, turn in self._last_turn.items() if owner in here or turn > oldest}

    def _order(self) -> list[Ticket]:
        """Who waits, in the order of their turns if nobody else comes."""
        queues: dict[str, deque[Ticket]] = {}
        for ticket in self._waiting:
            queues.setdefault(ticket.owner, deque()).append(ticket)
        # Owners of the same age go in order of arrival, which is the order of the dictionary.
        ages = [(self._last_turn.get(owner, 0), place, owner) for place, owner in enumerate(queues)]
        heapify(ages)
        order, turns = [], self._turns
        while ages:
            _, place, owner = heappop(ages)
            order.append(queues[owner].popleft())
            turns += 1
            if queues[owner]:
                heappush(ages, (turns, place, owner))
        return order

    def _running_s(self) -> float:
        return sum(self._remaining_s(ticket) for ticket in self._running)

    def _remaining_s(self, ticket: Ticket) -> float:
        if ticket.work is None:
            return 0.0
        elapsed_s = self.clock() - ticket.started_s if ticket.started_s is not None else 0.0
        left_s = self.speed.expected_s(ticket.work) - elapsed_s
        # One that outlives what was expected of it is held to be half way through what it may still take.
        return left_s if left_s > 0 else max(0.0, (self.speed.longest_s(ticket.work) - elapsed_s) / 2)

    def _predict_start_s(self, ticket: Ticket | None) -> float:
        """Work ahead of a ticket (None: of a new owner's that comes now), spread over the slots."""
        if ticket in self._running:
            return 0.0
        ahead_s, had_turns = self._running_s(), set(self._last_turn)
        for other in self._order():
            if other is ticket or (ticket is None and other.owner in had_turns):
                break
            had_turns.add(other.owner)
            ahead_s += self._remaining_s(other)
        return ahead_s / self._slots

    def _predict_place_s(self) -> float:
        """When the next running request is done, and so the next place free; a whole second at least."""
        return max(1.0, min((self._remaining_s(one) for one in self._running), default=1.0))
