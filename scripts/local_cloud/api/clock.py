"""Owns the time stamps of documents."""

from datetime import UTC, datetime


def render_now() -> str:
    """The present second in UTC, as the API writes it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
