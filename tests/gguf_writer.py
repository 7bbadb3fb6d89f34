"""Owns a small GGUF reader and writer for tests, in which every field can be bent out of shape."""

import random
import struct
from dataclasses import dataclass, field
from typing import Any

UINT8, INT8, UINT16, INT16, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64, INT64, FLOAT64 = range(13)
LAYOUTS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIifBQqd", strict=True))
F32, F16, Q4_0, Q8_0 = 0, 1, 2, 8
BLOCKS = {F32: (1, 4), F16: (1, 2), Q4_0: (32, 18), Q8_0: (32, 34)}


class Raw(bytes):
    """Bytes that are written as they are, where a well-formed value would be expected."""


@dataclass
class Array:
    """The value of an array: the type of its items, the items, and a count that may lie."""

    items_type: int
    items: list[Any]
    claimed_count: int | None = None


@dataclass
class Field:
    """One metadata field."""

    key: bytes
    type: int
    value: Any


@dataclass
class Tensor:
    """One tensor; without an ``offset`` of its own it lies behind the one before."""

    name: bytes
    shape: list[int]
    type: int
    data: bytes
    offset: int | None = None
    claimed_dimensions: int | None = None


@dataclass
class Gguf:
    """A whole file; ``marks`` holds, after ``to_bytes``, where its sections begin."""

    metadata: list[Field]
    tensors: list[Tensor]
    magic: bytes = b"GGUF"
    version: int = 3
    alignment: int = 32
    claimed_tensors: int | None = None
    claimed_keys: int | None = None
    marks: dict[str, int] = field(default_factory=dict)

    def field(self, key: str) -> Field:
        return next(entry for entry in self.metadata if entry.key == key.encode())

    def has(self, key: str) -> bool:
        return any(entry.key == key.encode() for entry in self.metadata)

    def get(self, key: str) -> Any:
        return self.field(key).value

    def put(self, key: str, value_type: int, value: Any) -> None:
        """Set a field, at its old place if it is there already."""
        if self.has(key):
            entry = self.field(key)
            entry.type, entry.value = value_type, value
        else:
            self.metadata.append(Field(key.encode(), value_type, value))

    def drop(self, key: str) -> None:
        self.metadata.remove(self.field(key))

    def tensor(self, name: str) -> Tensor:
        return next(tensor for tensor in self.tensors if tensor.name == name.encode())

    def to_bytes(self) -> bytes:
        out = bytearray(self.magic)
        tensors = len(self.tensors) if self.claimed_tensors is None else self.claimed_tensors
        keys = len(self.metadata) if self.claimed_keys is None else self.claimed_keys
        out += struct.pack("<IQQ", self.version, tensors, keys)
        self.marks["metadata"] = len(out)
        for entry in self.metadata:
            self.marks[entry.key.decode("latin-1")] = len(out)
            out += _string(entry.key) + struct.pack("<I", entry.type) + _value(entry.type, entry.value)
        self.marks["tensors"] = len(out)
        offset, places = 0, []
        for tensor in self.tensors:
            places.append(offset if tensor.offset is None else tensor.offset)
            dimensions = len(tensor.shape) if tensor.claimed_dimensions is None else tensor.claimed_dimensions
            out += _string(tensor.name) + struct.pack("<I", dimensions)
            out += struct.pack(f"<{len(tensor.shape)}QIQ", *tensor.shape, tensor.type, places[-1])
            offset += _padded(len(tensor.data), self.alignment)
        out += b"\0" * (_padded(len(out), self.alignment) - len(out))
        self.marks["data"] = len(out)
        for tensor in self.tensors:
            out += tensor.data + b"\0" * (_padded(len(tensor.data), self.alignment) - len(tensor.data))
        return bytes(out)


def _padded(size: int, alignment: int) -> int:
    return (size + alignment - 1) // alignment * alignment


def _string(text: bytes) -> bytes:
    return text if isinstance(text, Raw) else struct.pack("<Q", len(text)) + text


def _value(value_type: int, value: Any) -> bytes:
    if isinstance(value, Raw):
        return value
    if value_type == STRING:
        return _string(value)
    if value_type == ARRAY:
        count = len(value.items) if value.claimed_count is None else value.claimed_count
        head = struct.pack("<IQ", value.items_type, count)
        if value.items_type in LAYOUTS:
            return head + struct.pack(f"<{len(value.items)}{LAYOUTS[value.items_type]}", *value.items)
        return head + b"".join(_value(value.items_type, item) for item in value.items)
    return struct.pack("<" + LAYOUTS[value_type], value)


