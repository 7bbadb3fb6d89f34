"""That the look at calls through Hetzner's document sees what is wrong: every test of the local cloud relies on it."""

import pytest

from tests.hetzner_api import find_operation, problems

KEY = {"id": 1, "name": "k", "fingerprint": "f", "public_key": "p", "labels": {}, "created": "2026-01-01T00:00:00Z"}


@pytest.mark.parametrize(
    ("method", "path", "operation"),
    [
        ("GET", "/servers", "GET /servers"),
        ("GET", "/servers/actions", "GET /servers/actions"),
        ("GET", "/servers/7", "GET /servers/{id}"),
        ("POST", "/servers/7/actions/poweron", "POST /servers/{id}/actions/poweron"),
        ("PATCH", "/servers", None),
        ("GET", "/volumes", None),
    ],
)
def test_calls_are_known_by_method_and_path(method: str, path: str, operation: str | None) -> None:
    """Literal paths before those with an id; what the local cloud does not serve is not known."""
    assert find_operation(method, path) == operation


def test_what_is_right_has_no_problems() -> None:
    """An answer, an error, and a deletion without any answer."""
    assert problems("GET /ssh_keys/{id}", 200, None, {"ssh_key": KEY}) == []
    assert problems("GET /ssh_keys/{id}", 404, None, {"error": {"code": "not_found", "message": "m"}}) == []
    assert problems("DELETE /ssh_keys/{id}", 204, None, None) == []


def test_what_is_wrong_is_told_with_its_place() -> None:
    """A missing field, one of another type, another status, an error without a code, a body that was accepted."""
    [missing] = problems("GET /ssh_keys/{id}", 200, None, {"ssh_key": {**KEY, "name": 1}})
    assert missing.startswith("GET /ssh_keys/{id} 200 ssh_key/name: 1 is not of type")
    without = {name: value for name, value in KEY.items() if name != "labels"}
    assert len(problems("GET /ssh_keys/{id}", 200, None, {"ssh_key": without})) == 1
    [other] = problems("GET /ssh_keys/{id}", 202, None, {"ssh_key": KEY})
    assert other == "GET /ssh_keys/{id}: 202 is not among its answers"
    assert problems("GET /ssh_keys/{id}", 500, None, {"error": {"message": "m"}}) != []
    assert problems("POST /ssh_keys", 201, {"name": 5}, {"ssh_key": KEY}) != []
    assert problems("POST /ssh_keys", 422, {"name": 5}, {"error": {"code": "invalid_input", "message": "m"}}) == []
