"""Bodies in OpenAI's words: what is taken, what is harmless, what is refused."""

from typing import Any

import pytest

from service.engine.chat import ChatTemplate
from service.engine.interface import Message
from service.errors import FieldOutOfBounds, FieldUnsupported, ModelUnknown, RequestMalformed, ServiceError
from service.openai_schema import OpenAIRequest, parse_chat, parse_completion
from service.problems import describe_error

HELLO = [{"role": "user", "content": "hello"}]


def chat(messages: Any = None, **fields: Any) -> OpenAIRequest:
    return parse_chat({"model": "m", "messages": HELLO if messages is None else messages, **fields}, "m", 4096)


def complete(prompt: Any = "Once", **fields: Any) -> OpenAIRequest:
    return parse_completion({"model": "m", "prompt": prompt, **fields}, "m", 4096)


def test_chat() -> None:
    """Messages in order; developer is system; the answer may fill the context unless max_tokens is named."""
    request = chat(
        [
            {"role": "system", "content": "be brief"},
            {"role": "developer", "content": "be kind"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": "c", "refusal": None, "tool_calls": None, "annotations": []},
            {"role": "user", "content": "d"},
        ]
    ).generate
    assert request.messages == (
        Message("system", "be brief"),
        Message("system", "be kind"),
        Message("user", "ab"),
        Message("assistant", "c"),
        Message("user", "d"),
    )
    assert (request.max_tokens, request.max_tokens_named, request.stream) == (4096, False, False)


def test_nulls_say_nothing() -> None:
    """Programs send back all that their records of an answer have, of whatever name."""
    part = {"type": "text", "text": "c", "annotations": None}
    sent = {"role": "assistant", "content": [part], "reasoning_content": None}
    assert chat([*HELLO, sent, *HELLO]).generate.messages[1] == Message("assistant", "c")
    with pytest.raises(FieldUnsupported):
        chat([{**HELLO[0], "reasoning_content": "because"}])


def test_max_tokens_has_two_names() -> None:
    """Either name will do, both together are a contradiction."""
    assert chat(max_tokens=5).generate.max_tokens == chat(max_completion_tokens=5).generate.max_tokens == 5
    with pytest.raises(RequestMalformed):
        chat(max_tokens=5, max_completion_tokens=5)
    with pytest.raises(FieldUnsupported):
        complete(max_completion_tokens=5)


def test_completion() -> None:
    """A text outside any template, 16 tokens by default as OpenAI documents; a list of one text is that text."""
    request = complete().generate
    assert request.messages == (Message("text", "Once"),)
    assert (request.max_tokens, request.max_tokens_named) == (16, False)
    assert complete(["Once"]) == complete()


def test_text_is_outside_the_template() -> None:
    """A lone text gets no marks of the chat template, whatever that is."""
    template = ChatTemplate("<|x|>{{ messages[0]['content'] }}<|y|>", "", "", adds_bos=False)
    (turn,) = template.turns([Message("text", "Once <|x|>")])
    assert (turn.prefix, turn.text, turn.suffix) == ("", "Once <|x|>", "")


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 1},
        {"frequency_penalty": 0, "presence_penalty": 0.0},
        {"logprobs": False, "top_logprobs": None},
        {"seed": None},
        {"response_format": {"type": "text"}},
        {"tools": [], "tool_choice": "none", "parallel_tool_calls": True},
        {"logit_bias": {}},
        {"store": False, "metadata": {}, "service_tier": "auto"},
        {"modalities": ["text"]},
        {"user": "somebody"},
        {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False}},
        {"stream_options": None},
        {"top_k": 3, "min_p": 0.1, "repeat_penalty": 1.1},
        {"stop": ["a", "b"]},
    ],
)
def test_what_asks_for_nothing_else_is_taken(fields: dict[str, Any]) -> None:
    """Values that ask for just what the service does are no reason to refuse a program."""
    assert chat(**fields).generate.messages == (Message("user", "hello"),)


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"n": 2}, FieldUnsupported),
        ({"n": True}, FieldUnsupported),
        ({"frequency_penalty": 0.5}, FieldUnsupported),
        ({"frequency_penalty": False}, FieldUnsupported),
        ({"logprobs": True}, FieldUnsupported),
        ({"seed": 7}, FieldUnsupported),
        ({"response_format": {"type": "json_object"}}, FieldUnsupported),
        ({"tools": [{"type": "function"}]}, FieldUnsupported),
        ({"tool_choice": "required"}, FieldUnsupported),
        ({"reasoning_effort": "low"}, FieldUnsupported),
        ({"no_such_field": 1}, FieldUnsupported),
        ({"stream_options": {"include_usage": True}}, RequestMalformed),
        ({"stream": True, "stream_options": {"colour": 1}}, FieldUnsupported),
        ({"stream": True, "stream_options": 5}, RequestMalformed),
        ({"temperature": 3}, FieldOutOfBounds),
        ({"max_tokens": 5000}, FieldOutOfBounds),
        ({"user": "x" * 257}, FieldOutOfBounds),
        ({"user": 5}, RequestMalformed),
        ({"model": "gpt-4"}, ModelUnknown),
        ({"model": None}, RequestMalformed),
        ({"model": 5}, RequestMalformed),
        ({"messages": None}, RequestMalformed),
        ({"messages": "hello"}, RequestMalformed),
        ({"messages": []}, FieldOutOfBounds),
        ({"messages": HELLO * 513}, FieldOutOfBounds),
        ({"messages": ["hello"]}, RequestMalformed),
        ({"messages": [{"role": "user"}]}, RequestMalformed),
        ({"messages": [{"content": "x"}]}, RequestMalformed),
        ({"messages": [{"role": "user", "content": ""}]}, FieldOutOfBounds),
        ({"messages": [{"role": "system", "content": ""}]}, FieldOutOfBounds),
        ({"messages": [{"role": "wizard", "content": "x"}]}, FieldOutOfBounds),
        ({"messages": [{"role": "tool", "content": "x"}]}, FieldUnsupported),
        ({"messages": [{"role": "user", "content": "x", "name": "bob"}]}, FieldUnsupported),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}, FieldUnsupported),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, FieldUnsupported),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, RequestMalformed),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "more": 1}]}]}, RequestMalformed),
        ({"messages": [{"role": "user", "content": ["x"]}]}, RequestMalformed),
        ({"messages": [{"role": "user", "content": "a\x00b"}]}, FieldOutOfBounds),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "\ud800"}]}]}, FieldOutOfBounds),
    ],
)
def test_what_chat_refuses(fields: dict[str, Any], error: type[ServiceError]) -> None:
    """What cannot be honoured, or is not well-formed, is refused with the field in the message."""
    with pytest.raises(error) as caught:
        parse_chat({"model": "m", "messages": HELLO, **fields}, "m", 4096)
    named = list(fields)[-1]
    assert named in str(caught.value) or "messages" in str(caught.value)


