"""The header check: what a valid file tells, and that nothing damaged passes or does any harm."""

import errno
import io
import random
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from service.engine import gguf
from service.engine.gguf import GgufHeader, read_header
from service.errors import ModelRefused
from service.models import open_verified
from tests import gguf_writer
from tests.damaged_models import DAMAGES, HASH_ONLY
from tests.gguf_writer import ARRAY, BOOL, FLOAT32, INT32, STRING, UINT32, Array, Field, Gguf

TOKENS, TYPES, MERGES = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.merges"


def read_model(model: Gguf) -> GgufHeader:
    return read_header(io.BytesIO(model.to_bytes()))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.gguf"
    path.write_bytes(gguf_writer.small_model().to_bytes())
    return path


def test_byte_level_model_is_described() -> None:
    """Every field of the header of a llama model with a byte-level vocabulary is what the file says."""
    model = gguf_writer.small_model()
    data = model.to_bytes()
    header = read_header(io.BytesIO(data))
    tokens = model.get(TOKENS).items
    assert header == GgufHeader(
        architecture="llama",
        name="small test model",
        quantization="Q8_0",
        context_length=256,
        block_count=2,
        embedding_length=64,
        feed_forward_length=128,
        head_count=4,
        head_count_kv=2,
        key_length=16,
        value_length=16,
        vocab_size=len(tokens),
        tokenizer_model="gpt2",
        bos_token_id=tokens.index(b"<|begin_of_text|>"),
        eos_token_id=tokens.index(b"<|eot_id|>"),
        add_bos=True,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        end_token_ids=frozenset({tokens.index(b"<|eot_id|>"), tokens.index(b"<|end_of_text|>")}),
        control_token_ids=frozenset(range(len(tokens) - 5, len(tokens))),
        chat_template=gguf_writer.TEMPLATE.decode(),
        # Both vocabulary matrices, and per block two norms, four attention and three feed-forward matrices.
        parameter_count=2 * 64 * len(tokens) + 2 * (2 * 64 + 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128) + 64,
        weights_bytes=(2 * 64 * len(tokens) + 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)) // 32 * 34 + 5 * 64 * 4,
        size_bytes=len(data),
    )


def test_sentence_piece_model_is_described() -> None:
    """A SentencePiece vocabulary begins with <s> and ends with </s> even if the file does not say so."""
    model = gguf_writer.small_model(tokenizer="llama")
    for key in ("bos", "eos"):
        model.drop(f"tokenizer.ggml.{key}_token_id")
    header = read_model(model)
    assert (header.tokenizer_model, header.bos_token, header.eos_token) == ("llama", "<s>", "</s>")
    assert header.add_bos
    assert header.end_token_ids == {2}


def test_tied_qwen2_model_is_accepted() -> None:
    """A qwen2 model with biases and without an output matrix of its own is valid."""
    header = read_model(gguf_writer.small_model(architecture="qwen2", tied=True))
    assert (header.architecture, header.block_count) == ("qwen2", 2)


def test_version_2_is_accepted() -> None:
    """Version 2 has the layout of version 3."""
    model = gguf_writer.small_model()
    model.version = 2
    assert read_model(model).architecture == "llama"


@pytest.mark.parametrize("architecture", sorted(gguf.ARCHITECTURES - {"llama", "qwen2"}), ids=lambda name: name)
def test_other_architectures_are_checked_in_outline(architecture: str) -> None:
    """An architecture that the engine knows passes with plausible tensors, and not with a block missing."""
    model = gguf_writer.small_model()
    for entry in model.metadata:
        entry.key = entry.key.replace(b"llama.", architecture.encode() + b".")
    model.put("general.architecture", STRING, architecture.encode())
    if architecture in gguf.LAYER_NORM:
        model.drop(f"{architecture}.attention.layer_norm_rms_epsilon")
        model.put(f"{architecture}.attention.layer_norm_epsilon", FLOAT32, 1e-5)
    assert read_model(model).architecture == architecture
    model.tensors = [tensor for tensor in model.tensors if not tensor.name.startswith(b"blk.1.")]
    with pytest.raises(ModelRefused, match="block 1 of 2 lacks tensors"):
        read_model(model)


