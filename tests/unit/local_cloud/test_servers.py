"""The life of servers: creation, actions, locks, protection, deletion."""

import threading
from collections.abc import Callable
from typing import Any

import pytest

from scripts.local_cloud.api.project import Limits
from scripts.local_cloud.machine_interface import MachineFailed, PoolFull
from tests.unit.local_cloud.conftest import PUBLIC_KEY, Cloud, wait_until
from tests.unit.local_cloud.stub_machines import StubMachines

BODY = {"name": "web", "server_type": "cx23", "image": "debian-13"}


def test_a_server_is_made_and_started(cloud: Cloud) -> None:
    """201 with both actions; the machine gets what the request said."""
    key = cloud.post("/ssh_keys", {"name": "k", "public_key": PUBLIC_KEY})["ssh_key"]
    wanted = {"location": "hel1", "ssh_keys": ["k", key["id"]], "user_data": "#cloud-config", "labels": {"a": "b"}}
    answer = cloud.post("/servers", {**BODY, **wanted})
    assert answer["server"]["status"] == "initializing"
    assert answer["server"]["locked"] is True
    assert answer["root_password"] is None
    assert answer["action"]["command"] == "create_server"
    assert [action["command"] for action in answer["next_actions"]] == ["start_server"]
    ended = cloud.wait(answer["action"], *answer["next_actions"])
    assert [action["status"] for action in ended] == ["success", "success"]
    assert all(action["progress"] == 100 and action["finished"] for action in ended)
    server = cloud.get(f"/servers/{answer['server']['id']}")["server"]
    assert (server["status"], server["locked"], server["location"]["name"]) == ("running", False, "hel1")
    spec = cloud.machines.running[server["id"]]
    assert spec.public_keys == (PUBLIC_KEY,)
    assert (spec.name, spec.location, spec.cores, spec.memory_gb) == ("web", "hel1", 2, 4.0)
    assert (spec.user_data, spec.root_password) == ("#cloud-config", None)
    assert spec.ipv4 == server["public_net"]["ipv4"]["ip"] == "198.18.0.10"
    assert spec.ipv6_network == server["public_net"]["ipv6"]["ip"] == "fd00:198:18:1::/64"


def test_without_keys_there_is_a_password(cloud: Cloud) -> None:
    """It is told once and reaches the machine."""
    answer = cloud.post("/servers", BODY)
    cloud.wait(answer["action"], *answer["next_actions"])
    assert cloud.machines.running[answer["server"]["id"]].root_password == answer["root_password"]
    assert len(answer["root_password"]) == 20


def test_a_server_can_be_made_without_starting(cloud: Cloud) -> None:
    """No next action; it is off."""
    answer = cloud.post("/servers", {**BODY, "start_after_create": False})
    cloud.wait(answer["action"])
    assert answer["next_actions"] == []
    assert cloud.status(answer["server"]["id"]) == "off"


def test_references_are_taken_as_numbers_strings_and_names(cloud: Cloud) -> None:
    """Go clients send ids as numbers."""
    cloud.make_server("a", server_type=114, image=302, location="1")
    cloud.make_server("b", server_type="114", image="302", location="fsn1")


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"name": None}, "name"),
        ({"name": "under_score"}, "name"),
        ({"name": ""}, "name"),
        ({"name": "a" * 64}, "name"),
        ({"name": "dot."}, "name"),
        ({"server_type": "cx11"}, "server_type"),
        ({"server_type": True}, "server_type"),
        ({"image": "debian-12"}, "image"),
        ({"image": 1}, "image"),
        ({"location": "mars"}, "location"),
        ({"ssh_keys": ["nobody"]}, "ssh_keys"),
        ({"ssh_keys": "k"}, "ssh_keys"),
        ({"user_data": "x" * 32769}, "user_data"),
        ({"user_data": "ä" * 16385}, "user_data"),
        ({"labels": {"hetzner.cloud/x": "y"}}, "labels"),
        ({"labels": ["a"]}, "labels"),
        ({"start_after_create": "yes"}, "start_after_create"),
        ({"public_net": {"enable_ipv4": False, "enable_ipv6": False}}, "public_net"),
        ({"public_net": {"ipv4": 5}}, "public_net"),
        ({"public_net": {"enable_ipv4": 1}}, "public_net"),
    ],
)
def test_what_is_wrong_with_a_request_is_told_by_field(cloud: Cloud, values: dict[str, Any], field: str) -> None:
    """422 invalid_input, and nothing is made."""
    result = cloud.call("POST", "/v1/servers", {**BODY, **values})
    assert (result.status_code, result.json["error"]["code"]) == (422, "invalid_input")
    assert [each["name"] for each in result.json["error"]["details"]["fields"]] == [field]
    assert cloud.get("/servers")["servers"] == []
    assert cloud.get("/primary_ips")["primary_ips"] == []