@pytest.mark.parametrize(
    ("prompt", "error"),
    [
        (None, RequestMalformed),
        ("", FieldOutOfBounds),
        (5, RequestMalformed),
        ([], FieldUnsupported),
        (["a", "b"], FieldUnsupported),
        ([1, 2, 3], FieldUnsupported),
        ([[1]], FieldUnsupported),
        ([""], FieldOutOfBounds),
        ("a\x00b", FieldOutOfBounds),
    ],
)
def test_prompts_that_are_none(prompt: Any, error: type[ServiceError]) -> None:
    """One text a request; no tokens, no several texts."""
    with pytest.raises(error):
        complete(prompt)


def test_empty_answer_can_be_sent_back() -> None:
    """An answer that ended before its first word is a turn like any other, as text or as null."""
    contents: tuple[object, ...] = ("", None, [])
    for content in contents:
        messages = chat([*HELLO, {"role": "assistant", "content": content}, *HELLO]).generate.messages
        assert messages[1] == Message("assistant", "")
    with pytest.raises(FieldOutOfBounds):
        chat([{"role": "assistant", "content": None}])


def test_empty_system_message_is_as_none() -> None:
    """Programs that always send a system field send it empty when nobody filled it in."""
    messages = [{"role": "system", "content": ""}, *HELLO]
    assert chat(messages) == chat()


def test_errors_in_openais_shape() -> None:
    """Status 400 for what is out of bounds, codes that clients look at, the field as param."""
    with pytest.raises(FieldOutOfBounds) as caught:
        chat(temperature=3)
    problem = describe_error(caught.value)
    assert (problem.status, problem.openai_status) == (422, 400)
    body = problem.openai_body()
    for part in (b'"type":"invalid_request_error"', b'"param":"temperature"', b'"code":"invalid_value"'):
        assert part in body
    with pytest.raises(ModelUnknown) as unknown:
        chat(model="gpt-4")
    assert b'"code":"model_not_found"' in describe_error(unknown.value).openai_body()
