"""Owns the node's report: what it is and how it is, as JSON, for who may see its monitoring. Nobody needs SSH for that.

``python3 report.py`` answers one HTTP request that comes on standard input, which systemd makes the connection's
socket.
"""

import json
import os
import socket
import subprocess
import sys
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

_SHARE, _NODE = Path("/usr/share/mini-llm"), Path("/var/lib/mini-llm-node")
_LAST_LINES = 40
_LONGEST_LINE = 2000
_PATIENCE_S = 1.0  # each; the unit has fifteen seconds for all of them
# Whose last lines are told, by what journalctl looks for.
_LOGS = {
    "facts": ["-u", "mini-llm-facts"],
    "service": ["-u", "mini-llm"],
    "stack": ["-u", "mini-llm-stack", "-u", "mini-llm-monitoring", "-u", "mini-llm-mend"],
    "certificate": ["-u", "mini-llm-first-certificate", "-u", "mini-llm-certificate"],
    **{
        name: [f"CONTAINER_NAME=mini-llm-{name}-1"]
        for name in ("traefik", "prometheus", "alertmanager", "node-exporter", "grafana")
    },
}


def make_report() -> dict[str, Any]:
    """The report's parts; what cannot be had is null."""
    return {
        "image": _read_json(_SHARE / "image.json"),
        "audit": _read_json(_NODE / "image_audit.json"),
        "boot": _read_boot(Path("/run/mini-llm-boot")),
        "versions": {
            "kernel": os.uname().release,
            "containers": _read_json(_SHARE / "containers.json"),
            "packages": _read_packages(_SHARE / "packages.txt"),
            "python": _read_packages(_SHARE / "python.txt"),
        },
        "sizes_bytes": _read_json(_SHARE / "sizes.json"),
        "failed_units": [line.partition(" ")[0] for line in _run("systemctl", "--failed", "--plain", "--no-legend")],
        "logs": {
            name: _run("journalctl", "-b", "-o", "short-iso", "-n", str(_LAST_LINES), "--no-pager", "-q", *words)
            for name, words in _LOGS.items()
        },
    }


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _read_boot(folder: Path) -> dict[str, float]:
    times_s = {path.name: float(path.read_text()) for path in folder.iterdir() if not path.suffix}
    begin_s = times_s.pop("begin", 0.0)
    return {f"{name}_s": round(at_s - begin_s, 2) for name, at_s in sorted(times_s.items(), key=lambda item: item[1])}


def _read_packages(path: Path) -> dict[str, str] | None:
    try:
        return dict(line.split(" ", 1) for line in path.read_text().splitlines())
    except (OSError, ValueError):
        return None


def _run(*command: str) -> list[str]:
    """The lines that a command prints, or why there are none."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_PATIENCE_S)
    except subprocess.TimeoutExpired:
        return [f"{command[0]} did not answer within {_PATIENCE_S:.0f} s"]
    return [line[:_LONGEST_LINE] for line in (done.stdout or done.stderr).splitlines()]


class _Handler(BaseHTTPRequestHandler):
    timeout = 5  # for the request's lines

    def do_GET(self) -> None:
        body = json.dumps(make_report(), indent=1).encode()
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815 - http.server's name

    def log_message(self, *words: object) -> None:
        """Traefik's log has it."""


if __name__ == "__main__":
    with socket.socket(fileno=os.dup(sys.stdin.fileno())) as connection:
        _Handler(connection, ("127.0.0.1", 0), None)  # type: ignore[arg-type]  # it has no server: systemd took the connection
