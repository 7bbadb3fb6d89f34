"""Owns the reading of a GGUF header within bounds, and refuses every file that the engine must not touch.

The engine (llama.cpp, in the fork that gpt4all 2.8.2 carries) trusts a model file: a wrong type, count or
length ends its process by an assertion, a division by zero or a wild pointer, and some damage loads without
a word. Each check below therefore stands for one thing that this engine asserts on, divides by, reads past
or silently mistakes; the layout is the one of the GGUF specification, versions 2 and 3.
"""

import math
import os
import struct
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, BinaryIO, NamedTuple, NoReturn

from service.errors import ModelRefused

MIB = 1024 * 1024

# Bounds of our own, far above every published model; they keep a damaged count from costing memory or time.
MAX_HEADER_BYTES = 128 * MIB
MAX_METADATA_KEYS = 4_096
MAX_KEY_BYTES = 65_535  # the specification's bound
MAX_ARRAY_ITEMS = 4_194_304
MAX_TENSORS = 16_384
MAX_VOCABULARY = 1_048_576
MAX_CONTEXT_LENGTH = 16_777_216
MAX_EMBEDDING_LENGTH = 131_072
MAX_FEED_FORWARD_LENGTH = 1_048_576
MAX_HEADS = 4_096
MAX_CHAT_TEMPLATE_BYTES = 131_072
MIN_ALIGNMENT, MAX_ALIGNMENT, DEFAULT_ALIGNMENT = 8, 65_536, 32

# Bounds of the engine. It cuts a longer name and then does not find it again. Its graph overflows, which ends
# the process, beyond 190 blocks of a llama model, or 143 with every bias that it may have (measured).
MAX_TENSOR_NAME_BYTES = 63
MAX_DIMENSIONS = 4
MAX_BLOCKS = 128
MAX_EXPERTS = 160

UINT8, INT8, UINT16, INT16, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64, INT64, FLOAT64 = range(13)
TYPE_NAMES = (
    "uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "bool", "string", "array", "uint64",
    "int64", "float64",
)  # fmt: skip
SCALARS = {
    UINT8: struct.Struct("<B"), INT8: struct.Struct("<b"), UINT16: struct.Struct("<H"), INT16:
    struct.Struct("<h"), UINT32: struct.Struct("<I"), INT32: struct.Struct("<i"), FLOAT32:
    struct.Struct("<f"), BOOL: struct.Struct("<B"), UINT64: struct.Struct("<Q"), INT64: struct.Struct("<q"),
    FLOAT64: struct.Struct("<d"),
}  # fmt: skip
U32, U64 = SCALARS[UINT32], SCALARS[UINT64]

TOKEN_NORMAL, TOKEN_UNKNOWN, TOKEN_CONTROL, TOKEN_USER_DEFINED, TOKEN_UNUSED, TOKEN_BYTE = range(1, 7)
TOKEN_TYPES = frozenset(range(1, 7))


class TensorType(NamedTuple):
    """How a tensor type is stored: ``block`` elements of a row in ``block_bytes`` bytes."""

    name: str
    block: int
    block_bytes: int


# The types that the engine multiplies with on x86-64. Left out on purpose: 4 and 5 (removed: it divides by
# zero), Q8_1 and Q8_K (intermediate results only), integers and float64, and 31 to 33 (repacked for Arm).
TENSOR_TYPES = {
    0: TensorType("F32", 1, 4), 1: TensorType("F16", 1, 2), 30: TensorType("BF16", 1, 2), 2:
    TensorType("Q4_0", 32, 18), 3: TensorType("Q4_1", 32, 20), 6: TensorType("Q5_0", 32, 22), 7:
    TensorType("Q5_1", 32, 24), 8: TensorType("Q8_0", 32, 34), 20: TensorType("IQ4_NL", 32, 18), 10:
    TensorType("Q2_K", 256, 84), 11: TensorType("Q3_K", 256, 110), 12: TensorType("Q4_K", 256, 144), 13:
    TensorType("Q5_K", 256, 176), 14: TensorType("Q6_K", 256, 210), 16: TensorType("IQ2_XXS", 256, 66), 17:
    TensorType("IQ2_XS", 256, 74), 18: TensorType("IQ3_XXS", 256, 98), 19: TensorType("IQ1_S", 256, 50), 21:
    TensorType("IQ3_S", 256, 110), 22: TensorType("IQ2_S", 256, 82), 23: TensorType("IQ4_XS", 256, 136), 29:
    TensorType("IQ1_M", 256, 56),
}  # fmt: skip
F32 = 0

# general.file_type as llama.cpp numbers it (enum llama_ftype).
FILE_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S", 12:
    "Q3_K_M", 13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 19: "IQ2_XXS",
    20: "IQ2_XS", 21: "Q2_K_S", 22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S", 27:
    "IQ3_M", 28: "IQ2_S", 29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16",
}  # fmt: skip

# The architectures for which the installed library's is_arch_supported() answers yes, by the norm they use.
RMS_NORM = frozenset({
    "llama", "baichuan", "refact", "qwen", "qwen2", "qwen2moe", "phi3", "internlm2", "gemma", "gemma2",
    "xverse", "openelm", "deepseek2", "chatglm",
})  # fmt: skip
LAYER_NORM = frozenset({
    "falcon", "gpt2", "gptneox", "mpt", "starcoder", "bloom", "stablelm", "phi2", "codeshell", "orion",
    "starcoder2", "command-r", "olmo", "jais",
})  # fmt: skip
ARCHITECTURES = RMS_NORM | LAYER_NORM
EMBEDDING_ARCHITECTURES = frozenset({"bert", "nomic-bert", "jina-bert-v2", "t5encoder"})
# The graph of these asserts that the whole head is rotated.
ROTATES_WHOLE_HEAD = frozenset({
    "llama", "falcon", "baichuan", "xverse", "qwen2", "qwen2moe", "codeshell", "orion", "internlm2",
    "starcoder2", "olmo",
})  # fmt: skip
# Everywhere else the heads are cut out of embedding_length, with keys as long as values.
FREE_HEAD_LENGTH = frozenset({"gemma", "gemma2", "deepseek2", "openelm"})
WITHOUT_OUTPUT_NORM = frozenset({"olmo"})

