"""The load counts whatever keeps a client from its answer: one that dies must not look like one that is content."""

import ssl
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.image import load as load_module
from tests.image.load import Load, Way, _read_curl

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


def test_a_slow_connection_is_told_with_its_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of curl and of httpx: what TCP took of it; one that was there already is none."""

    def send(client: Any, extensions: dict[str, Any]) -> int:
        for step in ("connect_tcp.started", "connect_tcp.complete", "start_tls.complete"):
            extensions["trace"](f"connection.{step}", None)
        return 0

    load = Load("llm.test", "key", Path("root.pem"))
    client: Any = None
    load._ask(client, "look", WAY, send)
    [quick] = load.seen
    assert quick.connect_s is not None
    assert quick.tcp_s is not None
    assert 0 <= quick.tcp_s <= quick.connect_s < 1
    for line in ("200 2 1 0.020 3.150 3.200 0", "200 2 0 0.000 0.000 3.100 0"):
        load.seen.append(_read_curl("look", WAY, 12.0, line, tmp_path / "unread"))
    load.print_slow(2.0)
    [told] = capsys.readouterr().out.splitlines()
    assert told.startswith("10.00 s: look ")
    assert told.endswith("TCP 0.02 s, with TLS 3.15 s, in all 3.20 s")
