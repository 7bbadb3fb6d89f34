"""The training text of the starter model, its kept-out questions and its judge."""

import hashlib
import json
import random
import re
from pathlib import Path

import pytest

from service.starter.expand import (
    KEPT_OUT_FILES,
    Question,
    expand_clean,
    expand_questions,
    find_runs,
    read_documentation,
    read_facts,
    read_kept_out,
)
from service.starter.judge import find_faults, is_legible

STARTER = Path(__file__).parents[2] / "service" / "starter"
MAX_FILE_BYTES = 6_000_000
PORTS = re.compile(r"(?:port |PORT=|127\.0\.0\.1:)(\d+)")


@pytest.fixture(scope="module")
def questions() -> tuple[Question, ...]:
    return expand_questions(read_facts(), read_kept_out())


def test_no_kept_out_question_is_in_the_training_text(questions: tuple[Question, ...]) -> None:
    """No kept-out question shares five words in a row with any question, answer or paragraph that is trained on."""
    trained = set().union(*(find_runs(text) for text in read_documentation()))
    for fact in read_facts():
        trained |= find_runs(fact.answer)
    for question in questions:
        trained |= find_runs(question.text)
    for text in read_kept_out():
        assert not find_runs(text) & trained, text


def test_no_kept_out_question_is_trained_on_whole(questions: tuple[Question, ...]) -> None:
    """A kept-out question too short for five words is not a training question either, whatever its case or marks."""
    trained = {" ".join(re.findall(r"\w+", question.text.lower())) for question in questions}
    for text in json.loads(KEPT_OUT_FILES[0].read_text("utf-8")):
        assert " ".join(re.findall(r"\w+", text["question"].lower())) not in trained


def test_system_messages_hold_no_kept_out_question() -> None:
    """What stands around the questions in training is no kept-out question either."""
    words = read_facts()[0].words
    around = [text for name in ("system", "sentence_before", "sentence_after") for text in words[name]]
    trained = set().union(*(find_runs(text) for text in around))
    assert not any(find_runs(text) & trained for text in read_kept_out())


def test_every_fact_is_asked_in_many_wordings() -> None:
    """Each fact has at least a hundred wordings, before anything is put around them or disturbed in them."""
    rng = random.Random(0)
    for fact in read_facts():
        assert len({expand_clean(fact, rng) for _ in range(1500)}) >= 100, fact.id


def test_expansion_is_repeatable(questions: tuple[Question, ...]) -> None:
    """The same text and seed give the same questions in the same order."""
    assert expand_questions(read_facts(), read_kept_out()) == questions


def test_another_seed_gives_other_questions() -> None:
    """The seed is used."""
    facts = read_facts()[:3]
    assert expand_questions(facts, (), share=0.1, seed=1) != expand_questions(facts, (), share=0.1, seed=2)


def test_answers_are_short_legible_and_distinct() -> None:
    """Each answer is at most two lines of printable ASCII that ends like a sentence, and no two facts share one."""
    facts = read_facts()
    for fact in facts:
        assert is_legible(fact.answer), fact.id
        assert len(fact.answer) <= 180, fact.id
    assert len({fact.answer for fact in facts}) == len({fact.id for fact in facts}) == len(facts)


def test_answers_name_no_wrong_port_and_no_wrong_command() -> None:
    """Where an answer names a port it is the default one or the example, and each command named exists."""
    for fact in read_facts():
        assert set(PORTS.findall(fact.answer)) <= {"8080", "9000"}, fact.id
        targets = re.findall(r"(?:Type|Run|example:) make (\w+)", fact.answer)
        assert set(targets) <= {"serve", "test", "bench", "train"}, fact.id
        verbs = re.findall(r"python -m service (\w+)", fact.answer)
        assert set(verbs) <= {"audit", "check", "drain", "keys"}, fact.id


def test_each_test_question_asks_for_a_fact_that_its_answer_holds() -> None:
    """The right answer of the text itself is judged right for every kept-out question."""
    answers = {fact.id: fact.answer for fact in read_facts()}
    for path in KEPT_OUT_FILES:
        for entry in json.loads(path.read_text("utf-8")):
            answer = answers[entry["fact"]]
            assert not find_faults(answer, entry["required"], entry["forbidden"], ended=True), entry["question"]


def test_there_are_thirty_questions_about_as_many_facts() -> None:
    """The final test asks thirty questions, each about another fact."""
    entries = json.loads(KEPT_OUT_FILES[0].read_text("utf-8"))
    assert len(entries) == len({entry["fact"] for entry in entries}) == 30


@pytest.mark.parametrize(
    ("response", "ended", "fault"),
    [
        ("It listens on port 9000.", True, "says none of ['8080']"),
        ("It listens on port 8080 or 9000.", True, "says '9000'"),
        ("It listens on port 8080.", False, "did not end by itself"),
        ("It listens on port 8080 on port 8080, it listens on port 8080.", True, "repeats itself"),
        ("It listens on port 8080 when noth", True, "is not legible"),
        ("", True, "is not legible"),
    ],
)
def test_wrong_answers_are_judged_wrong(response: str, ended: bool, fault: str) -> None:
    """A wrong, a contradicted, an unfinished, a repeated and an illegible answer are each judged wrong."""
    assert fault in find_faults(response, [["8080"]], ["9000"], ended=ended)


def test_right_answer_is_judged_right() -> None:
    """An answer that holds one alternative of each fact, in any case, has no fault."""
    assert find_faults("It listens on Port 8080.", [["8080"], ["port", "socket"]], ["9000"], ended=True) == []


def test_model_file_is_small_and_matches_its_description() -> None:
    """The shipped file has the size and the SHA-256 that stand beside it, and at most 6 MB."""
    description = json.loads((STARTER / "starter.json").read_text("utf-8"))
    content = (STARTER / description["file"]).read_bytes()
    assert len(content) == description["size_bytes"] <= MAX_FILE_BYTES
    assert hashlib.sha256(content).hexdigest() == description["sha256"]


def test_model_file_says_that_it_is_a_starter() -> None:
    """Whoever looks into the file reads that it is a starter which shows that the system works."""
    head = (STARTER / "starter.gguf").read_bytes()[:2000]
    assert b"mini-llm starter" in head
    assert b"starter model that shows that mini-llm works" in head
