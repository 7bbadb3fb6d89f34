"""Owns the way from a request's bytes to a typed record: every field, its default and its bounds."""

import json
import math
import re
from dataclasses import dataclass
from typing import Any

from service.engine.interface import Message, Sampling
from service.errors import BodyTooLarge, FieldOutOfBounds, FieldUnsupported, RequestMalformed

_LARGEST_STOPS = 16
_LONGEST_STOP = 256
_UNENCODABLE = re.compile("[\ud800-\udfff]")
_DEFAULTS = Sampling()

# What the engine has no way to do. Told with 400: a parameter that is silently ignored is a wrong answer.
_UNSUPPORTED = {
    "seed": "the engine has no seed; temperature 0 makes answers repeatable",
    "logprobs": "the engine does not give log-probabilities",
    "top_logprobs": "the engine does not give log-probabilities",
    "response_format": "the engine cannot be held to a format",
    "format": "the engine cannot be held to a format",
    "grammar": "the engine cannot be held to a grammar",
    "json_schema": "the engine cannot be held to a schema",
    "n": "one answer a request; ask again for another",
    "best_of": "one answer a request; ask again for another",
    "logit_bias": "the engine cannot bias single tokens",
    "frequency_penalty": "the engine has repeat_penalty instead",
    "presence_penalty": "the engine has repeat_penalty instead",
    "tools": "the engine does not call tools",
    "images": "the engine reads text only",
    "suffix": "the engine writes at the end only",
    "echo": "the prompt is not repeated in the answer",
    "model": "there is one model; GET /version names it",
    "messages": "POST /generate takes one prompt and one system text",
}


@dataclass(frozen=True)
class GenerateRequest:
    """A valid body of ``POST /generate``; ``max_tokens`` None means the default, cut to what the context leaves."""

    prompt: str
    system: str | None
    max_tokens: int | None
    sampling: Sampling
    stop: tuple[str, ...]
    stream: bool

    @property
    def messages(self) -> tuple[Message, ...]:
        user = Message("user", self.prompt)
        return (user,) if self.system is None else (Message("system", self.system), user)


@dataclass(frozen=True)
class _Number:
    """Bounds of a numeric field, both included."""

    default: float
    low: float
    high: float
    whole: bool = False


_NUMBERS = {
    "temperature": _Number(_DEFAULTS.temperature, 0.0, 2.0),
    "top_p": _Number(_DEFAULTS.top_p, 0.0, 1.0),
    "top_k": _Number(_DEFAULTS.top_k, 1, 1000, whole=True),
    "min_p": _Number(_DEFAULTS.min_p, 0.0, 1.0),
    "repeat_penalty": _Number(_DEFAULTS.repeat_penalty, 0.1, 2.0),
}
_FIELDS = {"prompt", "system", "max_tokens", "stop", "stream", *_NUMBERS}


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


def _text(document: dict[str, Any], name: str) -> str | None:
    value = document.get(name)
    if value is None:
        return None
    if not isinstance(value, str):
        raise RequestMalformed(f"{name}: must be a string")
    _check_text(name, value)
    return value


def _check_text(name: str, value: str) -> None:
    if "\x00" in value:
        raise FieldOutOfBounds(name, "must not hold U+0000, which ends a text for the engine")
    if _UNENCODABLE.search(value):
        raise FieldOutOfBounds(name, "must not hold lone surrogates, which are no characters")


def _number(document: dict[str, Any], name: str, bounds: _Number) -> float:
    value = document.get(name)
    if value is None:
        return bounds.default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RequestMalformed(f"{name}: must be a number")
    kind = "a whole number" if bounds.whole else "a number"
    bound = f"must be {kind} from {bounds.low:g} to {bounds.high:g}"
    if isinstance(value, float) and not math.isfinite(value):
        raise FieldOutOfBounds(name, bound)
    if not bounds.low <= value <= bounds.high or (bounds.whole and value != int(value)):
        raise FieldOutOfBounds(name, bound)
    return int(value) if bounds.whole else float(value)


def _stops(document: dict[str, Any]) -> tuple[str, ...]:
    value = document.get("stop")
    if value is None:
        return ()
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise RequestMalformed("stop: must be a string or a list of strings")
    if len(stops) > _LARGEST_STOPS:
        raise FieldOutOfBounds("stop", f"must hold at most {_LARGEST_STOPS} strings")
    for stop in stops:
        if not 1 <= len(stop) <= _LONGEST_STOP:
            raise FieldOutOfBounds("stop", f"each string must have 1 to {_LONGEST_STOP} characters")
        _check_text("stop", stop)
    return tuple(dict.fromkeys(stops))


def parse_generate(document: dict[str, Any], largest_max_tokens: int) -> GenerateRequest:
    """A body of ``POST /generate``.

    Raises RequestMalformed (400) for a missing or mistyped field, FieldUnsupported (400) for what the engine cannot
    honour, FieldOutOfBounds (422) for a value outside its bounds.
    """
    for name in document:
        if name in _UNSUPPORTED:
            if document[name] is not None:
                raise FieldUnsupported(name, _UNSUPPORTED[name])
        elif name not in _FIELDS:
            raise FieldUnsupported(name[:64], "there is no such field")
    prompt = _text(document, "prompt")
    if prompt is None:
        raise RequestMalformed("prompt: is missing")
    if not prompt:
        raise FieldOutOfBounds("prompt", "must not be empty")
    stream = document.get("stream")
    if stream is not None and not isinstance(stream, bool):
        raise RequestMalformed("stream: must be true or false")
    numbers = {name: _number(document, name, bounds) for name, bounds in _NUMBERS.items()}
    max_tokens = None
    if document.get("max_tokens") is not None:
        bounds = _Number(0, 1, largest_max_tokens, whole=True)
        max_tokens = int(_number(document, "max_tokens", bounds))
    return GenerateRequest(
        prompt=prompt,
        system=_text(document, "system") or None,
        max_tokens=max_tokens,
        sampling=Sampling(**numbers),
        stop=_stops(document),
        stream=bool(stream),
    )


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
