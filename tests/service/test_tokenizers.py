"""Texts that a vocabulary's own cutting is worst at, in front of the real service: none costs the engine its life."""

import json
import time
from pathlib import Path

import pytest

from tests.service.harness import Answer, Service, running_service, write_small_model

# What each cuts by is in llama.cpp's llama-vocab.cpp; None is SentencePiece.
PRE_TOKENIZERS = ("llama-bpe", "qwen2", "deepseek-llm", "deepseek-coder", "falcon", "starcoder", "poro-chat", None)
MOST = 1_000_000


def filled(run: str) -> str:
    """As many such runs as a body holds."""
    return run * (MOST // (len(json.dumps(run, ensure_ascii=False).encode()) - 2))


HOSTILE = {
    # Python sees words here, or spaces; the engine sees one run.
    "underscores and signs": filled("_!"),
    "separators": filled("!\x1c"),
    "a letter that is new": filled("a\U0001e4d0"),
    "private use": filled("!\ue000"),
    "colons": filled("ab:"),
    # What runs on just long enough.
    "signs": filled("#" * 50_000 + " "),
    "letters": filled("a" * 50_000 + " "),
    "signs, then lines": filled("#" * 50_000 + "\n" * 10_000),
    # Some vocabularies look from each space to the last one.
    "spaces": filled(" " * 10_000 + "1"),
    "spaces in front of letters": filled(" " * 10_000 + "中"),
    "spaces without end": filled(" "),
    "other spaces": "\u3000" * 49_999 + "1",
    "spaces that do not break": "\xa0" * 49_999 + "1",
    # A token, or several, for each byte.
    "emoji": filled("\U0001f600" * 10_000 + " "),
    "upper case": filled("QZ" * 20 + " "),
}


def ask(service: Service, text: str) -> Answer:
    return service.request(
        "POST", "/generate", json.dumps({"prompt": text, "max_tokens": 1}, ensure_ascii=False).encode()
    )


@pytest.mark.parametrize("pre_tokenizer", PRE_TOKENIZERS)
def test_no_text_ends_the_engine(pre_tokenizer: str | None, tmp_path: Path) -> None:
    """Each is refused in time, by its length or for what it is; the engine lives, and counts what fits as before."""
    model = write_small_model(tmp_path, pre_tokenizer)
    with running_service(model=model) as service:
        for name, text in HOSTILE.items():
            answer = ask(service, text)
            assert answer.status == 400, (name, answer.body[:300])
            assert answer.json["type"].rpartition(":")[2] in ("malformed", "context-exceeded"), (
                name,
                answer.body[:300],
            )
        for letter, longest in {"a": 50_000, "1": 50_000, "!": 50_000, " ": 10_000, "\n": 10_000}.items():
            taken, refused = ask(service, letter * longest), ask(service, letter * 200_000)
            assert taken.json["type"].endswith("context-exceeded"), (letter, taken.json)
            assert refused.json["type"].endswith("malformed"), (letter, refused.json)
        # How much too long is told up to twice the context (of 2,048 tokens).
        little, far = ask(service, "! " * 1500), ask(service, "! " * 15_000)
        assert 3000 < little.json["prompt_tokens"] < 3100
        assert far.json["prompt_tokens"] == 2049
        assert service.metric("llm_engine_restarts_total") == 0
        assert ask(service, "hello").status == 200


@pytest.mark.parametrize("pre_tokenizer", PRE_TOKENIZERS)
def test_no_spaces_that_fit_end_the_engine(pre_tokenizer: str | None, tmp_path: Path) -> None:
    """Where a vocabulary has tokens for runs of spaces, long runs fit: they are answered or refused, and soon."""
    model = write_small_model(tmp_path, pre_tokenizer, longest_space=512)
    with running_service(model=model) as service:
        for runs in (2, 12):
            begun_s = time.monotonic()
            answer = ask(service, (" " * 9_990 + "1") * runs)
            assert time.monotonic() - begun_s < 10, (runs, answer.body[:300])
            assert answer.status == 200 or answer.json["type"].endswith((":malformed", ":context-exceeded"))
        assert service.metric("llm_engine_restarts_total") == 0
