"""Owns ``POST /generate``: a body becomes a request, a generation becomes JSON or server-sent events."""

import json
import time
from collections.abc import Iterator
from typing import Any

import falcon

from service import accounts, problems
from service.accounts import Log
from service.connection import ClientWatch
from service.errors import MediaTypeUnsupported, ServiceError
from service.generation import Generation, Generator, Text
from service.schema import parse_deadline, parse_generate, parse_json

_COMMENT_EVERY_S = 5.0  # well below the idle timeouts of usual proxies (60 s)


class GenerateResource:
    """``POST /generate``."""

    def __init__(self, generator: Generator, log: Log):
        self._generator, self._log = generator, log

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        settings = self._generator.settings
        if falcon.mediatypes.parse_header(req.content_type or "")[0].lower() != "application/json":
            raise MediaTypeUnsupported("the body must be declared as Content-Type: application/json")
        body = req.bounded_stream.read(settings.body_limit_bytes + 1)
        request = parse_generate(parse_json(body, settings.body_limit_bytes), settings.largest_max_tokens)
        deadline_s = parse_deadline(req.get_header("X-Deadline-S"))
        generation = self._generator.begin(request, deadline_s, ClientWatch(req.env.get("gunicorn.socket")))
        if request.stream:
            resp.content_type = "text/event-stream; charset=utf-8"
            resp.set_header("X-Accel-Buffering", "no")
            resp.stream = _EventStream(generation, req.env, self._generator, self._log)
            return
        texts = []
        try:
            while not generation.ended:
                event = generation.step()
                if isinstance(event, Text):
                    texts.append(event.text)
        finally:
            generation.close()
            _tell_facts(req.env, generation)
        resp.media = _answer(req.env, generation, self._generator, "".join(texts))


def _answer(environ: dict[str, Any], generation: Generation, generator: Generator, response: str) -> dict[str, Any]:
    description = generator.engine.describe()
    assert description is not None
    return {
        "id": environ[accounts.REQUEST_ID],
        "model": description.model,
        "response": response,
        "finish_reason": generation.account.finish_reason,
        "usage": generation.account.usage(),
        "timings": generation.account.timings(),
    }


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
    """Server-sent events of one generation: ``data`` per piece, a last one with usage, ``event: error`` on failure.

    An object and not a generator function: its ``close`` must work also when the server never began to read it.
    """

    def __init__(self, generation: Generation, environ: dict[str, Any], generator: Generator, log: Log):
        self._generation, self._environ, self._generator, self._log = generation, environ, generator, log
        self._last_byte_s = time.monotonic()
        self._events = self._run()

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        return next(self._events)

    def close(self) -> None:
        self._generation.close()
        _tell_facts(self._environ, self._generation)

    def _run(self) -> Iterator[bytes]:
        identity = self._environ[accounts.REQUEST_ID]
        yield self._sent(b": accepted\n\n")
        try:
            while not self._generation.ended:
                event = self._generation.step()
                if isinstance(event, Text):
                    yield self._data({"id": identity, "response": event.text})
                elif time.monotonic() - self._last_byte_s > _COMMENT_EVERY_S:
                    yield self._sent(b": waiting\n\n")
        except ServiceError as error:
            problem = problems.describe_error(error)
            if problem.status == 500:
                self._log.write_failure(identity, error)
            self._environ[accounts.FACTS]["error"] = problem.kind
            yield self._sent(b"event: error\ndata: " + problem.body(identity) + b"\n\n")
            return
        last = _answer(self._environ, self._generation, self._generator, "")
        yield self._data({**last, "done": True})

    def _data(self, document: dict[str, Any]) -> bytes:
        return self._sent(b"data: " + json.dumps(document, ensure_ascii=False).encode() + b"\n\n")

    def _sent(self, event: bytes) -> bytes:
        self._last_byte_s = time.monotonic()
        return event
