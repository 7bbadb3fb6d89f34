"""Stands in for a node where the bake is tested: answers over HTTPS what a bake asks, from the facts that a node gets.

``python3 stand_in_node.py serve`` serves, ``describe VERSION`` prints the description of the image. Plain Python and
PyYAML, which Debian's cloud-init brings. A file ``misbehave`` beside it holds words of `MISBEHAVIOURS`. The
monitoring's password is not compared with its hash: any is right that comes with the right user's name.
"""

import base64
import hashlib
import importlib.util
import json
import os
import ssl
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

MISBEHAVIOURS = (
    *("wrong_answers", "open_port", "audit_finding", "alert", "wrong_key_accepted", "never_ready"),
    *("metrics_routed", "unit_failed"),
)
_HERE = Path(__file__).parent
_FACTS = Path("/etc/mini-llm/facts.yaml")
_IMAGE = Path("/usr/share/mini-llm/image.json")
_AUDIT = Path("/var/lib/mini-llm-node/image_audit.json")
_BOOT = Path("/run/mini-llm-boot")
_KEPT = Path("/run/stand-in")
_REPORT = Path("/usr/lib/mini-llm/report.py")
_JOBS = ("service", "traefik", "node", "docker", "prometheus", "alertmanager")
_PATIENCE_S = 10.0


def _read_model() -> dict[str, Any]:
    return dict(json.loads((_HERE / "starter.json").read_text()))


def describe(version: str) -> dict[str, Any]:
    """What the real bake writes of an image."""
    model = {name: value for name, value in _read_model().items() if name != "golden"}
    return {"version": version, "baked": datetime.now(UTC).isoformat(timespec="seconds"), "model": model}


class Node:
    """What the facts, the image and the misbehaviour say."""

    def __init__(self) -> None:
        facts = yaml.safe_load(_FACTS.read_text())
        self.domain = str(facts["domain"])
        known = [*facts["api_keys"], *([facts["proof"]] if "proof" in facts else [])]
        self.keys = {key["sha256"]: key.get("scopes", ["generate"]) for key in known}
        for address in facts.get("addresses", {}).values():
            subprocess.run(["ip", "address", "replace", address, "dev", "lo"], check=True)
        self.monitoring = facts.get("monitoring")
        self.certificate = facts["certificate"]
        self.image, self.model = json.loads(_IMAGE.read_text()), _read_model()
        told = _HERE / "misbehave"
        self.misbehaviours = set(told.read_text().split()) if told.exists() else set()
        if unknown := self.misbehaviours - set(MISBEHAVIOURS):
            sys.exit(f"misbehave: {', '.join(sorted(unknown))}: there are {', '.join(MISBEHAVIOURS)}")
        spec = importlib.util.spec_from_file_location("report", _REPORT)
        assert spec is not None
        assert spec.loader is not None
        self.report = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.report)

    def is_key(self, header: str) -> bool:
        """Whether an Authorization header holds a key that may generate."""
        kind, _, key = header.partition(" ")
        scopes = self.keys.get(hashlib.sha256(key.strip().encode()).hexdigest(), [])
        known = "generate" in scopes or "wrong_key_accepted" in self.misbehaviours
        return kind == "Bearer" and bool(key.strip()) and known

    def is_operator(self, header: str) -> bool:
        """Whether an Authorization header names the user of the monitoring, with any password."""
        kind, _, told = header.partition(" ")
        try:
            user, _, password = base64.b64decode(told, validate=True).decode().partition(":")
        except ValueError:
            return False
        return kind == "Basic" and self.monitoring is not None and user == self.monitoring["user"] and bool(password)

    def answer_to(self, prompt: str) -> str:
        """The starter's known answer to its known prompt."""
        if "wrong_answers" in self.misbehaviours:
            return "Nobody knows."
        golden = self.model["golden"]
        return str(golden["response"]) if prompt == golden["prompt"] else "A stand-in has one answer."

    def version(self) -> dict[str, Any]:
        """As the service's ``/version``."""
        names = ("userspace", "facts", "service", "model", "first_token", "certificate")
        return {
            "service": "mini-llm",
            "version": "stand-in",
            "image": {name: self.image[name] for name in ("version", "baked")},
            "boot": {f"{name}_s": round(_noted_s(name) - _noted_s("begin"), 2) for name in names},
            "keys_required": True,
            "engine": {"name": "stand-in", "version": "1", "slots": 1, "threads": 1, "batch_tokens": 1},
            "model": {"name": self.model["name"], "sha256": self.model["sha256"]},
        }

    def monitored(self, path: str) -> Any:
        """What the monitoring tells at a path, None if there is no such path."""
        firing = "alert" in self.misbehaviours
        labels = {"alertname": "ServiceDown", "severity": "critical"}
        now = time.time()
        if path == "/prometheus/api/v1/targets":
            targets = [
                {"labels": {"job": job, "instance": f"127.0.0.1:{8000 + number}"}, "health": "up", "lastError": ""}
                for number, job in enumerate(_JOBS)
            ]
            return _success({"activeTargets": targets, "droppedTargets": []})
        if path == "/prometheus/api/v1/query":
            return _success({"resultType": "vector", "result": [{"metric": {}, "value": [now, "1"]}]})
        if path == "/prometheus/api/v1/alerts":
            alert = {"labels": labels, "annotations": {}, "state": "firing", "activeAt": _render_now(), "value": "1"}
            return _success({"alerts": [alert] if firing else []})
        if path == "/alertmanager/api/v2/alerts":
            alert = {"labels": labels, "annotations": {}, "status": {"state": "active"}, "startsAt": _render_now()}
            return [alert] if firing else []
        return self.report.make_report() if path == "/node" else None


