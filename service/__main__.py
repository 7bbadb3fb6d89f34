"""Owns the command line: ``python -m service serve | check | record | fetch | drain``.

Exit codes: 0 done, 1 failed with one line that says why, 2 wrong usage or settings, 130 interrupted.
"""

import argparse
import os
import socket
import sys
from pathlib import Path

from service.control import ask_to_drain
from service.engine.process import EngineProcess, engine_settings
from service.errors import ServiceError, SettingsInvalid
from service.golden import find_golden, golden_path
from service.models import ModelFile, fetch, open_verified, resolve
from service.settings import PREFIX, SETTINGS, Settings, check_folders, describe_settings, parse_number, read_settings

_ROOT = Path(__file__).resolve().parents[1]


class PortTaken(ServiceError):
    """Something listens where the service should."""


class RecordingFailed(ServiceError):
    """The golden answer could not be recorded."""


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


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
    _say(f"Serving on http://{settings.host}:{settings.port} (no keys: loopback only); Ctrl-C ends it.")
    environment = dict(os.environ)
    environment[PREFIX + "ANNOUNCE"] = "1"
    # Meant for other services of this user; an address in it would get around the check of LLM_HOST.
    environment.pop("GUNICORN_CMD_ARGS", None)
    # The very file that was verified, also if the engine is started again after somebody has changed it.
    environment[PREFIX + "MODEL"] = str(model.path.resolve())
    environment[PREFIX + "MODEL_SHA256"] = sha256
    os.chdir(_ROOT)
    config = str(_ROOT / "service" / "gunicorn.conf.py")
    os.execve(sys.executable, [sys.executable, "-m", "gunicorn", "-c", config], environment)  # noqa: S606 (meant)


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
    drain.add_argument("--limit", type=parse_number(0, 3600), metavar="SECONDS", help="cancel what is left then")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; the boundary where errors become lines and exit codes."""
    options = _parser().parse_args(arguments)
    try:
        settings = read_settings()
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
