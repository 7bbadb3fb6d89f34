"""Owns the settings: the one place that reads the environment, once, with every problem told together.

Each field of ``Settings`` is read from ``LLM_<FIELD IN CAPITALS>``; a variable with that prefix that is none of them
is a problem too, because a misspelt setting that is ignored is found by nobody.
"""

import ipaddress
import json
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from service.errors import SettingsInvalid
from service.keys import Limits

PREFIX = "LLM_"
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True)
class Setting:
    """How one field is read: its parser, and the line of documentation shown by ``check``."""

    parse: Callable[[str], Any]
    describe: str


@dataclass(frozen=True)
class Settings:
    """All settings, typed; durations in seconds, sizes in bytes."""

    host: str = "127.0.0.1"
    port: int = 8080
    auth: str | None = None
    keys_file: Path = Path()
    revoked_file: Path = Path()
    trusted_proxies: tuple[Network, ...] = ()
    address_requests_per_minute: int | None = None
    address_tokens_per_day: int | None = None
    address_parallel: int | None = None
    model: str = "starter"
    model_sha256: str | None = None
    model_name: str | None = None
    context_length: int | None = None
    threads: int | None = None
    queue_size: int = 16
    queue_wait_s: float = 120.0
    default_max_tokens: int = 256
    largest_max_tokens: int = 4096
    body_limit_bytes: int = 1_048_576
    header_timeout_s: float = 5.0
    body_timeout_s: float = 20.0
    drain_limit_s: float = 300.0
    stall_timeout_s: float = 60.0
    price_eur_per_hour: float = 0.0
    cache_dir: Path = Path()
    state_dir: Path = Path()
    audit_dir: Path = Path()
    audit_begin: str | None = None
    node: str = ""
    control_socket: Path = Path()
    announce: bool = False
    problem_file: Path | None = None
    image_file: Path | None = None
    boot_dir: Path | None = None
    engine_adapter: str = "service.engine.gpt4all_adapter"

    @property
    def threads_of_server(self) -> int:
        """Threads of the web server: each waiting request holds one, and health must always find one free.

        64 threads were not stalled by 50 connections that drip their bytes (measured); so many stay beside the queue.
        """
        return self.queue_size + 64

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the service."""
        return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback

    @property
    def keys_required(self) -> bool:
        """Whether a request needs a key: always, unless that was switched off in so many words."""
        return self.auth != "off"

    @property
    def address_limits(self) -> Limits:
        """What one client address may use."""
        return Limits(self.address_requests_per_minute, self.address_tokens_per_day, self.address_parallel)


def parse_integer(low: int, high: int) -> Callable[[str], int]:
    """A parser for whole numbers within bounds, both included; it raises ValueError with the bounds."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise ValueError(f"must be a whole number from {low} to {high}") from None
        if not low <= value <= high:
            raise ValueError(f"must be a whole number from {low} to {high}")
        return value

    return parse


