"""Owns the application: routes, and the one place where errors become HTTP."""

from collections.abc import Callable, Iterable
from typing import Any

import falcon

from service import accounts, problems
from service.accounts import Accounts, Log
from service.errors import ServiceError
from service.generation import Generator
from service.resources.generate import GenerateResource
from service.resources.status import HealthResource, MetricsResource, ReadyResource, VersionResource

_HTTP_DETAILS = {
    404: "there is no such path",
    405: "this path does not take this method; see the Allow header",
}


class _Routes:
    """Falcon middleware: names the route for log and metrics; the raw path never becomes a label."""

    def process_resource(self, req: falcon.Request, resp: falcon.Response, resource: Any, params: Any) -> None:
        req.env[accounts.ENDPOINT] = req.uri_template

    def process_response(self, req: falcon.Request, resp: falcon.Response, resource: Any, succeeded: bool) -> None:
        resp.set_header("Cache-Control", "no-store")
        resp.set_header("X-Content-Type-Options", "nosniff")


def write_problem(req: falcon.Request, resp: falcon.Response, problem: problems.Problem) -> None:
    """Makes the response this problem."""
    resp.status = problem.status
    resp.content_type = problems.MEDIA_TYPE
    resp.data = problem.body(req.env[accounts.REQUEST_ID])
    resp.set_headers(problem.headers())
    if problem.status in (408, 413) or problem.kind == "draining":
        # What the client still sends is not read, or its next request belongs to another node.
        resp.set_header("Connection", "close")


def create_app(generator: Generator, log: Log) -> Callable[..., Iterable[bytes]]:
    """The WSGI application over ready-made collaborators."""
    app = falcon.App(middleware=[_Routes()], cors_enable=False)
    app.req_options.strip_url_path_trailing_slash = False
    app.add_route("/generate", GenerateResource(generator, log))
    app.add_route("/health", HealthResource())
    app.add_route("/ready", ReadyResource(generator))
    app.add_route("/metrics", MetricsResource(generator.metrics))
    app.add_route("/version", VersionResource(generator))

    def on_service_error(req: falcon.Request, resp: falcon.Response, error: ServiceError, params: Any) -> None:
        problem = problems.describe_error(error)
        if problem.status >= 500 and problem.status != 503:
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
    return Accounts(app, generator.metrics, log)
