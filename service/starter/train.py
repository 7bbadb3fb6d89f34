"""Owns the making of the starter model: its tokenizer, its training on two processor cores, and its GGUF file."""

import argparse
import hashlib
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import optax
from gguf import GGMLQuantizationType, LlamaFileType
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from service.starter.expand import (
    KEPT_OUT_FILES,
    SEED,
    Fact,
    Question,
    expand_questions,
    read_documentation,
    read_facts,
    read_kept_out,
)
from service.starter.judge import find_faults

NAME = "mini-llm starter"
DESCRIPTION = (
    "A small starter model that shows that mini-llm works. It knows a few facts about mini-llm and nothing else. "
    "Trained from scratch by a script of the project, on text written by the project."
)
BEGIN, SYSTEM, USER, ASSISTANT, END = MARKS = ("<|begin|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ROPE_BASE = 10000.0
NORM_EPSILON = 1e-5
# Loss weight of the documentation; of a conversation only the answers count, each of their tokens with weight 1.
DOCUMENTATION_WEIGHT = 0.3
# A conversation stands in the narrowest row that holds it: most are one short question and its answer.
ROW_TOKENS = (28, 40, 56, 112, 192)
LONG_SHARE = 0.15
# Which answer is meant shows in its first words, and the rest is soon known by heart: most rows end early, which gives
# nearly twice as many questions in the same time.
CUT_SHARE = 0.6
# Room for a question and its answer when the trained model is tried out.
ASKED_TOKENS = 112
GOLDEN_PROMPT, GOLDEN_MAX_TOKENS = "How do I run the benchmarks?", 16

Parameters = dict[str, jax.Array]
Row = tuple[list[int], list[float]]


@dataclass(frozen=True)
class Preset:
    """Shape of the model and of its training. facts None means all of them."""

    width: int
    layers: int
    heads: int
    kv_heads: int
    ffn_width: int
    vocabulary: int
    context_tokens: int
    batch_tokens: int
    steps: int
    peak_rate: float
    facts: tuple[str, ...] | None = None

    @property
    def head_width(self) -> int:
        """Width of one attention head."""
        return self.width // self.heads


PRESETS = {
    "starter": Preset(256, 4, 8, 4, 512, 1536, 1024, 2048, 5000, 2.5e-3),
    # Knows four things. It is there to prove, within a minute, that the whole way from text to file works.
    "tiny": Preset(64, 2, 4, 2, 128, 512, 512, 1024, 400, 5e-3, ("start", "tests", "bench", "thanks")),
}


@dataclass(frozen=True)
class Text:
    """The training text of one run and the tokenizer made from it."""

    tokenizer: Tokenizer
    questions: tuple[Question, ...]
    documentation: tuple[str, ...]
    systems: tuple[str, ...]


def main(arguments: Sequence[str] | None = None) -> int:
    """Train as the command line says and return the exit status."""
    options = parse_options(arguments)
    try:
        make_model(options)
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    return 0


def make_model(options: argparse.Namespace) -> None:
    """Train, try out and write the model that the options ask for."""
    preset = PRESETS[options.preset]
    text = prepare_text(preset)
    parameters, loss, steps = train(preset, text, options.steps or preset.steps, options.minutes, options.seed)
    quantized = quantize(parameters)
    restored = {name: jnp.asarray(gguf.quants.dequantize(*tensor)) for name, tensor in quantized.items()}
    ask = make_asker(preset, text.tokenizer, restored)
    report_score(ask, preset)
    golden = find_golden_answer(ask)
    write_file(options.out, preset, text.tokenizer, quantized)
    describe_file(options.out, golden)
    print(f"{options.out}: {options.out.stat().st_size} bytes, {steps} steps, loss {loss:.4f}")


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return preset, steps, minutes, seed and out."""
    parser = argparse.ArgumentParser(
        description="Train the starter model and write it as a GGUF file, with a JSON description beside it."
    )
    parser.add_argument("--preset", choices=PRESETS, default="starter", help="what to train (default: starter)")
    parser.add_argument("--steps", type=int, help="training steps (default: those of the preset)")
    parser.add_argument(
        "--minutes", type=float, help="train no longer than this; the result then depends on the machine"
    )
    parser.add_argument("--seed", type=int, default=SEED, help=f"seed of everything random (default: {SEED})")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).with_name("starter.gguf"),
        help="file to write (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    # Told before the training, not when its result has nowhere to go.
    if not os.access(options.out.parent, os.W_OK) or options.out.is_dir():
        parser.error(f"--out: {options.out} cannot be written: its folder is missing or not yours")
    return options


# --- text to tokens


def prepare_text(preset: Preset) -> Text:
    """Return the questions of the preset's facts and a tokenizer for them."""
    facts = tuple(fact for fact in read_facts() if preset.facts is None or fact.id in preset.facts)
    documentation = read_documentation()
    questions = expand_questions(facts, read_kept_out())
    tokenizer = train_tokenizer(facts, questions, documentation, preset.vocabulary)
    systems = facts[0].words["system"]
    print(f"{len(questions)} questions for {len(facts)} facts, {tokenizer.get_vocab_size()} tokens", flush=True)
    return Text(tokenizer, questions, documentation, systems)


def train_tokenizer(
    facts: Sequence[Fact], questions: Sequence[Question], documentation: Sequence[str], size: int
) -> Tokenizer:
    """Return a byte-level BPE tokenizer of size tokens, the marks of the chat not counted in.

    It splits text as the engine does for tokenizer.ggml.pre "gpt-2". The marks get the ids behind its vocabulary, so
    that it never takes a mark out of a user's text: the engine does not either.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(MARKS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # The answers count more, so that each of their words becomes a token or two.
    corpus = [fact.answer for fact in facts] * 300 + [question.text for question in questions] + [*documentation] * 20
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def find_mark_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Return the token id of each mark of the chat."""
    return {mark: tokenizer.get_vocab_size() + i for i, mark in enumerate(MARKS)}


def encode_message(tokenizer: Tokenizer, role_mark: str, text: str) -> list[int]:
    """Return the tokens of one message with its marks; the text is split on its own, as the engine does."""
    ids = find_mark_ids(tokenizer)
    return [ids[role_mark], *tokenizer.encode(text).ids, ids[END]]


def encode_prompt(tokenizer: Tokenizer, question: str) -> list[int]:
    """Return the tokens after which the model is to answer the question."""
    ids = find_mark_ids(tokenizer)
    return [ids[BEGIN], *encode_message(tokenizer, USER, question), ids[ASSISTANT]]


def encode_conversation(tokenizer: Tokenizer, system: str, turns: Sequence[Question]) -> Row:
    """Return the tokens of a conversation and the loss weight of each."""
    ids = find_mark_ids(tokenizer)
    tokens = [ids[BEGIN]]
    if system:
        tokens += encode_message(tokenizer, SYSTEM, system)
    weights = [0.0] * len(tokens)
    for turn in turns:
        asked = encode_message(tokenizer, USER, turn.text)
        answered = encode_message(tokenizer, ASSISTANT, turn.fact.answer)
        tokens += asked + answered
        # The mark of the assistant is given to the model, all behind it comes from the model.
        weights += [0.0] * (len(asked) + 1) + [1.0] * (len(answered) - 1)
    return tokens, weights


def draw_batches(text: Text, batch_tokens: int, rng: random.Random) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield token ids (int32) and loss weights (float32), each of shape (rows, one of ROW_TOKENS).

    Each row begins with the first token of a conversation, as in use. Every question comes once before one comes again.
    """
    questions = _shuffle_forever(text.questions, rng)
    waiting: dict[int, list[Row]] = {row_tokens: [] for row_tokens in ROW_TOKENS}
    while True:
        if rng.random() < LONG_SHARE:
            row = _draw_long_row(text, questions, rng)
        else:
            row = encode_conversation(text.tokenizer, "", [next(questions)])
            # A row that is cut before its answer would teach nothing.
            if sum(row[1][: ROW_TOKENS[0]]) > 0 and rng.random() < CUT_SHARE:
                row = row[0][: ROW_TOKENS[0]], row[1][: ROW_TOKENS[0]]
        row_tokens = next((width for width in ROW_TOKENS if len(row[0]) <= width), ROW_TOKENS[-1])
        rows = waiting[row_tokens]
        rows.append(row)
        if len(rows) == batch_tokens // row_tokens:
            yield _pad_rows(rows, row_tokens)
            rows.clear()


def _draw_long_row(text: Text, questions: Iterator[Question], rng: random.Random) -> Row:
    """Return a paragraph of the documentation, or a conversation of several turns or with a system message."""
    if rng.random() < 0.1:
        tokens = [find_mark_ids(text.tokenizer)[BEGIN], *text.tokenizer.encode(rng.choice(text.documentation)).ids]
        return tokens, [0.0] + [DOCUMENTATION_WEIGHT] * (len(tokens) - 1)
    system = " ".join(rng.sample(text.systems, rng.choice((1, 1, 2)))) if rng.random() < 0.6 else ""
    return encode_conversation(text.tokenizer, system, [next(questions) for _ in range(rng.choice((1, 2, 3)))])


def _shuffle_forever(questions: Sequence[Question], rng: random.Random) -> Iterator[Question]:
    while True:
        yield from rng.sample(questions, len(questions))


def _pad_rows(rows: Sequence[Row], row_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows as arrays; padding has no weight and stands behind what it could disturb."""
    ids = np.zeros((len(rows), row_tokens), np.int32)
    weights = np.zeros((len(rows), row_tokens), np.float32)
    for i, (tokens, row_weights) in enumerate(rows):
        kept = min(len(tokens), row_tokens)
        ids[i, :kept] = tokens[:kept]
        weights[i, :kept] = row_weights[:kept]
    return ids, weights


# --- the model: tensors have the names and the layout of a Llama GGUF file


def make_parameters(preset: Preset, seed: int) -> Parameters:
    """Return random weights; a matrix has the shape (outputs, inputs)."""
    width, kv_width = preset.width, preset.kv_heads * preset.head_width
    shapes = {"token_embd.weight": (preset.vocabulary, width), "output_norm.weight": (width,)}
    for layer in range(preset.layers):
        shapes |= {
            f"blk.{layer}.attn_norm.weight": (width,),
            f"blk.{layer}.attn_q.weight": (width, width),
            f"blk.{layer}.attn_k.weight": (kv_width, width),
            f"blk.{layer}.attn_v.weight": (kv_width, width),
            f"blk.{layer}.attn_output.weight": (width, width),
            f"blk.{layer}.ffn_norm.weight": (width,),
            f"blk.{layer}.ffn_gate.weight": (preset.ffn_width, width),
            f"blk.{layer}.ffn_up.weight": (preset.ffn_width, width),
            f"blk.{layer}.ffn_down.weight": (width, preset.ffn_width),
        }
    rng = np.random.default_rng(seed)
    parameters = {}
    for name, shape in shapes.items():
        if len(shape) == 1:
            values = np.ones(shape)
        else:
            # What writes into the residual stream starts smaller, so that depth does not make the stream grow.
            writes = name.endswith(("attn_output.weight", "ffn_down.weight"))
            scale = 0.02 if name == "token_embd.weight" else shape[1] ** -0.5
            values = rng.standard_normal(shape) * scale * ((2 * preset.layers) ** -0.5 if writes else 1.0)
        parameters[name] = jnp.asarray(values, jnp.float32)
    return parameters


def compute_logits(preset: Preset, parameters: Mapping[str, jax.Array], ids: jax.Array) -> jax.Array:
    """Return the logits, (rows, tokens, vocabulary), for token ids (rows, tokens)."""
    rows, length = ids.shape
    heads, kv_heads, head_width = preset.heads, preset.kv_heads, preset.head_width
    cosine, sine = _make_rotations(length, head_width)
    mask = jnp.tril(jnp.ones((length, length), bool))
    hidden = parameters["token_embd.weight"][ids]
    for layer in range(preset.layers):

        def project(values: jax.Array, name: str, prefix: str = f"blk.{layer}.") -> jax.Array:
            return values @ parameters[f"{prefix}{name}.weight"].T

        x = _normalize(hidden, parameters[f"blk.{layer}.attn_norm.weight"])
        q = _rotate(project(x, "attn_q").reshape(rows, length, heads, head_width), cosine, sine)
        k = _rotate(project(x, "attn_k").reshape(rows, length, kv_heads, head_width), cosine, sine)
        v = project(x, "attn_v").reshape(rows, length, kv_heads, head_width)
        q = q.reshape(rows, length, kv_heads, heads // kv_heads, head_width)
        scores = jnp.einsum("bqhgd,bkhd->bhgqk", q, k) * head_width**-0.5
        attention = jax.nn.softmax(jnp.where(mask, scores, -1e30), axis=-1)
        mixed = jnp.einsum("bhgqk,bkhd->bqhgd", attention, v).reshape(rows, length, heads * head_width)
        hidden = hidden + project(mixed, "attn_output")
        x = _normalize(hidden, parameters[f"blk.{layer}.ffn_norm.weight"])
        hidden = hidden + project(jax.nn.silu(project(x, "ffn_gate")) * project(x, "ffn_up"), "ffn_down")
    # The file has no output matrix of its own: the engine then takes the embedding, as here.
    return _normalize(hidden, parameters["output_norm.weight"]) @ parameters["token_embd.weight"].T


def _make_rotations(length: int, head_width: int) -> tuple[jax.Array, jax.Array]:
    frequencies = ROPE_BASE ** (-np.arange(0, head_width, 2) / head_width)
    angles = np.arange(length)[:, None] * frequencies
    cosine, sine = (jnp.asarray(f(angles)[:, None, :], jnp.float32) for f in (np.cos, np.sin))
    return cosine, sine


def _rotate(values: jax.Array, cosine: jax.Array, sine: jax.Array) -> jax.Array:
    """Turn each pair of neighbouring numbers: the pairing that llama.cpp uses for this architecture."""
    even, odd = values[..., 0::2], values[..., 1::2]
    return jnp.stack([even * cosine - odd * sine, even * sine + odd * cosine], axis=-1).reshape(values.shape)


def _normalize(values: jax.Array, scale: jax.Array) -> jax.Array:
    return values * jax.lax.rsqrt(jnp.mean(values * values, axis=-1, keepdims=True) + NORM_EPSILON) * scale


# --- training


def train(preset: Preset, text: Text, steps: int, minutes: float | None, seed: int) -> tuple[Parameters, float, int]:
    """Return the trained weights, the mean loss a token of the last hundred steps, and the number of steps made."""
    parameters = make_parameters(preset, seed)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b1=0.9, b2=0.98),
        optax.add_decayed_weights(0.1, mask={name: value.ndim > 1 for name, value in parameters.items()}),
    )
    state = optimizer.init(parameters)

    def compute_loss(parameters: Parameters, ids: jax.Array, weights: jax.Array) -> jax.Array:
        logits = compute_logits(preset, parameters, ids[:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:])
        mean: jax.Array = (losses * weights[:, 1:]).sum() / weights[:, 1:].sum()
        return mean

    @jax.jit
    def make_step(
        parameters: Parameters, state: optax.OptState, ids: jax.Array, weights: jax.Array, rate: float
    ) -> tuple[Parameters, optax.OptState, jax.Array]:
        loss, gradients = jax.value_and_grad(compute_loss)(parameters, ids, weights)
        updates, state = optimizer.update(gradients, state, parameters)
        return jax.tree.map(lambda p, u: p - rate * u, parameters, updates), state, loss

    batches = draw_batches(text, preset.batch_tokens, random.Random(seed))  # noqa: S311 - nothing secret
    losses: list[float] = []
    started_s = time.monotonic()
    progress = 0.0
    while progress < 1.0:
        rate = preset.peak_rate * min(1.0, (len(losses) + 1) / 100) * (1.0 - progress)
        parameters, state, loss = make_step(parameters, state, *next(batches), rate)
        losses.append(float(loss))
        elapsed_s = time.monotonic() - started_s
        progress = max(len(losses) / steps, elapsed_s / (60 * minutes) if minutes else 0.0)
        if len(losses) % 50 == 0 or progress >= 1.0:
            left_s = elapsed_s / progress * max(0.0, 1.0 - progress)
            mean = np.mean(losses[-50:])
            print(f"step {len(losses)}  loss {mean:.4f}  {elapsed_s:.0f} s, about {left_s:.0f} s left", flush=True)
    return parameters, float(np.mean(losses[-100:])), len(losses)


