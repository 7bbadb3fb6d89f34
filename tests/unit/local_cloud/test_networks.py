"""Private networks: ranges, subnets, routes, who is attached where, and what the machines are told."""

from collections.abc import Callable
from typing import Any

import pytest

from scripts.local_cloud.api.project import Limits
from scripts.local_cloud.machine_interface import MachineFailed
from tests.unit.local_cloud.conftest import Cloud, wait_until

Document = dict[str, Any]

SUBNET = {"type": "cloud", "network_zone": "eu-central", "ip_range": "10.0.1.0/24"}


def make_network(cloud: Cloud, name: str = "inner", ip_range: str = "10.0.0.0/16", **values: Any) -> int:
    """The id of a network, with one subnet unless told otherwise."""
    body = {"name": name, "ip_range": ip_range, "subnets": [SUBNET], **values}
    return int(cloud.post("/networks", body)["network"]["id"])


def show(cloud: Cloud, network_id: int) -> Document:
    return dict(cloud.get(f"/networks/{network_id}")["network"])


def private_net(cloud: Cloud, server_id: int) -> list[Document]:
    return list(cloud.get(f"/servers/{server_id}")["server"]["private_net"])


def test_the_document(cloud: Cloud) -> None:
    """All fields of the real API; the gateway is the first address of the whole network."""
    network_id = make_network(cloud, labels={"a": "b"}, routes=[{"destination": "10.9.0.0/24", "gateway": "10.0.1.7"}])
    document = show(cloud, network_id)
    created = document.pop("created")
    assert created.startswith("20")
    assert document == {
        "id": network_id,
        "name": "inner",
        "ip_range": "10.0.0.0/16",
        "subnets": [{**SUBNET, "gateway": "10.0.0.1", "vswitch_id": None}],
        "routes": [{"destination": "10.9.0.0/24", "gateway": "10.0.1.7"}],
        "servers": [],
        "load_balancers": [],
        "protection": {"delete": False},
        "labels": {"a": "b"},
        "expose_routes_to_vswitch": False,
    }
    assert cloud.get("/networks", label_selector="a=b")["networks"][0]["id"] == network_id
    assert cloud.get("/networks", name="other")["networks"] == []


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"ip_range": "8.8.8.0/24"}, "ip_range"),
        ({"ip_range": "10.0.0.0/25"}, "ip_range"),
        ({"ip_range": "10.0.0.1/16"}, "ip_range"),
        ({"ip_range": None}, "ip_range"),
        ({"name": ""}, "name"),
        ({"subnets": [{**SUBNET, "ip_range": "10.1.0.0/24"}]}, "subnets"),
        ({"subnets": [{**SUBNET, "ip_range": "10.0.0.0/31"}]}, "subnets"),
        ({"subnets": [{**SUBNET, "network_zone": "moon"}]}, "subnets"),
        ({"subnets": [SUBNET, SUBNET]}, "subnets"),
        ({"subnets": [7]}, "subnets"),
        ({"routes": [{"destination": "10.0.1.0/28", "gateway": "10.0.1.7"}]}, "routes"),
        ({"routes": [{"destination": "8.8.8.0/24", "gateway": "10.0.1.7"}]}, "routes"),
        ({"routes": [{"destination": "10.9.0.0/24", "gateway": "10.0.0.1"}]}, "routes"),
        ({"routes": [{"destination": "172.16.0.0/12", "gateway": "10.0.1.7"}]}, "routes"),
        ({"routes": [{"destination": "10.9.0.0/24"}]}, "routes"),
    ],
)
def test_what_is_no_network_is_refused(cloud: Cloud, values: Document, field: str) -> None:
    """422 with the field's name, and nothing is made."""
    body = {"name": "inner", "ip_range": "10.0.0.0/16", "subnets": [SUBNET], **values}
    result = cloud.call("POST", "/v1/networks", body)
    assert (result.status_code, result.json["error"]["code"]) == (422, "invalid_input")
    assert [each["name"] for each in result.json["error"]["details"]["fields"]] == [field]
    assert cloud.get("/networks")["networks"] == []


