"""Owns floating IPs: addresses of a project that are moved between servers while those run."""

from collections.abc import Callable
from functools import partial
from ipaddress import IPv6Address, IPv6Network, ip_address
from typing import Any

import falcon

from scripts.local_cloud.api.actions import Step
from scripts.local_cloud.api.bodies import Fields, is_hostname, read_fields
from scripts.local_cloud.api.clock import render_now
from scripts.local_cloud.api.errors import LimitExceeded, Protected, StateRefused
from scripts.local_cloud.api.listing import answer_list, filter_equal, filter_labels
from scripts.local_cloud.api.primary_ips import render_pointer
from scripts.local_cloud.api.project import Project

Document = dict[str, Any]

_TYPES = ("ipv4", "ipv6")
_POINTERS_LIMIT = 100
_NAME_USED = "floating IP name is already used"


def _render(project: Project, record: Document) -> Document:
    location = project.catalogue.find_location(record["location"])
    pointers = dict(record["pointers"])
    if record["type"] == "ipv4":
        pointers.setdefault(record["ip"], render_pointer(record["ip"]))
    return {
        "id": record["id"],
        "name": record["name"],
        "description": record["description"],
        "type": record["type"],
        "ip": record["ip"],
        "server": record["server_id"],
        "home_location": location.render() if location else None,
        "dns_ptr": [{"ip": ip, "dns_ptr": name} for ip, name in pointers.items()],
        "blocked": False,
        "protection": record["protection"],
        "labels": record["labels"],
        "created": record["created"],
    }


def list_of_server(project: Project, server_id: int) -> list[int]:
    """The ids of the floating IPs that are assigned to a server."""
    return [each["id"] for each in project.store.read_all("floating_ip") if each["server_id"] == server_id]


def _read_pointer(fields: Fields, record: Document) -> tuple[str, str | None]:
    """The address that a request names, in the form that is kept, and its new reverse name."""
    raw, name = fields.text("ip", required=True), fields.text("dns_ptr", required=not fields.is_null("dns_ptr"))
    if name is not None and not is_hostname(name):
        fields.blame("dns_ptr", "must be a domain name without a trailing dot")
    try:
        address = ip_address(raw or "")
    except ValueError:
        address = None
    if record["type"] == "ipv6":
        belongs = isinstance(address, IPv6Address) and address in IPv6Network(record["ip"])
    else:
        belongs = str(address) == record["ip"]
    if raw is not None and not belongs:
        fields.blame("ip", "must be the address of the floating IP, or one in its network")
    return str(address), name


