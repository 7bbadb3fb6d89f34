"""Owns the application: routes, the gate before them, and the one place where errors become HTTP."""

from collections.abc import Callable, Iterable
from typing import Any

import falcon

from service import accounts, problems
from service.access import Access, Caller
from service.accounts import Accounts, Log
from service.audit import AuditLog
from service.errors import (
    AuditUnwritable,
    Forbidden,
    KeysUnusable,
    LimitReached,
    ServiceError,
    StateUnwritable,
    Unauthenticated,
)
from service.generation import Generator
from service.limits import Limiter, render_headers
from service.openai_schema import parse_chat, parse_completion
from service.openapi import OpenApiResource
from service.resources.answering import Answerer
from service.resources.generate import GenerateResource
from service.resources.openai import ChatShape, CompletionShape, ModelResource, ModelsResource, TextResource
from service.resources.page import add_page
from service.resources.status import HealthResource, MetricsResource, ReadyResource, UsageResource, VersionResource
from service.settings import read_image

_HTTP_DETAILS = {
    404: "there is no such path",
    405: "this path does not take this method; see the Allow header",
}
_OPENAI_PREFIX = "/v1/"
# What the operator must mend; the client is told no more than that.
_RECORDS_FAILED = KeysUnusable | AuditUnwritable | StateUnwritable


class _Gate:
    """Falcon middleware: a guarded resource names the scope it needs; nobody gets past without key and room."""

    def __init__(self, access: Access, limiter: Limiter):
        self._access, self._limiter = access, limiter

    def process_request(self, req: falcon.Request, resp: falcon.Response) -> None:
        req.env[accounts.ADDRESS] = self._access.address(req.env)

    def process_resource(self, req: falcon.Request, resp: falcon.Response, resource: Any, params: Any) -> None:
        req.env[accounts.ENDPOINT] = req.uri_template  # the raw path never becomes a label
        scope = getattr(resource, "scope", None)
        if scope is None or req.method == "OPTIONS":
            return
        req.env[accounts.SCOPE] = scope
        counted = getattr(resource, "counted", False)  # against the requests a minute
        if counted:
            self._limiter.count_address(req.env[accounts.ADDRESS])
        caller = self._access.identify(req.env, req.env[accounts.ADDRESS], scope)
        req.env[accounts.CALLER] = caller
        if counted:
            self._limiter.count_key(caller)

    def process_response(self, req: falcon.Request, resp: falcon.Response, resource: Any, succeeded: bool) -> None:
        if resp.get_header("Cache-Control") is None:
            resp.set_header("Cache-Control", "no-store")
        resp.set_header("X-Content-Type-Options", "nosniff")
        caller: Caller | None = req.env.get(accounts.CALLER)
        if caller is not None and req.env[accounts.SCOPE] == "generate":
            try:
                resp.set_headers(render_headers(self._limiter.uses(caller)))
            except StateUnwritable:
                pass  # the answer is worth more than what it says of the counters


def write_problem(req: falcon.Request, resp: falcon.Response, problem: problems.Problem) -> None:
    """Makes the response this problem, in the shape that the path's clients know."""
    req.env[accounts.FACTS]["problem"] = problem.kind
    if req.path.startswith(_OPENAI_PREFIX):
        resp.status = problem.openai_status
        resp.content_type = falcon.MEDIA_JSON
        resp.data = problem.openai_body()
    else:
        resp.status = problem.status
        resp.content_type = problems.MEDIA_TYPE
        resp.data = problem.body(req.env[accounts.REQUEST_ID])
    resp.set_headers(problem.headers())
    if problem.status in (408, 413) or problem.kind == "draining":
        # What the client still sends is not read, or its next request belongs to another node.
        resp.set_header("Connection", "close")


def create_app(generator: Generator, access: Access, audit: AuditLog, log: Log) -> Callable[..., Iterable[bytes]]:
    """The WSGI application over ready-made collaborators."""
    app = falcon.App(middleware=[_Gate(access, generator.limiter)], cors_enable=False)
    app.req_options.strip_url_path_trailing_slash = False
    answerer = Answerer(generator, audit, log)
    add_page(app)
    app.add_route("/generate", GenerateResource(answerer))
    app.add_route("/v1/chat/completions", TextResource(answerer, parse_chat, ChatShape))
    app.add_route("/v1/completions", TextResource(answerer, parse_completion, CompletionShape))
    app.add_route("/v1/models", ModelsResource(generator))
    app.add_route("/v1/models/{model:path}", ModelResource(generator))
    app.add_route("/usage", UsageResource(generator.limiter, access))
    app.add_route("/health", HealthResource())
    app.add_route("/ready", ReadyResource(generator))
    app.add_route("/metrics", MetricsResource(generator.metrics))
    app.add_route("/version", VersionResource(generator, read_image(generator.settings)))
    app.add_route("/openapi.json", OpenApiResource(generator))

    def on_service_error(req: falcon.Request, resp: falcon.Response, error: ServiceError, params: Any) -> None:
        problem = problems.describe_error(error)
        if isinstance(error, Unauthenticated | Forbidden | LimitReached | _RECORDS_FAILED):
            generator.metrics.refusals.labels(problem.kind.replace("-", "_")).inc()
        if problem.status == 500 or isinstance(error, _RECORDS_FAILED):
            log.write_failure(req.env[accounts.REQUEST_ID], error)
        write_problem(req, resp, problem)

    def on_unknown_error(req: falcon.Request, resp: falcon.Response, error: Exception, params: Any) -> None:
        if isinstance(error, OSError):
            raise error  # the connection's own trouble is the server's to end
        log.write_failure(req.env[accounts.REQUEST_ID], error)
        write_problem(req, resp, problems.describe_error(error))

    def on_http_error(req: falcon.Request, resp: falcon.Response, error: falcon.HTTPError, params: Any) -> None:
        if error.headers:
            resp.set_headers(error.headers)
        detail = _HTTP_DETAILS.get(error.status_code, error.title or "")
        write_problem(req, resp, problems.describe_status(error.status_code, detail))

    app.add_error_handler(Exception, on_unknown_error)
    app.add_error_handler(falcon.HTTPError, on_http_error)
    app.add_error_handler(ServiceError, on_service_error)
    return Accounts(app, generator.metrics, audit, log)