def test_mixture_of_experts_is_accepted() -> None:
    """A llama model whose feed-forward matrices stand once for each expert is valid."""
    model = gguf_writer.small_model()
    model.put("llama.expert_count", UINT32, 2)
    model.put("llama.expert_used_count", UINT32, 1)
    for block in range(2):
        for part in ("gate", "up", "down"):
            tensor = model.tensor(f"blk.{block}.ffn_{part}.weight")
            tensor.name = f"blk.{block}.ffn_{part}_exps.weight".encode()
            tensor.shape.append(2)
            tensor.data *= 2
        model.tensors.append(
            gguf_writer.Tensor(f"blk.{block}.ffn_gate_inp.weight".encode(), [64, 2], gguf_writer.F32, bytes(512))
        )
    assert read_model(model).feed_forward_length == 128


def test_per_block_values_are_reduced_to_the_largest() -> None:
    """Where openelm gives a value per block the header holds the largest, and the count must be right."""
    model = gguf_writer.small_model()
    for entry in model.metadata:
        entry.key = entry.key.replace(b"llama.", b"openelm.")
    model.put("general.architecture", STRING, b"openelm")
    model.put("openelm.attention.head_count", ARRAY, Array(INT32, [2, 4]))
    model.put("openelm.attention.head_count_kv", ARRAY, Array(INT32, [1, 2]))
    header = read_model(model)
    assert (header.head_count, header.head_count_kv) == (4, 2)
    model.put("openelm.attention.head_count", ARRAY, Array(INT32, [2, 4, 4]))
    with pytest.raises(ModelRefused, match="3 items for 2 blocks"):
        read_model(model)


def test_quantization_without_file_type_is_the_most_frequent() -> None:
    """Without general.file_type the tensor type that holds the most bytes gives the name."""
    model = gguf_writer.small_model()
    model.drop("general.file_type")
    assert read_model(model).quantization == "Q8_0"


@pytest.mark.parametrize(
    ("token_type", "ends"),
    [(gguf.TOKEN_CONTROL, True), (gguf.TOKEN_USER_DEFINED, True), (gguf.TOKEN_NORMAL, False)],
)
def test_end_tokens_are_known_by_text_and_type(token_type: int, ends: bool) -> None:
    """A token such as <|im_end|> ends a generation, unless it is a piece of normal text."""
    model = gguf_writer.small_model(tied=True)
    tokens, types = model.get(TOKENS).items, model.get(TYPES).items
    tokens[-2], types[-2] = b"<|im_end|>", token_type
    assert (len(tokens) - 2 in read_model(model).end_token_ids) is ends


def test_gemma_ends_its_turn_with_a_normal_token() -> None:
    """Published gemma files mark <end_of_turn> as a normal token, and it ends a generation all the same."""
    model = gguf_writer.small_model()
    for entry in model.metadata:
        entry.key = entry.key.replace(b"llama.", b"gemma.")
    model.put("general.architecture", STRING, b"gemma")
    tokens, types = model.get(TOKENS).items, model.get(TYPES).items
    tokens[-2], types[-2] = b"<end_of_turn>", gguf.TOKEN_NORMAL
    assert len(tokens) - 2 in read_model(model).end_token_ids


@pytest.mark.parametrize(
    ("pre", "flag", "adds"),
    [(b"llama-bpe", None, True), (b"qwen2", None, False), (b"qwen2", 1, True), (b"llama-bpe", 0, False)],
)
def test_begin_token_is_added_as_the_engine_would(pre: bytes, flag: int | None, adds: bool) -> None:
    """Whether a prompt gets a begin token follows the flag, and without one the pre-tokenizer."""
    model = gguf_writer.small_model()
    model.put("tokenizer.ggml.pre", STRING, pre)
    model.drop("tokenizer.ggml.add_bos_token")
    if flag is not None:
        model.put("tokenizer.ggml.add_bos_token", BOOL, flag)
    assert read_model(model).add_bos is adds