def _success(data: Any) -> dict[str, Any]:
    return {"status": "success", "data": data}


def _render_now() -> str:
    return datetime.now(UTC).isoformat()


def _note(event: str, at_s: float | None = None) -> None:
    (_BOOT / event).write_text(f"{time.clock_gettime(time.CLOCK_BOOTTIME) if at_s is None else at_s}\n")


def _noted_s(event: str) -> float:
    return float((_BOOT / event).read_text())


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = _PATIENCE_S
    node: Node

    def do_GET(self) -> None:
        self._lead(b"")

    def do_POST(self) -> None:
        # Read in any case: what comes next on a kept connection is another request.
        self._lead(self.rfile.read(int(self.headers.get("Content-Length") or 0)))

    def _lead(self, body: bytes) -> None:
        host, path = (self.headers.get("Host") or "").partition(":")[0], urlsplit(self.path).path
        if host == f"monitoring.{self.node.domain}":
            self._monitoring(path)
        elif host == self.node.domain:
            self._service(path, body)
        else:
            self._say({"title": "Not Found"}, HTTPStatus.NOT_FOUND)

    def _monitoring(self, path: str) -> None:
        if not self.node.is_operator(self.headers.get("Authorization") or ""):
            self._say({"title": "Unauthorized"}, HTTPStatus.UNAUTHORIZED, **{"WWW-Authenticate": "Basic"})
            return
        document = self.node.monitored(path)
        if document is None:
            self._say({"title": "Not Found"}, HTTPStatus.NOT_FOUND)
        else:
            self._say(document)

    def _service(self, path: str, body: bytes) -> None:
        where = (self.command, path)
        if where == ("GET", "/health"):
            self._say({"status": "alive"})
        elif where == ("GET", "/ready"):
            self._ready()
        elif where == ("GET", "/version"):
            self._say(self.node.version())
        elif where == ("GET", "/rollout"):
            self._say({"state": "none"})  # it takes nothing over
        elif where == ("GET", "/metrics") and "metrics_routed" in self.node.misbehaviours:
            self._say({})
        elif where != ("POST", "/generate"):
            self._say({"title": "Not Found"}, HTTPStatus.NOT_FOUND)
        elif not self.node.is_key(self.headers.get("Authorization") or ""):
            self._say({"title": "Unauthorized"}, HTTPStatus.UNAUTHORIZED, **{"WWW-Authenticate": "Bearer"})
        else:
            self._generate(json.loads(body))

    def _ready(self) -> None:
        document: dict[str, Any] = {"status": "ready", "running": 0, "waiting": 0, "predicted_wait_s": 0.0}
        document["tokens_per_second"] = 100.0
        if "never_ready" in self.node.misbehaviours:
            document |= {"status": "loading", "reason": "the model is being loaded"}
            self._say(document, HTTPStatus.SERVICE_UNAVAILABLE, **{"Retry-After": "1"})
        else:
            self._say(document)

    def _generate(self, request: dict[str, Any]) -> None:
        text, name = self.node.answer_to(str(request["prompt"])), os.urandom(8).hex()
        tokens = {"prompt_tokens": 8, "completion_tokens": 8, "total_tokens": 16}
        times = {"queue_ms": 0.0, "prefill_ms": 1.0, "decode_ms": 8.0, "total_ms": 9.0, "tokens_per_second": 1000.0}
        more = {"finish_reason": "stop", "usage": tokens, "timings": times}
        if not request.get("stream"):
            self._say({"id": name, "model": self.node.model["name"], "response": text, **more})
            return
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Connection", "close")
        self.end_headers()
        pieces = [f" {word}" if number else word for number, word in enumerate(text.split(" "))]
        events = [{"id": name, "response": piece} for piece in pieces]
        last = {"id": name, "model": self.node.model["name"], "done": True, "response": "", **more}
        for event in (*events, last):
            self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
        self.close_connection = True

    def _say(self, document: Any, status: HTTPStatus = HTTPStatus.OK, **headers: str) -> None:
        body = json.dumps(document).encode()
        self.send_response(status)
        kind = "application/json" if status == HTTPStatus.OK else "application/problem+json"
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words: object) -> None:
        """Nobody reads it."""


