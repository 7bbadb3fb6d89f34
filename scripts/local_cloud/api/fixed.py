"""Owns the resources that never change: locations, server types, pricing, ISOs, and the data centers of before."""

from collections.abc import Callable
from typing import Any

import falcon

from scripts.local_cloud.api.errors import Gone, NotFound
from scripts.local_cloud.api.listing import answer_list, filter_equal
from scripts.local_cloud.api.project import Project

Document = dict[str, Any]

_DATACENTERS_REMOVED = "https://docs.hetzner.cloud/changelog#2026-06-02-datacenters-deprecated"


class _FixedList:
    """A list that can be read and filtered by name, and its members by id."""

    def __init__(self, key: str, member: str, documents: list[Document], sort_by: tuple[str, ...] = ("id", "name")):
        self._key, self._member, self._documents, self._sort_by = key, member, documents, sort_by

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        answer_list(req, resp, self._key, filter_equal(req, self._documents, "name"), self._sort_by)

    def on_get_member(self, req: falcon.Request, resp: falcon.Response, member_id: int) -> None:
        for document in self._documents:
            if document["id"] == member_id:
                resp.media = {self._member: document}
                return
        raise NotFound(f"{self._member.replace('_', ' ')} with ID '{member_id}' not found")


class _Pricing:
    def __init__(self, render: Callable[[], Document]):
        self._render = render

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        resp.media = {"pricing": self._render()}


class _Datacenters(_FixedList):
    """As it was until October 2026: the list also recommended one."""

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        super().on_get(req, resp)
        resp.media["recommendation"] = self._documents[0]["id"]


class _GoneDatacenters:
    def on_get(self, req: falcon.Request, resp: falcon.Response, member_id: int | None = None) -> None:
        raise Gone("the data centers were removed from the API: use locations", _DATACENTERS_REMOVED)


def _add_list(app: falcon.App[falcon.Request, falcon.Response], prefix: str, name: str, resource: _FixedList) -> None:
    app.add_route(f"{prefix}/{name}", resource)
    app.add_route(f"{prefix}/{name}/{{member_id:int}}", resource, suffix="member")


def add_routes(app: falcon.App[falcon.Request, falcon.Response], prefix: str, project: Project) -> None:
    """Adds the routes of all of them."""
    catalogue = project.catalogue
    locations = [each.render() for each in catalogue.locations]
    server_types = [each.render(catalogue.locations) for each in catalogue.server_types]
    _add_list(app, prefix, "locations", _FixedList("locations", "location", locations))
    _add_list(app, prefix, "server_types", _FixedList("server_types", "server_type", server_types))
    _add_list(app, prefix, "isos", _FixedList("isos", "iso", []))
    app.add_route(f"{prefix}/pricing", _Pricing(catalogue.render_pricing))
    if project.old_clients:
        datacenters = [each.render_datacenter() for each in catalogue.locations]
        _add_list(app, prefix, "datacenters", _Datacenters("datacenters", "datacenter", datacenters))
    else:
        app.add_route(f"{prefix}/datacenters", _GoneDatacenters())
        app.add_route(f"{prefix}/datacenters/{{member_id:int}}", _GoneDatacenters())
