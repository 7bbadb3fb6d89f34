"""Owns the command line of the local cloud: ``run`` (in the foreground) and ``clean``."""

import argparse
import json
import logging
import os
import signal
import sqlite3
import sys
import threading
from ipaddress import IPv4Network, ip_address
from pathlib import Path

from scripts.local_cloud.api.app import pad_token
from scripts.local_cloud.api.errors import InvalidInput
from scripts.local_cloud.cloud import CloudSettings, clean, running_cloud
from scripts.local_cloud.machine_interface import MachineFailed
from scripts.local_cloud.machines.host import HostUnfit
from scripts.local_cloud.machines.machines import DEFAULT_CACHE, DEFAULT_RANGE
from scripts.local_cloud.store import StoreUnusable
from scripts.local_cloud.watch import changes, describe

_DEFAULT_STATE = Path("/var/lib/mini-llm/local_cloud")
_LOOK_EVERY_S = 0.5


def main(arguments: list[str]) -> int:
    """Runs one command; tells an error in one line, and 1 as the exit code."""
    options = _parse(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        if options.command == "clean":
            clean(options.state, options.cache, options.addresses, _say)
            _show(f"nothing is left of the local cloud in {options.state}")
            return 0
        return _run(options)
    except (HostUnfit, MachineFailed, StoreUnusable) as error:
        print(f"error: {error}", file=sys.stderr)
    except sqlite3.Error as error:
        print(f"error: the state in {options.state} cannot be written: {error}; is its disk full?", file=sys.stderr)
    except InvalidInput as error:
        print(f"error: {options.faults} is no plan of faults: {error}", file=sys.stderr)
    except json.JSONDecodeError as error:
        print(f"error: {options.faults} is not JSON: {error}", file=sys.stderr)
    except OSError as error:
        place = f" ({error.filename})" if error.filename else f" (port {options.port})"
        print(f"error: {error.strerror}{place}", file=sys.stderr)
    return 1


def _run(options: argparse.Namespace) -> int:
    settings = CloudSettings(
        state=options.state,
        cache=options.cache,
        port=options.port,
        token=options.token,
        addresses=options.addresses,
        requests_per_hour=options.requests_per_hour,
        plan=options.faults,
        old_clients=options.old_clients,
        forgets_moved_flows=options.forget_moved_flows,
        resolvers=options.resolver,
    )
    stopping = threading.Event()

    def stop(number: int, frame: object) -> None:
        if not stopping.is_set():
            _say("stopping: servers are shut down; disks and snapshots stay")
        stopping.set()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    with running_cloud(settings, _say) as cloud:
        page = cloud.endpoint.removesuffix("v1")
        _say(f"the local cloud runs; look at it on {page}, end it with Ctrl-C")
        _say(f"consoles: {options.state}/consoles, calls: {options.state}/calls.jsonl")
        _say(f"names in its zones, and all others, are answered at {cloud.machines.network.name_server_address}")
        if pad_token(settings.token) != settings.token:
            _say(f"Terraform's provider wants 64 characters; this token does as well: {pad_token(settings.token)}")
        _show(f"export HCLOUD_ENDPOINT={cloud.endpoint}")
        _show(f"export HCLOUD_TOKEN={settings.token}")
        seen = describe(cloud.project)
        while not stopping.wait(_LOOK_EVERY_S):
            try:
                now = describe(cloud.project)
            except sqlite3.Error:  # a full disk can keep even a reader out, for a while
                continue
            for line in changes(seen, now):
                _show(line)
            seen = now
    _say("stopped")
    return 0


def _parse_port(text: str) -> int:
    port = int(text)
    if not 0 < port < 65536:
        raise argparse.ArgumentTypeError("must be from 1 to 65535")
    return port


def _parse_allowance(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def _parse_resolvers(text: str) -> tuple[str, ...]:
    if text == "none":
        return ()
    try:
        return (str(ip_address(text)),)
    except ValueError as error:
        raise argparse.ArgumentTypeError("must be an IP address, or none") from error


def _show(line: str) -> None:
    """Prints a line for people. What is said may fail (a terminal that is gone, a full disk); what is done goes on."""
    try:
        print(line, flush=True)
    except OSError:
        sys.stdout = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")  # the old one's buffer would fail again and again


def _say(line: str) -> None:
    _show(f"# {line}")


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.local_cloud", description="A Hetzner-compatible cloud on this machine; needs root."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in (
        ("run", "run the cloud in the foreground until Ctrl-C"),
        ("clean", "remove servers, snapshots and all that a cloud has left"),
    ):
        command = commands.add_parser(name, help=what, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        command.add_argument("--state", type=Path, default=_DEFAULT_STATE, help="where disks and snapshots lie")
        command.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="where the base image is kept")
        command.add_argument(
            "--addresses", type=IPv4Network, default=IPv4Network(DEFAULT_RANGE), help="public IPv4 addresses of servers"
        )
        command.set_defaults(port=0, faults=None)
        if name == "run":
            command.add_argument("--port", type=_parse_port, default=8899, help="port on 127.0.0.1")
            command.add_argument("--token", default="local", help="the token that clients send")
            command.add_argument("--requests-per-hour", type=_parse_allowance, default=3600, help="before 429")
            command.add_argument("--faults", type=Path, help="a plan of faults, as JSON")
            command.add_argument(
                "--resolver",
                type=_parse_resolvers,
                help="who is asked for names that are in no zone, an address or none; the host's own if not given",
            )
            command.add_argument(
                "--old-clients", action="store_true", help="answer fields that the API removed in 2026 (Packer's 1.0.5)"
            )
            command.add_argument(
                "--forget-moved-flows",
                action="store_true",
                help="firewalls drop what is of a TCP flow that began at another server, as behind a moved address",
            )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
