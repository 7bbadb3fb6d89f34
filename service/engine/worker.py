"""Owns the engine's process: verifies and loads one model, then serves its lines until they end.

One thread follows the control line, one counts tokens, one a slot generates; ``process`` holds the other ends and lists
the messages. Whatever kills this process (an abort inside llama.cpp, the kernel's OOM killer) costs the requests it was
running and nothing else.
"""

import ctypes
import importlib
import os
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from service import golden
from service.engine import gguf, host
from service.engine.interface import Completion, Engine, GenerationRequest, Message, ModelSpec, Piece, Sampling
from service.engine.line import Line, line_pair
from service.errors import MemoryShort, ModelRefused, RequestMalformed, ServiceError
from service.models import open_verified, resolve

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_SIGN_OF_LIFE_EVERY_S = 0.25
# Address space, used only when needed: llama.cpp splits text of some vocabularies with a recursive std::regex, which
# takes up to 400 bytes of stack for each character of an unbroken run (measured); the adapter bounds the run.
_FIRST_TO_GO = "800"
_THREAD_STACK_BYTES = 64 << 20


def choose_context_length(header: gguf.GgufHeader, asked: int | None, memory_bytes: int) -> int:
    """The context to open: what was asked for, else all that the file allows and the memory holds.

    Raises ModelRefused if the file does not allow it, MemoryShort if the memory does not hold it now.
    """
    if asked is not None and asked > header.context_length:
        raise ModelRefused(f"the model's context ends at {header.context_length} tokens, {asked} were asked for")
    largest = gguf.largest_context(header, memory_bytes)
    wanted = asked or largest
    if largest < max(1, wanted):
        need = gguf.required_memory_bytes(header, asked or min(512, header.context_length))
        raise MemoryShort(
            f"the model needs {need / 1e9:.2f} GB of memory with a context of "
            f"{asked or min(512, header.context_length)} tokens, {memory_bytes / 1e9:.2f} GB are free"
        )
    return wanted


def load_engine(settings: dict[str, Any], show_phase: Callable[[str], None]) -> Engine:
    """Verifies the file on one descriptor, then lets the adapter load that very descriptor.

    Raises ModelRefused with one clear line whenever the file is not what it should be.
    """
    show_phase("verifying")
    model = resolve(settings["model"], Path(settings["cache_dir"]) / "models")
    stamps = Path(settings["state_dir"]) / "verified"
    verified = open_verified(model.path, settings["sha256"] or model.sha256, stamps)
    header = gguf.read_header(verified.file)
    context_length = choose_context_length(header, settings["context_length"], host.memory_for_engine_bytes())
    show_phase("loading")
    spec = ModelSpec(
        path=f"/proc/self/fd/{verified.file.fileno()}",
        name=settings["name"] or header.name or model.path.stem,
        sha256=verified.sha256,
        header=header,
        context_length=context_length,
        threads=settings["threads"] or host.threads_for(header.weights_bytes),
    )
    engine: Engine = importlib.import_module(settings["adapter"]).load(spec)
    return engine


class Worker:
    """Everything between the lines and one engine."""

    def __init__(self, control: Line):
        self._control = control

    def run(self) -> None:
        """Loads and works in other threads; this one waits for the end of the control line, which ends the process."""
        settings = _receive(self._control)
        threading.Thread(target=self._load, args=(settings,), daemon=True).start()
        while True:
            _receive(self._control)

    def _load(self, settings: dict[str, Any]) -> None:
        try:
            engine = load_engine(settings, lambda phase: _send(self._control, type="phase", phase=phase))
            description = engine.describe()
            _send(self._control, type="phase", phase="checking")
            speed = _check_golden(engine, description.sha256, settings)
            pairs = [line_pair() for _ in range(1 + description.slots)]
        except ModelRefused as error:
            _send(self._control, type="refused", reason=str(error))
            return
        except Exception as error:  # the boundary of this process: told, and tried again like a crash
            reason = str(error) if isinstance(error, ServiceError) else f"{type(error).__name__}: {error}"
            _send(self._control, type="failed", reason=" ".join(reason.split()))
            return
        ours, theirs = zip(*pairs, strict=True)
        _send(self._control, type="ready", description=description, speed=speed)
        self._control.send_lines(list(theirs))
        for descriptor in theirs:
            os.close(descriptor)
        threading.Thread(target=_serve_counts, args=(engine, ours[0]), daemon=True).start()
        for line in ours[1:]:
            threading.Thread(target=_serve_slot, args=(engine, line), daemon=True).start()


