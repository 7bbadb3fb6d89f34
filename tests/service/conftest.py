"""Integration tests run the real parts; those that only ask share one service a module."""

from collections.abc import Iterator

import pytest

from tests.service.harness import FAKE, Service, running_service


@pytest.fixture(scope="module")
def real() -> Iterator[Service]:
    """gunicorn, gpt4all and the starter model."""
    with running_service(record=False) as service:
        yield service


@pytest.fixture
def fake() -> Iterator[Service]:
    """gunicorn and an engine process with the fake engine, whose prompts are orders; one a test."""
    with running_service(engine_adapter=FAKE, queue_size=3) as service:
        yield service
