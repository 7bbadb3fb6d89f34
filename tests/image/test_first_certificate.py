"""What answers at port 80 while the first certificate is ordered."""

import socket
import time

import pytest
import requests

from tests.image.scripts import load_script
from tests.ports import free_port

first_certificate = load_script("rootfs/usr/lib/mini-llm/first_certificate.py")


def test_the_authority_gets_its_answer_and_strangers_hold_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over both families, beside connections that say nothing; the port is free again at once; DNS is left alone."""
    monkeypatch.setattr(socket, "getfqdn", lambda *_: pytest.fail("DNS was asked for this machine's name"))
    port = free_port()
    for _ in range(2):
        with first_certificate.answering("/.well-known/acme-challenge/t", "t.print", port):
            silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(8)]
            for host in ("127.0.0.1", "[::1]"):
                got = requests.get(f"http://{host}:{port}/.well-known/acme-challenge/t", timeout=5)
                assert (got.status_code, got.text) == (200, "t.print")
                assert "Server" not in got.headers
                assert requests.get(f"http://{host}:{port}/health", timeout=5).status_code == 503
            begun_s = time.monotonic()
        assert time.monotonic() - begun_s < 2
        for each in silent:
            each.close()
    with pytest.raises(requests.ConnectionError):
        requests.get(f"http://127.0.0.1:{port}/", timeout=5)