@pytest.mark.parametrize("values", [{"volumes": [1]}])
def test_what_is_not_there_yet_is_not_ignored(cloud: Cloud, values: dict[str, Any]) -> None:
    """A server without the volume that was asked for would be a lie; empty lists ask for nothing."""
    assert cloud.refuse("POST", "/servers", {**BODY, **values}) == (422, "unsupported_error")
    cloud.make_server(networks=[], firewalls=[], volumes=[])


def test_names_are_unique_and_can_be_changed(cloud: Cloud) -> None:
    """409 for a second one, at creation and at a change; a server keeps its own name."""
    first, second = cloud.make_server("a"), cloud.make_server("b")
    assert cloud.refuse("POST", "/servers", {**BODY, "name": "a"}) == (409, "uniqueness_error")
    assert cloud.refuse("PUT", f"/servers/{second}", {"name": "a"}) == (409, "uniqueness_error")
    changed = cloud.call("PUT", f"/v1/servers/{first}", {"name": "a", "labels": {"x": "y"}}).json["server"]
    assert (changed["name"], changed["labels"]) == ("a", {"x": "y"})
    assert cloud.call("PUT", f"/v1/servers/{first}", {"name": "c"}).json["server"]["labels"] == {"x": "y"}


def test_lists_are_filtered_by_name_status_and_labels(cloud: Cloud) -> None:
    """Status can be repeated."""
    first = cloud.make_server("a", labels={"role": "web"})
    cloud.make_server("b", start_after_create=False)

    def names(**query: Any) -> list[str]:
        return [server["name"] for server in cloud.get("/servers", **query)["servers"]]

    assert names() == ["a", "b"]
    assert names(name="b") == ["b"]
    assert names(status="running") == ["a"]
    assert names(status=["running", "off"], sort="name:desc") == ["b", "a"]
    assert names(label_selector="role=web") == ["a"]
    assert cloud.refuse("GET", "/servers", status="asleep") == (422, "invalid_input")
    assert cloud.status(first) == "running"


def test_the_number_of_servers_is_limited(start_cloud: Callable[..., Cloud]) -> None:
    """403 resource_limit_exceeded names the limit."""
    cloud = start_cloud(limits=Limits(servers=1))
    cloud.make_server("a")
    result = cloud.call("POST", "/v1/servers", {**BODY, "name": "b"})
    assert (result.status_code, result.json["error"]["code"]) == (403, "resource_limit_exceeded")
    assert result.json["error"]["details"] == {"limits": [{"name": "server_limit"}]}
    assert len(cloud.get("/primary_ips")["primary_ips"]) == 2


def test_power_goes_off_and_on(cloud: Cloud) -> None:
    """Each action has the command of the real API; repeating one changes nothing."""
    server_id = cloud.make_server()
    for action, command, status in (
        ("poweroff", "stop_server", "off"),
        ("poweroff", "stop_server", "off"),
        ("poweron", "start_server", "running"),
        ("poweron", "start_server", "running"),
        ("reboot", "reboot_server", "running"),
        ("reset", "reset_server", "running"),
        ("poweroff", "stop_server", "off"),
        ("reboot", "reboot_server", "off"),
        ("shutdown", "shutdown_server", "off"),
        ("reset", "reset_server", "running"),
    ):
        assert cloud.succeed(f"/servers/{server_id}/actions/{action}")["command"] == command
        assert cloud.status(server_id) == status


def test_shutdown_only_presses_the_button(cloud: Cloud) -> None:
    """The action succeeds at once; the server is off once the guest has obeyed."""
    cloud.machines.obeys_button = False
    server_id = cloud.make_server()
    cloud.project.life.watch()
    cloud.succeed(f"/servers/{server_id}/actions/shutdown")
    assert cloud.status(server_id) == "running"
    del cloud.machines.running[server_id]
    wait_until(lambda: cloud.status(server_id) == "off")


def test_a_guest_that_goes_off_by_itself_is_noticed(cloud: Cloud) -> None:
    """``poweroff`` inside the server ends as ``off``."""
    server_id = cloud.make_server()
    cloud.project.life.watch()
    del cloud.machines.running[server_id]
    wait_until(lambda: cloud.status(server_id) == "off")


