"""Owns the keys: who may use the service, the file that remembers them by their hashes, and the look at a credential.

A key is shown once, when it is made. The file holds its SHA-256 alone: a key has 192 random bits, so nobody finds it
from the hash, and a slow hash as for passwords would only slow every request down.
"""

import base64
import binascii
import errno
import fcntl
import hashlib
import hmac
import json
import os
import re
import secrets
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from service.errors import KeysUnusable, Unauthenticated

SCOPES = ("generate", "metrics", "admin")
NAME_RULE = "1 to 64 letters, digits, dots, dashes or underscores, the first a letter or digit"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)
# Leaked keys are found by such a prefix, by people and by programs that scan for them.
_PREFIX = "mllm_"
_RANDOM_BYTES = 24
_LARGEST_FILE_BYTES = 16 << 20


@dataclass(frozen=True)
class Limits:
    """What one key, or one address, may use at most; None is no limit. Tokens are those generated."""

    requests_per_minute: int | None = None
    tokens_per_day: int | None = None
    parallel: int | None = None


@dataclass(frozen=True)
class Key:
    """One key as the file remembers it; times are in UTC."""

    name: str
    sha256: str
    created: datetime
    scopes: frozenset[str] = frozenset({"generate"})
    expires: datetime | None = None
    limits: Limits = field(default_factory=Limits)


class KeyFile:
    """The keys of a running service: read again whenever a file has changed, so that nothing needs a restart.

    What stands in the file ``revoked`` is no key any more, whoever writes the other file anew: a node's is made at each
    boot, from facts that may still name it.
    """

    def __init__(self, path: Path, revoked: Path | None = None):
        self._path, self._revoked = path, revoked
        self._lock = threading.Lock()
        self._seen: tuple[tuple[int, ...] | None, ...] | None = None
        self._keys: tuple[Key, ...] = ()

    def read(self) -> tuple[Key, ...]:
        """The keys of this moment. Raises KeysUnusable if the file is missing, unreadable, damaged or empty."""
        try:
            signature = (_sign(self._path), self._sign_revoked())
        except OSError as error:
            raise KeysUnusable(f"the key file cannot be read ({error.strerror})") from error
        if signature != self._seen:
            with self._lock:
                revoked = read_revoked(self._revoked) if signature[1] and self._revoked else frozenset()
                self._keys = tuple(key for key in read_keys(self._path) if key.sha256 not in revoked)
                self._seen = signature
        if not self._keys:
            raise KeysUnusable("there are no keys")
        return self._keys

    def _sign_revoked(self) -> tuple[int, ...] | None:
        try:
            return _sign(self._revoked) if self._revoked else None
        except FileNotFoundError:
            return None  # nobody was revoked yet

    def authenticate(self, header: str | None) -> Key:
        """The key that an Authorization header proves. Raises Unauthenticated, or KeysUnusable."""
        keys = self.read()
        name, secret = parse_credential(header)
        digest = hash_key(secret)
        found = None
        for key in keys:  # all of them, whatever was found: the time tells nothing
            if hmac.compare_digest(key.sha256, digest):
                found = key
        if found is None or (name is not None and name != found.name):
            raise Unauthenticated("the key is not valid here: it is wrong, was revoked, or has another name")
        if found.expires is not None and found.expires <= datetime.now(UTC):
            raise Unauthenticated("the key has expired")
        return found


def _sign(path: Path) -> tuple[int, ...]:
    """What is another one once a file has changed: whoever writes it replaces it; ctime is for edits by hand."""
    found = os.stat(path)  # noqa: PTH116 (a Path costs twice the time)
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def hash_key(secret: str) -> str:
    """SHA-256 of a key, in hexadecimal."""
    return hashlib.sha256(secret.encode()).hexdigest()


