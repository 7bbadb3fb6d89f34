"""Floating IPs: by themselves, moved between servers that run, and after a restart."""

from collections.abc import Callable

import pytest

from scripts.local_cloud.api.project import Limits
from scripts.local_cloud.machine_interface import MachineFailed
from tests.unit.local_cloud.conftest import Cloud

Document = dict[str, object]


def _make(cloud: Cloud, **values: object) -> int:
    return int(cloud.post("/floating_ips", {"type": "ipv4", "home_location": "hel1", **values})["floating_ip"]["id"])


def _show(cloud: Cloud, ip_id: int) -> Document:
    return dict(cloud.get(f"/floating_ips/{ip_id}")["floating_ip"])


def test_one_is_made_by_itself(cloud: Cloud) -> None:
    """Unassigned, with a name of its own unless it is given one, and an address that no server has."""
    cloud.make_server()
    answer = cloud.post("/floating_ips", {"type": "ipv4", "home_location": "hel1", "labels": {"a": "b"}})
    record = answer["floating_ip"]
    assert "action" not in answer
    assert record["name"] == f"floating_ip-{record['id']}"
    assert (record["server"], record["blocked"], record["description"]) == (None, False, None)
    assert (record["ip"], record["home_location"]["name"]) == ("198.18.0.11", "hel1")
    assert record["dns_ptr"] == [{"ip": record["ip"], "dns_ptr": "static.11.0.18.198.clients.your-server.de"}]
    wide = _show(cloud, _make(cloud, type="ipv6", name="wide", description="d"))
    assert (wide["ip"], wide["name"], wide["description"], wide["dns_ptr"]) == ("fd00:198:18:2::/64", "wide", "d", [])
    assert cloud.machines.routes == {}


@pytest.mark.parametrize(
    "values",
    [
        {"type": "ipv5"},
        {"type": None},
        {"home_location": None},
        {"home_location": "mars"},
        {"server": 1},
        {"server": 1, "home_location": None},
        {"name": ""},
        {"labels": {"-": ""}},
    ],
)
def test_requests_that_break_a_rule_are_refused(cloud: Cloud, values: Document) -> None:
    """And nothing is made."""
    body = {"type": "ipv4", "home_location": "fsn1", **values}
    assert cloud.refuse("POST", "/floating_ips", body) == (422, "invalid_input")
    assert cloud.get("/floating_ips")["floating_ips"] == []


def test_one_is_changed_and_names_are_unique(cloud: Cloud) -> None:
    """What is not sent stays; null takes the description away."""
    first, second = _make(cloud, name="a", description="old", labels={"x": "y"}), _make(cloud, name="b")
    assert cloud.refuse("POST", "/floating_ips", {"type": "ipv4", "home_location": "fsn1", "name": "a"})[0] == 409
    assert cloud.refuse("PUT", f"/floating_ips/{second}", {"name": "a"}) == (409, "uniqueness_error")
    changed = cloud.call("PUT", f"/v1/floating_ips/{first}", {"name": "c"}).json["floating_ip"]
    assert (changed["name"], changed["description"], changed["labels"]) == ("c", "old", {"x": "y"})
    cloud.call("PUT", f"/v1/floating_ips/{first}", {"description": None})
    assert _show(cloud, first)["description"] is None
    assert [each["id"] for each in cloud.get("/floating_ips", name="c")["floating_ips"]] == [first]
    assert [each["id"] for each in cloud.get("/floating_ips", label_selector="!x")["floating_ips"]] == [second]


def test_one_moves_between_servers_that_run(cloud: Cloud) -> None:
    """Each document tells; the machines are told; the same server twice is refused."""
    first, second, ip_id = cloud.make_server("a"), cloud.make_server("b"), _make(cloud)
    address, root = _show(cloud, ip_id)["ip"], f"/floating_ips/{ip_id}/actions"
    action = cloud.succeed(f"{root}/assign", {"server": first})
    assert action["command"] == "assign_floating_ip"
    assert action["resources"] == [{"id": first, "type": "server"}, {"id": ip_id, "type": "floating_ip"}]
    assert cloud.get(f"/servers/{first}")["server"]["public_net"]["floating_ips"] == [ip_id]
    assert cloud.refuse("POST", f"{root}/assign", {"server": first}) == (422, "floating_ip_assigned")
    cloud.succeed(f"{root}/assign", {"server": second})
    assert (_show(cloud, ip_id)["server"], cloud.machines.routes) == (second, {address: second})
    assert cloud.get(f"/servers/{first}")["server"]["public_net"]["floating_ips"] == []
    assert cloud.refuse("DELETE", f"/floating_ips/{ip_id}") == (422, "must_be_unassigned")
    assert cloud.succeed(f"{root}/unassign")["command"] == "unassign_floating_ip"
    assert (_show(cloud, ip_id)["server"], cloud.machines.routes) == (None, {address: None})
    assert cloud.refuse("POST", f"{root}/unassign") == (422, "service_error")
    assert cloud.refuse("POST", f"{root}/assign", {"server": 1}) == (422, "invalid_input")
    assert cloud.call("DELETE", f"/v1/floating_ips/{ip_id}").status_code == 204
    assert [each["command"] for each in cloud.get(f"{root}")["actions"]][-1] == "unassign_floating_ip"
    assert len(cloud.get("/floating_ips/actions")["actions"]) == 3


