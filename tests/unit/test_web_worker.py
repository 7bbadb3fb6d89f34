"""What the web worker adds to gunicorn's, where no socket is needed to see it."""

import errno
import signal
import socket
import struct
import threading
from collections import deque
from io import BytesIO
from types import SimpleNamespace
from typing import Any, cast

import pytest
from gunicorn.config import Config
from gunicorn.workers.gthread import PollableMethodQueue

from service import web_worker
from service.web_worker import WebWorker


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
    environ: dict[str, Any] = {"gunicorn.socket": object(), "wsgi.input": BytesIO(body), **more}
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


def test_a_client_that_does_not_read_is_one_that_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """gunicorn knows what to do then; anything else it would write into the log, with a traceback."""

    def block(worker: WebWorker, request: object, conn: object) -> None:
        raise BlockingIOError(errno.EAGAIN, "full")

    monkeypatch.setattr(web_worker.ThreadWorker, "handle_request", block)
    worker = WebWorker.__new__(WebWorker)
    worker._deadlines, worker._current = web_worker._Deadlines(), threading.local()
    with pytest.raises(BrokenPipeError) as told:
        worker.handle_request(None, cast(Any, SimpleNamespace(sock=None)))
    assert told.value.errno == errno.EPIPE
