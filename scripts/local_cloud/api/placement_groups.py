"""Owns placement groups: made, changed and deleted, and which servers are in one."""

from typing import Any

import falcon

from scripts.local_cloud.api.bodies import read_fields
from scripts.local_cloud.api.clock import render_now
from scripts.local_cloud.api.errors import LimitExceeded, StateRefused
from scripts.local_cloud.api.listing import answer_list, filter_any, filter_equal, filter_labels
from scripts.local_cloud.api.project import Project

Document = dict[str, Any]

_TYPES = ("spread",)
_SERVER_LIMIT = 10
_NAME_USED = "placement group name is already used"


def _find_members(project: Project, group_id: int) -> list[Document]:
    servers = project.store.read_all("server")
    return [server for server in servers if server.get("placement_group_id") == group_id]


def _render(project: Project, record: Document) -> Document:
    return record | {"servers": [server["id"] for server in _find_members(project, record["id"])]}


def show_placement_group(project: Project, server: Document) -> Document | None:
    """The document of the group that a server is in, or None."""
    record = project.store.find("placement_group", server.get("placement_group_id") or 0)
    return _render(project, record) if record else None


def require_room_in_group(project: Project, group_id: int) -> None:
    """Raises StateRefused if the group is full."""
    if len(_find_members(project, group_id)) >= _SERVER_LIMIT:
        message = f"placement group with ID {group_id} contains already {_SERVER_LIMIT} servers"
        raise StateRefused("placement_group_member_limit_reached", message)


class PlacementGroups:
    """``/placement_groups`` and its members."""

    def __init__(self, project: Project):
        self._project, self._store = project, project.store

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        found = filter_equal(req, self._store.read_all("placement_group"), "name")
        found = filter_labels(req, filter_any(req, found, "type", _TYPES))
        documents = [_render(self._project, each) for each in found]
        answer_list(req, resp, "placement_groups", documents, ("id", "name", "created"))

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        fields = read_fields(req)
        name, kind = fields.name(required=True), fields.one_of("type", _TYPES, required=True)
        labels = fields.labels() or {}
        fields.check()
        with self._store.transaction():
            record: Document = {"name": name, "labels": labels, "type": kind, "created": render_now()}
            others = self._store.read_all("placement_group")
            self._project.require_unique(others, record, "name", _NAME_USED)
            if len(others) >= self._project.limits.placement_groups:
                raise LimitExceeded("placement_group_limit")
            record["id"] = self._store.next_id()
            self._store.put("placement_group", record)
        resp.status = falcon.HTTP_201
        resp.media = {"placement_group": _render(self._project, record), "action": None}

    def on_get_member(self, req: falcon.Request, resp: falcon.Response, resource_id: int) -> None:
        record = self._project.find("placement_group", resource_id)
        resp.media = {"placement_group": _render(self._project, record)}

    def on_put_member(self, req: falcon.Request, resp: falcon.Response, resource_id: int) -> None:
        fields = read_fields(req)
        name, labels = fields.name(), fields.labels()
        fields.check()
        with self._store.transaction():
            record = self._project.find("placement_group", resource_id)
            record.update(name=name or record["name"], labels=record["labels"] if labels is None else labels)
            self._project.require_unique(self._store.read_all("placement_group"), record, "name", _NAME_USED)
            self._store.put("placement_group", record)
        resp.media = {"placement_group": _render(self._project, record)}

    def on_delete_member(self, req: falcon.Request, resp: falcon.Response, resource_id: int) -> None:
        with self._store.transaction():
            self._project.find("placement_group", resource_id)
            for server in _find_members(self._project, resource_id):
                self._store.change("server", server["id"], placement_group_id=None)
            self._store.delete("placement_group", resource_id)
        resp.status = falcon.HTTP_204


def add_routes(app: falcon.App[falcon.Request, falcon.Response], prefix: str, project: Project) -> None:
    """Adds the routes."""
    resource, root = PlacementGroups(project), f"{prefix}/placement_groups"
    app.add_route(root, resource)
    app.add_route(f"{root}/{{resource_id:int}}", resource, suffix="member")
