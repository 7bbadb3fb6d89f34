"""POST /generate with the real gunicorn, the real gpt4all and the starter model."""

import json

from tests.service.harness import Service, read_events

QUESTION = "How do I start it?"


def test_answer_has_the_documented_shape(real: Service) -> None:
    """A plain request gets text, a finish reason, true counts, timings and the id that stands in the log."""
    answer = real.generate(QUESTION, temperature=0, max_tokens=60)
    document = answer.json
    assert answer.status == 200
    assert answer.headers["content-type"] == "application/json"
    assert set(document) == {"id", "model", "response", "finish_reason", "usage", "timings"}
    assert document["response"].strip()
    assert document["finish_reason"] in ("stop", "length")
    usage = document["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["completion_tokens"] > 0
    assert {"queue_ms", "prefill_ms", "decode_ms", "total_ms", "tokens_per_second"} == set(document["timings"])
    assert document["id"] == answer.headers["x-request-id"]
    entry = real.wait_request(id=document["id"])
    assert entry["completion_tokens"] == usage["completion_tokens"]


def test_temperature_zero_repeats(real: Service) -> None:
    """The same prompt at temperature 0 gives the same text, also after another prompt in between."""
    first = real.generate(QUESTION, temperature=0).json["response"]
    real.generate("Something else entirely", temperature=1.5, max_tokens=20)
    assert real.generate(QUESTION, temperature=0).json["response"] == first


def test_streamed_pieces_add_up_to_the_plain_answer(real: Service) -> None:
    """A stream's pieces joined are the plain answer, and its last event holds the same counts."""
    plain = real.generate(QUESTION, temperature=0).json
    with real.open_generate(QUESTION, temperature=0, stream=True) as client:
        events = [event for kind, event in read_events(client) if kind == "data"]
    assert len(events) > 2
    assert "".join(event["response"] for event in events) == plain["response"]
    assert events[-1]["done"] is True
    assert events[-1]["usage"] == plain["usage"]
    assert events[-1]["finish_reason"] == plain["finish_reason"]
    assert all("usage" not in event for event in events[:-1])


def test_stop_string_is_never_sent(real: Service) -> None:
    """A stop string ends the answer before its first letter, streamed and not, wherever the pieces are cut."""
    whole = real.generate(QUESTION, temperature=0).json["response"]
    stop = whole[len(whole) // 2 : len(whole) // 2 + 7]
    expected = whole[: whole.index(stop)]
    plain = real.generate(QUESTION, temperature=0, stop=["never to be met", stop]).json
    assert plain["response"] == expected
    assert plain["finish_reason"] == "stop"
    with real.open_generate(QUESTION, temperature=0, stop=stop, stream=True) as client:
        events = [event for kind, event in read_events(client) if kind == "data"]
    assert "".join(event["response"] for event in events) == expected


def test_length_is_honoured(real: Service) -> None:
    """max_tokens cuts the answer after exactly so many tokens and says so."""
    document = real.generate(QUESTION, temperature=0, max_tokens=3).json
    assert document["usage"]["completion_tokens"] == 3
    assert document["finish_reason"] == "length"


def test_context_contract_is_exact(real: Service) -> None:
    """What fills the context to the last token is answered, one token more is a 400 with the counts."""
    context = real.get("/version").json["model"]["context_length"]
    prompt_tokens = real.generate(QUESTION, max_tokens=1).json["usage"]["prompt_tokens"]
    fits = real.generate(QUESTION, max_tokens=context - prompt_tokens, temperature=0)
    assert fits.status == 200
    refused = real.generate(QUESTION, max_tokens=context - prompt_tokens + 1)
    assert refused.status == 400
    document = refused.json
    assert (document["prompt_tokens"], document["context_length"]) == (prompt_tokens, context)
    assert document["max_tokens"] == context - prompt_tokens + 1
    long = real.generate("word " * 3 * context)
    assert long.status == 400
    assert long.json["prompt_tokens"] > context


def test_a_prompt_cannot_forge_marks(real: Service) -> None:
    """The template's marks in a prompt stay letters: they cost more tokens than a control token would."""
    plain = real.generate("hello", max_tokens=1).json["usage"]["prompt_tokens"]
    for mark in ("<|end|>", "<|user|>", "<|assistant|>", "<|eot_id|>", "<|begin_of_text|>", "</s>"):
        forged = real.generate(f"hello{mark}", max_tokens=1).json["usage"]["prompt_tokens"]
        assert forged >= plain + 2, mark


def test_system_message_is_taken(real: Service) -> None:
    """A system message reaches the model: it costs tokens."""
    without = real.generate(QUESTION, max_tokens=1).json["usage"]["prompt_tokens"]
    with_system = real.generate(QUESTION, system="Be brief.", max_tokens=1)
    assert with_system.status == 200
    assert with_system.json["usage"]["prompt_tokens"] > without


def test_text_of_all_scripts_survives(real: Service) -> None:
    """Any valid Unicode is taken and the answer is valid UTF-8."""
    prompt = "é 漢字 🎉 \u202e עברית \u0000".replace("\u0000", "") + "\ufeff"
    answer = real.generate(prompt, max_tokens=20, temperature=1.5)
    assert answer.status == 200
    json.loads(answer.body.decode("utf-8"))


def test_version_names_what_runs(real: Service) -> None:
    """/version tells service, engine, model, digest, quantization and context length."""
    document = real.get("/version").json
    assert document["engine"]["name"] == "gpt4all"
    assert document["engine"]["threads"] == 1  # on any machine: the starter is tiny
    assert len(document["model"]["sha256"]) == 64
    assert document["model"]["quantization"]
    assert document["model"]["context_length"] >= 512


def test_prompts_never_reach_the_log(real: Service) -> None:
    """Neither prompt nor answer nor refused text stands in the log."""
    secret = "xyzzy-secret-plugh"
    response = real.generate(secret, max_tokens=5).json["response"]
    real.request("POST", "/generate", f'{{"prompt": "{secret}", "{secret}": 1}}'.encode())
    log = real.log_path.read_text()
    assert secret not in log
    assert not response.strip() or len(response.strip()) < 5 or response not in log
