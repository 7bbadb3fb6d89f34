"""Owns the shape of every error that leaves the service: problem documents (RFC 9457), a closed list of kinds."""

import json
import math
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from service import errors

MEDIA_TYPE = "application/problem+json"


@dataclass(frozen=True)
class Problem:
    """``kind`` is stable and made for programs, ``detail`` is one line for people, ``more`` are further members."""

    status: int
    kind: str
    detail: str
    more: dict[str, Any]
    retry_after_s: float | None = None

    def headers(self) -> dict[str, str]:
        """Headers that belong to it beside the content type."""
        if self.retry_after_s is None:
            return {}
        return {"Retry-After": str(max(1, math.ceil(self.retry_after_s)))}

    def body(self, request_id: str) -> bytes:
        """The document."""
        document = {
            "type": f"urn:mini-llm:problem:{self.kind}",
            "title": HTTPStatus(self.status).phrase,
            "status": self.status,
            "detail": self.detail,
            "id": request_id,
            **self.more,
        }
        return json.dumps(document).encode()


def describe_error(error: Exception) -> Problem:
    """The problem that an error of the service is; anything unknown is a 500 without its message."""
    detail = str(error)
    match error:
        case errors.ContextExceeded():
            counts = {
                "prompt_tokens": error.prompt_tokens,
                "max_tokens": error.max_tokens,
                "context_length": error.context_length,
            }
            return Problem(400, "context-exceeded", detail, counts)
        case errors.FieldUnsupported():
            return Problem(400, "unsupported-field", detail, {"field": error.field})
        case errors.RequestMalformed():
            return Problem(400, "malformed", detail, {})
        case errors.BodyTooLarge():
            return Problem(413, "body-too-large", detail, {"limit_bytes": error.limit_bytes})
        case errors.MediaTypeUnsupported():
            return Problem(415, "unsupported-media-type", detail, {})
        case errors.FieldOutOfBounds():
            return Problem(422, "out-of-bounds", detail, {"field": error.field, "bound": error.bound})
        case errors.Unavailable():
            return Problem(503, error.reason.replace("_", "-"), detail, {}, error.retry_after_s)
        case errors.EngineFailed():
            return Problem(500, "engine-failed", "the engine failed on this request; its id stands in the log", {})
    return Problem(500, "internal", "the service failed on this request; its id stands in the log", {})


def describe_status(status: int, detail: str) -> Problem:
    """The problem of a plain HTTP error that is found before or beside the resources (404, 405, 408 …)."""
    phrase = HTTPStatus(status).phrase
    return Problem(status, phrase.lower().replace(" ", "-"), detail or phrase, {})