def test_one_is_made_for_a_server_and_freed_with_it(cloud: Cloud) -> None:
    """It is at the server's location; only the server goes."""
    server_id = cloud.make_server(location="nbg1")
    answer = cloud.post("/floating_ips", {"type": "ipv6", "server": server_id})
    record = answer["floating_ip"]
    assert (record["server"], record["home_location"]["name"]) == (server_id, "nbg1")
    cloud.wait(answer["action"])
    assert cloud.machines.routes == {record["ip"]: server_id}
    cloud.wait(cloud.call("DELETE", f"/v1/servers/{server_id}").json["action"])
    assert (_show(cloud, record["id"])["server"], cloud.machines.routes) == (None, {record["ip"]: None})


def test_what_machines_refuse_does_not_stand_on_record(cloud: Cloud) -> None:
    """A move that fails leaves it where it was; one made for a server stays, unassigned."""
    first, second = cloud.make_server("a"), cloud.make_server("b")
    ip_id = _make(cloud)
    cloud.succeed(f"/floating_ips/{ip_id}/actions/assign", {"server": first})
    cloud.machines.failing["route_address"] = MachineFailed("no")
    action = cloud.post(f"/floating_ips/{ip_id}/actions/assign", {"server": second})["action"]
    assert cloud.wait(action)[0]["error"] == {"code": "action_failed", "message": "no"}
    assert _show(cloud, ip_id)["server"] == first
    answer = cloud.post("/floating_ips", {"type": "ipv4", "server": first})
    assert cloud.wait(answer["action"])[0]["status"] == "error"
    assert _show(cloud, answer["floating_ip"]["id"])["server"] is None


def test_one_is_locked_while_it_moves(cloud: Cloud) -> None:
    """And the server that it moves to cannot go meanwhile."""
    server_id, ip_id = cloud.make_server(), _make(cloud)
    cloud.machines.delays_s["route_address"] = 0.3
    action = cloud.post(f"/floating_ips/{ip_id}/actions/assign", {"server": server_id})["action"]
    assert cloud.refuse("POST", f"/floating_ips/{ip_id}/actions/assign", {"server": server_id}) == (423, "locked")
    assert cloud.refuse("DELETE", f"/floating_ips/{ip_id}") == (423, "locked")
    assert cloud.refuse("DELETE", f"/servers/{server_id}") == (423, "locked")
    cloud.wait(action)


def test_reverse_names_are_kept_and_reset(cloud: Cloud) -> None:
    """The one of an IPv4 address has a default; those of IPv6 are any in the network."""
    ip_id, wide_id = _make(cloud), _make(cloud, type="ipv6")
    address, path = _show(cloud, ip_id)["ip"], f"/floating_ips/{ip_id}/actions/change_dns_ptr"
    default = _show(cloud, ip_id)["dns_ptr"]
    cloud.succeed(path, {"ip": address, "dns_ptr": "www.example.com"})
    assert _show(cloud, ip_id)["dns_ptr"] == [{"ip": address, "dns_ptr": "www.example.com"}]
    cloud.succeed(path, {"ip": address, "dns_ptr": None})
    assert _show(cloud, ip_id)["dns_ptr"] == default
    inside = str(_show(cloud, wide_id)["ip"]).replace("::/64", "::5")
    wide_path = f"/floating_ips/{wide_id}/actions/change_dns_ptr"
    cloud.succeed(wide_path, {"ip": inside, "dns_ptr": "five.example.com"})
    assert _show(cloud, wide_id)["dns_ptr"] == [{"ip": inside, "dns_ptr": "five.example.com"}]
    for body in (
        {"ip": "10.0.0.1", "dns_ptr": "a.b"},
        {"ip": address, "dns_ptr": "a.b."},
        {"ip": address},
        {"dns_ptr": "a.b"},
    ):
        assert cloud.refuse("POST", path, body) == (422, "invalid_input")
    assert cloud.refuse("POST", wide_path, {"ip": "fe80::1", "dns_ptr": "a.b"}) == (422, "invalid_input")


def test_protection_protects_and_the_limit_limits(start_cloud: Callable[..., Cloud]) -> None:
    """423 and 403."""
    cloud = start_cloud(limits=Limits(floating_ips=1))
    ip_id = _make(cloud)
    cloud.succeed(f"/floating_ips/{ip_id}/actions/change_protection", {"delete": True})
    assert cloud.refuse("DELETE", f"/floating_ips/{ip_id}") == (423, "protected")
    body = {"type": "ipv4", "home_location": "fsn1"}
    assert cloud.refuse("POST", "/floating_ips", body) == (403, "resource_limit_exceeded")


def test_a_start_leads_them_anew_before_servers_start(cloud: Cloud) -> None:
    """Only those that are assigned."""
    server_id, ip_id = cloud.make_server(), _make(cloud)
    _make(cloud)
    cloud.succeed(f"/floating_ips/{ip_id}/actions/assign", {"server": server_id})
    address = _show(cloud, ip_id)["ip"]
    cloud.stop()
    cloud.machines.running.clear()
    cloud.machines.routes.clear()
    cloud.machines.asked.clear()
    again = cloud.start_again()
    again.wait(*again.get(f"/servers/{server_id}/actions", status="running")["actions"])
    assert cloud.machines.routes == {address: server_id}
    asked = [method for method, _ in cloud.machines.asked]
    assert asked.index("route_address") < asked.index("start")
    again.stop()
