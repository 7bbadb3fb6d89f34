"""Owns what may be counted on in an answer of the API: the client's types call every field of its optional."""

from typing import TypeVar

from scripts.bake.errors import CloudFailed

T = TypeVar("T")


def given(value: T | None) -> T:
    """A field that each answer has. Raises CloudFailed for one that lacks it."""
    if value is None:
        raise CloudFailed("an answer of the cloud lacks what all have", "is the endpoint an API of Hetzner Cloud?")
    return value
