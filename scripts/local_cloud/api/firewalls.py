"""Owns firewalls: made, changed and deleted, and applied to servers by id and by label."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import falcon

from scripts.local_cloud.api import firewall_rules
from scripts.local_cloud.api.actions import Step
from scripts.local_cloud.api.bodies import Fields, read_fields
from scripts.local_cloud.api.clock import render_now
from scripts.local_cloud.api.errors import LimitExceeded, StateRefused
from scripts.local_cloud.api.labels import SelectorInvalid, parse_selector
from scripts.local_cloud.api.listing import answer_list, filter_equal, filter_labels
from scripts.local_cloud.api.primary_ips import find_of_server
from scripts.local_cloud.api.project import Project

Document = dict[str, Any]
Target = tuple[str, int | str]  # ("server", its id) or ("label_selector", the selector)

_NAME_LIMIT = 128
_NAME_USED = "firewall name is already used"
_TARGETS = ("server", "label_selector")


def _show_server(server_id: int) -> Document:
    return {"type": "server", "server": {"id": server_id}}


def _render(project: Project, record: Document) -> Document:
    firewalls = project.store.read_all("firewall") if record["selectors"] else []
    selected = [
        server
        for server in project.store.read_all("server")
        if record["selectors"]
        and server["id"] not in record["servers"]
        and any(each["id"] == record["id"] for each in firewall_rules.choose_firewalls(firewalls, server))
    ]
    applied = [_show_server(server_id) for server_id in record["servers"]]
    for selector in record["selectors"]:
        chosen = [_show_server(server["id"]) for server in selected if parse_selector(selector)(server["labels"])]
        applied.append(
            {"type": "label_selector", "label_selector": {"selector": selector}, "applied_to_resources": chosen}
        )
    return {
        "id": record["id"],
        "name": record["name"],
        "labels": record["labels"],
        "created": record["created"],
        "rules": record["rules"],
        "applied_to": applied,
    }


def _find_of_server(project: Project, server: Document) -> dict[int, Document]:
    found = firewall_rules.choose_firewalls(project.store.read_all("firewall"), server)
    return {firewall["id"]: firewall for firewall in found}


def show_firewalls(project: Project, server: Document) -> list[Document]:
    """What a server's document says about its firewalls."""
    shown = []
    for firewall_id, firewall in _find_of_server(project, server).items():
        holds = server["has_disk"] and server["id"] not in firewall["pending"]
        shown.append({"id": firewall_id, "status": "applied" if holds else "pending"})
    return shown


def require_room_for_firewall(project: Project, server: Document, firewall_id: int) -> None:
    """Raises LimitExceeded if the server has as many firewalls as it may, without this one."""
    found = _find_of_server(project, server)
    if firewall_id not in found and len(found) >= firewall_rules.SERVER_LIMIT:
        raise LimitExceeded("server_firewall_limit")


def _begin(project: Project, command: str, firewall_id: int, server_id: int, direct: bool = False) -> Document:
    """Begins to make a server's firewalls hold; ``direct`` if the firewall is or was applied to the server itself."""
    store, life = project.store, project.life
    firewall_rules.await_change(store, firewall_id, server_id)

    def work() -> None:
        if direct and command == "remove_firewall":
            life.take_firewall(server_id, firewall_id)
        else:
            life.filter(server_id)
        firewall_rules.settle(store, firewall_id, server_id)

    # Who sees the failure of an application can try again; a removal that fails leaves the firewall where it was.
    end = firewall_rules.delist if direct and command == "apply_firewall" else firewall_rules.settle
    resources = (("server", server_id), ("firewall", firewall_id))
    step = Step(command, resources, work, partial(end, store, firewall_id, server_id))
    return project.actions.begin([step])[0]


def follow_labels(project: Project, before: Document, server: Document) -> None:
    """Begins what a change of a server's labels means for it; ``before`` is its record until now."""
    old, new = _find_of_server(project, before), _find_of_server(project, server)
    for firewall_id in new.keys() - old.keys():
        _begin(project, "apply_firewall", firewall_id, server["id"])
    for firewall_id in old.keys() - new.keys():
        _begin(project, "remove_firewall", firewall_id, server["id"])


def _read_target(each: object) -> Target | str:
    """What a firewall is to be applied to or removed from, or what is wrong with it."""
    if not isinstance(each, dict):
        return "must be a list of objects"
    outer = Fields(each)
    kind = outer.one_of("type", _TARGETS, required=True)
    inner = outer.nested(kind or "server")
    target: Target | None = None
    if kind == "server":
        target = "server", inner.number("id", required=True) or 0
    elif kind == "label_selector":
        selector = inner.name("selector", required=True) or ""
        target = "label_selector", selector
        try:
            parse_selector(selector)
        except SelectorInvalid as error:
            inner.blame("selector", str(error))
    problems = outer.list_problems() + inner.list_problems()
    return problems[0] if problems or target is None else target


