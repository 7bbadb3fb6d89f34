"""Owns the checks that schemathesis does not bring: refusals of valid requests that no JSON Schema can foretell."""

import json
from typing import Any

import schemathesis

# Tokens are counted by the engine alone, and a deadline can be too short for any answer.
_TOO_LONG = ("urn:mini-llm:problem:context-exceeded", "context_length_exceeded")
_TOO_LATE = (
    "urn:mini-llm:problem:deadline",
    "deadline",
    "answer_cancelled",
)


@schemathesis.check
def valid_request_is_refused_for_its_length_alone(
    ctx: schemathesis.CheckContext, response: schemathesis.Response, case: schemathesis.Case[Any]
) -> None:
    """A 400 to a request that keeps to the document says that the context is too small for it, and nothing else."""
    valid = case.meta is not None and case.meta.generation.mode.is_positive
    if valid and response.status_code == 400:
        assert _kind(response) in _TOO_LONG, f"refused though it is valid: {response.text}"


@schemathesis.check
def idle_service_is_available(
    ctx: schemathesis.CheckContext, response: schemathesis.Response, case: schemathesis.Case[Any]
) -> None:
    """A service with nothing else to do says 503 to a deadline that it cannot keep, and to nothing else."""
    if response.status_code == 503:
        assert "x-deadline-s" in {name.lower() for name in response.request.headers}, response.text
        assert _kind(response) in _TOO_LATE, f"not available: {response.text}"


def _kind(response: schemathesis.Response) -> str:
    document = json.loads(response.content)
    return str(document["error"]["code"] if "error" in document else document["type"])
