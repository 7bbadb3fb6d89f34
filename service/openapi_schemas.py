"""Owns the JSON Schemas of bodies and answers, told from the tables by which requests are checked."""

from collections.abc import Mapping
from typing import Any, get_args

from service.boot import EVENTS
from service.engine.interface import Description
from service.engine.process import Phase
from service.openai_schema import (
    CHAT_MAX_TOKENS,
    COMPLETION_MAX_TOKENS,
    LABELS,
    LONGEST_LABEL,
    MOST_MESSAGES,
    ROLES,
    UNSUPPORTED_BY_CHAT,
    UNSUPPORTED_IN_MESSAGE,
    UNSUPPORTED_IN_STREAM_OPTIONS,
)
from service.schema import (
    LONGEST_STOP,
    MOST_STOPS,
    SAMPLING,
    UNSUPPORTED,
    UNSUPPORTED_BY_GENERATE,
    Number,
    Unsupported,
)
from service.settings import Settings

Schema = dict[str, Any]

# U+0000 is refused. So are lone surrogates, which JSON writes as escapes alone: no pattern over characters tells them.
_TEXT_PATTERN = "^[^\\u0000]*$"
_STRING, _NULL, _FLAG = {"type": "string"}, {"type": "null"}, {"type": "boolean"}
_COUNT, _AMOUNT = {"type": "integer", "minimum": 0}, {"type": "number", "minimum": 0}


def ref(name: str) -> Schema:
    """A reference to one of these schemas."""
    return {"$ref": f"#/components/schemas/{name}"}


def model_name(model: Description | None) -> Schema:
    """The name of the model that is served; any text while it is not known."""
    known = _text(1) if model is None else {"enum": [model.model]}
    return {**known, "description": "as GET /v1/models names it; any other is a 404"}


def describe_requests(settings: Settings, model: Description | None) -> Schema:
    """Bodies, with the bounds of the parsers; tokens that no context of this model holds are not offered."""
    largest = settings.largest_max_tokens
    if model is not None:
        largest = max(1, min(largest, model.context_length - 1))
    one_stop = _text(1, LONGEST_STOP)
    message, said = _describe_message()
    switch = {"type": ["boolean", "null"], "default": False}
    common = {
        **{name: _number(bounds) for name, bounds in SAMPLING.items()},
        "stop": {"anyOf": [_nullable(one_stop), {"type": "array", "items": one_stop, "maxItems": MOST_STOPS}]},
        "stream": switch,
    }
    options = {"include_usage": switch, **_unsupported(UNSUPPORTED_IN_STREAM_OPTIONS)}
    openai = {
        "model": model_name(model),
        **common,
        "stream_options": _nullable(_object(options, ())),
        **{name: _nullable(_text(most=LONGEST_LABEL)) for name in LABELS},
    }
    options_are_for_streams = {
        "if": {"properties": {"stream_options": {"type": "object"}}, "required": ["stream_options"]},
        "then": {"properties": {"stream": {"const": True}}, "required": ["stream"]},
    }

    def tokens(default: int | None) -> Schema:
        if default is None:
            field = {key: value for key, value in _number(Number(0, 1, largest, True)).items() if key != "default"}
            return {**field, "description": "without it the answer may fill what the context leaves"}
        field = _number(Number(min(default, largest), 1, largest, True))
        return {**field, "description": "the default is cut to what the context leaves"}

    return {
        "GenerateRequest": _object(
            {
                "prompt": _text(1),
                "system": _nullable(_text()),
                "max_tokens": tokens(settings.default_max_tokens),
                **common,
                **_unsupported(UNSUPPORTED_BY_GENERATE),
            },
            ("prompt",),
        ),
        "ChatRequest": {
            **_object(
                {
                    **_unsupported(UNSUPPORTED_BY_CHAT),
                    **openai,
                    "messages": {
                        **_list(ref("Message"), 1, MOST_MESSAGES),
                        # Not a reference: schemathesis 4.32 does not come to an end with one here.
                        "contains": {"properties": {"content": said}, "required": ["content"]},
                    },
                    **{name: tokens(None) for name in CHAT_MAX_TOKENS},
                },
                ("model", "messages"),
            ),
            **options_are_for_streams,
            # The two are names of the same; null is as not there.
            "not": {
                "properties": {name: {"type": "number"} for name in CHAT_MAX_TOKENS},
                "required": list(CHAT_MAX_TOKENS),
            },
        },
        "Message": message,
        "CompletionRequest": {
            **_object(
                {
                    **_unsupported(UNSUPPORTED),
                    **openai,
                    "prompt": {"anyOf": [_text(1), _list(_text(1), 1, 1)]},
                    "max_tokens": tokens(COMPLETION_MAX_TOKENS),
                },
                ("model", "prompt"),
            ),
            **options_are_for_streams,
        },
    }


