"""Owns the command line: ``python -m service serve | check | record | fetch | drain | keys | audit``.

Exit codes: 0 done, 1 failed with one line that says why, 2 wrong usage or settings, 130 interrupted.
"""

import argparse
import json
import os
import socket
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path

from service.audit import AuditLog
from service.audit_verify import describe_report, last_link, verify
from service.control import ask_to_drain
from service.engine.process import EngineProcess, engine_settings
from service.errors import ServiceError, SettingsInvalid
from service.golden import find_golden, golden_path
from service.keys import (
    NAME_RULE,
    SCOPES,
    Limits,
    add_key,
    check_name,
    describe_key,
    parse_expiry,
    read_keys,
    revoke_key,
)
from service.models import ModelFile, fetch, open_verified, resolve
from service.settings import (
    PREFIX,
    SETTINGS,
    Settings,
    check_folders,
    describe_settings,
    parse_integer,
    parse_number,
    parse_sha256,
    read_settings,
)

_ROOT = Path(__file__).resolve().parents[1]
_READING = ("audit", "drain")  # commands that need no folder to write to


class PortTaken(ServiceError):
    """Something listens where the service should."""


class RecordingFailed(ServiceError):
    """The golden answer could not be recorded."""


class KeyRefused(ServiceError):
    """A change of the keys is not possible as asked for."""


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _command() -> str:
    """This command line as it can be typed where it was typed now; a checkout's Python is nobody's ``python``."""
    own = Path(".venv") / "bin" / "python"
    is_own = Path(sys.prefix) == _ROOT / ".venv" and Path.cwd() == _ROOT
    return f"{own if is_own else 'python'} -m service"


def _have_model(settings: Settings) -> ModelFile:
    """The model's file, fetched first if it is one of the catalogue's and not there yet."""
    folder = settings.cache_dir / "models"
    model = resolve(settings.model, folder)
    if model.entry is None:
        return model
    fetch(model.entry, folder, sys.stderr)
    return resolve(settings.model, folder)  # now with its digest


def _record(settings: Settings, model: ModelFile) -> None:
    """Loads the model once and records its golden answer, unless there is one already."""
    _say(f"Checking {model.path.name} and recording its golden answer, once …")
    engine = EngineProcess(engine_settings(settings, golden="record"))
    engine.start()
    try:
        if not engine.wait_ready(1800.0):
            raise RecordingFailed(engine.state.reason)
        description = engine.describe()
        assert description is not None
        recorded = find_golden(settings.state_dir, description.sha256)
        assert recorded is not None
        _say(f"{description.model} ({description.quantization}) answers {recorded.response!r};")
        _say(f"kept in {golden_path(settings.state_dir, description.sha256)}")
    finally:
        engine.stop()


def _identify(settings: Settings, model: ModelFile) -> str:
    """The SHA-256 of the model's file, verified; hashing a large file takes a while, once."""
    _say(f"Verifying {model.path.name} …")
    verified = open_verified(model.path, settings.model_sha256 or model.sha256, settings.state_dir / "verified")
    verified.file.close()
    return verified.sha256


def _check_port(settings: Settings) -> None:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError as error:
            raise PortTaken(
                f"cannot listen on {settings.host}:{settings.port} ({error.strerror}); "
                "choose another port, for example: make serve PORT=8081"
            ) from error


def serve(settings: Settings) -> None:
    """Makes ready what is missing, then becomes gunicorn (the same process, so signals reach it)."""
    _check_port(settings)
    model = _have_model(settings)
    sha256 = _identify(settings, model)
    if find_golden(settings.state_dir, sha256) is None:
        _record(settings, model)
    if model.entry is None and settings.model == "starter":
        _say("The starter model shows that the system works; it knows this project and nothing else.")
    environment = dict(os.environ)
    environment[PREFIX + "ANNOUNCE"] = "1"
    # On a machine of one's own, for its own programs, keys are in the way; anywhere else they are what protects it.
    if settings.auth is None and settings.is_loopback:
        environment[PREFIX + "AUTH"] = "off"
        keys = "without keys: only this machine can reach it"
    elif settings.keys_required:
        _make_first_key(settings)
        keys = "a key is needed"
    else:
        keys = "without keys, as LLM_AUTH=off says"
    if not settings.is_loopback:
        _say("This is plain HTTP: keys and prompts cross the network readable. Put a proxy with TLS in front of it.")
    _say(f"Serving on http://{settings.host}:{settings.port} ({keys}); Ctrl-C ends it.")
    # Meant for other services of this user; an address in it would get around the check of LLM_HOST.
    environment.pop("GUNICORN_CMD_ARGS", None)
    # The very file that was verified, also if the engine is started again after somebody has changed it.
    environment[PREFIX + "MODEL"] = str(model.path.resolve())
    environment[PREFIX + "MODEL_SHA256"] = sha256
    os.chdir(_ROOT)
    config = str(_ROOT / "service" / "gunicorn.conf.py")
    os.execve(sys.executable, [sys.executable, "-m", "gunicorn", "-c", config], environment)  # noqa: S606 (meant)


