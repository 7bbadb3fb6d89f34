"""Owns one generation from admission to its last word: queue, engine, stop strings, client that leaves, accounts.

Framework-free: the resources translate what comes out of here into HTTP.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from service.access import Caller
from service.boot import Timeline
from service.engine.interface import Completion, GenerationRequest, Piece
from service.engine.process import EngineProcess, Stream
from service.errors import ContextExceeded, EngineLost, ServiceError, Unavailable
from service.limits import Lease, Limiter
from service.metrics import Metrics
from service.scheduler import Scheduler, Ticket, Work
from service.schema import GenerateRequest
from service.settings import Settings
from service.stops import StopFilter

_TICK_S = 0.1  # how often a waiting request looks after its client, its deadline and its limits


class Client(Protocol):
    """Whoever waits for the answer, as far as a generation cares."""

    def gone(self) -> bool: ...

    def hang_up(self) -> None: ...


@dataclass(frozen=True)
class Waiting:
    """Nothing happened for a tick: the time for a comment line that keeps proxies patient."""


@dataclass(frozen=True)
class Text:
    """A piece of the answer that may be sent."""

    text: str


@dataclass
class Account:
    """What one generation came to; the answer's usage and timings, and the log line, are read from it."""

    prompt_tokens: int = 0
    max_tokens: int = 0
    completion_tokens: int = 0
    finish_reason: str | None = None
    cancelled_by: str | None = None
    queue_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    first_text_s: float | None = None
    held_up_s: float = 0.0  # by a client that did not read
    started_s: float = field(default_factory=time.monotonic)

    def timings(self) -> dict[str, float]:
        """Milliseconds and rates, as the answer shows them."""
        rate = self.completion_tokens / self.decode_s if self.decode_s > 0 else 0.0
        return {
            "queue_ms": round(self.queue_s * 1000, 1),
            "prefill_ms": round(self.prefill_s * 1000, 1),
            "decode_ms": round(self.decode_s * 1000, 1),
            "total_ms": round((time.monotonic() - self.started_s) * 1000, 1),
            "tokens_per_second": round(rate, 2),
        }

    def usage(self) -> dict[str, int]:
        """Token counts, as the answer shows them."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }


class Generator:
    """Begins generations; one for the whole service."""

    def __init__(
        self, engine: EngineProcess, scheduler: Scheduler, limiter: Limiter, metrics: Metrics, settings: Settings
    ):
        self.engine, self.scheduler, self.limiter = engine, scheduler, limiter
        self.metrics, self.settings = metrics, settings
        self.cancel_all = False  # set when the drain's limit is over
        self.running: set[Generation] = set()
        self._counting: dict[str, threading.Lock] = {}  # by owner: counting goes from one to the next, as turns do
        self.started_at = int(time.time())  # seconds since the epoch
        self.timeline = None if settings.boot_dir is None else Timeline(settings.boot_dir)

    @property
    def model_name(self) -> str:
        """The model's name; empty before the first load."""
        description = self.engine.describe()
        return "" if description is None else description.model

    def begin(self, request: GenerateRequest, deadline_s: float | None, client: Client, caller: Caller) -> "Generation":
        """Admits a request, counts its prompt, reserves its tokens and holds its place; nothing is evaluated yet.

        Raises Unavailable, LimitReached, FieldOutOfBounds, ContextExceeded, RequestMalformed, EngineFailed.
        """
        account = Account()
        lease = self.limiter.enter(caller)
        try:
            ticket = self._admit(caller)
            try:
                account.prompt_tokens = self._count(request, deadline_s, client.gone, caller.identity)
                account.max_tokens = self._fit(request, account.prompt_tokens, lease)
                lease.reserve(account.max_tokens)
                work = Work(account.prompt_tokens, account.max_tokens, request.max_tokens_named)
                ticket.declare(work, deadline_s)
            except BaseException:
                ticket.release()
                raise
        except BaseException as error:
            lease.release(0)
            if isinstance(error, Unavailable):
                self.metrics.refusals.labels(error.label).inc()
            raise
        self.metrics.prompt_tokens.inc(account.prompt_tokens)
        return Generation(self, ticket, lease, request, deadline_s, client, account)

    def note(self, event: str) -> None:
        """Something has happened for the first time, for the timeline of a node's boot."""
        if self.timeline is not None:
            self.timeline.note(event)

    def cut_off(self) -> None:
        """Ends the connections of what still runs: the last means, for clients that do not read their answer."""
        for generation in list(self.running):
            generation.cut_off()

    def find_problem(self) -> str | None:
        """What keeps this whole node from serving, as told in the settings' problem file; None without one."""
        try:
            if self.settings.problem_file is None:
                return None
            return self.settings.problem_file.read_text().strip() or "this node has a problem that was not told"
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            return f"{self.settings.problem_file} cannot be read: {error}"

    def unready_reason(self) -> str | None:
        """Why no request is taken now, or None if the service is ready."""
        if problem := self.find_problem():
            return problem
        if self.scheduler.draining:
            return "the service is draining"
        state = self.engine.state
        return None if state.phase == "ready" else state.reason

    def _admit(self, caller: Caller) -> Ticket:
        if self.settings.problem_file is not None and (problem := self.find_problem()):
            raise Unavailable("node_problem", problem, 60.0)
        state = self.engine.state
        if state.phase in ("failed", "stopped"):
            raise Unavailable("engine_failed", state.reason, 60.0)
        if state.phase != "ready" and not self.scheduler.draining and self.engine.describe() is None:
            raise Unavailable("loading", state.reason, 2.0)
        return self.scheduler.admit(caller.identity, caller.address_identity)

    def _count(self, request: GenerateRequest, deadline_s: float | None, gone: Callable[[], bool], owner: str) -> int:
        """Counts, through restarts of the engine if there are any: another request's crash is not this one's.

        Only a prompt that the engine had in its hands twice when it died is held to be the cause.
        """
        begun_s, longest_s = time.monotonic(), self.settings.queue_wait_s

        def look_after_request(reason: str, message: str) -> None:
            waited_s = time.monotonic() - begun_s
            if deadline_s is not None and waited_s > deadline_s:
                raise Unavailable("deadline", f"the deadline is over: {message}", None)
            if waited_s > longest_s:
                raise Unavailable(reason, message, 5.0)
            if gone():
                raise Unavailable("client_left", "the client has left", 1.0)

        counting = self._counting.setdefault(owner, threading.Lock())
        while not counting.acquire(timeout=_TICK_S):
            look_after_request("queue_timeout", "other prompts of the same key are still being counted")
        try:
            deaths = 0
            while True:
                while not self.engine.wait_ready(_TICK_S):
                    if self.engine.state.phase in ("failed", "stopped"):
                        raise Unavailable("loading", self.engine.state.reason, 5.0)
                    look_after_request("loading", self.engine.state.reason)
                try:
                    return self.engine.count_tokens(request.messages)
                except EngineLost as error:
                    deaths += error.begun
                    if deaths == 2:
                        raise
        finally:
            counting.release()

    def _fit(self, request: GenerateRequest, prompt_tokens: int, lease: Lease) -> int:
        description = self.engine.describe()
        assert description is not None
        room = description.context_length - prompt_tokens
        wanted = request.max_tokens if request.max_tokens_named else 1
        if wanted > room:
            raise ContextExceeded(prompt_tokens, wanted, description.context_length)
        if request.max_tokens_named:
            return wanted
        left = lease.tokens_left()
        return max(1, min(request.max_tokens, room, room if left is None else left))