PRE_TOKENIZERS = frozenset({
    "", "default", "llama3", "llama-v3", "llama-bpe", "deepseek-llm", "deepseek-coder", "falcon", "mpt",
    "starcoder", "gpt-2", "phi-2", "jina-es", "jina-de", "jina-v2-es", "jina-v2-de", "jina-v2-code", "refact",
    "command-r", "qwen2", "stablelm2", "olmo", "dbrx", "smaug-bpe", "poro-chat", "chatglm-bpe", "viking",
    "jais",
})  # fmt: skip
PRE_TOKENIZERS_WITH_BOS = frozenset({"llama3", "llama-v3", "llama-bpe"})
ROPE_SCALINGS = ("none", "linear", "yarn")

# Texts of the tokens that end a turn or a generation, as llama.cpp's vocabulary loader knows them.
END_TOKENS = frozenset({
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<|eom_id|>",
    "<|eot|>", "<EOT>", "_<EOT>", "< EOT >", "<end_of_utterance>", "<|return|>", "<|call|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
})  # fmt: skip

# The types the engine reads each key with; any other type ends the process or the load.
GENERAL_KEYS = {
    "general.architecture": STRING, "general.name": STRING, "general.type": STRING, "general.alignment":
    UINT32, "general.file_type": UINT32, "split.no": UINT16, "split.count": UINT16, "split.tensors.count":
    INT32, "tokenizer.ggml.model": STRING, "tokenizer.ggml.pre": STRING, "tokenizer.chat_template": STRING,
    "tokenizer.ggml.tokens": ARRAY, "tokenizer.ggml.scores": ARRAY, "tokenizer.ggml.token_type": ARRAY,
    "tokenizer.ggml.merges": ARRAY, "tokenizer.ggml.add_bos_token": BOOL, "tokenizer.ggml.add_eos_token":
    BOOL, "tokenizer.ggml.add_space_prefix": BOOL, "tokenizer.ggml.remove_extra_whitespaces": BOOL,
}  # fmt: skip
SPECIAL_TOKENS = (
    "bos", "eos", "eot", "eom", "unknown", "padding", "seperator", "cls", "mask", "prefix", "suffix",
    "middle",
)  # fmt: skip
MODEL_KEYS = {
    "vocab_size": UINT32, "context_length": UINT32, "embedding_length": UINT32, "block_count": UINT32,
    "feed_forward_length": UINT32, "expert_count": UINT32, "expert_used_count": UINT32,
    "leading_dense_block_count": UINT32, "expert_feed_forward_length": UINT32,
    "expert_shared_feed_forward_length": UINT32, "expert_shared_count": UINT32, "use_parallel_residual": BOOL,
    "expert_weights_scale": FLOAT32, "logit_scale": FLOAT32, "attn_logit_softcapping": FLOAT32,
    "final_logit_softcapping": FLOAT32, "attention.head_count": UINT32, "attention.head_count_kv": UINT32,
    "attention.max_alibi_bias": FLOAT32, "attention.clamp_kqv": FLOAT32, "attention.key_length": UINT32,
    "attention.value_length": UINT32, "attention.layer_norm_epsilon": FLOAT32,
    "attention.layer_norm_rms_epsilon": FLOAT32, "attention.q_lora_rank": UINT32, "attention.kv_lora_rank":
    UINT32, "attention.sliding_window": UINT32, "rope.dimension_count": UINT32, "rope.freq_base": FLOAT32,
    "rope.scale_linear": FLOAT32, "rope.scaling.type": STRING, "rope.scaling.factor": FLOAT32,
    "rope.scaling.attn_factor": FLOAT32, "rope.scaling.original_context_length": UINT32,
    "rope.scaling.finetuned": BOOL, "rope.scaling.yarn_log_multiplier": FLOAT32,
}  # fmt: skip
# One architecture gives these for each block, as an array of int32.
PER_BLOCK_KEYS = frozenset({"feed_forward_length", "attention.head_count", "attention.head_count_kv"})


@dataclass(frozen=True)
class GgufHeader:
    """What the service needs to know of a model file; lengths are counts of elements or tokens, as in the
    file.

    ``quantization`` is the name of general.file_type ("Q4_0", "Q4_K_M", ...), or else of the tensor type
    that holds the most bytes. Where a file gives a value per block, the largest one stands here.
    ``end_token_ids`` are the tokens after which a generation is over; ``control_token_ids`` are never part
    of a text.
    """

    architecture: str
    name: str | None
    quantization: str
    context_length: int
    block_count: int
    embedding_length: int
    feed_forward_length: int
    head_count: int
    head_count_kv: int
    key_length: int
    value_length: int
    vocab_size: int
    tokenizer_model: str
    bos_token_id: int | None
    eos_token_id: int
    add_bos: bool
    bos_token: str
    eos_token: str
    end_token_ids: frozenset[int]
    control_token_ids: frozenset[int]
    chat_template: str | None
    parameter_count: int
    weights_bytes: int
    size_bytes: int


class _Value(NamedTuple):
    """One metadata value; ``items`` is the type of an array's items, None for a scalar."""

    type: int
    items: int | None
    data: Any


