"""Owns what gunicorn's threaded worker lacks: deadlines for slow clients, errors as problem documents, gentle endings.

- A connection that has sent nothing yet waits in the poller and holds no thread.
- Headers and body must be there within ``header_timeout_s`` and ``body_timeout_s``: a watchdog then shuts the socket's
  receiving half, which wakes the thread that reads it. The body is read when the application asks for it, and with it
  ends the deadline; a client that leaves later is the application's to notice.
- An application's ``Connection: close`` is honoured (WSGI has no other way to say it).
- Behind a proxy no answer begins within 50 ms of the body's end. A proxy on Go's ``httputil`` that has not yet noticed
  that end itself closes the body at the answer's first byte, takes its own next read for a failure and cuts the answer
  (``transferWriter.writeBody`` and ``chunkWriter.writeHeader`` of net/http): on two busy cores one stream of 250.
"""

import errno
import json
import select
import socket
import struct
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from io import BytesIO
from selectors import EVENT_READ
from typing import Any

from gunicorn import util
from gunicorn.http import errors as http_errors
from gunicorn.workers.base import Worker
from gunicorn.workers.gthread import TConn, ThreadWorker

from service import problems
from service.accounts import Log
from service.connection import UNBLOCKED_S
from service.errors import BodyLate, RequestMalformed

_WATCH_EVERY_S = 0.25
_LINGER_S = 0.5
_KEPT_PAUSE_MS = 2
# A client that pauses costs nobody anything as long as the kernel takes what is written; then it holds a thread and a
# slot: so long for a whole answer, in one pause or in many. Where more than half the threads have a connection, an
# answer that is no stream may hold its own no longer than the second.
_LONGEST_BLOCK_S, _HURRIED_BLOCK_S = 30, 5
# So long the kernel keeps what a client does not acknowledge, or has no room for. Who asks from this machine, as a
# proxy does, cannot have gone without a word; it only pauses, as its own client does.
_LONGEST_SILENCE_S, _LONGEST_PAUSE_S = 60, 600
_PROXY_PAUSE_S = 0.05
# What the application's own headers are refused with: its fault, not the request's.
_OWN_HEADER_ERRORS = (
    http_errors.InvalidResponseHeader,  # type: ignore[attr-defined]  # the stubs are of an older gunicorn
    http_errors.InvalidResponseHeaderName,  # type: ignore[attr-defined]
)


class _Deadlines:
    """Sockets whose request is still arriving, each with the time by which it must have arrived."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ends_s: dict[socket.socket, float] = {}
        self._expired: set[socket.socket] = set()

    def start(self, client: socket.socket, seconds: float) -> None:
        with self._lock:
            self._ends_s[client] = time.monotonic() + seconds

    def extend(self, client: socket.socket, seconds: float) -> None:
        """Grants more time, counted from the request's beginning like the first grant."""
        with self._lock:
            if client in self._ends_s:
                self._ends_s[client] += seconds

    def shorten(self, client: socket.socket, seconds: float) -> None:
        """Leaves no more time than this from now on."""
        with self._lock:
            if client in self._ends_s:
                self._ends_s[client] = min(self._ends_s[client], time.monotonic() + seconds)

    def end(self, client: socket.socket) -> bool:
        """Stops the clock and tells whether it had run out."""
        with self._lock:
            self._ends_s.pop(client, None)
            expired = client in self._expired
            self._expired.discard(client)
            return expired

    def watch(self) -> None:
        """Runs for ever in a thread of its own."""
        while True:
            time.sleep(_WATCH_EVERY_S)
            now_s = time.monotonic()
            with self._lock:
                late = [client for client, end_s in self._ends_s.items() if end_s < now_s]
                for client in late:
                    del self._ends_s[client]
                    self._expired.add(client)
                    try:
                        client.shutdown(socket.SHUT_RD)
                    except OSError:
                        pass  # it has gone by itself


class _Connection(TConn):
    """A connection that lingers in the thread which served it, never in gunicorn's main loop."""

    def close(self, graceful: bool = False) -> None:
        if self.sock.fileno() >= 0:
            super().close(graceful=False)


