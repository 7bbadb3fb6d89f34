"""Owns the way that Packer's calls take to the cloud: through this process, on loopback, by a key of the run's own.

So Packer never holds the token, cannot make anything once its bake is dead, and what its plugin leaves out is done
here: servers and SSH keys get the run's labels, what fails in passing is tried again, a snapshot is taken only when
the server is off, and the bake knows by its code, not by its text, why Packer failed.
"""

import hmac
import json
import logging
import re
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import quote

import requests

from scripts.bake.cloud import LOCKED_PATIENCE_S, NO_ROOM, PASSING, Access, pauses

_log = logging.getLogger(__name__)
_TIMEOUT_S = (10.0, 60.0)
_PATIENCE_S = 300.0
_OFF_PATIENCE_S = 120.0
_LARGEST_BODY = 1 << 20  # of a call; user-data has 32 KiB at most
_LABELLED = ("/servers", "/ssh_keys")
_CREATE_IMAGE = re.compile(r"/servers/(\d+)/actions/create_image")
_PLACING = ("create_server", "start_server")  # the actions for which another place may have room
_UNSURE = {"server_error", "bad_gateway", "timeout"}  # what was asked for may have been done all the same
_HANDED_BACK = ("Content-Type", "X-Correlation-Id", "RateLimit-Limit", "RateLimit-Remaining", "RateLimit-Reset", "Link")


@dataclass(frozen=True)
class CallFailed:
    """An answer that Packer got and that was no success; ``lost`` if the call may have done something all the same."""

    call: str
    code: str
    message: str
    correlation_id: str
    lost: bool = False

    @property
    def passes(self) -> bool:
        """Whether the same may go well at another time."""
        return self.lost or self.code in PASSING


