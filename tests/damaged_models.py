"""Owns the kinds of damage that a model file can have: each makes a damaged copy beside a valid one.

``DAMAGES`` maps a name to a function that takes the path of a valid llama model with a byte-level
vocabulary, writes the damaged copy into the same folder (so copy the base into a folder of your own first)
and returns its path. The names in ``HASH_ONLY`` leave a file that is well-formed, so that only its digest
tells; all others must be refused when the file is opened or its header is read.
"""

import gzip
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests import gguf_writer as gguf
from tests.gguf_writer import (
    ARRAY,
    BOOL,
    FLOAT32,
    INT32,
    STRING,
    UINT8,
    UINT16,
    UINT32,
    UINT64,
    Array,
    Gguf,
    Raw,
)

Damage = Callable[[Path], Path]

DAMAGES: dict[str, Damage] = {}
HASH_ONLY: set[str] = set()

LARGEST = 2**64 - 1
TOKENS, TYPES = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type"
MERGES, TEMPLATE = "tokenizer.ggml.merges", "tokenizer.chat_template"
CONTEXT, WIDTH, BLOCKS = "llama.context_length", "llama.embedding_length", "llama.block_count"
HEADS, HEADS_KV = "llama.attention.head_count", "llama.attention.head_count_kv"
EPSILON = "llama.attention.layer_norm_rms_epsilon"
BOS, EOS = "tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id"


def _by_fields(name: str, bend: Callable[[Gguf], object], hash_only: bool = False) -> None:
    """Register a damage that bends the fields of the file."""

    def make(base: Path) -> Path:
        model = gguf.read(base.read_bytes())
        bend(model)
        return _write(base, name, model.to_bytes())

    DAMAGES[name] = make
    if hash_only:
        HASH_ONLY.add(name)


def _by_bytes(name: str, bend: Callable[[bytes, dict[str, int]], bytes], hash_only: bool = False) -> None:
    """Register a damage that changes bytes, told where the sections of the file begin."""

    def make(base: Path) -> Path:
        data = base.read_bytes()
        model = gguf.read(data)
        model.to_bytes()
        return _write(base, name, bend(data, model.marks))

    DAMAGES[name] = make
    if hash_only:
        HASH_ONLY.add(name)


def _by_path(name: str, make: Callable[[Path, Path], object]) -> None:
    """Register a damage that is no file content at all, told the base and the path to occupy."""

    def occupy(base: Path) -> Path:
        path = base.with_name(f"{name}.gguf")
        make(base, path)
        return path

    DAMAGES[name] = occupy


def _write(base: Path, name: str, data: bytes) -> Path:
    path = base.with_name(f"{name}.gguf")
    path.write_bytes(data)
    return path


def _overwrite(data: bytes, start: int, patch: bytes) -> bytes:
    return data[:start] + patch + data[start + len(patch) :]


def _put(key: str, value_type: int, value: object) -> Callable[[Gguf], object]:
    return lambda model: model.put(key, value_type, value)


def _claim(field: str, value: int) -> Callable[[Gguf], object]:
    return lambda model: setattr(model, field, value)


def _first_matrix(model: Gguf) -> gguf.Tensor:
    return model.tensor("blk.0.attn_q.weight")


def _with_matrix(**changes: object) -> Callable[[Gguf], object]:
    def bend(model: Gguf) -> None:
        for field, value in changes.items():
            setattr(_first_matrix(model), field, value)

    return bend


def _with_items(key: str, change: Callable[[list[Any]], object]) -> Callable[[Gguf], object]:
    return lambda model: change(model.get(key).items)


def _without(key: str) -> Callable[[Gguf], object]:
    return lambda model: model.drop(key)


# Cut short


def _cut(where: Callable[[bytes, dict[str, int]], int]) -> Callable[[bytes, dict[str, int]], bytes]:
    return lambda data, marks: data[: where(data, marks)]


