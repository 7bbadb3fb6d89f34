"""Owns the engine's process: verifies and loads one model, then answers the messages on its pipe until the pipe ends.

The main thread reads messages and counts tokens; one thread a slot generates. Messages are JSON, one an item of
``multiprocessing.connection.Connection``; ``process`` holds the other end and lists them. Whatever kills this process
(an abort inside llama.cpp, the kernel's OOM killer) costs the request it was running and nothing else.
"""

import ctypes
import importlib
import json
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from service import golden
from service.engine import gguf, host
from service.engine.interface import Engine, GenerationRequest, Message, ModelSpec, Piece, Sampling
from service.errors import ModelRefused, RequestMalformed, ServiceError
from service.models import open_verified, resolve

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_SIGN_OF_LIFE_EVERY_S = 0.25


def choose_context_length(header: gguf.GgufHeader, asked: int | None, memory_bytes: int) -> int:
    """The context to open: what was asked for, else all that the file allows and the memory holds.

    Raises ModelRefused if the file does not allow it, or the memory does not hold it.
    """
    if asked is not None and asked > header.context_length:
        raise ModelRefused(f"the model's context ends at {header.context_length} tokens, {asked} were asked for")
    largest = gguf.largest_context(header, memory_bytes)
    wanted = asked or largest
    if largest < max(1, wanted):
        need = gguf.required_memory_bytes(header, asked or min(512, header.context_length))
        raise ModelRefused(
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
        threads=settings["threads"] or host.threads_here(),
    )
    return importlib.import_module(settings["adapter"]).load(spec)


class Worker:
    """The loop between the pipe and one engine."""

    def __init__(self, connection: Connection):
        self._connection = connection
        self._send_lock = threading.Lock()
        self._jobs: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._under_way: set[int] = set()  # waiting for a slot or in one
        self._cancelled: set[int] = set()
        self._engine: Engine | None = None

    def send(self, **message: Any) -> None:
        """Sends one message; when the other end is gone this process has no purpose any more."""
        try:
            with self._send_lock:
                self._connection.send_bytes(json.dumps(message).encode())
        except OSError:
            os._exit(0)

    def serve(self) -> None:
        """Reads messages until the pipe ends."""
        settings = self._receive()
        threading.Thread(target=self._load_and_work, args=(settings,), daemon=True).start()
        while True:
            message = self._receive()
            match message["type"]:
                case "generate":
                    self._under_way.add(message["id"])
                    self._jobs.put(message)
                case "cancel" if message["id"] in self._under_way:
                    self._cancelled.add(message["id"])
                case "count":
                    self._count(message)

    def _receive(self) -> dict[str, Any]:
        try:
            return json.loads(self._connection.recv_bytes())
        except (EOFError, OSError):
            # No cleanup is owed: the kernel frees everything, and a generation under way must not delay the end.
            os._exit(0)

    def _load_and_work(self, settings: dict[str, Any]) -> None:
        try:
            engine = load_engine(settings, lambda phase: self.send(type="phase", phase=phase))
            description = engine.describe()
            self.send(type="phase", phase="checking")
            recorded = golden.find_golden(Path(settings["state_dir"]), description.sha256)
            if recorded is None and settings["golden"] == "check":
                raise ModelRefused(
                    "no golden answer is recorded for this model; record it once with: python -m service record"
                )
            if recorded is None:
                made = golden.record(engine)
                golden.save_golden(Path(settings["state_dir"]), description.sha256, made)
            else:
                golden.check(engine, recorded)
        except ServiceError as error:
            self.send(type="refused", reason=str(error))
            return
        except Exception as error:  # the boundary of this process: a bug is told, not left to a silent thread
            self.send(type="refused", reason=f"the engine could not start: {type(error).__name__}: {error}")
            raise
        self._engine = engine
        self.send(type="ready", description=asdict(description))
        for _ in range(description.slots - 1):
            threading.Thread(target=self._work, daemon=True).start()
        self._work()

    def _work(self) -> None:
        while True:
            self._generate(self._jobs.get())

    def _generate(self, message: dict[str, Any]) -> None:
        identity = message["id"]

        last_sign_s = time.monotonic()

        def on_piece(piece: Piece) -> None:
            self.send(type="piece", id=identity, text=piece.text, tokens=piece.completion_tokens)

        def on_prefill(tokens: int) -> None:
            nonlocal last_sign_s
            if time.monotonic() - last_sign_s > _SIGN_OF_LIFE_EVERY_S:
                last_sign_s = time.monotonic()
                self.send(type="prefill", id=identity, tokens=tokens)

        try:
            request = GenerationRequest(
                tuple(Message(**one) for one in message["messages"]),
                message["max_tokens"],
                Sampling(**message["sampling"]),
            )
            done = self._engine.generate(request, on_piece, on_prefill, lambda: identity in self._cancelled)
            self.send(type="done", id=identity, completion=asdict(done))
        except Exception as error:  # told to the one request it belongs to
            self.send(type="failed", id=identity, error=f"{type(error).__name__}: {error}")
        finally:
            self._under_way.discard(identity)
            self._cancelled.discard(identity)

    def _count(self, message: dict[str, Any]) -> None:
        identity = message["id"]
        try:
            if self._engine is None:
                raise ModelRefused("the engine is not ready")
            tokens = self._engine.count_tokens([Message(**one) for one in message["messages"]])
            self.send(type="counted", id=identity, tokens=tokens)
        except RequestMalformed as error:
            self.send(type="malformed", id=identity, error=str(error))
        except Exception as error:  # told to the one request it belongs to
            self.send(type="failed", id=identity, error=f"{type(error).__name__}: {error}")


def main(descriptor: int, parent_pid: int) -> None:
    """Runs a worker on an inherited socket; ends with its parent, however that ends."""
    # The terminal's Ctrl-C and a unit's SIGTERM go to the whole group; the end of the pipe is what ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        return
    Worker(Connection(descriptor)).serve()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
