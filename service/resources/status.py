"""Owns the paths that tell how the service is: health, readiness, metrics, version."""

from dataclasses import asdict
from typing import Any

import falcon

from service import __version__
from service.generation import Generator
from service.metrics import CONTENT_TYPE, Metrics


class HealthResource:
    """``GET /health``: the process is alive; waits for nothing."""

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        resp.media = {"status": "alive"}


class ReadyResource:
    """``GET /ready``: 200 once the engine has given its golden answer, 503 with the reason otherwise."""

    def __init__(self, generator: Generator):
        self._generator = generator

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        generator = self._generator
        reason = generator.unready_reason()
        running, waiting = generator.scheduler.counts()
        phase = "draining" if generator.scheduler.draining else generator.engine.state.phase
        document: dict[str, Any] = {"status": phase, "running": running, "waiting": waiting}
        if reason is not None:
            resp.status = 503
            document["reason"] = reason
            # Load takes seconds; a failed engine stays failed until somebody acts.
            resp.set_header("Retry-After", "60" if phase in ("failed", "draining") else "1")
        resp.media = document


class MetricsResource:
    """``GET /metrics``: the text exposition."""

    def __init__(self, metrics: Metrics):
        self._metrics = metrics

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        resp.content_type = CONTENT_TYPE
        resp.data = self._metrics.render()


class VersionResource:
    """``GET /version``: service, engine and model; the model is null until it was loaded once."""

    def __init__(self, generator: Generator):
        self._generator = generator

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        description = self._generator.engine.describe()
        document: dict[str, Any] = {"service": "mini-llm", "version": __version__, "engine": None, "model": None}
        if description is not None:
            facts = asdict(description)
            document["engine"] = {
                "name": facts["engine"],
                "version": facts["engine_version"],
                "slots": facts["slots"],
                "threads": facts["threads"],
                "batch_tokens": facts["batch_tokens"],
            }
            document["model"] = {
                "name": facts["model"],
                "sha256": facts["sha256"],
                "architecture": facts["architecture"],
                "quantization": facts["quantization"],
                "parameters": facts["parameter_count"],
                "context_length": facts["context_length"],
            }
        resp.media = document
