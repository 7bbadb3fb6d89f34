"""Owns the ways in which actions are read: all of them by id, and those of one kind of resource or of one resource."""

from typing import Any

import falcon

from scripts.local_cloud.api.errors import Gone, InvalidInput, NotFound
from scripts.local_cloud.api.listing import answer_list, filter_any
from scripts.local_cloud.api.project import Project
from scripts.local_cloud.api.zones import find_zone, is_id

Document = dict[str, Any]

_SORT_BY = ("id", "command", "status", "started", "finished")
_STATUSES = ("running", "success", "error")
_IDS_LIMIT = 50
_LIST_REMOVED = (
    "https://docs.hetzner.cloud/changelog#2025-01-30-listing-arbitrary-actions-in-the-actions-list-endpoint-is-removed"
)


class _AllActions:
    def __init__(self, project: Project):
        self._actions = project.actions

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        raw = req.get_param_as_list("id") or []
        if not raw:
            raise Gone("listing all actions was removed from the API: name them by id", _LIST_REMOVED)
        if len(raw) > _IDS_LIMIT:
            raise InvalidInput({"id": [f"must be at most {_IDS_LIMIT}"]})
        if not all(each.isascii() and each.isdigit() and len(each) < 17 for each in raw):
            raise InvalidInput({"id": ["must be ids of actions"]})
        found = [action for each in dict.fromkeys(map(int, raw)) if (action := self._actions.find(each))]
        answer_list(req, resp, "actions", filter_any(req, found, "status", _STATUSES), _SORT_BY)

    def on_get_member(self, req: falcon.Request, resp: falcon.Response, action_id: int) -> None:
        resp.media = {"action": _require(self._actions.find(action_id), action_id)}


def _require(action: Document | None, action_id: int) -> Document:
    if action is None:
        raise NotFound(f"action with ID '{action_id}' not found")
    return action


class _ResourceActions:
    def __init__(self, project: Project, kind: str):
        self._project, self._kind = project, kind

    def _read(self, resource_id: int | None) -> list[Document]:
        return self._project.actions.read_all(self._kind, resource_id)

    def _answer(self, req: falcon.Request, resp: falcon.Response, resource_id: int | None = None) -> None:
        answer_list(req, resp, "actions", filter_any(req, self._read(resource_id), "status", _STATUSES), _SORT_BY)

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        self._answer(req, resp)

    def on_get_member(self, req: falcon.Request, resp: falcon.Response, action_id: int) -> None:
        self._answer_one(resp, None, action_id)

    def on_get_own(self, req: falcon.Request, resp: falcon.Response, resource_id: int) -> None:
        if not self._read(resource_id):
            self._project.find(self._kind, resource_id)
        self._answer(req, resp, resource_id)

    def on_get_own_member(self, req: falcon.Request, resp: falcon.Response, resource_id: int, action_id: int) -> None:
        self._answer_one(resp, resource_id, action_id)

    def _answer_one(self, resp: falcon.Response, resource_id: int | None, action_id: int) -> None:
        found = next((each for each in self._read(resource_id) if each["id"] == action_id), None)
        resp.media = {"action": _require(found, action_id)}


class _ZoneActions(_ResourceActions):
    """Zones are named in paths by their names as well."""

    def _find_id(self, id_or_name: str) -> int:
        # By its id, the actions of a zone that is gone can still be read.
        return int(id_or_name) if is_id(id_or_name) else find_zone(self._project, id_or_name)["id"]

    def on_get_zone(self, req: falcon.Request, resp: falcon.Response, id_or_name: str) -> None:
        self.on_get_own(req, resp, self._find_id(id_or_name))

    def on_get_zone_member(self, req: falcon.Request, resp: falcon.Response, id_or_name: str, action_id: int) -> None:
        self.on_get_own_member(req, resp, self._find_id(id_or_name), action_id)


def add_routes(app: falcon.App[falcon.Request, falcon.Response], prefix: str, project: Project) -> None:
    """Adds GET /actions and the paths below each kind of resource that has actions."""
    everything = _AllActions(project)
    app.add_route(f"{prefix}/actions", everything)
    app.add_route(f"{prefix}/actions/{{action_id:int}}", everything, suffix="member")
    for kind in ("server", "image", "primary_ip", "floating_ip", "firewall", "network"):
        resource, root = _ResourceActions(project, kind), f"{prefix}/{kind}s"
        app.add_route(f"{root}/actions", resource)
        app.add_route(f"{root}/actions/{{action_id:int}}", resource, suffix="member")
        app.add_route(f"{root}/{{resource_id:int}}/actions", resource, suffix="own")
        app.add_route(f"{root}/{{resource_id:int}}/actions/{{action_id:int}}", resource, suffix="own_member")
    zones, root = _ZoneActions(project, "zone"), f"{prefix}/zones"
    app.add_route(f"{root}/actions", zones)
    app.add_route(f"{root}/actions/{{action_id:int}}", zones, suffix="member")
    app.add_route(f"{root}/{{id_or_name}}/actions", zones, suffix="zone")
    app.add_route(f"{root}/{{id_or_name}}/actions/{{action_id:int}}", zones, suffix="zone_member")
