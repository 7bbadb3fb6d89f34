"""Owns the paths that tell how the service is: health, readiness, metrics, version, use of the keys."""

from dataclasses import asdict
from typing import Any

import falcon

from service import __version__, accounts
from service.access import Access, Caller
from service.generation import Generator
from service.limits import Limiter, Use
from service.metrics import CONTENT_TYPE, Metrics


class HealthResource:
    """``GET /health``: the process is alive; waits for nothing."""

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        resp.media = {"status": "alive"}

    on_head = on_get


class ReadyResource:
    """``GET /ready``: 200 once the engine has given its golden answer, 503 with the reason otherwise."""

    def __init__(self, generator: Generator):
        self._generator = generator

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        generator = self._generator
        reason = generator.unready_reason()
        running, waiting = generator.scheduler.counts()
        phase = "draining" if generator.scheduler.draining else generator.engine.state.phase
        if generator.find_problem():
            phase = "failed"
        speed = generator.scheduler.speed.tokens_per_second()
        document: dict[str, Any] = {
            "status": phase,
            "running": running,
            "waiting": waiting,
            "predicted_wait_s": round(generator.scheduler.predicted_wait_s(), 1),
            "tokens_per_second": None if speed is None else round(speed, 2),
        }
        if reason is not None:
            resp.status = 503
            document["reason"] = reason
            # Load takes seconds; a failed engine stays failed until somebody acts.
            resp.set_header("Retry-After", "60" if phase in ("failed", "draining") else "1")
        resp.media = document

    on_head = on_get


class MetricsResource:
    """``GET /metrics``: the text exposition."""

    scope = "metrics"

    def __init__(self, metrics: Metrics):
        self._metrics = metrics

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        resp.content_type = CONTENT_TYPE
        resp.data = self._metrics.render()

    on_head = on_get


class VersionResource:
    """``GET /version``: service, image, boot, engine and model; the model is null until it was loaded once."""

    def __init__(self, generator: Generator, image: dict[str, str] | None):
        """``image`` is what the node was baked as, None elsewhere."""
        self._generator, self._image = generator, image

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        description = self._generator.engine.describe()
        document: dict[str, Any] = {
            "service": "mini-llm",
            "version": __version__,
            "image": self._image,
            "boot": None if self._generator.timeline is None else self._generator.timeline.tell(),
            "keys_required": self._generator.settings.keys_required,
            "engine": None,
            "model": None,
        }
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

    on_head = on_get


class UsageResource:
    """``GET /usage``: where the caller's key stands with its limits; a key with the scope admin sees all keys."""

    scope = "generate"

    def __init__(self, limiter: Limiter, access: Access):
        self._limiter, self._access = limiter, access

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        caller: Caller = req.env[accounts.CALLER]
        callers = {caller.name: caller.limits}
        if "admin" in caller.scopes and self._access.keys is not None:
            callers |= {key.name: key.limits for key in self._access.keys.read()}
        resp.media = {
            "keys": [
                {
                    "name": name,
                    "tokens_today": self._limiter.tokens_today(name),
                    "limits": [_describe_use(use) for use in self._limiter.key_uses(name, limits)],
                }
                for name, limits in sorted(callers.items())
            ]
        }

    on_head = on_get


def _describe_use(use: Use) -> dict[str, Any]:
    return {"name": use.policy, "limit": use.limit, "used": use.used, "reset_s": round(use.reset_s, 1)}