class _Listener(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Such as an answer that nobody waits for any more; it belongs into the log, not onto the terminal."""
        _log.info("packer: a call ended early", exc_info=True)


class Relay:
    """Takes calls as long as it is open; ``failures`` are those of Packer's that went wrong, in their order."""

    def __init__(self, access: Access, labels: dict[str, str], patience_s: float = _PATIENCE_S):
        self._access, self._labels, self._patience_s = access, labels, patience_s
        self.token = secrets.token_hex(32)  # Hetzner's have 64 characters too
        self.failures: list[CallFailed] = []
        self._local = threading.local()
        self._closed = threading.Event()
        self._calls, self._fewer = 0, threading.Condition()
        self._server = _Listener(("127.0.0.1", 0), self._handler())

    @property
    def endpoint(self) -> str:
        """What Packer is told."""
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    @contextmanager
    def opened(self) -> Iterator["Relay"]:
        """Serves meanwhile. Afterwards no call is under way: what is removed then stays removed."""
        thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._closed.set()
            self._server.shutdown()
            self._server.server_close()
            with self._fewer:
                self._fewer.wait_for(lambda: self._calls == 0, sum(_TIMEOUT_S))

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        relay = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _answer(self) -> None:
                told, length = self.headers.get("Authorization", ""), self.headers.get("Content-Length") or "0"
                known = hmac.compare_digest(told.encode(), f"Bearer {relay.token}".encode())
                if not known or not length.isdecimal() or int(length) > _LARGEST_BODY:
                    self.close_connection = True  # nothing is read of who may not ask, or says too much
                    return self._send(401, {}, b'{"error":{"code":"unauthorized","message":"not for you"}}')
                body = self.rfile.read(int(length))
                status, headers, content = relay.forward(self.command, self.path.removeprefix("/v1"), body)
                return self._send(status, headers, content)

            do_GET = do_POST = do_PUT = do_DELETE = _answer  # noqa: N815 - the names that http.server looks for

            def _send(self, status: int, headers: dict[str, str], content: bytes) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *words: object) -> None:
                """What was called is logged where it is forwarded."""

        return Handler

    def forward(self, method: str, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of the cloud's answer, or of the one that says that there is none."""
        with self._fewer:
            self._calls += 1
        try:
            return self._forward(method, path, body)
        finally:
            with self._fewer:
                self._calls -= 1
                self._fewer.notify_all()

    def _forward(self, method: str, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        call = f"{method} {path}"
        if method == "POST":
            body = self._label(path, body)
            if (match := _CREATE_IMAGE.fullmatch(path)) and not self._wait_until_off(match[1]):
                what = f"server {match[1]} did not go down within {_OFF_PATIENCE_S:.0f} s"
                return self._give_up(CallFailed(call, "timeout", what, ""))
        begin_s, unsure = time.monotonic(), False
        end_s = begin_s + self._patience_s
        for pause_s in pauses():
            if self._closed.is_set():
                return self._give_up(CallFailed(call, "unavailable", "the bake waits for no answer any more", ""))
            try:
                answer = self._send(method, path, body)
            except requests.RequestException as error:
                # A call that made something may have done so: the bake looks for it.
                lost = method == "POST" and not isinstance(error, requests.ConnectTimeout) and "/shutdown" not in path
                if lost or time.monotonic() > end_s:
                    return self._give_up(
                        CallFailed(call, "unavailable", f"no answer ({type(error).__name__})", "", lost)
                    )
                _log.info("packer: %s: %s; tried again", call, type(error).__name__)
                self._closed.wait(pause_s)
                continue
            headers = {name: answer.headers[name] for name in _HANDED_BACK if name in answer.headers}
            _log.info("packer: %s: %d %s", call, answer.status_code, headers.get("X-Correlation-Id", ""))
            if answer.ok:
                self._note_failed_actions(call, answer)
                return answer.status_code, headers, answer.content
            failed = _read_failure(call, answer)
            if failed.code == "uniqueness_error" and unsure:
                # Made by a try before, whose answer said otherwise.
                return self._give_up(replace(failed, lost=True))
            if method == "POST" and failed.code in _UNSURE:
                unsure = True
                if _CREATE_IMAGE.fullmatch(path) and self._is_made(body):
                    return self._give_up(replace(failed, lost=True))  # a snapshot has no name that keeps it from a twin
            given_s = begin_s + LOCKED_PATIENCE_S if failed.code == "locked" else end_s
            if not failed.passes or time.monotonic() > given_s:
                if answer.status_code != 404 or method != "GET":
                    self.failures.append(failed)
                return answer.status_code, headers, answer.content
            self._closed.wait(pause_s)
        raise AssertionError("pauses never end")

    def _note_failed_actions(self, call: str, answer: requests.Response) -> None:
        """An action that ended in an error is told in an answer that went well."""
        if "/actions" not in call or not answer.content:
            return
        document = answer.json()
        for action in [*document.get("actions", []), *([document["action"]] if document.get("action") else [])]:
            if action.get("status") == "error":
                told = action.get("error") or {}
                what = f"{action.get('command')}: {told.get('message')} ({told.get('code')})"
                elsewhere = told.get("code") in NO_ROOM and action.get("command") in _PLACING
                code = told["code"] if elsewhere else "action_failed"
                self.failures.append(
                    CallFailed(call, code, what, answer.headers.get("X-Correlation-Id", ""), lost=True)
                )

    def _send(self, method: str, path: str, body: bytes) -> requests.Response:
        headers = {"Authorization": f"Bearer {self._access.token}", "Content-Type": "application/json"}
        session = getattr(self._local, "session", None)
        if session is None:
            session = self._local.session = requests.Session()
        return session.request(
            method, self._access.endpoint + path, data=body or None, headers=headers, timeout=_TIMEOUT_S
        )

    def _label(self, path: str, body: bytes) -> bytes:
        if path not in _LABELLED:
            return body
        try:
            document = json.loads(body)
        except ValueError:
            return body  # the cloud will say what is wrong with it
        return json.dumps({**document, "labels": {**(document.get("labels") or {}), **self._labels}}).encode()

    def _is_made(self, body: bytes) -> bool:
        """Whether the snapshot of this run and layer is there, or being made."""
        labels = json.loads(body).get("labels") or {}
        told = ",".join(f"{name}={labels.get(name, '')}" for name in ("run", "layer"))
        status, _, content = self.forward("GET", f"/images?type=snapshot&label_selector={quote(told)}", b"")
        return status == 200 and bool(json.loads(content)["images"])

    def _wait_until_off(self, server: str) -> bool:
        """Shutdown's success says only that the button was pressed; a disk that is copied meanwhile may be torn."""
        end_s = time.monotonic() + _OFF_PATIENCE_S
        while time.monotonic() < end_s and not self._closed.is_set():
            status, _, content = self.forward("GET", f"/servers/{server}", b"")
            if status != 200 or json.loads(content)["server"]["status"] == "off":
                return True  # what is amiss, the call itself will tell
            time.sleep(0.2)
        return False

    def _give_up(self, failed: CallFailed) -> tuple[int, dict[str, str], bytes]:
        self.failures.append(failed)
        # Of another code the plugin might try the call again by itself.
        document: dict[str, Any] = {"error": {"code": "unavailable", "message": failed.message, "details": None}}
        return 503, {"Content-Type": "application/json"}, json.dumps(document).encode()


def _read_failure(call: str, answer: requests.Response) -> CallFailed:
    correlation = answer.headers.get("X-Correlation-Id", "")
    try:
        error = answer.json()["error"]
        return CallFailed(call, str(error["code"]), str(error["message"]), correlation)
    except (ValueError, KeyError, TypeError):  # a proxy on the way
        code = {502: "bad_gateway", 504: "timeout"}.get(answer.status_code, "unavailable")
        return CallFailed(
            call, code if answer.status_code >= 500 else str(answer.status_code), answer.reason, correlation
        )
