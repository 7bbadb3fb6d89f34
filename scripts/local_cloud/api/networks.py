"""Owns private networks: their ranges, subnets and routes; servers are attached to them by actions of their own."""

from collections.abc import Callable
from functools import partial
from ipaddress import IPv4Network
from typing import Any

import falcon

from scripts.local_cloud.api import attachments
from scripts.local_cloud.api.actions import Step
from scripts.local_cloud.api.bodies import Fields, read_fields
from scripts.local_cloud.api.clock import render_now
from scripts.local_cloud.api.errors import (
    Conflict,
    LimitExceeded,
    Locked,
    NotFound,
    Protected,
    StateRefused,
    Unsupported,
)
from scripts.local_cloud.api.listing import answer_list, filter_equal, filter_labels
from scripts.local_cloud.api.project import Project

Document = dict[str, Any]
Change = Callable[[Fields, Document], Document]  # the values of a network's record that a request asks for

_PRIVATE = tuple(IPv4Network(each) for each in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16"))
_EVERYWHERE = IPv4Network("0.0.0.0/0")
_TYPES = ("cloud", "server", "vswitch")
_ZONES = ("eu-central", "us-east", "us-west", "ap-southeast")  # servers of this cloud may be in fewer
_SUBNETS_LIMIT = 50
_ROUTES_LIMIT = 100
_LONGEST_NETWORK = 24
_LONGEST_SUBNET = 30
_AUTOMATIC_SUBNET = 24
_NAME_USED = "network name is already used"


def require_idle(project: Project, network_id: int) -> None:
    """Raises Conflict while the network itself is being changed; that servers come and go does not count."""
    if project.actions.is_locked(("network", network_id)):
        raise Conflict(f"network with ID {network_id} is being changed")


def _require_unused(project: Project, network_id: int) -> None:
    try:
        project.actions.require_free(("network", network_id))
    except Locked as error:
        raise Conflict(f"network with ID {network_id} is being changed") from error


def _render(project: Project, record: Document) -> Document:
    members = [each for each in attachments.find_of_network(project.store, record["id"]) if not each["pending"]]
    gateway = str(attachments.find_gateway(record))
    return {
        "id": record["id"],
        "name": record["name"],
        "ip_range": record["ip_range"],
        "subnets": [{**subnet, "gateway": gateway, "vswitch_id": None} for subnet in record["subnets"]],
        "routes": record["routes"],
        "servers": [each["server_id"] for each in members],
        "load_balancers": [],
        "protection": record["protection"],
        "labels": record["labels"],
        "created": record["created"],
        "expose_routes_to_vswitch": False,
    }


def _parse(value: object) -> IPv4Network | None:
    try:
        return IPv4Network(value) if isinstance(value, str) and "/" in value else None
    except ValueError:
        return None


def _is_private(network: IPv4Network) -> bool:
    return any(network.subnet_of(each) for each in _PRIVATE)


def _read_range(fields: Fields) -> IPv4Network | None:
    raw = fields.text("ip_range", required=True)
    found = _parse(raw)
    if raw is not None and (found is None or not _is_private(found) or found.prefixlen > _LONGEST_NETWORK):
        fields.blame("ip_range", f"must be a private IPv4 range of RFC 1918, at least a /{_LONGEST_NETWORK}")
        return None
    return found


def _add_subnet(fields: Fields, network: Document) -> None:
    """Adds the subnet that the fields describe to a network's record, or notes what is wrong."""
    kind, zone = fields.one_of("type", _TYPES, required=True), fields.one_of("network_zone", _ZONES, required=True)
    if kind == "vswitch" or fields.has("vswitch_id"):
        raise Unsupported("this local cloud does not have vSwitches")
    whole, raw = IPv4Network(network["ip_range"]), fields.text("ip_range")
    others = [IPv4Network(each["ip_range"]) for each in network["subnets"]]
    destinations = [IPv4Network(route["destination"]) for route in network["routes"]]
    others += [each for each in destinations if each != _EVERYWHERE]
    if raw is None:
        prefix = max(whole.prefixlen, _AUTOMATIC_SUBNET)
        free = (each for each in whole.subnets(new_prefix=prefix) if not any(map(each.overlaps, others)))
        found = next(free, None)
        if found is None:
            fields.blame("ip_range", f"the network has no free /{_AUTOMATIC_SUBNET} left")
    else:
        found = _parse(raw)
        if found is None or not found.subnet_of(whole) or found.prefixlen > _LONGEST_SUBNET:
            fields.blame("ip_range", f"must be a part of the network's range, at least a /{_LONGEST_SUBNET}")
        elif any(map(found.overlaps, others)):
            fields.blame("ip_range", "overlaps with another subnet or with a route")
    if len(network["subnets"]) >= _SUBNETS_LIMIT:
        raise LimitExceeded("network_subnet_limit")
    network["subnets"] = [*network["subnets"], {"type": kind, "ip_range": str(found), "network_zone": zone}]


def _read_route(fields: Fields) -> Document:
    route = {name: fields.text(name, required=True) for name in ("destination", "gateway")}
    if route["destination"] is not None and _parse(route["destination"]) is None:
        fields.blame("destination", "must be a network in CIDR notation")
    if route["gateway"] is not None and attachments.parse_address(route["gateway"]) is None:
        fields.blame("gateway", "must be an IPv4 address")
    return route


def _add_route(fields: Fields, network: Document) -> None:
    """Adds the route that the fields describe to a network's record, or notes what is wrong."""
    route = _read_route(fields)
    to, gateway = _parse(route["destination"]), attachments.parse_address(route["gateway"])
    others = [IPv4Network(each["destination"]) for each in network["routes"]]
    if to is not None and to != _EVERYWHERE:
        others = [each for each in others if each != _EVERYWHERE]
        others += [IPv4Network(each["ip_range"]) for each in network["subnets"]]
        if not _is_private(to):
            fields.blame("destination", "must be in a private IPv4 range of RFC 1918, or 0.0.0.0/0")
        elif attachments.PUBLIC_GATEWAY in to or any(map(to.overlaps, others)):
            fields.blame("destination", "overlaps with a subnet, another route or 172.31.1.1")
    elif to is not None and to in others:
        fields.blame("destination", "overlaps with another route")
    if gateway is not None and (
        gateway not in IPv4Network(network["ip_range"])
        or gateway in (attachments.find_gateway(network), attachments.PUBLIC_GATEWAY)
    ):
        fields.blame("gateway", "must be an address in the network's range, and not its first")
    if len(network["routes"]) >= _ROUTES_LIMIT:
        raise LimitExceeded("network_route_limit")
    network["routes"] = [*network["routes"], route]


def _read_each(fields: Fields, name: str, add: Callable[[Fields], None]) -> None:
    """Adds each of a list of objects; what is wrong in one is blamed on the list."""
    for each in fields.items(name):
        if not isinstance(each, dict):
            fields.blame(name, "must be a list of objects")
            return
        inner = Fields(each)
        add(inner)
        if problems := inner.list_problems():
            fields.blame(name, problems[0])
            return


class Networks:
    """``/networks``, its members and their actions."""

    def __init__(self, project: Project):
        self._project, self._store = project, project.store

    def _find(self, resource_id: int) -> Document:
        return self._project.find("network", resource_id)

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        found = filter_labels(req, filter_equal(req, self._store.read_all("network"), "name"))
        documents = [_render(self._project, each) for each in found]
        answer_list(req, resp, "networks", documents, ("id", "name", "created"))

    def on_get_member(self, req: falcon.Request, resp: falcon.Response, resource_id: int) -> None:
        resp.media = {"network": _render(self._project, self._find(resource_id))}

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        fields = read_fields(req)
        name, labels, ip_range = fields.name(required=True), fields.labels() or {}, _read_range(fields)
        _refuse_vswitch(fields)
        record: Document = {"ip_range": str(ip_range), "subnets": [], "routes": []}
        if ip_range is not None:
            _read_each(fields, "subnets", lambda inner: _add_subnet(inner, record))
            _read_each(fields, "routes", lambda inner: _add_route(inner, record))
        fields.check()
        with self._store.transaction():
            others = self._store.read_all("network")
            record |= {
                "name": name,
                "protection": {"delete": False},
                "labels": labels,
                "created": render_now(),
            }
            self._project.require_unique(others, record, "name", _NAME_USED)
            if len(others) >= self._project.limits.networks:
                raise LimitExceeded("network_limit")
            record["id"] = self._store.next_id()
            self._store.put("network", record)
        resp.status = falcon.HTTP_201
        resp.media = {"network": _render(self._project, record)}

    def on_put_member(self, req: falcon.Request, resp: falcon.Response, resource_id: int) -> None:
        fields = read_fields(req)
        name, labels = fields.name(), fields.labels()
        _refuse_vswitch(fields)
        fields.check()
        with self._store.transaction():
            record = self._find(resource_id)
            require_idle(self._project, resource_id)
            record["name"] = name or record["name"]
            record["labels"] = record["labels"] if labels is None else labels
            self._project.require_unique(self._store.read_all("network"), record, "name", _NAME_USED)
            self._store.put("network", record)
        resp.media = {"network": _render(self._project, record)}

    def on_delete_member(self, req: falcon.Request, resp: falcon.Response, resource_id: int) -> None:
        with self._store.transaction():
            record = self._find(resource_id)
            if record["protection"]["delete"]:
                raise Protected(f"network with ID {resource_id} is protected against deletion")
            _require_unused(self._project, resource_id)
            self._store.delete("network", resource_id)
            for each in attachments.find_of_network(self._store, resource_id):
                attachments.delist(self._store, each["id"])
                resources = (("server", each["server_id"]), ("network", resource_id))
                work = partial(self._project.life.connect, each["server_id"])
                self._project.actions.begin([Step("detach_from_network", resources, work)])
        resp.status = falcon.HTTP_204

    def change(self, resp: falcon.Response, fields: Fields, resource_id: int, command: str, read: Change) -> None:
        """Begins to change a network: its record, and what its members' machines know of it."""
        with self._store.transaction():
            record, network = self._find(resource_id), ("network", resource_id)
            values = read(fields, record)
            fields.check()
            _require_unused(self._project, resource_id)

            def work() -> None:
                self._store.change("network", resource_id, **values)
                if command != "change_protection":
                    for each in attachments.find_of_network(self._store, resource_id):
                        self._project.life.connect(each["server_id"])

            resp.media = {"action": self._project.actions.begin([Step(command, (network,), work)], hold=[network])[0]}
        resp.status = falcon.HTTP_201

    def read_add_subnet(self, fields: Fields, record: Document) -> Document:
        _add_subnet(fields, record)
        return {"subnets": record["subnets"]}

    def read_delete_subnet(self, fields: Fields, record: Document) -> Document:
        ip_range = fields.text("ip_range", required=True)
        fields.check()
        kept = [each for each in record["subnets"] if each["ip_range"] != ip_range]
        if len(kept) == len(record["subnets"]):
            raise NotFound(f"subnet {ip_range} not found")
        for each in attachments.find_of_network(self._store, record["id"]):
            for ip in (each["ip"], *each["alias_ips"]):
                if attachments.parse_address(ip) in IPv4Network(ip_range):
                    raise StateRefused("service_error", "cannot remove subnet because servers are attached to it")
        return {"subnets": kept}

    def read_add_route(self, fields: Fields, record: Document) -> Document:
        _add_route(fields, record)
        return {"routes": record["routes"]}

    def read_delete_route(self, fields: Fields, record: Document) -> Document:
        route = _read_route(fields)
        fields.check()
        if route not in record["routes"]:
            raise NotFound("route not found")
        return {"routes": [each for each in record["routes"] if each != route]}

    def read_range(self, fields: Fields, record: Document) -> Document:
        found, before = _read_range(fields), IPv4Network(record["ip_range"])
        if found is not None and (found[0] != before[0] or found.prefixlen > before.prefixlen):
            fields.blame("ip_range", "must begin where it began, and can only be extended")
        return {"ip_range": str(found)}

    def read_protection(self, fields: Fields, record: Document) -> Document:
        return {"protection": {"delete": fields.flag("delete", record["protection"]["delete"])}}


def _refuse_vswitch(fields: Fields) -> None:
    if fields.flag("expose_routes_to_vswitch"):
        raise Unsupported("this local cloud does not have vSwitches")


class _NetworkAction:
    """One path: a change of a network, begun as an action."""

    def __init__(self, networks: Networks, command: str, read: Change):
        self._networks, self._command, self._read = networks, command, read

    def on_post(self, req: falcon.Request, resp: falcon.Response, resource_id: int) -> None:
        self._networks.change(resp, read_fields(req), resource_id, self._command, self._read)


def add_routes(app: falcon.App[falcon.Request, falcon.Response], prefix: str, project: Project) -> None:
    """Adds the routes."""
    resource, root = Networks(project), f"{prefix}/networks"
    app.add_route(root, resource)
    app.add_route(f"{root}/{{resource_id:int}}", resource, suffix="member")
    changes: dict[str, Change] = {
        "add_subnet": resource.read_add_subnet,
        "delete_subnet": resource.read_delete_subnet,
        "add_route": resource.read_add_route,
        "delete_route": resource.read_delete_route,
        "change_ip_range": resource.read_range,
        "change_protection": resource.read_protection,
    }
    for command, read in changes.items():
        action = _NetworkAction(resource, command, read)
        app.add_route(f"{root}/{{resource_id:int}}/actions/{command}", action)
