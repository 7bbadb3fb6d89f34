"""The starter model in the real engine: what it answers, and that a model can be trained from text to file."""

import hashlib
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.engine import gpt4all_adapter
from service.engine.gguf import read_header
from service.engine.interface import Completion, Engine, GenerationRequest, Message, ModelSpec, Piece, Sampling
from service.starter.judge import find_faults, is_legible, repeats_itself

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
STARTER = ROOT / "service" / "starter" / "starter.gguf"
# Of thirty questions; an answer that is not in the training text's own words would fail all of them.
LEAST_RIGHT = 24
MAX_TOKENS = 120
TRAINING_TIMEOUT_S = 240


def load(path: Path) -> Engine:
    with path.open("rb") as file:
        header = read_header(file)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return gpt4all_adapter.load(
        ModelSpec(str(path), header.name or "", sha256, header, header.context_length, threads=2)
    )


def ask(
    engine: Engine, *messages: Message, max_tokens: int = MAX_TOKENS, temperature: float = 0.0
) -> tuple[str, Completion]:
    pieces: list[Piece] = []
    request = GenerationRequest(messages, max_tokens, Sampling(temperature=temperature))
    completion = engine.generate(request, pieces.append, lambda tokens: None, lambda: False)
    return "".join(piece.text for piece in pieces), completion


@pytest.fixture(scope="module")
def starter() -> Iterator[Engine]:
    engine = load(STARTER)
    yield engine
    engine.close()


def test_answers_questions_it_never_saw(starter: Engine) -> None:
    """Of thirty questions kept out of the training text at least 24 get the right, finished answer at temperature 0."""
    entries = json.loads((Path(__file__).parent / "starter_questions.json").read_text("utf-8"))
    wrong = []
    for entry in entries:
        response, completion = ask(starter, Message("user", entry["question"]))
        ended = completion.finish_reason == "stop"
        faults = find_faults(response, entry["required"], entry["forbidden"], ended=ended)
        if faults:
            wrong.append(f"{entry['question']} -> {response} ({'; '.join(faults)})")
    assert len(entries) - len(wrong) >= LEAST_RIGHT, "\n".join(wrong)


def test_gives_its_golden_answer(starter: Engine) -> None:
    """The answer recorded beside the file is what the engine says, letter by letter."""
    golden = json.loads(STARTER.with_suffix(".json").read_text("utf-8"))["golden"]
    response, _ = ask(starter, Message("user", golden["prompt"]), max_tokens=golden["max_tokens"])
    assert response == golden["response"]


@pytest.mark.parametrize(
    "question",
    [
        "How many strings does a harp have?",
        "Name three rivers in Bolivia",
        "write me a sonnet about my cactus",
        "blorp?",
    ],
)
def test_says_what_it_is_when_asked_anything_else(starter: Engine, question: str) -> None:
    """Asked about something else it says in one finished sentence that it is only the starter model."""
    response, completion = ask(starter, Message("user", question))
    assert "only the starter model" in response
    assert completion.finish_reason == "stop"


def test_stays_legible_at_the_default_temperature(starter: Engine) -> None:
    """With sampling as the service does it by default, answers end by themselves, do not repeat and are legible."""
    for question in ["Tell me the port number", "how can I train you", "and who pays for dinner", "Is there a queue?"]:
        response, completion = ask(starter, Message("user", question), temperature=0.7)
        assert completion.finish_reason == "stop"
        assert is_legible(response)
        assert not repeats_itself(response)


def test_takes_a_system_message_and_several_turns(starter: Engine) -> None:
    """A system message and earlier turns do not keep it from the right answer to the last question."""
    response, completion = ask(
        starter,
        Message("system", "You work at a help desk. Be kind."),
        Message("user", "How do I run the benchmarks?"),
        Message("assistant", "Type make bench: it runs the benchmarks."),
        Message("user", "And how do I run the tests?"),
    )
    assert "make test" in response
    assert completion.finish_reason == "stop"


def test_tiny_model_is_trained_from_text_to_file_and_answers(tmp_path: Path) -> None:
    """A tiny model trained by the script from the same text is loaded by the engine and answers a question."""
    path = tmp_path / "tiny.gguf"
    subprocess.run(
        [sys.executable, "-m", "service.starter.train", "--preset", "tiny", "--out", str(path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
        timeout=TRAINING_TIMEOUT_S,
    )
    description = json.loads(path.with_suffix(".json").read_text("utf-8"))
    assert description["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["tiny.gguf", "tiny.json"]
    engine = load(path)
    try:
        response, completion = ask(engine, Message("user", "Which command runs all the tests?"))
    finally:
        engine.close()
    assert response == "Type make test: it sets everything up and runs every test."
    assert completion.finish_reason == "stop"


def test_interrupted_training_writes_nothing(tmp_path: Path) -> None:
    """Ctrl-C in the middle of the training ends it with status 130 and leaves no file, not even half a one."""
    process = subprocess.Popen(
        [sys.executable, "-m", "service.starter.train", "--preset", "tiny", "--out", str(tmp_path / "tiny.gguf")],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.readline()  # the first line comes when the text is ready and the training begins
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=TRAINING_TIMEOUT_S)
    assert process.returncode == 130
    assert b"interrupted" in errors
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_told_before_the_training(tmp_path: Path) -> None:
    """Not an hour later, when the result would have nowhere to go."""
    out = tmp_path / "missing" / "starter.gguf"
    done = subprocess.run(
        [sys.executable, "-m", "service.starter.train", "--out", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TRAINING_TIMEOUT_S,
    )
    assert done.returncode == 2
    assert f"--out: {out} cannot be written" in done.stderr
    assert done.stdout == ""