def test_begin_token_may_be_absent_if_it_is_not_added() -> None:
    """Without a begin token the header says so; a model that wants one added must name it."""
    model = gguf_writer.small_model()
    model.drop("tokenizer.ggml.bos_token_id")
    with pytest.raises(ModelRefused, match="bos_token_id is missing"):
        read_model(model)
    model.put("tokenizer.ggml.add_bos_token", BOOL, 0)
    header = read_model(model)
    assert (header.bos_token_id, header.bos_token) == (None, "")


def test_missing_optional_fields_are_filled_in() -> None:
    """Name, template, token types, key-value heads and rotation may be left out."""
    model = gguf_writer.small_model()
    for key in (
        "general.name",
        "tokenizer.chat_template",
        TYPES,
        "llama.rope.dimension_count",
        "llama.rope.freq_base",
    ):
        model.drop(key)
    header = read_model(model)
    assert (header.name, header.chat_template, header.control_token_ids) == (None, None, frozenset())


def test_a_file_that_reads_in_small_pieces_is_read() -> None:
    """A read that returns less than was asked for is no end of the file, and the position does not matter."""

    class Dripping(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            return super().read(min(size or 0, 1000))

    file = Dripping(gguf_writer.small_model().to_bytes())
    file.seek(77)
    assert read_header(file).architecture == "llama"


def test_a_file_that_shrinks_is_refused() -> None:
    """A file that ends before its size said it would is refused."""

    class Shrinking(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            return b""

    with pytest.raises(ModelRefused, match="shorter while it was read"):
        read_header(Shrinking(gguf_writer.small_model().to_bytes()))


def test_a_file_that_cannot_be_read_is_refused() -> None:
    """An error of the disk is told in one line."""

    class Failing(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(ModelRefused, match="cannot be read: Input/output error"):
        read_header(Failing(gguf_writer.small_model().to_bytes()))


def test_arrays_that_nobody_needs_cost_no_memory() -> None:
    """A long array of numbers under some other key is passed over, not turned into objects."""
    model = gguf_writer.small_model()
    model.metadata.append(Field(b"tool.numbers", ARRAY, Array(gguf_writer.UINT8, [7] * 4_000_000)))
    file = io.BytesIO(model.to_bytes())
    tracemalloc.start()
    try:
        read_header(file)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 10_000_000


# Damage


@pytest.mark.parametrize("kind", [kind for kind in DAMAGES if kind not in HASH_ONLY])
def test_damage_is_refused_before_the_engine_sees_it(kind: str, base: Path, tmp_path: Path) -> None:
    """Every kind of damage that a header can tell is refused with one line."""
    path = DAMAGES[kind](base)
    with pytest.raises(ModelRefused) as refusal, open_verified(path, None, tmp_path / "stamps").file as file:
        read_header(file)
    assert len(str(refusal.value).splitlines()) == 1
    assert str(refusal.value).isprintable()


@pytest.mark.parametrize("kind", sorted(HASH_ONLY))
def test_damage_that_only_the_digest_tells_is_refused(kind: str, base: Path, tmp_path: Path) -> None:
    """A well-formed file with other content passes the header check, and is refused for its digest."""
    right = open_verified(base, None, tmp_path / "stamps")
    right.file.close()
    path = DAMAGES[kind](base)
    with path.open("rb") as file:
        read_header(file)
    with pytest.raises(ModelRefused, match="is not the expected one"):
        open_verified(path, right.sha256, tmp_path / "stamps")


def test_damages_are_many_and_leave_the_base_alone(base: Path) -> None:
    """There are at least forty kinds, and making them changes nothing in the file they are made from."""
    before = base.read_bytes()
    made = [make(base) for make in DAMAGES.values()]
    assert len(set(made)) == len(DAMAGES) >= 40
    assert base.read_bytes() == before
    assert all(path.parent == base.parent and path != base for path in made)


def test_every_architecture_for_embeddings_is_told_apart() -> None:
    """A model that makes embeddings is refused with that word, not as damage."""
    for architecture in gguf.EMBEDDING_ARCHITECTURES:
        model = gguf_writer.small_model()
        model.put("general.architecture", STRING, architecture.encode())
        with pytest.raises(ModelRefused, match="embeddings"):
            read_model(model)


def test_sentence_piece_vocabulary_needs_every_byte() -> None:
    """A SentencePiece vocabulary without a byte token ends the engine when the byte comes; it is refused."""
    model = gguf_writer.small_model(tokenizer="llama")
    tokens = model.get(TOKENS).items
    tokens[tokens.index(b"<0xE2>")] = b"<0xZZ>"
    with pytest.raises(ModelRefused, match="byte token"):
        read_model(model)


def test_byte_level_vocabulary_may_lack_control_characters() -> None:
    """Published vocabularies have no token for some control characters, and are accepted all the same."""
    model = gguf_writer.small_model()
    tokens = model.get(TOKENS).items
    texts = gguf_writer.byte_texts()
    for byte in (0x00, 0x03, 0x1C, 0xC0, 0xF1, 0xF2, 0xFF):
        tokens[tokens.index(texts[byte])] = b"in place of %d" % byte
    assert read_model(model).vocab_size == len(tokens)
    tokens[tokens.index(texts[0xF0])] = b"in place of the lead byte of an emoji"
    with pytest.raises(ModelRefused, match="byte token"):
        read_model(model)


def test_scores_that_are_no_numbers_are_refused() -> None:
    """The engine sorts by the scores, which must be comparable."""
    model = gguf_writer.small_model(tokenizer="llama")
    model.get("tokenizer.ggml.scores").items[5] = float("nan")
    with pytest.raises(ModelRefused, match="scores"):
        read_model(model)


def test_phi3_by_name_needs_its_tokens() -> None:
    """The engine looks up four tokens in a model called phi-3, so they must be there."""
    model = gguf_writer.small_model()
    model.put("general.name", STRING, b"My Phi-3 merge")
    with pytest.raises(ModelRefused, match="vocabulary lacks '</s>'"):
        read_model(model)


def _flip_some(data: bytearray, dice: random.Random) -> None:
    for _ in range(dice.choice((1, 1, 1, 2, 4, 16))):
        data[dice.randrange(len(data))] = dice.choice((0, 1, 0x7F, 0x80, 0xFF, dice.randrange(256)))


def _cut_somewhere(data: bytearray, dice: random.Random) -> None:
    del data[dice.randrange(len(data)) :]


def _move_some(data: bytearray, dice: random.Random) -> None:
    start, length, target = dice.randrange(len(data)), dice.randrange(1, 64), dice.randrange(len(data))
    data[target : target + length] = data[start : start + length]


@pytest.mark.parametrize("tokenizer", ["gpt2", "llama"])
def test_random_damage_is_read_or_refused_and_nothing_else(tokenizer: str) -> None:
    """Over thousands of damaged headers read_header returns or raises ModelRefused, within moments."""
    model = gguf_writer.small_model(tokenizer=tokenizer)
    whole = model.to_bytes()
    header_bytes = model.marks["data"]
    dice = random.Random(f"damage {tokenizer}")
    changes: list[Callable[[bytearray, random.Random], None]] = [*[_flip_some] * 6, _cut_somewhere, _move_some]
    lines: list[str] = []
    slowest_s = 0.0
    for _ in range(2_000):
        header = bytearray(whole[:header_bytes])
        dice.choice(changes)(header, dice)
        file = io.BytesIO(bytes(header) + whole[header_bytes:])
        started_s = time.process_time()
        try:
            read_header(file)
        except ModelRefused as refusal:
            lines.append(str(refusal))
        slowest_s = max(slowest_s, time.process_time() - started_s)
    # Most flips in the text of a token leave a valid file; those in the structure must not.
    assert len(lines) > 700
    assert all(line.isprintable() for line in lines)
    assert slowest_s < 0.5


@pytest.mark.parametrize(
    "kind",
    [
        "keys_claimed_absurd", "tensors_claimed_largest", "string_length_of_terabytes",
        "array_count_of_billions", "array_count_largest", "token_length_absurd", "tensor_dimensions_absurd",
    ],
)  # fmt: skip
def test_absurd_claims_cost_no_memory(kind: str, base: Path) -> None:
    """A count or length in the file never decides how much memory is taken."""
    data = DAMAGES[kind](base).read_bytes()
    tracemalloc.start()
    try:
        with pytest.raises(ModelRefused):
            read_header(io.BytesIO(data))
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 2_000_000


def _large_model(size: int) -> Gguf:
    """Return a model whose vocabulary has ``size`` tokens, nearly all of them made by merges."""
    model = gguf_writer.small_model(tied=True)
    texts = gguf_writer.byte_texts()
    letters = [text for text in texts if len(text) == 1 and text.isalpha()]
    special = list(gguf_writer.SPECIAL)
    tokens, known, merges = list(texts), set(texts), []
    grown = list(letters)
    for left in grown:
        for right in letters:
            if len(tokens) + len(special) == size:
                break
            if left + right not in known:
                known.add(left + right)
                tokens.append(left + right)
                grown.append(left + right)
                merges.append(left + b" " + right)
    plain = len(tokens)
    model.put(TOKENS, ARRAY, Array(STRING, tokens + special))
    model.put(TYPES, ARRAY, Array(INT32, [1] * plain + [3] * len(special)))
    model.put(MERGES, ARRAY, Array(STRING, merges))
    for name, number in (("bos", 0), ("padding", 1), ("eos", 4)):
        model.put(f"tokenizer.ggml.{name}_token_id", UINT32, plain + number)
    matrix = model.tensor("token_embd.weight")
    matrix.shape[1], matrix.data = size, bytes(64 * size // 32 * 34)
    return model


def test_a_large_vocabulary_is_read_in_well_under_a_second() -> None:
    """A header with 151,936 tokens and as many merges takes less than a second of processor time."""
    file = io.BytesIO(_large_model(151_936).to_bytes())
    started_s = time.process_time()
    header = read_header(file)
    assert time.process_time() - started_s < 1.0
    assert header.vocab_size == 151_936


# Memory


def test_memory_terms_follow_the_shapes() -> None:
    """The cache is two float16 vectors per block, key-value head and position; weights are as in the file."""
    header = read_model(gguf_writer.small_model())
    need = gguf.estimate_memory(header, 256)
    assert need.cache_bytes == 256 * (2 * 2 * (16 + 16) * 2 + gguf.CACHE_CELL_BYTES)
    assert need.weights_bytes == header.weights_bytes
    assert need.total_bytes == gguf.required_memory_bytes(header, 256)
    assert gguf.required_memory_bytes(header, 225) == gguf.required_memory_bytes(header, 256)
    assert gguf.required_memory_bytes(header, 224) < gguf.required_memory_bytes(header, 256)


def test_largest_context_is_the_largest_that_fits() -> None:
    """The context found fits, one step more does not, and it never exceeds the file's own."""
    model = gguf_writer.small_model()
    model.put("llama.context_length", UINT32, 1_000_000)
    header = read_model(model)

    def fits(context_length: int, memory_bytes: int) -> bool:
        need = gguf.estimate_memory(header, context_length)
        return max(need.total_bytes, need.reserved_bytes) <= memory_bytes

    for memory_bytes in (70_000_000, 80_000_000, 1_000_000_000):
        found = gguf.largest_context(header, memory_bytes)
        assert 0 < found < header.context_length
        assert fits(found, memory_bytes)
        assert not fits(found + 1, memory_bytes)
    assert gguf.largest_context(header, 10**13) == 1_000_000
    assert gguf.largest_context(header, 50_000_000) == 0


def test_reserved_address_space_is_known() -> None:
    """llama.cpp reserved 26,624,530,432 bytes for 4 heads and 2,600,000 positions, where Linux refused it."""
    model = gguf_writer.small_model()
    model.put("llama.context_length", UINT32, 2_600_000)
    reserved_bytes = gguf.estimate_memory(read_model(model), 2_600_000).reserved_bytes
    assert reserved_bytes == pytest.approx(26_624_530_432, rel=0.001)


def test_unused_metadata_is_no_reason_to_refuse() -> None:
    """Fields that the engine does not read may hold anything well-formed."""
    model = gguf_writer.small_model()
    model.metadata.insert(1, Field(b"general.tags", ARRAY, Array(STRING, [b"chat", b"\xff"])))
    model.metadata.append(Field(b"tool.numbers", ARRAY, Array(gguf_writer.FLOAT64, [1.5, 2.5])))
    model.metadata.append(Field(b"tool.date", STRING, b"\xff\xfe not text"))
    assert read_model(model).architecture == "llama"
