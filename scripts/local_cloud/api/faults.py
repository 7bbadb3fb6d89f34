"""Owns the record of every call, and the faults that a plan makes them meet."""

import json
import logging
import os
import secrets
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any

from scripts.local_cloud.api.bodies import Fields

Document = dict[str, Any]

# Names in the WSGI environment.
CORRELATION_ID = "local_cloud.correlation_id"
SOCKET = "local_cloud.socket"
ERROR = "local_cloud.fault"

_log = logging.getLogger(__name__)
_CALLS_KEPT = 20_000
_CODES = {
    403: "resource_limit_exceeded",
    409: "conflict",
    412: "resource_unavailable",
    423: "locked",
    429: "rate_limit_exceeded",
    500: "server_error",
    502: "bad_gateway",
    503: "unavailable",
    504: "timeout",
}
_ACTION_KINDS = ("action_failed", "action_stuck", "action_lasts")
_KINDS = ("error", "reset", "lost_answer", "slow_answer", "power_lost", *_ACTION_KINDS)


class ConnectionDropped(ConnectionAbortedError):
    """The connection was reset on purpose; nothing can be answered any more."""


@dataclass(frozen=True)
class Fault:
    """One line of a plan: what happens to which calls.

    ``path`` is matched by segments, ``*`` standing for any one and a last ``**`` for any rest. ``call`` is the number
    of the one matching call that is struck, None for each; ``times`` at most how many are. ``kind`` is error (status,
    code, message), reset, lost_answer (done, but never heard), slow_answer (``seconds``), power_lost (the ``server``
    of that name loses its power before the call is looked at, though not while an action works on it), action_failed
    (code, message), action_stuck (until another plan comes) or action_lasts (``seconds``); the last three strike the
    ``command`` given, or else the first action that the call begins.
    """

    method: str
    path: str
    kind: str
    call: int | None
    times: int | None
    status: int
    code: str
    message: str
    seconds: float
    command: str | None
    server: str | None

    def fits(self, method: str, path: str) -> bool:
        """Whether a call is one that this fault counts."""
        if self.method not in ("*", method):
            return False
        wanted, given = self.path.strip("/").split("/"), path.strip("/").split("/")
        if wanted[-1] == "**":
            wanted, given = wanted[:-1], given[: len(wanted) - 1]
        return len(wanted) == len(given) and all(a in ("*", b) for a, b in zip(wanted, given, strict=True))


@dataclass(frozen=True)
class ActionFault:
    """A fault that an action meets; a stuck one goes on when ``released`` is set."""

    fault: Fault
    released: threading.Event


_struck: ContextVar[list[ActionFault]] = ContextVar("struck")


def take_action_fault(command: str) -> ActionFault | None:
    """The fault that the present call's plan has for an action of this command; each strikes one action only."""
    # Actions are begun deep inside responders: handing the plan down through all of them would tell each of faults.
    waiting = _struck.get([])
    for each in waiting:
        if each.fault.command in (None, command):
            waiting.remove(each)
            return each
    return None


def _parse_fault(fields: Fields) -> Fault:
    fields.allow_only(each.name for each in dataclass_fields(Fault))
    kind = fields.one_of("kind", _KINDS, required=True) or "error"
    status = fields.number("status") or 500
    if not 400 <= status <= 599:
        fields.blame("status", "must be from 400 to 599")
    seconds = fields.seconds("seconds")
    if kind in ("slow_answer", "action_lasts") and not seconds:
        fields.blame("seconds", "must be given for this kind")
    fault = Fault(
        method=(fields.text("method") or "*").upper(),
        path=fields.text("path", required=True) or "",
        kind=kind,
        call=fields.number("call"),
        times=fields.number("times"),
        status=status,
        code=fields.text("code") or ("action_failed" if kind == "action_failed" else _CODES.get(status, "unknown")),
        message=fields.text("message") or "a fault of the plan",
        seconds=seconds,
        command=fields.text("command"),
        server=fields.text("server", required=kind == "power_lost"),
    )
    fields.check()
    return fault


class _Plan:
    """The faults of one plan, and how often each was met."""

    def __init__(self, document: Document):
        fields = Fields(document)
        fields.allow_only(["faults"])
        items = fields.items("faults")
        if not all(isinstance(item, dict) for item in items):
            fields.blame("faults", "must be a list of objects")
        fields.check()
        self.document = document
        self.released = threading.Event()
        self._faults = [_parse_fault(Fields(item)) for item in items]
        self._met, self._done = [0] * len(items), [0] * len(items)

    def strike(self, method: str, path: str) -> list[Fault]:
        """The faults that this call meets, now that it is counted."""
        struck = []
        for index, fault in enumerate(self._faults):
            if not fault.fits(method, path):
                continue
            self._met[index] += 1
            due = fault.call is None or fault.call == self._met[index]
            if due and (fault.times is None or self._done[index] < fault.times):
                self._done[index] += 1
                struck.append(fault)
        return struck


