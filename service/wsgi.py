"""Owns the running service: builds its parts from the settings, and starts and stops them with the web worker."""

import sys
import threading
from collections.abc import Callable

from service.accounts import Log
from service.app import create_app
from service.control import serve_control
from service.engine.process import EngineProcess, engine_settings
from service.generation import Generator
from service.metrics import Metrics
from service.scheduler import Scheduler
from service.settings import Settings, read_settings


class Runtime:
    """The parts of one service."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.log = Log()
        self.engine = EngineProcess(engine_settings(settings), stall_timeout_s=settings.stall_timeout_s)
        self.scheduler = Scheduler(settings.queue_size)
        self.metrics = Metrics(self.engine, self.scheduler, settings.price_eur_per_hour)
        self.generator = Generator(self.engine, self.scheduler, self.metrics, settings)
        self.application = create_app(self.generator, self.log)
        self._close_control: Callable[[], None] = lambda: None

    def start(self) -> None:
        """Called in the web worker once it is there; the engine loads beside it."""
        # First the socket: it is made under a narrow umask, which no engine may inherit.
        self._close_control = serve_control(self.settings.control_socket, self.generator, self.log)
        self.engine.start()
        threading.Thread(target=self._watch_engine, name="engine-watch", daemon=True).start()

    def stop_gently(self) -> None:
        """Called at SIGTERM: no new requests, and an end to the old ones at the drain's limit."""
        self.scheduler.drain()
        timer = threading.Timer(self.settings.drain_limit_s, self._cancel_all)
        timer.daemon = True
        timer.start()

    def stop(self) -> None:
        """Called when the web worker ends."""
        self._close_control()
        self.engine.stop()

    def _cancel_all(self) -> None:
        self.generator.cancel_all = True

    def _learn_speed(self) -> None:
        first = self.engine.first_speed
        if first is not None:
            self.scheduler.speed.learn(
                first.prefill_tokens, first.prefill_s, first.completion_tokens, first.decode_s, None
            )

    def _watch_engine(self) -> None:
        """Tells each change of the engine's state in the log, and its slots to the scheduler."""
        last = None
        announced = False
        while True:
            state = self.engine.wait_change(last)
            last = state
            description = self.engine.describe()
            if state.phase == "ready" and description is not None:
                self.scheduler.set_slots(description.slots)
                self._learn_speed()
            self.log.write("engine", phase=state.phase, reason=state.reason, restarts=self.engine.restarts)
            if state.phase == "ready" and self.settings.announce and not announced:
                announced = True
                print(_announcement(self.settings, description.model), file=sys.stderr, flush=True)
            if state.phase in ("failed", "stopped"):
                return


def _announcement(settings: Settings, model: str) -> str:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return (
        f"\n{model} is ready. Try it in another terminal:\n\n"
        f"  curl -s http://{host}:{settings.port}/generate -H 'Content-Type: application/json' "
        f"""-d '{{"prompt": "What is mini-llm?"}}'\n"""
    )


runtime = Runtime(read_settings())
application = runtime.application
