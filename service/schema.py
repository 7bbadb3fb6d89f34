"""Owns the way from a request's bytes to a typed record: every field, its default and its bounds."""

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from service.engine.interface import Message, Sampling
from service.errors import BodyTooLarge, FieldOutOfBounds, FieldUnsupported, RequestMalformed

MOST_STOPS = 16
LONGEST_STOP = 256
_UNENCODABLE = re.compile("[\ud800-\udfff]")
_DEFAULTS = Sampling()


@dataclass(frozen=True)
class Unsupported:
    """A field that the engine has no way to honour: why, and the values that ask for nothing else than it does."""

    why: str
    harmless: tuple[Any, ...] = ()


# Told with 400: a parameter that is silently ignored is a wrong answer. Null always stands for "not there".
_ONE_ANSWER = "one answer a request; ask again for another"
UNSUPPORTED = {
    "seed": Unsupported("the engine has no seed; temperature 0 makes answers repeatable"),
    "logprobs": Unsupported("the engine does not give log-probabilities", (False,)),
    "top_logprobs": Unsupported("the engine does not give log-probabilities", (0,)),
    "response_format": Unsupported("the engine cannot be held to a format", ({"type": "text"},)),
    "format": Unsupported("the engine cannot be held to a format"),
    "grammar": Unsupported("the engine cannot be held to a grammar"),
    "json_schema": Unsupported("the engine cannot be held to a schema"),
    "n": Unsupported(_ONE_ANSWER, (1,)),
    "best_of": Unsupported(_ONE_ANSWER, (1,)),
    "logit_bias": Unsupported("the engine cannot bias single tokens", ({},)),
    "frequency_penalty": Unsupported("the engine has repeat_penalty instead", (0,)),
    "presence_penalty": Unsupported("the engine has repeat_penalty instead", (0,)),
    "tools": Unsupported("the engine does not call tools", ([],)),
    "images": Unsupported("the engine reads text only", ([],)),
    "suffix": Unsupported("the engine writes at the end only", ("",)),
    "echo": Unsupported("the prompt is not repeated in the answer", (False,)),
}
UNSUPPORTED_BY_GENERATE = {
    **UNSUPPORTED,
    "model": Unsupported("there is one model; GET /version names it"),
    "messages": Unsupported("POST /generate takes one prompt and one system text; use POST /v1/chat/completions"),
}


@dataclass(frozen=True)
class GenerateRequest:
    """What a valid body asks for; ``max_tokens`` is a default, cut to what the context leaves, unless it was named."""

    messages: tuple[Message, ...]
    max_tokens: int
    max_tokens_named: bool
    sampling: Sampling
    stop: tuple[str, ...]
    stream: bool


@dataclass(frozen=True)
class Number:
    """Bounds of a numeric field, both included."""

    default: float
    low: float
    high: float
    whole: bool = False


@dataclass(frozen=True)
class TokenBounds:
    """``max_tokens`` of a request that names none, and the largest that may be named."""

    default: int
    largest: int


SAMPLING = {
    "temperature": Number(_DEFAULTS.temperature, 0.0, 2.0),
    "top_p": Number(_DEFAULTS.top_p, 0.0, 1.0),
    "top_k": Number(_DEFAULTS.top_k, 1, 1000, whole=True),
    "min_p": Number(_DEFAULTS.min_p, 0.0, 1.0),
    "repeat_penalty": Number(_DEFAULTS.repeat_penalty, 0.1, 2.0),
}
_FIELDS = {"prompt", "system", "max_tokens", "stop", "stream", *SAMPLING}


