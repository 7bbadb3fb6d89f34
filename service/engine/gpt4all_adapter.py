"""Owns gpt4all: the one module that imports it, and the place where its traps end.

The traps (gpt4all 2.8.2; its source is gpt4all-backend/llmodel_shared.cpp and llamamodel.cpp) and what is done:

- ``generate()`` evaluates the prompt with n_batch 8 and decodes a blank line more at the end: ``prompt_model`` is
  called with a template that ends in ``%2``.
- The file's chat template is ignored by the library: it is rendered by ``chat`` and given turn by turn, because only
  the text put for ``%1`` is left unparsed for control tokens.
- A prompt over the context comes back as an answer in English (token -1), an overflow drops three quarters of the
  context: ``count_tokens`` is exact, the caller refuses before, and the context is opened a little larger than
  announced because the library keeps 4 tokens for itself.
- An exception in a callback is swallowed by ctypes and the generation goes on: callbacks keep it and stop.
- Only the one ``eos`` token ends a generation: the other end-of-turn tokens of the vocabulary are watched here.
- Control tokens are printed as text: they are left out of the answer.
- Pieces may end inside a UTF-8 character: decoded incrementally here, invalid bytes become U+FFFD.
- Some stop strings are built in ("### Human" and the like) and cannot be switched off: such an answer ends with "stop".
- An unbroken run of some 25,000 letters overflows the stack of a usual thread with Qwen's vocabulary: runs are bounded.
- A megabyte takes some vocabularies seconds to cut, DeepSeek's minutes: what cannot fit is told after its first pieces.
- NUL ends a prompt early, a lone surrogate hangs the library: both are refused before (``schema``), and again here.
- Two threads in one instance abort the process: there is one slot.
"""

import codecs
import ctypes
import re
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

from gpt4all._pyllmodel import LLModel

from service.engine.chat import ChatTemplate, Turn
from service.engine.interface import (
    Completion,
    Description,
    FinishReason,
    GenerationRequest,
    Message,
    ModelSpec,
    Piece,
)
from service.errors import EngineFailed, ModelRefused, RequestMalformed

# "cpu" is refused by LLModel; the library called kompute is the one that computes on the CPU when no GPU is named.
_BACKEND = "kompute"
# The library refuses a prompt longer than its context less 4 tokens.
_RESERVED_TOKENS = 8
# Prefill of a 0.5B, 292 tokens, by batch (two cores, medians of 3): 8: 2.44 s, 32: 1.99, 64: 1.90, 96: 1.93, 128: 2.16.
_LARGEST_BATCH_TOKENS = 64
_SMALLEST_BATCH_TOKENS = 4
_REPEAT_LAST_N = 64
# The tokenizer takes stack (some vocabularies) or time (others) for each character of an unbroken run. What runs on
# differs (letters alone; all but letters, digits and spaces; all but spaces and some signs: llama-vocab.cpp), and goes
# by tables of Unicode that are not Python's. So a space of ASCII alone is sure to end a run, and a run of spaces holds
# what anybody takes for them. 10,000 take DeepSeek's first vocabulary 2 to 4 s, four times that for twice as many.
_LONGEST_RUN = 50_000
_LONGEST_SPACE = 10_000
_RUNS = ((re.compile(r"[^ \t\n\v\f\r]+"), _LONGEST_RUN), (re.compile(r"\s+"), _LONGEST_SPACE))
# Cut where the vocabularies cut too, before a space, a text has the tokens of its pieces but for a few. Runs of spaces
# stay whole: where the time goes by the square of their length, pieces of them would take less than the text itself.
_PIECE_CHARACTERS = 8192
_PIECE = re.compile(rf"(?s).{{1,{_PIECE_CHARACTERS}}}\s*\S*")
# Of processor time, for the pieces; the text itself takes as long again. An ordinary megabyte takes 0.2 to 1 s.
_LONGEST_COUNT_S = 2.5
_PLACEHOLDER = re.compile(r"%[12](?![0-9])")
_UNPARSED = re.compile("[\x00\ud800-\udfff]")
# Attributes of a token: llama.cpp's enum llama_token_attr (unknown, control, user-defined).
_SPECIAL_ATTRIBUTES = (1 << 0) | (1 << 3) | (1 << 4)


