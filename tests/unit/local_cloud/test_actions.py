"""How actions are read."""

import sqlite3
import time
from collections.abc import Callable
from typing import Any

import pytest

from scripts.local_cloud.api import actions
from scripts.local_cloud.machine_interface import MachineFailed
from tests.unit.local_cloud.conftest import PUBLIC_KEY, Cloud, wait_until


def test_actions_are_polled_one_by_one_and_many_at_a_time(cloud: Cloud) -> None:
    """Both ways of the clients; unknown ids are left out of the list."""
    server_id = cloud.make_server()
    ids = [action["id"] for action in cloud.get(f"/servers/{server_id}/actions")["actions"]]
    listed = cloud.get("/actions", id=[*map(str, ids), "1"], sort=["status", "id"], per_page="25")["actions"]
    assert [action["id"] for action in listed] == ids
    assert cloud.get(f"/actions/{ids[0]}")["action"] == listed[0]
    assert cloud.refuse("GET", "/actions/1") == (404, "not_found")
    assert cloud.get("/actions", id="1")["actions"] == []


def test_a_list_of_all_actions_must_name_them(cloud: Cloud) -> None:
    """410 without an id, as the real one since 2025; 422 for what is none."""
    assert cloud.refuse("GET", "/actions") == (410, "deprecated_api_endpoint")
    assert cloud.refuse("GET", "/actions", id="x") == (422, "invalid_input")


def test_actions_are_found_below_their_resources(cloud: Cloud) -> None:
    """By kind of resource and by resource; another resource's action is unknown there."""
    server_id, other = cloud.make_server("a"), cloud.make_server("b")
    image_id = cloud.make_image(server_id)
    action = cloud.get(f"/images/{image_id}/actions")["actions"][0]
    assert action["command"] == "create_image"
    assert action["resources"] == [{"id": server_id, "type": "server"}, {"id": image_id, "type": "image"}]
    assert cloud.get("/images/actions")["actions"] == [action]
    assert cloud.get(f"/servers/{server_id}/actions/{action['id']}")["action"] == action
    assert cloud.get(f"/servers/actions/{action['id']}")["action"] == action
    assert cloud.refuse("GET", f"/servers/{other}/actions/{action['id']}") == (404, "not_found")
    assert cloud.refuse("GET", "/servers/1/actions") == (404, "not_found")
    assert len(cloud.get("/servers/actions", status="success")["actions"]) == 5
    assert cloud.get("/servers/actions", status="error")["actions"] == []


def test_a_full_disk_is_told_and_costs_no_more_than_its_time(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked for is refused with 503; an action that ends meanwhile keeps its lock until that is written."""
    store, server_id = cloud.project.store, cloud.make_server()

    def refuse(kind: str, document: dict[str, Any]) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(actions, "_WRITE_AGAIN_S", 0.01)
    cloud.machines.delays_s["shutdown"] = 0.2
    action = cloud.post(f"/servers/{server_id}/actions/shutdown")["action"]
    with monkeypatch.context() as full:
        full.setattr(store, "put", refuse)
        key = {"name": "a", "public_key": PUBLIC_KEY}
        assert cloud.refuse("POST", "/ssh_keys", key) == (503, "unavailable")
        time.sleep(0.4)
        assert cloud.get(f"/actions/{action['id']}")["action"]["status"] == "running"
        assert cloud.refuse("POST", f"/servers/{server_id}/actions/poweron") == (423, "locked")
    assert cloud.wait(action)[0]["status"] == "success"
    cloud.succeed(f"/servers/{server_id}/actions/poweron")


def test_work_that_the_end_of_the_cloud_breaks_has_not_failed(start_cloud: Callable[..., Cloud]) -> None:
    """Machines refuse what comes after their end: a reboot that meets it is on again after the next start."""
    cloud = start_cloud()
    server_id = cloud.make_server()
    cloud.machines.delays_s["shutdown"] = 0.2
    cloud.machines.failing["start"] = MachineFailed("the local cloud is stopping")
    action = cloud.post(f"/servers/{server_id}/actions/reboot")["action"]
    cloud.stop()
    del cloud.machines.failing["start"]
    again = cloud.start_again()
    try:
        ended = again.get(f"/actions/{action['id']}")["action"]
        assert ended["error"]["message"] == "the local cloud was stopped while this action ran"
        wait_until(lambda: again.status(server_id) == "running")
    finally:
        again.stop()


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/servers", {"name": "new", "server_type": "cx23", "image": "debian-13"}),
        ("DELETE", "/servers/{id}", None),
        ("POST", "/servers/{id}/actions/create_image", {}),
        ("POST", "/servers/{id}/actions/poweroff", None),
    ],
)
def test_what_is_refused_for_a_full_disk_is_not_done(
    cloud: Cloud, monkeypatch: pytest.MonkeyPatch, method: str, path: str, body: dict[str, Any] | None
) -> None:
    """The disk is full when the last word is written: nothing has begun, nothing is locked, and no id is lost."""
    server_id, store = cloud.make_server("old"), cloud.project.store
    connection, asked = store._connection, list(cloud.machines.asked)

    class Refusing:
        def __getattr__(self, name: str) -> Any:
            return getattr(connection, name)

        def execute(self, statement: str, *values: Any) -> sqlite3.Cursor:
            if statement == "COMMIT":
                raise sqlite3.OperationalError("database or disk is full")
            return connection.execute(statement, *values)

    with monkeypatch.context() as full:
        full.setattr(store, "_connection", Refusing())
        assert cloud.refuse(method, path.format(id=server_id), body) == (503, "unavailable")
        time.sleep(0.1)
    assert cloud.machines.asked == asked
    assert [one["name"] for one in cloud.get("/servers")["servers"]] == ["old"]
    assert cloud.status(server_id) == "running"
    answer = cloud.call(method, f"/v1{path.format(id=server_id)}", body)
    assert cloud.wait(answer.json["action"])[0]["status"] == "success"