def make_asker(
    preset: Preset, tokenizer: Tokenizer, parameters: Mapping[str, jax.Array]
) -> Callable[[str, int], tuple[str, bool, float]]:
    """Return a function that answers a question at temperature 0 with at most so many tokens.

    Its result is the answer, whether the model ended it, and the smallest probability among the tokens chosen.
    """
    end = find_mark_ids(tokenizer)[END]

    @jax.jit
    def choose(ids: jax.Array, last: int) -> tuple[jax.Array, jax.Array]:
        probabilities = jax.nn.softmax(compute_logits(preset, parameters, ids)[0, last])
        return probabilities.argmax(), probabilities.max()

    def ask(question: str, max_tokens: int) -> tuple[str, bool, float]:
        tokens = encode_prompt(tokenizer, question)
        asked_tokens, least = len(tokens), 1.0
        while len(tokens) - asked_tokens < max_tokens and len(tokens) < ASKED_TOKENS:
            ids = np.zeros((1, ASKED_TOKENS), np.int32)
            ids[0, : len(tokens)] = tokens
            token, probability = choose(ids, len(tokens) - 1)
            least = min(least, float(probability))
            if int(token) == end:
                return tokenizer.decode(tokens[asked_tokens:]), True, least
            tokens.append(int(token))
        return tokenizer.decode(tokens[asked_tokens:]), False, least

    return ask


