"""Owns the resources that this local cloud does not have yet: they look like those of an account that has none."""

import falcon

from scripts.local_cloud.api.errors import NotFound, Unsupported
from scripts.local_cloud.api.listing import answer_list

# The key of the list, which is also the path, and what a person calls one of them.
_ABSENT = {
    "volumes": "volume",
    "load_balancers": "load balancer",
    "load_balancer_types": "load balancer type",
    "certificates": "certificate",
}


class _Absent:
    def __init__(self, key: str, name: str):
        self._key, self._name = key, name

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        answer_list(req, resp, self._key, [], ("id", "name", "created"))

    def on_get_actions(self, req: falcon.Request, resp: falcon.Response) -> None:
        answer_list(req, resp, "actions", [], ("id", "command", "status", "started", "finished"))

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        raise Unsupported(f"this local cloud does not have {self._name}s yet")

    def on_get_member(self, req: falcon.Request, resp: falcon.Response, member_id: str) -> None:
        raise NotFound(f"{self._name} with ID '{member_id}' not found")

    on_put_member = on_delete_member = on_get_member


def add_routes(app: falcon.App[falcon.Request, falcon.Response], prefix: str) -> None:
    """Adds the routes of all of them."""
    for key, name in _ABSENT.items():
        resource = _Absent(key, name)
        app.add_route(f"{prefix}/{key}", resource)
        app.add_route(f"{prefix}/{key}/actions", resource, suffix="actions")
        app.add_route(f"{prefix}/{key}/{{member_id}}", resource, suffix="member")
