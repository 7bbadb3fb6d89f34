"""Images: those of the catalogue, snapshots, and where they may be used."""

from collections.abc import Callable

from scripts.local_cloud.api.project import Limits
from scripts.local_cloud.machine_interface import MachineFailed
from tests.unit.local_cloud.conftest import Cloud
from tests.unit.local_cloud.stub_machines import StubMachines


def test_debian_is_always_there(cloud: Cloud) -> None:
    """Found by name; it cannot be changed, protected or deleted."""
    found = cloud.get("/images", name="debian-13", architecture="x86", include_deprecated="true")["images"]
    assert [(image["type"], image["status"], image["os_flavor"]) for image in found] == [
        ("system", "available", "debian")
    ]
    assert cloud.get("/images", name="debian-13", architecture="arm")["images"] == []
    path = f"/images/{found[0]['id']}"
    assert cloud.refuse("DELETE", path) == (422, "unsupported_error")
    assert cloud.refuse("PUT", path, {"description": "x"}) == (422, "unsupported_error")
    assert cloud.refuse("POST", f"{path}/actions/change_protection", {"delete": True}) == (422, "unsupported_error")


def test_a_snapshot_is_creating_and_then_available(start_cloud: Callable[..., Cloud]) -> None:
    """Its size is known at the end; a running server can be copied; meanwhile nothing else can be done to either."""
    cloud = start_cloud(StubMachines(delays_s={"snapshot": 0.3}))
    server_id = cloud.make_server("web")
    answer = cloud.post(
        f"/servers/{server_id}/actions/create_image", {"description": "golden", "labels": {"state": "candidate"}}
    )
    image = answer["image"]
    assert (image["status"], image["image_size"], image["type"], image["name"]) == ("creating", None, "snapshot", None)
    assert image["created_from"] == {"id": server_id, "name": "web"}
    assert cloud.refuse("DELETE", f"/images/{image['id']}") == (423, "locked")
    new = {"name": "b", "server_type": "cx23", "image": str(image["id"])}
    assert cloud.refuse("POST", "/servers", new) == (422, "invalid_input")
    cloud.wait(answer["action"])
    image = cloud.get(f"/images/{image['id']}")["image"]
    assert (image["status"], image["image_size"], image["disk_size"]) == ("available", 1.25, 40)
    assert cloud.get("/images", type="snapshot", label_selector="state=candidate")["images"] == [image]
    assert cloud.status(server_id) == "running"
    cloud.make_server("b", image=image["id"])


def test_a_snapshot_has_no_name_to_be_found_by(cloud: Cloud) -> None:
    """Its description is none."""
    cloud.make_image(cloud.make_server("web"), description="golden")
    new = {"name": "b", "server_type": "cx23", "image": "golden"}
    assert cloud.refuse("POST", "/servers", new) == (422, "invalid_input")


def test_an_image_must_fit_the_disk(cloud: Cloud) -> None:
    """An image of a large disk fits neither a small new server nor a small one that is rebuilt."""
    small, large = cloud.make_server("small"), cloud.make_server("large", server_type="cx33")
    image_id = cloud.make_image(large)
    assert cloud.get(f"/images/{image_id}")["image"]["disk_size"] == 80
    new = {"name": "b", "server_type": "cx23", "image": image_id}
    result = cloud.call("POST", "/v1/servers", new)
    assert result.status_code == 422
    assert "bigger than" in result.json["error"]["message"]
    assert cloud.refuse("POST", f"/servers/{small}/actions/rebuild", {"image": image_id}) == (422, "invalid_input")


def test_description_and_labels_can_be_changed(cloud: Cloud) -> None:
    """Label rules hold."""
    path = f"/images/{cloud.make_image(cloud.make_server())}"
    changed = cloud.call("PUT", f"/v1{path}", {"description": "d", "labels": {"state": "verified"}}).json["image"]
    assert (changed["description"], changed["labels"]) == ("d", {"state": "verified"})
    assert cloud.refuse("PUT", path, {"labels": {"sha": "a" * 64}}) == (422, "invalid_input")
    assert cloud.refuse("PUT", path, {"type": "system"}) == (422, "invalid_input")