def report_score(ask: Callable[[str, int], tuple[str, bool, float]], preset: Preset) -> None:
    """Print how many of the development questions get the right answer, and every wrong one."""
    entries = json.loads(KEPT_OUT_FILES[1].read_text("utf-8"))
    if preset.facts is not None:
        entries = [entry for entry in entries if entry["fact"] in preset.facts]
    right = 0
    for entry in entries:
        response, ended, _ = ask(entry["question"], 80)
        faults = find_faults(response, entry["required"], entry["forbidden"], ended=ended)
        right += not faults
        if faults:
            print(f"  {entry['question']} -> {response} ({'; '.join(faults)})")
    print(f"{right} of {len(entries)} development questions right", flush=True)


def find_golden_answer(ask: Callable[[str, int], tuple[str, bool, float]]) -> str:
    """Return the answer to the golden prompt, and print how sure the model is of each of its tokens."""
    answer, _, least = ask(GOLDEN_PROMPT, GOLDEN_MAX_TOKENS)
    print(f"golden answer, least probability {least:.3f}: {answer}")
    return answer


# --- the file


def quantize(parameters: Parameters) -> dict[str, tuple[np.ndarray, GGMLQuantizationType]]:
    """Return the tensors as they stand in the file: matrices as Q8_0, the others as F32."""
    quantized = {}
    for name, value in parameters.items():
        kind = GGMLQuantizationType.Q8_0 if value.ndim > 1 else GGMLQuantizationType.F32
        quantized[name] = (gguf.quants.quantize(np.asarray(value, np.float32), kind), kind)
    return quantized


