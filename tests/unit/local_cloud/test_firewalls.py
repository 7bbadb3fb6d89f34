"""Firewalls: their rules, what they are applied to, and what the machines are told."""

from collections.abc import Callable
from typing import Any

import pytest

from scripts.local_cloud.api.project import Limits
from scripts.local_cloud.machine_interface import FirewallRule, MachineFailed
from tests.unit.local_cloud.conftest import Cloud, wait_until

SSH = {"direction": "in", "protocol": "tcp", "port": "22", "source_ips": ["0.0.0.0/0", "::/0"]}
SSH_RULE = FirewallRule("in", "tcp", ("0.0.0.0/0", "::/0"), (22, 22))
PING = {"direction": "in", "protocol": "icmp", "source_ips": ["10.0.0.0/8"]}
PING_RULE = FirewallRule("in", "icmp", ("10.0.0.0/8",), None)


def _make(cloud: Cloud, name: str = "wall", **values: Any) -> int:
    answer = cloud.post("/firewalls", {"name": name, **values})
    assert all(each["status"] == "success" for each in cloud.wait(*answer["actions"]))
    return int(answer["firewall"]["id"])


def _server(server_id: int) -> dict[str, Any]:
    return {"type": "server", "server": {"id": server_id}}


def _selector(selector: str) -> dict[str, Any]:
    return {"type": "label_selector", "label_selector": {"selector": selector}}


def _do(cloud: Cloud, firewall_id: int, name: str, **body: Any) -> list[dict[str, Any]]:
    actions = cloud.wait(*cloud.post(f"/firewalls/{firewall_id}/actions/{name}", body)["actions"])
    assert all(each["status"] == "success" for each in actions), actions
    return actions


def _apply(cloud: Cloud, firewall_id: int, *targets: dict[str, Any]) -> list[dict[str, Any]]:
    return _do(cloud, firewall_id, "apply_to_resources", apply_to=list(targets))


def _remove(cloud: Cloud, firewall_id: int, *targets: dict[str, Any]) -> list[dict[str, Any]]:
    return _do(cloud, firewall_id, "remove_from_resources", remove_from=list(targets))


def _show(cloud: Cloud, firewall_id: int) -> dict[str, Any]:
    return dict(cloud.get(f"/firewalls/{firewall_id}")["firewall"])


def _of_server(cloud: Cloud, server_id: int) -> list[dict[str, Any]]:
    return list(cloud.get(f"/servers/{server_id}")["server"]["public_net"]["firewalls"])


def test_one_is_made_changed_listed_and_deleted(cloud: Cloud) -> None:
    """Names are unique; rules are shown whole."""
    first, second = _make(cloud, rules=[SSH], labels={"a": "b"}), _make(cloud, "other")
    full = {**SSH, "destination_ips": [], "description": None}
    assert _show(cloud, first)["rules"] == [full]
    assert _show(cloud, second)["rules"] == _show(cloud, second)["applied_to"] == []
    assert cloud.refuse("POST", "/firewalls", {"name": "wall"}) == (409, "uniqueness_error")
    assert cloud.refuse("PUT", f"/firewalls/{second}", {"name": "wall"}) == (409, "uniqueness_error")
    changed = cloud.call("PUT", f"/v1/firewalls/{first}", {"name": "new"}).json["firewall"]
    assert (changed["name"], changed["labels"], changed["rules"]) == ("new", {"a": "b"}, [full])
    assert [each["id"] for each in cloud.get("/firewalls", name="new")["firewalls"]] == [first]
    assert [each["id"] for each in cloud.get("/firewalls", label_selector="!a")["firewalls"]] == [second]
    assert cloud.call("DELETE", f"/v1/firewalls/{first}").status_code == 204
    assert cloud.refuse("GET", f"/firewalls/{first}") == (404, "not_found")


