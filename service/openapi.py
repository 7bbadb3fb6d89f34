"""Owns ``/openapi.json``: every path, body, bound and error, told from the tables by which requests are checked."""

from typing import Any

import falcon

from service import __version__
from service.openai_schema import CHAT_MAX_TOKENS, COMPLETION_MAX_TOKENS, LONGEST_USER, MOST_MESSAGES, ROLES
from service.problems import MEDIA_TYPE
from service.schema import LONGEST_STOP, MOST_STOPS, SAMPLING, Number
from service.settings import Settings

Schema = dict[str, Any]

# U+0000 is refused; lone surrogates are too, but no pattern over characters can say so, and no client can send one.
_TEXT_PATTERN = "^[^\\u0000]*$"


class OpenApiResource:
    """``GET /openapi.json``."""

    def __init__(self, settings: Settings):
        self._document = build_openapi(settings)

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        resp.media = self._document


def build_openapi(settings: Settings) -> Schema:
    """The OpenAPI 3.1 document of a service with these settings."""
    guarded = [{"bearer": []}, {"basic": []}] if settings.keys_required else []
    text = {
        "parameters": [{"$ref": "#/components/parameters/deadline"}],
        "security": guarded,
    }
    refusals = _errors(400, 408, 413, 415, 422, 429, 500, 503) | (_errors(401, 403) if guarded else _errors(401))
    openai_refusals = _openai_errors(400, 404, 408, 413, 415, 429, 500, 503) | (
        _openai_errors(401, 403) if guarded else _openai_errors(401)
    )
    key_errors = (401, 403, 503)
    metrics_answers = _answer(None, "the text exposition of Prometheus", "text/plain")
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "mini-llm",
            "version": __version__,
            "description": "A language model on a server of one's own. What the engine cannot honour is refused, never "
            "ignored; a prompt that does not fit the context is a 400 with exact counts.",
        },
        "paths": {
            "/generate": {
                "post": {
                    "operationId": "generate",
                    "summary": "Generate text from a prompt",
                    **text,
                    "requestBody": _body("GenerateRequest"),
                    "responses": _text_answer("GenerateAnswer") | refusals,
                }
            },
            "/v1/chat/completions": {
                "post": {
                    "operationId": "createChatCompletion",
                    "summary": "Answer a conversation, in OpenAI's shape",
                    **text,
                    "requestBody": _body("ChatRequest"),
                    "responses": _text_answer("ChatCompletion") | openai_refusals,
                }
            },
            "/v1/completions": {
                "post": {
                    "operationId": "createCompletion",
                    "summary": "Go on from a text, outside the chat template, in OpenAI's shape",
                    **text,
                    "requestBody": _body("CompletionRequest"),
                    "responses": _text_answer("Completion") | openai_refusals,
                }
            },
            "/v1/models": {
                "get": {
                    "operationId": "listModels",
                    "summary": "The model that is served; an empty list while it loads for the first time",
                    "security": guarded,
                    "responses": _answer("ModelList", "the list") | _openai_errors(*key_errors),
                }
            },
            "/v1/models/{model}": {
                "get": {
                    "operationId": "retrieveModel",
                    "summary": "One model",
                    "security": guarded,
                    "parameters": [
                        {"name": "model", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
                    ],
                    "responses": _answer("Model", "the model") | _openai_errors(404, *key_errors),
                }
            },
            "/usage": {
                "get": {
                    "operationId": "getUsage",
                    "summary": "Where the caller's key stands with its limits; every key's for the scope admin",
                    "security": guarded,
                    "responses": _answer("Usage", "the counts") | _errors(*key_errors),
                }
            },
            "/health": {
                "get": {
                    "operationId": "getHealth",
                    "summary": "The process is alive; waits for nothing",
                    "responses": _answer("Health", "alive"),
                }
            },
            "/ready": {
                "get": {
                    "operationId": "getReady",
                    "summary": "200 once the model has given its golden answer since it started",
                    "responses": _answer("Ready", "ready")
                    | {"503": {"description": "not ready", **_content("Ready"), "headers": _RETRY_AFTER}},
                }
            },
            "/version": {
                "get": {
                    "operationId": "getVersion",
                    "summary": "Service, engine and model; null before the first load",
                    "responses": _answer("Version", "what runs"),
                }
            },
            "/metrics": {
                "get": {
                    "operationId": "getMetrics",
                    "summary": "Metrics; without a key from the machine itself only",
                    "security": [*guarded, {}] if guarded else [],
                    "responses": metrics_answers | _errors(401, 403, 503),
                }
            },
            "/openapi.json": {
                "get": {
                    "operationId": "getOpenapi",
                    "summary": "This document",
                    "responses": _answer(None, "this document"),
                }
            },
            **{path: _page_path(path, media_type) for path, media_type in _PAGE.items()},
        },
        "components": {
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer", "description": "a key"},
                "basic": {"type": "http", "scheme": "basic", "description": "name and key"},
            },
            "parameters": {
                "deadline": {
                    "name": "X-Deadline-S",
                    "in": "header",
                    "description": "seconds after which the answer is worthless; refused at once if it cannot be met",
                    "schema": {"type": "string", "pattern": "^(?=.*[1-9])[0-9]{1,4}(\\.[0-9]{1,6})?$"},
                }
            },
            "headers": _HEADERS,
            "schemas": _schemas(settings),
        },
    }


