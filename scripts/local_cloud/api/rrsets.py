"""Owns the paths of record sets: ``/zones/{id_or_name}/rrsets`` and what is done to one."""

from collections.abc import Callable
from typing import Any

import falcon

from scripts.local_cloud.api.bodies import Fields, read_fields
from scripts.local_cloud.api.errors import LimitExceeded, NotFound, NotUnique, Protected
from scripts.local_cloud.api.listing import answer_list, filter_any, filter_equal, filter_labels
from scripts.local_cloud.api.project import Project
from scripts.local_cloud.api.record_sets import (
    TYPES,
    describe_clash,
    find_record,
    find_record_set,
    make_record_set,
    read_name_and_type,
    read_records,
    read_ttl,
    render_record_set,
)
from scripts.local_cloud.api.zones import begin_protection, change_zone, find_zone

Document = dict[str, Any]

_PER_PAGE_LIMIT = 100  # twice that of all other lists


def _render(zone: Document, record_set: Document) -> Document:
    document = render_record_set(zone, record_set)
    del document["created"]
    return document


def _require(zone: Document, name: str, kind: str) -> Document:
    record_set = find_record_set(zone, name, kind)
    if record_set is None:
        raise NotFound(f"RRSet '{name}/{kind}' not found in zone '{zone['name']}'")
    return record_set


def _require_unprotected(record_set: Document) -> None:
    if record_set["protection"]["change"]:
        raise Protected(f"RRSet '{record_set['name']}/{record_set['type']}' is protected against changes")


def _set_records(zone: Document, record_set: Document, fields: Fields) -> None:
    record_set["records"] = read_records(fields, zone["name"], record_set["type"])


def _remove_records(zone: Document, record_set: Document, fields: Fields) -> None:
    kind = record_set["type"]
    unwanted = read_records(fields, zone["name"], kind)
    if kind == "SOA":
        fields.blame("records", "must stay: a SOA record goes with its zone")
    fields.check()
    for record in unwanted:
        found = find_record(zone["name"], kind, record_set["records"], record["value"])
        if found is None:
            fields.blame("records", f"{record['value']!r} is not among the records")
        else:
            record_set["records"].remove(found)
    if not record_set["records"]:
        zone["rrsets"].remove(record_set)


def _update_records(zone: Document, record_set: Document, fields: Fields) -> None:
    given = read_records(fields, zone["name"], record_set["type"])
    fields.check()
    for record in given:
        found = find_record(zone["name"], record_set["type"], record_set["records"], record["value"])
        if found is None:
            fields.blame("records", f"{record['value']!r} is not among the records")
        elif "comment" not in record:
            fields.blame("records", "must have a comment")
        else:
            found["comment"] = record["comment"]


def _change_ttl(zone: Document, record_set: Document, fields: Fields) -> None:
    record_set["ttl"] = read_ttl(fields, required=not fields.is_null("ttl"))


# What the last part of a path does to a record set, and the command of its action; all but the last answer 201.
_CHANGES: dict[str, tuple[str, Callable[[Document, Document, Fields], None]]] = {
    "set_records": ("set_rrset_records", _set_records),
    "remove_records": ("remove_rrset_records", _remove_records),
    "change_ttl": ("change_rrset_ttl", _change_ttl),
    "update_records": ("update_rrset_records", _update_records),
}


