"""The queue: order, bounds, predictions, draining."""

import pytest

from service.errors import Unavailable
from service.scheduler import Scheduler, Ticket, Work


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def enter(scheduler: Scheduler, owner: str = "", address: str = "") -> Ticket:
    """A request that is admitted and counted."""
    ticket = scheduler.admit(owner, address)
    ticket.declare(Work(0, 0), None)
    return ticket


def learned(scheduler: Scheduler, decode_tokens_per_s: float = 10.0) -> Scheduler:
    """A scheduler that has seen many full-length generations at that speed, with a prefill of 100 tokens/s."""
    for _ in range(50):
        scheduler.speed.learn(100, 1.0, 10, 10 / decode_tokens_per_s, 10)
    return scheduler


def test_nobody_is_refused_on_a_guess() -> None:
    """Before anything was measured, and when the newest measurement is old, a deadline is no reason to refuse."""
    clock = Clock()
    scheduler = Scheduler(queue_size=3, clock=clock)
    ticket = enter(scheduler)
    ticket.declare(Work(1000, 4096), 0.001)
    ticket.release()
    ticket = enter(learned(scheduler))
    with pytest.raises(Unavailable):
        ticket.declare(Work(0, 100), 5)
    clock.now_s += 120
    ticket.declare(Work(0, 100), 5)


def test_turns_go_in_order_of_arrival() -> None:
    """One slot: the first runs at once, the others in order as the slot is released."""
    scheduler = Scheduler(queue_size=2)
    first, second, third = (enter(scheduler) for _ in range(3))
    assert [ticket.wait_turn(0) for ticket in (first, second, third)] == [True, False, False]
    first.release()
    assert [ticket.wait_turn(0) for ticket in (second, third)] == [True, False]


def test_slots_are_not_assumed_to_be_one() -> None:
    """An engine with three slots has three running at once."""
    scheduler = Scheduler(queue_size=1)
    scheduler.set_slots(3)
    tickets = [enter(scheduler) for _ in range(4)]
    assert [ticket.wait_turn(0) for ticket in tickets] == [True, True, True, False]
    with pytest.raises(Unavailable):
        enter(scheduler)


def test_full_queue_tells_when_a_place_is_free() -> None:
    """Refused with the time that the running request still needs, less what has passed."""
    clock = Clock()
    scheduler = learned(Scheduler(queue_size=1, clock=clock))
    enter(scheduler).declare(Work(0, 100), None)
    enter(scheduler).declare(Work(0, 100), None)
    clock.now_s += 4
    with pytest.raises(Unavailable) as caught:
        enter(scheduler)
    assert caught.value.reason == "queue_full"
    assert caught.value.retry_after_s == pytest.approx(6, abs=0.1)


def test_deadline_counts_the_work_ahead() -> None:
    """A deadline is refused when waiting, prefill and all tokens together take longer."""
    clock = Clock()
    scheduler = learned(Scheduler(queue_size=3, clock=clock))
    enter(scheduler).declare(Work(100, 40), None)  # 1 + 4 s
    ticket = enter(scheduler)
    with pytest.raises(Unavailable) as caught:
        ticket.declare(Work(100, 20), 7.9)  # 5 s ahead + 1 + 2 s
    assert caught.value.reason == "deadline"
    assert "8.0 s" in str(caught.value)
    assert caught.value.retry_after_s == pytest.approx(5, abs=0.1)
    ticket.declare(Work(100, 20), 8.1)


def test_predictions_learn_how_much_is_used() -> None:
    """Where answers use a tenth of max_tokens, the predicted wait shrinks accordingly."""
    scheduler = Scheduler(queue_size=3, clock=Clock())
    for _ in range(50):
        scheduler.speed.learn(100, 1.0, 10, 1.0, 100)
    enter(scheduler).declare(Work(0, 100), None)
    assert scheduler.predicted_wait_s() == pytest.approx(1.0, abs=0.1)


def test_release_is_idempotent_and_works_from_the_queue() -> None:
    """A waiting ticket can leave, and a double release frees nothing twice."""
    scheduler = Scheduler(queue_size=2)
    first, second, third = (enter(scheduler) for _ in range(3))
    second.release()
    second.release()
    assert scheduler.counts() == (1, 1)
    first.release()
    first.release()
    assert third.wait_turn(0)
    assert scheduler.counts() == (1, 0)


def test_drain_admits_nothing_and_waits_for_all() -> None:
    """Draining refuses newcomers while the admitted go on; it is idle once they have left."""
    scheduler = Scheduler(queue_size=2)
    first, second = enter(scheduler), enter(scheduler)
    scheduler.drain()
    with pytest.raises(Unavailable) as caught:
        enter(scheduler)
    assert caught.value.reason == "draining"
    first.release()
    assert second.wait_turn(0)
    assert not scheduler.wait_idle(0)
    second.release()
    assert scheduler.wait_idle(0)


def run_all(scheduler: Scheduler, tickets: list[Ticket]) -> list[str]:
    """Owners in the order of their turns, one slot."""
    order = []
    waiting = list(tickets)
    while waiting:
        (ticket,) = [one for one in waiting if one.turn.is_set()]
        order.append(ticket.owner)
        waiting.remove(ticket)
        ticket.release()
    return order


