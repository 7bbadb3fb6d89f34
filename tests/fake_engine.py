"""A fake engine, named as one: an adapter module with the same contract as the real one, whose prompts are orders.

It stands where the real engine cannot be made to misbehave on demand or where its cost would hide what is measured. It
answers ``say A B C`` with those words, one token each; other orders: ``pause S`` before each token, ``prefill S`` of
prefill per prompt token, ``abort``, ``fail``, ``hang``, ``abort-at N`` after N tokens. Words are tokens.
"""

import os
import sys
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

from service.engine.interface import Completion, Description, FinishReason, GenerationRequest, Message, ModelSpec, Piece
from service.errors import EngineFailed, MemoryShort, RequestMalformed

MARKS = 2  # tokens that the fake's template puts around each message


class FakeEngine:
    """Implements ``service.engine.interface.Engine``."""

    def __init__(self, context_length: int = 512, slots: int = 1, model: str = "fake", sha256: str = "0" * 64):
        self._description = Description(
            engine="fake",
            engine_version="1",
            model=model,
            sha256=sha256,
            architecture="none",
            quantization="none",
            parameter_count=0,
            context_length=context_length,
            slots=slots,
            threads=1,
            batch_tokens=8,
        )

    def describe(self) -> Description:
        return self._description

    def count_tokens(self, messages: Sequence[Message]) -> int:
        for message in messages:
            if "\x00" in message.content or any("\ud800" <= letter <= "\udfff" for letter in message.content):
                raise RequestMalformed("the text holds NUL or a lone surrogate")
            if message.content == "abort-on-count":
                os.abort()
        return 1 + sum(len(message.content.split()) + MARKS for message in messages)

    def generate(
        self,
        request: GenerationRequest,
        on_piece: Callable[[Piece], None],
        on_prefill: Callable[[int], None],
        cancelled: Callable[[], bool],
    ) -> Completion:
        prompt_tokens = self.count_tokens(request.messages)
        if prompt_tokens + request.max_tokens > self._description.context_length:
            raise EngineFailed("the request does not fit the context")
        words = request.messages[-1].content.split()
        orders = dict(pairwise(words))
        pause_s, prefill_s = float(orders.get("pause", 0)), float(orders.get("prefill", 0))
        abort_at = int(orders.get("abort-at", -1))
        answer = words[words.index("say") + 1 :] if "say" in words else ["word"] * request.max_tokens
        if "abort" in words:
            os.abort()
        if "fail" in words:
            raise EngineFailed("told to fail")
        while "hang" in words:
            time.sleep(0.05)
        started_s = time.monotonic()
        for done in range(0, prompt_tokens, self._description.batch_tokens):
            if prefill_s:
                time.sleep(prefill_s * min(self._description.batch_tokens, prompt_tokens - done))
            on_prefill(done)
            if cancelled():
                return self._complete("cancelled", prompt_tokens, 0, started_s, time.monotonic())
        decode_s = time.monotonic()
        for index, word in enumerate(answer[: request.max_tokens]):
            if index == abort_at:
                os.abort()
            if pause_s:  # even a sleep of nothing costs 60 µs, and this engine is to cost none
                time.sleep(pause_s)
            if cancelled():
                return self._complete("cancelled", prompt_tokens, index, started_s, decode_s)
            on_piece(Piece(word if index == 0 else f" {word}", index + 1))
        made = min(len(answer), request.max_tokens)
        finish: FinishReason = "length" if made == request.max_tokens else "stop"
        return self._complete(finish, prompt_tokens, made, started_s, decode_s)

    @staticmethod
    def _complete(finish: FinishReason, prompt_tokens: int, made: int, started_s: float, decode_s: float) -> Completion:
        return Completion(finish, prompt_tokens, made, prompt_tokens, decode_s - started_s, time.monotonic() - decode_s)

    def close(self) -> None:
        pass


def load(spec: ModelSpec) -> FakeEngine:
    """Like the real adapter's; a model named ``abort-at-load`` ends the process, one named like a file waits for it."""
    if spec.name.startswith("/") and Path(spec.name).exists():
        raise MemoryShort("told to be short of memory while that file is there")
    if spec.name == "abort-at-load":
        print("GGML_ASSERT: told to abort", file=sys.stderr, flush=True)
        os.abort()
    return FakeEngine(spec.context_length, model=spec.name, sha256=spec.sha256)
