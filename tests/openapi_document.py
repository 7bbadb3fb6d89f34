"""Owns the look at answers and bodies through the eyes of ``/openapi.json``."""

import json
from collections.abc import Iterator
from typing import Any

import jsonschema_rs

Schema = dict[str, Any]


class Document:
    """An OpenAPI document, with what it says of one request or answer at hand."""

    def __init__(self, document: Schema):
        self.document = document

    def operations(self) -> Iterator[tuple[str, str, Schema]]:
        """Path, method, operation."""
        for path, item in self.document["paths"].items():
            for method, operation in item.items():
                yield path, method, operation

    def resolve(self, schema: Schema) -> Schema:
        """What a reference within the document stands for; anything else is itself."""
        while "$ref" in schema:
            found: Any = self.document
            for part in schema["$ref"].removeprefix("#/").split("/"):
                found = found[part]
            schema = {**found, **{name: value for name, value in schema.items() if name != "$ref"}}
        return schema

    def body(self, path: str) -> Schema:
        """The schema of a path's request body."""
        content = self.document["paths"][path]["post"]["requestBody"]["content"]
        return self.resolve(content["application/json"]["schema"])

    def validator(self, schema: Schema) -> Any:
        """A validator of this part of the document."""
        return jsonschema_rs.Draft202012Validator({**schema, "components": self.document["components"]})

    def check(self, path: str, method: str, status: int, headers: dict[str, str], body: bytes) -> None:
        """Raises AssertionError unless the document tells of exactly such an answer; names of headers are small."""
        responses = self.document["paths"][path][method]["responses"]
        assert str(status) in responses, f"{method} {path} answers {status}, which is not told"
        response = self.resolve(responses[str(status)])
        for name, header in response.get("headers", {}).items():
            header = self.resolve(header)
            assert name.lower() in headers or not header.get("required"), f"{method} {path} {status} lacks {name}"
            if "pattern" in header["schema"] and name.lower() in headers:
                self._validate(header["schema"], headers[name.lower()])
        if method == "head" or "content" not in response:
            assert body == b"", f"{method} {path} {status} has a body, which is not told"
            return
        media_type = headers["content-type"].partition(";")[0]
        assert media_type in response["content"], f"{method} {path} {status} is {media_type}, which is not told"
        schema = response["content"][media_type]["schema"]
        if media_type == "text/event-stream":
            self._check_events(schema, body)
        elif media_type.endswith("json"):
            self._validate(schema, json.loads(body))
        else:
            self._validate(schema, body.decode())

    def _check_events(self, schema: Schema, body: bytes) -> None:
        """Each event of a stream, and the document in its data, which validators only look into when told to."""
        data = schema["properties"]["data"]
        *ends, document = data.get("anyOf", [data])
        texts = [line.removeprefix("data: ") for line in body.decode().splitlines() if line.startswith("data: ")]
        assert texts
        for text in texts:
            self._validate(schema, {"data": text})
            if {"const": text} not in ends:
                self._validate(document["contentSchema"], json.loads(text))
        assert not ends or {"const": texts[-1]} in ends or "error" in json.loads(texts[-1])

    def _validate(self, schema: Schema, value: Any) -> None:
        self.validator(schema).validate(value)
