"""Owns the running service: builds its parts from the settings, and starts and stops them with the web worker."""

import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn

from service.access import Access
from service.accounts import Log
from service.app import create_app
from service.audit import AuditLog
from service.control import serve_control
from service.counters import NodeStorage
from service.engine.process import EngineProcess, engine_settings
from service.errors import ServiceError
from service.generation import Generator
from service.keys import KeyFile
from service.limits import Limiter
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
        self.counters = NodeStorage(settings.state_dir / "counters.sqlite3")
        self.limiter = Limiter(settings.address_limits, self.counters, self.scheduler.predicted_end_s)
        self.generator = Generator(self.engine, self.scheduler, self.limiter, self.metrics, settings)
        self.audit = AuditLog(settings.audit_dir, begin=settings.audit_begin, node=settings.node)
        keys = KeyFile(settings.keys_file, settings.revoked_file) if settings.keys_required else None
        access = Access(keys, settings.trusted_proxies)
        self.application = create_app(self.generator, access, self.audit, self.log)
        self._stopping = threading.Event()
        self._close_control: Callable[[], None] = lambda: None

    def start(self) -> None:
        """Called in the web worker once it is there; the engine loads beside it."""
        # First the socket: it is made under a narrow umask, which no engine may inherit.
        self._close_control = serve_control(self.settings.control_socket, self.generator, self.counters, self.log)
        self.engine.start()
        # Made beforehand: SIGTERM may come while the main thread holds what starting a thread needs.
        threading.Thread(target=self._cancel_at_the_limit, name="drain-limit", daemon=True).start()
        threading.Thread(target=self._watch_engine, name="engine-watch", daemon=True).start()

    def stop_gently(self) -> None:
        """Called at SIGTERM: no new requests, and an end to the old ones at the drain's limit."""
        self.scheduler.drain()
        self._stopping.set()

    def stop(self) -> None:
        """Called when the web worker ends."""
        self._close_control()
        self.engine.stop()
        self.audit.close()
        self.counters.close()

    def _cancel_at_the_limit(self) -> None:
        self._stopping.wait()
        time.sleep(self.settings.drain_limit_s)
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
                self.generator.note("model")
            self.log.write("engine", phase=state.phase, reason=state.reason, restarts=self.engine.restarts)
            if state.phase == "ready" and description is not None and self.settings.announce and not announced:
                announced = True
                print(_announcement(self.settings, description.model), file=sys.stderr, flush=True)
            if state.phase in ("failed", "stopped"):
                return


def _announcement(settings: Settings, model: str) -> str:
    # Where every address is listened on, the one of this machine itself is the one that works here.
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)  # noqa: S104
    base = f"http://[{host}]:{settings.port}" if ":" in host else f"http://{host}:{settings.port}"
    key = """ -H "Authorization: Bearer $LLM_KEY\"""" if settings.keys_required else ""
    return (
        f"\n{model} is ready. Open {base}/ in a browser, or try it in another terminal:\n\n"
        f"  curl -sS {base}/generate{key} -H 'Content-Type: application/json' "
        f"""-d '{{"prompt": "What is mini-llm?"}}'\n"""
    )


def refuse(refusal: ServiceError) -> NoReturn:
    """Ends this process with one line, by gunicorn's own code for what cannot be loaded: it tries no more."""
    print(f"error: {refusal}", file=sys.stderr, flush=True)
    sys.exit(4)


try:
    runtime = Runtime(read_settings())
except ServiceError as refusal:
    refuse(refusal)
application = runtime.application