def batch_tokens(weights_bytes: int, threads: int) -> int:
    """Tokens evaluated at once in the prefill: as many as last about 0.8 s, the time in which a cancel waits.

    Prefill is compute-bound: measured tokens/s times gigabytes of weights is about 30 on two cores for models of 0.5B
    to 8B (75 x 0.35, 40 x 0.77, 6.3 x 4.66), so 12 a thread is on the safe side. A constant of file and machine, not
    measured at run time: the same prompt is then always cut into the same batches, and greedy answers repeat.
    """
    per_second = 12e9 * threads / max(1, weights_bytes)
    batch = int(max(_SMALLEST_BATCH_TOKENS, min(_LARGEST_BATCH_TOKENS, 0.8 * per_second)))
    return batch if batch < 8 else batch // 8 * 8


def _has_long_run(text: str) -> bool:
    return any(run.end() - run.start() > longest for pattern, longest in _RUNS for run in pattern.finditer(text))


class _ModelParams(ctypes.Structure):
    """``llama_model_params`` as of gpt4all 2.8.2 (llama.h): 64 bytes, passed by value."""

    _fields_ = [
        ("n_gpu_layers", ctypes.c_int32),
        ("split_mode", ctypes.c_int32),
        ("main_gpu", ctypes.c_int32),
        ("tensor_split", ctypes.c_void_p),
        ("rpc_servers", ctypes.c_void_p),
        ("progress_callback", ctypes.c_void_p),
        ("progress_callback_user_data", ctypes.c_void_p),
        ("kv_overrides", ctypes.c_void_p),
        ("vocab_only", ctypes.c_bool),
        ("use_mmap", ctypes.c_bool),
        ("use_mlock", ctypes.c_bool),
        ("check_tensors", ctypes.c_bool),
    ]


