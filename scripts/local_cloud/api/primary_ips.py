"""Owns primary IPs: made with servers or by themselves, and moved between servers that are off."""

from typing import Any

import falcon

from scripts.local_cloud.api.actions import Step
from scripts.local_cloud.api.bodies import Fields, read_fields
from scripts.local_cloud.api.clock import render_now
from scripts.local_cloud.api.errors import Protected, StateRefused
from scripts.local_cloud.api.listing import answer_list, filter_equal, filter_labels
from scripts.local_cloud.api.project import Project

Document = dict[str, Any]

_TYPES = ("ipv4", "ipv6")


def render_pointer(address: str) -> str:
    """The reverse DNS name that an IPv4 address has unless told otherwise."""
    return f"static.{'.'.join(reversed(address.split('.')))}.clients.your-server.de"


def render_primary_ip(project: Project, record: Document) -> Document:
    """The document of the API."""
    location = project.catalogue.find_location(record["location"])
    pointers = [{"ip": record["ip"], "dns_ptr": render_pointer(record["ip"])}] if record["type"] == "ipv4" else []
    document = {
        "id": record["id"],
        "name": record["name"],
        "type": record["type"],
        "ip": record["ip"],
        "labels": record["labels"],
        "protection": record["protection"],
        "dns_ptr": pointers,
        "assignee_id": record["assignee_id"],
        "assignee_type": "unassigned" if record["assignee_id"] is None else "server",
        "auto_delete": record["auto_delete"],
        "blocked": False,
        "created": record["created"],
        "location": location.render() if location else None,
    }
    if project.old_clients:
        document["assignee_type"] = "server"
        document["datacenter"] = location.render_datacenter() if location else None
    return document


def find_of_server(project: Project, server_id: int) -> dict[str, Document]:
    """The records of a server's addresses, by type."""
    records = project.store.read_all("primary_ip")
    return {record["type"]: record for record in records if record["assignee_id"] == server_id}


def make_primary_ip(
    project: Project,
    kind: str,
    location: str,
    *,
    name: str | None = None,
    assignee_id: int | None = None,
    auto_delete: bool = False,
    labels: Document | None = None,
) -> Document:
    """Makes and returns a record with a free address; raises NotUnique or LimitExceeded. Call it in a transaction."""
    store = project.store
    record = {
        "id": store.next_id(),
        "name": name,
        "type": kind,
        "ip": project.ranges.take(store, kind),
        "labels": labels or {},
        "protection": {"delete": False},
        "assignee_id": assignee_id,
        "auto_delete": auto_delete,
        "created": render_now(),
        "location": location,
    }
    record["name"] = name or f"primary_ip-{record['id']}"
    project.require_unique(store.read_all("primary_ip"), record, "name")
    store.put("primary_ip", record)
    return record


def require_assignable(record: Document, kind: str, location: str) -> None:
    """Raises StateRefused if the address cannot become the one of this type of a server at that location."""
    if record["type"] != kind:
        raise StateRefused("primary_ip_version_mismatch", f"the primary ip is not of type {kind}")
    if record["assignee_id"] is not None:
        raise StateRefused("primary_ip_assigned", "primary ip already assigned to another server")
    if record["location"] != location:
        raise StateRefused("primary_ip_datacenter_mismatch", "the primary ip is in another location than the server")