def _make_first_key(settings: Settings) -> None:
    """Where nobody could get in, a first key is made and shown, this once."""
    path = settings.keys_file
    if path.exists() and read_keys(path):
        return
    if not sys.stderr.isatty():  # a journal or a file would keep it
        raise KeyRefused(f"there are no keys yet; make one with: {_command()} keys add NAME")
    secret = _add_key(settings, "first", frozenset(SCOPES), None, Limits())
    _say(f"A first key was made; it is shown only now. Its scopes: {', '.join(SCOPES)}.\n\n  export LLM_KEY={secret}\n")


def _add_key(settings: Settings, name: str, scopes: frozenset[str], expires: datetime | None, limits: Limits) -> str:
    try:
        with closing(_audit(settings)) as audit:
            secret = add_key(settings.keys_file, name, scopes, expires, limits)
            until = None if expires is None else expires.isoformat(timespec="seconds")
            try:
                audit.write("key-added", key=name, scopes=sorted(scopes), expires=until, limits=_known(limits))
            except BaseException:
                # There is no key that the log does not know of.
                revoke_key(settings.keys_file, name, settings.revoked_file)
                raise
    except ValueError as error:
        raise KeyRefused(str(error)) from error
    return secret


def _audit(settings: Settings) -> AuditLog:
    return AuditLog(settings.audit_dir, begin=settings.audit_begin, node=settings.node)


def _known(limits: Limits) -> dict[str, int]:
    return {one.name: value for one in fields(limits) if (value := getattr(limits, one.name)) is not None}


def change_keys(settings: Settings, options: argparse.Namespace) -> None:
    """``keys add | list | revoke``; only the key itself, or what a program may want, goes to standard output."""
    match options.keys_command:
        case "add":
            scopes = frozenset(options.scope or ["generate"])
            limits = Limits(options.requests_per_minute, options.tokens_per_day, options.parallel)
            secret = _add_key(settings, options.name, scopes, options.expires, limits)
            _say(f"The key {options.name} ({', '.join(sorted(scopes))}); it is shown only now, its hash alone is kept:")
            print(secret)
        case "revoke":
            try:
                key = revoke_key(settings.keys_file, options.name, settings.revoked_file)
            except ValueError as error:
                raise KeyRefused(str(error)) from error
            _say(f"The key {key.name} is revoked; a running service refuses it from now on.")
            # Last, because a log that cannot be written must keep nobody from locking a thief out.
            with closing(_audit(settings)) as audit:
                audit.write("key-revoked", key=key.name)
        case "list":
            keys = [describe_key(key) for key in (read_keys(settings.keys_file) if settings.keys_file.exists() else ())]
            if options.json:
                print(json.dumps(keys, indent=1))
                return
            if not keys:
                _say(f"There are no keys in {settings.keys_file}; make one with: {_command()} keys add NAME")
            for one in keys:
                bounds = ", ".join(f"{name} {value}" for name, value in one.get("limits", {}).items())
                print(
                    f"{one['name']:24} {','.join(one['scopes']):24} made {one['created'][:10]}  "
                    f"expires {one.get('expires', 'never'):25}  {bounds or 'no limits'}"
                )


def inspect_audit(settings: Settings, options: argparse.Namespace) -> int:
    """``audit verify | head``: 0 if the log is whole, 1 if it was changed."""
    if options.audit_command == "head":
        seq, digest = last_link(settings.audit_dir)
        print(f"{seq} {digest}")
        return 0
    report = verify(options.path or [settings.audit_dir], after=options.after)
    print("\n".join(describe_report(report)))
    return 0 if report.whole else 1