class _Tokenizer:
    """The library's own tokenizer on a second handle that holds the vocabulary alone.

    Counting never touches the handle that generates, so it may run in another thread meanwhile.
    """

    def __init__(self, path: str):
        library = ctypes.CDLL(_loaded_llama_library())
        library.llama_model_default_params.restype = _ModelParams
        library.llama_load_model_from_file.argtypes = [ctypes.c_char_p, _ModelParams]
        library.llama_load_model_from_file.restype = ctypes.c_void_p
        library.llama_free_model.argtypes = [ctypes.c_void_p]
        library.llama_token_get_attr.argtypes = [ctypes.c_void_p, ctypes.c_int32]
        library.llama_tokenize_gpt4all.argtypes = [
            ctypes.c_void_p,
            ctypes.c_char_p,
            ctypes.c_int32,
            ctypes.POINTER(ctypes.c_int32),
            ctypes.c_int32,
            ctypes.c_bool,
            ctypes.c_bool,
            ctypes.c_bool,
        ]
        params = library.llama_model_default_params()
        params.vocab_only = True
        self._library = library
        self._vocabulary = library.llama_load_model_from_file(path.encode(), params)
        if not self._vocabulary:
            raise ModelRefused("the engine cannot read the model's vocabulary")

    def count(self, turns: Sequence[Turn], context_length: int) -> int:
        """Tokens of a conversation, cut where the engine cuts it (``LLamaModel::tokenize``).

        Exact wherever it fits the context, and up to twice that or 8,192 tokens more, so that people see how much too
        long a text is; of a longer one it is context_length + 1, without looking at the rest. Raises RequestMalformed
        for a text that cannot be cut in time.
        """
        too_many = context_length + max(context_length // 8, min(context_length, 8192)) + 64
        ends_s = time.thread_time() + _LONGEST_COUNT_S
        count, last = 0, -1
        for turn in turns:
            segments = [(turn.prefix, True), (turn.text, False), (turn.suffix, True)]
            for index, (text, parse_special) in enumerate(segments):
                if not text and index != 1:
                    continue  # the engine leaves out empty marks, but not an empty text
                if count + self._count_pieces(text, too_many - count, ends_s) > too_many:
                    return context_length + 1
                at_start = last == -1
                tokens = self._tokenize(text, at_start, parse_special, at_start or self._is_special(last))
                count += len(tokens)
                last = tokens[-1] if tokens else last
        return count

    def _count_pieces(self, text: str, enough: int, ends_s: float) -> int:
        """About the tokens of a long text, 0 of a short one; looks no further once there are more than ``enough``.

        Raises RequestMalformed once this thread's processor time is past ``ends_s``.
        """
        count = 0
        for piece in _PIECE.finditer(text) if len(text) > _PIECE_CHARACTERS else ():
            count += len(self._tokenize(piece[0], False, False, False))
            if count > enough:
                return count
            if time.thread_time() > ends_s:
                break
        if time.thread_time() > ends_s:
            raise RequestMalformed("the text takes this model's tokenizer too long: it has too many spaces in a row")
        return count

    def _is_special(self, token: int) -> bool:
        return bool(self._library.llama_token_get_attr(self._vocabulary, token) & _SPECIAL_ATTRIBUTES)

    def _tokenize(self, text: str, add_special: bool, parse_special: bool, insert_space: bool) -> list[int]:
        encoded = text.encode()
        buffer = (ctypes.c_int32 * (len(encoded) + 4))()
        count = self._library.llama_tokenize_gpt4all(
            self._vocabulary,
            encoded,
            len(encoded),
            buffer,
            len(buffer),
            add_special,
            parse_special,
            insert_space,
        )
        if count < 0:
            raise EngineFailed(f"the tokenizer needs room for {-count} tokens where {len(buffer)} must do")
        return buffer[:count]

    def close(self) -> None:
        self._library.llama_free_model(self._vocabulary)


def _loaded_llama_library() -> str:
    """Path of the llama.cpp library that LLModel picked for this CPU (with AVX2 or without)."""
    with Path("/proc/self/maps").open() as maps:
        for line in maps:
            path = line.rstrip("\n").partition("/")[1:]
            if "libllamamodel-" in path[1] and "cuda" not in path[1]:
                return "".join(path)
    raise ModelRefused("gpt4all did not load its CPU library")


class _Model(LLModel):  # type: ignore[misc]  # gpt4all has no types, so its classes are Any
    """LLModel with raw callbacks: bytes of a token instead of half-decoded text, and a prefill that can be stopped."""

    on_prefill_token: Callable[[int], bool] = staticmethod(lambda token: True)

    def _prompt_callback(self, token_id: int) -> bool:
        return self.on_prefill_token(token_id)

    def _callback_decoder(self, callback: Callable[[int, bytes], bool]) -> Callable[[int, bytes], bool]:
        return callback


class Gpt4AllEngine:
    """One model in gpt4all; implements ``interface.Engine`` with one slot."""

    def __init__(self, spec: ModelSpec):
        header = spec.header
        self._chat = ChatTemplate(header.chat_template, header.bos_token, header.eos_token, header.add_bos)
        self._end_tokens, self._control_tokens = header.end_token_ids, header.control_token_ids
        batch = batch_tokens(header.weights_bytes, spec.threads)
        try:
            self._model = _Model(spec.path, spec.context_length + _RESERVED_TOKENS, 0, _BACKEND)
            if not self._model.load_model():
                raise ModelRefused("the engine cannot load this model")
            self._model.set_thread_count(spec.threads)
        except RuntimeError as error:
            raise ModelRefused(f"the engine cannot load this model: {error}") from error
        self._tokenizer = _Tokenizer(spec.path)
        self._evaluated: list[tuple[Turn, int]] = []  # leading turns in the cache, with n_past after each
        self._owner = ""  # who they are of
        self._description = Description(
            engine="gpt4all",
            engine_version=version("gpt4all"),
            model=spec.name,
            sha256=spec.sha256,
            architecture=header.architecture,
            quantization=header.quantization,
            parameter_count=header.parameter_count,
            context_length=spec.context_length,
            slots=1,
            threads=spec.threads,
            batch_tokens=batch,
        )

    def describe(self) -> Description:
        return self._description

    def count_tokens(self, messages: Sequence[Message]) -> int:
        return self._tokenizer.count(self._turns(messages), self._description.context_length)

    def generate(
        self,
        request: GenerationRequest,
        on_piece: Callable[[Piece], None],
        on_prefill: Callable[[int], None],
        cancelled: Callable[[], bool],
    ) -> Completion:
        turns = self._turns(request.messages, request.told_time)
        prompt_tokens = self._tokenizer.count(turns, self._description.context_length)
        if prompt_tokens + request.max_tokens > self._description.context_length:
            raise EngineFailed("the request does not fit the context; it should have been refused before")
        return _Generation(self, request, turns, prompt_tokens, on_piece, on_prefill, cancelled).run()

    def close(self) -> None:
        self._tokenizer.close()
        self._model.close()

    def _turns(self, messages: Sequence[Message], told_time: datetime | None = None) -> list[Turn]:
        for message in messages:
            if _UNPARSED.search(message.content):
                raise RequestMalformed("the text holds NUL or a lone surrogate, which the engine cannot take")
            if len(message.content) > _LONGEST_SPACE and _has_long_run(message.content):
                raise RequestMalformed(
                    f"the text holds more than {_LONGEST_RUN} characters without a space or a line break, or more than "
                    f"{_LONGEST_SPACE} of those in a row, which the engine cannot take"
                )
        turns = self._chat.turns(messages, told_time)
        if any(_PLACEHOLDER.search(turn.prefix + turn.suffix) for turn in turns):
            raise RequestMalformed("this model's chat template holds %1 or %2, which the engine cannot take")
        return turns


class _Generation:
    """One run through ``prompt_model``, turn by turn, with what its callbacks gather."""

    def __init__(
        self,
        engine: Gpt4AllEngine,
        request: GenerationRequest,
        turns: list[Turn],
        prompt_tokens: int,
        on_piece: Callable[[Piece], None],
        on_prefill: Callable[[int], None],
        cancelled: Callable[[], bool],
    ):
        self._engine, self._request, self._turns, self._prompt_tokens = engine, request, turns, prompt_tokens
        self._on_piece, self._on_prefill, self._cancelled = on_piece, on_prefill, cancelled
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._prefilled = 0
        self._completed = 0
        self._finish: FinishReason | None = None
        self._error: BaseException | None = None
        self._prefill_end_s = 0.0

    def run(self) -> Completion:
        engine = self._engine
        model = engine._model
        if engine._owner != self._request.owner:
            engine._owner, engine._evaluated = self._request.owner, []
        reused, n_past = self._reusable_turns()
        del engine._evaluated[reused:]
        model.on_prefill_token = self._take_prefill_token
        started_s = time.monotonic()
        try:
            for index in range(reused, len(self._turns)):
                last = index == len(self._turns) - 1
                self._prompt(self._turns[index], n_past, self._request.max_tokens if last else 0)
                if self._error is not None:
                    raise EngineFailed("the generation failed in its callback") from self._error
                if self._finish == "cancelled":
                    break
                n_past = model.context.n_past
                if not last:
                    engine._evaluated.append((self._turns[index], n_past))
        finally:
            del model.on_prefill_token
        ended_s = time.monotonic()
        if self._finish is None:
            if self._prefilled + self._reused_tokens != self._prompt_tokens:
                raise EngineFailed(
                    f"the engine evaluated {self._prefilled + self._reused_tokens} prompt tokens "
                    f"of {self._prompt_tokens}"
                )
            self._finish = "length" if self._completed >= self._request.max_tokens else "stop"
        rest = self._decoder.decode(b"", final=True)
        if rest and self._finish != "cancelled":
            self._on_piece(Piece(rest, self._completed))
        prefill_end_s = self._prefill_end_s or ended_s
        return Completion(
            finish_reason=self._finish,
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._completed,
            prefill_tokens=self._prefilled,
            prefill_s=prefill_end_s - started_s,
            decode_s=ended_s - prefill_end_s,
        )

    def _reusable_turns(self) -> tuple[int, int]:
        """How many leading turns the cache still holds, and n_past after them; the last turn is always evaluated."""
        evaluated = self._engine._evaluated
        reused = 0
        for (cached, _), turn in zip(evaluated, self._turns[:-1], strict=False):
            if cached != turn:
                break
            reused += 1
        self._reused_tokens = evaluated[reused - 1][1] if reused else 0
        return reused, self._reused_tokens

    def _prompt(self, turn: Turn, n_past: int, n_predict: int) -> None:
        model, sampling = self._engine._model, self._request.sampling
        if model.context is not None:
            model.context.n_past = n_past
        model.prompt_model(
            turn.text,
            f"{turn.prefix}%1{turn.suffix}%2",
            self._take_token,
            n_predict=n_predict,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            temp=sampling.temperature,
            n_batch=self._engine._description.batch_tokens,
            repeat_penalty=sampling.repeat_penalty,
            repeat_last_n=_REPEAT_LAST_N,
            reset_context=n_past == 0,
        )

    def _take_prefill_token(self, token: int) -> bool:
        try:
            self._prefilled += 1
            # The library calls back for each token of a batch once the batch is evaluated.
            if self._prefilled % self._engine._description.batch_tokens == 0:
                self._on_prefill(self._prefilled)
            self._prefill_end_s = time.monotonic()
            return self._go_on()
        except BaseException as error:
            self._error = error
            return False

    def _take_token(self, token: int, raw: bytes) -> bool:
        try:
            if token < 0:
                raise EngineFailed(raw.decode(errors="replace"))
            if token in self._engine._end_tokens:
                self._finish = "stop"
                return False
            if not self._go_on():
                return False
            self._completed += 1
            text = "" if token in self._engine._control_tokens else self._decoder.decode(raw)
            if text:
                self._on_piece(Piece(text, self._completed))
            return True
        except BaseException as error:
            self._error = error
            return False

    def _go_on(self) -> bool:
        if self._cancelled():
            self._finish = "cancelled"
            return False
        return True


def load(spec: ModelSpec) -> Gpt4AllEngine:
    """Loads a verified model. Raises ModelRefused if the library will not have it."""
    return Gpt4AllEngine(spec)
