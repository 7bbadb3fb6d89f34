"""Owns OpenAI's paths under ``/v1``: chat completions, completions and models, in that API's shapes."""

import time
from collections.abc import Callable, Iterable
from typing import Any

import falcon

from service import accounts, problems
from service.errors import AnswerCancelled, Unavailable
from service.generation import Generation, Generator
from service.openai_schema import OpenAIRequest, check_model
from service.resources.answering import Answerer


class TextResource:
    """``POST /v1/chat/completions`` and ``/v1/completions``: the same but for the body and the shape of the answer."""

    scope, counted = "generate", True

    def __init__(
        self,
        answerer: Answerer,
        parse: Callable[[dict[str, Any], str, int], OpenAIRequest],
        shape: "type[ChatShape | CompletionShape]",
    ):
        self._answerer, self._parse, self._shape = answerer, parse, shape

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        generator = self._answerer.generator
        try:
            model = _loaded_model(generator)
        except Unavailable as error:
            generator.metrics.refusals.labels(error.reason).inc()
            raise
        request = self._parse(self._answerer.read(req), model, generator.settings.largest_max_tokens)
        if request.user is not None:
            req.env[accounts.FACTS]["user"] = request.user
        shape = self._shape(req.env[accounts.REQUEST_ID], model, request.include_usage)
        self._answerer.answer(req, resp, request.generate, shape)


class ModelsResource:
    """``GET /v1/models``: the one model, or none while it is loading for the first time."""

    scope = "generate"

    def __init__(self, generator: Generator):
        self._generator = generator

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        loaded = self._generator.engine.describe() is not None
        resp.media = {"object": "list", "data": [_describe_model(self._generator)] if loaded else []}

    on_head = on_get


class ModelResource:
    """``GET /v1/models/{model}``."""

    scope = "generate"

    def __init__(self, generator: Generator):
        self._generator = generator

    def on_get(self, req: falcon.Request, resp: falcon.Response, model: str) -> None:
        check_model(model, _loaded_model(self._generator))
        resp.media = _describe_model(self._generator)

    on_head = on_get


def _loaded_model(generator: Generator) -> str:
    if generator.engine.describe() is None:
        raise Unavailable("loading", generator.engine.state.reason, 2.0)
    return generator.model_name


def _describe_model(generator: Generator) -> dict[str, Any]:
    return {
        "id": generator.model_name,
        "object": "model",
        "created": generator.started_at,
        "owned_by": "mini-llm",
    }


class _OpenAIShape:
    """What chat and plain completions have in common: a subclass says where the text goes."""

    terminator = b"data: [DONE]\n\n"
    id_prefix = whole_object = stream_object = ""

    def __init__(self, request_id: str, model: str, include_usage: bool):
        self._include_usage = include_usage
        self._head = {"id": f"{self.id_prefix}-{request_id}", "created": int(time.time()), "model": model}

    def whole_choice(self, text: str) -> dict[str, Any]:
        raise NotImplementedError

    def piece_choice(self, text: str | None) -> dict[str, Any]:
        """A part of the answer; None at its end."""
        raise NotImplementedError

    def whole(self, generation: Generation, text: str) -> dict[str, Any]:
        reason = _finish_reason(generation)
        choice = {"index": 0, "finish_reason": reason, "logprobs": None, **self.whole_choice(text)}
        return {**self._head, "object": self.whole_object, "choices": [choice], "usage": generation.account.usage()}

    def first(self) -> Iterable[dict[str, Any]]:
        return ()

    def piece(self, text: str) -> dict[str, Any]:
        return self._chunk(self.piece_choice(text))

    def last(self, generation: Generation) -> Iterable[dict[str, Any]]:
        yield self._chunk(self.piece_choice(None), _finish_reason(generation))
        if self._include_usage:
            yield {
                **self._head,
                "object": self.stream_object,
                "choices": [],
                "usage": generation.account.usage(),
            }

    def failure(self, problem: problems.Problem) -> bytes:
        return b"data: " + problem.openai_body() + b"\n\n"

    def _chunk(self, choice: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        entry = {"index": 0, "finish_reason": finish_reason, "logprobs": None, **choice}
        usage = {"usage": None} if self._include_usage else {}
        return {**self._head, "object": self.stream_object, "choices": [entry], **usage}


class ChatShape(_OpenAIShape):
    """The text is the message of an assistant."""

    id_prefix = "chatcmpl"
    whole_object, stream_object = "chat.completion", "chat.completion.chunk"

    def whole_choice(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def piece_choice(self, text: str | None) -> dict[str, Any]:
        return {"delta": {} if text is None else {"content": text}}

    def first(self) -> Iterable[dict[str, Any]]:
        return (self._chunk({"delta": {"role": "assistant", "content": ""}}),)


class CompletionShape(_OpenAIShape):
    """The text stands by itself."""

    id_prefix = "cmpl"
    whole_object = stream_object = "text_completion"

    def whole_choice(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def piece_choice(self, text: str | None) -> dict[str, Any]:
        return {"text": text or ""}


def _finish_reason(generation: Generation) -> str:
    """``stop`` or ``length``: clients know no word for an answer that was broken off, so that is an error."""
    account = generation.account
    if account.finish_reason not in ("stop", "length"):
        raise AnswerCancelled(
            f"the answer was ended by the {account.cancelled_by or 'service'} after {account.completion_tokens} tokens",
            account.cancelled_by,
        )
    return account.finish_reason
