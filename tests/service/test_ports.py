"""The ports that tests listen at: the kernel may give a free one twice, and has done so."""

import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests import ports
from tests.ports import free_port


def test_nobody_is_given_another_ones_port() -> None:
    """Nor one of the kernel's, that an outgoing connection may take before it is used."""
    with ThreadPoolExecutor(8) as pool:
        given = list(pool.map(lambda _: free_port(), range(400)))
    assert len(set(given)) == len(given)
    assert max(given) < int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])


def test_a_port_that_somebody_listens_at_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On whatever address."""
    port = free_port()
    (tmp_path / "last").write_text(str(port - 1))
    monkeypatch.setattr(ports, "_LAST", tmp_path / "last")
    with socket.create_server(("127.0.0.2", port)):
        assert free_port() > port
