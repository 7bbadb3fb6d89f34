"""Unit tests are isolated: no network, no subprocess, no environment of the person who runs them."""

import os
import socket
import subprocess
from collections.abc import Iterator

import pytest


class OutsideBlocked(BaseException):
    """A unit test reached for the world outside; not an Exception, so that no code under test swallows it."""


@pytest.fixture
def kept_environment() -> Iterator[None]:
    """What a test leaves in the environment, programs of later tests would inherit: that is a failure."""
    before = dict(os.environ)
    yield
    after = dict(os.environ)
    os.environ.clear()
    os.environ.update(before)
    changed = sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
    assert [name for name in changed if name != "PYTEST_CURRENT_TEST"] == [], "the environment was left changed"


@pytest.fixture(autouse=True)
def no_outside(kept_environment: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks connections, listening and new processes, and hides the service's variables."""

    def blocked(*args: object, **kwargs: object) -> None:
        raise OutsideBlocked("a unit test may not use the network or start processes")

    monkeypatch.setattr(socket.socket, "connect", blocked)
    monkeypatch.setattr(socket.socket, "bind", blocked)
    monkeypatch.setattr(socket, "getaddrinfo", blocked)
    monkeypatch.setattr(subprocess, "Popen", blocked)
    monkeypatch.setattr(os, "system", blocked)
    monkeypatch.setattr(os, "posix_spawn", blocked)
    for variable in [name for name in os.environ if name.startswith("LLM_")]:
        monkeypatch.delenv(variable)
