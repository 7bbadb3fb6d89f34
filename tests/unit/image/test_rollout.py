"""What a rollout may ask of a node, and with which key."""

import hashlib
import json
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.image.scripts import load_script

rollout = load_script("rootfs/usr/lib/mini-llm/rollout.py")
KEY = "mllm_proof"
PROOF = hashlib.sha256(KEY.encode()).hexdigest()


def ask(folder: Path, method: str, path: str = "/rollout", key: str = KEY) -> tuple[int, Any]:
    """Status and document of one request."""
    (folder / "proof").write_text(f"{PROOF}\n")
    ours, theirs = socket.socketpair()
    paths = [folder / name for name in ("proof", "state", "revoked")]
    serving = threading.Thread(target=rollout._Handler, args=(theirs, *paths))
    with ours, theirs:
        serving.start()
        ours.sendall(f"{method} {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n\r\n".encode())
        serving.join()
        theirs.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: ours.recv(65536), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


def test_it_tells_how_far_the_takeover_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And log lines only where they are asked for."""
    monkeypatch.setattr(rollout, "read_logs", lambda: {"facts": ["right"]})
    assert ask(tmp_path, "GET") == (200, {"state": "none", "key_is_void": False})
    (tmp_path / "state").write_text('{"state": "prepared"}')
    assert ask(tmp_path, "GET")[1] == {"state": "prepared", "key_is_void": False}
    assert ask(tmp_path, "GET", "/rollout?logs=1")[1]["logs"] == {"facts": ["right"]}


def test_its_key_ends_when_it_says_so(tmp_path: Path) -> None:
    """For the service; how far the takeover is can still be asked, for an apply that was killed in between."""
    (tmp_path / "revoked").write_text("b" * 64 + "\n")
    assert ask(tmp_path, "DELETE") == (200, {})
    assert (tmp_path / "revoked").read_text().split() == sorted([PROOF, "b" * 64])
    assert ask(tmp_path, "GET")[1]["key_is_void"]
    assert ask(tmp_path, "DELETE") == (200, {})
    assert (tmp_path / "revoked").read_text().split() == sorted([PROOF, "b" * 64])


@pytest.mark.parametrize("method", ["GET", "DELETE"])
@pytest.mark.parametrize("key", ["", "mllm_other", PROOF, "\xff\x00"])
def test_nobody_else_is_told(tmp_path: Path, method: str, key: str) -> None:
    """Not with the hash either, which stands in user-data."""
    assert ask(tmp_path, method, key=key) == (401, {})
    assert not (tmp_path / "revoked").exists()