for _name, _where in {
    "cut_to_two_bytes": lambda data, marks: 2,
    "cut_after_magic": lambda data, marks: 4,
    "cut_in_counts": lambda data, marks: 20,
    "cut_in_first_key": lambda data, marks: marks["metadata"] + 12,
    "cut_in_vocabulary": lambda data, marks: marks[TOKENS] + 400,
    "cut_after_metadata": lambda data, marks: marks["tensors"],
    "cut_in_tensor_descriptions": lambda data, marks: (marks["tensors"] + marks["data"]) // 2,
    "cut_before_weights": lambda data, marks: marks["data"],
    "cut_in_half": lambda data, marks: len(data) // 2,
    "cut_by_the_last_block": lambda data, marks: len(data) - 64,
}.items():
    _by_bytes(_name, _cut(_where))

# Another kind of file


_by_bytes("empty", lambda data, marks: b"")
_by_bytes("html_page", lambda data, marks: b"<!DOCTYPE html><html><body><h1>404 Not Found</h1></body></html>\n")
_by_bytes("compressed", lambda data, marks: gzip.compress(data, 1, mtime=0))
_by_bytes("all_zeros", lambda data, marks: bytes(len(data)))
_by_bytes("flipped_magic", lambda data, marks: _overwrite(data, 0, b"GGUE"))
_by_bytes("older_format", lambda data, marks: _overwrite(data, 0, b"ggjt"))
_by_bytes("version_0", lambda data, marks: _overwrite(data, 4, b"\0\0\0\0"))
_by_bytes("version_1", lambda data, marks: _overwrite(data, 4, b"\1\0\0\0"))
_by_bytes("version_4", lambda data, marks: _overwrite(data, 4, b"\4\0\0\0"))
_by_bytes("big_endian", lambda data, marks: _overwrite(data, 4, b"\0\0\0\3"))
_by_bytes("zeroed_metadata", lambda data, marks: _overwrite(data, marks["metadata"] + 40, bytes(64)))
_by_bytes("zeroed_vocabulary", lambda data, marks: _overwrite(data, marks[TOKENS] + 60, bytes(512)))
_by_bytes("zeroed_tensor_descriptions", lambda data, marks: _overwrite(data, marks["tensors"] + 40, bytes(64)))
_by_bytes("shifted_by_one_byte", lambda data, marks: data[:4] + b"\0" + data[4:])

# Counts and lengths


_by_fields("tensors_claimed_absurd", _claim("claimed_tensors", 2**63))
_by_fields("tensors_claimed_largest", _claim("claimed_tensors", LARGEST))
_by_fields("tensors_claimed_million", _claim("claimed_tensors", 10**6))
_by_fields("tensors_claimed_none", _claim("claimed_tensors", 0))
_by_fields("tensors_claimed_one_more", lambda model: setattr(model, "claimed_tensors", len(model.tensors) + 1))
_by_fields("keys_claimed_absurd", _claim("claimed_keys", 2**60))
_by_fields("keys_claimed_billion", _claim("claimed_keys", 10**9))
_by_fields("keys_claimed_one_more", lambda model: setattr(model, "claimed_keys", len(model.metadata) + 1))
_by_fields("keys_claimed_one_less", lambda model: setattr(model, "claimed_keys", len(model.metadata) - 1))
_by_fields("key_length_absurd", lambda model: setattr(model.metadata[1], "key", Raw(b"\xff" * 7 + b"\x7f")))
_by_fields("string_length_largest", _put("general.name", STRING, Raw(b"\xff" * 8)))
_by_fields("string_length_of_terabytes", _put("general.name", STRING, Raw((2**42).to_bytes(8, "little"))))
_by_fields(
    "token_length_absurd",
    _with_items(TOKENS, lambda items: items.insert(5, Raw((2**40).to_bytes(8, "little")))),
)
_by_fields("array_count_largest", lambda model: setattr(model.get(TOKENS), "claimed_count", LARGEST))
_by_fields("array_count_of_billions", lambda model: setattr(model.get(TYPES), "claimed_count", 2**34))
_by_fields(
    "array_count_one_less",
    lambda model: setattr(model.get(TYPES), "claimed_count", len(model.get(TYPES).items) - 1),
)