@pytest.mark.parametrize(
    "rule",
    [
        "ssh",
        {**SSH, "direction": "up"},
        {**SSH, "direction": None},
        {**SSH, "protocol": "sctp"},
        {**SSH, "port": None},
        {**SSH, "port": 22},
        {**SSH, "port": "0"},
        {**SSH, "port": "65536"},
        {**SSH, "port": "85-80"},
        {**SSH, "port": "80:85"},
        {**SSH, "port": "022"},
        {**PING, "port": "80"},
        {**SSH, "source_ips": []},
        {**SSH, "source_ips": None},
        {**SSH, "source_ips": ["10.0.0.1"]},
        {**SSH, "source_ips": ["10.0.0.1/8"]},
        {**SSH, "source_ips": ["10.0.0.0/255.0.0.0"]},
        {**SSH, "source_ips": ["10.0.0.0/33"]},
        {**SSH, "source_ips": [1]},
        {**SSH, "source_ips": ["10.0.0.1/32"] * 101},
        {**SSH, "destination_ips": ["10.0.0.1/32"]},
        {**SSH, "direction": "out"},
        {**SSH, "description": "x" * 256},
    ],
)
def test_rules_that_break_a_rule_are_refused(cloud: Cloud, rule: Any) -> None:
    """At creation and later; the field is told."""
    assert cloud.refuse("POST", "/firewalls", {"name": "wall", "rules": [rule]}) == (422, "invalid_input")
    firewall_id = _make(cloud)
    result = cloud.call("POST", f"/v1/firewalls/{firewall_id}/actions/set_rules", {"rules": [SSH, rule]})
    assert result.json["error"]["details"]["fields"][0]["name"] == "rules"


def test_there_are_limits(start_cloud: Callable[..., Cloud]) -> None:
    """50 rules, 500 of them in effect, 128 characters of name, and as many firewalls as the project may have."""
    cloud = start_cloud(limits=Limits(firewalls=1))
    wide = {**SSH, "source_ips": [f"10.0.0.{host}/32" for host in range(99)]}
    for body in ({"name": "n", "rules": [SSH] * 51}, {"name": "n", "rules": [wide] * 6}, {"name": "n" * 129}):
        assert cloud.refuse("POST", "/firewalls", body) == (422, "invalid_input")
    _make(cloud, rules=[SSH] * 50)
    assert cloud.refuse("POST", "/firewalls", {"name": "n"}) == (403, "resource_limit_exceeded")


def test_machines_are_told_the_rules_in_effect(cloud: Cloud) -> None:
    """All forms of ports and directions; the rules of several firewalls together; none of them at the end."""
    out = {"direction": "out", "protocol": "udp", "port": "any", "destination_ips": ["2001:DB8:0::/48"]}
    web = {"direction": "in", "protocol": "tcp", "port": "80-85", "source_ips": ["192.0.2.1/32"]}
    server_id = cloud.make_server()
    first, second = _make(cloud, rules=[SSH]), _make(cloud, "second", rules=[web, out])
    assert cloud.machines.filters == {}
    actions = _apply(cloud, first, _server(server_id))
    assert [each["command"] for each in actions] == ["apply_firewall"]
    assert actions[0]["resources"] == [{"id": server_id, "type": "server"}, {"id": first, "type": "firewall"}]
    assert cloud.machines.filters[server_id] == (SSH_RULE,)
    _apply(cloud, second, _server(server_id))
    assert cloud.machines.filters[server_id] == (
        SSH_RULE,
        FirewallRule("in", "tcp", ("192.0.2.1/32",), (80, 85)),
        FirewallRule("out", "udp", ("2001:db8::/48",), (1, 65535)),
    )
    assert _of_server(cloud, server_id) == [{"id": each, "status": "applied"} for each in (first, second)]
    actions = _do(cloud, first, "set_rules", rules=None)
    assert [each["command"] for each in actions] == ["set_firewall_rules", "apply_firewall"]
    _remove(cloud, second, _server(server_id))
    assert cloud.machines.filters[server_id] == ()
    assert [each["command"] for each in _remove(cloud, first, _server(server_id))] == ["remove_firewall"]
    assert cloud.machines.filters[server_id] is None
    assert _of_server(cloud, server_id) == []
    assert cloud.get(f"/firewalls/{first}/actions", status="error")["actions"] == []
    assert len(cloud.get("/firewalls/actions")["actions"]) == 8


