"""Owns how documents and times become text: answers, events of streams, lines of the logs."""

import json
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

import orjson


def to_json(document: Any) -> bytes:
    """JSON in UTF-8, without spaces; what JSON does not know becomes its ``str``."""
    try:
        return orjson.dumps(document, default=str)
    except TypeError:
        # Lone surrogates, as in the names of files that are not UTF-8, and whole numbers of more than 64 bits.
        return json.dumps(document, separators=(",", ":"), default=str).encode()


def render_time(time_s: float) -> str:
    """Seconds since the epoch as the logs tell them: UTC, with milliseconds."""
    second = int(time_s)
    return f"{_render_second(second)}.{int((time_s - second) * 1000):03}Z"


@lru_cache(maxsize=1)
def _render_second(second: int) -> str:
    return datetime.fromtimestamp(second, UTC).isoformat()[:19]
