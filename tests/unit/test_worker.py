"""What the engine's worker decides before it loads: context length against file and memory; golden answers."""

import itertools
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from service import golden
from service.engine import gguf
from service.engine.chat import ChatTemplate
from service.engine.interface import Completion, GenerationRequest, Message
from service.engine.worker import choose_context_length
from service.errors import MemoryShort, ModelRefused, StateUnwritable
from tests.fake_engine import FakeEngine
from tests.gguf_writer import small_model

HEADER = gguf.read_header(BytesIO(small_model().to_bytes()))
PLENTY = 1 << 40


def test_default_is_all_that_the_file_allows() -> None:
    """With memory in plenty the context is the file's."""
    assert choose_context_length(HEADER, None, PLENTY) == HEADER.context_length


def test_memory_cuts_the_default() -> None:
    """Without a wish the context shrinks to what the memory holds."""
    whole = gguf.required_memory_bytes(HEADER, HEADER.context_length)
    half = gguf.required_memory_bytes(HEADER, HEADER.context_length // 2)
    assert 0 < choose_context_length(HEADER, None, (whole + half) // 2) < HEADER.context_length


def test_wish_is_taken_or_refused_whole() -> None:
    """A context that was asked for is opened as asked or refused, never cut."""
    assert choose_context_length(HEADER, 64, PLENTY) == 64
    with pytest.raises(ModelRefused, match="context ends at"):
        choose_context_length(HEADER, HEADER.context_length + 1, PLENTY)
    with pytest.raises(MemoryShort, match="GB of memory"):
        choose_context_length(HEADER, HEADER.context_length, gguf.required_memory_bytes(HEADER, 64) - 1)


def test_too_big_for_the_memory_is_told_with_figures() -> None:
    """A model that does not fit at all is refused with what it needs and what is free."""
    with pytest.raises(MemoryShort, match=r"needs [0-9.]+ GB of memory .* 0\.00 GB are free"):
        choose_context_length(HEADER, None, 1000)


def test_golden_answer_is_kept_by_digest(tmp_path: Path) -> None:
    """What was recorded for one digest is found by it and by no other."""
    made, _ = golden.record(FakeEngine())
    golden.save_golden(tmp_path, "a" * 64, made)
    assert golden.find_golden(tmp_path, "a" * 64) == made
    assert golden.find_golden(tmp_path, "b" * 64) is None


def test_other_answer_is_refused(tmp_path: Path) -> None:
    """An engine that says anything else than what was recorded is refused."""
    made, _ = golden.record(FakeEngine())
    golden.check(FakeEngine(), made)
    with pytest.raises(ModelRefused, match="golden answer is wrong"):
        golden.check(FakeEngine(), golden.Golden(made.prompt, made.max_tokens, made.response + "."))


def test_a_slow_engine_is_known_by_the_beginning_of_its_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four tokens at least, and each that has come is held against the record; the rest nobody waits for."""
    clock = itertools.count()  # a second goes by between two looks
    monkeypatch.setattr(golden.time, "monotonic", lambda: next(clock))
    answer = golden.Golden("say a b c d e f g h i j k l m n", 16, "a b c d e f g h i j k l m n")
    assert golden.check(FakeEngine(), answer, 100.0).completion_tokens == 14
    assert golden.check(FakeEngine(), answer, 0.0).completion_tokens == 4
    assert 4 < golden.check(FakeEngine(), answer, 6.0).completion_tokens < 14
    for wrong in ("a b c x e f g h i j k l m n", "a b c", ""):
        with pytest.raises(ModelRefused, match="golden answer is wrong"):
            golden.check(FakeEngine(), golden.Golden(answer.prompt, 16, wrong), 0.0)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"prompt": "x"}', '{"prompt": "x", "max_tokens": "many"}'])
def test_unreadable_record_is_refused(tmp_path: Path, text: str) -> None:
    """A damaged record is no record to pass by: it is told."""
    path = golden.golden_path(tmp_path, "a" * 64)
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(ModelRefused, match="record it again"):
        golden.find_golden(tmp_path, "a" * 64)


def test_empty_answer_is_no_golden_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that says nothing is what a damaged one looks like: nothing is recorded."""
    engine = FakeEngine()
    monkeypatch.setattr(golden, "RECORDING_PROMPT", "say")
    with pytest.raises(ModelRefused, match="says nothing"):
        golden.record(engine)


def test_golden_question_is_asked_as_of_one_day(monkeypatch: pytest.MonkeyPatch) -> None:
    """A template may write the date into the prompt; the golden question always tells the same one."""
    engine, told = FakeEngine(), set()
    answer = engine.generate

    def generate(request: GenerationRequest, *callbacks: Any) -> Completion:
        told.add(request.told_time)
        return answer(request, *callbacks)

    monkeypatch.setattr(engine, "generate", generate)
    golden.record(engine)
    (day,) = told
    template = ChatTemplate("{{ strftime_now('%d %b %Y') }} {{ messages[0].content }}", "", "", False)
    assert template.turns([Message("user", "x")], day)[0].prefix == "01 Jan 2026 "
    assert template.turns([Message("user", "x")])[0].prefix != "01 Jan 2026 "


def test_record_that_cannot_be_kept_is_told(tmp_path: Path) -> None:
    """Without room for the record nothing half-written stays, and the path is named."""
    (tmp_path / "golden").write_text("in the way")
    made, _ = golden.record(FakeEngine())
    with pytest.raises(StateUnwritable, match=str(tmp_path / "golden")):
        golden.save_golden(tmp_path, "a" * 64, made)