def _describe_message() -> tuple[Schema, Schema]:
    """A message of a conversation, and content that says something, which a user's must."""
    nothing_else = {"additionalProperties": _NULL}  # which is as not there
    parts = {"type": "array", "items": _object({"type": {"const": "text"}, "text": _text()}) | nothing_else}
    said = {"anyOf": [_text(1), {**parts, "contains": {"properties": {"text": {"minLength": 1}}}}]}

    def message(meant: str, content: Schema, required: tuple[str, ...] = ("role", "content")) -> Schema:
        roles = [name for name, role in ROLES.items() if role == meant]
        members = {"role": {"enum": roles}, "content": content, **_unsupported(UNSUPPORTED_IN_MESSAGE)}
        return _object(members, required) | nothing_else

    anything = [_text(), parts]
    kinds = [
        message("user", said),
        message("system", {"anyOf": anything}),
        message("assistant", {"anyOf": [*anything, _NULL]}, ("role",)),
    ]
    return {"anyOf": kinds}, said


def describe_answers() -> Schema:
    """Answers whole and streamed, and errors."""
    usage = _object({"prompt_tokens": _COUNT, "completion_tokens": _COUNT, "total_tokens": _COUNT})
    timings = ("queue_ms", "prefill_ms", "decode_ms", "total_ms", "tokens_per_second")
    generated = {
        "id": _STRING,
        "model": _STRING,
        "response": _STRING,
        "finish_reason": {"enum": ["stop", "length", "cancelled"]},
        "usage": usage,
        "timings": _object(dict.fromkeys(timings, _AMOUNT)),
    }
    head = {"id": _STRING, "created": _COUNT, "model": _STRING}

    def whole(kind: str, text: Schema) -> Schema:
        choice = _object({"index": _COUNT, "finish_reason": {"enum": ["stop", "length"]}, "logprobs": _NULL, **text})
        return _object({**head, "object": {"const": kind}, "choices": _list(choice, 1, 1), "usage": usage})

    def chunk(kind: str, text: Schema) -> Schema:
        finish = {"enum": ["stop", "length", None]}
        choice = _object({"index": _COUNT, "finish_reason": finish, "logprobs": _NULL, **text})
        members = {**head, "object": {"const": kind}, "choices": _list(choice, 0, 1)}
        return _object({**members, "usage": _nullable(usage)}, tuple(members))

    assistant = {"role": {"const": "assistant"}, "content": _STRING}
    return {
        "GenerateAnswer": _object(generated),
        "GeneratePiece": _object({"id": _STRING, "response": _STRING}),
        "GenerateEnd": _object({**generated, "response": {"const": ""}, "done": {"const": True}}),
        "ChatCompletion": whole("chat.completion", {"message": _object({**assistant, "refusal": _NULL})}),
        "ChatChunk": chunk("chat.completion.chunk", {"delta": _object(assistant, ())}),
        "Completion": whole("text_completion", {"text": _STRING}),
        "CompletionChunk": chunk("text_completion", {"text": _STRING}),
        **_describe_state(),
        **_describe_errors(),
    }