class _Redirect(_Handler):
    def _lead(self, body: bytes) -> None:
        self._say({}, HTTPStatus.PERMANENT_REDIRECT, Location=f"https://{self.headers.get('Host')}{self.path}")


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Whoever leaves in the middle, or only looks whether the port is open, is no error."""


class _SecureServer(_Server):
    context: ssl.SSLContext

    def finish_request(self, request: Any, client_address: Any) -> None:
        """In the connection's own thread: who says nothing must not keep the others waiting."""
        request.settimeout(_PATIENCE_S)
        with self.context.wrap_socket(request, server_side=True) as secured:
            super().finish_request(secured, client_address)


def serve() -> None:
    """Serves until it is killed."""
    # Of a container's first process, whose kernel has run for longer.
    begun_s = int(Path("/proc/1/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    for event, at_s in (("begin", begun_s), ("userspace", begun_s), ("service", None)):
        _note(event, at_s)
    node = _Handler.node = Node()
    _note("facts")
    finding = "/etc/left-behind: a private key"
    _AUDIT.parent.mkdir(exist_ok=True)
    _AUDIT.write_text(json.dumps({"findings": [finding] if "audit_finding" in node.misbehaviours else []}))
    for name in ("chain", "key"):
        (_KEPT / name).write_text(node.certificate[name])
    _SecureServer.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _SecureServer.context.load_cert_chain(_KEPT / "chain", _KEPT / "key")
    _note("certificate")
    if "unit_failed" in node.misbehaviours:
        subprocess.run(["systemctl", "start", "stand-in-failure.service"], check=False)
    if "open_port" in node.misbehaviours:
        threading.Thread(target=_Server(("", 8080), _Redirect).serve_forever, daemon=True).start()
    threading.Thread(target=_Server(("", 80), _Redirect).serve_forever, daemon=True).start()
    secure = _SecureServer(("", 443), _Handler)
    _note("model")
    _note("first_token")
    secure.serve_forever()


if __name__ == "__main__":
    if sys.argv[1:] == ["serve"]:
        serve()
    else:
        _, word, told_version = sys.argv
        assert word == "describe", word
        print(json.dumps(describe(told_version), indent=1))
