"""Bodies of POST /generate: fields, defaults, bounds, and what is refused."""

import json

import pytest

from service.engine.interface import Message
from service.errors import (
    BodyTooLarge,
    FieldOutOfBounds,
    FieldUnsupported,
    RequestMalformed,
)
from service.schema import GenerateRequest, TokenBounds, parse_deadline, parse_generate, parse_json

LIMIT = 10_000
BOUNDS = TokenBounds(256, 4096)


def parse(**fields: object) -> GenerateRequest:
    return parse_generate(parse_json(json.dumps(fields).encode(), LIMIT), BOUNDS)


def test_only_prompt_is_required() -> None:
    """A prompt alone is a request, with the documented defaults."""
    request = parse(prompt="hi")
    assert request.messages == (Message("user", "hi"),)
    assert (request.max_tokens, request.max_tokens_named, request.stop, request.stream) == (256, False, (), False)
    assert (request.sampling.temperature, request.sampling.top_k) == (0.7, 40)


def test_null_means_default() -> None:
    """A field that is null is as if it were not there, as clients in typed languages send it."""
    assert parse(prompt="hi", max_tokens=None, stop=None, temperature=None, seed=None) == parse(prompt="hi")


def test_system_comes_first() -> None:
    """The system text becomes a message of its own before the prompt."""
    assert parse(prompt="hi", system="be brief").messages == (Message("system", "be brief"), Message("user", "hi"))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"prompt"',
        b"nul",
        b"\xff\xfe{\x00}\x00",
        b'{"prompt": "\xe9"}',
        b'{"prompt": NaN}',
        b'{"prompt": "x", "temperature": Infinity}',
        b'{"prompt": "a", "prompt": "b"}',
        b"[" * 5000,
        b'{"a":' * 14_000 + b"1" + b"}" * 14_000,
        b'{"prompt": "x", "max_tokens": ' + b"9" * 5000 + b"}",
        b'{"prompt": "tab\there"}',
    ],
)
def test_bodies_that_are_no_json_object(body: bytes) -> None:
    """Whatever is not one JSON object in UTF-8 is malformed, never a crash."""
    with pytest.raises(RequestMalformed):
        parse_json(body, LIMIT * 10)


def test_brackets_in_a_prompt_are_text() -> None:
    """A prompt full of brackets is not mistaken for deep nesting."""
    assert parse(prompt="[" * 2000).messages[0].content == "[" * 2000


def test_size_is_bounded() -> None:
    """A body over the limit is refused with the limit."""
    with pytest.raises(BodyTooLarge) as caught:
        parse_json(b" " * (LIMIT + 1), LIMIT)
    assert caught.value.limit_bytes == LIMIT


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", ""),
        ("prompt", "a\x00b"),
        ("prompt", "a\ud800b"),
        ("system", "\udfff"),
        ("stop", "\x00"),
        ("stop", ""),
        ("stop", ["x" * 257]),
        ("stop", ["x"] * 17),
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("max_tokens", 4097),
        ("max_tokens", 1.5),
        ("max_tokens", 10**400),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("top_p", 1.1),
        ("top_k", 0),
        ("top_k", 1001),
        ("min_p", -1),
        ("repeat_penalty", 0),
    ],
)
def test_bounds_name_field_and_bound(field: str, value: object) -> None:
    """A value outside its bounds is told with the field and the bound."""
    with pytest.raises(FieldOutOfBounds) as caught:
        parse(**{"prompt": "x", field: value})
    assert caught.value.field == field
    assert caught.value.bound.startswith(("must", "each string must"))


def test_overflowing_number_is_out_of_bounds() -> None:
    """A number that JSON allows but no float holds is outside every bound."""
    with pytest.raises(FieldOutOfBounds):
        parse_generate(parse_json(b'{"prompt": "x", "temperature": 1e999}', LIMIT), BOUNDS)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", 5),
        ("prompt", None),
        ("prompt", ["x"]),
        ("system", 1),
        ("max_tokens", "5"),
        ("max_tokens", True),
        ("temperature", "hot"),
        ("stop", 5),
        ("stop", [5]),
        ("stream", "yes"),
        ("stream", 1),
    ],
)
def test_wrong_types_are_malformed(field: str, value: object) -> None:
    """A value of the wrong type is malformed, and the message names the field."""
    with pytest.raises(RequestMalformed, match=field):
        parse(**{"prompt": "x", field: value})


@pytest.mark.parametrize("field", ["seed", "logprobs", "response_format", "messages", "n", "temprature"])
def test_what_cannot_be_honoured_is_refused(field: str) -> None:
    """A parameter that the engine cannot honour, or that does not exist, is refused and never ignored."""
    with pytest.raises(FieldUnsupported) as caught:
        parse(prompt="x", **{field: 2})
    assert caught.value.field == field


@pytest.mark.parametrize("text", ["0", "", " ", "-1", "+1", "1e3", "inf", "1.", "99999999", "1_0", "٣"])
def test_deadlines_that_are_none(text: str) -> None:
    """A deadline is a plain positive number of seconds."""
    with pytest.raises(FieldOutOfBounds):
        parse_deadline(text)


def test_deadline() -> None:
    """Seconds are read as they stand; no header, no deadline."""
    assert parse_deadline("12.5") == 12.5
    assert parse_deadline(None) is None
