"""Owns the model that is measured: random weights in the real shape of a 0.5B (Qwen2), made once, kept in .cache."""

import random
from pathlib import Path

import numpy

from tests.gguf_writer import ARRAY, FLOAT32, INT32, STRING, UINT32, Array, Field, Gguf, Tensor, byte_texts

# Shape of Qwen2-0.5B (its config.json), with Llama's names; the vocabulary is what makes a small model's prefill slow.
WIDTH, BLOCKS, HEADS, HEADS_KV, FEED_FORWARD, VOCABULARY = 896, 24, 14, 2, 4864, 151_936
CONTEXT_LENGTH = 4096
F32, Q4_0 = 0, 2
MERGED_WORDS = ("th", "he", "in", "er", "an", "re", "on", "at", "en", "nd")


def half_billion(folder: Path) -> Path:
    """Path of the model (360 MB), written if it is not there."""
    path = folder / "half-billion-q4_0.gguf"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_bytes(_build().to_bytes())
        temporary.replace(path)
    return path


def _build() -> Gguf:
    dice = numpy.random.default_rng(5)
    tokens = [*byte_texts(), *(word.encode() for word in MERGED_WORDS)]
    marks = [b"<|begin|>", b"<|end|>", b"<|user|>", b"<|assistant|>"]
    filler = VOCABULARY - len(tokens) - len(marks)
    tokens += [b"filler%d" % number for number in range(filler)]
    first_mark = len(tokens)
    tokens += marks
    template = (
        "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    head = [
        ("general.architecture", STRING, b"llama"),
        ("general.name", STRING, b"random half billion"),
        ("general.file_type", UINT32, 2),
        ("llama.context_length", UINT32, CONTEXT_LENGTH),
        ("llama.embedding_length", UINT32, WIDTH),
        ("llama.block_count", UINT32, BLOCKS),
        ("llama.feed_forward_length", UINT32, FEED_FORWARD),
        ("llama.attention.head_count", UINT32, HEADS),
        ("llama.attention.head_count_kv", UINT32, HEADS_KV),
        ("llama.attention.layer_norm_rms_epsilon", FLOAT32, 1e-6),
        ("llama.rope.dimension_count", UINT32, WIDTH // HEADS),
        ("tokenizer.ggml.model", STRING, b"gpt2"),
        ("tokenizer.ggml.pre", STRING, b"llama-bpe"),
        ("tokenizer.ggml.tokens", ARRAY, Array(STRING, tokens)),
        ("tokenizer.ggml.token_type", ARRAY, Array(INT32, [1] * first_mark + [3] * len(marks))),
        ("tokenizer.ggml.merges", ARRAY, Array(STRING, [" ".join(word).encode() for word in MERGED_WORDS])),
        ("tokenizer.ggml.bos_token_id", UINT32, first_mark),
        ("tokenizer.ggml.eos_token_id", UINT32, first_mark + 1),
        ("tokenizer.chat_template", STRING, template.encode()),
    ]
    narrow = WIDTH // HEADS * HEADS_KV
    embedding = _matrix("token_embd.weight", WIDTH, VOCABULARY, dice)
    rows, row_bytes = bytearray(embedding.data), WIDTH // 32 * 18
    rows[first_mark * row_bytes :] = bytes(len(marks) * row_bytes)  # no wish to end, for equal lengths
    embedding.data = bytes(rows)
    tensors = [embedding]
    for number in range(BLOCKS):
        block = f"blk.{number}."
        tensors += [
            _ones(block + "attn_norm.weight"),
            _matrix(block + "attn_q.weight", WIDTH, WIDTH, dice),
            _matrix(block + "attn_k.weight", WIDTH, narrow, dice),
            _matrix(block + "attn_v.weight", WIDTH, narrow, dice),
            _matrix(block + "attn_output.weight", WIDTH, WIDTH, dice),
            _ones(block + "ffn_norm.weight"),
            _matrix(block + "ffn_gate.weight", WIDTH, FEED_FORWARD, dice),
            _matrix(block + "ffn_up.weight", WIDTH, FEED_FORWARD, dice),
            _matrix(block + "ffn_down.weight", FEED_FORWARD, WIDTH, dice),
        ]
    tensors.append(_ones("output_norm.weight"))
    return Gguf([Field(key.encode(), kind, value) for key, kind, value in head], tensors)


def _matrix(name: str, columns: int, rows: int, dice: numpy.random.Generator) -> Tensor:
    """Q4_0: blocks of a float16 scale and 32 four-bit weights; a standard deviation of 0.02 as trained ones have."""
    blocks = dice.integers(0, 256, (columns * rows // 32, 18), dtype=numpy.uint8)
    blocks[:, :2] = numpy.frombuffer(numpy.float16(0.02 / 4.6).tobytes(), numpy.uint8)
    return Tensor(name.encode(), [columns, rows], Q4_0, blocks.tobytes())


def _ones(name: str) -> Tensor:
    return Tensor(name.encode(), [WIDTH], F32, numpy.ones(WIDTH, numpy.float32).tobytes())


def prompt_of(words: int) -> str:
    """A prompt of random letters; each letter and space is about a token of this vocabulary."""
    dice = random.Random(11)
    return "".join(dice.choice("bcdfgjklmpqsuvwxyz ") for _ in range(words))
