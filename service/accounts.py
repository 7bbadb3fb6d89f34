"""Owns what is written of each request when its last byte is out: log line, metrics, audit; never prompt nor answer."""

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TextIO

from service.access import Caller
from service.audit import AuditLog
from service.errors import AuditUnwritable
from service.json_text import render_time, to_json
from service.metrics import Metrics

# Keys of the WSGI environment by which the application tells what it knows of its request.
REQUEST_ID = "llm.request_id"
ENDPOINT = "llm.endpoint"
FACTS = "llm.facts"
ADDRESS = "llm.address"
SCOPE = "llm.scope"  # of guarded paths only
CALLER = "llm.caller"  # once the key is known
ADMITTED = "llm.admitted"  # once the audit log says so

_KNOWN_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
_CLIENT_CLOSED = 499  # nginx's name for a request whose client left before the answer


class Log:
    """JSON lines on a stream; one line is written at once."""

    def __init__(self, stream: TextIO | None = None):
        self._stream = stream or sys.stdout
        self._lock = threading.Lock()

    def write(self, event: str, **facts: Any) -> None:
        line = to_json({"time": render_time(time.time()), "event": event, **facts}).decode()
        try:
            with self._lock:
                self._stream.write(line + "\n")
                self._stream.flush()
        except OSError:
            pass  # a full disk may cost the line, not the answer

    def write_failure(self, request_id: str, error: BaseException) -> None:
        """A failure that the client only knows by its id: type and place of the error and of its causes.

        Messages of unknown errors stay out, because they may quote a prompt.
        """
        chain: BaseException | None = error
        places: list[str] = []
        while chain is not None:
            last = traceback.extract_tb(chain.__traceback__)[-1:]
            place = f"{last[0].filename}:{last[0].lineno}" if last else "?"
            known = type(chain).__module__ == "service.errors"
            places.append(f"{type(chain).__name__} at {place}" + (f": {chain}" if known else ""))
            chain = chain.__cause__
        self.write("failure", id=request_id, error=" <- ".join(places))


class Accounts:
    """WSGI middleware around the application; gives each request its id."""

    def __init__(self, application: Callable[..., Iterable[bytes]], metrics: Metrics, audit: AuditLog, log: Log):
        self._application, self._metrics, self._audit, self._log = application, metrics, audit, log

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        entry = _Entry(self._metrics, self._audit, self._log, environ)

        def start(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
            entry.status = int(status[:3])
            return start_response(status, [*headers, ("X-Request-Id", environ[REQUEST_ID])], exc_info)

        return _Body(self._application(environ, start), entry)


class _Entry:
    def __init__(self, metrics: Metrics, audit: AuditLog, log: Log, environ: dict[str, Any]):
        self._metrics, self._audit, self._log, self._environ = metrics, audit, log, environ
        self._started_s = time.monotonic()
        self.status = 500
        environ[REQUEST_ID] = os.urandom(16).hex()
        environ[FACTS] = {}

    def write(self) -> None:
        duration_s = time.monotonic() - self._started_s
        method = self._environ["REQUEST_METHOD"]
        # A label has few values, whatever clients send.
        method = method if method in _KNOWN_METHODS else "OTHER"
        endpoint = self._environ.get(ENDPOINT, "none")
        facts = self._environ[FACTS]
        status = _CLIENT_CLOSED if facts.get("client_left") else self.status
        self._metrics.requests.labels(method, endpoint, str(status)).inc()
        self._metrics.request_duration.labels(endpoint).observe(duration_s)
        if SCOPE in self._environ:
            self._write_audit(status, facts)
        caller: Caller | None = self._environ.get(CALLER)
        self._log.write(
            "request",
            id=self._environ[REQUEST_ID],
            client=self._environ.get(ADDRESS),
            **({} if caller is None else {"key": caller.name}),
            method=method,
            endpoint=endpoint,
            status=status,
            duration_ms=round(duration_s * 1000, 2),
            **facts,
        )

    def _write_audit(self, status: int, facts: dict[str, Any]) -> None:
        about = audit_facts(self._environ)
        try:
            if self._environ.get(ADMITTED):
                known = (facts.get(name) for name in ("error", "cancelled_by", "finish_reason", "problem"))
                outcome = next(filter(None, known), "failed")
                tokens = facts.get("completion_tokens", 0)
                ended = {"status": status, "outcome": outcome, "completion_tokens": tokens}
                if not self._audit.note("ended", **about, **ended):
                    self._log.write("audit-late", id=about["id"])
            elif status >= 400:
                self._audit.refuse(**about, status=status, reason=facts.get("problem", "failed"))
        except AuditUnwritable as error:
            self._log.write_failure(self._environ[REQUEST_ID], error)


def audit_facts(environ: dict[str, Any]) -> dict[str, Any]:
    """Who a request is from and what it is, as the audit log tells it; what is not known is None."""
    caller: Caller | None = environ.get(CALLER)
    return {
        "id": environ[REQUEST_ID],
        "key": None if caller is None else caller.name,
        "address": environ.get(ADDRESS),
        "endpoint": environ.get(ENDPOINT),
    }


class _Body:
    """The response's body; closed by the server whatever happens, and that is when the entry is written."""

    def __init__(self, body: Iterable[bytes], entry: _Entry):
        self._body, self._entry = body, entry

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._body)

    def close(self) -> None:
        try:
            close = getattr(self._body, "close", None)
            if close is not None:
                close()
        finally:
            self._entry.write()
