"""Owns ``/openapi.json``: every path with its answers and errors; the bodies' schemas stand in ``openapi_schemas``."""

from collections.abc import Iterable
from typing import Any

import falcon

from service import __version__
from service.engine.interface import Description
from service.generation import Generator
from service.openapi_schemas import Schema, describe_answers, describe_requests, model_name, ref
from service.problems import MEDIA_TYPE, describe_status, openai_code
from service.resources.page import FILES
from service.settings import Settings

_JSON, _EVENTS = "application/json", "text/event-stream"
# Each status with what it means and the kinds of problems that have it.
_ERRORS: dict[int, tuple[str, tuple[str, ...]]] = {
    400: (
        "malformed, unsupported, or refused by the engine: it does not fit the context (with counts, exact but "
        "where the prompt alone is too long: then at least so many), the chat "
        "template has no place for it, or the text goes on too long without a break",
        ("malformed", "unsupported-field", "context-exceeded"),
    ),
    401: ("no valid key; where keys are off: not a direct request from the machine itself", ("unauthenticated",)),
    403: ("the key's scopes do not hold this", ("forbidden",)),
    404: ("another model is served", ("model-unknown",)),
    408: ("the body did not arrive in time", ("request-timeout",)),
    413: ("the body is too large", ("body-too-large",)),
    414: ("the request line is too long", ()),
    415: ("the body is not declared as JSON, or is compressed", ("unsupported-media-type",)),
    417: ("an expectation other than 100-continue", ()),
    422: ("a field is out of its bounds", ("out-of-bounds",)),
    429: (
        "a limit of the key or of the address is reached",
        ("key-requests", "key-tokens", "key-parallel", "address-requests", "address-tokens", "address-parallel"),
    ),
    431: ("the headers are too large", ()),
    500: ("the engine or the service failed; the id stands in the log", ("engine-failed", "internal")),
    501: ("an unknown transfer coding", ()),
    503: (
        "not now: loading, busy, draining, the deadline cannot be met, or keys or records cannot be used",
        (
            *("loading", "engine-failed", "queue-full", "queue-timeout", "deadline", "draining", "client-left"),
            *("answer-cancelled", "keys-unusable", "records-unwritable", "node-problem"),
        ),
    ),
}
# The web server says these before it knows the path: in the shape of a problem, on OpenAI's paths too.
_BEFORE_THE_PATH = (400, 414, 417, 431, 501)
_EVERYWHERE = (*_BEFORE_THE_PATH, 500)
_HEADERS: dict[str, Schema] = {
    "X-Request-Id": {
        "description": "under which the request stands in the log",
        "required": True,
        "schema": {"type": "string", "pattern": "^[0-9a-f]{32}$"},
    },
    "Retry-After": {"description": "seconds to wait", "schema": {"type": "integer", "minimum": 1}},
    "X-Should-Retry": {
        "description": "the deadline is over, or cannot be met by waiting: the same again would come too late",
        "schema": {"const": "false"},
    },
    "RateLimit": {
        "description": "what is left of each limit (draft-ietf-httpapi-ratelimit-headers-10); without limits not there",
        "schema": {"type": "string"},
    },
    "RateLimit-Policy": {"description": "the limits of key and address", "schema": {"type": "string"}},
    "WWW-Authenticate": {"description": "how to send a key", "required": True, "schema": {"type": "string"}},
    "ETag": {"description": "which file it is", "required": True, "schema": {"type": "string"}},
}
_SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "a key"},
    "basic": {"type": "http", "scheme": "basic", "description": "name and key"},
}
# schema.parse_deadline in one expression: above 0, up to 86400.
_DEADLINE_PATTERN = (
    "^(?=.*[1-9])(0?([0-7]?[0-9]{1,4}|8[0-5][0-9]{3}|86[0-3][0-9]{2})(\\.[0-9]{1,6})?|0?86400(\\.0{1,6})?)$"
)
_DEADLINE = {
    "name": "X-Deadline-S",
    "in": "header",
    "description": "seconds, above 0 and up to 86400, after which the answer is worthless: refused at once with 503 if "
    "it cannot be met as far as the measured speed tells, ended when it is over",
    "schema": {"type": "string", "pattern": _DEADLINE_PATTERN},
}
_KNOWN_FILE = {
    "name": "If-None-Match",
    "in": "header",
    "description": "ETags of what the client has",
    "schema": {"type": "string"},
}
_QUESTION = "What is mini-llm?"


class OpenApiResource:
    """``GET /openapi.json``: names the model and heeds its context as soon as they are known."""

    def __init__(self, generator: Generator):
        self._generator = generator

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        resp.media = build_openapi(self._generator.settings, self._generator.engine.describe())

    on_head = on_get