class Faults:
    """The present plan, and all calls so far, in memory and as lines of JSON in a file if one is given."""

    def __init__(self, plan: Document | None = None, calls_path: Path | None = None):
        """Takes a plan ``{"faults": [...]}``; raises InvalidInput if it is none."""
        self._lock = threading.Lock()
        self._plan = _Plan(plan or {"faults": []})
        self._calls: deque[Document] = deque(maxlen=_CALLS_KEPT)
        self._count = 0
        self._said = False
        # Without a buffer a full disk costs the lines that it has no room for, and nothing later.
        self._file = os.open(calls_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644) if calls_path else None

    @property
    def plan(self) -> Document:
        """The present plan, as it was given."""
        return self._plan.document

    def replace(self, plan: Document) -> None:
        """Puts another plan in place, counting anew; stuck actions go on; raises InvalidInput."""
        fresh = _Plan(plan)
        with self._lock:
            self._plan, old = fresh, self._plan
        old.released.set()

    def read_calls(self, after: int = 0) -> list[Document]:
        """The calls with a number above ``after``; of very many, the latest."""
        with self._lock:
            return [call for call in self._calls if call["number"] > after]

    def strike(self, method: str, path: str) -> tuple[list[Fault], list[ActionFault]]:
        """Counts a call and tells what befalls it: itself, and the actions that it begins."""
        with self._lock:
            struck, released = self._plan.strike(method, path), self._plan.released
        actions = [ActionFault(fault, released) for fault in struck if fault.kind in _ACTION_KINDS]
        return [fault for fault in struck if fault.kind not in _ACTION_KINDS], actions

    def record(self, **call: Any) -> None:
        """Keeps a call that has ended."""
        with self._lock:
            self._count += 1
            call = {"number": self._count, **call}
            self._calls.append(call)
            if self._file is None:
                return
            try:
                os.write(self._file, (json.dumps(call) + "\n").encode())
            except OSError as error:  # the answer is worth more than its record
                if not self._said:
                    _log.warning("calls cannot be written down: %s", error.strerror)
                self._said = True

    def close(self) -> None:
        """Lets stuck actions go and closes the file."""
        self._plan.released.set()
        with self._lock:
            if self._file is not None:
                os.close(self._file)
            self._file = None


def _drop(environ: Document) -> None:
    connection: socket.socket | None = environ.get(SOCKET)
    if connection is not None:
        # Lingering for no time makes closing a reset instead of an orderly end.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        socket.close(connection.detach())
    raise ConnectionDropped("the connection was reset by the fault plan")


class Recorder:
    """WSGI middleware: names each call, lets it meet its faults, and records how it ended."""

    def __init__(
        self, app: Callable[..., Iterable[bytes]], faults: Faults, prefix: str, cut_power: Callable[[str], None]
    ):
        """Calls below ``prefix`` count; ``cut_power`` is told the name of a server that is to lose its power."""
        self._app, self._faults, self._prefix, self._cut_power = app, faults, prefix, cut_power

    def __call__(self, environ: Document, start_response: Callable[..., Any]) -> Iterable[bytes]:
        correlation_id = environ[CORRELATION_ID] = secrets.token_hex(8)

        def start(status: str, headers: list[tuple[str, str]], *rest: Any) -> Any:
            return start_response(status, [*headers, ("X-Correlation-Id", correlation_id)], *rest)

        path = environ["PATH_INFO"]
        if not path.startswith(self._prefix):
            return self._app(environ, start)
        return self._serve(environ, start, path)

    def _serve(self, environ: Document, start: Callable[..., Any], path: str) -> Iterable[bytes]:
        faults, action_faults = self._faults.strike(environ["REQUEST_METHOD"], path)
        kinds = {fault.kind for fault in faults}
        answer: list[Any] = []
        begun, began = time.time(), time.monotonic()

        def keep(*answered: Any) -> None:
            answer[:] = answered

        def record() -> None:
            self._faults.record(
                time=round(begun, 3),
                method=environ["REQUEST_METHOD"],
                path=path,
                query=environ.get("QUERY_STRING", ""),
                status=int(answer[0][:3]) if answer else None,
                duration_s=round(time.monotonic() - began, 4),
                correlation_id=environ[CORRELATION_ID],
                faults=sorted(kinds | {each.fault.kind for each in action_faults}),
            )

        for fault in faults:
            if fault.kind == "slow_answer":
                time.sleep(fault.seconds)
            elif fault.kind == "power_lost":
                self._cut_power(fault.server or "")
            elif fault.kind == "error":
                environ.setdefault(ERROR, fault)
        if "reset" in kinds:
            record()
            _drop(environ)
        names = _struck.set(list(action_faults))
        try:
            body = self._app(environ, keep)
        finally:
            _struck.reset(names)
            record()
        if "lost_answer" in kinds:
            _drop(environ)
        start(*answer)
        return body
