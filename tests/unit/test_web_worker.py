"""What the web worker adds to gunicorn's, where no socket is needed to see it."""

import signal
import threading
from io import BytesIO
from types import SimpleNamespace
from typing import Any, cast

import pytest
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
