"""Owns what can go wrong with a bake, for people: one line of what happened, one of what to do, and an exit code."""

import enum
from pathlib import Path


class Exit(enum.IntEnum):
    """Exit codes of every verb."""

    DONE = 0
    FAILED = 1  # a layer could not be baked, or the image did not pass its checks
    USAGE = 2
    REFUSED = 3  # before anything was made: a preflight, or a request that would do harm
    CLOUD = 4  # the cloud's API said no, or could not be reached
    INTERRUPTED = 130


class BakeError(Exception):
    """What ends a verb; ``hint`` says what to do about it."""

    exit = Exit.FAILED

    def __init__(self, message: str, hint: str = ""):
        super().__init__(message)
        self.hint = hint
        self.log: Path | None = None  # of the run that it ended


class LayerFailed(BakeError):
    """Packer could not bake a layer."""


class ChecksFailed(BakeError):
    """The image booted, but is not what it should be."""


class Refused(BakeError):
    """Nothing was made or changed."""

    exit = Exit.REFUSED


class CloudFailed(BakeError):
    """A call of the API failed for good."""

    exit = Exit.CLOUD


class Unavailable(CloudFailed):
    """There is no room for a server of any of the types, at any of the locations."""


class ImageGone(CloudFailed):
    """A snapshot that was there a moment ago is not any more: somebody else has removed it."""


class Interrupted(KeyboardInterrupt):
    """Somebody wants it to end: Ctrl-C or SIGTERM. No BakeError, so that nothing on the way takes it for a failure."""

    exit = Exit.INTERRUPTED

    def __init__(self, message: str, hint: str = ""):
        super().__init__(message)
        self.hint = hint
        self.log: Path | None = None