class PrimaryIps:
    """``/primary_ips``, its members and their actions."""

    def __init__(self, project: Project):
        self._project, self._store = project, project.store

    def _render(self, record: Document) -> Document:
        return render_primary_ip(self._project, record)

    def _find(self, resource_id: int) -> Document:
        return self._project.find("primary_ip", resource_id)

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        found = filter_equal(req, self._store.read_all("primary_ip"), "name")
        found = filter_labels(req, filter_equal(req, found, "ip"))
        answer_list(req, resp, "primary_ips", [self._render(each) for each in found], ("id", "name", "created"))

    def on_get_member(self, req: falcon.Request, resp: falcon.Response, resource_id: int) -> None:
        resp.media = {"primary_ip": self._render(self._find(resource_id))}

    def _read_location(self, fields: Fields) -> str | None:
        names = ("location", "datacenter") if self._project.old_clients else ("location",)
        for name in names:
            reference = fields.reference(name)
            if reference is None:
                continue
            # A data center was named after its location: fsn1-dc14.
            location = self._project.catalogue.find_location(reference.partition("-")[0])
            if location is not None:
                return location.name
            fields.blame(name, f"{name} not found")
        return None

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        fields = read_fields(req)
        name, kind = fields.name(required=True), fields.one_of("type", _TYPES, required=True)
        fields.one_of("assignee_type", ("server", "unassigned"), required=fields.has("assignee_id"))
        assignee_id, location = fields.number("assignee_id"), self._read_location(fields)
        auto_delete, labels = fields.flag("auto_delete", False), fields.labels()
        fields.check()
        with self._store.transaction():
            server = None
            if assignee_id is not None:
                server = self._store.find("server", assignee_id)
                if server is None:
                    fields.blame("assignee_id", "server not found")
                elif location not in (None, server["location"]):
                    fields.blame("location", "must be the location of the assignee")
            elif location is None:
                fields.blame("location", "must be given unless the primary IP is assigned")
            fields.check()
            assert kind is not None  # check() has raised without
            place = server["location"] if server else location
            assert place is not None  # nor without one of both
            record = make_primary_ip(
                self._project, kind, place, name=name, auto_delete=bool(auto_delete), labels=labels
            )
            action = self._assign(record, server) if server else None
        resp.status = falcon.HTTP_201
        resp.media = {"primary_ip": self._render(record)} | ({"action": action} if action else {})

    def on_put_member(self, req: falcon.Request, resp: falcon.Response, resource_id: int) -> None:
        fields = read_fields(req)
        name, labels, auto_delete = fields.name(), fields.labels(), fields.flag("auto_delete")
        fields.check()
        with self._store.transaction():
            record = self._find(resource_id)
            record["name"] = name or record["name"]
            record["labels"] = record["labels"] if labels is None else labels
            record["auto_delete"] = record["auto_delete"] if auto_delete is None else auto_delete
            self._project.require_unique(self._store.read_all("primary_ip"), record, "name")
            self._store.put("primary_ip", record)
        resp.media = {"primary_ip": self._render(record)}

    def on_delete_member(self, req: falcon.Request, resp: falcon.Response, resource_id: int) -> None:
        with self._store.transaction():
            record = self._find(resource_id)
            if record["protection"]["delete"]:
                raise Protected(f"primary IP with ID {resource_id} is protected against deletion")
            self._project.actions.require_free(("primary_ip", resource_id))
            if record["assignee_id"] is not None:
                raise StateRefused("must_be_unassigned", "the primary IP must be unassigned before it can be deleted")
            self._store.delete("primary_ip", resource_id)
        resp.status = falcon.HTTP_204

    def _require_off(self, server: Document) -> None:
        self._project.actions.require_free(("server", server["id"]))
        if server["status"] != "off":
            raise StateRefused("server_not_stopped", f"server with ID {server['id']} must be off")

    def _assign(self, record: Document, server: Document) -> Document:
        kind, resource_id, server_id = record["type"], record["id"], server["id"]
        self._require_off(server)
        if kind in find_of_server(self._project, server_id):
            raise StateRefused(f"server_has_{kind}", f"the server already has an {kind} address")
        resources = (("server", server_id), ("primary_ip", resource_id))

        def assign() -> None:
            self._store.change("primary_ip", resource_id, assignee_id=server_id)

        return self._project.actions.begin([Step("assign_primary_ip", resources, assign)], hold=resources)[0]

    def on_post_assign(self, req: falcon.Request, resp: falcon.Response, resource_id: int) -> None:
        fields = read_fields(req)
        assignee_id = fields.number("assignee_id", required=True)
        fields.one_of("assignee_type", ("server",), required=True)
        fields.check()
        with self._store.transaction():
            record = self._find(resource_id)
            server = self._store.find("server", assignee_id or 0)
            if server is None:
                fields.blame("assignee_id", "server not found")
                fields.check()
            assert server is not None  # check() has raised without
            if record["assignee_id"] is not None:
                raise StateRefused("primary_ip_already_assigned", "primary ip already assigned to another server")
            require_assignable(record, record["type"], server["location"])
            action = self._assign(record, server)
        resp.status = falcon.HTTP_201
        resp.media = {"action": action}

    def on_post_unassign(self, req: falcon.Request, resp: falcon.Response, resource_id: int) -> None:
        with self._store.transaction():
            record = self._find(resource_id)
            server = self._store.find("server", record["assignee_id"] or 0)
            if server is None:
                raise StateRefused("primary_ip_not_assigned", "the primary IP is not assigned")
            self._require_off(server)
            resources = (("server", server["id"]), ("primary_ip", resource_id))

            def unassign() -> None:
                self._store.change("primary_ip", resource_id, assignee_id=None)

            action = self._project.actions.begin([Step("unassign_primary_ip", resources, unassign)], hold=resources)[0]
        resp.status = falcon.HTTP_201
        resp.media = {"action": action}

    def on_post_protection(self, req: falcon.Request, resp: falcon.Response, resource_id: int) -> None:
        fields = read_fields(req)
        delete = fields.flag("delete")
        fields.check()
        with self._store.transaction():
            record = self._find(resource_id)
            protection = {"delete": record["protection"]["delete"] if delete is None else delete}

            def protect() -> None:
                self._store.change("primary_ip", resource_id, protection=protection)

            step = Step("change_protection", (("primary_ip", resource_id),), protect)
            action = self._project.actions.begin([step])[0]
        resp.status = falcon.HTTP_201
        resp.media = {"action": action}


def add_routes(app: falcon.App[falcon.Request, falcon.Response], prefix: str, project: Project) -> None:
    """Adds the routes."""
    resource, root = PrimaryIps(project), f"{prefix}/primary_ips"
    app.add_route(root, resource)
    app.add_route(f"{root}/{{resource_id:int}}", resource, suffix="member")
    app.add_route(f"{root}/{{resource_id:int}}/actions/assign", resource, suffix="assign")
    app.add_route(f"{root}/{{resource_id:int}}/actions/unassign", resource, suffix="unassign")
    app.add_route(f"{root}/{{resource_id:int}}/actions/change_protection", resource, suffix="protection")