class FloatingIps:
    """``/floating_ips``, its members and their actions."""

    def __init__(self, project: Project):
        self._project, self._store = project, project.store

    def _find(self, resource_id: int) -> Document:
        return self._project.find("floating_ip", resource_id)

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        found = filter_labels(req, filter_equal(req, self._store.read_all("floating_ip"), "name"))
        documents = [_render(self._project, each) for each in found]
        answer_list(req, resp, "floating_ips", documents, ("id", "name", "created"))

    def on_get_member(self, req: falcon.Request, resp: falcon.Response, resource_id: int) -> None:
        resp.media = {"floating_ip": _render(self._project, self._find(resource_id))}

    def _find_home(self, fields: Fields) -> str | None:
        reference = fields.reference("home_location")
        location = None if reference is None else self._project.catalogue.find_location(reference)
        if reference is not None and location is None:
            fields.blame("home_location", "location not found")
        return location.name if location else None

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        fields = read_fields(req)
        kind, name = fields.one_of("type", _TYPES, required=True), fields.name()
        description, labels = fields.text("description"), fields.labels() or {}
        home, server_id = self._find_home(fields), fields.number("server")
        if not fields.has("home_location") and not fields.has("server"):
            fields.blame("home_location", "must be given unless the floating IP is assigned to a server")
        elif fields.has("home_location") and fields.has("server"):
            fields.blame("home_location", "must not be given together with a server")
        fields.check()
        with self._store.transaction():
            server = None if server_id is None else self._store.find("server", server_id)
            if server_id is not None and server is None:
                fields.blame("server", "server not found")
                fields.check()
            assert kind is not None  # check() has raised without
            others = self._store.read_all("floating_ip")
            if len(others) >= self._project.limits.floating_ips:
                raise LimitExceeded("floating_ip_limit")
            new_id = self._store.next_id()
            record = {
                "id": new_id,
                "name": name or f"floating_ip-{new_id}",
                "description": description,
                "type": kind,
                "ip": self._project.ranges.take(self._store, kind),
                "server_id": server_id,
                "location": server["location"] if server else home,
                "pointers": {},
                "protection": {"delete": False},
                "labels": labels,
                "created": render_now(),
            }
            self._project.require_unique(others, record, "name", _NAME_USED)
            self._store.put("floating_ip", record)
            document = _render(self._project, record)
            unassign = partial(self._store.change, "floating_ip", new_id, server_id=None)
            action = None if server_id is None else self._assign(new_id, server_id, unassign)
        resp.status = falcon.HTTP_201
        resp.media = {"floating_ip": document} | ({"action": action} if action else {})

    def on_put_member(self, req: falcon.Request, resp: falcon.Response, resource_id: int) -> None:
        fields = read_fields(req)
        name, description, labels = fields.name(), fields.text("description"), fields.labels()
        fields.check()
        with self._store.transaction():
            record = self._find(resource_id)
            record["name"] = name or record["name"]
            record["labels"] = record["labels"] if labels is None else labels
            if description is not None or fields.is_null("description"):
                record["description"] = description
            self._project.require_unique(self._store.read_all("floating_ip"), record, "name", _NAME_USED)
            self._store.put("floating_ip", record)
        resp.media = {"floating_ip": _render(self._project, record)}

    def on_delete_member(self, req: falcon.Request, resp: falcon.Response, resource_id: int) -> None:
        with self._store.transaction():
            record = self._find(resource_id)
            if record["protection"]["delete"]:
                raise Protected(f"floating IP with ID {resource_id} is protected against deletion")
            self._project.actions.require_free(("floating_ip", resource_id))
            if record["server_id"] is not None:
                # As of May 2026; before, a deletion unassigned by itself.
                raise StateRefused("must_be_unassigned", "the floating IP must be unassigned before it can be deleted")
            self._store.delete("floating_ip", resource_id)
        resp.status = falcon.HTTP_204

    def _assign(self, resource_id: int, server_id: int, undo: Callable[[], object]) -> Document:
        """Begins to lead the address to a server, away from any other."""
        address, server = ("floating_ip", resource_id), ("server", server_id)
        work = partial(self._project.life.route, resource_id, server_id)
        step = Step("assign_floating_ip", (server, address), work, undo)
        return self._project.actions.begin([step], hold=[address], use=[server])[0]

    def on_post_assign(self, req: falcon.Request, resp: falcon.Response, resource_id: int) -> None:
        fields = read_fields(req)
        server_id = fields.number("server", required=True) or 0
        fields.check()
        with self._store.transaction():
            record = self._find(resource_id)
            if self._store.find("server", server_id) is None:
                fields.blame("server", "server not found")
                fields.check()
            self._project.actions.require_free(("floating_ip", resource_id))
            if record["server_id"] == server_id:
                raise StateRefused("floating_ip_assigned", "the floating IP is already assigned to this server")
            action = self._assign(resource_id, server_id, lambda: None)
        resp.status = falcon.HTTP_201
        resp.media = {"action": action}

    def on_post_unassign(self, req: falcon.Request, resp: falcon.Response, resource_id: int) -> None:
        address = ("floating_ip", resource_id)
        with self._store.transaction():
            record = self._find(resource_id)
            self._project.actions.require_free(address)
            if record["server_id"] is None:
                raise StateRefused("service_error", f"floating IP with ID {resource_id} is not assigned")
            resources = (("server", record["server_id"]), address)
            step = Step("unassign_floating_ip", resources, partial(self._project.life.route, resource_id, None))
            action = self._project.actions.begin([step], hold=[address])[0]
        resp.status = falcon.HTTP_201
        resp.media = {"action": action}

    def _begin_change(self, resp: falcon.Response, command: str, resource_id: int, **values: Any) -> None:
        def change() -> None:
            self._store.change("floating_ip", resource_id, **values)

        action = self._project.actions.begin([Step(command, (("floating_ip", resource_id),), change)])[0]
        resp.status = falcon.HTTP_201
        resp.media = {"action": action}

    def on_post_pointer(self, req: falcon.Request, resp: falcon.Response, resource_id: int) -> None:
        fields = read_fields(req)
        with self._store.transaction():
            record = self._find(resource_id)
            ip, name = _read_pointer(fields, record)
            pointers = {kept: value for kept, value in record["pointers"].items() if kept != ip}
            if name is not None:
                pointers[ip] = name
            if len(pointers) > _POINTERS_LIMIT:
                fields.blame("ip", f"must be at most {_POINTERS_LIMIT} addresses with a name of their own")
            fields.check()
            self._begin_change(resp, "change_dns_ptr", resource_id, pointers=pointers)

    def on_post_protection(self, req: falcon.Request, resp: falcon.Response, resource_id: int) -> None:
        fields = read_fields(req)
        delete = fields.flag("delete")
        fields.check()
        with self._store.transaction():
            record = self._find(resource_id)
            protection = {"delete": record["protection"]["delete"] if delete is None else delete}
            self._begin_change(resp, "change_protection", resource_id, protection=protection)


def add_routes(app: falcon.App[falcon.Request, falcon.Response], prefix: str, project: Project) -> None:
    """Adds the routes."""
    resource, root = FloatingIps(project), f"{prefix}/floating_ips"
    app.add_route(root, resource)
    app.add_route(f"{root}/{{resource_id:int}}", resource, suffix="member")
    app.add_route(f"{root}/{{resource_id:int}}/actions/assign", resource, suffix="assign")
    app.add_route(f"{root}/{{resource_id:int}}/actions/unassign", resource, suffix="unassign")
    app.add_route(f"{root}/{{resource_id:int}}/actions/change_dns_ptr", resource, suffix="pointer")
    app.add_route(f"{root}/{{resource_id:int}}/actions/change_protection", resource, suffix="protection")
