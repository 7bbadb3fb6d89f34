"""Owns the control socket: how commands reach a running service, by a unix socket that only its user opens.

``drain`` has it end gently; ``inherit`` tells it what another node has counted, whose place it takes.

One command a connection: a JSON line in, JSON lines out, the last with ``"done": true``.
"""

import json
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from service.accounts import Log
from service.counters import NodeStorage
from service.errors import ServiceError, StateUnwritable
from service.generation import Generator

_LARGEST_COMMAND_BYTES = 4 << 20  # counters of many keys
_CANCEL_GRACE_S = 5.0  # for answers that are cut at the limit: one batch of the prefill, one token, one write


class ControlFailed(ServiceError):
    """The running service could not be reached by its control socket."""


def drain(generator: Generator, limit_s: float) -> Iterator[dict[str, Any]]:
    """Stops admission at once, waits for what was accepted, cancels what is left at the limit; yields progress."""
    generator.scheduler.drain()
    end_s = time.monotonic() + limit_s
    while not generator.scheduler.wait_idle(min(1.0, max(0.0, end_s - time.monotonic()))):
        running, waiting = generator.scheduler.counts()
        yield {"running": running, "waiting": waiting}
        if time.monotonic() >= end_s:
            break
    running, waiting = generator.scheduler.counts()
    if running + waiting:
        generator.cancel_all = True
        if not generator.scheduler.wait_idle(_CANCEL_GRACE_S):
            generator.cut_off()
            generator.scheduler.wait_idle(_CANCEL_GRACE_S)
    left = sum(generator.scheduler.counts())
    yield {"done": True, "cancelled": running + waiting, "left": left}


def serve_control(path: Path, generator: Generator, counters: NodeStorage, log: Log) -> Callable[[], None]:
    """Listens in a thread of its own; returns what closes and removes the socket."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    _make_room(path)
    listener = socket.socket(socket.AF_UNIX)
    mask = os.umask(0o177)  # bound with 0600 from the first moment
    try:
        listener.bind(str(path))
    finally:
        os.umask(mask)
    ours = path.lstat().st_ino
    listener.listen(4)

    def answer(peer: socket.socket) -> None:
        with peer, peer.makefile("rwb") as lines:
            try:
                for progress in obey(json.loads(lines.readline(_LARGEST_COMMAND_BYTES))):
                    lines.write(json.dumps(progress).encode() + b"\n")
                    lines.flush()
            except (ValueError, TypeError, AttributeError, LookupError, OSError, StateUnwritable) as error:
                log.write("control-failed", error=type(error).__name__)

    def obey(command: dict[str, Any]) -> Iterator[dict[str, Any]]:
        match command.get("command"):
            case "drain":
                limit_s = command.get("limit_s")
                limit_s = generator.settings.drain_limit_s if limit_s is None else min(3600.0, max(0.0, float(limit_s)))
                log.write("drain", limit_s=limit_s)
                yield from drain(generator, limit_s)
            case "inherit":
                counters.inherit({name: (int(told[0]), float(told[1])) for name, told in command["counters"].items()})
                yield {"done": True}
            case _:
                raise ValueError("unknown command")

    def listen() -> None:
        while True:
            try:
                peer, _ = listener.accept()
            except OSError:
                return  # closed
            threading.Thread(target=answer, args=(peer,), daemon=True).start()

    threading.Thread(target=listen, name="control", daemon=True).start()

    def close() -> None:
        listener.close()
        # After a reload the path is the next worker's already.
        if path.exists() and path.lstat().st_ino == ours:
            path.unlink()

    return close


def _make_room(path: Path) -> None:
    """Removes the socket of a service that is gone, or of the worker that this one takes over from.

    Raises ControlFailed if it is another service's, or no socket.
    """
    if not path.exists():
        return
    if not path.is_socket():
        raise ControlFailed(f"{path} is there and is no socket; name another with LLM_CONTROL_SOCKET")
    with socket.socket(socket.AF_UNIX) as peer:
        try:
            peer.connect(str(path))
        except OSError:
            pass  # nobody listens any more
        else:
            credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
            owner = struct.unpack("3i", credentials)[0]
            if psutil.Process(owner).ppid() != os.getppid():
                raise ControlFailed(f"process {owner} serves {path} already; name another with LLM_CONTROL_SOCKET")
    path.unlink()


def ask_to_drain(path: Path, limit_s: float | None) -> Iterator[dict[str, Any]]:
    """Asks a running service to drain and yields its progress. Raises ControlFailed."""
    try:
        with socket.socket(socket.AF_UNIX) as peer:
            peer.connect(str(path))
            peer.sendall(json.dumps({"command": "drain", "limit_s": limit_s}).encode() + b"\n")
            with peer.makefile("rb") as lines:
                for line in lines:
                    yield json.loads(line)
    except (OSError, ValueError) as error:
        raise ControlFailed(f"no service answers at {path} ({error}); is it running with this socket?") from error