def read(data: bytes) -> Gguf:
    """Return the fields of a file that is known to be valid; nothing is checked."""
    position = 4

    def take(layout: str) -> Any:
        nonlocal position
        (value,) = struct.unpack_from("<" + layout, data, position)
        position += struct.calcsize("<" + layout)
        return value

    def take_string() -> bytes:
        nonlocal position
        length = take("Q")
        position += length
        return data[position - length : position]

    def take_value(value_type: int) -> Any:
        if value_type == STRING:
            return take_string()
        if value_type == ARRAY:
            items_type, count = take("I"), take("Q")
            return Array(items_type, [take_value(items_type) for _ in range(count)])
        return take(LAYOUTS[value_type])

    version, tensor_count, key_count = take("I"), take("Q"), take("Q")
    metadata = []
    for _ in range(key_count):
        key, value_type = take_string(), take("I")
        metadata.append(Field(key, value_type, take_value(value_type)))
    model = Gguf(metadata, [], data[:4], version)
    if model.has("general.alignment"):
        model.alignment = model.get("general.alignment")
    places = []
    for _ in range(tensor_count):
        name = take_string()
        shape = [take("Q") for _ in range(take("I"))]
        model.tensors.append(Tensor(name, shape, take("I"), b""))
        places.append(take("Q"))
    start = _padded(position, model.alignment)
    ends = dict(zip(sorted(places), [*sorted(places)[1:], len(data) - start], strict=True))
    for tensor, place in zip(model.tensors, places, strict=True):
        # With its padding: only valid files come here, so what lies between two tensors belongs to the first.
        tensor.data = data[start + place : start + ends[place]]
    return model