_PAGE = {"/": "text/html", "/page.js": "text/javascript", "/page.css": "text/css", "/page.svg": "image/svg+xml"}
_RETRY_AFTER = {"Retry-After": {"$ref": "#/components/headers/Retry-After"}}
_HEADERS = {
    "Retry-After": {"description": "seconds to wait", "schema": {"type": "string", "pattern": "^[0-9]+$"}},
    "RateLimit": {
        "description": "what is left of each limit (draft-ietf-httpapi-ratelimit-headers-10)",
        "schema": {"type": "string"},
    },
    "RateLimit-Policy": {"description": "the limits of key and address", "schema": {"type": "string"}},
    "WWW-Authenticate": {"description": "how to send a key", "schema": {"type": "string"}},
}
_ERRORS = {
    400: "malformed, unsupported, or it does not fit the context",
    401: "no valid key",
    403: "the key's scopes do not hold this",
    404: "there is no such model",
    408: "the request did not arrive in time",
    413: "the body is too large",
    415: "the body is not declared as JSON",
    422: "a field is out of its bounds",
    429: "a limit of the key or the address is reached",
    500: "the engine or the service failed; the id stands in the log",
    503: "busy, loading, draining, or records and keys cannot be used",
}


def _content(name: str | None, media_type: str = "application/json") -> Schema:
    schema = {} if name is None else {"$ref": f"#/components/schemas/{name}"}
    return {"content": {media_type: {"schema": schema}}}


def _body(name: str) -> Schema:
    return {"required": True, **_content(name)}


def _answer(name: str | None, description: str, media_type: str = "application/json") -> Schema:
    return {"200": {"description": description, **_content(name, media_type)}}


def _text_answer(name: str) -> Schema:
    content = _content(name)["content"] | {"text/event-stream": {"schema": {"type": "string"}}}
    headers = {name: {"$ref": f"#/components/headers/{name}"} for name in ("RateLimit", "RateLimit-Policy")}
    return {"200": {"description": "the text, whole or as server-sent events", "content": content, "headers": headers}}


def _errors(*statuses: int) -> Schema:
    return {str(status): _error(status, "Problem", MEDIA_TYPE) for status in statuses}


def _openai_errors(*statuses: int) -> Schema:
    return {str(status): _error(status, "OpenAIError", "application/json") for status in statuses}


def _error(status: int, schema: str, media_type: str) -> Schema:
    headers = dict(_RETRY_AFTER) if status == 429 else {}
    if status == 401:
        headers["WWW-Authenticate"] = {"$ref": "#/components/headers/WWW-Authenticate"}
    return {
        "description": _ERRORS[status],
        **_content(schema, media_type),
        **({"headers": headers} if headers else {}),
    }


def _page_path(path: str, media_type: str) -> Schema:
    answers = _answer(None, "the file", media_type) | {"304": {"description": "as the client has it"}}
    name = path.strip("/").replace("page.", "page-") or "page"
    return {
        "get": {"operationId": f"get-{name}", "summary": "The page to try the service", "responses": answers},
        "head": {
            "operationId": f"head-{name}",
            "summary": "The same without the file",
            "responses": {"200": {"description": "the file's headers"}, "304": {"description": "as the client has it"}},
        },
    }


def _object(properties: Schema, required: tuple[str, ...] | None = None) -> Schema:
    """An object of these members and no others; all are required unless said otherwise."""
    return {
        "type": "object",
        "properties": properties,
        "required": sorted(properties if required is None else required),
        "additionalProperties": False,
    }


def _nullable(schema: Schema) -> Schema:
    return {**schema, "type": [schema["type"], "null"]}


def _text(least: int = 0, most: int | None = None) -> Schema:
    bounds = ({"minLength": least} if least else {}) | ({"maxLength": most} if most else {})
    return {"type": "string", "pattern": _TEXT_PATTERN, **bounds}


def _number(bounds: Number) -> Schema:
    kind = "integer" if bounds.whole else "number"
    return {
        "type": [kind, "null"],
        "minimum": bounds.low,
        "maximum": bounds.high,
        "default": bounds.default,
    }


