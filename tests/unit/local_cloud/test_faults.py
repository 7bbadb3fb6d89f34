"""Faults on demand, and the record of calls."""

import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from scripts.local_cloud.api.faults import ConnectionDropped, Faults
from scripts.local_cloud.api.http_server import HttpServer, NotLoopback
from tests.unit.local_cloud.conftest import Cloud, wait_until

BODY = {"name": "web", "server_type": "cx23", "image": "debian-13"}


def _plan(cloud: Cloud, *faults: dict[str, Any]) -> None:
    result = cloud.call("PUT", "/_local/faults", {"faults": list(faults)})
    assert result.status_code == 200, result.json


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (429, "rate_limit_exceeded"),
        (423, "locked"),
        (409, "conflict"),
        (412, "resource_unavailable"),
        (500, "server_error"),
        (502, "bad_gateway"),
        (503, "unavailable"),
        (504, "timeout"),
    ],
)
def test_calls_fail_as_planned(cloud: Cloud, status: int, code: str) -> None:
    """With the code that belongs to the status; nothing is done; other calls are spared."""
    _plan(cloud, {"method": "POST", "path": "/v1/servers", "kind": "error", "status": status})
    assert cloud.refuse("POST", "/servers", BODY) == (status, code)
    assert cloud.refuse("POST", "/servers", BODY) == (status, code)
    assert cloud.get("/servers")["servers"] == []
    _plan(cloud)
    cloud.make_server()


def test_the_nth_call_or_the_first_few_are_struck(cloud: Cloud) -> None:
    """Counting begins with the plan; codes and messages can be given."""
    _plan(
        cloud,
        {"path": "/v1/servers", "kind": "error", "call": 2, "status": 403, "code": "forbidden", "message": "no"},
        {"path": "/v1/images/**", "kind": "error", "times": 2, "status": 503},
    )
    assert [cloud.call("GET", "/v1/servers").status_code for _ in range(3)] == [200, 403, 200]
    assert [cloud.call("GET", "/v1/images/302").status_code for _ in range(3)] == [503, 503, 200]
    assert cloud.call("GET", "/_local/faults").json["faults"][0]["call"] == 2


def test_paths_are_matched_by_segments(cloud: Cloud) -> None:
    """A star stands for one of them."""
    server_id = cloud.make_server()
    _plan(cloud, {"path": "/v1/servers/*/actions/shutdown", "kind": "error", "status": 423})
    assert cloud.refuse("POST", f"/servers/{server_id}/actions/shutdown") == (423, "locked")
    cloud.succeed(f"/servers/{server_id}/actions/poweroff")
    assert cloud.status(server_id) == "off"


def test_a_reset_connection_does_nothing(cloud: Cloud) -> None:
    """The call never reaches the cloud."""
    _plan(cloud, {"method": "POST", "path": "/v1/servers", "kind": "reset", "times": 1})
    with pytest.raises(ConnectionDropped):
        cloud.call("POST", "/v1/servers", BODY)
    assert cloud.get("/servers")["servers"] == []


def test_a_lost_answer_is_done_but_not_heard(cloud: Cloud) -> None:
    """A second try finds the name taken."""
    _plan(cloud, {"method": "POST", "path": "/v1/servers", "kind": "lost_answer", "times": 1})
    with pytest.raises(ConnectionDropped):
        cloud.call("POST", "/v1/servers", BODY)
    assert cloud.refuse("POST", "/servers", BODY) == (409, "uniqueness_error")
    calls = cloud.call("GET", "/_local/calls").json["calls"]
    assert [(call["status"], call["faults"]) for call in calls] == [(201, ["lost_answer"]), (409, [])]


def test_a_server_loses_its_power_at_a_named_moment(cloud: Cloud) -> None:
    """Just before the second look at it; the cloud finds out afterwards, as of any server that goes off."""
    server_id = cloud.make_server()
    cloud.project.life.watch()
    _plan(cloud, {"path": f"/v1/servers/{server_id}", "kind": "power_lost", "call": 2, "server": "web"})
    assert cloud.status(server_id) == "running"
    assert server_id in cloud.machines.running
    assert cloud.status(server_id) in ("running", "off")
    assert server_id not in cloud.machines.running
    wait_until(lambda: cloud.status(server_id) == "off")


def test_an_action_fails_without_its_work_being_done(cloud: Cloud) -> None:
    """Its error is the planned one, its end the documented one."""
    server_id = cloud.make_server()
    create_image = "/v1/servers/*/actions/create_image"
    _plan(cloud, {"path": create_image, "kind": "action_failed", "code": "disk_error", "message": "bad luck"})
    answer = cloud.post(f"/servers/{server_id}/actions/create_image", {})
    assert cloud.wait(answer["action"])[0]["error"] == {"code": "disk_error", "message": "bad luck"}
    assert cloud.get(f"/images/{answer['image']['id']}")["image"]["status"] == "unavailable"
    assert "snapshot" not in [asked for asked, _ in cloud.machines.asked]
    _plan(cloud, {"method": "DELETE", "path": "/v1/servers/*", "kind": "action_failed"})
    ended = cloud.wait(cloud.call("DELETE", f"/v1/servers/{server_id}").json["action"])[0]
    assert ended["error"]["code"] == "action_failed"
    assert cloud.status(server_id) == "running"


