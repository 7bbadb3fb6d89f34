"""Owns zones, those in primary mode: their names, their default TTL, and what is done to them as a whole."""

from collections.abc import Callable
from functools import partial
from typing import Any

import falcon

from scripts.local_cloud.api.actions import Step
from scripts.local_cloud.api.bodies import Fields, read_fields
from scripts.local_cloud.api.clock import render_now
from scripts.local_cloud.api.errors import LimitExceeded, NotFound, Protected, StateRefused, Unsupported
from scripts.local_cloud.api.listing import answer_list, filter_any, filter_equal, filter_labels
from scripts.local_cloud.api.project import Project
from scripts.local_cloud.api.record_sets import (
    NAMESERVERS,
    count_up,
    describe_clash,
    find_record_set,
    make_first_sets,
    make_record_set,
    read_name_and_type,
    read_records,
    read_ttl,
)

Document = dict[str, Any]

_MODES = ("primary", "secondary")
_DEFAULT_TTL_S = 3600
_NAME_USED = "zone name is already used"


def _render(record: Document) -> Document:
    return {
        "id": record["id"],
        "name": record["name"],
        "mode": "primary",
        "ttl": record["ttl"],
        "status": record["status"],
        "record_count": sum(len(each["records"]) for each in record["rrsets"]),
        "primary_nameservers": [],
        # Nobody outside knows of this cloud, so nobody delegates to it.
        "authoritative_nameservers": {
            "assigned": list(NAMESERVERS),
            "delegated": [],
            "delegation_last_check": None,
            "delegation_status": "unknown",
        },
        "registrar": "unknown",
        "protection": record["protection"],
        "labels": record["labels"],
        "created": record["created"],
    }


def is_id(id_or_name: str) -> bool:
    """Whether a part of a path is a zone's id; no name is a number, for it has a dot."""
    return id_or_name.isascii() and id_or_name.isdigit() and len(id_or_name) < 20


def find_zone(project: Project, id_or_name: str) -> Document:
    """A zone's record, by its id or its name; raises NotFound."""
    if is_id(id_or_name):
        return project.find("zone", int(id_or_name))
    for zone in project.store.read_all("zone"):
        if zone["name"] == id_or_name:
            return zone
    raise NotFound(f"zone with name '{id_or_name}' not found")


def change_zone(project: Project, zone: Document, command: str) -> Document:
    """Keeps what was changed in a zone's record, and begins to publish it; call it in the transaction of the change.

    A zone takes changes while others are still being published, but none while it is being deleted: raises Locked.
    """
    zone_id = zone["id"]
    count_up(zone, render_now()[:10].replace("-", ""))
    project.store.put("zone", {**zone, "status": "updating"})
    publish, undo = partial(project.life.publish, zone_id), partial(project.life.note_unpublished, zone_id)
    step = Step(command, (("zone", zone_id),), publish, undo)
    return project.actions.begin([step], use=[("zone", zone_id)])[0]


def begin_protection(project: Project, zone_id: int, command: str, change: Callable[[Document], None]) -> Document:
    """Begins an action that changes a zone's record in what its name server does not say; raises Locked."""

    def work() -> None:
        with project.store.transaction():
            zone = project.store.find("zone", zone_id)
            if zone is not None:
                change(zone)
                project.store.put("zone", zone)

    step = Step(command, (("zone", zone_id),), work)
    return project.actions.begin([step], use=[("zone", zone_id)])[0]


def _read_sets(fields: Fields, zone_name: str, limit: int) -> list[Document]:
    """The record sets that a zone is made with; what is wrong with any is noted."""
    made: Document = {"rrsets": make_first_sets(0)}
    given = fields.items("rrsets")
    if len(given) > limit:
        fields.blame("rrsets", f"must be at most {limit}")
        return []
    for number, each in enumerate(given):
        if not isinstance(each, dict):
            fields.blame("rrsets", f"rrset {number} must be an object")
            continue
        inner = Fields(each)
        name, kind = read_name_and_type(inner, zone_name)
        records, ttl = read_records(inner, zone_name, kind), read_ttl(inner)
        record_set = make_record_set(name, kind, records, ttl, inner.labels())
        existing = find_record_set(made, name, kind)
        if clash := describe_clash(made, name, kind):
            inner.blame("name", clash)
        if existing is not None and (name, kind) == ("@", "NS"):
            made["rrsets"].remove(existing)  # of one's own instead of those that every zone has
        elif existing is not None:
            inner.blame("name", "must not be there twice with the same type")
        made["rrsets"].append(record_set)
        for problem in inner.list_problems():
            fields.blame("rrsets", f"rrset {number}: {problem}")
    record_sets: list[Document] = made["rrsets"]
    return record_sets