def test_vswitches_are_said_to_be_absent(cloud: Cloud) -> None:
    """Neither a subnet of one nor routes to one."""
    vswitch = {"type": "vswitch", "network_zone": "eu-central", "vswitch_id": 7}
    body = {"name": "inner", "ip_range": "10.0.0.0/16"}
    assert cloud.refuse("POST", "/networks", {**body, "subnets": [vswitch]}) == (422, "unsupported_error")
    assert cloud.refuse("POST", "/networks", {**body, "expose_routes_to_vswitch": True}) == (422, "unsupported_error")


def test_names_labels_and_limits(start_cloud: Callable[..., Cloud]) -> None:
    """A name is there once; a project has only so many."""
    cloud = start_cloud(limits=Limits(networks=2))
    first, second = make_network(cloud, "a"), make_network(cloud, "b")
    assert cloud.refuse("POST", "/networks", {"name": "a", "ip_range": "10.0.0.0/16"}) == (409, "uniqueness_error")
    assert cloud.refuse("PUT", f"/networks/{second}", {"name": "a"}) == (409, "uniqueness_error")
    limit = cloud.refuse("POST", "/networks", {"name": "c", "ip_range": "10.0.0.0/16"})
    assert limit == (403, "resource_limit_exceeded")
    changed = cloud.call("PUT", f"/v1/networks/{first}", {"name": "z", "labels": {"x": "y"}}).json["network"]
    assert (changed["name"], changed["labels"]) == ("z", {"x": "y"})


def test_subnets_come_and_go(cloud: Cloud) -> None:
    """One without a range gets the first free /24; one in use stays; one that is not there is not found."""
    network_id = make_network(cloud)
    path = f"/networks/{network_id}/actions"
    cloud.succeed(f"{path}/add_subnet", {"type": "server", "network_zone": "eu-central"})
    cloud.succeed(f"{path}/add_subnet", {"type": "cloud", "network_zone": "us-east"})
    ranges = [each["ip_range"] for each in show(cloud, network_id)["subnets"]]
    assert ranges == ["10.0.1.0/24", "10.0.0.0/24", "10.0.2.0/24"]
    assert cloud.refuse("POST", f"{path}/add_subnet", SUBNET) == (422, "invalid_input")
    cloud.make_server(networks=[network_id])
    assert cloud.refuse("POST", f"{path}/delete_subnet", {"ip_range": "10.0.1.0/24"}) == (422, "service_error")
    assert cloud.refuse("POST", f"{path}/delete_subnet", {"ip_range": "10.0.7.0/24"}) == (404, "not_found")
    action = cloud.succeed(f"{path}/delete_subnet", {"ip_range": "10.0.2.0/24"})
    assert (action["command"], action["resources"]) == ("delete_subnet", [{"id": network_id, "type": "network"}])
    assert len(show(cloud, network_id)["subnets"]) == 2
    assert cloud.get(f"{path}/{action['id']}")["action"] == action
    assert cloud.get("/networks/actions", sort="id:desc")["actions"][0]["id"] == action["id"]


