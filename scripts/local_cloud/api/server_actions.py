"""Owns what can be done to a server: the paths below ``/servers/{id}/actions``."""

from collections.abc import Callable
from functools import partial
from typing import Any

import falcon

from scripts.local_cloud.api import attachments
from scripts.local_cloud.api.actions import Step
from scripts.local_cloud.api.bodies import Fields, read_fields
from scripts.local_cloud.api.errors import Protected, StateRefused, Unsupported
from scripts.local_cloud.api.images import begin_snapshot, check_image, find_image, name_for_machines
from scripts.local_cloud.api.networks import require_idle
from scripts.local_cloud.api.placement_groups import require_room_in_group, show_placement_group
from scripts.local_cloud.api.project import Project
from scripts.local_cloud.api.servers import make_password, read_user_data

Document = dict[str, Any]
Respond = Callable[[Project, Fields, Document], Document]  # to a request about this server's record

# Actions of the real API that this local cloud does not have yet.
_ABSENT = (
    "attach_iso",
    "change_dns_ptr",
    "change_type",
    "detach_iso",
    "disable_backup",
    "disable_rescue",
    "enable_backup",
    "enable_rescue",
    "request_console",
    "reset_password",
)


def _begin(
    project: Project, server: Document, command: str, work: Callable[[int], None], status: str | None = None
) -> Document:
    """Begins an action that holds the server, which has this status meanwhile."""
    server_id, life = server["id"], project.life
    step = Step(command, (("server", server_id),), lambda: work(server_id), lambda: life.settle(server_id))
    project.actions.require_free(("server", server_id))
    if status is not None:
        project.store.change("server", server_id, status=status)
    return {"action": project.actions.begin([step], hold=[("server", server_id)])[0]}


def _power_on(project: Project, fields: Fields, server: Document) -> Document:
    status = None if server["status"] == "running" else "starting"
    return _begin(project, server, "start_server", project.life.start, status)


def _power_off(project: Project, fields: Fields, server: Document) -> Document:
    status = None if server["status"] == "off" else "stopping"
    return _begin(project, server, "stop_server", project.life.power_off, status)


def _shutdown(project: Project, fields: Fields, server: Document) -> Document:
    return _begin(project, server, "shutdown_server", project.life.press_button)


def _reboot(project: Project, fields: Fields, server: Document) -> Document:
    return _begin(project, server, "reboot_server", project.life.reboot)


def _reset(project: Project, fields: Fields, server: Document) -> Document:
    return _begin(project, server, "reset_server", project.life.reset)


def _create_image(project: Project, fields: Fields, server: Document) -> Document:
    kind = fields.one_of("type", ("snapshot", "backup")) or "snapshot"
    description, labels = fields.text("description"), fields.labels() or {}
    fields.check()
    if kind == "backup":
        raise Unsupported("this local cloud does not have backups yet: make a snapshot")
    project.actions.require_free(("server", server["id"]))
    return begin_snapshot(project, server, description, labels)


def _rebuild(project: Project, fields: Fields, server: Document) -> Document:
    reference = fields.reference("image", required=True)
    values: Document = {"user_data": read_user_data(fields)} if fields.has("user_data") else {}
    image = find_image(project, reference) if reference is not None else None
    if reference is not None:
        check_image(fields, image, server["primary_disk_size"])
    fields.check()
    assert image is not None  # check() has raised without
    if server["protection"]["rebuild"]:
        raise Protected(f"server with ID {server['id']} is protected against a rebuild")
    password = None if server["public_keys"] else make_password()
    values.update(image_id=image["id"], root_password=password)
    server_id, life, source = server["id"], project.life, name_for_machines(image)
    project.actions.require_free(("server", server_id))
    project.store.change("server", server_id, status="rebuilding")
    step = Step(
        "rebuild_server",
        (("server", server_id),),
        lambda: life.rebuild(server_id, source, **values),
        lambda: life.settle(server_id),
    )
    action = project.actions.begin([step], hold=[("server", server_id)], use=[("image", image["id"])])[0]
    return {"action": action, "root_password": password}


def _change_protection(project: Project, fields: Fields, server: Document) -> Document:
    protection = {name: fields.flag(name, server["protection"][name]) for name in ("delete", "rebuild")}
    if protection["delete"] != protection["rebuild"]:
        fields.blame("rebuild", "delete and rebuild must have the same value")
    fields.check()
    server_id = server["id"]

    def protect() -> None:
        project.store.change("server", server_id, protection=protection)

    return {"action": project.actions.begin([Step("change_protection", (("server", server_id),), protect)])[0]}


def _add_to_placement_group(project: Project, fields: Fields, server: Document) -> Document:
    group_id, resource = fields.number("placement_group", required=True) or 0, ("server", server["id"])
    fields.check()
    if project.store.find("placement_group", group_id) is None:
        fields.blame("placement_group", f"placement group {group_id} not found")
        fields.check()
    project.actions.require_free(resource)
    if server["status"] != "off":
        raise StateRefused("server_not_stopped", f"server with ID {server['id']} must be off")
    if show_placement_group(project, server) is not None:
        raise StateRefused("already_in_placement_group", "the server is already part of a placement group")
    require_room_in_group(project, group_id)
    # On record at once, so that no other server takes the last place meanwhile.
    project.store.change("server", server["id"], placement_group_id=group_id)
    leave = partial(project.store.change, "server", server["id"], placement_group_id=None)
    step = Step("add_to_placement_group", (resource,), lambda: None, leave)
    return {"action": project.actions.begin([step], hold=[resource])[0]}


