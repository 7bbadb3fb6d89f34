"""Owns the closed list of domain errors: every way a request, a setting or a model can be refused.

This module imports nothing of the project, so that every layer may raise these and only the boundaries
(``app`` for HTTP, ``__main__`` for the command line, the engine's worker for its pipe) translate them.
"""


class ServiceError(Exception):
    """Base of all errors that the service raises on purpose; the message is one clear line for a person."""


class SettingsInvalid(ServiceError):
    """The environment holds wrong settings; ``problems`` lists every one of them, one line each."""

    def __init__(self, problems: list[str]):
        super().__init__("; ".join(problems))
        self.problems = problems


class ModelRefused(ServiceError):
    """The model file is missing, damaged, unknown, of the wrong hash or too big: starting again will not help."""


class MemoryShort(ServiceError):
    """The model does not fit the memory that is free now; that may change."""


class StateUnwritable(ServiceError):
    """What must be remembered cannot be written: a full disk, or a folder of somebody else's."""


class FetchFailed(ServiceError):
    """A model could not be downloaded; what has arrived is kept and the next try goes on from there."""


class FetchGaveUp(FetchFailed):
    """Where it comes from, or the way to it, has failed again and again; later it may work."""


class RequestMalformed(ServiceError):
    """The request cannot be understood (400)."""


class FieldUnsupported(RequestMalformed):
    """The request asks for something that the engine cannot honour (400): told, never ignored."""

    def __init__(self, field: str, why: str):
        super().__init__(f"{field}: {why}")
        self.field = field


class FieldOutOfBounds(ServiceError):
    """One field is well-formed but outside its bounds (422)."""

    def __init__(self, field: str, bound: str):
        super().__init__(f"{field}: {bound}")
        self.field = field
        self.bound = bound


class BodyLate(ServiceError):
    """The body did not arrive in time (408)."""

    def __init__(self, timeout_s: float):
        super().__init__(f"the request did not arrive within {timeout_s:g} s")


class BodyTooLarge(ServiceError):
    """The body exceeds the limit in bytes (413)."""

    def __init__(self, limit_bytes: int):
        super().__init__(f"the body may hold at most {limit_bytes} bytes")
        self.limit_bytes = limit_bytes


class MediaTypeUnsupported(ServiceError):
    """The body is not declared as JSON (415)."""


class ContextExceeded(ServiceError):
    """Prompt and requested tokens do not fit the context (400).

    All figures are tokens, counted exactly; a prompt that alone is too long may have more than ``prompt_tokens``.
    """

    def __init__(self, prompt_tokens: int, max_tokens: int, context_length: int):
        least = "at least " if prompt_tokens > context_length else ""
        super().__init__(
            f"the prompt has {least}{prompt_tokens} tokens and max_tokens asks for {max_tokens} more, "
            f"but the context holds {context_length} tokens"
        )
        self.prompt_tokens = prompt_tokens
        self.max_tokens = max_tokens
        self.context_length = context_length


class Unavailable(ServiceError):
    """The request cannot be served now (503); ``reason`` is the kind of problem.

    ``retry_after_s`` is the predicted wait in seconds, None where waiting would not help.
    """

    def __init__(self, reason: str, message: str, retry_after_s: float | None):
        super().__init__(message)
        self.reason = reason
        self.retry_after_s = retry_after_s

    @property
    def too_late(self) -> bool:
        """Whether its own deadline is the reason, however few others wait."""
        return self.reason == "deadline" and self.retry_after_s is None

    @property
    def label(self) -> str:
        """The reason as the refusals metric has it: an alert tells of those who had to wait for others."""
        return "deadline_too_short" if self.too_late else self.reason


class EngineFailed(ServiceError):
    """The engine died or failed while it worked on this request (500)."""


class EngineLost(EngineFailed):
    """The engine's process ended; the request that was running is lost, all others are not.

    ``begun`` tells whether the engine had this request in its hands, so that it may be what ended it.
    """

    def __init__(self, message: str, begun: bool = True):
        super().__init__(message)
        self.begun = begun


class Unauthenticated(ServiceError):
    """No valid key came with the request (401); the message says what to do, never what was sent."""


class Forbidden(ServiceError):
    """The key is valid but its scopes do not hold what the request needs (403)."""


class KeysUnusable(ServiceError):
    """The key file is missing, empty, unreadable or damaged: everything is refused until that is mended (503)."""


class LimitReached(ServiceError):
    """A limit of the key or of the address is reached (429); ``reason`` is a label of the refusals metric.

    ``retry_after_s`` is when there is room again, in seconds.
    """

    def __init__(self, reason: str, message: str, retry_after_s: float):
        super().__init__(message)
        self.reason = reason
        self.retry_after_s = retry_after_s


class ModelUnknown(ServiceError):
    """The request names another model than the one that is served (404)."""


class AnswerCancelled(ServiceError):
    """The answer was ended before its time, where no finish reason can say so; ``by`` is ``deadline`` or ``drain``."""

    def __init__(self, message: str, by: str | None):
        super().__init__(message)
        self.by = by


class AuditUnwritable(ServiceError):
    """An audit line cannot be written: what cannot be proven later is not done."""
