"""Owns the reading of request bodies: JSON objects, and fields with every problem collected before refusing."""

import json
import re
from collections.abc import Iterable
from typing import Any

import falcon

from scripts.local_cloud.api import labels as label_rules
from scripts.local_cloud.api.errors import InvalidInput, JsonInvalid

_BODY_LIMIT_BYTES = 1 << 20
_LARGEST_ID = 2**53 - 1
_LONGEST_SPAN_S = 86_400
_HOSTNAME_PART = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?")


def is_hostname(text: str) -> bool:
    """Whether a text is a host name as RFC 1123 has it."""
    return len(text) <= 253 and all(_HOSTNAME_PART.fullmatch(part) for part in text.split("."))


class Fields:
    """The fields of one body; readers return a default for what is missing or wrong, ``check`` refuses at the end."""

    def __init__(self, document: dict[str, Any]):
        self._document = document
        self._problems: dict[str, list[str]] = {}

    def blame(self, name: str, problem: str) -> None:
        """Notes what is wrong with a field."""
        self._problems.setdefault(name, []).append(problem)

    def check(self) -> None:
        """Raises InvalidInput if any field was wrong."""
        if self._problems:
            raise InvalidInput(self._problems)

    def allow_only(self, names: Iterable[str]) -> None:
        """Blames every field that is not one of these: for bodies of our own, where a typo would go unnoticed."""
        for unknown in sorted(self._document.keys() - set(names)):
            self.blame(unknown, "is not known here")

    def list_problems(self) -> list[str]:
        """What is wrong so far, one line each, beginning with the field."""
        return [f"{name} {problem}" for name, problems in self._problems.items() for problem in problems]

    def has(self, name: str) -> bool:
        """Whether the field was sent with a value; null counts as not sent."""
        return self._document.get(name) is not None

    def is_null(self, name: str) -> bool:
        """Whether the field was sent as null, which some requests tell apart from one that was not sent."""
        return name in self._document and self._document[name] is None

    def _read(self, name: str, kinds: type | tuple[type, ...], what: str, required: bool) -> Any:
        value = self._document.get(name)
        if value is None:
            if required:
                self.blame(name, "Missing data for required field.")
            return None
        if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
            self.blame(name, f"must be {what}")
            return None
        return value

    def text(self, name: str, required: bool = False) -> str | None:
        """A string of whole characters: JSON can hold halves of them, which nothing could write."""
        value: str | None = self._read(name, str, "a string", required)
        if value is not None and any("\ud800" <= character <= "\udfff" for character in value):
            self.blame(name, "must be valid Unicode")
            return None
        return value

    def name(self, name: str = "name", required: bool = False) -> str | None:
        """A string that is not empty."""
        value = self.text(name, required)
        if value is not None and not value.strip():
            self.blame(name, "must not be empty")
        return value

    def hostname(self, name: str = "name", required: bool = False) -> str | None:
        """A host name as RFC 1123 has it."""
        value = self.text(name, required)
        if value is not None and not is_hostname(value):
            self.blame(name, "must be a valid hostname (RFC 1123): letters, digits, periods and dashes")
        return value

    def one_of(self, name: str, allowed: Iterable[str], required: bool = False) -> str | None:
        """One of the strings in ``allowed``."""
        value, choices = self.text(name, required), list(allowed)
        if value is not None and value not in choices:
            self.blame(name, "must be one of: " + ", ".join(choices))
            return None
        return value

    def flag(self, name: str, default: bool | None = None, required: bool = False) -> bool | None:
        """True or false."""
        value = self._read(name, bool, "a boolean", required)
        return default if value is None else value

    def number(self, name: str, required: bool = False) -> int | None:
        """An id."""
        value: int | None = self._read(name, int, "an integer", required)
        if value is not None and not 0 < value <= _LARGEST_ID:
            self.blame(name, "must be an id")
            return None
        return value

    def integer(self, name: str, lowest: int, highest: int, required: bool = False) -> int | None:
        """A whole number from ``lowest`` to ``highest``."""
        value: int | None = self._read(name, int, "an integer", required)
        if value is not None and not lowest <= value <= highest:
            self.blame(name, f"must be from {lowest} to {highest}")
            return None
        return value

    def seconds(self, name: str) -> float:
        """A span of time in seconds, 0 if none was sent."""
        value = self._read(name, (int, float), "a number of seconds", False) or 0.0
        if not 0 <= value <= _LONGEST_SPAN_S:
            self.blame(name, f"must be a number of seconds from 0 to {_LONGEST_SPAN_S}")
            return 0.0
        return float(value)

    def reference(self, name: str, required: bool = False) -> str | None:
        """An id or a name, as a string: clients send ids both as numbers and as strings."""
        value = self._read(name, (str, int), "an id or a name", required)
        return None if value is None else str(value)

    def references(self, name: str) -> list[str]:
        """A list of ids or names, as strings."""
        values = self._read(name, list, "a list", False) or []
        if not all(isinstance(value, str | int) and not isinstance(value, bool) for value in values):
            self.blame(name, "must be a list of ids or names")
            return []
        return [str(value) for value in values]

    def items(self, name: str) -> list[Any]:
        """A list of anything."""
        return self._read(name, list, "a list", False) or []

    def nested(self, name: str) -> "Fields":
        """The fields of an object; what is wrong in it is noted there."""
        return Fields(self._read(name, dict, "an object", False) or {})

    def labels(self, name: str = "labels") -> dict[str, str] | None:
        """Labels that keep the rules; None if none were sent."""
        value: dict[str, str] | None = self._read(name, dict, "an object", False)
        if value is None:
            return None
        for problem in label_rules.find_problems(value):
            self.blame(name, problem)
        return value


def read_object(req: falcon.Request) -> dict[str, Any]:
    """The body, an empty object if there is none; raises JsonInvalid."""
    if req.get_header("Transfer-Encoding"):
        raise JsonInvalid("send the body with a Content-Length: this server does not read it in chunks")
    raw = req.bounded_stream.read(_BODY_LIMIT_BYTES + 1)
    if len(raw) > _BODY_LIMIT_BYTES:
        raise InvalidInput({"body": [f"must be at most {_BODY_LIMIT_BYTES} bytes"]})
    if not raw.strip():
        return {}
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise JsonInvalid("the request body is not valid JSON") from error
    if not isinstance(document, dict):
        raise JsonInvalid("the request body must be a JSON object")
    return document


def read_fields(req: falcon.Request) -> Fields:
    """The fields of the body, none if it is empty; raises JsonInvalid."""
    return Fields(read_object(req))