def _refuse_constant(name: str) -> Any:
    raise RequestMalformed(f"the body is not JSON: {name} is no JSON number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        raise RequestMalformed("the body names a field twice")
    return document


def parse_json(body: bytes, limit_bytes: int) -> dict[str, Any]:
    """The body as an object. Raises BodyTooLarge or RequestMalformed."""
    if len(body) > limit_bytes:
        raise BodyTooLarge(limit_bytes)
    if not body:
        raise RequestMalformed("the body is empty; a JSON object with a prompt is needed")
    try:
        text = body.decode("utf-8")
        document = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise RequestMalformed(f"the body is not UTF-8 (byte {error.start})") from error
    except RecursionError as error:
        raise RequestMalformed("the body is nested too deeply") from error
    except ValueError as error:
        raise RequestMalformed(f"the body is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise RequestMalformed("the body must be a JSON object")
    return document


def parse_text(document: dict[str, Any], name: str) -> str | None:
    """A field that is a string of characters which the engine can take, or None."""
    value = document.get(name)
    if value is None:
        return None
    if not isinstance(value, str):
        raise RequestMalformed(f"{name}: must be a string")
    check_text(name, value)
    return value


def check_text(name: str, value: str) -> None:
    """Raises FieldOutOfBounds for a text that the engine cannot take whole."""
    if "\x00" in value:
        raise FieldOutOfBounds(name, "must not hold U+0000, which ends a text for the engine")
    if _UNENCODABLE.search(value):
        raise FieldOutOfBounds(name, "must not hold lone surrogates, which are no characters")


def parse_number(document: dict[str, Any], name: str, bounds: Number) -> float:
    """A numeric field, or its default."""
    value = document.get(name)
    if value is None:
        return bounds.default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RequestMalformed(f"{name}: must be a number")
    # A number that is none (NaN) is not between any two.
    if not bounds.low <= value <= bounds.high or (bounds.whole and value != int(value)):
        kind = "a whole number" if bounds.whole else "a number"
        raise FieldOutOfBounds(name, f"must be {kind} from {bounds.low:g} to {bounds.high:g}")
    return int(value) if bounds.whole else float(value)


def _stops(document: dict[str, Any]) -> tuple[str, ...]:
    value = document.get("stop")
    if value is None:
        return ()
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise RequestMalformed("stop: must be a string or a list of strings")
    if len(stops) > MOST_STOPS:
        raise FieldOutOfBounds("stop", f"must hold at most {MOST_STOPS} strings")
    for stop in stops:
        if not 1 <= len(stop) <= LONGEST_STOP:
            raise FieldOutOfBounds("stop", f"each string must have 1 to {LONGEST_STOP} characters")
        check_text("stop", stop)
    return tuple(dict.fromkeys(stops))


def refuse_unknown(
    document: dict[str, Any], known: Collection[str], unsupported: Mapping[str, Unsupported], place: str = ""
) -> None:
    """Raises FieldUnsupported for a field that does not exist, or asks for what the engine cannot honour.

    ``place`` leads to the document where that is not the whole body, such as ``messages[0].``.
    """
    for name, value in document.items():
        if name in known or (name in unsupported and _is_harmless(value, unsupported[name])):
            continue
        why = unsupported[name].why if name in unsupported else "there is no such field"
        raise FieldUnsupported(place + name[:64], why)


def _is_harmless(value: Any, field: Unsupported) -> bool:
    # True is 1 and False is 0 for Python, not for JSON.
    return value is None or any(
        value == harmless and isinstance(value, bool) == isinstance(harmless, bool) for harmless in field.harmless
    )


def parse_switch(document: dict[str, Any], name: str) -> bool:
    """A field that is true or false; not there is false."""
    value = document.get(name)
    if value is not None and not isinstance(value, bool):
        raise RequestMalformed(f"{name}: must be true or false")
    return bool(value)


def parse_max_tokens(document: dict[str, Any], names: tuple[str, ...], bounds: TokenBounds) -> tuple[int, bool]:
    """The most tokens to generate, under one of these names, and whether it was named."""
    given = [name for name in names if document.get(name) is not None]
    if len(given) > 1:
        raise RequestMalformed(f"{given[1]}: is another name of {given[0]}; send one of them")
    if not given:
        return bounds.default, False
    return int(parse_number(document, given[0], Number(0, 1, bounds.largest, whole=True))), True


def parse_generate(document: dict[str, Any], bounds: TokenBounds) -> GenerateRequest:
    """A body of ``POST /generate``.

    Raises RequestMalformed (400) for a missing or mistyped field, FieldUnsupported (400) for what the engine cannot
    honour, FieldOutOfBounds (422) for a value outside its bounds.
    """
    refuse_unknown(document, _FIELDS, UNSUPPORTED_BY_GENERATE)
    prompt = parse_text(document, "prompt")
    if prompt is None:
        raise RequestMalformed("prompt: is missing")
    if not prompt:
        raise FieldOutOfBounds("prompt", "must not be empty")
    system = parse_text(document, "system")
    user = Message("user", prompt)
    stream = parse_switch(document, "stream")
    return make_request(
        document, (Message("system", system), user) if system else (user,), ("max_tokens",), bounds, stream
    )


def make_request(
    document: dict[str, Any],
    messages: tuple[Message, ...],
    max_tokens_names: tuple[str, ...],
    bounds: TokenBounds,
    stream: bool,
) -> GenerateRequest:
    """The fields that all kinds of requests have in common: sampling, max_tokens, stop."""
    # Whole where the bounds say so, which is what each field of Sampling wants.
    numbers: dict[str, Any] = {name: parse_number(document, name, one) for name, one in SAMPLING.items()}
    max_tokens, named = parse_max_tokens(document, max_tokens_names, bounds)
    return GenerateRequest(messages, max_tokens, named, Sampling(**numbers), _stops(document), stream)


def parse_deadline(text: str | None) -> float | None:
    """Seconds from the header ``X-Deadline-S``, or None without one. Raises FieldOutOfBounds."""
    if text is None:
        return None
    bound = "must be a number of seconds above 0, up to 86400"
    if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", text, re.ASCII):
        raise FieldOutOfBounds("X-Deadline-S", bound)
    if not 0 < float(text) <= 86400:
        raise FieldOutOfBounds("X-Deadline-S", bound)
    return float(text)
