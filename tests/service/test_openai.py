"""OpenAI's own Python client against the real service: it works unchanged, and what cannot be honoured is an error."""

from collections.abc import Iterator
from typing import Any, cast

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from tests.service.harness import FAKE, Service, running_service

MODEL = "mini-llm starter"
QUESTION = "How do I run the benchmarks?"
ANSWER = "Type make bench: it runs the benchmarks."


@pytest.fixture(scope="module")
def keyed() -> Iterator[Service]:
    """The starter model behind keys."""
    with running_service(record=False, auth="keys") as service:
        yield service


@pytest.fixture(scope="module")
def key(keyed: Service) -> str:
    return keyed.keys("add", "program")


def connect(service: Service, key: str = "none", max_retries: int = 0, strict: bool = True) -> openai.OpenAI:
    return openai.OpenAI(
        base_url=f"http://127.0.0.1:{service.port}/v1",
        api_key=key,
        max_retries=max_retries,
        http_client=openai.DefaultHttpxClient(trust_env=False, timeout=60),  # the environment's proxies are not ours
        _strict_response_validation=strict,  # answers must hold what the client's types promise
    )


@pytest.fixture
def client(keyed: Service, key: str) -> Iterator[openai.OpenAI]:
    with connect(keyed, key) as client:
        yield client


def test_chat(client: openai.OpenAI) -> None:
    """A chat completion has text, reason, counts and an id, as the client's own types know them."""
    done = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": QUESTION}], temperature=0, user="tester"
    )
    (choice,) = done.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", ANSWER, "stop")
    assert (done.object, done.model) == ("chat.completion", MODEL)
    assert done.usage is not None
    assert done.usage.total_tokens == done.usage.prompt_tokens + done.usage.completion_tokens
    assert done.id.startswith("chatcmpl-")
    assert done.id.endswith(done._request_id or "none")


def test_chat_goes_on(client: openai.OpenAI) -> None:
    """An answer can be handed back as the client got it, with a system message before and a question behind."""
    messages: list[ChatCompletionMessageParam] = [
        {"role": "system", "content": "You are kind."},
        {"role": "user", "content": QUESTION},
    ]
    first = client.chat.completions.create(model=MODEL, messages=messages, temperature=0).choices[0].message
    messages.append(cast(ChatCompletionMessageParam, first))  # the client takes it, though its types do not say so
    messages.append({"role": "user", "content": "And how do I run the tests?"})
    second = client.chat.completions.create(model=MODEL, messages=messages, temperature=0)
    assert "make test" in (second.choices[0].message.content or "")


def test_chat_stream(client: openai.OpenAI) -> None:
    """Pieces, a finish reason, then usage on its own when it was asked for; the same text as without a stream."""
    messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": QUESTION}]
    with client.chat.completions.create(
        model=MODEL, messages=messages, temperature=0, stream=True, stream_options={"include_usage": True}
    ) as stream:
        chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == ANSWER
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens > 3
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1
    with client.chat.completions.create(model=MODEL, messages=messages, max_tokens=2, stream=True) as stream:
        chunks = list(stream)
    assert chunks[-1].choices[0].finish_reason == "length"
    assert all(chunk.usage is None for chunk in chunks)


def test_stream_helper(client: openai.OpenAI) -> None:
    """The client's accumulating helper comes to the same completion."""
    with client.chat.completions.stream(
        model=MODEL, messages=[{"role": "user", "content": QUESTION}], temperature=0
    ) as stream:
        assert stream.get_final_completion().choices[0].message.content == ANSWER


def test_completion(client: openai.OpenAI, keyed: Service, key: str) -> None:
    """A plain completion goes on from a text, streamed or not, 16 tokens by default."""
    prompt = "mini-llm bakes"
    done = client.completions.create(model=MODEL, prompt=prompt, temperature=0)
    assert done.object == "text_completion"
    assert done.usage is not None
    assert done.usage.completion_tokens == 16
    assert done.choices[0].finish_reason == "length"
    assert "image" in done.choices[0].text
    # Its types know no piece without a finish reason, though OpenAI's own pieces have none.
    with (
        connect(keyed, key, strict=False) as lenient,
        lenient.completions.create(model=MODEL, prompt=prompt, temperature=0, stream=True) as stream,
    ):
        assert "".join(chunk.choices[0].text for chunk in stream) == done.choices[0].text
    stopped = client.completions.create(model=MODEL, prompt=prompt, temperature=0, max_tokens=60, stop=" image")
    assert stopped.choices[0].finish_reason == "stop"
    assert "image" not in stopped.choices[0].text


