"""Owns the training text: it reads the facts and turns their patterns into many distinct questions, by a fixed seed."""

import json
import random
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

TEXT_FOLDER = Path(__file__).parent / "text"
# Questions that are asked in tests. Nothing that shares RUN_WORDS words in a row with one of them is trained on.
KEPT_OUT_FILES = tuple(
    Path(__file__).parents[2] / "tests" / "service" / name
    for name in ("starter_questions.json", "starter_dev_questions.json")
)
RUN_WORDS = 5
SEED = 20261124

# Questions for each fact. What is not about mini-llm has no end of wordings, so it gets more of them.
QUESTIONS_PER_FACT = 1100
MORE_QUESTIONS = {"off_topic": 9000, "calculate": 2500, "write_something": 3500, "gibberish": 2500}
# A question with some of its words lost, swapped or mistyped still has its answer; this share of them is.
NOISY_SHARE = 0.35

Words = Mapping[str, tuple[str, ...]]
Run = tuple[str, ...]


@dataclass(frozen=True)
class Fact:
    """One thing the model is to know.

    ask holds patterns of questions, topic patterns of noun phrases, keys words that point to this fact by themselves.
    A pattern chooses among {one|two|} and takes a random entry of the list named by <word>.
    """

    id: str
    answer: str
    ask: tuple[str, ...]
    topic: tuple[str, ...]
    keys: tuple[str, ...]
    words: Words


@dataclass(frozen=True)
class Question:
    """One question of the training text, as the user's message, and the fact that answers it."""

    text: str
    fact: Fact


def read_facts(folder: Path = TEXT_FOLDER) -> tuple[Fact, ...]:
    """Return the facts of every file of the folder, files in alphabetical order."""
    common = _read_words(tomllib.loads((folder / "words.toml").read_text("utf-8")))
    facts = []
    for path in sorted(folder.glob("*.toml")):
        if path.name == "words.toml":
            continue
        table = tomllib.loads(path.read_text("utf-8"))
        words = {**common, **_read_words(table.get("words", {}))}
        for entry in table["fact"]:
            facts.append(
                Fact(
                    id=entry["id"],
                    answer=entry["answer"],
                    ask=tuple(entry["ask"]),
                    topic=tuple(entry["topic"]),
                    keys=tuple(entry.get("keys", ())),
                    words=words,
                )
            )
    return tuple(facts)


def read_documentation(folder: Path = TEXT_FOLDER) -> tuple[str, ...]:
    """Return the paragraphs of the documentation."""
    return tuple((folder / "documentation.md").read_text("utf-8").strip().split("\n\n"))


def read_kept_out(paths: Iterable[Path] = KEPT_OUT_FILES) -> tuple[str, ...]:
    """Return the questions that must stay out of the training text."""
    return tuple(entry["question"] for path in paths for entry in json.loads(path.read_text("utf-8")))


def find_runs(text: str) -> set[Run]:
    """Return every run of RUN_WORDS words of the text, in lower case and without punctuation."""
    words = re.findall(r"[a-z0-9_']+", text.lower())
    return {tuple(words[i : i + RUN_WORDS]) for i in range(len(words) - RUN_WORDS + 1)}


def expand_pattern(pattern: str, words: Words, rng: random.Random) -> str:
    """Return one random wording of the pattern."""
    while True:
        pattern, named = re.subn(r"<(\w+)>", lambda m: rng.choice(words[m[1]]), pattern)
        pattern, chosen = re.subn(r"\{([^{}]*)\}", lambda m: rng.choice(m[1].split("|")), pattern)
        if not named and not chosen:
            return " ".join(pattern.split())


def expand_clean(fact: Fact, rng: random.Random) -> str:
    """Return one random question for the fact, in lower case, with nothing around it and nothing wrong with it."""
    if fact.topic and rng.random() < 0.25:
        phrase = expand_pattern(rng.choice(fact.topic), fact.words, rng)
        return rng.choice(fact.words["about"]) + phrase if rng.random() < 0.7 else phrase
    # A pattern with more choices stands for more questions, so it is taken more often.
    weights = [len(pattern) for pattern in fact.ask]
    return expand_pattern(rng.choices(fact.ask, weights)[0], fact.words, rng)


def expand_question(fact: Fact, rng: random.Random) -> str:
    """Return one random question for the fact, dressed up the way that people write."""
    if fact.keys and rng.random() < 0.25:
        text = _scatter_keys(fact, rng)
    else:
        text = expand_clean(fact, rng)
        if rng.random() < 0.2:
            text = rng.choice(fact.words["before"]) + text
        if rng.random() < 0.15:
            text += rng.choice(fact.words["after"])
    if rng.random() < NOISY_SHARE:
        text = _disturb(text, fact.words["filler"], rng)
    style = rng.random()
    if style < 0.55:
        text = text[:1].upper() + text[1:]
    elif style < 0.57:
        text = text.upper()
    text += rng.choices(("?", "", ".", "!", " ?"), (50, 38, 8, 2, 2))[0]
    if rng.random() < 0.1:
        text = rng.choice(fact.words["sentence_before"]) + " " + text
    if rng.random() < 0.07:
        text += " " + rng.choice(fact.words["sentence_after"])
    return text


def expand_questions(
    facts: Iterable[Fact], kept_out: Iterable[str], share: float = 1.0, seed: int = SEED
) -> tuple[Question, ...]:
    """Return the whole training text: distinct questions, none sharing RUN_WORDS words in a row with a kept-out one.

    share scales the number of questions. The same arguments give the same questions in the same order.
    """
    forbidden = set().union(*(find_runs(text) for text in kept_out))
    questions = []
    for fact in facts:
        # Each fact has its own stream, so that a change to one leaves the questions of the others alone.
        rng = random.Random(f"{seed} {fact.id}")  # noqa: S311 - nothing secret
        wanted = int(share * MORE_QUESTIONS.get(fact.id, QUESTIONS_PER_FACT))
        seen: dict[str, None] = {}
        for _ in range(3 * wanted):
            text = expand_question(fact, rng)
            if text and not find_runs(text) & forbidden:
                seen[text] = None
            if len(seen) == wanted:
                break
        questions += [Question(text, fact) for text in seen]
    return tuple(questions)


def _read_words(table: Mapping[str, list[str]]) -> Words:
    return {name: tuple(entries) for name, entries in table.items()}


def _scatter_keys(fact: Fact, rng: random.Random) -> str:
    """Return key words among words that point nowhere: it teaches which words of a question count."""
    parts = rng.sample(fact.keys, rng.choices((1, 2), (70, 30))[0])
    for _ in range(rng.choice((0, 1, 2, 3, 4, 5, 6))):
        parts.insert(rng.randrange(len(parts) + 1), rng.choice(fact.words["filler"]))
    return " ".join(parts)


def _disturb(text: str, filler: tuple[str, ...], rng: random.Random) -> str:
    """Return the text with some words dropped, swapped, mistyped or added."""
    words = text.split()
    kept = [word for word in words if rng.random() > 0.1] or words
    for i in range(len(kept) - 1):
        if rng.random() < 0.07:
            kept[i], kept[i + 1] = kept[i + 1], kept[i]
    for i, word in enumerate(kept):
        if len(word) > 3 and rng.random() < 0.05:
            at = rng.randrange(1, len(word))
            kept[i] = rng.choice((word[:at] + word[at + 1 :], word[:at] + word[at - 1] + word[at:]))
    if rng.random() < 0.5:
        kept.insert(rng.randrange(len(kept) + 1), rng.choice(filler))
    return " ".join(kept)