def _receive(line: Line) -> dict[str, Any]:
    """The next message; the end of any line is the end of the web process, and so of this one."""
    try:
        message = line.receive()
        assert message is not None
        return message
    except (EOFError, OSError):
        # No cleanup is owed: the kernel frees everything, and a generation under way must not delay the end.
        os._exit(0)


def _send(line: Line, **message: Any) -> None:
    try:
        line.send(**message)
    except OSError:
        os._exit(0)


def _check_golden(engine: Engine, sha256: str, settings: dict[str, Any]) -> Completion:
    """Checks or records the golden answer; what it took is the first measurement of the engine's speed."""
    state_dir = Path(settings["state_dir"])
    recorded = golden.find_golden(state_dir, sha256)
    if recorded is not None:
        return golden.check(engine, recorded, golden.START_CHECK_S)
    if settings["golden"] == "record":
        made, speed = golden.record(engine)
        golden.save_golden(state_dir, sha256, made)
        return speed
    raise ModelRefused("no golden answer is recorded for this model; record it once with: python -m service record")


def _serve_counts(engine: Engine, line: Line) -> None:
    while True:
        message = _receive(line)
        try:
            tokens = engine.count_tokens([Message(**one) for one in message["messages"]])
            _send(line, type="counted", tokens=tokens)
        except RequestMalformed as error:
            _send(line, type="malformed", error=str(error))
        except Exception as error:  # told to the one request it belongs to
            _send(line, type="failed", error=_describe(error))


def _serve_slot(engine: Engine, line: Line) -> None:
    while True:
        message = _receive(line)
        if message["type"] == "generate":  # a cancel that came too late is passed over
            _generate(engine, line, message)


def _generate(engine: Engine, line: Line, message: dict[str, Any]) -> None:
    last_sign_s = time.monotonic()

    def on_piece(piece: Piece) -> None:
        _send(line, type="piece", text=piece.text, tokens=piece.completion_tokens)

    def on_prefill(tokens: int) -> None:
        nonlocal last_sign_s
        if time.monotonic() - last_sign_s > _SIGN_OF_LIFE_EVERY_S:
            last_sign_s = time.monotonic()
            _send(line, type="prefill", tokens=tokens)

    try:
        request = GenerationRequest(
            tuple(Message(**one) for one in message["messages"]),
            message["max_tokens"],
            Sampling(**message["sampling"]),
            owner=message["owner"],
        )
        # While a slot works its line brings nothing but a cancel, or its end.
        done = engine.generate(request, on_piece, on_prefill, cancelled=line.has_input)
        _send(line, type="done", completion=done)
    except Exception as error:  # told to the one request it belongs to
        _send(line, type="failed", error=_describe(error))


def _describe(error: Exception) -> str:
    """For the log: messages of unknown errors may quote a prompt, so type and place stand for them."""
    if isinstance(error, ServiceError):
        return str(error)
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} at {Path(place.filename).name}:{place.lineno}"


def main(descriptor: int, parent_pid: int) -> None:
    """Runs a worker on an inherited socket; ends with its parent, however that ends."""
    # The terminal's Ctrl-C and a unit's SIGTERM go to the whole group; what ends this process is the end of its line.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # A core dump would be the prompt on the disk.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # When memory ends the kernel takes this process first: it costs the answers under way, not the service.
    Path("/proc/self/oom_score_adj").write_text(_FIRST_TO_GO)
    threading.stack_size(_THREAD_STACK_BYTES)
    if os.getppid() != parent_pid:
        return
    Worker(Line(descriptor)).run()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
