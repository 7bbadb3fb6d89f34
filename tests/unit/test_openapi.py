"""The document at ``/openapi.json`` against what it was told from: routes, parsers, errors."""

import dataclasses
import io
import json
import re
from collections.abc import Callable, Iterator
from math import inf, nextafter
from pathlib import Path
from typing import Any

import falcon.inspect
import jsonschema_rs
import pytest
from limits.storage import MemoryStorage
from schemathesis.specs.openapi.definitions import OPENAPI_31_VALIDATOR

from service import errors, openai_schema, problems, schema
from service.access import Access
from service.accounts import Log
from service.app import create_app
from service.errors import FieldOutOfBounds, ServiceError
from service.generation import Generator
from service.limits import Limiter
from service.metrics import Metrics
from service.openapi import build_openapi
from service.scheduler import Scheduler
from service.schema import TokenBounds, parse_deadline, parse_json
from service.settings import Settings
from tests.fake_engine import FakeEngine
from tests.local_engine import LocalEngine
from tests.openapi_document import Document
from tests.unit.test_app import FakeAudit

SETTINGS = Settings(largest_max_tokens=64, default_max_tokens=32)
MODEL = FakeEngine(context_length=512).describe()
DOCUMENT = Document(build_openapi(SETTINGS, MODEL))
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "hello"}]
# A body that each path takes.
BODIES: dict[str, dict[str, Any]] = {
    "/generate": {"prompt": "x"},
    CHAT: {"model": MODEL.model, "messages": HELLO},
    COMPLETIONS: {"model": MODEL.model, "prompt": "x"},
}
PARSERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "/generate": lambda body: schema.parse_generate(body, TokenBounds(32, 64)),
    CHAT: lambda body: openai_schema.parse_chat(body, MODEL.model, 64).generate,
    COMPLETIONS: lambda body: openai_schema.parse_completion(body, MODEL.model, 64).generate,
}
FIELDS = [(path, field) for path in BODIES for field in DOCUMENT.body(path)["properties"]]


def is_taken(path: str, body: dict[str, Any]) -> bool:
    try:
        PARSERS[path](parse_json(json.dumps(body).encode(), 1 << 20))
    except ServiceError:
        return False
    return True


def is_told(path: str, body: dict[str, Any]) -> bool:
    return bool(DOCUMENT.validator(DOCUMENT.body(path)).is_valid(json.loads(json.dumps(body))))


def probes(part: dict[str, Any]) -> Iterator[Any]:
    """Values at each bound of a schema and just beyond it, and of every other type."""
    part = DOCUMENT.resolve(part)
    yield from (None, True, False, 0, 1, -1, 1.0, 1.5, "", "text", "a\0b", [], ["text"], [""], [1], {}, {"other": 1})
    for one in part.get("anyOf", ()):
        yield from probes(one)
    yield from part.get("enum", ())
    yield from ([part["const"]] if "const" in part else ())
    if "minimum" in part:
        low, high = part["minimum"], part["maximum"]
        yield from (low, high, nextafter(low, -inf), nextafter(high, inf), low - 1, high + 1)
    longest = part.get("maxLength", 1000)
    yield from ("a" * longest, "a" * (longest + 1), "🎉" * longest, "🎉" * (longest + 1))
    if "items" in part:
        first, most = sample(part["items"]), part.get("maxItems", 20)
        yield from ([first] * most, [first] * (most + 1))
        yield from ([first, item] for item in probes(part["items"]))
    if "properties" in part:
        least = {name: sample(part["properties"][name]) for name in part["required"]}
        yield from (least, {**least, "other": 1})
        yield from ({name: value for name, value in least.items() if name != left_out} for left_out in least)
        for name, member in part["properties"].items():
            yield from ({**least, name: value} for value in probes(member))


def sample(part: dict[str, Any]) -> Any:
    """A value that the schema allows."""
    validator = DOCUMENT.validator(part)
    return next(value for value in probes(part) if validator.is_valid(value))


@pytest.mark.parametrize("settings", [SETTINGS, Settings(auth="off")])
@pytest.mark.parametrize("model", [MODEL, None])
def test_the_document_is_valid(settings: Settings, model: Any) -> None:
    """OpenAPI 3.1 throughout, its schemas are JSON Schema, its references lead somewhere, its examples keep to it."""
    document = Document(json.loads(json.dumps(build_openapi(settings, model))))
    assert not [error.message for error in OPENAPI_31_VALIDATOR.iter_errors(document.document)]
    for name, one in document.document["components"]["schemas"].items():
        jsonschema_rs.meta.validate({"$schema": "https://json-schema.org/draft/2020-12/schema", **one})
        assert not document.validator(one).is_valid("no such thing"), name
    for reference in re.findall(r'"\$ref": "([^"]+)"', json.dumps(document.document)):
        document.resolve({"$ref": reference})
    for path in BODIES:
        content = document.document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        for example in content["examples"].values():
            document.validator(content["schema"]).validate(example["value"])


