"""How actions are read."""

from tests.unit.local_cloud.conftest import Cloud


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