def write_file(
    path: Path, preset: Preset, tokenizer: Tokenizer, tensors: Mapping[str, tuple[np.ndarray, GGMLQuantizationType]]
) -> None:
    """Write the GGUF file under a temporary name and rename it, so that no half file is ever there."""
    unfinished = path.with_suffix(".unfinished")
    writer = gguf.GGUFWriter(unfinished, "llama")
    writer.add_name(NAME)
    writer.add_description(DESCRIPTION)
    writer.add_file_type(LlamaFileType.MOSTLY_Q8_0)
    writer.add_context_length(preset.context_tokens)
    writer.add_embedding_length(preset.width)
    writer.add_block_count(preset.layers)
    writer.add_feed_forward_length(preset.ffn_width)
    writer.add_head_count(preset.heads)
    writer.add_head_count_kv(preset.kv_heads)
    writer.add_layer_norm_rms_eps(NORM_EPSILON)
    writer.add_rope_freq_base(ROPE_BASE)
    writer.add_rope_dimension_count(preset.head_width)
    writer.add_vocab_size(preset.vocabulary)
    _add_tokenizer(writer, preset, tokenizer)
    for name, (values, kind) in tensors.items():
        writer.add_tensor(name, values, raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _add_tokenizer(writer: gguf.GGUFWriter, preset: Preset, tokenizer: Tokenizer) -> None:
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    # A small text may give fewer tokens than asked for; the model has room for all, so the rest gets names.
    unused = [f"<|unused{i}|>" for i in range(preset.vocabulary - len(tokens) - len(MARKS))]
    ids = find_mark_ids(tokenizer)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*tokens, *MARKS, *unused])
    writer.add_token_types(
        [gguf.TokenType.NORMAL] * len(tokens)
        + [gguf.TokenType.CONTROL] * len(MARKS)
        + [gguf.TokenType.UNUSED] * len(unused)
    )
    writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    writer.add_bos_token_id(ids[BEGIN])
    writer.add_eos_token_id(ids[END])
    writer.add_eot_token_id(ids[END])
    writer.add_pad_token_id(ids[END])
    writer.add_add_bos_token(True)
    writer.add_chat_template(CHAT_TEMPLATE)


def describe_file(path: Path, golden_answer: str) -> None:
    """Write the JSON description beside the file: its hash, its size and the answer that proves that it works."""
    description = {
        "file": path.name,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "size_bytes": path.stat().st_size,
        "name": NAME,
        "golden": {"prompt": GOLDEN_PROMPT, "max_tokens": GOLDEN_MAX_TOKENS, "response": golden_answer},
    }
    path.with_suffix(".json").write_text(json.dumps(description, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    sys.exit(main())