def test_routes_and_range_reach_the_members(cloud: Cloud) -> None:
    """The machines are told anew; a range only grows, from where it began."""
    network_id = make_network(cloud)
    server_id = cloud.make_server(networks=[network_id])
    path, route = f"/networks/{network_id}/actions", {"destination": "0.0.0.0/0", "gateway": "10.0.1.1"}
    cloud.succeed(f"{path}/add_route", route)
    assert cloud.machines.private[server_id][0].routes == (("0.0.0.0/0", "10.0.1.1"),)
    assert cloud.refuse("POST", f"{path}/add_route", route) == (422, "invalid_input")
    cloud.succeed(f"{path}/add_route", {"destination": "10.9.0.0/16", "gateway": "10.0.1.9"})
    cloud.succeed(f"{path}/delete_route", route)
    assert show(cloud, network_id)["routes"] == [{"destination": "10.9.0.0/16", "gateway": "10.0.1.9"}]
    assert cloud.refuse("POST", f"{path}/delete_route", route) == (404, "not_found")
    for smaller in ("10.0.0.0/17", "10.1.0.0/16", "nonsense"):
        assert cloud.refuse("POST", f"{path}/change_ip_range", {"ip_range": smaller}) == (422, "invalid_input")
    cloud.succeed(f"{path}/change_ip_range", {"ip_range": "10.0.0.0/15"})
    assert cloud.machines.private[server_id][0].ip_range == "10.0.0.0/15"


def test_a_server_is_attached_from_the_start(cloud: Cloud) -> None:
    """It has its address before it boots, and both documents show it."""
    network_id = make_network(cloud)
    answer = cloud.post(
        "/servers", {"name": "web", "server_type": "cx23", "image": "debian-13", "networks": [network_id]}
    )
    assert [each["command"] for each in answer["next_actions"]] == ["attach_to_network", "start_server"]
    cloud.wait(answer["action"], *answer["next_actions"])
    server_id = answer["server"]["id"]
    [shown] = private_net(cloud, server_id)
    assert (shown["network"], shown["ip"], shown["alias_ips"]) == (network_id, "10.0.1.1", [])
    assert shown["mac_address"].startswith("86:00:")
    assert show(cloud, network_id)["servers"] == [server_id]
    [link] = cloud.machines.private[server_id]
    assert (link.ip, link.gateway, link.ip_range, link.subnet) == ("10.0.1.1", "10.0.0.1", "10.0.0.0/16", "10.0.1.0/24")
    asked = [method for method, subject in cloud.machines.asked if subject == server_id]
    assert asked.index("set_private_links") < asked.index("start")


def test_a_server_needs_a_public_address_or_a_network(cloud: Cloud) -> None:
    """Without both it could not be reached by anybody."""
    public_net = {"enable_ipv4": False, "enable_ipv6": False}
    body = {"name": "web", "server_type": "cx23", "image": "debian-13", "public_net": public_net}
    assert cloud.refuse("POST", "/servers", body) == (422, "invalid_input")
    assert cloud.refuse("POST", "/servers", {**body, "networks": [7]}) == (422, "invalid_input")
    server_id = cloud.make_server(public_net=public_net, networks=[make_network(cloud)])
    assert private_net(cloud, server_id)[0]["ip"] == "10.0.1.1"


def test_attach_detach_and_aliases(cloud: Cloud) -> None:
    """Live: the machine is told each time; aliases replace those before."""
    network_id, server_id = make_network(cloud), cloud.make_server()
    path = f"/servers/{server_id}/actions"
    body = {"network": network_id, "ip": "10.0.1.5", "alias_ips": ["10.0.1.6"]}
    action = cloud.succeed(f"{path}/attach_to_network", body)
    assert action["resources"] == [{"id": server_id, "type": "server"}, {"id": network_id, "type": "network"}]
    assert private_net(cloud, server_id)[0]["alias_ips"] == ["10.0.1.6"]
    assert cloud.refuse("POST", f"{path}/attach_to_network", body) == (422, "server_already_attached")
    cloud.succeed(f"{path}/change_alias_ips", {"network": network_id, "alias_ips": ["10.0.1.6", "10.0.1.7"]})
    assert cloud.machines.private[server_id][0].alias_ips == ("10.0.1.6", "10.0.1.7")
    for taken in ("10.0.1.5", "10.0.0.1", "10.0.9.1"):
        wanted = {"network": network_id, "alias_ips": [taken]}
        assert cloud.refuse("POST", f"{path}/change_alias_ips", wanted) == (422, "ip_not_available")
    cloud.succeed(f"{path}/detach_from_network", {"network": network_id})
    assert (private_net(cloud, server_id), cloud.machines.private[server_id]) == ([], ())
    assert cloud.refuse("POST", f"{path}/detach_from_network", {"network": network_id}) == (422, "service_error")