class RecordSets:
    """``/zones/{id_or_name}/rrsets``, its members and their actions."""

    def __init__(self, project: Project):
        self._project, self._store = project, project.store

    def _find_zone(self, id_or_name: str) -> Document:
        return find_zone(self._project, id_or_name)

    def on_get(self, req: falcon.Request, resp: falcon.Response, id_or_name: str) -> None:
        zone = self._find_zone(id_or_name)
        found = [render_record_set(zone, each) for each in filter_equal(req, zone["rrsets"], "name")]
        found = filter_labels(req, filter_any(req, found, "type", TYPES))
        answer_list(req, resp, "rrsets", found, ("id", "name", "created"), _PER_PAGE_LIMIT)
        for document in resp.media["rrsets"]:
            del document["created"]  # they can be sorted by it, but do not tell it

    def on_get_member(
        self, req: falcon.Request, resp: falcon.Response, id_or_name: str, rr_name: str, rr_type: str
    ) -> None:
        zone = self._find_zone(id_or_name)
        resp.media = {"rrset": _render(zone, _require(zone, rr_name, rr_type))}

    def _add(self, zone: Document, fields: Fields, record_set: Document) -> None:
        """Adds a record set to a zone; raises InvalidInput, LimitExceeded."""
        if clash := describe_clash(zone, record_set["name"], record_set["type"]):
            fields.blame("name", clash)
        fields.check()
        if len(zone["rrsets"]) >= self._project.limits.rrsets_per_zone:
            raise LimitExceeded("rrset_limit")
        zone["rrsets"].append(record_set)

    def on_post(self, req: falcon.Request, resp: falcon.Response, id_or_name: str) -> None:
        fields = read_fields(req)
        with self._store.transaction():
            zone = self._find_zone(id_or_name)
            name, kind = read_name_and_type(fields, zone["name"])
            records, ttl, labels = read_records(fields, zone["name"], kind), read_ttl(fields), fields.labels()
            fields.check()
            if find_record_set(zone, name, kind) is not None:
                raise NotUnique(f"RRSet '{name}/{kind}' already exists", "name")
            record_set = make_record_set(name, kind, records, ttl, labels)
            self._add(zone, fields, record_set)
            action = change_zone(self._project, zone, "create_rrset")
        resp.status = falcon.HTTP_201
        resp.media = {"rrset": _render(zone, record_set), "action": action}

    def on_put_member(
        self, req: falcon.Request, resp: falcon.Response, id_or_name: str, rr_name: str, rr_type: str
    ) -> None:
        fields = read_fields(req)
        labels = fields.labels()
        fields.check()
        with self._store.transaction():
            zone = self._find_zone(id_or_name)
            record_set = _require(zone, rr_name, rr_type)
            record_set["labels"] = record_set["labels"] if labels is None else labels
            self._store.put("zone", zone)
        resp.media = {"rrset": _render(zone, record_set)}

    def on_delete_member(
        self, req: falcon.Request, resp: falcon.Response, id_or_name: str, rr_name: str, rr_type: str
    ) -> None:
        with self._store.transaction():
            zone = self._find_zone(id_or_name)
            record_set = _require(zone, rr_name, rr_type)
            _require_unprotected(record_set)
            if rr_type == "SOA":
                raise Protected("a SOA record goes with its zone")
            zone["rrsets"].remove(record_set)
            action = change_zone(self._project, zone, "delete_rrset")
        resp.status = falcon.HTTP_201
        resp.media = {"action": action}

    def on_post_protection(
        self, req: falcon.Request, resp: falcon.Response, id_or_name: str, rr_name: str, rr_type: str
    ) -> None:
        fields = read_fields(req)
        protected = fields.flag("change", required=True)
        fields.check()

        def change(zone: Document) -> None:
            record_set = find_record_set(zone, rr_name, rr_type)
            if record_set is not None:
                record_set["protection"] = {"change": protected}

        with self._store.transaction():
            zone = self._find_zone(id_or_name)
            _require(zone, rr_name, rr_type)
            action = begin_protection(self._project, zone["id"], "change_rrset_protection", change)
        resp.status = falcon.HTTP_201
        resp.media = {"action": action}

    def on_post_add(
        self, req: falcon.Request, resp: falcon.Response, id_or_name: str, rr_name: str, rr_type: str
    ) -> None:
        fields = read_fields(req)
        with self._store.transaction():
            zone = self._find_zone(id_or_name)
            record_set = find_record_set(zone, rr_name, rr_type)
            if record_set is None:
                given = Fields({"name": rr_name, "type": rr_type})
                read_name_and_type(given, zone["name"])
                given.check()
            else:
                _require_unprotected(record_set)
            ttl, records = read_ttl(fields), read_records(fields, zone["name"], rr_type)
            if record_set is None:
                self._add(zone, fields, make_record_set(rr_name, rr_type, records, ttl))
            else:
                if ttl is not None and record_set["ttl"] not in (None, ttl):
                    fields.blame("ttl", f"must be that of the RRSet, {record_set['ttl']}")
                together = Fields({"records": [*record_set["records"], *records]})
                read_records(together, zone["name"], rr_type)
                for problem in together.list_problems():
                    fields.blame("records", problem.removeprefix("records "))
                fields.check()
                record_set["records"].extend(records)
                record_set["ttl"] = record_set["ttl"] if ttl is None else ttl
            action = change_zone(self._project, zone, "add_rrset_records")
        resp.status = falcon.HTTP_201
        resp.media = {"action": action}


class _Change:
    """One path of ``_CHANGES``."""

    def __init__(self, project: Project, name: str):
        self._project, self._name = project, name

    def on_post(self, req: falcon.Request, resp: falcon.Response, id_or_name: str, rr_name: str, rr_type: str) -> None:
        command, change = _CHANGES[self._name]
        fields = read_fields(req)
        with self._project.store.transaction():
            zone = find_zone(self._project, id_or_name)
            record_set = _require(zone, rr_name, rr_type)
            _require_unprotected(record_set)
            change(zone, record_set, fields)
            fields.check()
            action = change_zone(self._project, zone, command)
        resp.status = falcon.HTTP_200 if self._name == "update_records" else falcon.HTTP_201
        resp.media = {"action": action}


def add_routes(app: falcon.App[falcon.Request, falcon.Response], prefix: str, project: Project) -> None:
    """Adds the routes."""
    resource, root = RecordSets(project), f"{prefix}/zones/{{id_or_name}}/rrsets"
    member = f"{root}/{{rr_name}}/{{rr_type}}"
    app.add_route(root, resource)
    app.add_route(member, resource, suffix="member")
    app.add_route(f"{member}/actions/change_protection", resource, suffix="protection")
    app.add_route(f"{member}/actions/add_records", resource, suffix="add")
    for name in _CHANGES:
        app.add_route(f"{member}/actions/{name}", _Change(project, name))
