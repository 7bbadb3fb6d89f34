"""A fake engine in a thread instead of a process, for unit tests: the same calls as ``EngineProcess``."""

import queue
import threading
from typing import cast

from service.engine.interface import Completion, Description, GenerationRequest, Message, Piece
from service.engine.process import EngineProcess, EngineState
from service.errors import EngineFailed, EngineLost
from tests.fake_engine import FakeEngine


class LocalStream:
    def __init__(self) -> None:
        self.events: queue.SimpleQueue[object] = queue.SimpleQueue()
        self.cancelled = threading.Event()

    def next(self, timeout_s: float) -> Piece | Completion | None:
        try:
            event = self.events.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if isinstance(event, Exception):
            raise event
        assert event is None or isinstance(event, Piece | Completion)
        return event

    def cancel(self) -> None:
        self.cancelled.set()


class LocalEngine:
    def __init__(self, engine: FakeEngine | None = None):
        self.engine = engine or FakeEngine()
        self.state = EngineState("ready", "the engine is ready")
        self.restarts = 0
        self.pid = None
        self.lose_counts = 0
        self.begun = True

    def as_process(self) -> EngineProcess:
        """It, in the place of the real one, whose calls of it are all here."""
        return cast(EngineProcess, self)

    def describe(self) -> Description | None:
        return None if self.state.phase == "loading" else self.engine.describe()

    def wait_ready(self, timeout_s: float) -> bool:
        return self.state.phase == "ready"

    def count_tokens(self, messages: list[Message]) -> int:
        if self.lose_counts:
            self.lose_counts -= 1
            raise EngineLost("lost while counting", begun=self.begun)
        return self.engine.count_tokens(messages)

    def generate(self, request: GenerationRequest) -> LocalStream:
        stream = LocalStream()

        def run() -> None:
            try:
                done: object = self.engine.generate(
                    request, stream.events.put, lambda tokens: None, stream.cancelled.is_set
                )
            except EngineFailed as error:
                done = error
            stream.events.put(done)

        threading.Thread(target=run, daemon=True).start()
        return stream