@pytest.mark.parametrize(
    ("values", "code"),
    [
        ({"ip": "10.0.1.1"}, "ip_not_available"),
        ({"ip": "10.0.1.0"}, "ip_not_available"),
        ({"ip": "10.0.1.255"}, "ip_not_available"),
        ({"ip": "10.0.0.1"}, "ip_not_available"),
        ({"ip": "10.0.1.9", "alias_ips": ["10.0.1.9"]}, "ip_not_available"),
        ({"ip": "10.0.1.9", "ip_range": "10.0.2.0/24"}, "invalid_input"),
        ({"ip": "nonsense"}, "invalid_input"),
        ({"alias_ips": ["nonsense"]}, "invalid_input"),
        ({"alias_ips": [f"10.0.1.{number}" for number in range(10, 16)]}, "invalid_input"),
        ({"network": 7}, "invalid_input"),
        ({"network": None}, "invalid_input"),
    ],
)
def test_what_cannot_be_attached_is_refused(cloud: Cloud, values: Document, code: str) -> None:
    """Addresses that are taken or reserved, and what is no address."""
    network_id = make_network(cloud)
    cloud.make_server("first", networks=[network_id])
    server_id = cloud.make_server("second")
    path = f"/servers/{server_id}/actions/attach_to_network"
    assert cloud.refuse("POST", path, {"network": network_id, **values}) == (422, code)
    assert private_net(cloud, server_id) == []


def test_networks_without_room_and_overlapping_ones(cloud: Cloud) -> None:
    """No subnet, none in the server's zone, a full one; and two networks of one server that overlap."""
    server_id = cloud.make_server()
    path = f"/servers/{server_id}/actions/attach_to_network"
    bare = make_network(cloud, "bare", subnets=[])
    far = make_network(cloud, "far", subnets=[{**SUBNET, "network_zone": "us-east"}])
    small = make_network(cloud, "small", subnets=[{**SUBNET, "ip_range": "10.0.0.0/30"}])
    for network_id in (bare, far):
        assert cloud.refuse("POST", path, {"network": network_id}) == (422, "no_subnet_available")
    cloud.make_server("other", networks=[small])
    assert cloud.refuse("POST", path, {"network": small}) == (422, "no_subnet_available")
    cloud.succeed(path, {"network": make_network(cloud)})
    assert cloud.refuse("POST", path, {"network": make_network(cloud, "same")}) == (422, "networks_overlap")


def test_a_chosen_subnet(cloud: Cloud) -> None:
    """ip_range chooses the subnet that the address comes from."""
    second = {**SUBNET, "ip_range": "10.0.2.0/24"}
    network_id, server_id = make_network(cloud, subnets=[SUBNET, second]), cloud.make_server()
    path = f"/servers/{server_id}/actions/attach_to_network"
    cloud.succeed(path, {"network": network_id, "ip_range": "10.0.2.0/24"})
    assert private_net(cloud, server_id)[0]["ip"] == "10.0.2.1"


def test_a_deleted_network_lets_its_servers_go(cloud: Cloud) -> None:
    """They are detached by that, unless the network is protected."""
    network_id = make_network(cloud)
    server_id = cloud.make_server(networks=[network_id])
    cloud.succeed(f"/networks/{network_id}/actions/change_protection", {"delete": True})
    assert cloud.refuse("DELETE", f"/networks/{network_id}") == (423, "protected")
    cloud.succeed(f"/networks/{network_id}/actions/change_protection", {"delete": False})
    assert cloud.call("DELETE", f"/v1/networks/{network_id}").status_code == 204
    assert private_net(cloud, server_id) == []
    wait_until(lambda: cloud.machines.private[server_id] == ())
    assert cloud.refuse("GET", f"/networks/{network_id}") == (404, "not_found")


