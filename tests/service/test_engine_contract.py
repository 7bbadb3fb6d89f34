"""The engine's contract, held by the real adapter and by the fake alike."""

import importlib
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.engine import gguf
from service.engine.interface import Completion, Engine, GenerationRequest, Message, ModelSpec, Piece, Role, Sampling
from service.errors import EngineFailed, RequestMalformed
from tests.service.harness import FAKE, write_small_model

REAL = "service.engine.gpt4all_adapter"
CONTEXT_LENGTH = 256
GREEDY = Sampling(temperature=0.0)


@pytest.fixture(params=[FAKE, REAL], scope="module")
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    path: Path = write_small_model(tmp_path_factory.mktemp("model"))
    with path.open("rb") as file:
        header = gguf.read_header(file)
    # One thread: two wait for each other at every layer, which takes minutes where other tests have the cores.
    spec = ModelSpec(str(path), "small", "0" * 64, header, CONTEXT_LENGTH, threads=1)
    loaded = importlib.import_module(request.param).load(spec)
    yield loaded
    loaded.close()


def run(
    engine: Engine, text: str, max_tokens: int = 10, sampling: Sampling = GREEDY, system: str | None = None
) -> tuple[list[Piece], Completion]:
    messages = (Message("user", text),) if system is None else (Message("system", system), Message("user", text))
    pieces: list[Piece] = []
    request = GenerationRequest(messages, max_tokens, sampling)
    return pieces, engine.generate(request, pieces.append, lambda tokens: None, lambda: False)


def test_describes_itself(engine: Engine) -> None:
    """What it is, how much fits, and how many requests it takes at once."""
    description = engine.describe()
    assert description.model == "small"
    assert description.context_length == CONTEXT_LENGTH
    assert description.slots >= 1
    assert description.batch_tokens >= 1


def test_counts_are_exact(engine: Engine) -> None:
    """What count_tokens says is what a generation evaluates, for texts of all kinds."""
    texts = ["hi", "two words", "é 漢字 🎉", "<|eot_id|> </s> [INST]", "  spaces  ", "\n\n", "%1 %2", "a" * 50]
    for text in texts:
        for system in (None, "be brief"):
            messages = [Message("user", text)] if system is None else [Message("system", system), Message("user", text)]
            counted = engine.count_tokens(messages)
            _, done = run(engine, text, 1, system=system)
            assert done.prompt_tokens == counted
            assert 0 < done.prefill_tokens <= counted


def test_a_system_message_costs_tokens(engine: Engine) -> None:
    """Every message is in the count."""
    user = Message("user", "hi")
    assert engine.count_tokens([Message("system", "be"), user]) > engine.count_tokens([user])


def test_pieces_carry_growing_counts(engine: Engine) -> None:
    """Pieces are text in order with counts that grow to the completion's."""
    pieces, done = run(engine, "hello there")
    counts = [piece.completion_tokens for piece in pieces]
    assert counts == sorted(counts)
    assert done.completion_tokens == 10
    assert done.finish_reason == "length"
    assert counts[-1] <= 10
    assert all(piece.text for piece in pieces)
    assert done.prefill_s >= 0 <= done.decode_s


def test_greedy_repeats_also_after_other_work(engine: Engine) -> None:
    """Temperature 0 gives the same pieces each time, with a reused prefix or without."""
    first = run(engine, "hello", system="be brief")[0]
    assert run(engine, "hello", system="be brief")[0] == first
    run(engine, "something else", sampling=Sampling(temperature=1.5))
    assert run(engine, "hello", system="be brief")[0] == first


def test_what_was_evaluated_for_one_is_evaluated_anew_for_another(engine: Engine) -> None:
    """Else the time that it takes would tell who else has asked the same."""
    messages = (Message("system", "a text that is somebody's own"), Message("user", "hi"))

    def prefilled(owner: str) -> int:
        request = GenerationRequest(messages, 1, GREEDY, owner=owner)
        return engine.generate(request, lambda piece: None, lambda tokens: None, lambda: False).prefill_tokens

    whole = prefilled("alice")
    if engine.describe().engine == "gpt4all":  # the other one here keeps nothing
        assert prefilled("alice") < whole
    assert prefilled("berta") == whole
    assert prefilled("alice") == whole


@pytest.mark.parametrize("after", [0, 1, 3])
def test_cancel_takes_effect_within_a_token(engine: Engine, after: int) -> None:
    """Once cancelled no further piece comes, and the finish reason says so."""
    pieces: list[Piece] = []
    request = GenerationRequest((Message("user", "hello"),), 100, GREEDY)
    done = engine.generate(request, pieces.append, lambda tokens: None, lambda: len(pieces) >= after)
    assert done.finish_reason == "cancelled"
    assert after <= done.completion_tokens <= after + 8  # a character may be made of several tokens
    assert len(pieces) <= after + 1
    assert run(engine, "hello")[1].finish_reason == "length"


def test_the_last_token_of_the_context_can_be_used(engine: Engine) -> None:
    """Prompt and answer may fill the context to the last token; one more is the engine's refusal, not its silence."""
    room = CONTEXT_LENGTH - engine.count_tokens([Message("user", "hi")])
    assert run(engine, "hi", room)[1].completion_tokens == room
    with pytest.raises(EngineFailed):
        run(engine, "hi", room + 1)


@pytest.mark.parametrize("text", ["a\x00b", "a\ud800b", "\udfff"])
def test_texts_the_engine_cannot_take(engine: Engine, text: str) -> None:
    """NUL and lone surrogates are refused in counting and in generating."""
    with pytest.raises(RequestMalformed):
        engine.count_tokens([Message("user", text)])
    with pytest.raises(RequestMalformed):
        run(engine, text)


def test_counting_works_while_generating(engine: Engine) -> None:
    """Another thread may count at any time."""
    expected = engine.count_tokens([Message("user", "hello")])
    stop = threading.Event()
    counts: set[int] = set()

    def count() -> None:
        while not stop.is_set():
            counts.add(engine.count_tokens([Message("user", "hello")]))

    thread = threading.Thread(target=count)
    thread.start()
    try:
        for _ in range(5):
            assert run(engine, "go on", 100)[1].completion_tokens == 100
    finally:
        stop.set()
        thread.join()
    assert counts == {expected}


def test_failing_callback_is_not_swallowed(engine: Engine) -> None:
    """An exception in the caller's callback ends the generation and comes out, whatever the library does with it."""

    def broken(piece: Piece) -> None:
        raise ValueError("broken callback")

    request = GenerationRequest((Message("user", "hello"),), 20, GREEDY)
    with pytest.raises((ValueError, EngineFailed)):
        engine.generate(request, broken, lambda tokens: None, lambda: False)
    assert run(engine, "hello")[1].completion_tokens == 10


@pytest.mark.parametrize(
    "roles", [("user", "assistant", "user"), ("assistant", "user"), ("user", "assistant", "assistant", "user")]
)
def test_empty_turn_is_counted_and_taken(engine: Engine, roles: tuple[Role, ...]) -> None:
    """An assistant's turn without a word takes its marks and nothing else; the count is what is evaluated."""
    messages = tuple(Message(role, "hi" if role == "user" else "") for role in roles)
    done = engine.generate(GenerationRequest(messages, 3, GREEDY), lambda piece: None, lambda n: None, lambda: False)
    assert done.prompt_tokens == engine.count_tokens(messages)
    assert done.completion_tokens == 3