def _schemas(settings: Settings) -> Schema:
    largest = settings.largest_max_tokens
    sampling = {name: _number(bounds) for name, bounds in SAMPLING.items()}
    one_stop = _text(1, LONGEST_STOP)
    stop = {"anyOf": [_nullable(one_stop), {"type": "array", "items": one_stop, "maxItems": MOST_STOPS}]}
    switch = {"type": ["boolean", "null"], "default": False}
    count = {"type": "integer", "minimum": 0}
    amount = {"type": "number", "minimum": 0}
    name = {"type": "string"}
    finish = {"type": "string", "enum": ["stop", "length"]}
    usage = _object({"prompt_tokens": count, "completion_tokens": count, "total_tokens": count})

    def tokens(default: int) -> Schema:
        return _number(Number(default, 1, largest, whole=True))

    openai = {
        "model": {**name, "description": "as GET /v1/models names it; any other is a 404"},
        **sampling,
        "stop": stop,
        "stream": switch,
        "user": _nullable(_text(most=LONGEST_USER)),
    }
    parts = {"type": "array", "items": _object({"type": {"const": "text"}, "text": _text(1)}), "minItems": 1}
    message = _object({"role": {"type": "string", "enum": list(ROLES)}, "content": {"anyOf": [_text(1), parts]}})
    head = {"id": name, "created": count, "model": name}
    choice = {"index": count, "finish_reason": finish, "logprobs": {"type": "null"}}
    reply = _object({"role": {"const": "assistant"}, "content": name, "refusal": {"type": "null"}})
    model = _object({"id": name, "object": {"const": "model"}, "created": count, "owned_by": name})
    use = _object({"name": name, "limit": count, "used": count, "reset_s": amount})
    key = _object({"name": name, "tokens_today": count, "limits": {"type": "array", "items": use}})
    return {
        "GenerateRequest": _object(
            {
                "prompt": _text(1),
                "system": _nullable(_text()),
                "max_tokens": tokens(settings.default_max_tokens),
                **sampling,
                "stop": stop,
                "stream": switch,
            },
            ("prompt",),
        ),
        "GenerateAnswer": _object(
            {
                "id": name,
                "model": name,
                "response": name,
                "finish_reason": {"type": "string", "enum": ["stop", "length", "cancelled"]},
                "usage": usage,
                "timings": _object(
                    {
                        "queue_ms": amount,
                        "prefill_ms": amount,
                        "decode_ms": amount,
                        "total_ms": amount,
                        "tokens_per_second": amount,
                    }
                ),
            }
        ),
        "ChatRequest": _object(
            {
                **openai,
                "messages": {"type": "array", "items": message, "minItems": 1, "maxItems": MOST_MESSAGES},
                **{one: tokens(largest) for one in CHAT_MAX_TOKENS},
            },
            ("model", "messages"),
        )
        | {"not": {"required": list(CHAT_MAX_TOKENS)}},
        "ChatCompletion": _object(
            {
                **head,
                "object": {"const": "chat.completion"},
                "choices": {"type": "array", "items": _object({**choice, "message": reply})},
                "usage": usage,
            }
        ),
        "CompletionRequest": _object(
            {
                **openai,
                "prompt": {"anyOf": [_text(1), {"type": "array", "items": _text(1), "minItems": 1, "maxItems": 1}]},
                "max_tokens": tokens(COMPLETION_MAX_TOKENS),
            },
            ("model", "prompt"),
        ),
        "Completion": _object(
            {
                **head,
                "object": {"const": "text_completion"},
                "choices": {"type": "array", "items": _object({**choice, "text": name})},
                "usage": usage,
            }
        ),
        "Model": model,
        "ModelList": _object({"object": {"const": "list"}, "data": {"type": "array", "items": model}}),
        "Usage": _object({"keys": {"type": "array", "items": key}}),
        "Health": _object({"status": {"const": "alive"}}),
        "Ready": _object(
            {
                "status": name,
                "running": count,
                "waiting": count,
                "predicted_wait_s": amount,
                "tokens_per_second": {"type": ["number", "null"]},
                "reason": name,
            },
            ("status", "running", "waiting", "predicted_wait_s", "tokens_per_second"),
        ),
        "Version": _object(
            {
                "service": name,
                "version": name,
                "keys_required": {"type": "boolean"},
                "engine": {"type": ["object", "null"]},
                "model": {"type": ["object", "null"]},
            }
        ),
        "Problem": {
            "type": "object",
            "description": "RFC 9457; some kinds have further members, such as field and bound",
            "properties": {"type": name, "title": name, "status": count, "detail": name, "id": name},
            "required": ["detail", "id", "status", "title", "type"],
        },
        "OpenAIError": _object(
            {
                "error": _object(
                    {"message": name, "type": name, "param": {"type": ["string", "null"]}, "code": name}
                )
            }
        ),
    }