def parse_number(low: float, high: float) -> Callable[[str], float]:
    """A parser for finite numbers within bounds, both included; it raises ValueError with the bounds."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise ValueError(f"must be a number from {low:g} to {high:g}") from None
        if not low <= value <= high:  # refuses NaN too
            raise ValueError(f"must be a number from {low:g} to {high:g}")
        return value

    return parse


def _parse_host(text: str) -> str:
    try:
        if text != "localhost":
            ipaddress.ip_address(text)
    except ValueError:
        raise ValueError("must be an IP address or localhost") from None
    return text


def _parse_auth(text: str) -> str:
    if text not in ("keys", "off"):
        raise ValueError("must be keys or off")
    return text


def _parse_networks(text: str) -> tuple[Network, ...]:
    try:
        return tuple(ipaddress.ip_network(part.strip()) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise ValueError(f"must be addresses or networks, as 127.0.0.1,10.0.0.0/8: {error}") from None


def parse_sha256(text: str) -> str:
    """A digest in lower case; it raises ValueError for anything else."""
    if len(text) != 64 or any(letter not in "0123456789abcdef" for letter in text.lower()):
        raise ValueError("must be 64 hexadecimal digits")
    return text.lower()


def _parse_text(text: str) -> str:
    if not text.strip():
        raise ValueError("must not be empty")
    return text.strip()


def _parse_switch(text: str) -> bool:
    if text not in ("0", "1"):
        raise ValueError("must be 0 or 1")
    return text == "1"


def _parse_path(text: str) -> Path:
    path = Path(_parse_text(text)).expanduser()
    if not path.is_absolute():
        raise ValueError("must be an absolute path")
    return path


SETTINGS: dict[str, Setting] = {
    "host": Setting(_parse_host, "address to listen on"),
    "port": Setting(parse_integer(1, 65535), "port to listen on"),
    "auth": Setting(_parse_auth, "keys: a request needs a key (default); off: none, on loopback only"),
    "revoked_file": Setting(_parse_path, "where the hashes of revoked keys are kept"),
    "keys_file": Setting(_parse_path, "where the keys' hashes are kept"),
    "trusted_proxies": Setting(_parse_networks, "proxies whose X-Forwarded-For is believed"),
    "address_requests_per_minute": Setting(parse_integer(1, 1_000_000), "requests a client address may send a minute"),
    "address_tokens_per_day": Setting(parse_integer(1, 1 << 40), "tokens generated for a client address a day"),
    "address_parallel": Setting(parse_integer(1, 1_000_000), "requests a client address may have at the same time"),
    "model": Setting(_parse_text, "a GGUF file's path, or a name of the catalogue"),
    "model_sha256": Setting(parse_sha256, "digest that the model's file must have"),
    "model_name": Setting(_parse_text, "name to report instead of the file's own"),
    "context_length": Setting(parse_integer(32, 1 << 20), "tokens; default: what file and memory allow"),
    "threads": Setting(parse_integer(1, 256), "threads of the engine; default: usable CPUs, for a tiny model 1"),
    "queue_size": Setting(parse_integer(0, 512), "requests that may wait"),
    "queue_wait_s": Setting(parse_number(0.1, 3600), "longest wait for a turn"),
    "default_max_tokens": Setting(parse_integer(1, 1 << 20), "max_tokens of a request that names none"),
    "largest_max_tokens": Setting(parse_integer(1, 1 << 20), "largest max_tokens that may be asked for"),
    "body_limit_bytes": Setting(parse_integer(1024, 1 << 26), "largest request body"),
    "header_timeout_s": Setting(parse_number(0.1, 600), "time a client has for its request's headers"),
    "body_timeout_s": Setting(parse_number(0.1, 600), "time a client has for headers and body together"),
    "drain_limit_s": Setting(parse_number(0, 3600), "time that accepted requests have when draining"),
    "stall_timeout_s": Setting(parse_number(0.5, 3600), "longest silence of a working engine before it is replaced"),
    "price_eur_per_hour": Setting(parse_number(0, 10000), "price of this machine, for the cost metric"),
    "cache_dir": Setting(_parse_path, "where fetched models are kept"),
    "state_dir": Setting(_parse_path, "where golden answers, verification stamps and counters are kept"),
    "audit_dir": Setting(_parse_path, "where the audit log is kept"),
    "audit_begin": Setting(parse_sha256, "hash of another node's last audit line, for the chain to begin from"),
    "node": Setting(_parse_text, "this node's name in the audit log"),
    "control_socket": Setting(_parse_path, "unix socket of the drain command"),
    "announce": Setting(_parse_switch, "1: print a curl line once the model is ready"),
    "problem_file": Setting(_parse_path, "a file that says, if it exists, why this node must not serve"),
    "image_file": Setting(_parse_path, "a JSON file that says what image this is, shown by /version"),
    "boot_dir": Setting(_parse_path, "a folder where a node's units note when what happened, for /version"),
    "engine_adapter": Setting(_parse_text, "module of the engine's adapter"),
}


def read_settings(environment: Mapping[str, str] = os.environ) -> Settings:
    """Parses the environment. Raises SettingsInvalid with every problem found."""
    problems: list[str] = []
    values: dict[str, Any] = {}
    for name, setting in SETTINGS.items():
        text = environment.get(PREFIX + name.upper())
        if text is None:
            continue
        try:
            values[name] = setting.parse(text)
        except ValueError as error:
            problems.append(f"{PREFIX}{name.upper()}={text!r}: {error}")
    known = {PREFIX + name.upper() for name in SETTINGS}
    for variable in sorted(environment):
        if variable.startswith(PREFIX) and variable not in known:
            problems.append(f"{variable}: there is no such setting")
    home = Path(environment.get("HOME") or "/nonexistent")
    cache = Path(environment.get("XDG_CACHE_HOME") or home / ".cache") / "mini-llm"
    state = Path(environment.get("XDG_STATE_HOME") or home / ".local" / "state") / "mini-llm"
    values.setdefault("cache_dir", cache)
    values.setdefault("state_dir", state)
    values.setdefault("keys_file", values["state_dir"] / "keys.json")
    values.setdefault("revoked_file", values["state_dir"] / "revoked")
    values.setdefault("audit_dir", values["state_dir"] / "audit")
    values.setdefault("node", socket.gethostname())
    values.setdefault("control_socket", values["state_dir"] / f"control-{values.get('port', Settings.port)}.sock")
    if len(os.fsencode(values["control_socket"])) > 100:  # sun_path holds 108 bytes, unix(7)
        problems.append(f"LLM_CONTROL_SOCKET={str(values['control_socket'])!r}: must be at most 100 bytes long")
    settings = Settings(**values)
    if settings.default_max_tokens > settings.largest_max_tokens:
        problems.append("LLM_DEFAULT_MAX_TOKENS: must not be above LLM_LARGEST_MAX_TOKENS")
    if settings.header_timeout_s > settings.body_timeout_s:
        problems.append("LLM_HEADER_TIMEOUT_S: must not be above LLM_BODY_TIMEOUT_S")
    if not settings.keys_required and not settings.is_loopback:
        problems.append("LLM_AUTH=off: only for a loopback LLM_HOST such as 127.0.0.1, or anyone could use the model")
    if problems:
        raise SettingsInvalid(problems)
    return settings


def check_folders(settings: Settings) -> None:
    """Makes the folders that the service writes to. Raises SettingsInvalid with every one that cannot be written."""
    problems = []
    folders = {
        "LLM_STATE_DIR": settings.state_dir,
        "LLM_CONTROL_SOCKET": settings.control_socket.parent,
        "LLM_AUDIT_DIR": settings.audit_dir,
    }
    for variable, folder in folders.items():
        try:
            if not folder.exists():
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
                above = folder.parent.stat()
                if os.geteuid() == 0 and (above.st_uid, above.st_gid) != (0, 0):
                    # Made by root for a service of another user, who may have put a link in its place by now.
                    os.chown(folder, above.st_uid, above.st_gid, follow_symlinks=False)
            if not os.access(folder, os.W_OK | os.X_OK):
                raise PermissionError(13, "not writable")
        except OSError as error:
            problems.append(f"{variable}: the folder {folder} cannot be used ({error.strerror})")
    if problems:
        raise SettingsInvalid(problems)


def read_image(settings: Settings) -> dict[str, str] | None:
    """Version and time of the image that this node was baked as, None elsewhere. Raises SettingsInvalid."""
    if settings.image_file is None:
        return None
    try:
        document = json.loads(settings.image_file.read_text())
        return {name: str(document[name]) for name in ("version", "baked")}
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise SettingsInvalid([f"LLM_IMAGE_FILE: {settings.image_file} cannot be used ({error})"]) from error


def describe_settings(settings: Settings) -> list[str]:
    """One line a setting: variable, value, meaning."""
    return [
        f"{PREFIX}{field.name.upper()}={_render(getattr(settings, field.name))}    # {SETTINGS[field.name].describe}"
        for field in fields(settings)
    ]


def _render(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return "" if value is None else str(value)