def test_one_in_use_cannot_be_deleted(cloud: Cloud) -> None:
    """Nor while its removal is under way; a server that goes does not use it any more."""
    server_id, firewall_id = cloud.make_server(), _make(cloud)
    _apply(cloud, firewall_id, _server(server_id), _selector("role=web"))
    in_use = (422, "resource_in_use")
    assert cloud.refuse("DELETE", f"/firewalls/{firewall_id}") == in_use
    cloud.wait(cloud.call("DELETE", f"/v1/servers/{server_id}").json["action"])
    assert _show(cloud, firewall_id)["applied_to"] == [{**_selector("role=web"), "applied_to_resources": []}]
    assert cloud.refuse("DELETE", f"/firewalls/{firewall_id}") == in_use
    other = cloud.make_server("other", labels={"role": "web"})
    cloud.machines.delays_s["set_firewall"] = 0.2
    body = {"remove_from": [_selector("role=web")]}
    actions = cloud.post(f"/firewalls/{firewall_id}/actions/remove_from_resources", body)["actions"]
    assert cloud.refuse("DELETE", f"/firewalls/{firewall_id}") == in_use
    cloud.wait(*actions)
    assert cloud.machines.filters[other] is None
    assert cloud.call("DELETE", f"/v1/firewalls/{firewall_id}").status_code == 204


def test_what_cannot_be_applied_is_refused(cloud: Cloud) -> None:
    """With the codes of the API; a removal of what is not applied is an action that does nothing."""
    server_id, firewall_id = cloud.make_server(labels={"role": "web"}), _make(cloud)
    apply_to, root = _server(server_id), f"/firewalls/{firewall_id}/actions"
    for bad in ({}, {"type": "server"}, {"type": "network"}, _selector(""), _selector("a in"), "x", _server(0)):
        assert cloud.refuse("POST", f"{root}/apply_to_resources", {"apply_to": [bad]}) == (422, "invalid_input")
    assert cloud.refuse("POST", f"{root}/apply_to_resources", {}) == (422, "invalid_input")
    missing, twice = {"apply_to": [_server(1)]}, {"apply_to": [apply_to, apply_to]}
    assert cloud.refuse("POST", f"{root}/apply_to_resources", missing) == (404, "firewall_resource_not_found")
    assert cloud.refuse("POST", f"{root}/apply_to_resources", twice) == (422, "server_already_added")
    assert cloud.refuse("POST", "/firewalls", {"name": "n", **missing}) == (422, "firewall_resource_not_found")
    assert cloud.refuse("POST", "/firewalls", {"name": "n", **twice}) == (422, "server_already_added")
    assert [each["command"] for each in _remove(cloud, firewall_id, apply_to)] == ["remove_firewall"]
    _apply(cloud, firewall_id, _selector("role=web"))
    again = {"apply_to": [_selector("role=web")]}
    assert cloud.refuse("POST", f"{root}/apply_to_resources", again) == (422, "firewall_already_applied")
    managed = (422, "firewall_managed_by_label_selector")
    assert cloud.refuse("POST", f"{root}/remove_from_resources", {"remove_from": [apply_to]}) == managed
    _apply(cloud, firewall_id, apply_to)
    again = {"apply_to": [apply_to]}
    assert cloud.refuse("POST", f"{root}/apply_to_resources", again) == (422, "firewall_already_applied")
    gone = {"remove_from": [_server(1)]}
    assert cloud.refuse("POST", f"{root}/remove_from_resources", gone) == (404, "firewall_resource_not_found")
    assert len(cloud.get("/firewalls")["firewalls"]) == 1


