"""Owns labels: what may be one, and the selectors that choose by them."""

import re
from collections.abc import Callable, Mapping

Selector = Callable[[Mapping[str, str]], bool]

_RESERVED_PREFIX = "hetzner.cloud"
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
_PREFIX_PART = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
_TERM = re.compile(r"\s*(?P<key>[^\s=!(),]+)\s*(?:(?P<operator>==|=|!=)\s*(?P<value>[^\s=!(),]*)\s*)?")
_SET_TERM = re.compile(r"\s*(?P<key>[^\s=!(),]+)\s+(?P<operator>in|notin)\s*\((?P<values>[^()]*)\)\s*")
_ABSENT_TERM = re.compile(r"\s*!\s*(?P<key>[^\s=!(),]+)\s*")


class SelectorInvalid(Exception):
    """The selector cannot be read; the message says which part."""


def _describe_key(key: str) -> str | None:
    prefix, slash, name = key.rpartition("/")
    if not _NAME.fullmatch(name):
        return f"label key {key!r} is invalid: at most 63 of A-Z a-z 0-9 - _ . with a letter or digit at both ends"
    if slash:
        parts = prefix.split(".")
        if len(prefix) > 253 or not all(_PREFIX_PART.fullmatch(part) for part in parts):
            return f"label key {key!r} is invalid: its prefix is no DNS name of at most 253 characters"
        if prefix == _RESERVED_PREFIX:
            return f"label key {key!r} is invalid: the prefix {_RESERVED_PREFIX}/ is reserved"
    return None


def _describe_value(value: object) -> str | None:
    if not isinstance(value, str):
        return "label values must be strings"
    if value and not _NAME.fullmatch(value):
        return f"label value {value!r} is invalid: at most 63 of A-Z a-z 0-9 - _ . with a letter or digit at both ends"
    return None


def find_problems(labels: Mapping[str, object]) -> list[str]:
    """What is wrong with these labels, one line each; empty if they are good."""
    found = [problem for key in labels if (problem := _describe_key(key))]
    return found + [problem for value in labels.values() if (problem := _describe_value(value))]


def _split(selector: str) -> list[str]:
    """The parts between the commas that stand outside of parentheses."""
    parts, depth, start = [], 0, 0
    for position, character in enumerate(selector):
        if character == "(":
            depth += 1
        elif character == ")":
            depth -= 1
        elif character == "," and depth == 0:
            parts.append(selector[start:position])
            start = position + 1
    return [*parts, selector[start:]]


def _parse_term(term: str) -> Selector:
    if match := _ABSENT_TERM.fullmatch(term):
        key = match["key"]
        return lambda labels: key not in labels
    if match := _SET_TERM.fullmatch(term):
        key, values = match["key"], {value.strip() for value in match["values"].split(",")}
        if match["operator"] == "in":
            return lambda labels: labels.get(key) in values
        return lambda labels: labels.get(key) not in values
    if match := _TERM.fullmatch(term):
        key, operator, value = match["key"], match["operator"], match["value"]
        if operator is None:
            return lambda labels: key in labels
        if operator == "!=":
            return lambda labels: labels.get(key) != value
        return lambda labels: labels.get(key) == value
    raise SelectorInvalid(f"the label selector is invalid at {term.strip()!r}")


def parse_selector(selector: str) -> Selector:
    """A test for labels: all terms must hold; ``!=`` and ``notin`` hold too where the key is missing.

    An empty selector chooses everything; raises SelectorInvalid.
    """
    if not selector.strip():
        return lambda labels: True
    terms = [_parse_term(term) for term in _split(selector)]
    return lambda labels: all(term(labels) for term in terms)