def test_a_deleted_image_is_gone_but_its_servers_remember_it(cloud: Cloud) -> None:
    """The server shows it with the time of its deletion."""
    server_id = cloud.make_server("a")
    image_id = cloud.make_image(server_id)
    second = cloud.make_server("b", image=str(image_id))
    protect = f"/images/{image_id}/actions/change_protection"
    cloud.succeed(protect, {"delete": True})
    assert cloud.refuse("DELETE", f"/images/{image_id}") == (423, "protected")
    cloud.succeed(protect, {"delete": False})
    assert cloud.call("DELETE", f"/v1/images/{image_id}").status_code == 204
    assert cloud.machines.images == set()
    assert cloud.refuse("GET", f"/images/{image_id}") == (404, "not_found")
    assert cloud.refuse("DELETE", f"/images/{image_id}") == (404, "not_found")
    assert cloud.get("/images", type="snapshot")["images"] == []
    assert cloud.get(f"/servers/{second}")["server"]["image"]["deleted"] is not None
    assert cloud.refuse("POST", "/servers", {"name": "c", "server_type": "cx23", "image": image_id})[0] == 422


def test_an_image_cannot_be_deleted_while_a_disk_is_made_of_it(start_cloud: Callable[..., Cloud]) -> None:
    """423 until the server's creation has ended."""
    cloud = start_cloud(StubMachines())
    image_id = cloud.make_image(cloud.make_server("a"))
    cloud.machines.delays_s["create_disk"] = 0.2
    answers = [cloud.post("/servers", {"name": name, "server_type": "cx23", "image": image_id}) for name in ("b", "c")]
    assert cloud.refuse("DELETE", f"/images/{image_id}") == (423, "locked")
    cloud.wait(*(action for each in answers for action in (each["action"], *each["next_actions"])))
    assert cloud.call("DELETE", f"/v1/images/{image_id}").status_code == 204


def test_an_image_that_cannot_be_written_stays_unavailable(cloud: Cloud) -> None:
    """As the real one leaves it behind: whoever asked for it must delete it."""
    server_id = cloud.make_server()
    cloud.machines.failing["snapshot"] = MachineFailed("no room")
    answer = cloud.post(f"/servers/{server_id}/actions/create_image", {})
    assert cloud.wait(answer["action"])[0]["error"]["message"] == "no room"
    assert cloud.get(f"/images/{answer['image']['id']}")["image"]["status"] == "unavailable"
    assert cloud.call("DELETE", f"/v1/images/{answer['image']['id']}").status_code == 204
    assert cloud.status(server_id) == "running"


def test_room_that_a_deleted_image_still_holds_is_freed_at_the_next_start(cloud: Cloud) -> None:
    """The caller is not troubled with it."""
    image_id = cloud.make_image(cloud.make_server())
    cloud.machines.failing["delete_image"] = MachineFailed("busy")
    assert cloud.call("DELETE", f"/v1/images/{image_id}").status_code == 204
    assert cloud.machines.images == {image_id}
    cloud.machines.failing.clear()
    cloud.stop()
    again = cloud.start_again()
    assert cloud.machines.images == set()
    again.stop()


def test_backups_and_too_many_images_are_refused(start_cloud: Callable[..., Cloud]) -> None:
    """422 and 403."""
    cloud = start_cloud(limits=Limits(images=1))
    server_id = cloud.make_server()
    path = f"/servers/{server_id}/actions/create_image"
    assert cloud.refuse("POST", path, {"type": "backup"}) == (422, "unsupported_error")
    assert cloud.refuse("POST", path, {"type": "app"}) == (422, "invalid_input")
    cloud.make_image(server_id)
    assert cloud.refuse("POST", path, {}) == (403, "resource_limit_exceeded")