class _Tensor(NamedTuple):
    """One tensor as the file describes it; ``offset`` counts from the start of the data section."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int
    elements: int
    size_bytes: int


def _refuse(why: str) -> NoReturn:
    raise ModelRefused(f"the model file is refused: {why}")


def _quote(text: bytes | str) -> str:
    """Return text out of the file fit for one line of a message: escaped and cut at 60 characters."""
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8")
        except UnicodeDecodeError:
            return repr(text[:60])
    return repr(text if len(text) <= 60 else text[:60] + "...")


class _Cursor:
    """Reads forward through the header; its buffer grows with what is read, never by a count in the file."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.size_bytes = file.seek(0, os.SEEK_END)
        self.buffer = b""
        self.position = 0

    def require(self, end: int, what: str) -> None:
        """Make the bytes before ``end`` available, or refuse the file because it is over before."""
        if end <= len(self.buffer):
            return
        if end > self.size_bytes:
            _refuse(f"it is cut short or damaged: {what} would end at byte {end} of {self.size_bytes}")
        if end > MAX_HEADER_BYTES:
            _refuse(f"its header is larger than {MAX_HEADER_BYTES} bytes ({what})")
        # Eightfold steps: few reads for a large vocabulary, little to read for a small one.
        wanted = min(max(end, 8 * len(self.buffer), 64 * 1024), self.size_bytes, MAX_HEADER_BYTES)
        pieces = []
        self._file.seek(0)
        while wanted > 0:
            try:
                piece = self._file.read(wanted)
            except OSError as error:
                raise ModelRefused(f"the model file cannot be read: {error.strerror}") from error
            if not piece:
                _refuse("it became shorter while it was read")
            pieces.append(piece)
            wanted -= len(piece)
        self.buffer = b"".join(pieces)

    def scalar(self, layout: struct.Struct, what: str) -> Any:
        start = self.position
        self.position = start + layout.size
        self.require(self.position, what)
        return layout.unpack_from(self.buffer, start)[0]

    def string(self, what: str, limit: int = MAX_HEADER_BYTES) -> bytes:
        length = self.scalar(U64, what)
        if length > limit and length <= self.size_bytes - self.position:
            _refuse(f"{what} is {length} bytes long; at most {limit} are accepted")
        start = self.position
        self.require(start + length, what)
        self.position = start + length
        return self.buffer[start : start + length]

    def strings(self, count: int, what: str) -> list[bytes]:
        """Read ``count`` strings; this loop takes most of the time of a large vocabulary."""
        self.require(self.position + 8 * count, what)
        found: list[bytes] = []
        append, length_at = found.append, U64.unpack_from
        position, buffer = self.position, self.buffer
        available = len(buffer)
        for _ in range(count):
            start = position + 8
            if start > available:
                self.require(start, what)
                buffer, available = self.buffer, len(self.buffer)
            position = start + length_at(buffer, position)[0]
            if position > available:
                self.require(position, what)
                buffer, available = self.buffer, len(self.buffer)
            append(buffer[start:position])
        self.position = position
        return found

    def numbers(self, item_type: int, count: int, what: str) -> memoryview:
        """Read ``count`` numbers as a view of the buffer, so that what nobody looks at costs nothing.

        The view has the byte order of the machine: that of the file, as the engine exists for x86-64 only.
        """
        start = self.position
        self.position = start + count * SCALARS[item_type].size
        self.require(self.position, what)
        letter: Any = SCALARS[item_type].format[-1]  # one of those that cast() takes: the table holds no others
        return memoryview(self.buffer)[start : self.position].cast(letter)


def _decode(text: bytes, what: str) -> str:
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ModelRefused(f"the model file is refused: {what} is not valid UTF-8: {_quote(text)}") from error


def _read_metadata(cursor: _Cursor, count: int) -> dict[str, _Value]:
    metadata: dict[str, _Value] = {}
    for number in range(count):
        raw = cursor.string(f"metadata key {number + 1} of {count}", MAX_KEY_BYTES)
        key = _decode(raw, f"metadata key {number + 1}")
        if not key or not key.isprintable():
            _refuse(f"metadata key {number + 1} is empty or has unprintable characters: {_quote(key)}")
        if key in metadata:
            _refuse(f"metadata key {_quote(key)} stands twice")
        what = f"the value of {_quote(key)}"
        value_type = cursor.scalar(U32, what)
        if value_type == STRING:
            metadata[key] = _Value(STRING, None, cursor.string(what))
        elif value_type == ARRAY:
            item_type, items = cursor.scalar(U32, what), cursor.scalar(U64, what)
            if items > MAX_ARRAY_ITEMS:
                _refuse(f"{what} claims {items} items; at most {MAX_ARRAY_ITEMS} are accepted")
            if item_type == ARRAY:
                _refuse(f"{what} is an array of arrays, which the engine cannot read")
            if item_type == STRING:
                metadata[key] = _Value(ARRAY, STRING, cursor.strings(items, what))
            elif item_type in SCALARS:
                metadata[key] = _Value(ARRAY, item_type, cursor.numbers(item_type, items, what))
            else:
                _refuse(f"{what} is an array of unknown type {item_type}")
        elif value_type in SCALARS:
            scalar = cursor.scalar(SCALARS[value_type], what)
            if value_type == BOOL and scalar > 1:
                _refuse(f"{what} is neither true nor false ({scalar})")
            metadata[key] = _Value(value_type, None, scalar)
        else:
            _refuse(f"{what} has unknown type {value_type}")
    return metadata


