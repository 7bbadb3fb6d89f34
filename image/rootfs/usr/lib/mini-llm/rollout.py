"""Owns what a rollout may ask of a new node: how far its takeover is, its last log lines, and that its key shall end.

``python3 rollout.py PROOF STATE REVOKED`` answers one HTTP request that comes on standard input, to who shows the key
whose SHA-256 stands in the file PROOF: ``GET /rollout``, with ``?logs=1`` log lines as well; ``DELETE /rollout`` puts
the key on the service's list of revoked ones, REVOKED.
"""

import hashlib
import hmac
import json
import os
import socket
import subprocess
import sys
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

_READ_LINES, _LAST_LINES, _LONGEST_LINE = 200, 12, 300
_A_REQUEST = ('"ClientAddr"', '"event":"request"')  # of whom there are too many
_PATIENCE_S = 2.0
_LOGS = {
    "facts": ["-u", "mini-llm-facts"],
    "takeover": ["-u", "mini-llm-takeover"],
    "service": ["-u", "mini-llm"],
    "stack": ["-u", "mini-llm-stack"],
    "traefik": ["CONTAINER_NAME=mini-llm-traefik-1"],
}


def is_proved(header: str | None, proof: str) -> bool:
    """Whether an Authorization header shows the key of this hash."""
    scheme, _, key = (header or "").partition(" ")
    given = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).hexdigest()
    return hmac.compare_digest(given, proof) and scheme.lower() == "bearer"


def read_logs() -> dict[str, list[str]]:
    """The last lines of who may be the reason that a node does not serve."""
    told = {}
    for name, words in _LOGS.items():
        command = ["journalctl", "-b", "-o", "cat", "-n", str(_READ_LINES), "--no-pager", "-q", *words]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_PATIENCE_S)
        except subprocess.TimeoutExpired:
            told[name] = ["journalctl did not answer"]
            continue
        lines = (done.stdout or done.stderr).splitlines()
        telling = [line for line in lines if not any(one in line for one in _A_REQUEST)]
        told[name] = [line[:_LONGEST_LINE] for line in telling[-_LAST_LINES:]]
    return told


def revoke(path: Path, digest: str) -> None:
    """Adds a hash to the list of revoked keys; raises OSError."""
    known = set(path.read_text().split()) if path.exists() else set()
    unfinished = path.with_name("revoked.unfinished")
    with os.fdopen(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600), "w") as file:
        file.write("".join(f"{each}\n" for each in sorted(known | {digest})))
    unfinished.replace(path)


class _Handler(BaseHTTPRequestHandler):
    timeout = 5  # for the request's lines

    def __init__(self, connection: socket.socket, proof: Path, state: Path, revoked: Path):
        self._proof, self._state, self._revoked = proof.read_text().strip(), state, revoked
        super().__init__(connection, ("127.0.0.1", 0), None)  # type: ignore[arg-type]  # it has no server: systemd took the connection

    def do_GET(self) -> None:
        if self._may():
            told: dict[str, Any] = json.loads(self._state.read_text()) if self._state.exists() else {"state": "none"}
            told["key_is_void"] = self._revoked.exists() and self._proof in self._revoked.read_text()
            if self.path.endswith("?logs=1"):
                told["logs"] = read_logs()
            self._tell(HTTPStatus.OK, told)

    def do_DELETE(self) -> None:
        if self._may():
            revoke(self._revoked, self._proof)
            self._tell(HTTPStatus.OK, {})

    def _may(self) -> bool:
        if is_proved(self.headers.get("Authorization"), self._proof):
            return True
        self._tell(HTTPStatus.UNAUTHORIZED, {})
        return False

    def _tell(self, status: HTTPStatus, document: dict[str, Any]) -> None:
        body = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words: object) -> None:
        """Traefik's log has it."""


if __name__ == "__main__":
    with socket.socket(fileno=os.dup(sys.stdin.fileno())) as own:
        _Handler(own, *map(Path, sys.argv[1:]))
