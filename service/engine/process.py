"""Owns the life of the engine's process as the web process sees it: spawn, watch, restart with back-off.

One supervisor thread lives as long as the service. It spawns the worker (a parent-death signal is bound to the spawning
*thread*) and follows its control line. Once the worker is ready it hands over one line for counting and one for each
slot; the thread that serves a request reads its slot's line itself. An engine that dies ends all its lines, so the
requests that it was running fail at once; it is started again, or ends in ``failed`` with the reason.

Messages: control: settings → phase, ready, refused ←; count line: count → counted, malformed, failed ←; slot line:
generate, cancel → prefill, piece, done, failed ←.
"""

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

from service.engine.interface import Completion, Description, GenerationRequest, Message, Piece
from service.engine.line import Line, line_pair
from service.errors import EngineFailed, EngineLost, RequestMalformed, Unavailable
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
    # A path is meant from where the person stands; the worker stands elsewhere.
    is_path = os.sep in settings.model or settings.model.endswith(".gguf")
    return EngineSettings(
        model=str(Path(settings.model).expanduser().absolute()) if is_path else settings.model,
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


@dataclass
class _Life:
    """One life of the worker; ``reason`` says why it ended once ``ended`` is set."""

    child: "subprocess.Popen[bytes]"
    control: Line
    counting: Line | None = None
    counting_lock: threading.Lock = field(default_factory=threading.Lock)
    free_slots: "queue.SimpleQueue[Line]" = field(default_factory=queue.SimpleQueue)
    over: bool = False  # somebody has seen that it is over; ``ended`` follows when the reason is known
    ended: threading.Event = field(default_factory=threading.Event)
    reason: str = "the engine's process has ended"


class Stream:
    """One running generation: pull from it, or cancel it; used by one thread."""

    def __init__(self, engine: "EngineProcess", life: _Life, line: Line, stall_timeout_s: float):
        self._engine, self._life, self._line, self._stall_timeout_s = engine, life, line, stall_timeout_s
        self._last_sign_s = time.monotonic()

    def next(self, timeout_s: float) -> Piece | Completion | None:
        """The next piece, the completion at the end, or None if nothing came within ``timeout_s``.

        Raises EngineLost if the engine died or shows no sign of life, EngineFailed if it gave up on this request.
        """
        try:
            message = self._line.receive(timeout_s)
        except (EOFError, OSError) as error:
            raise self._engine.lost(self._life) from error
        if message is None:
            if time.monotonic() - self._last_sign_s > self._stall_timeout_s:
                raise self._engine.lost(self._life, f"no sign of life for {self._stall_timeout_s:.0f} s")
            return None
        self._last_sign_s = time.monotonic()
        match message["type"]:
            case "piece":
                return Piece(message["text"], message["tokens"])
            case "done":
                self._life.free_slots.put(self._line)
                return Completion(**message["completion"])
            case "failed":
                self._life.free_slots.put(self._line)
                raise EngineFailed(message["error"])
        return None  # prefill: a sign of life

    def cancel(self) -> None:
        """Asks the engine to stop; it does within one token, or one batch of the prefill."""
        try:
            self._line.send(type="cancel")
        except OSError:
            pass  # an engine that is gone has nothing to cancel


class EngineProcess:
    """The engine, seen from the web process; every method may be called from any thread."""

    def __init__(self, settings: EngineSettings, load_timeout_s: float = 900.0, stall_timeout_s: float = 60.0):
        self._settings = settings
        self._load_timeout_s, self._stall_timeout_s = load_timeout_s, stall_timeout_s
        self._changed = threading.Condition()
        self._state = EngineState("starting", "the engine is starting")
        self._description: Description | None = None
        self._life: _Life | None = None
        self._stopping = threading.Event()
        self._supervisor = threading.Thread(target=self._supervise, name="engine-supervisor", daemon=True)
        self.restarts = 0
        self.first_speed: Completion | None = None  # of the golden answer of the latest start

    def start(self) -> None:
        self._supervisor.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        """Ends the engine; whatever it was running is lost."""
        with self._changed:
            self._stopping.set()
            if self._life is not None:
                self._life.control.hang_up()
        if self._supervisor.is_alive():
            self._supervisor.join(timeout_s)

    @property
    def state(self) -> EngineState:
        return self._state

    @property
    def pid(self) -> int | None:
        life = self._life
        return None if life is None else life.child.pid

    def describe(self) -> Description | None:
        """What runs, or ran before a restart; None until the first load."""
        return self._description

    def wait_ready(self, timeout_s: float) -> bool:
        """Waits until the engine is ready, or has failed for good, or the time is over; tells whether it is ready."""
        if self._state.phase == "ready":
            return True
        with self._changed:
            self._changed.wait_for(lambda: self._state.phase in ("ready", "failed", "stopped"), timeout_s)
            return self.state.phase == "ready"

    def wait_change(self, last: EngineState | None) -> EngineState:
        """Waits until the state is not ``last`` any more, and returns it."""
        with self._changed:
            self._changed.wait_for(lambda: self._state != last)
            return self._state

    def count_tokens(self, messages: Sequence[Message], timeout_s: float = 30.0) -> int:
        """Prompt tokens, as ``interface.Engine`` has it.

        Raises RequestMalformed, Unavailable, EngineLost or EngineFailed.
        """
        life = self._ready_life()
        assert life.counting is not None
        if not life.counting_lock.acquire(timeout=timeout_s):
            # Whoever counts has a time limit of its own; so many large prompts are no reason to end the engine.
            raise Unavailable("queue_timeout", "the engine is counting other prompts", 2.0)
        over_before = life.over
        try:
            life.counting.send(type="count", messages=messages)
            answer = life.counting.receive(timeout_s)
        except (EOFError, OSError) as error:
            raise self.lost(life, begun=not over_before) from error
        finally:
            life.counting_lock.release()
        if answer is None:
            raise self.lost(life, f"the engine did not count a prompt within {timeout_s:.0f} s")
        match answer["type"]:
            case "counted":
                return int(answer["tokens"])
            case "malformed":
                raise RequestMalformed(answer["error"])
        raise EngineFailed(answer["error"])

    def generate(self, request: GenerationRequest) -> Stream:
        """Starts a generation; the scheduler has seen to it that a slot is free.

        Raises EngineLost if there is no engine now.
        """
        life = self._ready_life()
        try:
            line = life.free_slots.get_nowait()
        except queue.Empty as error:
            if life.over:
                raise EngineLost(life.reason, begun=False) from error
            raise EngineFailed("more generations were started than the engine has slots") from error
        try:
            line.send(
                type="generate",
                messages=request.messages,
                max_tokens=request.max_tokens,
                sampling=request.sampling,
                owner=request.owner,
            )
        except OSError as error:
            raise self.lost(life, begun=False) from error
        return Stream(self, life, line, self._stall_timeout_s)

    def lost(self, life: _Life, reason: str | None = None, begun: bool = True) -> EngineLost:
        """The error for a request whose line has ended or is silent; sees to it that this life is over."""
        life.over = True
        life.child.kill()
        self._note_end(life)
        life.ended.wait(5.0)
        return EngineLost(reason or life.reason, begun)

    def _ready_life(self) -> _Life:
        life, state = self._life, self._state
        if life is None or state.phase != "ready":
            raise EngineLost(state.reason, begun=False)
        return life

    def _note_end(self, life: _Life) -> None:
        """Whoever sees the end first says so: until the supervisor has seen it too, nobody may think it is ready."""
        with self._changed:
            if life is self._life and self._state.phase == "ready":
                self._state = EngineState("restarting", life.reason)
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
            try:
                was_ready, refusal = self._run_once()
            except Exception as error:  # boundary of this thread: no process, thread or pipe could be made
                was_ready, refusal = False, None
                self._set_state("restarting", f"the engine could not be started: {type(error).__name__}: {error}")
            if self._stopping.is_set():
                break
            if refusal is not None:
                self._set_state("failed", refusal)
                return
            failed_starts = 0 if was_ready else failed_starts + 1
            reason = self._state.reason
            # What has worked once is tried for ever: the host may have been short of something for a while.
            if failed_starts >= _FAILED_STARTS_LIMIT and self._description is None:
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
        control, theirs = line_pair()
        try:
            child = _spawn(theirs)
        finally:
            os.close(theirs)
        life = _Life(child, control)
        last_words: deque[str] = deque(maxlen=_LAST_WORDS_LINES)
        listener = threading.Thread(target=_listen, args=(child, last_words), daemon=True)
        listener.start()
        watchdog = threading.Timer(self._load_timeout_s, self._end_loading, (life,))
        watchdog.daemon = True
        watchdog.start()
        with self._changed:
            self._life = life
            if self._stopping.is_set():
                control.hang_up()
        was_ready, refusal, failure = False, None, None
        try:
            control.send(**asdict(self._settings))
            while (message := control.receive()) is not None:
                match message["type"]:
                    case "phase":
                        self._set_state(message["phase"], f"the engine is {message['phase']} the model")
                    case "ready":
                        watchdog.cancel()
                        last_words.clear()  # what it said while it loaded did not kill it
                        self._take_lines(life, Description(**message["description"]))
                        self.first_speed = Completion(**message["speed"])
                        was_ready = True
                        self._set_state("ready", "the engine is ready")
                    case "refused":
                        refusal = message["reason"]
                        break
                    case "failed":
                        failure = message["reason"]
                        break
        except (EOFError, OSError):
            pass  # the worker is gone; why, its exit code says below
        finally:
            watchdog.cancel()
            control.hang_up()
            _reap(child)
            listener.join(1.0)
        words = "; ".join(line for line in last_words if line.strip())
        ending = f"the engine ended {_describe_exit(child.returncode)}" + (f" ({words})" if words else "")
        if life.over and not was_ready:
            failure = f"the model did not load within {self._load_timeout_s:.0f} s"
        life.reason = failure or ending
        with self._changed:
            self._life = None
            self._state = EngineState("restarting", life.reason)
            self._changed.notify_all()
        life.ended.set()
        control.close()
        return was_ready, refusal

    def _take_lines(self, life: _Life, description: Description) -> None:
        life.counting, *slots = life.control.receive_lines(1 + description.slots)
        for line in slots:
            life.free_slots.put(line)
        self._description = description
        # A later start serves the same file with the same room, or not at all.
        self._settings = replace(self._settings, sha256=description.sha256, context_length=description.context_length)

    @staticmethod
    def _end_loading(life: _Life) -> None:
        life.over = True
        life.child.kill()


def _spawn(descriptor: int) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-m", "service.engine.worker", str(descriptor), str(os.getpid())],
        cwd=_ROOT,
        pass_fds=[descriptor],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={name: os.environ[name] for name in _INHERITED_VARIABLES if name in os.environ},
        # A Ctrl-C in the terminal is for the service; it decides when the engine goes.
        start_new_session=True,
    )


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
        while line := child.stderr.readline(4096):
            last_words.append(line.decode(errors="replace").strip()[:200])


def _describe_exit(code: int | None) -> str:
    if code is None:
        return "without an exit code"
    if code >= 0:
        return f"with exit code {code}"
    known = {one.value: one.name for one in signal.Signals}
    return f"by {known.get(-code, f'signal {-code}')}"