def parse_credential(header: str | None) -> tuple[str | None, str]:
    """Name (if one was given) and key of an Authorization header: Bearer, or Basic with the key as its password.

    Basic with an empty password takes the user name for the key, as ``curl -u KEY:`` sends it. Raises Unauthenticated.
    """
    if header is None:
        raise Unauthenticated("a key is needed: send it as Authorization: Bearer KEY, or with curl -u NAME:KEY")
    scheme, _, rest = header.strip().partition(" ")
    match scheme.lower():
        case "bearer" if rest.strip():
            return None, rest.strip()
        case "basic":
            try:
                name, separator, password = base64.b64decode(rest.strip(), validate=True).decode().partition(":")
            except (binascii.Error, ValueError) as error:
                raise Unauthenticated("the Basic credential is not valid Base64 of NAME:KEY") from error
            if separator and (name or password):
                return (name or None, password) if password else (None, name)
            raise Unauthenticated("the Basic credential must be NAME:KEY")
    raise Unauthenticated("the Authorization header must be Bearer KEY or Basic")


def read_keys(path: Path) -> tuple[Key, ...]:
    """The keys of a file; nothing in it is passed over. Raises KeysUnusable."""
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST_FILE_BYTES + 1)
    except OSError as error:
        raise KeysUnusable(f"the key file cannot be read ({error.strerror})") from error
    if len(content) > _LARGEST_FILE_BYTES:
        raise KeysUnusable("the key file is too large")
    try:
        document = json.loads(content)
        keys = tuple(_parse_key(entry) for entry in document["keys"])
        if set(document) != {"keys"}:
            raise ValueError("it must hold keys and nothing else")
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise KeysUnusable(f"the key file is damaged ({type(error).__name__}: {error})") from error
    for attribute in ("name", "sha256"):
        if len({getattr(key, attribute) for key in keys}) != len(keys):
            raise KeysUnusable(f"the key file is damaged (two keys have the same {attribute})")
    return keys


def _parse_key(entry: dict[str, Any]) -> Key:
    fields = dict(entry)
    limits = Limits(**fields.pop("limits", {}))
    for name, value in asdict(limits).items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} must be a whole number above 0")
    scopes = frozenset(fields.pop("scopes"))
    expires = fields.pop("expires", None)
    key = Key(
        created=_parse_time(fields.pop("created")),
        expires=None if expires is None else _parse_time(expires),
        scopes=scopes,
        limits=limits,
        **fields,
    )
    if not _NAME.fullmatch(key.name) or not _SHA256.fullmatch(key.sha256) or not scopes <= set(SCOPES):
        raise ValueError("a name, a SHA-256 or a scope is not valid")
    return key


def _parse_time(text: str) -> datetime:
    time = datetime.fromisoformat(text)
    if time.tzinfo is None:
        raise ValueError("a time must say its zone")
    return time


def parse_expiry(text: str, now: datetime) -> datetime:
    """When a key expires, from ``30d``, ``12h``, a date (its end, in UTC) or an ISO time. Raises ValueError."""
    span = re.fullmatch(r"([1-9][0-9]{0,4})([dh])", text, re.ASCII)
    if span is not None:
        return now + (timedelta(days=int(span[1])) if span[2] == "d" else timedelta(hours=int(span[1])))
    try:
        if re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", text, re.ASCII):
            expires = datetime.fromisoformat(text).replace(tzinfo=UTC) + timedelta(days=1)
        else:
            expires = datetime.fromisoformat(text)
            expires = expires.replace(tzinfo=expires.tzinfo or UTC)
    except (ValueError, OverflowError):
        raise ValueError("must be like 30d, 12h, 2027-01-31 or 2027-01-31T12:00Z") from None
    if expires <= now:
        raise ValueError("is in the past")
    return expires


