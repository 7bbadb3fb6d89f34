"""Owns the words that every engine speaks: its records and the five calls that the worker makes on it.

An *adapter module* offers ``load(spec) -> Engine``; nothing outside it may know which library is underneath, nor
assume how many requests it can run side by side: ``Description.slots`` says so.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal, Protocol

from service.engine.gguf import GgufHeader

Role = Literal["system", "user", "assistant", "text"]
FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; ``content`` is plain text and never becomes a control token.

    A lone message of the role ``text`` is no conversation: the engine goes on from it, outside any chat template.
    """

    role: Role
    content: str


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; ``temperature`` 0 is greedy and repeatable."""

    temperature: float = 0.7
    top_p: float = 0.95
    top_k: int = 40
    min_p: float = 0.0
    repeat_penalty: float = 1.0


@dataclass(frozen=True)
class GenerationRequest:
    """What one slot works on; prompt and ``max_tokens`` together fit the context (the caller has counted).

    ``told_time`` is the date that a chat template may write into the prompt; None stands for now. ``owner`` is whose it
    is: what was evaluated for one is not taken for another, who would see by the time what others ask.
    """

    messages: tuple[Message, ...]
    max_tokens: int
    sampling: Sampling
    told_time: datetime | None = None
    owner: str = ""


@dataclass(frozen=True)
class Piece:
    """A piece of the answer: whole characters only; ``completion_tokens`` counts all tokens made so far."""

    text: str
    completion_tokens: int


@dataclass(frozen=True)
class Completion:
    """How a generation ended; durations in seconds, ``prefill_tokens`` those really evaluated (not reused)."""

    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    prefill_tokens: int
    prefill_s: float
    decode_s: float


@dataclass(frozen=True)
class ModelSpec:
    """A model that was verified and may be loaded: ``path`` leads to that very file, whatever its name says."""

    path: str
    name: str
    sha256: str
    header: GgufHeader
    context_length: int
    threads: int


@dataclass(frozen=True)
class Description:
    """What runs: reported by ``/version`` and used by the scheduler (``slots``)."""

    engine: str
    engine_version: str
    model: str
    sha256: str
    architecture: str
    quantization: str
    parameter_count: int
    context_length: int
    slots: int
    threads: int
    batch_tokens: int


class Engine(Protocol):
    """One loaded model.

    ``generate`` runs in up to ``describe().slots`` threads at once; ``count_tokens`` may be called from
    another thread meanwhile.
    """

    def describe(self) -> Description: ...

    def count_tokens(self, messages: Sequence[Message]) -> int:
        """Number of prompt tokens, control tokens and BOS included, told without evaluation.

        Exact where they fit the context; of a prompt that does not, it may be any number above the context's length
        that is not too large. Raises RequestMalformed if the model's chat template has no place for these messages, or
        the library cannot take their text.
        """
        ...

    def generate(
        self,
        request: GenerationRequest,
        on_piece: Callable[[Piece], None],
        on_prefill: Callable[[int], None],
        cancelled: Callable[[], bool],
    ) -> Completion:
        """Runs one request, calling ``on_prefill(tokens)`` per batch and ``on_piece`` per piece.

        ``cancelled`` is asked at every token and at every batch of the prefill; once it says yes the call returns with
        finish reason ``cancelled``. Raises EngineFailed if the library did not do what it was asked.
        """
        ...

    def close(self) -> None: ...
