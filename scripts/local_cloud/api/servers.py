"""Owns servers: their documents, how one is made, changed and deleted."""

import secrets
import string
from functools import partial
from typing import Any

import falcon

from scripts.local_cloud.api import attachments
from scripts.local_cloud.api.actions import Step
from scripts.local_cloud.api.bodies import Fields, read_fields
from scripts.local_cloud.api.catalogue import INCLUDED_TRAFFIC_BYTES, Location, ServerType
from scripts.local_cloud.api.clock import render_now
from scripts.local_cloud.api.errors import LimitExceeded, Protected, Unsupported
from scripts.local_cloud.api.firewall_rules import enlist
from scripts.local_cloud.api.firewalls import follow_labels, require_room_for_firewall, show_firewalls
from scripts.local_cloud.api.floating_ips import list_of_server
from scripts.local_cloud.api.images import check_image, find_image, name_for_machines, show_image
from scripts.local_cloud.api.listing import answer_list, filter_any, filter_equal, filter_labels
from scripts.local_cloud.api.networks import require_idle
from scripts.local_cloud.api.placement_groups import require_room_in_group, show_placement_group
from scripts.local_cloud.api.primary_ips import (
    find_of_server,
    make_primary_ip,
    render_pointer,
    require_assignable,
)
from scripts.local_cloud.api.project import Project

Document = dict[str, Any]

_USER_DATA_LIMIT_BYTES = 32 * 1024
_PASSWORD_LENGTH = 20
_NAME_USED = "server name is already used"
_STATUSES = ("running", "initializing", "starting", "stopping", "off", "deleting", "migrating", "rebuilding", "unknown")
# What a request can ask for, by field, that this local cloud does not have yet.
_ABSENT = {
    "volumes": "volumes",
}


def _render_public_net(project: Project, record: Document) -> Document:
    addresses = find_of_server(project, record["id"])
    ipv4, ipv6 = addresses.get("ipv4"), addresses.get("ipv6")
    return {
        "ipv4": ipv4 and {"id": ipv4["id"], "ip": ipv4["ip"], "blocked": False, "dns_ptr": render_pointer(ipv4["ip"])},
        "ipv6": ipv6 and {"id": ipv6["id"], "ip": ipv6["ip"], "blocked": False, "dns_ptr": []},
        "floating_ips": list_of_server(project, record["id"]),
        "firewalls": show_firewalls(project, record),
    }


def render_server(project: Project, record: Document) -> Document:
    """The document of the API."""
    catalogue = project.catalogue
    server_type = catalogue.find_server_type(record["server_type"])
    location = catalogue.find_location(record["location"])
    document = {
        "id": record["id"],
        "name": record["name"],
        "status": record["status"],
        "created": record["created"],
        "public_net": _render_public_net(project, record),
        "private_net": attachments.show_private_net(project.store, record["id"]),
        "server_type": server_type.render(catalogue.locations) if server_type else None,
        "location": location.render() if location else None,
        "image": show_image(project, record["image_id"]),
        "iso": None,
        "rescue_enabled": False,
        "locked": project.actions.is_locked(("server", record["id"])),
        "backup_window": None,
        "outgoing_traffic": 0,
        "ingoing_traffic": 0,
        "included_traffic": INCLUDED_TRAFFIC_BYTES,
        "protection": record["protection"],
        "labels": record["labels"],
        "volumes": [],
        "load_balancers": [],
        "primary_disk_size": record["primary_disk_size"],
        "placement_group": show_placement_group(project, record),
    }
    if project.old_clients:
        document["datacenter"] = location.render_datacenter() if location else None
    return document