def check_name(name: str) -> str:
    """The name, if a key may have it. Raises ValueError with the rule."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"must be {NAME_RULE}")
    return name


def add_key(
    path: Path,
    name: str,
    scopes: frozenset[str] = frozenset({"generate"}),
    expires: datetime | None = None,
    limits: Limits | None = None,
) -> str:
    """Makes a key, writes its hash to the file (made if missing), and returns the key: the only time it is seen.

    Raises KeysUnusable if the file cannot be read or written, ValueError for a name that is taken.
    """
    secret = _PREFIX + secrets.token_urlsafe(_RANDOM_BYTES)
    key = Key(check_name(name), hash_key(secret), datetime.now(UTC), scopes, expires, limits or Limits())
    with _changing(path) as keys:
        if any(other.name == name for other in keys):
            raise ValueError(f"there is a key of the name {name} already; revoke it first, or take another name")
        keys.append(key)
    return secret


def revoke_key(path: Path, name: str, revoked: Path | None = None) -> Key:
    """Takes a key out of the file and returns what it was; its hash is kept in ``revoked``.

    Raises ValueError if there is none of that name, KeysUnusable.
    """
    with _changing(path) as keys:
        for key in keys:
            if key.name == name:
                if revoked is not None:
                    _replace(revoked, "".join(f"{digest}\n" for digest in sorted(read_revoked(revoked) | {key.sha256})))
                keys.remove(key)
                return key
        raise ValueError(f"there is no key of the name {name}")


def read_revoked(path: Path) -> frozenset[str]:
    """The hashes of keys that were revoked, from a file with one a line. Raises KeysUnusable if it is damaged."""
    try:
        lines = path.read_text(encoding="ascii").split() if path.exists() else []
    except (OSError, UnicodeDecodeError) as error:
        raise KeysUnusable(f"the list of revoked keys cannot be read ({type(error).__name__})") from error
    if not all(_SHA256.fullmatch(line) for line in lines):
        raise KeysUnusable("the list of revoked keys is damaged (a line is no SHA-256)")
    return frozenset(lines)


@contextmanager
def _changing(path: Path) -> Iterator[list[Key]]:
    """The keys as a list to change; one process at a time, and the file is replaced as a whole or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        place = path.with_name(path.name + ".lock")
        descriptor = os.open(place, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
        with os.fdopen(descriptor, "w") as lock:
            _give_to(descriptor, path.parent)
            fcntl.flock(lock, fcntl.LOCK_EX)
            keys = list(read_keys(path)) if path.exists() else []
            yield keys
            _write_keys(path, keys)
    except OSError as error:
        raise KeysUnusable(f"the key file {path} cannot be written ({error.strerror})") from error


def _give_to(descriptor: int, place: Path) -> None:
    """Root adds keys for a service that runs as another user: a file belongs to the owner of its place.

    That user may have laid a link to somebody else's file there, which root must not give away: links of names are not
    followed by who opens, and a file of several names is refused here. Raises PermissionError.
    """
    opened = os.fstat(descriptor)
    if not stat.S_ISREG(opened.st_mode) or opened.st_nlink != 1:
        raise PermissionError(errno.EPERM, "a file of its folder is a link")
    found = place.stat()
    if os.geteuid() == 0 and (found.st_uid, found.st_gid) != (0, 0):
        os.fchown(descriptor, found.st_uid, found.st_gid)


def _write_keys(path: Path, keys: list[Key]) -> None:
    _replace(path, json.dumps({"keys": [_render_key(key) for key in keys]}, indent=1))


def _replace(path: Path, text: str) -> None:
    """Replaces a file as a whole, on the disk as well; raises OSError."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        draft.unlink(missing_ok=True)
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            if path.exists():
                os.fchmod(descriptor, path.stat().st_mode & 0o777)
            _give_to(descriptor, path if path.exists() else path.parent)
            file.write(text)
            file.flush()
            os.fsync(descriptor)
        draft.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        draft.unlink(missing_ok=True)


def _render_key(key: Key) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": key.name, "sha256": key.sha256, "scopes": sorted(key.scopes)}
    entry["created"] = key.created.isoformat(timespec="seconds")
    if key.expires is not None:
        entry["expires"] = key.expires.isoformat(timespec="seconds")
    limits = {name: value for name, value in asdict(key.limits).items() if value is not None}
    if limits:
        entry["limits"] = limits
    return entry


def describe_key(key: Key) -> dict[str, Any]:
    """What may be told of a key: all but its hash."""
    return {name: value for name, value in _render_key(key).items() if name != "sha256"}