def build_openapi(settings: Settings, model: Description | None) -> Schema:
    """The OpenAPI 3.1 document of a service with these settings; ``model`` is None before the first load."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "mini-llm",
            "version": __version__,
            "description": "A language model on a server of one's own. What the engine cannot honour is refused, never "
            "ignored. Everywhere a path that there is not is a 404, a method that a path does not have a 405, and "
            "OPTIONS tells the methods.",
        },
        "paths": {
            **_text_paths(settings.keys_required, model),
            **_openai_model_paths(settings.keys_required, model),
            **_state_paths(settings.keys_required),
            **{path: _page_path(path, media_type.partition(";")[0]) for path, (_, media_type) in FILES.items()},
        },
        "components": {
            "schemas": describe_requests(settings, model) | describe_answers(),
            "responses": {
                _error_name(status, openai): _error(status, openai) for status in _ERRORS for openai in (False, True)
            },
            "headers": _HEADERS,
            **({"securitySchemes": _SCHEMES} if settings.keys_required else {}),
        },
    }


def _text_paths(keys_required: bool, model: Description | None) -> Schema:
    errors = (*_EVERYWHERE, *_key_errors(keys_required), 408, 413, 415, 429)
    named = {"model": "starter" if model is None else model.model}

    def post(identity: str, summary: str, body: str, example: Schema, answer: Schema, errors: Schema) -> Schema:
        content = {"schema": ref(body), "examples": {"short": {"value": example}}}
        operation = {
            "operationId": identity,
            "summary": summary,
            "security": _keys(keys_required),
            "parameters": [_DEADLINE],
            "requestBody": {"required": True, "content": {_JSON: content}},
            "responses": {"200": answer, **errors},
        }
        return {"post": operation}

    return {
        "/generate": post(
            "generate",
            "Generate text from a prompt",
            "GenerateRequest",
            {"prompt": _QUESTION},
            _text_answer("GenerateAnswer", ("GeneratePiece", "GenerateEnd", "Problem")),
            _errors((*errors, 422)),
        ),
        "/v1/chat/completions": post(
            "createChatCompletion",
            "Answer a conversation, in OpenAI's shape",
            "ChatRequest",
            {**named, "messages": [{"role": "user", "content": _QUESTION}], "stream": True},
            _text_answer("ChatCompletion", ("ChatChunk", "OpenAIError"), terminated=True),
            _errors((*errors, 404), openai=True),
        ),
        "/v1/completions": post(
            "createCompletion",
            "Go on from a text, outside the chat template, in OpenAI's shape",
            "CompletionRequest",
            {**named, "prompt": _QUESTION},
            _text_answer("Completion", ("CompletionChunk", "OpenAIError"), terminated=True),
            _errors((*errors, 404), openai=True),
        ),
    }


def _openai_model_paths(keys_required: bool, model: Description | None) -> Schema:
    errors = (*_EVERYWHERE, *_key_errors(keys_required))
    first = {"operationId": "retrieveModel", "parameters": {"model": "$response.body#/data/0/id"}}
    return {
        "/v1/models": _get(
            "listModels",
            "The model that is served; an empty list while it loads for the first time",
            {**_answer("the list", ref("ModelList")), "links": {"first": first}},
            _errors(errors, openai=True),
            security=_keys(keys_required),
        ),
        "/v1/models/{model}": _get(
            "retrieveModel",
            "One model",
            _answer("the model", ref("Model")),
            _errors((*errors, 404), openai=True),
            security=_keys(keys_required),
            parameters=[{"name": "model", "in": "path", "required": True, "schema": model_name(model)}],
        ),
    }


def _state_paths(keys_required: bool) -> Schema:
    errors = _errors(_EVERYWHERE)
    guarded_errors = _errors((*_EVERYWHERE, *_key_errors(keys_required)))
    whose = "without a key for direct requests from the machine itself, with one for all others"
    not_ready = _answer("not ready", ref("Ready"), headers=("X-Request-Id", "Retry-After"))
    return {
        "/usage": _get(
            "getUsage",
            "Where the caller's key stands with its limits; every key for the scope admin",
            _answer("the counts", ref("Usage")),
            guarded_errors,
            security=_keys(keys_required),
        ),
        "/health": _get(
            "getHealth", "The process is alive; waits for nothing", _answer("alive", ref("Health")), errors
        ),
        "/ready": _get(
            "getReady",
            "200 once the model has given its golden answer since it started",
            _answer("ready", ref("Ready")),
            {**errors, "503": not_ready},
        ),
        "/version": _get(
            "getVersion",
            "Service, engine and model; null before the first load",
            _answer("what runs", ref("Version")),
            errors,
        ),
        "/metrics": _get(
            "getMetrics",
            f"Metrics for Prometheus; {whose}" if keys_required else "Metrics for Prometheus",
            _answer("the text exposition", {"type": "string"}, "text/plain"),
            guarded_errors,
            security=[*_keys(keys_required), {}] if keys_required else [],
        ),
        "/openapi.json": _get("getOpenapi", "This document", _answer("this document", {"type": "object"}), errors),
    }


def _page_path(path: str, media_type: str) -> Schema:
    """GET and HEAD of one file of the page."""
    headers = ("X-Request-Id", "ETag")
    whole = _answer("the file", {"type": "string"}, media_type, headers)
    answers = {"get": whole, "head": {"description": "the file's headers", "headers": _headers(*headers)}}
    known = {"description": "the client has it", "headers": _headers(*headers)}
    return {
        method: {
            "operationId": f"{method}-{path.strip('/').replace('.', '-') or 'page'}",
            "summary": "The page to try the service",
            "parameters": [_KNOWN_FILE],
            "responses": {"200": answer, "304": known, **_errors(_EVERYWHERE)},
        }
        for method, answer in answers.items()
    }


def _keys(required: bool) -> list[Schema]:
    return [{name: []} for name in _SCHEMES] if required else []


def _key_errors(required: bool) -> tuple[int, ...]:
    """Without keys nobody lacks a scope; but a request that came by a proxy is still refused."""
    return (401, 403, 503) if required else (401, 503)


def _get(identity: str, summary: str, answer: Schema, errors: Schema, **more: Any) -> Schema:
    """GET, and HEAD of the same."""
    whole = {"operationId": identity, "summary": summary, **more, "responses": {"200": answer, **errors}}
    heads = {
        status: {name: part for name, part in told.items() if name not in ("content", "links")}
        for status, told in whole["responses"].items()
    }
    return {"get": whole, "head": {**whole, "operationId": f"{identity}Head", "responses": heads}}


def _answer(
    description: str, schema: Schema, media_type: str = _JSON, headers: Iterable[str] = ("X-Request-Id",)
) -> Schema:
    return {"description": description, "content": {media_type: {"schema": schema}}, "headers": _headers(*headers)}


def _text_answer(whole: str, events: tuple[str, ...], terminated: bool = False) -> Schema:
    """The text in one document, or as server-sent events whose data is one of ``events``, at last perhaps [DONE]."""
    document = {
        "type": "string",
        "contentMediaType": _JSON,
        "contentSchema": {"anyOf": [ref(event) for event in events]},
    }
    event = {
        "type": "object",
        "description": 'each event of a stream, which "stream": true asks for',
        "properties": {"data": {"anyOf": [{"const": "[DONE]"}, document]} if terminated else document},
        "required": ["data"],
    }
    headers = ("X-Request-Id", "RateLimit", "RateLimit-Policy")
    answer = _answer("the text, whole or as server-sent events", ref(whole), headers=headers)
    answer["content"][_EVENTS] = {"schema": event}
    return answer


def _errors(statuses: Iterable[int], openai: bool = False) -> Schema:
    return {
        str(status): {"$ref": f"#/components/responses/{_error_name(status, openai)}"}
        for status in sorted(set(statuses))
    }


def _error_name(status: int, openai: bool) -> str:
    return f"OpenAIError{status}" if openai else f"Error{status}"


def _error(status: int, openai: bool) -> Schema:
    """How an error looks on OpenAI's paths, or on all others."""
    description, kinds = _ERRORS[status]
    early = {500: ("internal",)}.get(status, ())
    if status in _BEFORE_THE_PATH:
        early = (describe_status(status, "").kind,)
    content = {}
    if problems := early if openai else (*kinds, *early):
        types = {"enum": [f"urn:mini-llm:problem:{kind}" for kind in dict.fromkeys(problems)]}
        content[MEDIA_TYPE] = {"schema": {**ref("Problem"), "properties": {"type": types, "status": {"const": status}}}}
    if openai and kinds:
        # OpenAI's clients are told 400 for what is 422 elsewhere.
        codes = {"enum": [openai_code(kind) for kind in (*kinds, *(_ERRORS[422][1] if status == 400 else ()))]}
        content[_JSON] = {"schema": {**ref("OpenAIError"), "properties": {"error": {"properties": {"code": codes}}}}}
    headers = {
        401: ["WWW-Authenticate"],
        429: ["Retry-After", "RateLimit", "RateLimit-Policy"],
        503: ["Retry-After", "X-Should-Retry"],
    }
    return {
        "description": description,
        "content": content,
        "headers": {
            # What is refused before the path is known has no id in its headers.
            "X-Request-Id": {**_HEADERS["X-Request-Id"], "required": status not in _EVERYWHERE},
            **_headers(*headers.get(status, ())),
        },
    }


def _headers(*names: str) -> Schema:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}
