"""Owns images: those of the catalogue, and snapshots."""

from typing import Any

import falcon

from scripts.local_cloud.api.actions import Step
from scripts.local_cloud.api.bodies import Fields, read_fields
from scripts.local_cloud.api.clock import render_now
from scripts.local_cloud.api.errors import LimitExceeded, NotFound, Protected, Unsupported
from scripts.local_cloud.api.listing import answer_list, filter_any, filter_equal, filter_labels
from scripts.local_cloud.api.project import Project

Document = dict[str, Any]

_TYPES = ("system", "app", "snapshot", "backup")
_STATUSES = ("available", "creating", "unavailable")
_PRIVATE = ("has_data",)  # fields of the record that no client sees


def render_image(record: Document) -> Document:
    """The document of the API."""
    return {key: value for key, value in record.items() if key not in _PRIVATE}


def read_images(project: Project) -> list[Document]:
    """All images that there are."""
    snapshots = [render_image(record) for record in project.store.read_all("image") if not record["deleted"]]
    return [image.render() for image in project.catalogue.system_images] + snapshots


def show_image(project: Project, image_id: int) -> Document | None:
    """The image that a server was made from, deleted ones too, which say so; None if nothing is known of it."""
    for image in project.catalogue.system_images:
        if image.id == image_id:
            return image.render()
    record = project.store.find("image", image_id)
    return render_image(record) if record else None


def find_image(project: Project, reference: str) -> Document | None:
    """The image with this id, or the system image with this name: snapshots have none; None if there is no such."""
    for image in read_images(project):
        if reference in (str(image["id"]), image["name"]):
            return image
    return None


def name_for_machines(image: Document) -> int | str:
    """What the machines know an image by."""
    known: int | str = image["name"] if image["type"] == "system" else image["id"]
    return known


def check_image(fields: Fields, image: Document | None, disk_gb: int | None) -> None:
    """Blames the field ``image`` if none was found, it cannot be used now, or it does not fit a disk of that size."""
    if image is None:
        fields.blame("image", "image not found")
    elif image["status"] != "available":
        fields.blame("image", f"image is not available: its status is {image['status']}")
    elif disk_gb is not None and image["disk_size"] > disk_gb:
        fields.blame("image", f"image disk is bigger than server type disk: {image['disk_size']} GB, {disk_gb} GB")


def begin_snapshot(project: Project, server: Document, description: str | None, labels: Document) -> Document:
    """Makes an image's record and begins to write it; the answer of create_image. Call it in a transaction."""
    store = project.store
    if sum(not record["deleted"] for record in store.read_all("image")) >= project.limits.images:
        raise LimitExceeded("image_limit")
    origin = show_image(project, server["image_id"]) or {"os_flavor": "unknown", "os_version": None}
    record = {
        "id": store.next_id(),
        "type": "snapshot",
        "status": "creating",
        "name": None,
        "description": server["name"] if description is None else description,
        "image_size": None,
        "disk_size": server["primary_disk_size"],
        "created": render_now(),
        "created_from": {"id": server["id"], "name": server["name"]},
        "bound_to": None,
        "os_flavor": origin["os_flavor"],
        "os_version": origin["os_version"],
        "rapid_deploy": False,
        "protection": {"delete": False},
        "deprecated": None,
        "deprecation": None,
        "deleted": None,
        "labels": labels,
        "architecture": "x86",
        "has_data": True,
    }
    store.put("image", record)
    server_id, image_id = server["id"], record["id"]
    resources = (("server", server_id), ("image", image_id))
    step = Step(
        "create_image",
        resources,
        lambda: project.life.snapshot(server_id, image_id),
        lambda: project.life.spoil_image(image_id),
    )
    action = project.actions.begin([step], hold=resources)[0]
    return {"action": action, "image": render_image(record)}


class Images:
    """``/images`` and its members."""

    def __init__(self, project: Project):
        self._project, self._store = project, project.store

    def _find_snapshot(self, resource_id: int) -> Document:
        if any(image.id == resource_id for image in self._project.catalogue.system_images):
            raise Unsupported("only images of type snapshot or backup can be changed or deleted")
        record = self._store.find("image", resource_id)
        if record is None or record["deleted"]:
            raise NotFound(f"image with ID '{resource_id}' not found")
        return record

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        found = filter_equal(req, read_images(self._project), "name")
        found = filter_any(req, found, "type", _TYPES)
        found = filter_any(req, found, "bound_to")
        found = filter_any(req, found, "architecture", ("x86", "arm"))
        if (req.get_param("include_deprecated") or "").lower() != "true":
            found = [image for image in found if image["deprecated"] is None]
        found = filter_labels(req, filter_any(req, found, "status", _STATUSES))
        answer_list(req, resp, "images", found, ("id", "name", "created"))

    def on_get_member(self, req: falcon.Request, resp: falcon.Response, resource_id: int) -> None:
        image = show_image(self._project, resource_id)
        if image is None or image["deleted"]:
            raise NotFound(f"image with ID '{resource_id}' not found")
        resp.media = {"image": image}

    def on_put_member(self, req: falcon.Request, resp: falcon.Response, resource_id: int) -> None:
        fields = read_fields(req)
        description, labels = fields.text("description"), fields.labels()
        fields.one_of("type", ("snapshot",))
        fields.check()
        with self._store.transaction():
            record = self._find_snapshot(resource_id)
            record["description"] = record["description"] if description is None else description
            record["labels"] = record["labels"] if labels is None else labels
            self._store.put("image", record)
        resp.media = {"image": render_image(record)}

    def on_delete_member(self, req: falcon.Request, resp: falcon.Response, resource_id: int) -> None:
        with self._store.transaction():
            record = self._find_snapshot(resource_id)
            if record["protection"]["delete"]:
                raise Protected(f"image with ID {resource_id} is protected against deletion")
            self._project.actions.require_free(("image", resource_id))
            # The record stays: servers made from it still show where they come from.
            self._store.change("image", resource_id, deleted=render_now(), status="unavailable")
        self._project.life.delete_image(resource_id)
        resp.status = falcon.HTTP_204

    def on_post_protection(self, req: falcon.Request, resp: falcon.Response, resource_id: int) -> None:
        fields = read_fields(req)
        delete = fields.flag("delete")
        fields.check()
        with self._store.transaction():
            record = self._find_snapshot(resource_id)
            protection = {"delete": record["protection"]["delete"] if delete is None else delete}

            def protect() -> None:
                self._store.change("image", resource_id, protection=protection)

            action = self._project.actions.begin([Step("change_protection", (("image", resource_id),), protect)])[0]
        resp.status = falcon.HTTP_201
        resp.media = {"action": action}


def add_routes(app: falcon.App[falcon.Request, falcon.Response], prefix: str, project: Project) -> None:
    """Adds the routes."""
    resource = Images(project)
    app.add_route(f"{prefix}/images", resource)
    app.add_route(f"{prefix}/images/{{resource_id:int}}", resource, suffix="member")
    app.add_route(f"{prefix}/images/{{resource_id:int}}/actions/change_protection", resource, suffix="protection")
