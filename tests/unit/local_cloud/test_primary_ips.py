"""Primary IPs: with servers, by themselves, and moved."""

from ipaddress import IPv4Network, IPv6Network
from pathlib import Path

import pytest

from scripts.local_cloud.api.addresses import AddressRanges
from scripts.local_cloud.api.errors import LimitExceeded
from scripts.local_cloud.store import Store
from tests.unit.local_cloud.conftest import Cloud


def _make(cloud: Cloud, name: str = "front", kind: str = "ipv4", **values: object) -> int:
    body = {"name": name, "type": kind, "location": "fsn1", "assignee_type": "server", **values}
    return int(cloud.post("/primary_ips", body)["primary_ip"]["id"])


def test_those_of_a_server_go_with_it_unless_told_otherwise(cloud: Cloud) -> None:
    """auto_delete decides; what stays is unassigned."""
    server_id = cloud.make_server()
    first, second = cloud.get("/primary_ips")["primary_ips"]
    assert (first["type"], second["type"]) == ("ipv4", "ipv6")
    assert {each["assignee_id"] for each in (first, second)} == {server_id}
    assert all(each["auto_delete"] and each["assignee_type"] == "server" for each in (first, second))
    cloud.call("PUT", f"/v1/primary_ips/{first['id']}", {"auto_delete": False, "name": "kept"})
    cloud.wait(cloud.call("DELETE", f"/v1/servers/{server_id}").json["action"])
    left = cloud.get("/primary_ips")["primary_ips"]
    assert [(each["name"], each["assignee_id"], each["assignee_type"]) for each in left] == [
        ("kept", None, "unassigned")
    ]


def test_a_server_takes_one_that_is_there(cloud: Cloud) -> None:
    """It must be of the right type, free, and at the same place."""
    ip_id, elsewhere, wide = _make(cloud), _make(cloud, "far", location="hel1"), _make(cloud, "wide", "ipv6")
    address = cloud.get(f"/primary_ips/{ip_id}")["primary_ip"]["ip"]
    server_id = cloud.make_server(public_net={"enable_ipv4": True, "enable_ipv6": False, "ipv4": ip_id})
    net = cloud.get(f"/servers/{server_id}")["server"]["public_net"]
    assert (net["ipv4"]["ip"], net["ipv4"]["id"], net["ipv6"]) == (address, ip_id, None)
    assert cloud.machines.running[server_id].ipv6_network is None
    body = {"name": "b", "server_type": "cx23", "image": "debian-13"}
    for chosen, code in (
        (ip_id, "primary_ip_assigned"),
        (elsewhere, "primary_ip_datacenter_mismatch"),
        (wide, "primary_ip_version_mismatch"),
    ):
        assert cloud.refuse("POST", "/servers", {**body, "public_net": {"ipv4": chosen}}) == (422, code)
    assert len(cloud.get("/servers")["servers"]) == 1


def test_moving_one_needs_the_server_off(cloud: Cloud) -> None:
    """Unassign, then assign; the machine has the new address from the next start on."""
    server_id, ip_id = cloud.make_server(), _make(cloud)
    old = cloud.get(f"/servers/{server_id}")["server"]["public_net"]["ipv4"]["id"]
    body = {"assignee_id": server_id, "assignee_type": "server"}
    assert cloud.refuse("POST", f"/primary_ips/{old}/actions/unassign") == (422, "server_not_stopped")
    assert cloud.refuse("POST", f"/primary_ips/{ip_id}/actions/assign", body) == (422, "server_not_stopped")
    cloud.succeed(f"/servers/{server_id}/actions/poweroff")
    assert cloud.refuse("POST", f"/primary_ips/{ip_id}/actions/assign", body) == (422, "server_has_ipv4")
    assert cloud.refuse("DELETE", f"/primary_ips/{old}") == (422, "must_be_unassigned")
    assert cloud.succeed(f"/primary_ips/{old}/actions/unassign")["command"] == "unassign_primary_ip"
    action = cloud.succeed(f"/primary_ips/{ip_id}/actions/assign", body)
    assert {each["type"] for each in action["resources"]} == {"server", "primary_ip"}
    assert cloud.refuse("POST", f"/primary_ips/{ip_id}/actions/assign", body)[1] == "primary_ip_already_assigned"
    cloud.succeed(f"/servers/{server_id}/actions/poweron")
    assert cloud.machines.running[server_id].ipv4 == cloud.get(f"/primary_ips/{ip_id}")["primary_ip"]["ip"]
    assert cloud.call("DELETE", f"/v1/primary_ips/{old}").status_code == 204


def test_one_can_be_made_for_a_server_that_is_off(cloud: Cloud) -> None:
    """The answer has the action that assigns it."""
    server_id = cloud.make_server(start_after_create=False, public_net={"enable_ipv4": False})
    wanted = {"name": "n", "type": "ipv4", "assignee_id": server_id, "assignee_type": "server"}
    answer = cloud.post("/primary_ips", wanted)
    assert cloud.wait(answer["action"])[0]["command"] == "assign_primary_ip"
    assert cloud.get("/primary_ips", name="n")["primary_ips"][0]["assignee_id"] == server_id
    body = {"name": "o", "type": "ipv4", "assignee_id": server_id, "assignee_type": "server"}
    assert cloud.refuse("POST", "/primary_ips", body) == (422, "server_has_ipv4")
    assert cloud.get("/primary_ips", name="o")["primary_ips"] == []


def test_names_are_unique_and_protection_protects(cloud: Cloud) -> None:
    """409 and 423; a location is needed; filters find by address."""
    ip_id = _make(cloud)
    body = {"name": "front", "type": "ipv4", "location": "fsn1"}
    assert cloud.refuse("POST", "/primary_ips", body) == (409, "uniqueness_error")
    assert cloud.refuse("POST", "/primary_ips", {"name": "n", "type": "ipv4"}) == (422, "invalid_input")
    assert cloud.refuse("POST", "/primary_ips", {**body, "type": "ipv5"}) == (422, "invalid_input")
    cloud.succeed(f"/primary_ips/{ip_id}/actions/change_protection", {"delete": True})
    assert cloud.refuse("DELETE", f"/primary_ips/{ip_id}") == (423, "protected")
    address = cloud.get(f"/primary_ips/{ip_id}")["primary_ip"]["ip"]
    assert len(cloud.get("/primary_ips", ip=address)["primary_ips"]) == 1


def test_addresses_come_in_turn_and_freed_ones_last(tmp_path: Path) -> None:
    """The ends of each /24 and the first addresses are left out; a full range is told."""
    store = Store(tmp_path / "state")
    ranges = AddressRanges(IPv4Network("10.0.0.0/28"), IPv6Network("fd00::/62"))
    taken = []
    for number in range(5):
        taken.append(ranges.take(store, "ipv4"))
        store.put("primary_ip", {"id": number, "ip": taken[-1]})
    assert taken == [f"10.0.0.{host}" for host in range(10, 15)]
    with pytest.raises(LimitExceeded):
        ranges.take(store, "ipv4")
    store.delete("primary_ip", 0)
    store.delete("primary_ip", 1)
    assert [ranges.take(store, "ipv4"), ranges.take(store, "ipv4")] == ["10.0.0.10", "10.0.0.11"]
    assert [ranges.take(store, "ipv6") for _ in range(4)] == [
        "fd00:0:0:1::/64",
        "fd00:0:0:2::/64",
        "fd00:0:0:3::/64",
        "fd00:0:0:1::/64",
    ]
    store.close()