class Generation:
    """One generation, pulled step by step; ``close`` must be called however it ends."""

    def __init__(
        self,
        generator: Generator,
        ticket: Ticket,
        lease: Lease,
        request: GenerateRequest,
        deadline_s: float | None,
        client: Client,
        account: Account,
    ):
        self._generator, self._ticket, self._lease, self._request = generator, ticket, lease, request
        self._deadline_s, self._client = deadline_s, client
        self._stop = StopFilter(request.stop)
        self._stream: Stream | None = None
        self._ended = False
        self._closed = False
        self.account = account
        generator.running.add(self)

    @property
    def ended(self) -> bool:
        return self._ended

    @property
    def closed(self) -> bool:
        return self._closed

    def step(self) -> Waiting | Text | None:
        """The next thing that happened, within about 0.1 s; None once the generation has ended.

        Raises Unavailable when the turn did not come in time, EngineLost or EngineFailed when the engine gave up.
        """
        if self._ended:
            return None
        if self._stream is None:
            return self._wait_for_stream()
        try:
            event = self._stream.next(_TICK_S)
        except ServiceError:
            self._ended = True  # no completion will come any more
            raise
        if isinstance(event, Completion):
            return self._finish(event)
        if isinstance(event, Piece):
            self.account.completion_tokens = event.completion_tokens
            text = self._stop.feed(event.text)
            if self._stop.stopped:
                self._stream.cancel()
            if text and self.account.first_text_s is None:
                self.account.first_text_s = time.monotonic() - self.account.started_s
                self._generator.note("first_token")
            self._look_after_client()
            return Text(text) if text else Waiting()
        self._look_after_client()
        return Waiting()

    def close(self) -> None:
        """Stops what still runs, gives the slot back once the engine has let go of it, and settles the accounts."""
        if self._closed:
            return
        self._closed = True
        self._generator.running.discard(self)
        try:
            if self._stream is not None and not self._ended:
                self.account.cancelled_by = self.account.cancelled_by or "client"
                self._stream.cancel()
                self._drain_stream(self._stream)
        finally:
            self._ticket.release()
            self._lease.release(self.account.completion_tokens)
            self._settle()

    def cut_off(self) -> None:
        """See ``Generator.cut_off``; called from another thread."""
        self._client.hang_up()

    def _drain_stream(self, stream: Stream) -> None:
        """Waits for the engine to confirm a cancel: the slot is free only then."""
        try:
            while not self._ended:
                event = stream.next(_TICK_S)
                if isinstance(event, Completion):
                    self._finish(event)
        except ServiceError:
            self._ended = True  # the engine is gone, and its slot with it

    def _wait_for_stream(self) -> Waiting | None:
        settings = self._generator.settings
        if not self._ticket.wait_turn(_TICK_S) or not self._generator.engine.wait_ready(_TICK_S):
            waited_s = self._generator.scheduler.clock() - self._ticket.admitted_s
            if waited_s > settings.queue_wait_s:
                self._ended = True
                self.account.queue_s = waited_s
                self._generator.metrics.refusals.labels("queue_timeout").inc()
                raise Unavailable(
                    "queue_timeout",
                    f"no turn within {settings.queue_wait_s:g} s",
                    max(1.0, self._generator.scheduler.predicted_wait_s()),
                )
            state = self._generator.engine.state
            if state.phase in ("failed", "stopped"):
                self._ended = True
                raise Unavailable("engine_failed", state.reason, 60.0)
            self._look_after_client()
            if self.account.cancelled_by:
                self._ended = True
                self.account.finish_reason = "cancelled"
                return None
            return Waiting()
        self.account.queue_s = time.monotonic() - self.account.started_s
        request = GenerationRequest(
            self._request.messages, self.account.max_tokens, self._request.sampling, owner=self._ticket.owner
        )
        try:
            self._stream = self._generator.engine.generate(request)
        except EngineLost:
            pass  # it went in this very moment, and this request has not begun: its turn stays
        return Waiting()

    def _look_after_client(self) -> None:
        """Cancels when nobody waits for the answer any more, or the deadline or the drain's limit is over."""
        if self.account.cancelled_by or self._stop.stopped:
            return
        late = (
            self._deadline_s is not None
            and self._generator.scheduler.clock() - self._ticket.admitted_s > self._deadline_s
        )
        if self._client.gone():
            self.account.cancelled_by = "client"
        elif late:
            self.account.cancelled_by = "deadline"
        elif self._generator.cancel_all:
            self.account.cancelled_by = "drain"
        if self.account.cancelled_by and self._stream is not None:
            self._stream.cancel()

    def _finish(self, completion: Completion) -> Text | None:
        self._ended = True
        account = self.account
        account.completion_tokens = completion.completion_tokens
        account.prefill_s, account.decode_s = completion.prefill_s, completion.decode_s
        account.finish_reason = "stop" if self._stop.stopped else completion.finish_reason
        if account.held_up_s <= completion.decode_s / 10:  # else it tells of its client, not of the engine
            self._generator.scheduler.speed.learn(
                completion.prefill_tokens,
                completion.prefill_s,
                completion.completion_tokens,
                completion.decode_s,
                None if completion.finish_reason == "cancelled" and not self._stop.stopped else account.max_tokens,
            )
        rest = self._stop.flush()
        return Text(rest) if rest else None

    def _settle(self) -> None:
        metrics, account = self._generator.metrics, self.account
        metrics.tokens_generated.inc(account.completion_tokens)
        metrics.queue_wait.observe(account.queue_s)
        if account.cancelled_by:
            metrics.cancelled.labels(account.cancelled_by).inc()
        if account.first_text_s is not None:
            metrics.time_to_first_token.observe(account.first_text_s)
        if account.prefill_s or account.decode_s:
            metrics.inference_duration.observe(account.prefill_s + account.decode_s)
        if account.completion_tokens:
            metrics.time_per_output_token.observe(account.decode_s / account.completion_tokens)
