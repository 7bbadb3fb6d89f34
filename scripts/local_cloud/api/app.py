"""Owns the application: routes, the gate before them, and the one place where errors become HTTP."""

import hmac
import logging
import sqlite3
from collections.abc import Callable, Iterable
from typing import Any

import falcon

from scripts.local_cloud.api import (
    absent,
    action_routes,
    control,
    firewalls,
    fixed,
    floating_ips,
    images,
    networks,
    placement_groups,
    primary_ips,
    rrsets,
    server_actions,
    servers,
    ssh_keys,
    zones,
)
from scripts.local_cloud.api.errors import (
    ApiError,
    Injected,
    JsonInvalid,
    MethodNotAllowed,
    NotFound,
    RateLimited,
    Unauthorized,
)
from scripts.local_cloud.api.faults import ERROR, Fault, Faults, Recorder
from scripts.local_cloud.api.page import PageResource
from scripts.local_cloud.api.project import Project
from scripts.local_cloud.api.rate_limit import RateLimiter
from scripts.local_cloud.machine_interface import MachineFailed

PREFIX = "/v1"

_LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]", "::1")
_TOKEN_LENGTH = 64  # of a real token; Terraform's provider refuses any other
_ALLOWANCE = "local_cloud.allowance"
_log = logging.getLogger(__name__)


def pad_token(token: str) -> str:
    """A token in the length of real ones, which is taken as well."""
    return token.ljust(_TOKEN_LENGTH, "0")


def _read_host(req: falcon.Request) -> str:
    try:
        return req.host
    except ValueError:  # a port that is no number
        return ""


class _Gate:
    """Falcon middleware, closed to all but the page: local name, fault of the plan, token, allowance."""

    def __init__(self, token: str, limiter: RateLimiter):
        self._tokens, self._limiter = (token.encode(), pad_token(token).encode()), limiter

    def process_request(self, req: falcon.Request, resp: falcon.Response) -> None:
        # A web page whose own name was made to point here could read and write as if it were from here.
        if _read_host(req) not in _LOCAL_NAMES:
            raise NotFound("the local cloud answers under a local name only")
        # The router takes //v1 for /v1; whoever compares paths does not.
        if "//" in req.path:
            raise NotFound("there is no such path or resource")
        if req.path == "/":
            return
        own = req.path.startswith(f"{control.PREFIX}/")
        fault: Fault | None = req.env.get(ERROR)
        if fault is not None:
            raise Injected(fault.status, fault.code, fault.message)
        scheme, _, token = (req.auth or "").partition(" ")
        given = token.strip().encode()
        if scheme.lower() != "bearer" or not any(hmac.compare_digest(given, known) for known in self._tokens):
            raise Unauthorized("unable to authenticate")
        if own:
            return
        allowance = req.env[_ALLOWANCE] = self._limiter.take()
        if not allowance.granted:
            raise RateLimited(f"limit of {allowance.limit} requests per hour reached")

    def process_response(self, req: falcon.Request, resp: falcon.Response, resource: Any, succeeded: bool) -> None:
        resp.set_header("Cache-Control", "no-store")
        resp.set_header("X-Content-Type-Options", "nosniff")
        allowance = req.env.get(_ALLOWANCE)
        if allowance is not None:
            resp.set_headers(allowance.headers())


def _write_error(resp: falcon.Response, error: ApiError) -> None:
    resp.status = error.status
    resp.media = {"error": {"code": error.code, "message": error.message, "details": error.details}}


def _on_api_error(req: falcon.Request, resp: falcon.Response, error: ApiError, params: Any) -> None:
    _write_error(resp, error)


def _on_machine_failed(req: falcon.Request, resp: falcon.Response, error: MachineFailed, params: Any) -> None:
    _log.warning("%s %s: %s", req.method, req.path, error)
    _write_error(resp, ApiError(str(error)))


def _on_http_error(req: falcon.Request, resp: falcon.Response, error: falcon.HTTPError, params: Any) -> None:
    if error.headers:
        resp.set_headers(error.headers)
    if error.status_code == 404:
        _write_error(resp, NotFound("there is no such path or resource"))
    elif error.status_code == 405:
        _write_error(resp, MethodNotAllowed("this path does not take this method"))
    elif error.status_code == 400:
        _write_error(resp, JsonInvalid(error.description or error.title or "the request cannot be read"))
    else:
        _write_error(resp, Injected(error.status_code, "unknown_error", error.title or "the request failed"))


def _on_any_error(req: falcon.Request, resp: falcon.Response, error: Exception, params: Any) -> None:
    _log.error("%s %s broke", req.method, req.path, exc_info=error)
    _write_error(resp, ApiError("the local cloud made a mistake; its log says more"))


def _on_unwritten(req: falcon.Request, resp: falcon.Response, error: sqlite3.Error, params: Any) -> None:
    _log.warning("%s %s: %s", req.method, req.path, error)
    _write_error(resp, Injected(503, "unavailable", f"the local cloud's state cannot be written: {error}"))


def create_app(project: Project, faults: Faults, token: str) -> Callable[..., Iterable[bytes]]:
    """The WSGI application over a project; every call of ``/v1`` is recorded by ``faults`` and may meet one."""
    limiter = RateLimiter(project.limits.requests_per_hour)
    app = falcon.App(middleware=[_Gate(token, limiter)])
    app.req_options.strip_url_path_trailing_slash = False
    app.add_route("/", PageResource(project))
    control.add_routes(app, faults, project.life)
    fixed.add_routes(app, PREFIX, project)
    absent.add_routes(app, PREFIX)
    action_routes.add_routes(app, PREFIX, project)
    ssh_keys.add_routes(app, PREFIX, project)
    images.add_routes(app, PREFIX, project)
    primary_ips.add_routes(app, PREFIX, project)
    floating_ips.add_routes(app, PREFIX, project)
    firewalls.add_routes(app, PREFIX, project)
    networks.add_routes(app, PREFIX, project)
    placement_groups.add_routes(app, PREFIX, project)
    zones.add_routes(app, PREFIX, project)
    rrsets.add_routes(app, PREFIX, project)
    servers.add_routes(app, PREFIX, project)
    server_actions.add_routes(app, PREFIX, project)
    app.add_error_handler(Exception, _on_any_error)
    app.add_error_handler(falcon.HTTPError, _on_http_error)
    app.add_error_handler(ApiError, _on_api_error)
    app.add_error_handler(MachineFailed, _on_machine_failed)
    app.add_error_handler(sqlite3.OperationalError, _on_unwritten)
    return Recorder(app, faults, f"{PREFIX}/", project.life.cut_power)