def make_password() -> str:
    """A password for root."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(_PASSWORD_LENGTH))


def read_user_data(fields: Fields) -> str:
    """The user data of a body, empty if it has none."""
    user_data = fields.text("user_data") or ""
    if len(user_data.encode()) > _USER_DATA_LIMIT_BYTES:
        fields.blame("user_data", "must be at most 32 KiB")
    return user_data


class Servers:
    """``/servers`` and its members."""

    def __init__(self, project: Project):
        self._project, self._store = project, project.store

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        found = filter_equal(req, self._store.read_all("server"), "name")
        found = filter_labels(req, filter_any(req, found, "status", _STATUSES))
        documents = [render_server(self._project, each) for each in found]
        answer_list(req, resp, "servers", documents, ("id", "name", "created"))

    def on_get_member(self, req: falcon.Request, resp: falcon.Response, resource_id: int) -> None:
        resp.media = {"server": render_server(self._project, self._project.find("server", resource_id))}

    def on_put_member(self, req: falcon.Request, resp: falcon.Response, resource_id: int) -> None:
        fields = read_fields(req)
        name, labels = fields.hostname(), fields.labels()
        fields.check()
        with self._store.transaction():
            record = self._project.find("server", resource_id)
            before = dict(record)
            record["name"] = name or record["name"]
            record["labels"] = record["labels"] if labels is None else labels
            self._project.require_unique(self._store.read_all("server"), record, "name", _NAME_USED)
            self._store.put("server", record)
            follow_labels(self._project, before, record)
            document = render_server(self._project, record)
        resp.media = {"server": document}

    def on_delete_member(self, req: falcon.Request, resp: falcon.Response, resource_id: int) -> None:
        life, server = self._project.life, ("server", resource_id)
        with self._store.transaction():
            record = self._project.find("server", resource_id)
            if record["protection"]["delete"]:
                raise Protected(f"server with ID {resource_id} is protected against deletion")
            self._project.actions.require_free(server)
            self._store.change("server", resource_id, status="deleting")
            step = Step("delete_server", (server,), lambda: life.remove(resource_id), lambda: life.settle(resource_id))
            action = self._project.actions.begin([step], hold=[server])[0]
        resp.media = {"action": action}

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        fields = read_fields(req)
        name = fields.hostname(required=True)
        start = fields.flag("start_after_create", True)
        user_data, labels = read_user_data(fields), fields.labels() or {}
        server_type, location = self._read_server_type(fields), self._read_location(fields)
        fields.flag("automount")
        self._refuse_absent(fields)
        with self._store.transaction():
            image, public_keys = self._read_image(fields, server_type), self._read_keys(fields)
            wanted, firewalls = self._read_public_net(fields), self._read_firewalls(fields)
            group_id, networks = self._read_placement_group(fields), self._read_networks(fields)
            if not wanted and not networks:
                fields.blame("public_net", "a server without a public address needs a network")
            fields.check()
            # check() has raised without one of them
            assert server_type is not None
            assert location is not None
            assert image is not None
            if group_id is not None:
                require_room_in_group(self._project, group_id)
            record = {
                "id": 0,
                "name": name,
                "status": "initializing",
                "created": render_now(),
                "server_type": server_type.name,
                "location": location.name,
                "image_id": image["id"],
                "labels": labels,
                "protection": {"delete": False, "rebuild": False},
                "user_data": user_data,
                "public_keys": public_keys,
                "root_password": None if public_keys else make_password(),
                "primary_disk_size": server_type.disk_gb,
                "placement_group_id": group_id,
                "has_disk": False,
                "power": "on" if start else "off",
            }
            others = self._store.read_all("server")
            self._project.require_unique(others, record, "name", _NAME_USED)
            if len(others) >= self._project.limits.servers:
                raise LimitExceeded("server_limit")
            record["id"] = self._store.next_id()
            self._store.put("server", record)
            self._give_addresses(record, wanted)
            for firewall_id in firewalls:
                require_room_for_firewall(self._project, record, firewall_id)
                enlist(self._store, firewall_id, record["id"])
            attached = [
                attachments.enlist(self._store, record["id"], network, location.network_zone) for network in networks
            ]
            actions = self._begin(record, image, attached, bool(start))
            document = render_server(self._project, record)
        resp.status = falcon.HTTP_201
        resp.media = {
            "server": document,
            "action": actions[0],
            "next_actions": actions[1:],
            "root_password": record["root_password"],
        }

    def _begin(self, record: Document, image: Document, attached: list[Document], start: bool) -> list[Document]:
        life, server_id = self._project.life, record["id"]
        resource, source = ("server", server_id), name_for_machines(image)

        def make() -> None:
            life.make(server_id, source)
            if start:
                self._store.change("server", server_id, status="starting")

        steps = [Step("create_server", (resource,), make, lambda: life.remove(server_id))]
        networks = [("network", each["network_id"]) for each in attached]
        for network, each in zip(networks, attached, strict=True):
            attach = partial(life.attach, server_id, each["id"])
            undo = partial(attachments.delist, self._store, each["id"])
            steps.append(Step("attach_to_network", (resource, network), attach, undo))
        if start:
            starting = Step("start_server", (resource,), lambda: life.start(server_id), lambda: life.settle(server_id))
            steps.append(starting)
        return self._project.actions.begin(steps, hold=[resource], use=[("image", image["id"]), *networks])

    def _refuse_absent(self, fields: Fields) -> None:
        for name, what in _ABSENT.items():
            if fields.items(name):
                raise Unsupported(f"this local cloud does not have {what} yet")

    def _read_server_type(self, fields: Fields) -> ServerType | None:
        reference = fields.reference("server_type", required=True)
        found = None if reference is None else self._project.catalogue.find_server_type(reference)
        if reference is not None and found is None:
            fields.blame("server_type", "server type not found")
        return found

    def _read_location(self, fields: Fields) -> Location | None:
        catalogue = self._project.catalogue
        name = "datacenter" if self._project.old_clients and fields.has("datacenter") else "location"
        reference = fields.reference(name)
        if reference is None:
            return catalogue.locations[0]
        # A data center was named after its location: fsn1-dc14.
        found = catalogue.find_location(reference.partition("-")[0])
        if found is None:
            fields.blame(name, f"{name} not found")
        return found

    def _read_image(self, fields: Fields, server_type: ServerType | None) -> Document | None:
        reference = fields.reference("image", required=True)
        if reference is None:
            return None
        image = find_image(self._project, reference)
        check_image(fields, image, server_type.disk_gb if server_type else None)
        return image

    def _read_keys(self, fields: Fields) -> list[str]:
        keys = self._store.read_all("ssh_key")
        found = []
        for reference in fields.references("ssh_keys"):
            # A name of digits only is still a name, if no key has that id.
            key = next((each for each in keys if str(each["id"]) == reference), None)
            key = key or next((each for each in keys if each["name"] == reference), None)
            if key is None:
                fields.blame("ssh_keys", f"SSH key {reference!r} not found")
            else:
                found.append(key["public_key"].strip())
        return list(dict.fromkeys(found))

    def _read_firewalls(self, fields: Fields) -> list[int]:
        found = []
        for each in fields.items("firewalls"):
            firewall_id = each.get("firewall") if isinstance(each, dict) else None
            if not isinstance(firewall_id, int) or isinstance(firewall_id, bool):
                fields.blame("firewalls", "must be a list of objects that name a firewall by its id")
            elif self._store.find("firewall", firewall_id) is None:
                fields.blame("firewalls", f"firewall {firewall_id} not found")
            else:
                found.append(firewall_id)
        return list(dict.fromkeys(found))

    def _read_placement_group(self, fields: Fields) -> int | None:
        group_id = fields.number("placement_group")
        if group_id is not None and self._store.find("placement_group", group_id) is None:
            fields.blame("placement_group", f"placement group {group_id} not found")
        return group_id

    def _read_public_net(self, fields: Fields) -> dict[str, int | None]:
        """The types of address that the server gets, each with the id of a primary IP or None for a new one."""
        nested = fields.nested("public_net")
        wanted: dict[str, int | None] = {}
        for kind in ("ipv4", "ipv6"):
            enabled, chosen = nested.flag(f"enable_{kind}", True), nested.number(kind)
            if enabled:
                wanted[kind] = chosen
            elif chosen is not None:
                fields.blame("public_net", f"{kind} is given but enable_{kind} is false")
            if chosen is not None and self._store.find("primary_ip", chosen) is None:
                fields.blame("public_net", f"primary IP {chosen} not found")
        for problem in nested.list_problems():
            fields.blame("public_net", problem)
        return wanted

    def _read_networks(self, fields: Fields) -> list[Document]:
        found = []
        for reference in dict.fromkeys(fields.references("networks")):
            is_id = reference.isascii() and reference.isdigit() and len(reference) < 17
            network = self._store.find("network", int(reference)) if is_id else None
            if network is None:
                fields.blame("networks", f"network {reference} not found")
            else:
                require_idle(self._project, network["id"])
                found.append(network)
        return found

    def _give_addresses(self, record: Document, wanted: dict[str, int | None]) -> None:
        for kind, chosen in wanted.items():
            if chosen is None:
                make_primary_ip(self._project, kind, record["location"], assignee_id=record["id"], auto_delete=True)
                continue
            address = self._project.find("primary_ip", chosen)
            self._project.actions.require_free(("primary_ip", chosen))
            require_assignable(address, kind, record["location"])
            self._store.change("primary_ip", chosen, assignee_id=record["id"])


def add_routes(app: falcon.App[falcon.Request, falcon.Response], prefix: str, project: Project) -> None:
    """Adds the routes."""
    resource = Servers(project)
    app.add_route(f"{prefix}/servers", resource)
    app.add_route(f"{prefix}/servers/{{resource_id:int}}", resource, suffix="member")