def test_while_an_action_runs_all_others_are_locked_out(start_cloud: Callable[..., Cloud]) -> None:
    """423 locked for every change of that server; others are free."""
    cloud = start_cloud(StubMachines(delays_s={"power_off": 0.3}))
    server_id, other = cloud.make_server("a"), cloud.make_server("b")
    action = cloud.post(f"/servers/{server_id}/actions/poweroff")["action"]
    server = cloud.get(f"/servers/{server_id}")["server"]
    assert (server["locked"], server["status"]) == (True, "stopping")
    for name in ("poweron", "poweroff", "shutdown", "reboot", "reset", "create_image"):
        assert cloud.refuse("POST", f"/servers/{server_id}/actions/{name}") == (423, "locked")
    rebuild = f"/servers/{server_id}/actions/rebuild"
    assert cloud.refuse("POST", rebuild, {"image": "debian-13"}) == (423, "locked")
    assert cloud.refuse("DELETE", f"/servers/{server_id}") == (423, "locked")
    assert cloud.status(server_id) == "stopping"
    cloud.succeed(f"/servers/{other}/actions/shutdown")
    cloud.wait(action)
    cloud.succeed(f"/servers/{server_id}/actions/poweron")


def test_of_many_that_ask_at_once_one_is_heard(start_cloud: Callable[..., Cloud]) -> None:
    """The others get 423; the machine is started once."""
    cloud = start_cloud(StubMachines(delays_s={"start": 0.2}))
    server_id = cloud.make_server(start_after_create=False)
    answers: list[int] = []

    def ask() -> None:
        answers.append(cloud.call("POST", f"/v1/servers/{server_id}/actions/poweron").status_code)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == [201] + [423] * 7


def test_many_servers_can_be_made_and_deleted_at_once(start_cloud: Callable[..., Cloud]) -> None:
    """Twenty of them; addresses are all different, and nothing stays."""
    cloud = start_cloud(StubMachines(delays_s={"create_disk": 0.01}))
    answers = [cloud.post("/servers", {**BODY, "name": f"s{number}"}) for number in range(20)]
    cloud.wait(*(action for each in answers for action in (each["action"], *each["next_actions"])))
    assert len({spec.ipv4 for spec in cloud.machines.running.values()}) == 20
    ids = [each["server"]["id"] for each in answers]
    cloud.wait(*(cloud.call("DELETE", f"/v1/servers/{server_id}").json["action"] for server_id in ids))
    assert (cloud.machines.running, cloud.machines.disks) == ({}, {})
    assert cloud.get("/servers")["servers"] == []
    assert cloud.get("/primary_ips")["primary_ips"] == []


def test_deletion_answers_with_an_action_that_outlives_the_server(cloud: Cloud) -> None:
    """200; the server is unknown afterwards."""
    server_id = cloud.make_server()
    result = cloud.call("DELETE", f"/v1/servers/{server_id}")
    assert (result.status_code, result.json["action"]["command"]) == (200, "delete_server")
    assert cloud.wait(result.json["action"])[0]["status"] == "success"
    assert cloud.refuse("GET", f"/servers/{server_id}") == (404, "not_found")
    assert cloud.refuse("POST", f"/servers/{server_id}/actions/poweron") == (404, "not_found")
    commands = [action["command"] for action in cloud.get(f"/servers/{server_id}/actions")["actions"]]
    assert commands == ["create_server", "start_server", "delete_server"]


def test_protected_servers_are_neither_deleted_nor_rebuilt(cloud: Cloud) -> None:
    """423 protected; both protections go together."""
    server_id = cloud.make_server()
    path = f"/servers/{server_id}/actions/change_protection"
    assert cloud.refuse("POST", path, {"delete": True}) == (422, "invalid_input")
    cloud.succeed(path, {"delete": True, "rebuild": True})
    assert cloud.refuse("DELETE", f"/servers/{server_id}") == (423, "protected")
    rebuild = f"/servers/{server_id}/actions/rebuild"
    assert cloud.refuse("POST", rebuild, {"image": "debian-13"}) == (423, "protected")
    cloud.succeed(path, {"delete": False, "rebuild": False})
    cloud.succeed(rebuild, {"image": "debian-13"})


def test_a_rebuild_replaces_disk_and_user_data_and_starts(cloud: Cloud) -> None:
    """Id, name and addresses stay; the password is a new one."""
    server_id = cloud.make_server(user_data="old")
    image_id, before = cloud.make_image(server_id), cloud.machines.running[server_id]
    cloud.succeed(f"/servers/{server_id}/actions/poweroff")
    answer = cloud.post(f"/servers/{server_id}/actions/rebuild", {"image": str(image_id), "user_data": "new"})
    assert cloud.status(server_id) in ("rebuilding", "running")
    assert cloud.wait(answer["action"])[0]["command"] == "rebuild_server"
    after = cloud.machines.running[server_id]
    assert cloud.machines.disks[server_id] == image_id
    assert (after.ipv4, after.name, after.user_data) == (before.ipv4, before.name, "new")
    assert after.root_password == answer["root_password"] != before.root_password
    assert cloud.get(f"/servers/{server_id}")["server"]["image"]["id"] == image_id