def test_a_network_that_is_being_changed(cloud: Cloud) -> None:
    """409 conflict for all that would change it too."""
    network_id = make_network(cloud)
    server_id, other = cloud.make_server("a", networks=[network_id]), cloud.make_server("b")
    cloud.machines.delays_s["set_private_links"] = 0.3
    path = f"/networks/{network_id}/actions"
    first = cloud.post(f"{path}/add_route", {"destination": "10.9.0.0/16", "gateway": "10.0.1.9"})["action"]
    assert cloud.refuse("POST", f"{path}/add_subnet", {**SUBNET, "ip_range": "10.0.2.0/24"}) == (409, "conflict")
    attach = f"/servers/{other}/actions/attach_to_network"
    assert cloud.refuse("POST", attach, {"network": network_id}) == (409, "conflict")
    assert cloud.refuse("PUT", f"/networks/{network_id}", {"name": "new"}) == (409, "conflict")
    assert cloud.refuse("DELETE", f"/networks/{network_id}") == (409, "conflict")
    cloud.wait(first)
    second = cloud.post(f"/servers/{server_id}/actions/detach_from_network", {"network": network_id})["action"]
    poweroff = cloud.refuse("POST", f"/servers/{server_id}/actions/poweroff")
    assert poweroff == (423, "locked")
    cloud.wait(second)


def test_what_machines_refuse_is_undone(cloud: Cloud) -> None:
    """An attachment that failed is none; a detachment that failed leaves the server where it was."""
    network_id, server_id = make_network(cloud), cloud.make_server()
    path = f"/servers/{server_id}/actions"
    cloud.machines.failing["set_private_links"] = MachineFailed("no")
    action = cloud.wait(cloud.post(f"{path}/attach_to_network", {"network": network_id})["action"])[0]
    assert (action["status"], private_net(cloud, server_id)) == ("error", [])
    cloud.machines.failing.clear()
    cloud.succeed(f"{path}/attach_to_network", {"network": network_id, "alias_ips": ["10.0.1.9"]})
    cloud.machines.failing["set_private_links"] = MachineFailed("no")
    changes: dict[str, dict[str, Any]] = {"detach_from_network": {}, "change_alias_ips": {"alias_ips": []}}
    for name, values in changes.items():
        action = cloud.wait(cloud.post(f"{path}/{name}", {"network": network_id, **values})["action"])[0]
        assert action["status"] == "error"
        assert private_net(cloud, server_id)[0]["alias_ips"] == ["10.0.1.9"]


def test_a_deleted_server_gives_its_address_back(cloud: Cloud) -> None:
    """The next one has it."""
    network_id = make_network(cloud)
    server_id = cloud.make_server(networks=[network_id])
    cloud.wait(cloud.call("DELETE", f"/v1/servers/{server_id}").json["action"])
    assert show(cloud, network_id)["servers"] == []
    assert private_net(cloud, cloud.make_server("next", networks=[network_id]))[0]["ip"] == "10.0.1.1"


def test_a_start_of_the_cloud_says_it_all_anew(cloud: Cloud) -> None:
    """Before the servers start; a server that is off hears of it when it starts."""
    network_id = make_network(cloud)
    on, off = cloud.make_server("on", networks=[network_id]), cloud.make_server("off", networks=[network_id])
    cloud.succeed(f"/servers/{off}/actions/poweroff")
    cloud.stop()
    cloud.machines.running.clear()
    cloud.machines.private.clear()
    again = cloud.start_again()
    try:
        wait_until(lambda: again.status(on) == "running")
        assert [link.ip for link in again.machines.private[on]] == ["10.0.1.1"]
        again.succeed(f"/servers/{off}/actions/poweron")
        assert [link.ip for link in again.machines.private[off]] == ["10.0.1.2"]
    finally:
        again.stop()
