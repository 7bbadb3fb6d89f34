"""Owns the metrics: their names (a contract), labels and buckets, and what is read at each scrape."""

import time
from collections.abc import Iterator

import psutil
from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from service.engine.process import EngineProcess
from service.scheduler import Scheduler

# Answers on a CPU take from milliseconds (health) to minutes (a long answer of an 8B model).
_REQUEST_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 60, 120, 240, 600)
_TOKEN_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class _HostCollector:
    """Gauges that are read at the scrape: processes, engine, queue, cost."""

    def __init__(self, engine: EngineProcess, scheduler: Scheduler, price_eur_per_hour: float):
        self._engine, self._scheduler = engine, scheduler
        self._price_eur_per_hour = price_eur_per_hour
        self._started_s = time.monotonic()
        self._web = psutil.Process()
        self._child: psutil.Process | None = None

    def _processes(self) -> list[psutil.Process]:
        pid = self._engine.pid
        if pid is None:
            self._child = None
        elif self._child is None or self._child.pid != pid:
            try:
                self._child = psutil.Process(pid)
            except psutil.NoSuchProcess:
                self._child = None
        return [self._web, *([self._child] if self._child else [])]

    def collect(self) -> Iterator[Metric]:
        cpu_percent, memory_bytes = 0.0, 0
        for process in self._processes():
            try:
                # Since the last scrape; 100 is one whole CPU.
                cpu_percent += process.cpu_percent(None)
                memory_bytes += process.memory_info().rss
            except psutil.NoSuchProcess:
                continue  # the engine ended between two lines; the next scrape sees the new one
        running, waiting = self._scheduler.counts()
        ready = self._engine.state.phase == "ready"
        hours = (time.monotonic() - self._started_s) / 3600
        yield GaugeMetricFamily("llm_model_loaded", "1 while the engine is ready to generate.", float(ready))
        yield GaugeMetricFamily("llm_cpu_usage_percent", "CPU use of web and engine process, 100 a CPU.", cpu_percent)
        yield GaugeMetricFamily("llm_memory_usage_bytes", "Resident memory of web and engine process.", memory_bytes)
        # Under the name that all programs have for it; nothing else shows what ends and begins between two scrapes.
        yield GaugeMetricFamily(
            "process_start_time_seconds", "When the web process began, in Unix time.", self._web.create_time()
        )
        yield GaugeMetricFamily("llm_requests_in_flight", "Requests that hold a slot of the engine.", running)
        yield GaugeMetricFamily("llm_queue_depth", "Requests that wait for a slot.", waiting)
        yield CounterMetricFamily("llm_engine_restarts", "Restarts of the engine's process.", self._engine.restarts)
        yield CounterMetricFamily(
            "llm_cost_eur", "Price of the time this service has run.", hours * self._price_eur_per_hour
        )


class Metrics:
    """All metrics of one service, in a registry of their own."""

    def __init__(self, engine: EngineProcess, scheduler: Scheduler, price_eur_per_hour: float):
        disable_created_metrics()  # type: ignore[no-untyped-call]  # the library leaves it without annotations
        self.registry = registry = CollectorRegistry()
        registry.register(_HostCollector(engine, scheduler, price_eur_per_hour))
        self.requests = Counter(
            "llm_requests_total",
            "Requests by method, route and status.",
            ["method", "endpoint", "status"],
            registry=registry,
        )
        self.request_duration = self._histogram(
            "llm_request_duration_seconds", "From the request's arrival to its last byte.", ["endpoint"]
        )
        self.inference_duration = self._histogram(
            "llm_inference_duration_seconds", "Time in the engine, prefill and decode."
        )
        self.tokens_generated = Counter("llm_tokens_generated_total", "Tokens generated.", registry=registry)
        self.prompt_tokens = Counter("llm_prompt_tokens_total", "Prompt tokens accepted.", registry=registry)
        self.time_to_first_token = self._histogram(
            "llm_time_to_first_token_seconds", "From the request's arrival to its first text."
        )
        self.time_per_output_token = self._histogram(
            "llm_time_per_output_token_seconds", "Decode time by token.", buckets=_TOKEN_BUCKETS_S
        )
        self.queue_wait = self._histogram("llm_queue_wait_seconds", "Time from admission to the slot.")
        self.refusals = Counter(
            "llm_refusals_total", "Requests refused for want of room or time.", ["reason"], registry=registry
        )
        # There from the start: a rate of what appears with its first event does not see that event.
        for reason in ("queue_full", "queue_timeout", "deadline"):
            self.refusals.labels(reason)
        self.cancelled = Counter(
            "llm_cancelled_total", "Generations ended before their time.", ["reason"], registry=registry
        )

    def _histogram(
        self, name: str, text: str, labels: list[str] | None = None, buckets: tuple[float, ...] = _REQUEST_BUCKETS_S
    ) -> Histogram:
        return Histogram(name, text, labels or [], buckets=buckets, registry=self.registry)

    def count_bad_request(self, status: int) -> None:
        """Counts a request that never reached the application: not HTTP, or too slow."""
        self.requests.labels("OTHER", "none", str(status)).inc()

    def render(self) -> bytes:
        """The text exposition of all metrics."""
        return generate_latest(self.registry)
