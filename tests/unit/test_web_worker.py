"""What the web worker adds to gunicorn's, where no socket is needed to see it."""

import errno
import signal
import socket
import struct
import threading
from collections import deque
from collections.abc import Iterator
from io import BytesIO
from types import SimpleNamespace
from typing import Any, cast

import pytest
from gunicorn.config import Config
from gunicorn.workers.gthread import PollableMethodQueue

from service import web_worker
from service.web_worker import WebWorker


class Client:
    """A socket that is told how long sending may last."""

    def __init__(self) -> None:
        self.told_s: list[float] = []
        self.settimeout = self.told_s.append

    def setsockopt(self, level: int, name: int, value: int) -> None:
        """What holds a whole answer back until it is there."""


def test_a_second_stop_signal_does_not_come_back_for_locks_that_are_held() -> None:
    """It arrives in the same thread, in the middle of the work on the first."""
    worker = WebWorker.__new__(WebWorker)
    worker.alive, worker._exiting = True, False
    worker.method_queue = cast(PollableMethodQueue, SimpleNamespace(defer=lambda call: None))  # it wakes the main loop
    stopped: list[bool] = []

    def stop() -> None:
        stopped.append(worker.alive)
        worker.handle_exit(signal.SIGTERM, None)

    worker.on_stopping = stop
    worker.handle_exit(signal.SIGTERM, None)
    assert stopped == [True]
    assert worker.alive is False


@pytest.mark.parametrize(
    ("more", "body", "pauses"),
    [
        ({"HTTP_X_FORWARDED_FOR": "203.0.113.5"}, b"{}", True),
        ({"HTTP_X_FORWARDED_FOR": "203.0.113.5"}, b"", False),  # nothing whose end a proxy could miss
        ({}, b"{}", False),
    ],
)
def test_an_answer_through_a_proxy_does_not_overtake_the_body(
    more: dict[str, str], body: bytes, pauses: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that begins at once would be cut by a proxy that has not yet noticed the body's end; without one it may."""
    slept: list[float] = []
    monkeypatch.setattr(web_worker.time, "sleep", slept.append)
    worker = WebWorker.__new__(WebWorker)
    worker._deadlines = web_worker._Deadlines()
    worker._current = threading.local()
    worker._current.request = SimpleNamespace(must_close=False)
    environ: dict[str, Any] = {"gunicorn.socket": Client(), "wsgi.input": BytesIO(body), **more}
    environ["CONTENT_LENGTH"] = str(len(body))
    begun: list[str] = []

    def application(environ: dict[str, Any], start: Any) -> list[bytes]:
        assert environ["wsgi.input"].read() == body
        start("200 OK", [])
        return []

    worker._lend_body(application, environ, lambda status, headers, exc_info: begun.append(status))
    assert begun == ["200 OK"]
    assert [0.0 < each <= web_worker._PROXY_PAUSE_S for each in slept] == ([True] if pauses else [])


@pytest.mark.parametrize(
    ("address", "silence_ms"),
    [("127.0.0.1", 600_000), ("::1", 600_000), ("::ffff:127.0.0.1", 600_000), ("192.0.2.1", 60_000)],
)
def test_how_long_a_client_may_pause(address: str, silence_ms: int) -> None:
    """Who asks from this machine has not gone; whoever it is, a thread is held for half a minute at most."""
    told: dict[tuple[int, int], Any] = {}
    client = SimpleNamespace(setsockopt=lambda level, name, value: told.update({(level, name): value}))
    listener = SimpleNamespace(accept=lambda: (client, (address, 40_000)), getsockname=lambda: ("127.0.0.1", 8080))
    worker = WebWorker.__new__(WebWorker)
    worker.nr_conns, worker.pending_conns, worker.cfg = 0, deque(), Config()
    worker.poller = cast(Any, SimpleNamespace(register=lambda *words: None))
    client.setblocking = lambda blocking: None
    worker.accept(cast(socket.socket, listener))
    assert told[socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT] == silence_ms
    assert struct.unpack("@ll", told[socket.SOL_SOCKET, socket.SO_SNDTIMEO]) == (30, 0)


def test_what_sending_waits_for_a_client_is_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that reads a little now and then has the time of one that does not read; an engine's time is its own."""
    now_s = 0.0
    monkeypatch.setattr(web_worker.time, "monotonic", lambda: now_s)
    client = Client()

    def body() -> Iterator[bytes]:
        nonlocal now_s
        for _ in range(5):
            now_s += 3600.0  # the engine works
            yield b"piece"

    for blocked_s, _ in zip(
        (0.01, 10.0, 0.0, 15.0, 8.0), web_worker._Sending(body(), cast(Any, client), 30.0), strict=True
    ):
        now_s += blocked_s
    assert client.told_s == [30.0, 20.0, 5.0, 0.0]


@pytest.mark.parametrize(("connections", "patience_s"), [(40, 30), (41, 5)])
def test_a_crowd_has_less_time_for_answers_that_are_no_streams(connections: int, patience_s: float) -> None:
    """Each of them holds a thread; a stream holds a slot that its key was given."""
    worker = WebWorker.__new__(WebWorker)
    worker._deadlines, worker._current, worker.cfg = web_worker._Deadlines(), threading.local(), Config()
    worker._current.request, worker.nr_conns = SimpleNamespace(must_close=False), connections
    worker.cfg.set("threads", 80)
    client = Client()
    for headers in ([("Content-Length", "2")], []):

        def application(environ: dict[str, Any], start: Any, headers: list[Any] = headers) -> list[bytes]:
            start("200 OK", headers)
            return []

        environ: dict[str, Any] = {"gunicorn.socket": client, "wsgi.input": BytesIO()}
        worker._lend_body(application, environ, lambda status, headers, exc_info: None)
    assert client.told_s == [patience_s, 30]


@pytest.mark.parametrize("error", [BlockingIOError(errno.EAGAIN, "full"), TimeoutError("timed out")])
def test_a_client_that_does_not_read_is_one_that_has_left(error: OSError, monkeypatch: pytest.MonkeyPatch) -> None:
    """gunicorn knows what to do then; anything else it would write into the log, with a traceback."""

    def block(worker: WebWorker, request: object, conn: object) -> None:
        raise error

    monkeypatch.setattr(web_worker.ThreadWorker, "handle_request", block)
    worker = WebWorker.__new__(WebWorker)
    worker._deadlines, worker._current = web_worker._Deadlines(), threading.local()
    with pytest.raises(BrokenPipeError) as told:
        worker.handle_request(None, cast(Any, SimpleNamespace(sock=None)))
    assert told.value.errno == errno.EPIPE