def _read_targets(fields: Fields, name: str) -> list[Target]:
    read = [_read_target(each) for each in fields.items(name)]
    for problem in read:
        if isinstance(problem, str):
            fields.blame(name, problem)
    targets = [each for each in read if not isinstance(each, str)]
    if len(set(targets)) < len(targets):
        raise StateRefused("server_already_added", "a resource is named more than once")
    return targets


class Firewalls:
    """``/firewalls``, its members and their actions."""

    def __init__(self, project: Project):
        self._project, self._store = project, project.store

    def _find(self, resource_id: int) -> Document:
        return self._project.find("firewall", resource_id)

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        found = filter_labels(req, filter_equal(req, self._store.read_all("firewall"), "name"))
        documents = [_render(self._project, each) for each in found]
        answer_list(req, resp, "firewalls", documents, ("id", "name", "created"))

    def on_get_member(self, req: falcon.Request, resp: falcon.Response, resource_id: int) -> None:
        resp.media = {"firewall": _render(self._project, self._find(resource_id))}

    def _read_name(self, fields: Fields, required: bool = False) -> str | None:
        name = fields.name(required=required)
        if name is not None and len(name) > _NAME_LIMIT:
            fields.blame("name", f"must be at most {_NAME_LIMIT} characters")
        return name

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        fields = read_fields(req)
        name, labels = self._read_name(fields, required=True), fields.labels() or {}
        rules, targets = firewall_rules.read_rules(fields), _read_targets(fields, "apply_to")
        fields.check()
        with self._store.transaction():
            record: Document = {
                "name": name,
                "labels": labels,
                "rules": rules,
                "servers": [],
                "selectors": [],
                "pending": [],
                "created": render_now(),
            }
            others = self._store.read_all("firewall")
            self._project.require_unique(others, record, "name", _NAME_USED)
            if len(others) >= self._project.limits.firewalls:
                raise LimitExceeded("firewall_limit")
            record["id"] = self._store.next_id()
            self._store.put("firewall", record)
            added = self._add(record, targets, status=422)
            document = _render(self._project, self._find(record["id"]))
            actions = []
            if rules:
                # The rules hold as soon as they are on record: there is nothing left to do.
                step = Step("set_firewall_rules", (("firewall", record["id"]),), lambda: None)
                actions += self._project.actions.begin([step])
            actions += self._begin_added(record["id"], added, targets)
        resp.status = falcon.HTTP_201
        resp.media = {"firewall": document, "actions": actions}

    def on_put_member(self, req: falcon.Request, resp: falcon.Response, resource_id: int) -> None:
        fields = read_fields(req)
        name, labels = self._read_name(fields), fields.labels()
        fields.check()
        with self._store.transaction():
            record = self._find(resource_id)
            record.update(name=name or record["name"], labels=record["labels"] if labels is None else labels)
            self._project.require_unique(self._store.read_all("firewall"), record, "name", _NAME_USED)
            self._store.put("firewall", record)
            document = _render(self._project, record)
        resp.media = {"firewall": document}

    def on_delete_member(self, req: falcon.Request, resp: falcon.Response, resource_id: int) -> None:
        with self._store.transaction():
            record = self._find(resource_id)
            if record["servers"] or record["selectors"] or record["pending"]:
                raise StateRefused("resource_in_use", f"firewall with ID {resource_id} is still in use")
            self._store.delete("firewall", resource_id)
        resp.status = falcon.HTTP_204

    def on_post_rules(self, req: falcon.Request, resp: falcon.Response, resource_id: int) -> None:
        fields = read_fields(req)
        rules = firewall_rules.read_rules(fields)
        # Go clients send null for no rules.
        if not fields.has("rules") and not fields.is_null("rules"):
            fields.blame("rules", "Missing data for required field.")
        fields.check()
        with self._store.transaction():
            record = self._find(resource_id)
            before, servers = record["rules"], sorted(self._find_effective(resource_id))
            self._store.change("firewall", resource_id, rules=rules)

            def restore() -> None:
                self._store.change("firewall", resource_id, rules=before)
                for server_id in servers:
                    self._project.life.filter(server_id)

            step = Step("set_firewall_rules", (("firewall", resource_id),), lambda: None, restore)
            actions = self._project.actions.begin([step])
            actions += [_begin(self._project, "apply_firewall", resource_id, each) for each in servers]
        resp.status = falcon.HTTP_201
        resp.media = {"actions": actions}

    def _find_effective(self, firewall_id: int) -> set[int]:
        """The servers that have this firewall."""
        firewalls, servers = self._store.read_all("firewall"), self._store.read_all("server")
        return {
            server["id"]
            for server in servers
            if any(each["id"] == firewall_id for each in firewall_rules.choose_firewalls(firewalls, server))
        }

    def _find_server(self, server_id: int | str, status: int) -> Document:
        server = self._store.find("server", int(server_id))
        if server is None:
            raise StateRefused("firewall_resource_not_found", f"server with ID {server_id} not found", status)
        return server

    def _add(self, record: Document, targets: Iterable[Target], status: int) -> list[int]:
        """Puts targets on record; returns the servers that must be told. ``status`` is of a server that is missing."""
        firewall_id = record["id"]
        before, direct = self._find_effective(firewall_id), set()
        for kind, value in targets:
            if value in record["servers" if kind == "server" else "selectors"]:
                raise StateRefused("firewall_already_applied", f"the firewall is already applied to {kind} {value}")
            if kind == "label_selector":
                record["selectors"].append(value)
                continue
            server = self._find_server(value, status)
            if not find_of_server(self._project, server["id"]):
                raise StateRefused("private_net_only_server", f"server with ID {value} has no public interface")
            require_room_for_firewall(self._project, server, firewall_id)
            record["servers"].append(server["id"])
            direct.add(server["id"])
        self._store.put("firewall", record)
        return sorted(direct | (self._find_effective(firewall_id) - before))

    def _begin_selectors(self, command: str, firewall_id: int, targets: Iterable[Target]) -> list[Document]:
        """One action for each selector, though it may choose no server: old clients cannot do with an empty list."""
        step = Step(command, (("firewall", firewall_id),), lambda: None)
        return [self._project.actions.begin([step])[0] for kind, _ in targets if kind == "label_selector"]

    def _begin_added(self, firewall_id: int, added: Iterable[int], targets: Iterable[Target]) -> list[Document]:
        direct = self._find(firewall_id)["servers"]
        actions = self._begin_selectors("apply_firewall", firewall_id, targets)
        return actions + [_begin(self._project, "apply_firewall", firewall_id, each, each in direct) for each in added]

    def on_post_apply(self, req: falcon.Request, resp: falcon.Response, resource_id: int) -> None:
        fields = read_fields(req)
        targets = self._read_required_targets(fields, "apply_to")
        with self._store.transaction():
            added = self._add(self._find(resource_id), targets, status=404)
            actions = self._begin_added(resource_id, added, targets)
        resp.status = falcon.HTTP_201
        resp.media = {"actions": actions}

    def on_post_remove(self, req: falcon.Request, resp: falcon.Response, resource_id: int) -> None:
        fields = read_fields(req)
        targets = self._read_required_targets(fields, "remove_from")
        with self._store.transaction():
            record = self._find(resource_id)
            before, named, direct = self._find_effective(resource_id), set(), set()
            for kind, value in targets:
                if kind == "label_selector":
                    if value not in record["selectors"]:
                        message = f"the firewall is not applied to label selector {value}"
                        raise StateRefused("firewall_resource_not_found", message, 404)
                    record["selectors"].remove(value)
                    continue
                server = self._find_server(value, 404)
                named.add(server["id"])
                if server["id"] in record["servers"]:
                    direct.add(server["id"])
                elif server["id"] in before:
                    message = f"server with ID {value} has the firewall because of a label selector"
                    raise StateRefused("firewall_managed_by_label_selector", message)
            self._store.put("firewall", record)
            dropped = before - self._find_effective(resource_id)
            actions = self._begin_selectors("remove_firewall", resource_id, targets)
            for server_id in sorted(named | dropped):
                actions.append(_begin(self._project, "remove_firewall", resource_id, server_id, server_id in direct))
        resp.status = falcon.HTTP_201
        resp.media = {"actions": actions}

    def _read_required_targets(self, fields: Fields, name: str) -> list[Target]:
        targets = _read_targets(fields, name)
        if not fields.has(name):
            fields.blame(name, "Missing data for required field.")
        fields.check()
        return targets


def add_routes(app: falcon.App[falcon.Request, falcon.Response], prefix: str, project: Project) -> None:
    """Adds the routes."""
    resource, root = Firewalls(project), f"{prefix}/firewalls"
    app.add_route(root, resource)
    app.add_route(f"{root}/{{resource_id:int}}", resource, suffix="member")
    app.add_route(f"{root}/{{resource_id:int}}/actions/set_rules", resource, suffix="rules")
    app.add_route(f"{root}/{{resource_id:int}}/actions/apply_to_resources", resource, suffix="apply")
    app.add_route(f"{root}/{{resource_id:int}}/actions/remove_from_resources", resource, suffix="remove")