def byte_texts() -> list[bytes]:
    """Return the 256 tokens of a byte-level vocabulary, spelled by the table that came with GPT-2."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in plain]
    spelled = {byte: chr(byte) for byte in plain} | {byte: chr(256 + n) for n, byte in enumerate(hidden)}
    return [spelled[byte].encode() for byte in range(256)]


SPECIAL = (
    b"<|begin_of_text|>",
    b"<|end_of_text|>",
    b"<|start_header_id|>",
    b"<|end_header_id|>",
    b"<|eot_id|>",
)
TEMPLATE = (
    b"{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>{{ m.content }}<|eot_id|>{% endfor %}"
)


def _byte_level_fields(longest_space: int) -> list[Field]:
    texts = byte_texts()
    space = texts[32]
    pairs = [(space, b"t"), (b"h", b"e"), (b"i", b"n"), (space + b"t", b"he"), (b"in", b"g")]
    pairs += [(space * 2**n, space * 2**n) for n in range(longest_space.bit_length() - 1)]
    tokens = [*texts, *(left + right for left, right in pairs), *SPECIAL]
    plain = len(tokens) - len(SPECIAL)
    return [
        Field(b"tokenizer.ggml.model", STRING, b"gpt2"),
        Field(b"tokenizer.ggml.pre", STRING, b"llama-bpe"),
        Field(b"tokenizer.ggml.tokens", ARRAY, Array(STRING, tokens)),
        Field(b"tokenizer.ggml.token_type", ARRAY, Array(INT32, [1] * plain + [3] * len(SPECIAL))),
        Field(b"tokenizer.ggml.merges", ARRAY, Array(STRING, [left + b" " + right for left, right in pairs])),
        Field(b"tokenizer.ggml.bos_token_id", UINT32, plain),
        Field(b"tokenizer.ggml.eos_token_id", UINT32, plain + 4),
        Field(b"tokenizer.ggml.padding_token_id", UINT32, plain + 1),
        Field(b"tokenizer.ggml.add_bos_token", BOOL, 1),
    ]


def _sentence_piece_fields() -> list[Field]:
    letters = ["\u2581", *"etaoinshrdlu"]
    tokens = [b"<unk>", b"<s>", b"</s>", *(b"<0x%02X>" % byte for byte in range(256))]
    types = [2, 3, 3] + [6] * 256 + [1] * len(letters)
    scores = [0.0] * 259 + [-1.0 - number for number in range(len(letters))]
    tokens += [letter.encode() for letter in letters]
    return [
        Field(b"tokenizer.ggml.model", STRING, b"llama"),
        Field(b"tokenizer.ggml.tokens", ARRAY, Array(STRING, tokens)),
        Field(b"tokenizer.ggml.scores", ARRAY, Array(FLOAT32, scores)),
        Field(b"tokenizer.ggml.token_type", ARRAY, Array(INT32, types)),
        Field(b"tokenizer.ggml.bos_token_id", UINT32, 1),
        Field(b"tokenizer.ggml.eos_token_id", UINT32, 2),
        Field(b"tokenizer.ggml.unknown_token_id", UINT32, 0),
    ]


def small_model(
    architecture: str = "llama", tokenizer: str = "gpt2", tied: bool = False, longest_space: int = 1
) -> Gguf:
    """Return a valid llama or qwen2 model of two blocks with random weights; the real engine loads it.

    A byte-level vocabulary has tokens for runs of up to ``longest_space`` spaces, a power of two.
    """
    width, wide, heads, heads_kv, blocks = 64, 128, 4, 2, 2
    narrow = width // heads * heads_kv
    vocabulary = _byte_level_fields(longest_space) if tokenizer == "gpt2" else _sentence_piece_fields()
    tokens = next(len(entry.value.items) for entry in vocabulary if entry.key == b"tokenizer.ggml.tokens")
    prefix = architecture.encode() + b"."
    metadata = [
        Field(b"general.architecture", STRING, architecture.encode()),
        Field(b"general.name", STRING, b"small test model"),
        Field(b"general.file_type", UINT32, 7),
        Field(prefix + b"context_length", UINT32, 256),
        Field(prefix + b"embedding_length", UINT32, width),
        Field(prefix + b"block_count", UINT32, blocks),
        Field(prefix + b"feed_forward_length", UINT32, wide),
        Field(prefix + b"attention.head_count", UINT32, heads),
        Field(prefix + b"attention.head_count_kv", UINT32, heads_kv),
        Field(prefix + b"attention.layer_norm_rms_epsilon", FLOAT32, 1e-5),
        Field(prefix + b"rope.freq_base", FLOAT32, 10000.0),
        Field(prefix + b"rope.dimension_count", UINT32, width // heads),
        *vocabulary,
        Field(b"tokenizer.chat_template", STRING, TEMPLATE),
    ]
    dice = random.Random(20240820)
    tensors = [_matrix("token_embd.weight", width, tokens, dice)]
    for number in range(blocks):
        block = f"blk.{number}."
        tensors += [
            _vector(block + "attn_norm.weight", width, 1.0),
            _matrix(block + "attn_q.weight", width, width, dice),
            _matrix(block + "attn_k.weight", width, narrow, dice),
            _matrix(block + "attn_v.weight", width, narrow, dice),
            _matrix(block + "attn_output.weight", width, width, dice),
            _vector(block + "ffn_norm.weight", width, 1.0),
            _matrix(block + "ffn_gate.weight", width, wide, dice),
            _matrix(block + "ffn_up.weight", width, wide, dice),
            _matrix(block + "ffn_down.weight", wide, width, dice),
        ]
        if architecture == "qwen2":
            for part, length in (("q", width), ("k", narrow), ("v", narrow)):
                tensors.append(_vector(f"{block}attn_{part}.bias", length, 0.0))
    tensors.append(_vector("output_norm.weight", width, 1.0))
    if not tied:
        tensors.append(_matrix("output.weight", width, tokens, dice))
    return Gguf(metadata, tensors)


def _matrix(name: str, columns: int, rows: int, dice: random.Random) -> Tensor:
    """Return a matrix in Q8_0: blocks of one float16 scale and 32 signed bytes."""
    scale = struct.pack("<e", 0.0003)
    blocks = columns * rows // 32
    return Tensor(name.encode(), [columns, rows], Q8_0, b"".join(scale + dice.randbytes(32) for _ in range(blocks)))


def _vector(name: str, length: int, value: float) -> Tensor:
    return Tensor(name.encode(), [length], F32, struct.pack(f"<{length}f", *[value] * length))
