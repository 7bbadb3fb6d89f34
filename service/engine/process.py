"""Owns the life of the engine's process as the web process sees it: spawn, watch, restart with back-off, and its pipe.

One supervisor thread lives as long as the service. It spawns the worker (a parent-death signal is bound to the spawning
*thread*), reads every message and hands it to the request it belongs to. An engine that dies fails the requests that it
was running, at once, and is started again; one that cannot start ends in ``failed`` with the reason.

Messages to the worker: settings (first), count, generate, cancel. From it: phase, ready, refused, counted, malformed,
prefill, piece, done, failed. JSON and not pickle: a hostile model file that took over the engine must not get
a way to run code in the web process.
"""

import itertools
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from service.engine.interface import Completion, Description, GenerationRequest, Message, Piece
from service.errors import EngineFailed, EngineLost, RequestMalformed
from service.settings import Settings

Phase = Literal["starting", "verifying", "loading", "checking", "ready", "restarting", "failed", "stopped"]

_ROOT = Path(__file__).resolve().parents[2]
# What a child needs of the environment; keys and tokens of the service are not among it.
_INHERITED_VARIABLES = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "PYTHONPATH", "VIRTUAL_ENV", "LD_LIBRARY_PATH")
_FAILED_STARTS_LIMIT = 5
_FIRST_BACKOFF_S = 0.1
_LONGEST_BACKOFF_S = 15.0
_BACKOFF_MEMORY_S = 60.0
_LAST_WORDS_LINES = 5


@dataclass(frozen=True)
class EngineSettings:
    """What the worker is told at its start: ``model`` is a path or a catalogue name, ``golden`` "check" to serve
    and "record" to record once.
    """

    model: str
    sha256: str | None
    name: str | None
    context_length: int | None
    threads: int | None
    state_dir: str
    cache_dir: str
    adapter: str = "service.engine.gpt4all_adapter"
    golden: Literal["check", "record"] = "check"


def engine_settings(settings: Settings, golden: Literal["check", "record"] = "check") -> EngineSettings:
    """The engine's part of the service's settings."""
    return EngineSettings(
        model=settings.model,
        sha256=settings.model_sha256,
        name=settings.model_name,
        context_length=settings.context_length,
        threads=settings.threads,
        state_dir=str(settings.state_dir),
        cache_dir=str(settings.cache_dir),
        adapter=settings.engine_adapter,
        golden=golden,
    )


@dataclass(frozen=True)
class EngineState:
    """Where the engine is; ``reason`` is for people, and holds for every phase but ``ready``."""

    phase: Phase
    reason: str


class Stream:
    """One running generation: pull from it, or cancel it."""

    def __init__(self, engine: "EngineProcess", identity: int, stall_timeout_s: float):
        self._engine, self._identity, self._stall_timeout_s = engine, identity, stall_timeout_s
        self._messages: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._last_sign_s = time.monotonic()

    def next(self, timeout_s: float) -> Piece | Completion | None:
        """The next piece, the completion at the end, or None if nothing came within ``timeout_s``.

        Raises EngineLost if the engine died or shows no sign of life, EngineFailed if it gave up on this request.
        """
        try:
            message = self._messages.get(timeout=timeout_s)
        except queue.Empty:
            if time.monotonic() - self._last_sign_s > self._stall_timeout_s:
                self._engine.kill()
                raise EngineLost(f"the engine gave no sign of life for {self._stall_timeout_s:.0f} s") from None
            return None
        self._last_sign_s = time.monotonic()
        match message["type"]:
            case "piece":
                return Piece(message["text"], message["tokens"])
            case "done":
                return Completion(**message["completion"])
            case "lost":
                raise EngineLost(message["error"])
            case "failed":
                raise EngineFailed(message["error"])
        return None  # prefill: a sign of life

    def cancel(self) -> None:
        """Asks the engine to stop; it does within one token, or one batch of the prefill."""
        self._engine.forget(self._identity)

    def put(self, message: dict[str, Any]) -> None:
        """Called by the supervisor."""
        self._messages.put(message)