def test_a_failed_rebuild_leaves_a_server_without_disk_until_the_next(cloud: Cloud) -> None:
    """Off; powering on fails with the reason."""
    server_id = cloud.make_server()
    cloud.machines.failing["create_disk"] = PoolFull("no room")
    action = cloud.post(f"/servers/{server_id}/actions/rebuild", {"image": "debian-13"})["action"]
    ended = cloud.wait(action)[0]
    assert (ended["status"], ended["error"]) == ("error", {"code": "action_failed", "message": "no room"})
    assert cloud.status(server_id) == "off"
    ended = cloud.wait(cloud.post(f"/servers/{server_id}/actions/poweron")["action"])[0]
    assert ended["status"] == "error"
    assert "rebuild" in ended["error"]["message"]
    cloud.machines.failing.clear()
    cloud.succeed(f"/servers/{server_id}/actions/rebuild", {"image": "debian-13"})
    assert cloud.status(server_id) == "running"


def test_a_server_that_cannot_be_made_is_gone(cloud: Cloud) -> None:
    """Both actions end as errors, its addresses are free, its name is too."""
    cloud.machines.failing["create_disk"] = PoolFull("no room")
    answer = cloud.post("/servers", BODY)
    ended = cloud.wait(answer["action"], *answer["next_actions"])
    assert [action["status"] for action in ended] == ["error", "error"]
    assert cloud.refuse("GET", f"/servers/{answer['server']['id']}") == (404, "not_found")
    assert cloud.get("/primary_ips")["primary_ips"] == []
    cloud.machines.failing.clear()
    cloud.make_server()


def test_a_server_that_does_not_start_is_off(cloud: Cloud) -> None:
    """It is there, and another try may work."""
    cloud.machines.failing["start"] = MachineFailed("no more processes")
    answer = cloud.post("/servers", BODY)
    created, started = cloud.wait(answer["action"], *answer["next_actions"])
    assert (created["status"], started["status"]) == ("success", "error")
    assert cloud.status(answer["server"]["id"]) == "off"
    cloud.machines.failing.clear()
    cloud.succeed(f"/servers/{answer['server']['id']}/actions/poweron")


def test_actions_that_are_not_there_yet_say_so(cloud: Cloud) -> None:
    """422, not 404: the client did nothing wrong; what the real API does not have is unknown here too."""
    server_id = cloud.make_server()
    path = f"/servers/{server_id}/actions/enable_rescue"
    assert cloud.refuse("POST", path, {}) == (422, "unsupported_error")
    assert cloud.refuse("POST", f"/servers/{server_id}/actions/explode", {})[0] in (404, 405)


def test_servers_are_cut_off_by_name(cloud: Cloud) -> None:
    """Those that are there at once, those to come when they start; each list replaces the one before."""
    left, right = cloud.make_server("left"), cloud.make_server("right")

    def cut(*names: str) -> set[int]:
        result = cloud.call("PUT", "/_local/network", {"cut_off": list(names)})
        assert (result.status_code, result.json) == (200, {"cut_off": list(names)})
        assert cloud.call("GET", "/_local/network").json == result.json
        return cloud.machines.cut

    assert cut("left", "later") == {left}
    later = cloud.make_server("later")
    assert cloud.machines.cut == {left, later}
    assert cut("*") == {left, right, later}
    last = cloud.make_server("last")
    assert cloud.machines.cut == {left, right, later, last}
    assert cut() == set()


@pytest.mark.parametrize(
    "body", [{}, *({"cut_off": wrong} for wrong in ("left", [1], None, [""], ["a b"], ["a\n"])), {"cut_of": []}]
)
def test_who_is_cut_off_must_be_said_right(cloud: Cloud, body: dict[str, Any]) -> None:
    """A typo would connect everybody again."""
    cloud.call("PUT", "/_local/network", {"cut_off": ["left"]})
    assert cloud.call("PUT", "/_local/network", body).status_code == 422
    assert cloud.call("GET", "/_local/network").json == {"cut_off": ["left"]}


def test_only_what_a_running_server_does_by_itself_is_noticed(cloud: Cloud) -> None:
    """Not while an action holds it, not once the cloud is stopping: then the machine's end is their work."""
    server_id = cloud.make_server()
    fault = {"method": "POST", "path": "/v1/servers/**", "kind": "action_stuck", "times": 1}
    cloud.call("PUT", "/_local/faults", {"faults": [fault]})
    action = cloud.post(f"/servers/{server_id}/actions/create_image")["action"]
    cloud.machines.running.pop(server_id)
    cloud.project.life.notice_off(server_id)
    assert cloud.status(server_id) == "running"
    cloud.call("DELETE", "/_local/faults")
    cloud.wait(action)
    cloud.project.life.notice_off(server_id)
    assert cloud.status(server_id) == "off"
    cloud.succeed(f"/servers/{server_id}/actions/poweron")
    cloud.project.life.close()
    cloud.machines.running.pop(server_id)
    cloud.project.life.notice_off(server_id)
    assert cloud.status(server_id) == "running"
