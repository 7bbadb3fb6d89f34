"""The load counts whatever keeps a client from its answer: one that dies must not look like one that is content."""

import ssl
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.image import load as load_module
from tests.image.load import Load, Way

WAY = Way("192.0.2.1", False, True)


def test_whatever_ends_a_request_is_a_failure() -> None:
    """Errors of no HTTP library, too."""

    def send(client: Any, extensions: dict[str, Any]) -> int:
        raise ssl.SSLError("handshake failure")

    load = Load("llm.test", "key", Path("root.pem"))
    client: Any = None
    load._ask(client, "stream", WAY, send)
    [failed] = load.failed()
    assert (failed.kind, failed.end[:8]) == ("stream", "SSLError")


def test_a_client_that_still_waits_at_the_end_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """It got no answer; and it is told of in the summary."""
    let_go = threading.Event()
    monkeypatch.setattr(load_module, "_TIMEOUT_S", 0.05)
    monkeypatch.setattr(Load, "_repeat", lambda *words: let_go.wait(10))
    load = Load("llm.test", "key", Path("root.pem"))
    with load.running(1, {"look": [(WAY, 0.1)]}):
        pass
    let_go.set()
    assert [one.end for one in load.failed()] == ["it still waits"]
    assert "client: 1 asked, 1 failed" in load.describe()