def test_selectors_follow_the_labels_of_servers(cloud: Cloud) -> None:
    """Of those that are there, of those that come later, and of those whose labels change."""
    first = cloud.make_server("a", labels={"role": "web"})
    firewall_id = _make(cloud, rules=[SSH], apply_to=[_selector("role=web")])
    assert cloud.machines.filters == {first: (SSH_RULE,)}
    second, third = cloud.make_server("b", labels={"role": "web"}), cloud.make_server("c")
    assert cloud.machines.filters == {first: (SSH_RULE,), second: (SSH_RULE,)}
    cloud.call("PUT", f"/v1/servers/{third}", {"labels": {"role": "web"}})
    cloud.call("PUT", f"/v1/servers/{first}", {"labels": {}})
    wait_until(lambda: cloud.machines.filters == {first: None, second: (SSH_RULE,), third: (SSH_RULE,)})
    cloud.wait(*cloud.get(f"/firewalls/{firewall_id}/actions")["actions"])
    chosen = [_server(second), _server(third)]
    assert _show(cloud, firewall_id)["applied_to"] == [{**_selector("role=web"), "applied_to_resources": chosen}]
    assert _of_server(cloud, third) == [{"id": firewall_id, "status": "applied"}]
    _apply(cloud, firewall_id, _server(third))
    assert _show(cloud, firewall_id)["applied_to"] == [
        _server(third),
        {**_selector("role=web"), "applied_to_resources": [_server(second)]},
    ]
    _do(cloud, firewall_id, "set_rules", rules=[PING])
    assert cloud.machines.filters == {first: None, second: (PING_RULE,), third: (PING_RULE,)}
    actions = _remove(cloud, firewall_id, _selector("role=web"))
    assert [each["resources"][0] for each in actions] == [
        {"id": firewall_id, "type": "firewall"},
        {"id": second, "type": "server"},
    ]
    assert cloud.machines.filters == {first: None, second: None, third: (PING_RULE,)}


def test_a_server_is_made_behind_firewalls(cloud: Cloud) -> None:
    """They hold before it starts, and after a rebuild; five are the most."""
    ids = [_make(cloud, f"wall{number}") for number in range(6)]
    server_id = cloud.make_server(firewalls=[{"firewall": ids[0]}])
    assert cloud.machines.filters == {server_id: ()}
    asked = [method for method, subject in cloud.machines.asked if subject == server_id]
    assert asked.index("set_firewall") < asked.index("start")
    assert _show(cloud, ids[0])["applied_to"] == [_server(server_id)]
    cloud.succeed(f"/servers/{server_id}/actions/rebuild", {"image": "debian-13"})
    assert cloud.machines.filters == {server_id: ()}
    for firewall_id in ids[1:5]:
        _apply(cloud, firewall_id, _server(server_id))
    body = {"apply_to": [_server(server_id)]}
    refused = cloud.refuse("POST", f"/firewalls/{ids[5]}/actions/apply_to_resources", body)
    assert refused == (403, "resource_limit_exceeded")
    server = {"name": "n", "server_type": "cx23", "image": "debian-13"}
    for firewalls, refused in (
        ([{"firewall": each} for each in ids], (403, "resource_limit_exceeded")),
        ([{"firewall": 1}], (422, "invalid_input")),
        ([ids[0]], (422, "invalid_input")),
    ):
        assert cloud.refuse("POST", "/servers", {**server, "firewalls": firewalls}) == refused
    assert len(cloud.get("/servers")["servers"]) == 1


def test_what_machines_refuse_does_not_stand_on_record(cloud: Cloud) -> None:
    """A firewall that could not be applied is not; one that could not be removed still is."""
    server_id, firewall_id = cloud.make_server(), _make(cloud)
    root = f"/firewalls/{firewall_id}/actions"
    cloud.machines.failing["set_firewall"] = MachineFailed("no")
    actions = cloud.post(f"{root}/apply_to_resources", {"apply_to": [_server(server_id)]})["actions"]
    assert cloud.wait(*actions)[0]["status"] == "error"
    wait_until(lambda: not _of_server(cloud, server_id))
    cloud.machines.failing.clear()
    _apply(cloud, firewall_id, _server(server_id))
    cloud.machines.failing["set_firewall"] = MachineFailed("no")
    actions = cloud.post(f"{root}/remove_from_resources", {"remove_from": [_server(server_id)]})["actions"]
    assert cloud.wait(*actions)[0]["status"] == "error"
    assert _of_server(cloud, server_id) == [{"id": firewall_id, "status": "applied"}]
    cloud.succeed(f"/servers/{server_id}/actions/poweroff")
    action = cloud.post(f"/servers/{server_id}/actions/poweron")["action"]
    assert cloud.wait(action)[0]["status"] == "error"
    assert server_id not in cloud.machines.running


