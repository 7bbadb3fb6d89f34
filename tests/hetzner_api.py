"""Owns what Hetzner's API is by its OpenAPI document: the shapes of bodies and answers that the local cloud must have.

``hetzner_api.json`` holds the shapes alone, of the resources that the local cloud serves. They are drawn, by
``python -m tests.hetzner_api DOCUMENT``, from the community's description of the API of February 2026
(github.com/MaximilianKoestler/hcloud-openapi, MIT licence, Copyright (c) Maximilian Köstler).
"""

import json
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema_rs

Document = dict[str, Any]

_SHAPES = Path(__file__).with_suffix(".json")
_RESOURCES = (
    "actions",
    "datacenters",
    "firewalls",
    "floating_ips",
    "images",
    "isos",
    "locations",
    "networks",
    "placement_groups",
    "pricing",
    "primary_ips",
    "server_types",
    "servers",
    "ssh_keys",
    "zones",
)
_KEPT = ("type", "enum", "required", "minimum", "maximum", "minLength", "maxLength", "pattern", "minItems", "maxItems")
_JSON = "application/json"
# Where the clients of today and the document of February 2026 disagree, the clients are right.
_CLIENTS_KNOW_BETTER = (
    '"datacenter" is a required property',  # left servers and primary IPs on 2026-07-01
    'assignee_type: "unassigned" is not one of',  # what primary IPs of nobody have since
    r'body [a-z_/0-9]+: \d+ is not of type "string"',  # ids, which hcloud for Python and hcloud-go send as numbers
    'dns_ptr: null is not of type "string"',  # how both reset it
    'POST /firewalls.* body rules: null is not of type "array"',  # how hcloud-go says that there are none
    'POST /primary_ips body : "assignee_type" is a required property',  # only of those with an assignee_id
)


def _shape(schema: Document) -> Document:
    """A schema of OpenAPI 3.0 as one of JSON Schema, without its words."""
    shape: Document = {key: schema[key] for key in _KEPT if key in schema}
    if "$ref" in schema:
        shape["$ref"] = schema["$ref"].replace("#/components/schemas/", "#/$defs/")
    if "properties" in schema:
        shape["properties"] = {name: _shape(inner) for name, inner in schema["properties"].items()}
    if isinstance(schema.get("additionalProperties"), dict):
        shape["additionalProperties"] = _shape(schema["additionalProperties"])
    if "items" in schema:
        shape["items"] = _shape(schema["items"])
    for key in ("allOf", "anyOf", "oneOf"):
        if key in schema:
            shape[key] = [_shape(inner) for inner in schema[key]]
    return {"anyOf": [{"type": "null"}, shape]} if schema.get("nullable") else shape


def _references(shape: Any) -> Iterator[str]:
    if isinstance(shape, dict):
        if isinstance(shape.get("$ref"), str):
            yield shape["$ref"].removeprefix("#/$defs/")
        for inner in shape.values():
            yield from _references(inner)
    elif isinstance(shape, list):
        for inner in shape:
            yield from _references(inner)


def draw(document: Document) -> Document:
    """The shapes in an OpenAPI document: ``operations`` by method and path, and ``$defs`` that they refer to."""
    operations: Document = {}
    for path, item in document["paths"].items():
        if path.split("/")[1] not in _RESOURCES:
            continue
        for method in item.keys() & {"get", "post", "put", "delete"}:
            operation = item[method]
            answers = {
                status: _shape(answer["content"][_JSON]["schema"])
                for status, answer in operation["responses"].items()
                if _JSON in answer.get("content", {})
            }
            body = operation.get("requestBody", {}).get("content", {}).get(_JSON)
            operations[f"{method.upper()} {path}"] = {"body": _shape(body["schema"]) if body else None, **answers}
    definitions: Document = {}
    waiting = set(_references(operations))
    while waiting:
        name = waiting.pop()
        definitions[name] = _shape(document["components"]["schemas"][name])
        waiting |= set(_references(definitions[name])) - definitions.keys()
    return {
        "drawn_from": f"hcloud-openapi {document['info']['version']}, MIT licence",
        "operations": dict(sorted(operations.items())),
        "$defs": dict(sorted(definitions.items())),
    }


@cache
def _shapes() -> Document:
    return dict(json.loads(_SHAPES.read_text("utf-8")))


@cache
def _routes() -> list[tuple[str, "re.Pattern[str]", str]]:
    """Method, what its paths look like, and the operation's name; literal paths before those with variables."""
    names = sorted(_shapes()["operations"], key=lambda name: name.count("{"))
    split = [(name, *name.split(" ")) for name in names]
    return [(method, re.compile(re.sub(r"\{\w+\}", "[^/]+", path)), name) for name, method, path in split]


@cache
def _validator(operation: str, part: str) -> jsonschema_rs.Validator | None:
    shape = _shapes()["operations"][operation].get(part)
    return jsonschema_rs.validator_for({**shape, "$defs": _shapes()["$defs"]}) if shape else None


def find_operation(method: str, path: str) -> str | None:
    """The operation that a call is, such as ``GET /servers/{id}``; None for one that the document does not know."""
    return next((name for verb, pattern, name in _routes() if verb == method and pattern.fullmatch(path)), None)


def problems(operation: str, status: int, body: Any, answer: Any) -> list[str]:
    """What about a call is not as the document has it: the answer, and the body if it was accepted; sorted."""
    known = _shapes()["operations"][operation]
    if status >= 400:
        return _compare(operation, f"{status // 100}xx", answer)
    found = [] if body is None else _compare(operation, "body", body)
    if str(status) in known:
        return found + _compare(operation, str(status), answer)
    # The document has no answer for those without a body.
    return found if status == 204 and answer is None else [*found, f"{operation}: {status} is not among its answers"]


def _compare(operation: str, part: str, document: Any) -> list[str]:
    validator = _validator(operation, part)
    if validator is None:
        return []
    found = (
        f"{operation} {part} {'/'.join(map(str, error.instance_path))}: {error.message}"
        for error in validator.iter_errors(document)
    )
    return sorted(line for line in found if not any(re.search(pattern, line) for pattern in _CLIENTS_KNOW_BETTER))


if __name__ == "__main__":
    drawn = draw(json.loads(Path(sys.argv[1]).read_text("utf-8")))
    _SHAPES.write_text(json.dumps(drawn, separators=(",", ":"), ensure_ascii=False) + "\n", "utf-8")