def test_models(client: openai.OpenAI) -> None:
    """The one model is listed and found by its name, which has a blank in it here."""
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "mini-llm"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("openai/gpt-4o")
    assert caught.value.code == "model_not_found"


def test_unknown_model(client: openai.OpenAI) -> None:
    """Another model is a 404 that names the one there is; it is never answered by this one."""
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-4o", messages=[{"role": "user", "content": "x"}])
    assert caught.value.code == "model_not_found"
    assert MODEL in caught.value.message


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"seed": 1}, "seed", "unsupported_parameter"),
        ({"n": 2}, "n", "unsupported_parameter"),
        ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "unsupported_parameter"),
        ({"temperature": 9}, "temperature", "invalid_value"),
        ({"max_tokens": 2000}, None, "context_length_exceeded"),
    ],
)
def test_bad_requests(client: openai.OpenAI, fields: dict[str, Any], param: str | None, code: str) -> None:
    """What cannot be honoured is a BadRequestError with the parameter's name and a code."""
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "x"}], **fields)
    assert (caught.value.param, caught.value.code) == (param, code)


def test_wrong_key(keyed: Service, key: str) -> None:
    """A wrong key is an AuthenticationError, in the stream too, and a key without the scope a PermissionDeniedError."""
    with connect(keyed, key[:-1]) as client:
        with pytest.raises(openai.AuthenticationError) as caught:
            client.models.list()
        assert caught.value.code == "invalid_api_key"
        assert key[:-1] not in str(caught.value.body)
        with pytest.raises(openai.AuthenticationError):
            client.completions.create(model=MODEL, prompt="x", stream=True)
    scraper = keyed.keys("add", "scraper", "--scope", "metrics")
    with connect(keyed, scraper) as client, pytest.raises(openai.PermissionDeniedError):
        client.models.list()


def test_failures_on_the_way() -> None:
    """An engine that fails is an InternalServerError, in a stream an APIError after the text so far."""
    with running_service(engine_adapter=FAKE) as service, connect(service) as client:
        model = next(iter(client.models.list())).id

        def ask(prompt: str, **fields: Any) -> Any:
            return client.chat.completions.create(model=model, messages=[{"role": "user", "content": prompt}], **fields)

        with pytest.raises(openai.InternalServerError) as caught:
            ask("fail")
        assert caught.value.type == "server_error"
        texts = []

        def read() -> None:
            for chunk in ask("abort-at 3", stream=True, max_tokens=10):
                texts.append(chunk.choices[0].delta.content or "")

        with pytest.raises(openai.APIError, match="engine failed"):
            read()
        assert "".join(texts) == "word word word"
        service.wait_phase("ready")
        with pytest.raises(openai.InternalServerError) as caught:
            ask("pause 0.2", max_tokens=50, extra_headers={"X-Deadline-S": "0.5"})
        assert caught.value.code in ("answer_cancelled", "deadline")


def test_client_waits_as_long_as_it_is_told() -> None:
    """The client's own retries read Retry-After: a full service is asked again later, and then answers."""
    with running_service(engine_adapter=FAKE, queue_size=0) as service, connect(service, max_retries=5) as client:
        model = next(iter(client.models.list())).id
        for _ in range(8):
            service.generate("pause 0.05", max_tokens=20)
        running = service.open_generate("pause 0.05", max_tokens=30, stream=True)
        service.wait_running(1)
        done = client.completions.create(model=model, prompt="say yes")
        assert done.choices[0].text == "yes"
        assert service.metric("llm_refusals_total", reason="queue_full") >= 1
        running.close()


def test_chat_stream_ends_when_the_client_leaves() -> None:
    """Closing the stream stops the generation within a token."""
    with running_service(engine_adapter=FAKE) as service, connect(service) as client:
        model = next(iter(client.models.list())).id
        stream = client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": "pause 0.05"}], max_tokens=400, stream=True
        )
        for _, chunk in zip(range(4), stream, strict=False):
            assert chunk.choices
        stream.close()
        assert service.wait_idle() < 1.5
        assert service.metric("llm_cancelled_total", reason="client") == 1