def test_every_route_and_method_is_told_and_no_other() -> None:
    """Paths and methods are those of the application; OPTIONS, which the framework answers itself, is told in words."""
    engine, scheduler = LocalEngine(FakeEngine()).as_process(), Scheduler(1)
    metrics, limiter = Metrics(engine, scheduler, 0.0), Limiter(SETTINGS.address_limits, MemoryStorage())
    generator = Generator(engine, scheduler, limiter, metrics, SETTINGS)
    app: Any = create_app(generator, Access(None), FakeAudit().as_log(), Log(io.StringIO()))
    routes = {
        (re.sub(r":\w+}", "}", route.path), method.method.lower())
        for route in falcon.inspect.inspect_routes(app._application)
        for method in route.methods
        if not method.internal
    }
    told = [(path, method) for path, method, _ in DOCUMENT.operations()]
    assert sorted(told) == sorted(routes)
    identities = [operation["operationId"] for _, _, operation in DOCUMENT.operations()]
    assert len(set(identities)) == len(identities)


def test_every_field_is_told_and_no_other() -> None:
    """The members of each body are the fields that its parser knows, those that it refuses included."""
    known = {
        "/generate": schema._FIELDS | set(schema.UNSUPPORTED_BY_GENERATE),
        CHAT: openai_schema._CHAT_FIELDS | set(openai_schema.UNSUPPORTED_BY_CHAT),
        COMPLETIONS: openai_schema._COMPLETION_FIELDS | set(schema.UNSUPPORTED),
    }
    for path, fields in known.items():
        assert set(DOCUMENT.body(path)["properties"]) == fields


@pytest.mark.parametrize(("path", "field"), FIELDS)
def test_bounds_are_those_of_the_parser(path: str, field: str) -> None:
    """Whatever a field holds, the parser takes it exactly if the document allows it; so at each bound and beyond."""
    told = DOCUMENT.validator(DOCUMENT.body(path))
    seen = set()
    for value in probes(DOCUMENT.body(path)["properties"][field]):
        body = {**BODIES[path], field: value}
        if field == "stream_options":
            body["stream"] = True
        assert is_taken(path, body) == told.is_valid(body), body
        seen.add(told.is_valid(body))
    assert seen == {True, False}


@pytest.mark.parametrize(("path", "field"), FIELDS)
def test_defaults_are_those_of_the_parser(path: str, field: str) -> None:
    """A field with its default means the same as without it."""
    properties = DOCUMENT.body(path)["properties"]
    if "default" in properties[field]:
        given = PARSERS[path]({**BODIES[path], field: properties[field]["default"]})
        without = PARSERS[path](BODIES[path])
        assert dataclasses.replace(given, max_tokens_named=False) == without


@pytest.mark.parametrize("path", BODIES)
def test_required_fields_are_those_of_the_parser(path: str) -> None:
    """A body lacks a field that is required, and is taken by neither."""
    assert set(DOCUMENT.body(path)["required"]) == set(BODIES[path])
    for field in BODIES[path]:
        body = {name: value for name, value in BODIES[path].items() if name != field}
        assert not is_taken(path, body)
        assert not is_told(path, body)


@pytest.mark.parametrize("role", [*openai_schema.ROLES, "tool", "function", "", None, 1])
@pytest.mark.parametrize("content", ["hi", "", [], [("hi",)], [("",)], [("", "hi")], [("hi", "\0")], None, "a\0"])
def test_messages_are_those_of_the_parser(role: Any, content: Any) -> None:
    """A user must say something, system and assistant may be silent, and somebody must have said something."""
    if isinstance(content, list):
        content = [{"type": "text", "text": text} for texts in content for text in texts]
    message = {"role": role, "content": content}
    for messages in ([message], [*HELLO, message], [message, {"role": "system", "content": ""}]):
        body = {**BODIES[CHAT], "messages": messages}
        assert is_taken(CHAT, body) == is_told(CHAT, body), messages


@pytest.mark.parametrize(
    ("fields", "taken"),
    [
        ({"max_tokens": 5, "max_completion_tokens": 5}, False),
        ({"max_tokens": 5, "max_completion_tokens": None}, True),
        ({"stream_options": {"include_usage": True}}, False),
        ({"stream_options": {"include_usage": True}, "stream": False}, False),
        ({"stream_options": {"include_usage": True}, "stream": True}, True),
        ({"stream_options": {}, "stream": True}, True),
        ({"stream_options": None}, True),
        ({"n": 1, "seed": None, "tools": [], "response_format": {"type": "text"}}, True),
        ({"messages": HELLO * 512}, True),
        ({"messages": HELLO * 513}, False),
        ({"messages": [{**HELLO[0], "name": "x"}]}, False),
        ({"messages": [{**HELLO[0], "name": None, "tool_calls": []}]}, True),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, False),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "more": 1}]}]}, False),
    ],
)
def test_fields_that_hang_together(fields: dict[str, Any], taken: bool) -> None:
    """What a field may hold because of another is told as the parser has it."""
    body = {**BODIES[CHAT], **fields}
    assert is_taken(CHAT, body) == is_told(CHAT, body) == taken


