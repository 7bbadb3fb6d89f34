"""Owns the models that are measured: random weights, in the shapes of a 0.5B and a 1B or smaller, made once, kept."""

import os
import random
from dataclasses import dataclass
from pathlib import Path

import numpy

from service.engine import gguf, host
from tests.gguf_writer import ARRAY, FLOAT32, INT32, STRING, UINT32, Array, Field, Gguf, Tensor, byte_texts

CONTEXT_LENGTH = 4096
F32, Q4_0, Q6_K = 0, 2, 14
MERGED_WORDS = ("th", "he", "in", "er", "an", "re", "on", "at", "en", "nd")


@dataclass(frozen=True)
class Shape:
    """What makes a model's size and speed; the vocabulary is what makes a small model's prefill slow."""

    name: str
    width: int
    blocks: int
    heads: int
    heads_kv: int
    feed_forward: int
    vocabulary: int
    embedding: int  # type of the token embedding, which is the output matrix as well

    @property
    def narrow(self) -> int:
        """Width of keys and values."""
        return self.width // self.heads * self.heads_kv


# Shapes of Qwen2-0.5B and Llama-3.2-1B (their config.json), with Llama's names; the 1B with the embedding as it is
# quantised for download.
HALF_BILLION = Shape("half billion", 896, 24, 14, 2, 4864, 151_936, Q4_0)
BILLION = Shape("billion", 2048, 16, 32, 8, 8192, 128_256, Q6_K)
# No model's shape: as slow as a small one on a large machine would be, where two nodes share two cores.
TALKATIVE = Shape("talkative", 512, 8, 8, 2, 2048, 32_000, Q4_0)


def half_billion(folder: Path) -> Path:
    """Path of the 0.5B model (280 MB), written if it is not there."""
    return _made(HALF_BILLION, folder)


def billion(folder: Path) -> Path:
    """Path of the 1B model (770 MB), written if it is not there."""
    return _made(BILLION, folder)


def talkative(folder: Path) -> Path:
    """Path of a model of 50 million that seldom ends an answer before it must (30 MB), written if it is not there."""
    return _made(TALKATIVE, folder)


# What a bench may be told to take.
MODELS = {"half-billion": half_billion, "billion": billion, "talkative": talkative}


def threads_of(model: Path) -> int:
    """As many as the service gives this model on this machine."""
    with model.open("rb") as file:
        return host.threads_for(gguf.read_header(file).weights_bytes)


def _made(shape: Shape, folder: Path) -> Path:
    path = folder / f"{shape.name.replace(' ', '-')}-q4_0.gguf"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_bytes(_build(shape).to_bytes())
        temporary.replace(path)
    return path


def _build(shape: Shape) -> Gguf:
    dice = numpy.random.default_rng(5)
    tokens = [*byte_texts(), *(word.encode() for word in MERGED_WORDS)]
    marks = [b"<|begin|>", b"<|end|>", b"<|user|>", b"<|assistant|>"]
    filler = shape.vocabulary - len(tokens) - len(marks)
    tokens += [b"filler%d" % number for number in range(filler)]
    first_mark = len(tokens)
    tokens += marks
    template = (
        "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    head = [
        ("general.architecture", STRING, b"llama"),
        ("general.name", STRING, f"random {shape.name}".encode()),
        ("general.file_type", UINT32, 2),
        ("llama.context_length", UINT32, CONTEXT_LENGTH),
        ("llama.embedding_length", UINT32, shape.width),
        ("llama.block_count", UINT32, shape.blocks),
        ("llama.feed_forward_length", UINT32, shape.feed_forward),
        ("llama.attention.head_count", UINT32, shape.heads),
        ("llama.attention.head_count_kv", UINT32, shape.heads_kv),
        ("llama.attention.layer_norm_rms_epsilon", FLOAT32, 1e-6),
        ("llama.rope.dimension_count", UINT32, shape.width // shape.heads),
        ("tokenizer.ggml.model", STRING, b"gpt2"),
        ("tokenizer.ggml.pre", STRING, b"llama-bpe"),
        ("tokenizer.ggml.tokens", ARRAY, Array(STRING, tokens)),
        ("tokenizer.ggml.token_type", ARRAY, Array(INT32, [1] * first_mark + [3] * len(marks))),
        ("tokenizer.ggml.merges", ARRAY, Array(STRING, [" ".join(word).encode() for word in MERGED_WORDS])),
        ("tokenizer.ggml.bos_token_id", UINT32, first_mark),
        ("tokenizer.ggml.eos_token_id", UINT32, first_mark + 1),
        ("tokenizer.chat_template", STRING, template.encode()),
    ]
    embedding = _matrix("token_embd.weight", shape.width, shape.vocabulary, dice, shape.embedding)
    rows, row_bytes = bytearray(embedding.data), len(embedding.data) // shape.vocabulary
    rows[first_mark * row_bytes :] = bytes(len(marks) * row_bytes)  # no wish to end, for equal lengths
    embedding.data = bytes(rows)
    tensors = [embedding]
    for number in range(shape.blocks):
        block = f"blk.{number}."
        tensors += [
            _ones(block + "attn_norm.weight", shape.width),
            _matrix(block + "attn_q.weight", shape.width, shape.width, dice),
            _matrix(block + "attn_k.weight", shape.width, shape.narrow, dice),
            _matrix(block + "attn_v.weight", shape.width, shape.narrow, dice),
            _matrix(block + "attn_output.weight", shape.width, shape.width, dice),
            _ones(block + "ffn_norm.weight", shape.width),
            _matrix(block + "ffn_gate.weight", shape.width, shape.feed_forward, dice),
            _matrix(block + "ffn_up.weight", shape.width, shape.feed_forward, dice),
            _matrix(block + "ffn_down.weight", shape.feed_forward, shape.width, dice),
        ]
    tensors.append(_ones("output_norm.weight", shape.width))
    return Gguf([Field(key.encode(), kind, value) for key, kind, value in head], tensors)


def _matrix(name: str, columns: int, rows: int, dice: numpy.random.Generator, kind: int = Q4_0) -> Tensor:
    """Random blocks whose scale, a float16, gives a standard deviation of 0.02, as trained weights have."""
    if kind == Q6_K:  # 256 six-bit weights, 16 scales of a signed byte, the scale of these
        blocks = dice.integers(0, 256, (columns * rows // 256, 210), dtype=numpy.uint8)
        blocks[:, 208:] = numpy.frombuffer(numpy.float16(0.02 / (18.5 * 74)).tobytes(), numpy.uint8)
    else:  # the scale and 32 four-bit weights
        blocks = dice.integers(0, 256, (columns * rows // 32, 18), dtype=numpy.uint8)
        blocks[:, :2] = numpy.frombuffer(numpy.float16(0.02 / 4.6).tobytes(), numpy.uint8)
    return Tensor(name.encode(), [columns, rows], kind, blocks.tobytes())


def _ones(name: str, width: int) -> Tensor:
    return Tensor(name.encode(), [width], F32, numpy.ones(width, numpy.float32).tobytes())


def prompt_of(words: int) -> str:
    """A prompt of random letters; each letter and space is about a token of this vocabulary."""
    dice = random.Random(11)
    return "".join(dice.choice("bcdfgjklmpqsuvwxyz ") for _ in range(words))
