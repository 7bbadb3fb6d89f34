"""Owns how a generation becomes an HTTP answer, whole or as server-sent events; the shape of its documents is given."""

import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import falcon

from service import accounts, problems
from service.accounts import Log
from service.audit import AuditLog
from service.connection import UNBLOCKED_S, ClientWatch
from service.errors import LimitReached, MediaTypeUnsupported, ServiceError
from service.generation import Generation, Generator, Text
from service.json_text import to_json
from service.schema import GenerateRequest, parse_deadline, parse_json

_COMMENT_EVERY_S = 5.0  # well below the idle timeouts of usual proxies (60 s)
# A body that comes slowly holds a thread, and no limit of the key is asked before it is there. So a key may let a few
# dawdle; more than those have the time of a body that was sent in one go.
_PATIENT_BODIES, _HURRIED_BODY_S = 8, 0.5
# While a body is parsed no other thread works, and what it holds decides how long that is: a megabyte of text some
# milliseconds, of empty lists fifty. So a key's large bodies are parsed one after the other, a third of the time.
_LARGE_BODY_BYTES, _PARSING_PAUSE = 64 << 10, 2.0


class Shape(Protocol):
    """The documents of one kind of answer; one object a request."""

    def whole(self, generation: Generation, text: str) -> dict[str, Any]:
        """The answer that is not streamed. May raise AnswerCancelled, as may ``last``."""
        ...

    def first(self) -> Iterable[dict[str, Any]]:
        """What a stream begins with, before any text."""
        ...

    def piece(self, text: str) -> dict[str, Any]: ...

    def last(self, generation: Generation) -> Iterable[dict[str, Any]]:
        """What a stream ends with."""
        ...

    def failure(self, problem: problems.Problem) -> bytes:
        """The event of a failure on the way, ready to send."""
        ...

    @property
    def terminator(self) -> bytes:
        """What stands behind the last document."""
        ...


class Answerer:
    """Answers requests for text; one for the whole service."""

    def __init__(self, generator: Generator, audit: AuditLog, log: Log):
        self.generator, self._audit, self.log = generator, audit, log
        self._lock = threading.Lock()
        self._arriving: Counter[str] = Counter()  # bodies, by whose they are
        self._parsing: Counter[str] = Counter()  # those that are there and large
        self._turns: dict[str, threading.Lock] = {}

    def read(self, req: falcon.Request) -> dict[str, Any]:
        """The request's body.

        Raises MediaTypeUnsupported, BodyLate, BodyTooLarge, LimitReached or RequestMalformed.
        """
        if falcon.mediatypes.parse_header(req.content_type or "")[0].lower() != "application/json":
            raise MediaTypeUnsupported("the body must be declared as Content-Type: application/json")
        if (coding := (req.get_header("Content-Encoding") or "identity").strip().lower()) != "identity":
            raise MediaTypeUnsupported(f"the body must be sent as it is, not as Content-Encoding: {coding[:64]}")
        limit_bytes = self.generator.settings.body_limit_bytes
        identity = req.env[accounts.CALLER].identity
        with self._counted(self._arriving, identity) as others:
            if others >= _PATIENT_BODIES:
                req.env["wsgi.input"].hurry(_HURRIED_BODY_S)
            body = req.stream.read(limit_bytes + 1)
        if len(body) <= _LARGE_BODY_BYTES:
            return parse_json(body, limit_bytes)
        with self._counted(self._parsing, identity) as others:
            if others > self.generator.settings.queue_size:
                raise LimitReached("key_parallel", f"{others} large bodies of the key are being read already", 1.0)
            with self._turns.setdefault(identity, threading.Lock()):
                begun_s = time.thread_time()
                try:
                    return parse_json(body, limit_bytes)
                finally:
                    time.sleep(_PARSING_PAUSE * (time.thread_time() - begun_s))

    @contextmanager
    def _counted(self, bodies: Counter[str], identity: str) -> Iterator[int]:
        """Counts a body among a key's; yields how many others there are."""
        with self._lock:
            others = bodies[identity]
            bodies[identity] += 1
        try:
            yield others
        finally:
            with self._lock:
                bodies[identity] -= 1
                if not bodies[identity]:
                    del bodies[identity]

    def answer(self, req: falcon.Request, resp: falcon.Response, request: GenerateRequest, shape: Shape) -> None:
        """Admits the request, notes that in the audit log, and makes the response; raises what refuses it."""
        environ = req.env
        deadline_s = parse_deadline(req.get_header("X-Deadline-S"))
        client = ClientWatch(environ.get("gunicorn.socket"))
        generation = self.generator.begin(request, deadline_s, client, environ[accounts.CALLER])
        try:
            self._audit.write(
                "admitted",
                **accounts.audit_facts(environ),
                prompt_tokens=generation.account.prompt_tokens,
                max_tokens=generation.account.max_tokens,
            )
            environ[accounts.ADMITTED] = True
        except BaseException:
            generation.close()
            raise
        if request.stream:
            resp.content_type = "text/event-stream; charset=utf-8"
            resp.set_header("X-Accel-Buffering", "no")
            resp.stream = _EventStream(generation, environ, shape, self.log)
            return
        texts = []
        try:
            while not generation.ended:
                event = generation.step()
                if isinstance(event, Text):
                    texts.append(event.text)
        finally:
            try:
                generation.close()
            finally:
                _tell_facts(environ, generation)
        resp.content_type = falcon.MEDIA_JSON
        resp.data = to_json(shape.whole(generation, "".join(texts)))


