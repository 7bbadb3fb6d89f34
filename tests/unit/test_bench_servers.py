"""What `make bench-servers` makes of answers and figures."""

import json
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import pytest

from tests.bench.peer_builds import llama_cpp_build
from tests.bench.servers import PROMPT_LETTERS, Life, Row, Seen, prompt, read_stream, report


def events(*documents: Any, done: bool = True) -> Iterator[bytes]:
    for document in documents:
        yield f"data: {json.dumps(document)}\n".encode()
        yield b"\n"
    if done:
        yield b"data: [DONE]\n"


def piece(text: str, finish_reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"text": text, "finish_reason": finish_reason}]}


def ticks() -> Callable[[], float]:
    numbers = count(1)
    return lambda: float(next(numbers))


COUNTS = {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3}}


def test_a_whole_answer() -> None:
    """Its times are those of text, an empty piece has none; its counts are the server's own."""
    lines = events(piece(""), piece("a"), piece("b"), piece("c", "length"), COUNTS)
    assert read_stream(lines, ticks()) == Seen(1.0, 3.0, 7, 3, whole=True)


@pytest.mark.parametrize(
    "lines",
    [
        events(piece("a"), done=False),
        events(piece("a", "length"), COUNTS, done=False),
        events(piece("a"), {"error": {"message": "the server stops"}}),
        events(done=False),
    ],
)
def test_an_answer_that_was_cut(lines: Iterator[bytes]) -> None:
    """Whether the stream just ends, or says that something went wrong: it is not whole."""
    assert not read_stream(lines, ticks()).whole


def test_prompts_begin_differently() -> None:
    """Nobody may have read a part of one before; each is the same every time."""
    prompts = {prompt(number) for number in range(50)}
    assert len({text[:12] for text in prompts}) == 50
    assert {len(text) for text in prompts} == {PROMPT_LETTERS}
    assert prompt(7) in prompts


def test_the_report() -> None:
    """Ratios are of rounds, who was not measured has its reason under each figure, and nothing is divided by zero."""
    lives = {
        "ours": [Life(start_s=2, whole=4), Life(start_s=3, whole=4), Life(start_s=8, whole=4)],
        "theirs": [Life(start_s=1), Life(start_s=3), Life(start_s=2)],
    }
    rows = [
        Row("start", "{:.1f} s", lambda life: life.start_s, "0.1 s"),
        Row("whole", "{:.0f}", lambda life: life.whole),
    ]
    lines = [" ".join(line.split()) for line in report(rows, lives, {"absent": "no compiler"}, "ours")]
    assert lines == [
        "start (limit: 0.1 s)",
        "ours 3.0 s 2.0 s to 8.0 s",
        "theirs 2.0 s 1.0 s to 3.0 s ours over it: 2.00",
        "absent not measured: no compiler",
        "whole",
        "ours 4 4 to 4",
        "theirs 0 0 to 0",
        "absent not measured: no compiler",
    ]


def test_which_llama_cpp_it_is() -> None:
    """Its package counts as llama.cpp's builds do."""
    assert int(llama_cpp_build()) > 10_000
