"""How documents and times become text."""

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from service.json_text import render_time, to_json


@pytest.mark.parametrize(
    "document",
    [{"text": "ü €\n\u2028"}, {"name": "not UTF-8: \udcff"}, {"number": 2**70}, {"nested": [1, None, True, 0.5]}],
)
def test_json_says_what_was_given(document: dict[str, object]) -> None:
    """Also lone surrogates and numbers beyond 64 bits, which the fast encoder refuses."""
    assert json.loads(to_json(document)) == document


def test_unknown_types_become_their_text() -> None:
    """A path in a log line is no reason to lose the line."""
    assert to_json({"path": Path("/srv")}) == b'{"path":"/srv"}'


@pytest.mark.parametrize("time_s", [0.0, 1764080000.9996, 1764080001.0, 1764080000.0004])
def test_times(time_s: float) -> None:
    """UTC with milliseconds, cut and not rounded: no line is later than the one after it."""
    seen = datetime.fromisoformat(render_time(time_s))
    assert seen.tzinfo == UTC
    assert 0 <= time_s - seen.timestamp() < 0.001 + 1e-6
    assert len(render_time(time_s)) == 24
