"""Owns the shape of every error that leaves the service: problem documents (RFC 9457), a closed list of kinds."""

import math
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from service import errors
from service.json_text import to_json

MEDIA_TYPE = "application/problem+json"


_CHALLENGES = 'Bearer realm="mini-llm", Basic realm="mini-llm", charset="UTF-8"'
# Codes that programs written for OpenAI look at; any other is the kind itself.
_OPENAI_CODES = {
    "context-exceeded": "context_length_exceeded",
    "unsupported-field": "unsupported_parameter",
    "out-of-bounds": "invalid_value",
    "unauthenticated": "invalid_api_key",
    "model-unknown": "model_not_found",
    "key-requests": "rate_limit_exceeded",
    "address-requests": "rate_limit_exceeded",
    "key-parallel": "rate_limit_exceeded",
    "address-parallel": "rate_limit_exceeded",
}


@dataclass(frozen=True)
class Problem:
    """``kind`` is stable and made for programs, ``detail`` is one line for people, ``more`` are further members.

    ``too_late`` says that the same request again would be of no use to who sent it.
    """

    status: int
    kind: str
    detail: str
    more: dict[str, Any]
    retry_after_s: float | None = None
    too_late: bool = False

    def headers(self) -> dict[str, str]:
        """Headers that belong to it beside the content type."""
        headers = {}
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after_s)))
        if self.status == 401:
            headers["WWW-Authenticate"] = _CHALLENGES
        if self.too_late:
            # OpenAI's programs ask again after any 5xx that does not say so: openai-python, _base_client.py.
            headers["X-Should-Retry"] = "false"
        return headers

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
        return to_json(document)

    @property
    def openai_status(self) -> int:
        """Status where OpenAI's clients ask: they know 400 for a value that is out of bounds."""
        return 400 if self.status == 422 else self.status

    def openai_body(self) -> bytes:
        """The document in OpenAI's shape; the request's id stands in the X-Request-Id header, as there."""
        match self.openai_status:
            case 429:
                kind = "rate_limit_error"
            case 403:
                kind = "permission_error"
            case status:
                kind = "server_error" if status >= 500 else "invalid_request_error"
        error = {
            "message": self.detail,
            "type": kind,
            "param": self.more.get("field"),
            "code": openai_code(self.kind),
        }
        return to_json({"error": error})


def openai_code(kind: str) -> str:
    """The ``code`` of OpenAI's error for a kind of problem."""
    return _OPENAI_CODES.get(kind, kind.replace("-", "_"))


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
        case errors.BodyLate():
            return describe_status(408, detail)
        case errors.BodyTooLarge():
            return Problem(413, "body-too-large", detail, {"limit_bytes": error.limit_bytes})
        case errors.MediaTypeUnsupported():
            return Problem(415, "unsupported-media-type", detail, {})
        case errors.FieldOutOfBounds():
            return Problem(422, "out-of-bounds", detail, {"field": error.field, "bound": error.bound})
        case errors.Unavailable():
            kind = error.reason.replace("_", "-")
            return Problem(503, kind, detail, {}, error.retry_after_s, error.too_late)
        case errors.Unauthenticated():
            return Problem(401, "unauthenticated", detail, {})
        case errors.Forbidden():
            return Problem(403, "forbidden", detail, {})
        case errors.LimitReached():
            return Problem(429, error.reason.replace("_", "-"), detail, {}, error.retry_after_s)
        case errors.ModelUnknown():
            return Problem(404, "model-unknown", detail, {"field": "model"})
        case errors.AnswerCancelled():
            return Problem(503, "answer-cancelled", detail, {}, too_late=error.by == "deadline")
        case errors.KeysUnusable():
            detail = "no key can be checked: the key file is missing, empty or damaged; the log says which"
            return Problem(503, "keys-unusable", detail, {}, 60.0)
        case errors.AuditUnwritable() | errors.StateUnwritable():
            detail = "the service cannot keep its records, so it takes no requests; the id stands in the log"
            return Problem(503, "records-unwritable", detail, {}, 60.0)
        case errors.EngineFailed():
            return Problem(500, "engine-failed", "the engine failed on this request; its id stands in the log", {})
    return Problem(500, "internal", "the service failed on this request; its id stands in the log", {})


def describe_status(status: int, detail: str) -> Problem:
    """The problem of a plain HTTP error that is found before or beside the resources (404, 405, 408 …)."""
    phrase = HTTPStatus(status).phrase
    # Python 3.13 has another phrase for 414 than 3.11; a kind stays what it is.
    kind = "uri-too-long" if status == 414 else phrase.lower().replace(" ", "-")
    return Problem(status, kind, detail or phrase, {})
