"""What a person sees in the terminal: what there is, and what has changed since the last look."""

from scripts.local_cloud.watch import changes, describe
from tests.unit.local_cloud.conftest import Cloud, wait_until


def test_a_look_tells_servers_images_and_actions(cloud: Cloud) -> None:
    """Each with its state; system images, which never change, are not told."""
    server = cloud.post("/servers", {"name": "web", "server_type": "cx23", "image": "debian-13"})["server"]
    wait_until(lambda: cloud.get(f"/servers/{server['id']}")["server"]["status"] == "running")
    image = cloud.post(f"/servers/{server['id']}/actions/create_image", {"description": "kept"})["image"]
    wait_until(lambda: cloud.get(f"/images/{image['id']}")["image"]["status"] == "available")
    seen = describe(cloud.project)
    address = server["public_net"]["ipv4"]["ip"]
    assert seen["server", server["id"]] == f"web: running, cx23, {address}"
    assert seen["image", image["id"]].startswith("kept: available, ")
    assert {kind for kind, _ in seen} == {"server", "image", "action"}
    assert f"start_server of server {server['id']}: success" in seen.values()


def test_changes_are_told_once() -> None:
    """New, changed, gone; actions only fall out of sight."""
    before = {("server", 1): "a: off", ("server", 2): "b: off", ("action", 3): "x: success"}
    now = {("server", 1): "a: running", ("image", 4): "c: creating"}
    assert changes(before, now) == ["server 1  a: running", "image 4  c: creating", "server 2  gone"]
    assert changes(now, now) == []