# Types


_by_fields("array_of_arrays", _put("extra", ARRAY, Array(ARRAY, [Array(UINT32, [1]), Array(UINT32, [2])])))
_by_fields("value_type_unknown", _put("general.name", 13, Raw(b"\0" * 8)))
_by_fields("array_type_unknown", _put("extra", ARRAY, Raw(b"\x63\0\0\0" + b"\1" + b"\0" * 15)))
_by_fields("bool_of_two", _put("tokenizer.ggml.add_bos_token", BOOL, 2))
_by_fields("architecture_as_number", _put("general.architecture", UINT32, 1))
_by_fields("name_as_number", _put("general.name", UINT32, 1))
_by_fields("alignment_as_string", _put("general.alignment", STRING, b"32"))
_by_fields("file_type_as_string", _put("general.file_type", STRING, b"Q8_0"))
_by_fields("context_length_as_string", _put(CONTEXT, STRING, b"2048"))
_by_fields("context_length_as_uint64", _put(CONTEXT, UINT64, 2048))
_by_fields("head_count_as_array", _put(HEADS, ARRAY, Array(INT32, [4, 4])))
_by_fields("epsilon_as_number", _put(EPSILON, UINT32, 1))
_by_fields("tokens_as_numbers", _put(TOKENS, ARRAY, Array(UINT64, [7] * 266)))
_by_fields("tokens_as_string", _put(TOKENS, STRING, b"a b c"))
_by_fields("token_types_as_strings", _put(TYPES, ARRAY, Array(STRING, [b"x"] * 266)))
_by_fields(
    "token_types_as_bytes",
    lambda model: model.put(TYPES, ARRAY, Array(UINT8, [1] * len(model.get(TYPES).items))),
)
_by_fields("scores_as_strings", _put("tokenizer.ggml.scores", ARRAY, Array(STRING, [b"x"] * 266)))
_by_fields("merges_as_numbers", _put(MERGES, ARRAY, Array(UINT64, [7] * 50)))
_by_fields("eos_as_string", _put(EOS, STRING, b"2"))
_by_fields("eos_as_int32", _put(EOS, INT32, 2))
_by_fields("add_bos_as_number", _put("tokenizer.ggml.add_bos_token", UINT32, 1))
_by_fields("add_space_prefix_as_number", _put("tokenizer.ggml.add_space_prefix", UINT32, 1))
_by_fields("chat_template_as_number", _put(TEMPLATE, UINT32, 1))

# Keys


_by_fields("key_twice", lambda model: model.metadata.append(gguf.Field(CONTEXT.encode(), UINT32, 512)))
_by_fields("key_not_utf8", lambda model: setattr(model.metadata[1], "key", b"general.\xff\xfe"))
_by_fields("key_with_nul", lambda model: setattr(model.metadata[1], "key", b"general\0name"))
for _key in (
    "general.architecture", CONTEXT, WIDTH, BLOCKS, "llama.feed_forward_length", HEADS, EPSILON,
    "tokenizer.ggml.model", TOKENS, MERGES, EOS,
):  # fmt: skip
    _by_fields(f"missing_{_key.rsplit('.', 1)[1]}", _without(_key))

# Hyper-parameters


def _make_deep(data: bytes, marks: dict[str, int]) -> bytes:
    """Return a model with so many blocks that the engine's graph overflows, which ends its process."""
    model = gguf.small_model()  # 200 blocks of a larger model would be a large file
    block = [tensor for tensor in model.tensors if tensor.name.startswith(b"blk.0.")]
    model.tensors = [tensor for tensor in model.tensors if not tensor.name.startswith(b"blk.")]
    for number in range(200):
        name = b"blk.%d." % number
        model.tensors += [replace(tensor, name=tensor.name.replace(b"blk.0.", name)) for tensor in block]
    model.put(BLOCKS, UINT32, 200)
    return model.to_bytes()