def test_a_start_sets_them_anew_before_servers_start(cloud: Cloud) -> None:
    """Also what a kill cut short; a server that is off has them when it starts."""
    server_id = cloud.make_server(labels={"role": "web"})
    _make(cloud, rules=[SSH], apply_to=[_selector("role=web")])
    cloud.stop()
    cloud.machines.running.clear()
    cloud.machines.filters.clear()
    cloud.machines.asked.clear()
    again = cloud.start_again()
    wait_until(lambda: again.status(server_id) == "running")
    assert cloud.machines.filters == {server_id: (SSH_RULE,)}
    asked = [method for method, _ in cloud.machines.asked]
    assert asked.index("set_firewall") < asked.index("start")
    assert _of_server(again, server_id)[0]["status"] == "applied"
    again.stop()


def test_a_selector_that_chooses_nothing_has_an_action_all_the_same(cloud: Cloud) -> None:
    """Old clients ask for all actions if they get none, which is refused."""
    firewall_id = _make(cloud)
    assert [each["command"] for each in _apply(cloud, firewall_id, _selector("a"))] == ["apply_firewall"]
    assert [each["command"] for each in _remove(cloud, firewall_id, _selector("a"))] == ["remove_firewall"]
    assert cloud.call("DELETE", f"/v1/firewalls/{firewall_id}").status_code == 204


def test_the_state_of_an_application_is_shown(cloud: Cloud) -> None:
    """Pending until the machine was told; removed no sooner either."""
    server_id, firewall_id = cloud.make_server(), _make(cloud)
    cloud.machines.delays_s["set_firewall"] = 0.2
    root, target = f"/firewalls/{firewall_id}/actions", _server(server_id)
    actions = cloud.post(f"{root}/apply_to_resources", {"apply_to": [target]})["actions"]
    assert _of_server(cloud, server_id) == [{"id": firewall_id, "status": "pending"}]
    cloud.wait(*actions)
    assert _of_server(cloud, server_id) == [{"id": firewall_id, "status": "applied"}]


def test_a_server_without_a_public_address_can_have_none(cloud: Cloud) -> None:
    """There is nothing to filter."""
    server_id, firewall_id = cloud.make_server(start_after_create=False), _make(cloud)
    for address in cloud.get("/primary_ips")["primary_ips"]:
        cloud.succeed(f"/primary_ips/{address['id']}/actions/unassign")
    body = {"apply_to": [_server(server_id)]}
    refused = cloud.refuse("POST", f"/firewalls/{firewall_id}/actions/apply_to_resources", body)
    assert refused == (422, "private_net_only_server")


def test_rules_whose_action_fails_are_not_kept(cloud: Cloud) -> None:
    """A fault of the plan brings the old ones back."""
    server_id = cloud.make_server()
    firewall_id = _make(cloud, rules=[SSH], apply_to=[_server(server_id)])
    fault = {"path": "/v1/firewalls/**", "kind": "action_failed", "command": "set_firewall_rules"}
    assert cloud.call("PUT", "/_local/faults", {"faults": [fault]}).status_code == 200
    actions = cloud.wait(*cloud.post(f"/firewalls/{firewall_id}/actions/set_rules", {"rules": [PING]})["actions"])
    assert actions[0]["status"] == "error"
    wait_until(lambda: cloud.machines.filters[server_id] == (SSH_RULE,))
    assert _show(cloud, firewall_id)["rules"][0]["port"] == "22"