def test_turns_go_between_owners() -> None:
    """An owner with many waiting delays another's first by at most the one that runs; then they take turns."""
    scheduler = Scheduler(queue_size=60)
    tickets = [enter(scheduler, "greedy") for _ in range(6)]
    tickets += [enter(scheduler, "late"), enter(scheduler, "later"), enter(scheduler, "late")]
    assert run_all(scheduler, tickets) == [
        *("greedy", "late", "later", "greedy", "late"),
        *("greedy", "greedy", "greedy", "greedy"),
    ]


def test_owner_who_comes_again_at_once_does_not_overtake() -> None:
    """Whoever has had a turn goes behind those who wait, however fast the next request is there."""
    scheduler = Scheduler(queue_size=60)
    first, other, third = enter(scheduler, "fast"), enter(scheduler, "slow"), enter(scheduler, "slow")
    first.release()
    again = enter(scheduler, "fast")
    assert other.turn.is_set()
    other.release()
    assert again.turn.is_set()
    assert not third.turn.is_set()


def test_slots_are_shared_between_owners() -> None:
    """With two slots, one owner gets the second only while nobody else waits for it."""
    scheduler = Scheduler(queue_size=60)
    scheduler.set_slots(2)
    first, second, third = (enter(scheduler, "greedy") for _ in range(3))
    other = enter(scheduler, "other")
    first.release()
    assert other.turn.is_set()
    assert not third.turn.is_set()
    second.release()
    assert third.turn.is_set()


def test_last_places_are_for_owners_without_any() -> None:
    """A quarter of the queue is kept: who fills the rest is refused, another's first request is taken."""
    scheduler = Scheduler(queue_size=8)
    for _ in range(1 + 6):
        enter(scheduler, "greedy")
    with pytest.raises(Unavailable, match="last places"):
        enter(scheduler, "greedy")
    enter(scheduler, "other")
    with pytest.raises(Unavailable):
        enter(scheduler, "other")
    enter(scheduler, "third")
    with pytest.raises(Unavailable) as caught:
        enter(scheduler, "fourth")
    assert "last places" not in str(caught.value)


def test_predictions_know_the_order_of_turns() -> None:
    """A newcomer's wait is the running request; the greedy owner's next waits for the newcomer too."""
    clock = Clock()
    scheduler = learned(Scheduler(queue_size=60, clock=clock))
    tickets = [enter(scheduler, "greedy", "here") for _ in range(4)]
    for ticket in tickets:
        ticket.declare(Work(0, 100), None)  # 10 s each
    assert scheduler.predicted_wait_s() == pytest.approx(10, abs=0.1)
    late = enter(scheduler, "late", "there")
    late.declare(Work(0, 50), 15.5)
    with pytest.raises(Unavailable):
        late.declare(Work(0, 50), 14.5)
    tickets[1].declare(Work(0, 100), 25.5)  # 10 s running, 5 s of the newcomer's, 10 s its own
    with pytest.raises(Unavailable):
        tickets[1].declare(Work(0, 100), 24.5)
    assert scheduler.predicted_wait_s() == pytest.approx(15, abs=0.1)
    assert scheduler.predicted_end_s("late") == scheduler.predicted_end_s("there") == pytest.approx(15, abs=0.1)
    assert scheduler.predicted_end_s("greedy") == pytest.approx(10, abs=0.1)
    assert scheduler.predicted_end_s("nobody") == 0.0


def test_owners_who_have_left_are_forgotten() -> None:
    """What is remembered of owners does not grow with their number."""
    scheduler = Scheduler(queue_size=60)
    for number in range(1000):
        enter(scheduler, f"owner {number}").release()
    assert not scheduler._last_turn


def test_request_that_is_being_counted_holds_no_slot() -> None:
    """Admitted and not yet counted, a request has its place; the slot goes to whoever is ready for it."""
    scheduler = Scheduler(queue_size=1)
    large = scheduler.admit("greedy")
    assert not large.turn.is_set()
    small = enter(scheduler, "other")
    assert small.turn.is_set()
    with pytest.raises(Unavailable):
        scheduler.admit("third")
    large.declare(Work(1000, 1), None)
    assert not large.turn.is_set()
    small.release()
    assert large.turn.is_set()


def test_two_who_always_come_again_do_not_starve_a_third() -> None:
    """Owners who ask again as soon as they are answered are no newcomers: one with two waiting gets both."""
    scheduler = Scheduler(queue_size=60)
    tickets = [enter(scheduler, owner) for owner in ("b", "c", "a", "a")]
    turns = []
    for _ in range(12):
        (running,) = [ticket for ticket in tickets if ticket.turn.is_set()]
        turns.append(running.owner)
        tickets.remove(running)
        running.release()
        if running.owner != "a":
            tickets.append(enter(scheduler, running.owner))
    assert turns.count("a") == 2
    assert turns.index("a") <= 2


def test_generation_that_outlives_its_expectation_is_not_over() -> None:
    """What has taken longer than usual is predicted to go on, up to what it may take."""
    clock = Clock()
    scheduler = Scheduler(queue_size=3, clock=clock)
    for _ in range(50):
        scheduler.speed.learn(100, 1.0, 10, 1.0, 100)
    scheduler.admit().declare(Work(0, 1000), None)  # 10 s expected, 100 s possible
    clock.now_s += 20
    assert scheduler.predicted_wait_s() == pytest.approx(40, abs=1)
    clock.now_s += 79
    assert scheduler.predicted_wait_s() < 1
