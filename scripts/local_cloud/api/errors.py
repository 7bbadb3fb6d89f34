"""Owns the closed list of ways in which the API refuses; ``app`` alone turns them into HTTP."""

from typing import Any


class ApiError(Exception):
    """Base of all refusals; ``status`` and ``code`` are those of the real API, the message is one line for people."""

    status = 500
    code = "server_error"

    def __init__(self, message: str, details: dict[str, Any] | None = None):
        super().__init__(message)
        self.message = message
        self.details = details


class JsonInvalid(ApiError):
    """The body is not JSON, or no object."""

    status, code = 400, "json_error"


class Unauthorized(ApiError):
    """No token came, or not the right one."""

    status, code = 401, "unauthorized"


class LimitExceeded(ApiError):
    """The project has as many of these as it may; ``limit`` names which."""

    status, code = 403, "resource_limit_exceeded"

    def __init__(self, limit: str):
        super().__init__(f"the limit {limit} of this project is reached", {"limits": [{"name": limit}]})


class NotFound(ApiError):
    """There is no such resource or path."""

    status, code = 404, "not_found"


class MethodNotAllowed(ApiError):
    """The path does not take this method."""

    status, code = 405, "method_not_allowed"


class NotUnique(ApiError):
    """A value is in use already that must be unique; ``field`` holds it."""

    status, code = 409, "uniqueness_error"

    def __init__(self, message: str, field: str):
        super().__init__(message, {"fields": [{"name": field, "messages": [message]}]})


class Conflict(ApiError):
    """The resource is in a state that does not allow this now."""

    status, code = 409, "conflict"


class Gone(ApiError):
    """The path was removed from the API; ``announcement`` is where that was said."""

    status, code = 410, "deprecated_api_endpoint"

    def __init__(self, message: str, announcement: str):
        super().__init__(message, {"announcement": announcement})


class InvalidInput(ApiError):
    """Fields of the request are wrong; ``fields`` maps each name to what is wrong with it."""

    status, code = 422, "invalid_input"

    def __init__(self, fields: dict[str, list[str]]):
        names = ", ".join(f"'{name}'" for name in fields)
        first = next(iter(fields.values()))[0]
        message = f"invalid input in field{'s' if len(fields) > 1 else ''} {names}: {first}"
        super().__init__(message, {"fields": [{"name": name, "messages": said} for name, said in fields.items()]})


class Unsupported(ApiError):
    """The resource, or this local cloud, does not have what is asked."""

    status, code = 422, "unsupported_error"


class StateRefused(ApiError):
    """The state of a resource refuses this, with a code of its own such as ``server_not_stopped``."""

    status = 422

    def __init__(self, code: str, message: str, status: int = 422):
        super().__init__(message)
        self.code, self.status = code, status


class Locked(ApiError):
    """An action is running on the resource."""

    status, code = 423, "locked"


class Protected(ApiError):
    """The resource is protected against this."""

    status, code = 423, "protected"


class RateLimited(ApiError):
    """The requests of this hour are used up."""

    status, code = 429, "rate_limit_exceeded"


class Injected(ApiError):
    """A fault of the plan, with the status and code that it asks for."""

    def __init__(self, status: int, code: str, message: str):
        super().__init__(message)
        self.status, self.code = status, code
