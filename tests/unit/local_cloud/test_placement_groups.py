"""Placement groups: by themselves, and with servers in them."""

import pytest

from tests.unit.local_cloud.conftest import Cloud

BODY = {"name": "web", "server_type": "cx23", "image": "debian-13"}


def _make(cloud: Cloud, name: str = "apart", **values: object) -> int:
    return int(cloud.post("/placement_groups", {"name": name, "type": "spread", **values})["placement_group"]["id"])


def _members(cloud: Cloud, group_id: int) -> list[int]:
    return list(cloud.get(f"/placement_groups/{group_id}")["placement_group"]["servers"])


def test_one_is_made_changed_listed_and_deleted(cloud: Cloud) -> None:
    """Names are unique; filters find by name, type and label."""
    first, second = _make(cloud, labels={"a": "b"}), _make(cloud, "other")
    body = {"name": "apart", "type": "spread"}
    assert cloud.refuse("POST", "/placement_groups", body) == (409, "uniqueness_error")
    assert cloud.refuse("PUT", f"/placement_groups/{second}", {"name": "apart"}) == (409, "uniqueness_error")
    changed = cloud.call("PUT", f"/v1/placement_groups/{first}", {"name": "new"}).json["placement_group"]
    assert (changed["name"], changed["labels"], changed["servers"]) == ("new", {"a": "b"}, [])
    for query, ids in (
        ({"name": "new"}, [first]),
        ({"label_selector": "!a"}, [second]),
        ({"type": "spread", "sort": "name"}, [first, second]),
    ):
        found = cloud.get("/placement_groups", **query)["placement_groups"]
        assert [each["id"] for each in found] == ids
    assert cloud.call("DELETE", f"/v1/placement_groups/{first}").status_code == 204
    assert cloud.refuse("GET", f"/placement_groups/{first}") == (404, "not_found")


@pytest.mark.parametrize("values", [{"type": "together"}, {"type": None}, {"name": ""}, {"labels": {"-": ""}}])
def test_requests_that_break_a_rule_are_refused(cloud: Cloud, values: dict[str, object]) -> None:
    body = {"name": "apart", "type": "spread", **values}
    assert cloud.refuse("POST", "/placement_groups", body) == (422, "invalid_input")


def test_a_server_is_made_in_one_and_leaves_it_when_it_goes(cloud: Cloud) -> None:
    """Both documents say so; a group that is not there is told."""
    group_id = _make(cloud)
    server_id = cloud.make_server(placement_group=group_id)
    assert cloud.get(f"/servers/{server_id}")["server"]["placement_group"]["servers"] == [server_id]
    assert _members(cloud, group_id) == [server_id]
    assert cloud.refuse("POST", "/servers", {**BODY, "placement_group": 1}) == (422, "invalid_input")
    cloud.wait(cloud.call("DELETE", f"/v1/servers/{server_id}").json["action"])
    assert _members(cloud, group_id) == []


def test_a_server_joins_while_it_is_off_and_leaves_at_any_time(cloud: Cloud) -> None:
    """One group at a time."""
    group_id, server_id = _make(cloud), cloud.make_server()
    join, leave = (f"/servers/{server_id}/actions/{what}_placement_group" for what in ("add_to", "remove_from"))
    body = {"placement_group": group_id}
    assert cloud.refuse("POST", join, body) == (422, "server_not_stopped")
    assert cloud.refuse("POST", leave) == (422, "service_error")
    cloud.succeed(f"/servers/{server_id}/actions/poweroff")
    assert cloud.refuse("POST", join, {"placement_group": 1}) == (422, "invalid_input")
    assert cloud.succeed(join, body)["command"] == "add_to_placement_group"
    assert _members(cloud, group_id) == [server_id]
    assert cloud.refuse("POST", join, body) == (422, "already_in_placement_group")
    cloud.succeed(f"/servers/{server_id}/actions/poweron")
    assert cloud.succeed(leave)["command"] == "remove_from_placement_group"
    assert cloud.get(f"/servers/{server_id}")["server"]["placement_group"] is None


def test_ten_servers_fill_one(cloud: Cloud) -> None:
    """The eleventh is refused, at creation and later."""
    group_id = _make(cloud)
    for number in range(10):
        cloud.make_server(f"s{number}", placement_group=group_id, start_after_create=False)
    outside = cloud.make_server("outside", start_after_create=False)
    full = (422, "placement_group_member_limit_reached")
    body = {"placement_group": group_id}
    assert cloud.refuse("POST", "/servers", {**BODY, **body}) == full
    assert cloud.refuse("POST", f"/servers/{outside}/actions/add_to_placement_group", body) == full


def test_a_deleted_one_lets_its_servers_go(cloud: Cloud) -> None:
    """They run on without."""
    group_id = _make(cloud)
    server_id = cloud.make_server(placement_group=group_id)
    assert cloud.call("DELETE", f"/v1/placement_groups/{group_id}").status_code == 204
    assert cloud.get(f"/servers/{server_id}")["server"]["placement_group"] is None
    assert cloud.status(server_id) == "running"