def test_tokens_that_no_context_holds_are_not_offered() -> None:
    """Once the model is known, max_tokens leaves room for a token of the prompt; the name is the model's."""
    body = Document(build_openapi(Settings(), MODEL)).body(CHAT)["properties"]
    assert body["max_tokens"]["maximum"] == 511
    assert body["model"]["enum"] == [MODEL.model]
    unknown = Document(build_openapi(Settings(), None)).body(CHAT)["properties"]
    assert unknown["max_tokens"]["maximum"] == 4096
    assert unknown["model"]["type"] == "string"


def test_deadline() -> None:
    """The pattern of X-Deadline-S allows what the parser takes, to the last digit."""
    (header,) = DOCUMENT.document["paths"]["/generate"]["post"]["parameters"]
    validator = DOCUMENT.validator(header["schema"])
    wholes = ["0", "00", "000000", "1", "9", "007", "000001", "79999", "80000", "85999", "86000", "86399", "086399"]
    wholes += ["86400", "086400", "0086400", "86401", "86410", "86500", "87000", "90000", "99999", "100000", "0000001"]
    fractions = ["", ".", ".0", ".5", ".000000", ".000001", ".0000001", "e3", " ", "\n"]
    others = ["", " ", "-1", "+1", "inf", "nan", "1_0", "٣", ".5", "1,5", "0x1"]
    for text in [whole + fraction for whole in wholes for fraction in fractions] + others:
        try:
            parse_deadline(text)
            taken = True
        except FieldOutOfBounds:
            taken = False
        assert validator.is_valid(text) == taken, text


def reasons(error: str) -> set[str]:
    """The reasons with which an error is raised anywhere in the service."""
    source = "".join(path.read_text("utf-8") for path in Path(errors.__file__).parent.rglob("*.py"))
    found = re.findall(error + r'\(\s*f?"([^"]+)"', source)
    kinds = ("key", "address")
    return {reason.replace("{subject.kind}", kind) for reason in found for kind in kinds}


EXAMPLES: dict[type[ServiceError], list[ServiceError]] = {
    errors.Unavailable: [errors.Unavailable(reason, "busy", 1.5) for reason in sorted(reasons("Unavailable"))],
    errors.LimitReached: [errors.LimitReached(reason, "enough", 1.5) for reason in sorted(reasons("LimitReached"))],
    errors.ContextExceeded: [errors.ContextExceeded(5, 6, 7)],
    errors.FieldUnsupported: [errors.FieldUnsupported("seed", "there is none")],
    errors.FieldOutOfBounds: [errors.FieldOutOfBounds("top_k", "must be less")],
    errors.BodyTooLarge: [errors.BodyTooLarge(5)],
    errors.BodyLate: [errors.BodyLate(2.5)],
    errors.SettingsInvalid: [errors.SettingsInvalid(["wrong"])],
    errors.EngineLost: [errors.EngineLost("gone")],
    errors.AnswerCancelled: [errors.AnswerCancelled("over", by) for by in ("deadline", "drain")],
}


def every_error() -> list[ServiceError]:
    """An error of each class, those that end a start included, and with each reason."""
    kinds: list[type[ServiceError]] = [ServiceError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    return [error for kind in kinds for error in EXAMPLES.get(kind) or [kind("as it is")]]


@pytest.mark.parametrize("error", every_error(), ids=lambda error: f"{type(error).__name__}-{error}")
def test_every_problem_is_told(error: ServiceError) -> None:
    """Whatever error leaves the service, its status, kind, members and headers are told, in both shapes."""
    problem = problems.describe_error(error)
    headers = {name.lower(): value for name, value in problem.headers().items()} | {"x-request-id": "0" * 32}
    if problem.status != 404:  # only OpenAI's paths are asked for a model
        here = {**headers, "content-type": problems.MEDIA_TYPE}
        DOCUMENT.check("/generate", "post", problem.status, here, problem.body("0" * 32))
    there = {**headers, "content-type": "application/json"}
    for path in (CHAT, COMPLETIONS):
        DOCUMENT.check(path, "post", problem.openai_status, there, problem.openai_body())


def test_reasons_are_found() -> None:
    """The search for reasons finds those that are known, so that it is not empty by mistake."""
    assert {"deadline", "queue_full", "loading", "draining"} <= reasons("Unavailable")
    assert reasons("LimitReached") == {
        f"{kind}_{what}" for kind in ("key", "address") for what in ("requests", "tokens", "parallel")
    }