def _describe_state() -> Schema:
    """What the paths answer that tell how the service is."""
    model = _object({"id": _STRING, "object": {"const": "model"}, "created": _COUNT, "owned_by": _STRING})
    use = _object({"name": _STRING, "limit": _COUNT, "used": _COUNT, "reset_s": _AMOUNT})
    key = _object({"name": _STRING, "tokens_today": _COUNT, "limits": {"type": "array", "items": use}})
    ready = {
        "status": {"enum": [*get_args(Phase), "draining"]},
        "running": _COUNT,
        "waiting": _COUNT,
        "predicted_wait_s": _AMOUNT,
        "tokens_per_second": _nullable(_AMOUNT),
    }
    engine = dict.fromkeys(("name", "version"), _STRING)
    served = dict.fromkeys(("name", "sha256", "architecture", "quantization"), _STRING)
    return {
        "Model": model,
        "ModelList": _object({"object": {"const": "list"}, "data": _list(ref("Model"), 0, 1)}),
        "Usage": _object({"keys": {"type": "array", "items": key}}),
        "Health": _object({"status": {"const": "alive"}}),
        "Ready": _object({**ready, "reason": _STRING}, tuple(ready)),
        "Version": _object(
            {
                "service": _STRING,
                "version": _STRING,
                "image": _nullable(_object({"version": _STRING, "baked": _STRING})),
                "boot": _nullable(_object({f"{event}_s": _nullable(_AMOUNT) for event in EVENTS})),
                "keys_required": _FLAG,
                "engine": _nullable(_object({**engine, **dict.fromkeys(("slots", "threads", "batch_tokens"), _COUNT)})),
                "model": _nullable(_object({**served, "parameters": _COUNT, "context_length": _COUNT})),
            }
        ),
    }


def _describe_errors() -> Schema:
    problem = {"type": _STRING, "title": _STRING, "status": _COUNT, "detail": _STRING, "id": _STRING}
    of_some_kinds = {
        **dict.fromkeys(("field", "bound"), _STRING),
        **dict.fromkeys(("limit_bytes", "prompt_tokens", "max_tokens", "context_length"), _COUNT),
    }
    kinds = {"enum": ["invalid_request_error", "permission_error", "rate_limit_error", "server_error"]}
    error = _object({"message": _STRING, "type": kinds, "param": _nullable(_STRING), "code": _STRING})
    return {
        "Problem": {**_object({**problem, **of_some_kinds}, tuple(problem)), "description": "RFC 9457"},
        "OpenAIError": _object({"error": error}),
    }


def _object(properties: Schema, required: tuple[str, ...] | None = None) -> Schema:
    """An object of these members and no others; all are required unless said otherwise."""
    return {
        "type": "object",
        "properties": properties,
        "required": sorted(properties if required is None else required),
        "additionalProperties": False,
    }


def _list(items: Schema, least: int, most: int) -> Schema:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


def _nullable(schema: Schema) -> Schema:
    return {**schema, "type": [schema["type"], "null"]}


def _text(least: int = 0, most: int | None = None) -> Schema:
    bounds = ({"minLength": least} if least else {}) | ({"maxLength": most} if most else {})
    return {"type": "string", "pattern": _TEXT_PATTERN, **bounds}


def _number(bounds: Number) -> Schema:
    kind = "integer" if bounds.whole else "number"
    return {"type": [kind, "null"], "minimum": bounds.low, "maximum": bounds.high, "default": bounds.default}


def _unsupported(fields: Mapping[str, Unsupported]) -> Schema:
    """Fields that are there to be refused: null, or a value that asks for nothing else than the engine does."""
    return {
        name: {"enum": [*field.harmless, None], "description": f"not supported: {field.why}"}
        for name, field in fields.items()
    }