def test_the_action_that_is_struck_can_be_chosen(cloud: Cloud) -> None:
    """The server is made and does not start."""
    _plan(cloud, {"path": "/v1/servers", "kind": "action_failed", "command": "start_server"})
    answer = cloud.post("/servers", BODY)
    created, started = cloud.wait(answer["action"], *answer["next_actions"])
    assert (created["status"], started["status"]) == ("success", "error")
    assert cloud.status(answer["server"]["id"]) == "off"


def test_a_stuck_action_goes_on_with_the_next_plan(cloud: Cloud) -> None:
    """Until then it runs and locks."""
    server_id = cloud.make_server()
    _plan(cloud, {"path": "/v1/servers/*/actions/poweroff", "kind": "action_stuck"})
    action = cloud.post(f"/servers/{server_id}/actions/poweroff")["action"]
    time.sleep(0.05)
    assert cloud.get(f"/actions/{action['id']}")["action"]["status"] == "running"
    assert cloud.refuse("POST", f"/servers/{server_id}/actions/poweron") == (423, "locked")
    assert cloud.call("DELETE", "/_local/faults").status_code == 204
    assert cloud.wait(action)[0]["status"] == "success"


def test_an_action_lasts_as_long_as_told(cloud: Cloud) -> None:
    """And ends well."""
    server_id = cloud.make_server()
    _plan(cloud, {"path": "/v1/servers/*/actions/*", "kind": "action_lasts", "seconds": 0.3})
    began = time.monotonic()
    cloud.succeed(f"/servers/{server_id}/actions/poweroff")
    assert time.monotonic() - began >= 0.3


def test_stuck_and_long_actions_do_not_hinder_a_stop(cloud: Cloud) -> None:
    """They stay unfinished, and the next start ends them."""
    ids = [cloud.make_server("a"), cloud.make_server("b")]
    _plan(
        cloud,
        {"path": f"/v1/servers/{ids[0]}/actions/*", "kind": "action_stuck"},
        {"path": f"/v1/servers/{ids[1]}/actions/*", "kind": "action_lasts", "seconds": 60},
    )
    actions = [cloud.post(f"/servers/{server_id}/actions/poweroff")["action"] for server_id in ids]
    began = time.monotonic()
    cloud.stop()
    assert time.monotonic() - began < 3
    again = cloud.start_again()
    assert [again.get(f"/actions/{action['id']}")["action"]["status"] for action in actions] == ["error", "error"]

    def runs(server_id: int) -> bool:
        return again.status(server_id) == "running"

    for server_id in ids:
        wait_until(partial(runs, server_id))
    again.stop()


def test_every_call_is_recorded_in_memory_and_on_disk(cloud: Cloud) -> None:
    """With how it ended; the cloud's own paths and the page are left out."""
    result = cloud.call("GET", "/v1/servers", name="x")
    cloud.call("DELETE", "/v1/servers/1")
    cloud.call("GET", "/")
    calls = cloud.call("GET", "/_local/calls").json["calls"]
    assert [(call["number"], call["method"], call["path"], call["query"], call["status"]) for call in calls] == [
        (1, "GET", "/v1/servers", "name=x", 200),
        (2, "DELETE", "/v1/servers/1", "", 404),
    ]
    assert calls[0]["correlation_id"] == result.headers["X-Correlation-Id"]
    lines = (cloud.folder / "calls.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == calls
    assert [call["number"] for call in cloud.call("GET", "/_local/calls", after="1").json["calls"]] == [2]


@pytest.mark.parametrize(
    "fault",
    [
        {},
        {"path": "/v1/servers"},
        {"path": "/v1/servers", "kind": "explode"},
        {"path": "/v1/servers", "kind": "error", "status": 200},
        {"path": "/v1/servers", "kind": "action_lasts"},
        {"path": "/v1/servers", "kind": "power_lost"},
        {"path": "/v1/servers", "kind": "slow_answer", "seconds": -1},
        {"path": "/v1/servers", "kind": "error", "call": "2"},
        {"path": "/v1/servers", "kind": "error", "cal": 2},
        "text",
    ],
)
def test_a_plan_with_a_mistake_is_refused_whole(cloud: Cloud, fault: object) -> None:
    """The old one stays."""
    _plan(cloud, {"path": "/v1/images", "kind": "error", "status": 500})
    assert cloud.call("PUT", "/_local/faults", {"faults": [fault]}).status_code == 422
    assert cloud.call("GET", "/v1/images").status_code == 500


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "::1", "::"])
def test_it_listens_on_loopback_only(host: str) -> None:
    """IPv4 loopback, as the endpoint that clients are told."""
    with pytest.raises(NotLoopback):
        HttpServer(lambda environ, start: [], host)


def test_a_full_disk_costs_the_record_and_no_answer(caplog: pytest.LogCaptureFixture) -> None:
    """That calls are not written down is said once; they are still told to who asks."""
    faults = Faults(calls_path=Path("/dev/full"))
    for number in range(3):
        faults.record(path=f"/v1/{number}")
    faults.close()
    faults.record(path="/v1/late")  # an answer that was under way at the end
    assert len(faults.read_calls()) == 4
    assert [record.message for record in caplog.records] == ["calls cannot be written down: No space left on device"]


def test_no_plan_lasts_for_ever(cloud: Cloud) -> None:
    """A day is the longest; what no clock can count is refused, not met."""
    for seconds in (86_401, 1e300):
        fault = {"path": "/v1/servers", "kind": "slow_answer", "seconds": seconds}
        assert cloud.call("PUT", "/_local/faults", {"faults": [fault]}).status_code == 422