def _in_one_line(document: bytes) -> bytes:
    """JSON without the characters that end no line of events but for programs that split by all that Unicode knows."""
    for letter in "\u0085\u2028\u2029":
        document = document.replace(letter.encode(), b"\\u%04x" % ord(letter))
    return document


def _tell_facts(environ: dict[str, Any], generation: Generation) -> None:
    account = generation.account
    environ[accounts.FACTS].update(
        finish_reason=account.finish_reason,
        prompt_tokens=account.prompt_tokens,
        completion_tokens=account.completion_tokens,
        queue_ms=round(account.queue_s * 1000, 1),
        prefill_ms=round(account.prefill_s * 1000, 1),
        decode_ms=round(account.decode_s * 1000, 1),
        **({"cancelled_by": account.cancelled_by} if account.cancelled_by else {}),
        **({"client_left": True} if account.cancelled_by == "client" else {}),
    )


class _EventStream:
    """Server-sent events of one generation.

    An object and not a generator function: its ``close`` must work also when the server never began to read it.
    """

    def __init__(self, generation: Generation, environ: dict[str, Any], shape: Shape, log: Log):
        self._generation, self._environ, self._shape, self._log = generation, environ, shape, log
        self._last_byte_s = time.monotonic()
        self._events = self._run()

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        self._note_sent()
        return next(self._events)

    def close(self) -> None:
        self._note_sent()
        generation = self._generation
        if not generation.ended and not generation.closed:
            # Nothing reaches the client any more.
            generation.account.cancelled_by = generation.account.cancelled_by or "client"
        generation.close()
        _tell_facts(self._environ, generation)

    def _note_sent(self) -> None:
        """What was handed on has been sent, or never will be."""
        sending_s = time.monotonic() - self._last_byte_s
        if sending_s > UNBLOCKED_S:
            self._generation.account.held_up_s += sending_s

    def _run(self) -> Iterator[bytes]:
        generation, shape = self._generation, self._shape
        yield self._sent(b": accepted\n\n")
        try:
            for document in shape.first():
                yield self._data(document)
            while not generation.ended:
                event = generation.step()
                if isinstance(event, Text):
                    yield self._data(shape.piece(event.text))
                elif time.monotonic() - self._last_byte_s > _COMMENT_EVERY_S:
                    yield self._sent(b": waiting\n\n")
            # Before the last word: whoever has read it may ask again at once, and finds slot, place and tokens free.
            generation.close()
            for document in shape.last(generation):
                yield self._data(document)
            if shape.terminator:
                yield self._sent(shape.terminator)
        except ServiceError as error:
            generation.close()
            problem = problems.describe_error(error)
            if problem.status == 500:
                self._log.write_failure(self._environ[accounts.REQUEST_ID], error)
            self._environ[accounts.FACTS]["error"] = problem.kind
            yield self._sent(_in_one_line(shape.failure(problem)))

    def _data(self, document: dict[str, Any]) -> bytes:
        return self._sent(b"data: " + _in_one_line(to_json(document)) + b"\n\n")

    def _sent(self, event: bytes) -> bytes:
        self._last_byte_s = time.monotonic()
        return event