def _remove_from_placement_group(project: Project, fields: Fields, server: Document) -> Document:
    resource = ("server", server["id"])
    if show_placement_group(project, server) is None:
        raise StateRefused("service_error", f"server with ID {server['id']} is not in a placement group")

    def leave() -> None:
        project.store.change("server", server["id"], placement_group_id=None)

    step = Step("remove_from_placement_group", (resource,), leave)
    return {"action": project.actions.begin([step], hold=[resource])[0]}


def _read_network(project: Project, fields: Fields) -> Document | None:
    network_id = fields.number("network", required=True)
    network = None if network_id is None else project.store.find("network", network_id)
    if network_id is not None and network is None:
        fields.blame("network", f"network {network_id} not found")
    return network


def _read_aliases(fields: Fields) -> list[str]:
    aliases = fields.items("alias_ips")
    if any(attachments.parse_address(each) is None for each in aliases):
        fields.blame("alias_ips", "must be a list of IPv4 addresses")
    elif len(aliases) > attachments.ALIASES_LIMIT:
        fields.blame("alias_ips", f"must be at most {attachments.ALIASES_LIMIT}")
    return aliases


def _zone_of(project: Project, server: Document) -> str:
    location = project.catalogue.find_location(server["location"])
    return location.network_zone if location else ""


def _begin_in_network(
    project: Project,
    server: Document,
    network_id: int,
    command: str,
    work: Callable[[], None],
    undo: Callable[[], None] = lambda: None,
) -> Document:
    resource, network = ("server", server["id"]), ("network", network_id)
    step = Step(command, (resource, network), work, undo)
    return {"action": project.actions.begin([step], hold=[resource], use=[network])[0]}


def _attach_to_network(project: Project, fields: Fields, server: Document) -> Document:
    network, aliases = _read_network(project, fields), _read_aliases(fields)
    ip, ip_range = fields.text("ip"), fields.text("ip_range")
    if ip is not None and attachments.parse_address(ip) is None:
        fields.blame("ip", "must be an IPv4 address")
    known = [each["ip_range"] for each in network["subnets"]] if network else []
    if network and ip_range is not None and ip_range not in known:
        fields.blame("ip_range", "must be the range of one of the network's subnets")
    fields.check()
    assert network is not None  # check() has raised without
    require_idle(project, network["id"])
    project.actions.require_free(("server", server["id"]))
    zone, store = _zone_of(project, server), project.store
    made = attachments.enlist(store, server["id"], network, zone, ip=ip, aliases=aliases, ip_range=ip_range)
    work = partial(project.life.attach, server["id"], made["id"])
    undo = partial(attachments.delist, store, made["id"])
    return _begin_in_network(project, server, network["id"], "attach_to_network", work, undo)


def _find_attachment(project: Project, fields: Fields, server: Document) -> tuple[Document, Document]:
    """The network that a request names, and the server's attachment to it."""
    network = _read_network(project, fields)
    fields.check()
    assert network is not None  # check() has raised without
    found = attachments.find_attachment(project.store, server["id"], network["id"])
    if found is None:
        raise StateRefused("service_error", f"server with ID {server['id']} is not attached to the network")
    require_idle(project, network["id"])
    project.actions.require_free(("server", server["id"]))
    return network, found


def _detach_from_network(project: Project, fields: Fields, server: Document) -> Document:
    network, found = _find_attachment(project, fields, server)
    work = partial(project.life.detach, found)
    return _begin_in_network(project, server, network["id"], "detach_from_network", work)


def _change_alias_ips(project: Project, fields: Fields, server: Document) -> Document:
    aliases = _read_aliases(fields)
    if not fields.has("alias_ips"):
        fields.blame("alias_ips", "Missing data for required field.")
    network, found = _find_attachment(project, fields, server)
    attachments.require_aliases(project.store, found, network, aliases, _zone_of(project, server))
    # On record at once, so that no other server takes them meanwhile.
    changed = found | {"alias_ips": aliases}
    attachments.put_back(project.store, changed)
    undo = partial(attachments.put_back, project.store, found)
    work = partial(project.life.connect, server["id"])
    return _begin_in_network(project, server, network["id"], "change_alias_ips", work, undo)


def _refuse(project: Project, fields: Fields, server: Document) -> Document:
    raise Unsupported("this local cloud does not have this action yet")


_RESPONDERS: dict[str, Respond] = {
    "poweron": _power_on,
    "poweroff": _power_off,
    "shutdown": _shutdown,
    "reboot": _reboot,
    "reset": _reset,
    "rebuild": _rebuild,
    "create_image": _create_image,
    "change_protection": _change_protection,
    "add_to_placement_group": _add_to_placement_group,
    "remove_from_placement_group": _remove_from_placement_group,
    "attach_to_network": _attach_to_network,
    "detach_from_network": _detach_from_network,
    "change_alias_ips": _change_alias_ips,
    **dict.fromkeys(_ABSENT, _refuse),
}


class _ServerAction:
    """One path: finds the server and lets ``respond`` do the rest, in one transaction."""

    def __init__(self, project: Project, respond: Respond):
        self._project, self._respond = project, respond

    def on_post(self, req: falcon.Request, resp: falcon.Response, resource_id: int) -> None:
        fields = read_fields(req)  # before the transaction: a slow sender must not hold up all others
        with self._project.store.transaction():
            resp.media = self._respond(self._project, fields, self._project.find("server", resource_id))
        resp.status = falcon.HTTP_201


def add_routes(app: falcon.App[falcon.Request, falcon.Response], prefix: str, project: Project) -> None:
    """Adds the routes."""
    for name, respond in _RESPONDERS.items():
        app.add_route(f"{prefix}/servers/{{resource_id:int}}/actions/{name}", _ServerAction(project, respond))