def _read_tensors(cursor: _Cursor, count: int) -> dict[str, _Tensor]:
    tensors: dict[str, _Tensor] = {}
    for number in range(count):
        what = f"the description of tensor {number + 1} of {count}"
        name = _decode(cursor.string(what), what)
        if not name or not name.isprintable() or len(name.encode()) > MAX_TENSOR_NAME_BYTES:
            _refuse(f"{what} has a name that is empty, unprintable or longer than "
                    f"{MAX_TENSOR_NAME_BYTES} bytes: {_quote(name)}")  # fmt: skip
        if name in tensors:
            _refuse(f"tensor {_quote(name)} stands twice")
        dimensions = cursor.scalar(U32, what)
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            _refuse(f"tensor {_quote(name)} has {dimensions} dimensions")
        shape = tuple(cursor.numbers(UINT64, dimensions, what))
        type_id, offset = cursor.scalar(U32, what), cursor.scalar(U64, what)
        if type_id not in TENSOR_TYPES:
            _refuse(f"tensor {_quote(name)} has type {type_id}, which the engine cannot compute with")
        elements = math.prod(shape)
        # Every element takes some space: far more elements than bits in the file is damage, not a tensor.
        if elements == 0 or elements > 8 * cursor.size_bytes:
            _refuse(f"tensor {_quote(name)} has an impossible shape {shape}")
        kind = TENSOR_TYPES[type_id]
        if shape[0] % kind.block:
            _refuse(f"tensor {_quote(name)} has rows of {shape[0]}, not a multiple of {kind.name}'s {kind.block}")
        size_bytes = elements // kind.block * kind.block_bytes
        tensors[name] = _Tensor(name, shape, type_id, offset, elements, size_bytes)
    return tensors


def _check_types(metadata: dict[str, _Value], expected: dict[str, int], prefix: str = "") -> None:
    for key, wanted in expected.items():
        value = metadata.get(prefix + key)
        if value is None or value.type == wanted:
            continue
        if key in PER_BLOCK_KEYS and value.type == ARRAY and prefix == "openelm.":
            continue
        _refuse(f"{prefix}{key} is of type {TYPE_NAMES[value.type]}, not {TYPE_NAMES[wanted]}")


def _text(metadata: dict[str, _Value], key: str) -> str | None:
    value = metadata.get(key)
    if value is None:
        return None
    text = _decode(value.data, key)
    if "\0" in text:
        _refuse(f"{key} has a NUL byte in it")
    return text


def _number(metadata: dict[str, _Value], key: str, low: int, high: int, default: int | None = None) -> int:
    """Return an integer within its bounds; of a value per block, each is checked and the largest returned."""
    value = metadata.get(key)
    if value is None:
        if default is None:
            _refuse(f"{key} is missing")
        return default
    if value.type == ARRAY:
        if value.items != INT32 or not value.data:
            _refuse(f"{key} is not an array of int32")
        numbers = value.data
    else:
        numbers = (value.data,)
    for number in numbers:
        if not low <= number <= high:
            _refuse(f"{key} is {number}; between {low} and {high} is accepted")
    largest: int = max(numbers)
    return largest


def _positive(metadata: dict[str, _Value], key: str, required: bool = False) -> None:
    value = metadata.get(key)
    if value is None:
        if required:
            _refuse(f"{key} is missing")
    elif not (math.isfinite(value.data) and value.data > 0):
        _refuse(f"{key} is {value.data}, not a number above zero")


def _check_tensor_places(tensors: dict[str, _Tensor], data_start: int, alignment: int, size_bytes: int) -> None:
    for tensor in tensors.values():
        if tensor.offset % alignment:
            _refuse(f"tensor {_quote(tensor.name)} begins at {tensor.offset}, not a multiple of {alignment}")
        end = data_start + tensor.offset + tensor.size_bytes
        if end > size_bytes:
            what = f"tensor {_quote(tensor.name)}"
            _refuse(f"it is cut short or damaged: {what} would end at byte {end} of {size_bytes}")
    for one, two in pairwise(sorted(tensors.values(), key=lambda tensor: tensor.offset)):
        if one.offset + one.size_bytes > two.offset:
            _refuse(f"tensors {_quote(one.name)} and {_quote(two.name)} overlap")


class _Shapes(NamedTuple):
    """The hyper-parameters that tensor shapes are made of."""

    blocks: int
    embedding: int
    feed_forward: int
    heads: int
    heads_kv: int
    key: int
    value: int
    vocabulary: int
    experts: int


