"""Owns the settings: the one place that reads the environment, once, with every problem told together.

Each field of ``Settings`` is read from ``LLM_<FIELD IN CAPITALS>``; a variable with that prefix that is none of them
is a problem too, because a misspelt setting that is ignored is found by nobody.
"""

import ipaddress
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from service.errors import SettingsInvalid

PREFIX = "LLM_"


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
    control_socket: Path = Path()
    announce: bool = False
    engine_adapter: str = "service.engine.gpt4all_adapter"

    @property
    def threads_of_server(self) -> int:
        """Threads of the web server: each waiting request holds one, and health must always find one free.

        64 threads were not stalled by 50 connections that drip their bytes (measured); so many stay beside the queue.
        """
        return self.queue_size + 64


def _parse_integer(low: int, high: int) -> Callable[[str], int]:
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


def _parse_loopback(text: str) -> str:
    try:
        loopback = text == "localhost" or ipaddress.ip_address(text).is_loopback
    except ValueError:
        raise ValueError("must be an IP address or localhost") from None
    if not loopback:
        raise ValueError(
            "must be a loopback address such as 127.0.0.1: there are no keys yet, so anyone could use the model"
        )
    return text


def _parse_sha256(text: str) -> str:
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
    "host": Setting(_parse_loopback, "address to listen on (loopback only)"),
    "port": Setting(_parse_integer(1, 65535), "port to listen on"),
    "model": Setting(_parse_text, "a GGUF file's path, or a name of the catalogue"),
    "model_sha256": Setting(_parse_sha256, "digest that the model's file must have"),
    "model_name": Setting(_parse_text, "name to report instead of the file's own"),
    "context_length": Setting(_parse_integer(32, 1 << 20), "tokens; default: what file and memory allow"),
    "threads": Setting(_parse_integer(1, 256), "threads of the engine; default: usable CPUs"),
    "queue_size": Setting(_parse_integer(0, 512), "requests that may wait"),
    "queue_wait_s": Setting(parse_number(0.1, 3600), "longest wait for a turn"),
    "default_max_tokens": Setting(_parse_integer(1, 1 << 20), "max_tokens of a request that names none"),
    "largest_max_tokens": Setting(_parse_integer(1, 1 << 20), "largest max_tokens that may be asked for"),
    "body_limit_bytes": Setting(_parse_integer(1024, 1 << 26), "largest request body"),
    "header_timeout_s": Setting(parse_number(0.1, 600), "time a client has for its request's headers"),
    "body_timeout_s": Setting(parse_number(0.1, 600), "time a client has for headers and body together"),
    "drain_limit_s": Setting(parse_number(0, 3600), "time that accepted requests have when draining"),
    "stall_timeout_s": Setting(parse_number(0.5, 3600), "longest silence of a working engine before it is replaced"),
    "price_eur_per_hour": Setting(parse_number(0, 10000), "price of this machine, for the cost metric"),
    "cache_dir": Setting(_parse_path, "where fetched models are kept"),
    "state_dir": Setting(_parse_path, "where golden answers and verification stamps are kept"),
    "control_socket": Setting(_parse_path, "unix socket of the drain command"),
    "announce": Setting(_parse_switch, "1: print a curl line once the model is ready"),
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
    values.setdefault("control_socket", values["state_dir"] / f"control-{values.get('port', Settings.port)}.sock")
    if len(os.fsencode(values["control_socket"])) > 100:  # sun_path holds 108 bytes, unix(7)
        problems.append(f"LLM_CONTROL_SOCKET={str(values['control_socket'])!r}: must be at most 100 bytes long")
    settings = Settings(**values)
    if settings.default_max_tokens > settings.largest_max_tokens:
        problems.append("LLM_DEFAULT_MAX_TOKENS: must not be above LLM_LARGEST_MAX_TOKENS")
    if settings.header_timeout_s > settings.body_timeout_s:
        problems.append("LLM_HEADER_TIMEOUT_S: must not be above LLM_BODY_TIMEOUT_S")
    if problems:
        raise SettingsInvalid(problems)
    return settings


def check_folders(settings: Settings) -> None:
    """Makes the folders that the service writes to. Raises SettingsInvalid with every one that cannot be written."""
    problems = []
    folders = {"LLM_STATE_DIR": settings.state_dir, "LLM_CONTROL_SOCKET": settings.control_socket.parent}
    for variable, folder in folders.items():
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if not os.access(folder, os.W_OK | os.X_OK):
                raise PermissionError(13, "not writable")
        except OSError as error:
            problems.append(f"{variable}: the folder {folder} cannot be used ({error.strerror})")
    if problems:
        raise SettingsInvalid(problems)


def describe_settings(settings: Settings) -> list[str]:
    """One line a setting: variable, value, meaning."""
    return [
        f"{PREFIX}{field.name.upper()}={'' if (value := getattr(settings, field.name)) is None else value}"
        f"    # {SETTINGS[field.name].describe}"
        for field in fields(settings)
    ]