class WebWorker(ThreadWorker):
    """gunicorn's gthread worker with the additions above; its class attributes are set by ``gunicorn.conf.py``."""

    header_timeout_s = 5.0
    body_timeout_s = 20.0
    body_limit_bytes = 1_048_576
    on_stopping: Callable[[], None] = staticmethod(lambda: None)
    on_bad_request: Callable[[int], None] = staticmethod(lambda status: None)

    def init_process(self) -> None:
        self._exiting = self._quitting = False
        self._deadlines = _Deadlines()
        self._current = threading.local()
        self._lines = Log()
        # gunicorn asks for its settings some thirty times a request, by a search each; from here on they do not change.
        vars(self.cfg).update({name: setting.get() for name, setting in self.cfg.settings.items()})
        threading.Thread(target=self._deadlines.watch, name="slow-clients", daemon=True).start()
        super().init_process()

    def load_wsgi(self) -> None:
        super().load_wsgi()
        self.wsgi = partial(self._lend_body, self.wsgi)

    def accept(self, listener: socket.socket) -> None:
        """As in ThreadWorker, but a new connection gets a thread only once it has sent something."""
        try:
            client, address = listener.accept()
        except OSError:
            return  # gone again, or taken by nobody: there is nothing to serve
        self.nr_conns += 1
        silence_s = _LONGEST_PAUSE_S if _is_own(address[0]) else _LONGEST_SILENCE_S
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, silence_s * 1000)
        # For what is sent before an answer begins: that the body may come.
        client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", _LONGEST_BLOCK_S, 0))
        conn = _Connection(self.cfg, client, address, listener.getsockname())
        conn.timeout = time.monotonic() + self.header_timeout_s
        self.pending_conns.append(conn)
        self.poller.register(client, EVENT_READ, partial(self.on_pending_socket_readable, conn))

    def handle(self, conn: TConn) -> Any:
        keep = self._handle_one(conn)
        while keep is True and self.alive and not self._is_crowded() and _has_more(conn):
            keep = self._handle_one(conn)
        if not keep:
            # gunicorn would do this in its main loop, where one client that does not close stops all others for 2 s.
            util.close_graceful(conn.sock, timeout=_LINGER_S)
        return keep

    def _is_crowded(self) -> bool:
        return bool(self.nr_conns > self.cfg.threads // 2)

    def _handle_one(self, conn: TConn) -> Any:
        self._deadlines.start(conn.sock, self.header_timeout_s)
        try:
            return super().handle(conn)
        finally:
            self._deadlines.end(conn.sock)

    def handle_request(self, req: Any, conn: TConn) -> Any:
        self._current.request = req
        self._deadlines.extend(conn.sock, self.body_timeout_s - self.header_timeout_s)
        try:
            return super().handle_request(req, conn)
        except (BlockingIOError, TimeoutError) as error:
            raise BrokenPipeError(errno.EPIPE, "the client has not read for too long") from error

    # Signals come twice: a unit's stop and Ctrl-C reach all processes, and gunicorn hands them on. The second may
    # interrupt the work on the first, in this same thread. It is let pass by these handlers, not by SIG_IGN: what had
    # come already when that was set, Python reports as lost, with a traceback.

    def handle_exit(self, sig: int, frame: Any) -> None:
        if self._exiting:  # it would wait for ever for the locks that the first one holds
            return
        self._exiting = True
        self.on_stopping()
        super().handle_exit(sig, frame)

    def handle_quit(self, sig: int, frame: Any) -> None:
        if self._quitting:  # the ending would be cut short, and answers that nobody cancels any more waited for
            return
        self._exiting = self._quitting = True
        # Not ThreadWorker's: it takes the pool's lock, which the work interrupted may hold, to end what ends anyway.
        Worker.handle_quit(self, sig, frame)

    def handle_error(self, req: Any, client: socket.socket, addr: Any, exc: BaseException) -> None:
        """Answers a request that never became one for the application, as a problem document."""
        request_id = uuid.uuid4().hex
        if isinstance(exc, http_errors.ParseException) and not isinstance(exc, _OWN_HEADER_ERRORS):
            status = {
                http_errors.LimitRequestLine: 414,
                http_errors.LimitRequestHeaders: 431,
                http_errors.UnsupportedTransferCoding: 501,
                http_errors.ExpectationFailed: 417,
                http_errors.ForbiddenProxyRequest: 403,
            }.get(type(exc), 400)
            problem = problems.describe_status(status, "the request is not valid HTTP")
        else:
            problem = problems.describe_error(Exception())
            self._lines.write_failure(request_id, exc)
        # The type alone: the text may quote what the client sent.
        self._note_bad_request(request_id, problem.status, type(exc).__name__)
        try:
            util.write_nonblock(client, _render(problem, request_id))
        except OSError:
            pass  # the client did not wait for the answer

    def _note_bad_request(self, request_id: str, status: int, error: str) -> None:
        self._lines.write("bad-request", id=request_id, status=status, error=error)
        self.on_bad_request(status)

    def _lend_body(
        self, application: Callable[..., Iterable[bytes]], environ: dict[str, Any], start_response: Callable[..., Any]
    ) -> Iterable[bytes]:
        request, client = self._current.request, environ["gunicorn.socket"]
        body = environ["wsgi.input"] = _Body(self, request, client, environ)
        patience_s = _LONGEST_BLOCK_S

        def start(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
            nonlocal patience_s
            if body.ended_s is not None and "HTTP_X_FORWARDED_FOR" in environ:
                time.sleep(max(0.0, body.ended_s + _PROXY_PAUSE_S - time.monotonic()))
            if not body.is_over():
                # What the client still sends is not waited for: this thread is there for others.
                request.must_close = True
            for name, value in headers:
                match name.lower():
                    case "connection" if value.lower() == "close":
                        request.must_close = True
                    case "content-length":
                        _set_corked(client, True)
                        patience_s = _HURRIED_BLOCK_S if self._is_crowded() else _LONGEST_BLOCK_S
            return start_response(status, headers, exc_info)

        answer = application(environ, start)
        return _Sending(answer, client, patience_s)


class _Body:
    """``wsgi.input``: read as a whole when the application first asks, and with it ends the deadline.

    An application that does not ask, because it knows the client for nobody, holds no thread for a body that may
    never come.
    """

    def __init__(self, worker: WebWorker, request: Any, client: socket.socket, environ: dict[str, Any]):
        self._worker, self._request, self._client = worker, request, client
        self._source = environ["wsgi.input"]
        self._timeout_s = worker.body_timeout_s
        length = environ.get("CONTENT_LENGTH")
        chunked = "HTTP_TRANSFER_ENCODING" in environ
        self._length = int(length) if length and not chunked else None
        self._data: BytesIO | None = None
        self.ended_s: float | None = None  # when a body that there was had been read
        if not self._length and not chunked:
            self._data = BytesIO()
            worker._deadlines.end(client)

    def is_over(self) -> bool:
        """Whether the next request begins where the connection stands, or the rest of this one is there already."""
        if self._data is not None or self._length is None:
            return self._data is not None
        return len(self._request.unreader.buf.getvalue()) >= self._length

    def hurry(self, seconds: float) -> None:
        """Gives what is still to come no more time than this."""
        self._timeout_s = seconds
        self._worker._deadlines.shorten(self._client, seconds)

    def read(self, size: int = -1) -> bytes:
        """The next bytes; never more than one beyond the limit of bodies. Raises BodyLate."""
        if self._data is None:
            self._data = BytesIO(self._read_all())
            self.ended_s = time.monotonic()
        return self._data.read(size)

    def _read_all(self) -> bytes:
        worker, most = self._worker, self._worker.body_limit_bytes + 1
        late, body = False, b""
        try:
            body = self._source.read(most)
        except http_errors.NoMoreData:
            # Either the deadline shut the socket, or the client did: only the first gets an answer.
            if not worker._deadlines.end(self._client):
                raise
            late = True
        except http_errors.ParseException as error:  # in a chunk or behind the last
            raise RequestMalformed("the body is not valid HTTP") from error
        late = worker._deadlines.end(self._client) or late
        if self._length is not None and len(body) < min(self._length, most):
            late = True  # gunicorn's body reader takes the end of the stream for the end of the body
        if late or len(body) == most:
            self._request.must_close = True
        if late:
            raise BodyLate(self._timeout_s)
        return body


class _Sending:
    """A response's body; sending it may wait for the client for ``patience_s`` in all, however often it gets on.

    Once it is written, what the kernel still holds back of it goes out: gunicorn sends head and body by themselves,
    which costs both ends a segment and a wake-up more. A whole answer is held back until it is all there; a streamed
    one, which has no length, never is.
    """

    def __init__(self, body: Iterable[bytes], client: socket.socket, patience_s: float):
        self._body, self._client, self._patience_s = body, client, patience_s
        client.settimeout(patience_s)  # of each sendall as a whole; gunicorn takes it away before the next request

    def __iter__(self) -> Iterator[bytes]:
        for piece in self._body:
            begun_s = time.monotonic()
            yield piece
            blocked_s = time.monotonic() - begun_s
            if blocked_s > UNBLOCKED_S:
                self._patience_s = max(0.0, self._patience_s - blocked_s)
                self._client.settimeout(self._patience_s)

    def close(self) -> None:
        _set_corked(self._client, False)
        close = getattr(self._body, "close", None)
        if close is not None:
            close()


def _set_corked(client: socket.socket, corked: bool) -> None:
    try:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, int(corked))
    except OSError:
        pass  # it has gone; whoever writes to it is told


def _is_own(address: str) -> bool:
    return address.startswith(("127.", "::ffff:127.")) or address == "::1"


def _has_more(conn: TConn) -> bool:
    """Whether the next request of a kept connection is there, or comes at once.

    A program that asks again as soon as it has its answer is then served by the same thread: the way through
    gunicorn's main loop takes longer than such a program's pause.
    """
    poll = select.poll()
    poll.register(conn.sock, select.POLLIN)
    return bool(poll.poll(_KEPT_PAUSE_MS))


def _render(problem: problems.Problem, request_id: str) -> bytes:
    document = problem.body(request_id)
    head = (
        f"HTTP/1.1 {problem.status} {json.loads(document)['title']}\r\nConnection: close\r\n"
        f"Content-Type: {problems.MEDIA_TYPE}\r\nContent-Length: {len(document)}\r\n"
        f"X-Request-Id: {request_id}\r\n\r\n"
    )
    return head.encode() + document