class Zones:
    """``/zones``, its members and their actions."""

    def __init__(self, project: Project):
        self._project, self._store = project, project.store

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        found = [_render(each) for each in filter_equal(req, self._store.read_all("zone"), "name")]
        found = filter_labels(req, filter_any(req, found, "mode", _MODES))
        answer_list(req, resp, "zones", found, ("id", "name", "created"))

    def on_get_member(self, req: falcon.Request, resp: falcon.Response, id_or_name: str) -> None:
        resp.media = {"zone": _render(find_zone(self._project, id_or_name))}

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        fields = read_fields(req)
        name, mode = fields.hostname(required=True) or "", fields.one_of("mode", _MODES, required=True)
        ttl, labels = read_ttl(fields), fields.labels() or {}
        if fields.has("name") and (name != name.lower() or "." not in name):
            # Without the list of public suffixes, which is the real rule, only a top-level domain is known as such.
            fields.blame("name", "must be a domain in lower case, below a public suffix, without a dot at its end")
        sets = _read_sets(fields, name, self._project.limits.rrsets_per_zone) if name else []
        fields.check()
        if mode == "secondary":
            raise Unsupported("this local cloud does not have zones in secondary mode yet")
        if fields.has("zonefile"):
            raise Unsupported("this local cloud does not read zone files yet")
        with self._store.transaction():
            others = self._store.read_all("zone")
            if len(others) >= self._project.limits.zones:
                raise LimitExceeded("zone_limit")
            zone: Document = {"name": name, "ttl": ttl or _DEFAULT_TTL_S, "labels": labels}
            zone["protection"] = {"delete": False}
            self._project.require_unique(others, zone, "name", _NAME_USED)
            if any(name.endswith(f".{each['name']}") or each["name"].endswith(f".{name}") for each in others):
                fields.blame("name", "subdomains are not supported: there is a zone above or below it")
                fields.check()
            zone |= {"id": self._store.next_id(), "serial": 0, "rrsets": sets, "created": render_now()}
            action = change_zone(self._project, zone, "create_zone")
            document = _render(self._project.find("zone", zone["id"]))
        resp.status = falcon.HTTP_201
        resp.media = {"zone": document, "action": action}

    def on_put_member(self, req: falcon.Request, resp: falcon.Response, id_or_name: str) -> None:
        fields = read_fields(req)
        labels = fields.labels()
        fields.check()
        with self._store.transaction():
            zone = find_zone(self._project, id_or_name)
            zone["labels"] = zone["labels"] if labels is None else labels
            self._store.put("zone", zone)
        resp.media = {"zone": _render(zone)}

    def on_delete_member(self, req: falcon.Request, resp: falcon.Response, id_or_name: str) -> None:
        with self._store.transaction():
            zone = find_zone(self._project, id_or_name)
            resource = ("zone", zone["id"])
            if zone["protection"]["delete"]:
                raise Protected(f"zone with ID {zone['id']} is protected against deletion")
            step = Step("delete_zone", (resource,), partial(self._project.life.remove_zone, zone["id"]))
            action = self._project.actions.begin([step], hold=[resource])[0]
        resp.status = falcon.HTTP_201
        resp.media = {"action": action}

    def on_post_protection(self, req: falcon.Request, resp: falcon.Response, id_or_name: str) -> None:
        fields = read_fields(req)
        delete = fields.flag("delete")
        fields.check()

        def change(zone: Document) -> None:
            zone["protection"] = {"delete": zone["protection"]["delete"] if delete is None else delete}

        with self._store.transaction():
            zone = find_zone(self._project, id_or_name)
            action = begin_protection(self._project, zone["id"], "change_protection", change)
        resp.status = falcon.HTTP_201
        resp.media = {"action": action}

    def on_post_ttl(self, req: falcon.Request, resp: falcon.Response, id_or_name: str) -> None:
        fields = read_fields(req)
        ttl = read_ttl(fields, required=True)
        fields.check()
        with self._store.transaction():
            zone = find_zone(self._project, id_or_name)
            zone["ttl"] = ttl
            action = change_zone(self._project, zone, "change_ttl")
        resp.status = falcon.HTTP_201
        resp.media = {"action": action}

    def on_post_nameservers(self, req: falcon.Request, resp: falcon.Response, id_or_name: str) -> None:
        find_zone(self._project, id_or_name)
        raise StateRefused("incorrect_zone_mode", "zones in primary mode have no primary nameservers")

    def on_post_import(self, req: falcon.Request, resp: falcon.Response, id_or_name: str) -> None:
        find_zone(self._project, id_or_name)
        raise Unsupported("this local cloud does not read zone files yet")

    def on_get_zonefile(self, req: falcon.Request, resp: falcon.Response, id_or_name: str) -> None:
        find_zone(self._project, id_or_name)
        raise Unsupported("this local cloud does not write zone files yet")


def add_routes(app: falcon.App[falcon.Request, falcon.Response], prefix: str, project: Project) -> None:
    """Adds the routes."""
    resource, member = Zones(project), f"{prefix}/zones/{{id_or_name}}"
    app.add_route(f"{prefix}/zones", resource)
    app.add_route(member, resource, suffix="member")
    app.add_route(f"{member}/zonefile", resource, suffix="zonefile")
    app.add_route(f"{member}/actions/change_protection", resource, suffix="protection")
    app.add_route(f"{member}/actions/change_ttl", resource, suffix="ttl")
    app.add_route(f"{member}/actions/change_primary_nameservers", resource, suffix="nameservers")
    app.add_route(f"{member}/actions/import_zonefile", resource, suffix="import")
