"""Stop strings over a stream of pieces."""

import random

import pytest

from service.stops import StopFilter


def run(pieces: list[str], stops: list[str]) -> tuple[str, list[str], bool]:
    stop = StopFilter(stops)
    sent = [stop.feed(piece) for piece in pieces]
    stopped = stop.stopped
    sent.append(stop.flush())
    return "".join(sent), sent, stopped


@pytest.mark.parametrize(
    ("pieces", "stops", "expected", "stopped"),
    [
        (["Hello ", "world"], [], "Hello world", False),
        (["Hello ", "END more"], ["END"], "Hello ", True),
        (["He", "llo E", "N", "D more"], ["END"], "Hello ", True),
        (["Hello E", "N"], ["END"], "Hello EN", False),
        (["aab"], ["ab", "aab"], "", True),
        (["aaaab"], ["aab"], "aa", True),
        (["a", "a", "a", "b"], ["aab"], "a", True),
        (["x\n", "\n", "y"], ["\n\n"], "x", True),
        (["END"], ["END"], "", True),
        (["one two three"], ["three", "two"], "one ", True),
    ],
)
def test_cuts_before_the_first_stop(pieces: list[str], stops: list[str], expected: str, stopped: bool) -> None:
    """Text before the first stop string is sent, the rest is not, however the pieces are cut."""
    text, _, was_stopped = run(pieces, stops)
    assert (text, was_stopped) == (expected, stopped)


def test_any_cutting_gives_the_same_text() -> None:
    """For many random texts and cuttings the outcome is that of the whole text, and no stop string is sent."""
    dice = random.Random(7)
    for _ in range(3000):
        whole = "".join(dice.choice("ab ") for _ in range(dice.randint(0, 30)))
        stops = ["".join(dice.choice("ab ") for _ in range(dice.randint(1, 4))) for _ in range(dice.randint(1, 3))]
        places = sorted(dice.randint(0, len(whole)) for _ in range(dice.randint(0, 8)))
        pieces = [whole[a:b] for a, b in zip([0, *places], [*places, len(whole)], strict=True)]
        found = [place for stop in stops if (place := whole.find(stop)) >= 0]
        text, _, stopped = run(pieces, stops)
        if not found:
            assert (text, stopped) == (whole, False)
        else:
            assert stopped
            # A longer stop that begins earlier may still be open when a shorter one is complete.
            assert whole.startswith(text)
            assert not any(stop in text for stop in stops)
            assert len(text) <= max(found)


def test_holds_back_no_more_than_needed() -> None:
    """Text that can no longer begin a stop string is sent at once."""
    stop = StopFilter(["END"])
    assert stop.feed("abcE") == "abc"
    assert stop.feed("x") == "Ex"
