"""Owns golden answers: a short prompt and the exact text that a healthy model gives to it at temperature 0.

An answer is recorded once, in a step of its own (``python -m service record``), and checked at each start of the
engine; the start that checks never records. The starter's stands beside it in the tree; all others in the state
folder, one file a model, named by its SHA-256, so that another model cannot pass by this one's answer.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from service.engine.interface import Completion, Engine, GenerationRequest, Message, Piece, Sampling
from service.errors import ModelRefused, StateUnwritable

STARTER_RECORD = Path(__file__).parent / "starter" / "starter.json"
RECORDING_PROMPT = "Name three colours."
_ASKED_ON = datetime(2026, 1, 1)
RECORDING_MAX_TOKENS = 16
# An 8B model takes 6 s for all of them on two cores, in which a node that has just started serves nobody. Each token
# comes of all weights, so a few tell damage too.
START_CHECK_S = 1.0
_FEWEST_TOKENS = 4


@dataclass(frozen=True)
class Golden:
    """``response`` is what the model must say to ``prompt`` within ``max_tokens``."""

    prompt: str
    max_tokens: int
    response: str


def golden_path(state_dir: Path, sha256: str) -> Path:
    """Where the answer of the model with this digest is kept."""
    return state_dir / "golden" / f"{sha256}.json"


def find_golden(state_dir: Path, sha256: str) -> Golden | None:
    """The recorded answer, or None if there is none yet. Raises ModelRefused if the record cannot be read."""
    starter = json.loads(STARTER_RECORD.read_text()) if STARTER_RECORD.exists() else {}
    path = golden_path(state_dir, sha256)
    try:
        record = starter["golden"] if starter.get("sha256") == sha256 else json.loads(path.read_text())
        return Golden(str(record["prompt"]), int(record["max_tokens"]), str(record["response"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelRefused(f"the golden answer in {path} cannot be read ({error}); record it again") from error


def save_golden(state_dir: Path, sha256: str, golden: Golden) -> Path:
    """Writes a record whole or not at all, and returns its path. Raises StateUnwritable."""
    path = golden_path(state_dir, sha256)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        temporary.write_text(json.dumps(asdict(golden), indent=1) + "\n")
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise StateUnwritable(f"the golden answer cannot be kept in {path}: {error.strerror}") from error
    return path


def ask(
    engine: Engine, prompt: str, max_tokens: int, enough: Callable[[int], bool] = lambda tokens: False
) -> tuple[str, Completion]:
    """What the engine answers at temperature 0, and what it took; no more once ``enough`` says so of the tokens so far.

    Always asked as of the same day: some templates write the date into the prompt, and the answer would change with it.
    """
    pieces: list[Piece] = []
    request = GenerationRequest((Message("user", prompt),), max_tokens, Sampling(temperature=0.0), _ASKED_ON)
    completion = engine.generate(
        request, pieces.append, lambda tokens: None, lambda: bool(pieces) and enough(pieces[-1].completion_tokens)
    )
    return "".join(piece.text for piece in pieces), completion


def check(engine: Engine, golden: Golden, longest_s: float | None = None) -> Completion:
    """Raises ModelRefused if the engine's answer is not the recorded one, letter by letter; returns what it took.

    Where the answer takes longer than ``longest_s``, what has come by then is checked, of four tokens at least.
    """
    begin_s = time.monotonic()

    def enough(tokens: int) -> bool:
        return longest_s is not None and tokens >= _FEWEST_TOKENS and time.monotonic() - begin_s > longest_s

    answer, completion = ask(engine, golden.prompt, golden.max_tokens, enough)
    expected = golden.response
    if completion.finish_reason == "cancelled":
        expected = expected[: len(answer)]
    if answer != expected:
        raise ModelRefused(f"the model's golden answer is wrong: recorded {expected[:60]!r}, now {answer[:60]!r}")
    return completion


def record(engine: Engine) -> tuple[Golden, Completion]:
    """Asks twice and returns the answer and what it took.

    Raises ModelRefused if the model says nothing, or contradicts itself at temperature 0.
    """
    answer, _ = ask(engine, RECORDING_PROMPT, RECORDING_MAX_TOKENS)
    if not answer.strip():
        raise ModelRefused(f"the model says nothing to {RECORDING_PROMPT!r}, which is no answer to know it by")
    golden = Golden(RECORDING_PROMPT, RECORDING_MAX_TOKENS, answer)
    return golden, check(engine, golden)