def _parser() -> argparse.ArgumentParser:
    variables = "\n".join(f"  {PREFIX}{name.upper():20} {one.describe}" for name, one in SETTINGS.items())
    parser = argparse.ArgumentParser(
        prog="python -m service",
        description="The inference service of mini-llm.",
        epilog=f"settings (environment variables):\n{variables}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("serve", help="fetch and record what is missing, then serve")
    commands.add_parser("check", help="check the settings without serving, and show them")
    commands.add_parser("record", help="record the model's golden answer (once a model)")
    commands.add_parser("fetch", help="fetch the model without serving")
    drain = commands.add_parser("drain", help="take no more requests and wait for those accepted")
    seconds = _argument(parse_number(0, 3600))
    drain.add_argument("--limit", type=seconds, metavar="SECONDS", help="cancel what is left then")
    _add_keys_commands(commands.add_parser("keys", help="add, list and revoke keys; a running service sees it at once"))
    _add_audit_commands(commands.add_parser("audit", help="verify the audit log"))
    return parser


def _argument(parse: Callable[[str], object]) -> Callable[[str], object]:
    """A parser of an argument whose ValueError says what is wrong; argparse would hide that."""

    def parse_argument(text: str) -> object:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} {error}") from error

    return parse_argument


def _add_keys_commands(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="keys_command", required=True, metavar="COMMAND")
    add = commands.add_parser("add", help="make a key and show it, once")
    add.add_argument("name", type=_argument(check_name), metavar="NAME", help=NAME_RULE)
    scope_help = "what it may; repeat for several (default: generate)"
    add.add_argument("--scope", choices=SCOPES, action="append", help=scope_help)
    expires = _argument(lambda text: parse_expiry(text, datetime.now(UTC)))
    add.add_argument("--expires", type=expires, metavar="WHEN", help="30d, 12h, 2027-01-31 or an ISO time")
    count = _argument(parse_integer(1, 1 << 40))
    add.add_argument("--requests-per-minute", type=count, metavar="N")
    add.add_argument("--tokens-per-day", type=count, metavar="N", help="generated tokens, a day of UTC")
    add.add_argument("--parallel", type=count, metavar="N", help="requests at the same time, waiting ones included")
    listing = commands.add_parser("list", help="names, scopes, limits; never a key")
    listing.add_argument("--json", action="store_true")
    revoke = commands.add_parser("revoke", help="refuse a key from now on; its running requests finish")
    revoke.add_argument("name", metavar="NAME")


def _add_audit_commands(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="audit_command", required=True, metavar="COMMAND")
    check = commands.add_parser("verify", help="check the chain and say where it breaks (exit code 1)")
    check.add_argument("path", nargs="*", type=Path, metavar="PATH", help="files or folders, also of several nodes")
    check.add_argument("--after", type=_argument(parse_sha256), metavar="HASH", help="a hash that the chain must hold")
    commands.add_parser("head", help="number and hash of the last line, for another node to begin from")


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; the boundary where errors become lines and exit codes."""
    options = _parser().parse_args(arguments)
    try:
        settings = read_settings()
        if options.command not in _READING and getattr(options, "keys_command", None) != "list":
            check_folders(settings)
        match options.command:
            case "serve":
                serve(settings)
            case "check":
                print("\n".join(describe_settings(settings)))
            case "record":
                _record(settings, _have_model(settings))
            case "fetch":
                print(_have_model(settings).path)
            case "keys":
                change_keys(settings, options)
            case "audit":
                return inspect_audit(settings, options)
            case "drain":
                last: dict[str, object] = {}
                for last in ask_to_drain(settings.control_socket, options.limit):
                    if not last.get("done"):
                        _say(f"{last['running']} running, {last['waiting']} waiting …")
                if not last.get("done"):
                    _say("error: the service ended before it was drained")
                    return 1
                _say(f"drained; {last.get('cancelled')} cancelled at the limit, {last.get('left')} left")
                return 0 if last.get("left") == 0 else 1
    except SettingsInvalid as error:
        for problem in error.problems:
            _say(f"error: {problem}")
        return 2
    except ServiceError as error:
        _say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        _say("interrupted")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