def _read_shapes(metadata: dict[str, _Value], architecture: str, vocabulary: int) -> _Shapes:
    """Return the hyper-parameters, each within bounds and all in harmony with each other."""
    prefix = architecture + "."
    _check_types(metadata, MODEL_KEYS, prefix)
    _number(metadata, prefix + "context_length", 8, MAX_CONTEXT_LENGTH)
    blocks = _number(metadata, prefix + "block_count", 1, MAX_BLOCKS)
    embedding = _number(metadata, prefix + "embedding_length", 1, MAX_EMBEDDING_LENGTH)
    feed_forward = _number(metadata, prefix + "feed_forward_length", 1, MAX_FEED_FORWARD_LENGTH)
    heads = _number(metadata, prefix + "attention.head_count", 1, MAX_HEADS)
    heads_kv = _number(metadata, prefix + "attention.head_count_kv", 1, heads, default=heads)
    for name in PER_BLOCK_KEYS:
        items = metadata.get(prefix + name)
        if items is not None and items.type == ARRAY and len(items.data) != blocks:
            _refuse(f"{prefix}{name} has {len(items.data)} items for {blocks} blocks")
    if architecture not in FREE_HEAD_LENGTH and heads % heads_kv:
        _refuse(f"{heads} heads cannot share {heads_kv} key-value heads evenly")
    key = _number(metadata, prefix + "attention.key_length", 1, MAX_EMBEDDING_LENGTH, default=embedding // heads)
    value = _number(metadata, prefix + "attention.value_length", 1, MAX_EMBEDDING_LENGTH, default=embedding // heads)
    if min(key, value) < 1:
        _refuse(f"an embedding length of {embedding} leaves nothing for each of {heads} heads")
    if architecture not in FREE_HEAD_LENGTH and not key * heads == value * heads == embedding:
        _refuse(f"{heads} heads of {key} and {value} do not make up an embedding length of {embedding}")
    rotated = _number(metadata, prefix + "rope.dimension_count", 1, key, default=key)
    if rotated % 2 or (architecture in ROTATES_WHOLE_HEAD and rotated != key):
        _refuse(f"{prefix}rope.dimension_count is {rotated} for heads of {key}")
    kind = "rms_epsilon" if architecture in RMS_NORM else "epsilon"
    _positive(metadata, f"{prefix}attention.layer_norm_{kind}", required=True)
    for name in (
        "rope.freq_base",
        "rope.scaling.attn_factor",
        "attn_logit_softcapping",
        "final_logit_softcapping",
    ):
        _positive(metadata, prefix + name)
    for name in ("rope.scaling.factor", "rope.scale_linear"):
        factor = metadata.get(prefix + name)
        if factor is not None and not (math.isfinite(factor.data) and factor.data >= 0):
            _refuse(f"{prefix}{name} is {factor.data}")
    scaling = _text(metadata, prefix + "rope.scaling.type")
    if scaling is not None and scaling not in ROPE_SCALINGS:
        _refuse(f"rope scaling {_quote(scaling)} is unknown to the engine, which knows {', '.join(ROPE_SCALINGS)}")
    if architecture in ("phi3", "gemma2"):
        _number(metadata, prefix + "attention.sliding_window", 1, MAX_CONTEXT_LENGTH, default=1)
    experts = _number(metadata, prefix + "expert_count", 0, MAX_EXPERTS, default=0)
    used = _number(metadata, prefix + "expert_used_count", 0, MAX_EXPERTS, default=0)
    if used > experts or (experts > 0) != (used > 0):
        _refuse(f"{used} of {experts} experts are used")
    if _number(metadata, prefix + "vocab_size", 1, MAX_VOCABULARY, default=vocabulary) != vocabulary:
        _refuse(f"{prefix}vocab_size differs from the {vocabulary} tokens of the vocabulary")
    return _Shapes(blocks, embedding, feed_forward, heads, heads_kv, key, value, vocabulary, experts)


def _expect_llama_tensors(architecture: str, shapes: _Shapes) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """Return every tensor of a llama or qwen2 model with its shape, and the names of those it may lack."""
    width, wide, narrow = shapes.embedding, shapes.feed_forward, shapes.key * shapes.heads_kv
    expected: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (width, shapes.vocabulary),
        "output_norm.weight": (width,),
        "output.weight": (width, shapes.vocabulary),
    }
    # Without an output matrix the engine uses the token embeddings a second time.
    optional = {"output.weight"}
    if architecture == "llama":
        expected["rope_freqs.weight"] = (shapes.key // 2,)
        optional.add("rope_freqs.weight")
    for number in range(shapes.blocks):
        block = f"blk.{number}."
        expected |= {
            f"{block}attn_norm.weight": (width,),
            f"{block}attn_q.weight": (width, width),
            f"{block}attn_k.weight": (width, narrow),
            f"{block}attn_v.weight": (width, narrow),
            f"{block}attn_output.weight": (width, width),
            f"{block}ffn_norm.weight": (width,),
        }
        biases = {f"{block}attn_q.bias": width, f"{block}attn_k.bias": narrow, f"{block}attn_v.bias": narrow}
        if architecture == "llama":
            biases[f"{block}attn_output.bias"] = width
        if shapes.experts == 0:
            expected |= {
                f"{block}ffn_gate.weight": (width, wide),
                f"{block}ffn_up.weight": (width, wide),
                f"{block}ffn_down.weight": (wide, width),
            }
            if architecture == "llama":
                biases |= {
                    f"{block}ffn_gate.bias": wide,
                    f"{block}ffn_up.bias": wide,
                    f"{block}ffn_down.bias": width,
                }
        else:
            expected |= {
                f"{block}ffn_gate_inp.weight": (width, shapes.experts),
                f"{block}ffn_gate_exps.weight": (width, wide, shapes.experts),
                f"{block}ffn_up_exps.weight": (width, wide, shapes.experts),
                f"{block}ffn_down_exps.weight": (wide, width, shapes.experts),
            }
        expected |= {name: (length,) for name, length in biases.items()}
        if architecture == "llama":
            optional |= biases.keys()
    return expected, optional


def _check_tensors(architecture: str, shapes: _Shapes, tensors: dict[str, _Tensor]) -> None:
    """Compare the tensors with the hyper-parameters: fully for llama and qwen2, in outline for the others."""
    if architecture in ("llama", "qwen2"):
        expected, optional = _expect_llama_tensors(architecture, shapes)
        for name in expected.keys() - optional - tensors.keys():
            _refuse(f"tensor {_quote(name)} is missing")
        for name in tensors.keys() - expected.keys():
            _refuse(f"tensor {_quote(name)} does not belong to a {architecture} model of {shapes.blocks} blocks")
    else:
        expected = {"token_embd.weight": (shapes.embedding, shapes.vocabulary)}
        if architecture not in WITHOUT_OUTPUT_NORM:
            expected["output_norm.weight"] = (shapes.embedding,)
        for name in expected.keys() - tensors.keys():
            _refuse(f"tensor {_quote(name)} is missing")
        # No architecture has fewer than five tensors in a block; one block more than said is never built.
        present = Counter(name.split(".")[1] for name in tensors if name.startswith("blk."))
        for number in range(shapes.blocks):
            if present.pop(str(number), 0) < 5:
                _refuse(f"block {number} of {shapes.blocks} lacks tensors")
        if present:
            _refuse(f"there are tensors of block {_quote(next(iter(present)))}, but only {shapes.blocks} blocks")
    for tensor in tensors.values():
        wanted = expected.get(tensor.name)
        if wanted is not None and _strip_ones(tensor.shape) != _strip_ones(wanted):
            _refuse(f"tensor {_quote(tensor.name)} has shape {tensor.shape}, not {wanted}")
        # Norms, biases and rotation factors are added and multiplied as they lie in the file.
        if len(_strip_ones(tensor.shape)) == 1 and tensor.type != F32 and (wanted is None or len(wanted) == 1):
            _refuse(f"tensor {_quote(tensor.name)} is {TENSOR_TYPES[tensor.type].name}; it must be F32")


def _strip_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape without trailing dimensions of one, which the engine does not tell apart."""
    length = len(shape)
    while length > 1 and shape[length - 1] == 1:
        length -= 1
    return shape[:length]


class _Vocabulary(NamedTuple):
    """The checked vocabulary; token texts stay bytes, for most of them are never looked at again."""

    model: str
    tokens: list[bytes]
    types: tuple[int, ...]
    special: dict[str, int]
    add_bos: bool


def _array(metadata: dict[str, _Value], key: str, items: int) -> Any:
    value = metadata.get(key)
    if value is None:
        return None
    if value.items != items:
        _refuse(f"{key} is not an array of {TYPE_NAMES[items]}")
    return value.data


def _byte_tokens(model: str) -> list[bytes]:
    """Return the tokens without which some text cannot be tokenized: one for each byte that matters.

    A byte-level BPE vocabulary spells bytes by the table that came with GPT-2; the engine drops a byte that
    has no token without a word. Published vocabularies (falcon, starcoder) lack some control characters and
    the lead bytes of planes that Unicode has not assigned. A SentencePiece vocabulary spells bytes <0xNN>;
    there a missing one ends the process, so that every one is needed.
    """
    if model == "llama":
        return [b"<0x%02X>" % byte for byte in range(256)]
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = iter(range(0x100, 0x200))
    spelled = {byte: chr(byte if byte in visible else next(hidden)) for byte in range(256)}
    rare = {*range(0x20), 0x7F, 0xC0, 0xC1, 0xF1, 0xF2, *range(0xF5, 0x100)} - set(b"\t\n\r")
    return [spelled[byte].encode() for byte in range(256) if byte not in rare]


def _read_vocabulary(metadata: dict[str, _Value]) -> _Vocabulary:
    model = _text(metadata, "tokenizer.ggml.model")
    if model is None:
        _refuse("tokenizer.ggml.model is missing")
    if model not in ("gpt2", "llama"):
        _refuse(f"tokenizer {_quote(model)} is not one that models of text have here (gpt2, llama)")
    tokens = _array(metadata, "tokenizer.ggml.tokens", STRING)
    if tokens is None:
        _refuse("tokenizer.ggml.tokens is missing")
    if not 1 <= len(tokens) <= MAX_VOCABULARY:
        _refuse(f"its vocabulary has {len(tokens)} tokens; between 1 and {MAX_VOCABULARY} is accepted")
    # A line feed between two tokens keeps the halves of a character from joining up.
    _decode_all(tokens, "a token of the vocabulary")
    known = set(tokens)
    if len(known) != len(tokens):
        _refuse(f"token {_quote(Counter(tokens).most_common(1)[0][0])} stands twice in its vocabulary")
    if b"" in known:
        _refuse("its vocabulary has an empty token")
    if any(b"\0" in token for token in tokens):
        _refuse("its vocabulary has a token with a NUL byte in it")
    types = _array(metadata, "tokenizer.ggml.token_type", INT32)
    scores = _array(metadata, "tokenizer.ggml.scores", FLOAT32)
    for name, items in (("token_type", types), ("scores", scores)):
        if items is not None and len(items) != len(tokens):
            _refuse(f"tokenizer.ggml.{name} has {len(items)} items for {len(tokens)} tokens")
    if scores is not None and any(score != score for score in scores):
        _refuse("tokenizer.ggml.scores holds something that is not a number")
    types = types if types is not None else (TOKEN_NORMAL,) * len(tokens)
    # gpt4all ends the process when a token without a text of its own is generated: one of an unknown type, or
    # a byte token where bytes are spelled as characters. Unused ones have none either, but models never
    # choose them.
    strange = set(types) - (TOKEN_TYPES - {TOKEN_BYTE} if model == "gpt2" else TOKEN_TYPES)
    if strange:
        _refuse(f"its vocabulary has tokens of type {min(strange)}, which a {model} vocabulary cannot have")
    for text in _byte_tokens(model):
        if text not in known and not (model == "llama" and bytes([int(text[3:5], 16)]) in known):
            _refuse(f"its vocabulary lacks the byte token {_quote(text)}: some text could not be represented")
    pre = _text(metadata, "tokenizer.ggml.pre") or ""
    if model == "gpt2":
        if pre not in PRE_TOKENIZERS:
            _refuse(f"pre-tokenizer {_quote(pre)} is unknown to the engine")
        _check_merges(_array(metadata, "tokenizer.ggml.merges", STRING), known)
    else:
        for token, token_type in zip(tokens, types, strict=True):
            if token_type == TOKEN_BYTE and not _is_byte_token(token):
                _refuse(f"byte token {_quote(token)} does not name a byte")
    special: dict[str, int] = {}
    for name in SPECIAL_TOKENS:
        key = f"tokenizer.ggml.{name}_token_id"
        value = metadata.get(key)
        if value is None:
            continue
        if value.type != UINT32:
            _refuse(f"{key} is of type {TYPE_NAMES[value.type]}, not uint32")
        if value.data >= len(tokens):
            _refuse(f"{key} is {value.data}, but the vocabulary has {len(tokens)} tokens")
        special[name] = value.data
    if model == "llama":
        # What the engine assumes for a SentencePiece vocabulary that does not say it.
        special = {"bos": 1, "eos": 2, **special}
    if "eos" not in special:
        _refuse("tokenizer.ggml.eos_token_id is missing: the engine would take an arbitrary token for the end")
    add_bos = metadata.get("tokenizer.ggml.add_bos_token")
    adds = bool(add_bos.data) if add_bos else model == "llama" or pre in PRE_TOKENIZERS_WITH_BOS
    if adds and "bos" not in special:
        _refuse("tokenizer.ggml.bos_token_id is missing: the engine would begin with an arbitrary token")
    return _Vocabulary(model, tokens, types, special, adds)


def _decode_all(texts: list[bytes], what: str) -> None:
    try:
        b"\n".join(texts).decode("utf-8")
    except UnicodeDecodeError:
        for text in texts:
            _decode(text, what)


def _is_byte_token(token: bytes) -> bool:
    if len(token) != 6 or not token.startswith(b"<0x") or not token.endswith(b">"):
        return False
    return all(digit in b"0123456789ABCDEFabcdef" for digit in token[3:5])


def _check_merges(merges: list[bytes] | None, known: set[bytes]) -> None:
    """Refuse merges that the engine would take apart wrongly, or whose result it would silently lose."""
    if merges is None:
        _refuse("tokenizer.ggml.merges is missing")
    _decode_all(merges, "a merge of the vocabulary")
    for merge in merges:
        # As the engine does: a space at the very beginning belongs to the left part.
        space = merge.find(b" ", 1)
        left, right = merge[:space], merge[space + 1 :]
        if space < 0 or not right:
            _refuse(f"merge {_quote(merge)} is not two tokens with a space between them")
        if left not in known or right not in known or left + right not in known:
            _refuse(f"merge {_quote(merge)} makes or needs a token that is not in the vocabulary")


def _find_end_tokens(architecture: str, vocabulary: _Vocabulary) -> frozenset[int]:
    ends = {vocabulary.special[name] for name in ("eos", "eot", "eom") if name in vocabulary.special}
    texts = {text.encode() for text in END_TOKENS}
    for token_id, token in enumerate(vocabulary.tokens):
        if token in texts:
            special = vocabulary.types[token_id] in (TOKEN_CONTROL, TOKEN_USER_DEFINED)
            # Published gemma files mark their end of a turn as a normal token; the engine takes it as the end
            # too.
            if special or (token == b"<end_of_turn>" and architecture.startswith("gemma")):
                ends.add(token_id)
    return frozenset(ends)


def _name_quantization(metadata: dict[str, _Value], tensors: dict[str, _Tensor]) -> str:
    file_type = metadata.get("general.file_type")
    if file_type is not None and file_type.data in FILE_TYPES:
        return FILE_TYPES[file_type.data]
    sizes: Counter[int] = Counter()
    for tensor in tensors.values():
        sizes[tensor.type] += tensor.size_bytes
    return TENSOR_TYPES[sizes.most_common(1)[0][0]].name


def read_header(file: BinaryIO) -> GgufHeader:
    """Read and check the header of an open, seekable GGUF file; its weights are located but not read.

    Raises ``ModelRefused`` with one line for anything the engine could not load or would mistake. Memory
    and time are bounded by the file's size and by ``MAX_HEADER_BYTES``, never by a number that stands in
    the file.
    """
    cursor = _Cursor(file)
    if cursor.size_bytes == 0:
        _refuse("it is empty")
    cursor.require(min(cursor.size_bytes, 4), "the magic number")
    magic = cursor.buffer[:4]
    if magic != b"GGUF":
        _refuse(f"it is not a GGUF file: it begins with {_quote(magic)}")
    cursor.position = 4
    version = cursor.scalar(U32, "the version")
    if version not in (2, 3):
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in (1, 2, 3)
        _refuse("it is written for big-endian machines" if swapped else f"GGUF version {version} is not 2 or 3")
    tensor_count = cursor.scalar(U64, "the number of tensors")
    key_count = cursor.scalar(U64, "the number of metadata keys")
    if not 1 <= tensor_count <= MAX_TENSORS:
        _refuse(f"it claims {tensor_count} tensors; between 1 and {MAX_TENSORS} is accepted")
    if not 1 <= key_count <= MAX_METADATA_KEYS:
        _refuse(f"it claims {key_count} metadata keys; between 1 and {MAX_METADATA_KEYS} is accepted")
    metadata = _read_metadata(cursor, key_count)
    _check_types(metadata, GENERAL_KEYS)
    architecture = _read_architecture(metadata)
    tensors = _read_tensors(cursor, tensor_count)
    alignment = _number(metadata, "general.alignment", MIN_ALIGNMENT, MAX_ALIGNMENT, default=DEFAULT_ALIGNMENT)
    if alignment & (alignment - 1):
        _refuse(f"general.alignment is {alignment}, not a power of two")
    data_start = (cursor.position + alignment - 1) // alignment * alignment
    _check_tensor_places(tensors, data_start, alignment, cursor.size_bytes)
    vocabulary = _read_vocabulary(metadata)
    shapes = _read_shapes(metadata, architecture, len(vocabulary.tokens))
    _check_tensors(architecture, shapes, tensors)
    name = _text(metadata, "general.name")
    _check_phi3_tokens(name, vocabulary)
    template = metadata.get("tokenizer.chat_template")
    if template is not None and len(template.data) > MAX_CHAT_TEMPLATE_BYTES:
        _refuse(f"its chat template has {len(template.data)} bytes; at most {MAX_CHAT_TEMPLATE_BYTES} may be")
    bos, eos = vocabulary.special.get("bos"), vocabulary.special["eos"]
    return GgufHeader(
        architecture=architecture,
        name=name,
        quantization=_name_quantization(metadata, tensors),
        context_length=metadata[f"{architecture}.context_length"].data,
        block_count=shapes.blocks,
        embedding_length=shapes.embedding,
        feed_forward_length=shapes.feed_forward,
        head_count=shapes.heads,
        head_count_kv=shapes.heads_kv,
        key_length=shapes.key,
        value_length=shapes.value,
        vocab_size=shapes.vocabulary,
        tokenizer_model=vocabulary.model,
        bos_token_id=bos,
        eos_token_id=eos,
        add_bos=vocabulary.add_bos,
        bos_token="" if bos is None else vocabulary.tokens[bos].decode(),
        eos_token=vocabulary.tokens[eos].decode(),
        end_token_ids=_find_end_tokens(architecture, vocabulary),
        control_token_ids=frozenset(i for i, kind in enumerate(vocabulary.types) if kind == TOKEN_CONTROL),
        chat_template=_text(metadata, "tokenizer.chat_template"),
        parameter_count=sum(tensor.elements for tensor in tensors.values()),
        weights_bytes=sum(tensor.size_bytes for tensor in tensors.values()),
        size_bytes=cursor.size_bytes,
    )


def _read_architecture(metadata: dict[str, _Value]) -> str:
    split = metadata.get("split.count")
    if split is not None and split.data > 1:
        _refuse(f"it is one part of {split.data}; join the parts into one file first")
    kind = _text(metadata, "general.type")
    if kind is not None and kind != "model":
        _refuse(f"it holds {_quote(kind)}, not a model")
    architecture = _text(metadata, "general.architecture")
    if architecture is None:
        _refuse("general.architecture is missing")
    if architecture in EMBEDDING_ARCHITECTURES:
        _refuse(f"{architecture} makes embeddings; it does not generate text")
    if architecture not in ARCHITECTURES:
        _refuse(f"architecture {_quote(architecture)} is unknown to the engine")
    return architecture


def _check_phi3_tokens(name: str | None, vocabulary: _Vocabulary) -> None:
    # The engine looks these up by the model's name, whatever the architecture.
    if name is not None and ("phi-3" in name.lower() or "phi3" in name.lower()):
        for token in (b"</s>", b"<unk>", b"<s>", b"<|endoftext|>"):
            if token not in vocabulary.tokens:
                _refuse(f"it is named {_quote(name)}, but its vocabulary lacks {_quote(token)}")


# Measured with gpt4all 2.8.2 on Linux x86-64, as resident memory of the engine's process after a prompt that
# fills the context. A llama model of 0.1 million parameters: 50 and 95 MiB (estimated: 66 and 110) with 512
# and 16,384 tokens; one of 494 million: 447 and 475 MiB (estimated: 506 and 535) with 512 and 2,048 tokens.
CACHE_ELEMENT_BYTES = 2  # gpt4all asks for a float16 cache
CACHE_CELL_BYTES = 128  # bookkeeping of one position
CONTEXT_STEP = 32  # llama.cpp rounds the context up to this
PREFILL_BATCH = 128  # gpt4all evaluates at most so many tokens of a prompt at once, whatever n_batch says
RESERVED_BATCH = 512  # llama.cpp's n_ubatch, which gpt4all leaves as it is
ACTIVATION_BYTES = 4  # float32
TOKEN_BYTES = 640  # one token, its merge and the maps that find them, twice: to generate and to count with
BASE_BYTES = 64 * MIB  # Python, gpt4all and its libraries


@dataclass(frozen=True)
class MemoryNeed:
    """Resident memory of the engine's process by what it is for, in bytes.

    ``weights_bytes`` are mapped from the file: the kernel can drop and read them again, but then every token
    waits for the disk. ``reserved_bytes`` is no part of the total: llama.cpp takes so much address space in
    one piece, for batches four times as long as gpt4all evaluates and for the logits of every token of them,
    of which gpt4all asks for the last only. Linux refuses a piece larger than the whole memory, and then the
    engine does not load.
    """

    weights_bytes: int
    cache_bytes: int
    compute_bytes: int
    vocabulary_bytes: int
    base_bytes: int
    reserved_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.cache_bytes + self.compute_bytes + self.vocabulary_bytes + self.base_bytes


def estimate_memory(header: GgufHeader, context_length: int) -> MemoryNeed:
    """Return what serving with a context of ``context_length`` tokens needs, filled to the last token."""
    cells = -(-context_length // CONTEXT_STEP) * CONTEXT_STEP
    per_cell = header.block_count * header.head_count_kv * (header.key_length + header.value_length)
    # The largest intermediate results alive together, for one token of a batch: attention of every head to
    # every position with its mask, and the rows around a feed-forward block.
    attention = ACTIVATION_BYTES * (header.head_count + 1) * cells
    rows = ACTIVATION_BYTES * (2 * header.feed_forward_length + 6 * header.embedding_length)
    return MemoryNeed(
        weights_bytes=header.weights_bytes,
        cache_bytes=cells * (per_cell * CACHE_ELEMENT_BYTES + CACHE_CELL_BYTES),
        # One row of logits comes with the candidates that are sampled from it.
        compute_bytes=PREFILL_BATCH * (attention + rows) + 16 * header.vocab_size,
        vocabulary_bytes=TOKEN_BYTES * header.vocab_size,
        base_bytes=BASE_BYTES,
        reserved_bytes=RESERVED_BATCH * (attention + rows + ACTIVATION_BYTES * header.vocab_size),
    )


def required_memory_bytes(header: GgufHeader, context_length: int) -> int:
    """Return the resident memory in bytes that a context of ``context_length`` tokens needs in total."""
    return estimate_memory(header, context_length).total_bytes


def largest_context(header: GgufHeader, memory_bytes: int) -> int:
    """Return the largest context in tokens, at most the file's own, that fits ``memory_bytes``; 0 if none.

    What is needed and what is only reserved must each fit; both grow linearly with the context.
    """
    none, one = estimate_memory(header, 0), estimate_memory(header, CONTEXT_STEP)
    steps = min(
        (memory_bytes - none.total_bytes) // (one.total_bytes - none.total_bytes),
        (memory_bytes - none.reserved_bytes) // (one.reserved_bytes - none.reserved_bytes),
    )
    return min(max(steps, 0) * CONTEXT_STEP, header.context_length)