_by_fields("architecture_unknown", _put("general.architecture", STRING, b"llama9"))
_by_fields("architecture_for_embeddings", _put("general.architecture", STRING, b"bert"))
_by_fields("architecture_of_other_tensors", _put("general.architecture", STRING, b"falcon"))
_by_fields("alignment_zero", _put("general.alignment", UINT32, 0))
_by_fields("alignment_odd", _put("general.alignment", UINT32, 33))
_by_fields("alignment_huge", _put("general.alignment", UINT32, 2**31))
_by_fields("context_length_zero", _put(CONTEXT, UINT32, 0))
_by_fields("context_length_absurd", _put(CONTEXT, UINT32, 2**32 - 1))
_by_fields("block_count_zero", _put(BLOCKS, UINT32, 0))
_by_fields("block_count_billion", _put(BLOCKS, UINT32, 10**9))
_by_bytes("block_count_deeper_than_the_graph", _make_deep)
_by_fields("block_count_one_more", lambda model: model.put(BLOCKS, UINT32, model.get(BLOCKS) + 1))
_by_fields("block_count_one_less", lambda model: model.put(BLOCKS, UINT32, model.get(BLOCKS) - 1))
_by_fields("embedding_length_zero", _put(WIDTH, UINT32, 0))
_by_fields("embedding_length_doubled", lambda model: model.put(WIDTH, UINT32, 2 * model.get(WIDTH)))
_by_fields("feed_forward_length_zero", _put("llama.feed_forward_length", UINT32, 0))
_by_fields("head_count_zero", _put(HEADS, UINT32, 0))
_by_fields("head_count_uneven", _put(HEADS, UINT32, 5))
_by_fields("head_count_kv_zero", _put(HEADS_KV, UINT32, 0))
_by_fields("head_count_kv_uneven", _put(HEADS_KV, UINT32, 3))
_by_fields("head_count_kv_above_heads", lambda model: model.put(HEADS_KV, UINT32, 2 * model.get(HEADS)))
_by_fields("key_length_other", _put("llama.attention.key_length", UINT32, 24))
_by_fields("rope_dimensions_other", _put("llama.rope.dimension_count", UINT32, 6))
_by_fields("rope_scaling_unknown", _put("llama.rope.scaling.type", STRING, b"longrope"))
_by_fields("rope_base_zero", _put("llama.rope.freq_base", FLOAT32, 0.0))
_by_fields("epsilon_zero", _put(EPSILON, FLOAT32, 0.0))
_by_fields("epsilon_not_a_number", _put(EPSILON, FLOAT32, float("nan")))
_by_fields("experts_without_use", _put("llama.expert_count", UINT32, 8))
_by_fields("experts_too_many", _put("llama.expert_count", UINT32, 10**6))
_by_fields("vocab_size_other", _put("llama.vocab_size", UINT32, 32000))
_by_fields("part_of_a_split", _put("split.count", UINT16, 3))

# Vocabulary


