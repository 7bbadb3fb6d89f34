"""Owns ``POST /generate``: its body, and the shape of its answers."""

from collections.abc import Iterable
from typing import Any

import falcon

from service import accounts, problems
from service.generation import Generation
from service.resources.answering import Answerer
from service.schema import TokenBounds, parse_generate


class GenerateResource:
    """``POST /generate``."""

    scope, counted = "generate", True

    def __init__(self, answerer: Answerer):
        self._answerer = answerer

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        generator = self._answerer.generator
        settings = generator.settings
        bounds = TokenBounds(settings.default_max_tokens, settings.largest_max_tokens)
        request = parse_generate(self._answerer.read(req), bounds)
        self._answerer.answer(req, resp, request, _GenerateShape(req.env[accounts.REQUEST_ID], generator.model_name))


class _GenerateShape:
    """``data`` per piece, a last one with usage, ``event: error`` with a problem document on failure."""

    terminator = b""

    def __init__(self, request_id: str, model: str):
        self._request_id, self._model = request_id, model

    def whole(self, generation: Generation, text: str) -> dict[str, Any]:
        return {
            "id": self._request_id,
            "model": self._model,
            "response": text,
            "finish_reason": generation.account.finish_reason,
            "usage": generation.account.usage(),
            "timings": generation.account.timings(),
        }

    def first(self) -> Iterable[dict[str, Any]]:
        return ()

    def piece(self, text: str) -> dict[str, Any]:
        return {"id": self._request_id, "response": text}

    def last(self, generation: Generation) -> Iterable[dict[str, Any]]:
        return ({**self.whole(generation, ""), "done": True},)

    def failure(self, problem: problems.Problem) -> bytes:
        return b"event: error\ndata: " + problem.body(self._request_id) + b"\n\n"