class EngineProcess:
    """The engine, seen from the web process; every method may be called from any thread."""

    def __init__(self, settings: EngineSettings, load_timeout_s: float = 900.0, stall_timeout_s: float = 60.0):
        self._settings = settings
        self._load_timeout_s, self._stall_timeout_s = load_timeout_s, stall_timeout_s
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._state = EngineState("starting", "the engine is starting")
        self._description: Description | None = None
        self._identities = itertools.count(1)
        self._waiting: dict[int, Stream | queue.SimpleQueue[dict[str, Any]]] = {}
        self._connection: Connection | None = None
        self._send_lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._stopping = threading.Event()
        self._supervisor = threading.Thread(target=self._supervise, name="engine-supervisor", daemon=True)
        self.restarts = 0

    def start(self) -> None:
        self._supervisor.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        """Ends the engine; whatever it was running is lost."""
        self._stopping.set()
        with self._lock:
            connection = self._connection
            self._changed.notify_all()
        if connection is not None:
            self._hang_up(connection)
        if self._supervisor.is_alive():
            self._supervisor.join(timeout_s)
        if self._supervisor.is_alive():
            self.kill()
            self._supervisor.join(timeout_s)

    def kill(self) -> None:
        """Kills an engine that hangs; the supervisor sees the end of its pipe and starts another."""
        child = self._child
        if child is not None and child.poll() is None:
            child.kill()
            self._note_end(self._connection)

    @property
    def state(self) -> EngineState:
        return self._state

    @property
    def pid(self) -> int | None:
        child = self._child
        return child.pid if child is not None and child.returncode is None else None

    def describe(self) -> Description | None:
        """What runs, or ran before a restart; None until the first load."""
        return self._description

    def wait_ready(self, timeout_s: float) -> bool:
        """Waits until the engine is ready, or has failed for good, or the time is over; tells whether it is ready."""
        with self._changed:
            self._changed.wait_for(lambda: self._state.phase in ("ready", "failed", "stopped"), timeout_s)
            return self._state.phase == "ready"

    def wait_change(self, last: EngineState | None) -> EngineState:
        """Waits until the state is not ``last`` any more, and returns it."""
        with self._changed:
            self._changed.wait_for(lambda: self._state != last)
            return self._state

    def count_tokens(self, messages: Sequence[Message], timeout_s: float = 10.0) -> int:
        """Exact prompt tokens. Raises RequestMalformed, EngineLost or EngineFailed."""
        answers: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        identity = self._register(answers)
        try:
            self._send(type="count", id=identity, messages=[asdict(message) for message in messages])
            answer = answers.get(timeout=timeout_s)
        except queue.Empty:
            self.kill()
            raise EngineLost(f"the engine did not count a prompt within {timeout_s:.0f} s") from None
        finally:
            self._unregister(identity)
        match answer["type"]:
            case "counted":
                return int(answer["tokens"])
            case "malformed":
                raise RequestMalformed(answer["error"])
            case "lost":
                raise EngineLost(answer["error"])
        raise EngineFailed(answer["error"])

    def generate(self, request: GenerationRequest) -> Stream:
        """Starts a generation in a slot that the caller holds. Raises EngineLost if there is no engine now."""
        identity = next(self._identities)
        stream = Stream(self, identity, self._stall_timeout_s)
        self._register(stream, identity)
        try:
            self._send(
                type="generate",
                id=identity,
                messages=[asdict(message) for message in request.messages],
                max_tokens=request.max_tokens,
                sampling=asdict(request.sampling),
            )
        except EngineLost:
            self._unregister(identity)
            raise
        return stream

    def forget(self, identity: int) -> None:
        """Cancels a generation; an engine that is gone has nothing to cancel."""
        try:
            self._send(type="cancel", id=identity)
        except EngineLost:
            pass

    def _register(self, waiter: "Stream | queue.SimpleQueue[dict[str, Any]]", identity: int | None = None) -> int:
        identity = next(self._identities) if identity is None else identity
        with self._lock:
            self._waiting[identity] = waiter
        return identity

    def _unregister(self, identity: int) -> None:
        with self._lock:
            self._waiting.pop(identity, None)

    def _send(self, **message: Any) -> None:
        connection = self._connection
        if connection is None or self._state.phase != "ready":
            raise EngineLost(self._state.reason)
        try:
            with self._send_lock:
                connection.send_bytes(json.dumps(message).encode())
        except OSError as error:
            self._note_end(connection)
            raise EngineLost("the engine's process has ended") from error

    def _note_end(self, connection: Connection | None) -> None:
        """Whoever sees the end first says so: until the supervisor has seen it too, nobody may think it is ready."""
        with self._changed:
            if connection is self._connection and self._state.phase == "ready":
                self._state = EngineState("restarting", "the engine's process has ended")
                self._changed.notify_all()

    def _set_state(self, phase: Phase, reason: str) -> None:
        with self._changed:
            self._state = EngineState(phase, reason)
            self._changed.notify_all()

    # What follows runs in the supervisor thread.

    def _supervise(self) -> None:
        failed_starts, ends_s = 0, deque[float]()
        while not self._stopping.is_set():
            self._set_state("starting", "the engine is starting")
            was_ready, refusal = self._run_once()
            if self._stopping.is_set():
                break
            if refusal is not None:
                self._set_state("failed", refusal)
                return
            failed_starts = 0 if was_ready else failed_starts + 1
            reason = self._state.reason
            if failed_starts >= _FAILED_STARTS_LIMIT:
                self._set_state("failed", f"{reason} ({failed_starts} starts in a row failed)")
                return
            now_s = time.monotonic()
            ends_s.append(now_s)
            while ends_s[0] < now_s - _BACKOFF_MEMORY_S:
                ends_s.popleft()
            self.restarts += 1
            self._stopping.wait(min(_LONGEST_BACKOFF_S, _FIRST_BACKOFF_S * 2 ** (len(ends_s) - 1)))
        self._set_state("stopped", "the service is stopping")

    def _run_once(self) -> tuple[bool, str | None]:
        """One life of the worker: whether it became ready, and its refusal if it refused the model."""
        ours, theirs = socket.socketpair()
        with theirs:
            child = subprocess.Popen(
                [sys.executable, "-m", "service.engine.worker", str(theirs.fileno()), str(os.getpid())],
                cwd=_ROOT,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env={name: os.environ[name] for name in _INHERITED_VARIABLES if name in os.environ},
                # A Ctrl-C in the terminal is for the service; it decides when the engine goes.
                start_new_session=True,
            )
        connection = Connection(ours.detach())
        last_words: deque[str] = deque(maxlen=_LAST_WORDS_LINES)
        listener = threading.Thread(target=_listen, args=(child, last_words), daemon=True)
        listener.start()
        with self._lock:
            self._child, self._connection = child, connection
        watchdog = threading.Timer(self._load_timeout_s, child.kill)
        watchdog.daemon = True
        watchdog.start()
        was_ready, refusal = False, None
        try:
            if not self._stopping.is_set():
                connection.send_bytes(json.dumps(asdict(self._settings)).encode())
            while not self._stopping.is_set():
                message = json.loads(connection.recv_bytes())
                match message["type"]:
                    case "phase":
                        self._set_state(message["phase"], f"the engine is {message['phase']} the model")
                    case "ready":
                        watchdog.cancel()
                        was_ready = True
                        last_words.clear()  # what it said while it loaded did not kill it
                        self._description = Description(**message["description"])
                        self._set_state("ready", "the engine is ready")
                    case "refused":
                        refusal = message["reason"]
                        break
                    case _:
                        self._deliver(message)
        except (EOFError, OSError):
            pass  # the worker is gone; why, its exit code says below
        finally:
            watchdog.cancel()
            self._hang_up(connection)
            _reap(child)
            listener.join(1.0)
        words = "; ".join(line for line in last_words if line.strip())
        reason = f"the engine ended {_describe_exit(child.returncode)}" + (f" ({words})" if words else "")
        with self._changed:
            self._state = EngineState("restarting", reason)
            self._connection = None
            lost, self._waiting = self._waiting, {}
            self._changed.notify_all()
        connection.close()
        for waiter in lost.values():
            waiter.put({"type": "lost", "error": reason})
        return was_ready, refusal

    @staticmethod
    def _hang_up(connection: Connection) -> None:
        """Ends the pipe in both directions, so that both ends wake up; the descriptor stays ours until it is closed."""
        try:
            with socket.socket(fileno=os.dup(connection.fileno())) as end:
                end.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # already ended

    def _deliver(self, message: dict[str, Any]) -> None:
        final = message["type"] not in ("piece", "prefill")
        with self._lock:
            identity = message["id"]
            waiter = self._waiting.pop(identity, None) if final else self._waiting.get(identity)
        if waiter is not None:
            waiter.put(message)


def _reap(child: "subprocess.Popen[bytes]") -> None:
    """Waits for a worker whose pipe has ended, and kills it if it does not go by itself."""
    try:
        child.wait(2.0)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _listen(child: "subprocess.Popen[bytes]", last_words: deque[str]) -> None:
    """Keeps the last lines that the engine wrote to stderr: they say why it died."""
    assert child.stderr is not None
    with child.stderr:
        for line in child.stderr:
            last_words.append(line.decode(errors="replace").strip()[:200])


def _describe_exit(code: int | None) -> str:
    if code is None:
        return "without an exit code"
    return f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