_by_fields("tokenizer_unknown", _put("tokenizer.ggml.model", STRING, b"rwkv"))
_by_fields("tokenizer_of_embeddings", _put("tokenizer.ggml.model", STRING, b"bert"))
_by_fields("pre_tokenizer_unknown", _put("tokenizer.ggml.pre", STRING, b"deepseek-r1-qwen"))
_by_fields("token_twice", _with_items(TOKENS, lambda items: items.__setitem__(-1, items[-2])))
_by_fields("token_empty", _with_items(TOKENS, lambda items: items.__setitem__(-2, b"")))
_by_fields("token_with_nul", _with_items(TOKENS, lambda items: items.__setitem__(-2, b"a\0b")))
_by_fields("token_not_utf8", _with_items(TOKENS, lambda items: items.__setitem__(-2, b"\xc3\x28")))
_by_fields("token_too_many", _with_items(TOKENS, lambda items: items.append(b"<|one too many|>")))
_by_fields("token_type_unknown", _with_items(TYPES, lambda items: items.__setitem__(70, 77)))
_by_fields("token_type_byte", _with_items(TYPES, lambda items: items.__setitem__(70, 6)))
_by_fields("token_types_short", _with_items(TYPES, lambda items: items.pop()))
_by_fields("scores_short", _put("tokenizer.ggml.scores", ARRAY, Array(FLOAT32, [0.0])))
_by_fields("byte_token_missing", _with_items(TOKENS, lambda items: items.__setitem__(items.index(b"q"), b"qqqq")))
_by_fields(
    "line_feed_missing",
    _with_items(TOKENS, lambda items: items.__setitem__(items.index("\u010a".encode()), b"qqqq")),
)
_by_fields("merge_without_space", _with_items(MERGES, lambda items: items.__setitem__(0, b"ab")))
_by_fields("merge_empty", _with_items(MERGES, lambda items: items.__setitem__(0, b"")))
_by_fields("merge_of_unknown_parts", _with_items(MERGES, lambda items: items.__setitem__(0, b"zqx xqz")))
_by_fields("merge_not_utf8", _with_items(MERGES, lambda items: items.__setitem__(0, b"\xff \xfe")))
_by_fields("eos_out_of_range", _put(EOS, UINT32, 10**6))
_by_fields("eos_negative", _put(EOS, UINT32, 2**32 - 1))
_by_fields("bos_out_of_range", _put(BOS, UINT32, 10**6))
_by_fields("padding_out_of_range", _put("tokenizer.ggml.padding_token_id", UINT32, 10**6))
_by_fields("unknown_out_of_range", _put("tokenizer.ggml.unknown_token_id", UINT32, 10**6))
_by_fields("eot_out_of_range", _put("tokenizer.ggml.eot_token_id", UINT32, 10**6))
_by_fields("chat_template_huge", _put(TEMPLATE, STRING, b"{{ x }}" * 100_000))
_by_fields("chat_template_not_utf8", _put(TEMPLATE, STRING, b"{{ \xff }}"))

# Tensors


def _put_all_at_zero(model: Gguf) -> None:
    for tensor in model.tensors:
        tensor.offset = 0


_by_fields("tensor_name_long", _with_matrix(name=b"blk.0." + b"q" * 70))
_by_fields("tensor_name_empty", _with_matrix(name=b""))
_by_fields("tensor_name_not_utf8", _with_matrix(name=b"blk.0.\xff"))
_by_fields("tensor_name_twice", _with_matrix(name=b"token_embd.weight"))
_by_fields("tensor_without_dimensions", _with_matrix(shape=[]))
_by_fields("tensor_of_five_dimensions", _with_matrix(shape=[64, 64, 1, 1, 1]))
_by_fields("tensor_dimensions_absurd", _with_matrix(claimed_dimensions=2**31))
_by_fields("tensor_dimension_zero", _with_matrix(shape=[64, 0]))
_by_fields("tensor_dimension_absurd", _with_matrix(shape=[64, 2**62]))
_by_fields("tensor_shape_overflows", _with_matrix(shape=[2**32, 2**32]))
_by_fields("tensor_rows_off_block", _with_matrix(shape=[65, 64]))
_by_fields("tensor_type_unknown", _with_matrix(type=99))
_by_fields("tensor_type_removed", _with_matrix(type=4))
_by_fields("tensor_type_integer", _with_matrix(type=26))
_by_fields("tensor_type_intermediate", _with_matrix(type=15))
_by_fields("tensor_type_of_arm", _with_matrix(type=33))
_by_fields("tensor_misaligned", _with_matrix(offset=13))
_by_fields("tensor_out_of_file", _with_matrix(offset=2**40))
_by_fields("tensor_offset_wraps", _with_matrix(offset=2**64 - 32))
_by_fields("tensor_overlaps", _with_matrix(offset=0))
_by_fields(
    "tensor_points_at_the_end",
    lambda model: setattr(_first_matrix(model), "offset", len(model.to_bytes()) // 32 * 32),
)
_by_fields("tensors_all_at_zero", _put_all_at_zero)
_by_fields("tensor_missing", lambda model: model.tensors.remove(_first_matrix(model)))
_by_fields("tensor_extra", lambda model: model.tensors.append(gguf.Tensor(b"blk.0.extra", [8], 0, bytes(32))))
_by_fields("embedding_missing", lambda model: model.tensors.remove(model.tensor("token_embd.weight")))
_by_fields("output_norm_missing", lambda model: model.tensors.remove(model.tensor("output_norm.weight")))
_by_fields("norm_as_float16", lambda model: setattr(model.tensor("blk.0.attn_norm.weight"), "type", 1))
_by_fields("matrix_transposed", lambda model: model.tensor("blk.0.ffn_up.weight").shape.reverse())
_by_fields("matrix_of_three_dimensions", lambda model: _first_matrix(model).shape.append(2))


def _swap_names(model: Gguf) -> None:
    one, two = model.tensor("blk.0.ffn_up.weight"), model.tensor("blk.0.ffn_down.weight")
    one.name, two.name = two.name, one.name


_by_fields("tensor_names_swapped", _swap_names)

# Not a file that can be read


_by_path("missing", lambda base, path: None)
_by_path("directory", lambda base, path: path.mkdir())
_by_path("fifo", lambda base, path: os.mkfifo(path))
_by_path("symlink_to_itself", lambda base, path: path.symlink_to(path.name))
_by_path("symlink_to_nothing", lambda base, path: path.symlink_to("nothing.gguf"))
_by_path("symlink_to_a_device", lambda base, path: path.symlink_to("/dev/zero"))


def _make_unreadable(base: Path, path: Path) -> None:
    path.write_bytes(base.read_bytes())
    path.chmod(0)


if os.geteuid() != 0:  # root reads what nobody may read, so that for root this is no damage
    _by_path("unreadable", _make_unreadable)

# Well-formed, but not what it was: only the digest tells


def _swap_weights(model: Gguf) -> None:
    one, two = model.tensor("blk.0.ffn_gate.weight"), model.tensor("blk.0.ffn_up.weight")
    one.data, two.data = two.data, one.data


def _swap_tokens(model: Gguf) -> None:
    items = model.get(TOKENS).items
    one, two = items.index(b"e"), items.index(b"o")
    items[one], items[two] = items[two], items[one]


def _flip(data: bytes, position: int) -> bytes:
    return _overwrite(data, position, bytes([data[position] ^ 0x40]))


_by_bytes("weight_bit_flipped", lambda data, marks: _flip(data, marks["data"] + 1001), hash_only=True)
_by_bytes("last_weight_bit_flipped", lambda data, marks: _flip(data, len(data) - 40), hash_only=True)
_by_bytes("weights_zeroed", lambda data, marks: _overwrite(data, marks["data"] + 4096, bytes(4096)), hash_only=True)
_by_bytes(
    "all_weights_zeroed",
    lambda data, marks: data[: marks["data"]] + bytes(len(data) - marks["data"]),
    hash_only=True,
)
_by_bytes("weights_not_numbers", lambda data, marks: _overwrite(data, marks["data"], b"\xff" * 2048), hash_only=True)
_by_bytes("trailing_bytes", lambda data, marks: data + b"trailing" * 8, hash_only=True)
_by_fields("weights_swapped", _swap_weights, hash_only=True)
_by_fields("tokens_swapped", _swap_tokens, hash_only=True)
_by_fields("merges_reversed", _with_items(MERGES, lambda items: items.reverse()), hash_only=True)
_by_fields("name_changed", _put("general.name", STRING, b"something else"), hash_only=True)
_by_fields("chat_template_changed", _put(TEMPLATE, STRING, b"{{ messages }}"), hash_only=True)
_by_fields("rope_base_changed", _put("llama.rope.freq_base", FLOAT32, 77.0), hash_only=True)
_by_fields("epsilon_changed", _put(EPSILON, FLOAT32, 0.5), hash_only=True)
_by_fields("context_length_changed", lambda model: model.put(CONTEXT, UINT32, model.get(CONTEXT) * 2), hash_only=True)
