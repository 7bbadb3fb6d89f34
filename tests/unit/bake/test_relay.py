"""The way of Packer's calls: labelled, tried again, and their failures known by code."""

import io
import json
import threading
from email.message import Message
from itertools import repeat
from typing import Any

import pytest
import requests

from scripts.bake import relay as relay_module
from scripts.bake.cloud import Access
from scripts.bake.relay import Relay
from tests.unit.bake.conftest import InProcess
from tests.unit.bake.test_cloud import Fault, drop, lose, refuse
from tests.unit.local_cloud.conftest import PUBLIC_KEY
from tests.unit.local_cloud.conftest import Cloud as LocalCloud

LABELS = {"product": "mini-llm", "run": "20261126-1200-0a1b2c", "deadline": "1"}


class _Silent:
    """In the place of the listening socket."""

    def __init__(self, *words: Any):
        self.server_port = 1

    def serve_forever(self, poll_interval: float) -> None:
        """Nothing comes."""

    shutdown = server_close = lambda self: None


@pytest.fixture
def relay(way: InProcess, monkeypatch: pytest.MonkeyPatch) -> Relay:
    """One that listens nowhere."""
    monkeypatch.setattr(relay_module, "_Listener", _Silent)
    monkeypatch.setattr(relay_module, "pauses", lambda: repeat(0.0))
    monkeypatch.setattr(relay_module.time, "sleep", lambda seconds: None)
    made = Relay(Access("http://127.0.0.1:8899/v1", "local"), LABELS, patience_s=5.0)
    session = requests.Session()
    session.mount("http://", way)
    made._local.session = session
    return made


def call(relay: Relay, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
    status, _, content = relay.forward(method, path, b"" if body is None else json.dumps(body).encode())
    return status, json.loads(content) if content else None


KEY = {"name": "packer-1", "public_key": PUBLIC_KEY, "labels": {"own": "x"}}


def test_keys_and_servers_get_the_runs_labels(relay: Relay, local: LocalCloud) -> None:
    """Beside those that the template gives them."""
    assert call(relay, "POST", "/ssh_keys", KEY)[1]["ssh_key"]["labels"] == {"own": "x", **LABELS}
    status, told = call(relay, "POST", "/servers", {"name": "b", "server_type": "cx23", "image": "debian-13"})
    assert status == 201
    assert told["server"]["labels"] == LABELS
    local.wait(told["action"], *told["next_actions"])


@pytest.mark.parametrize(
    ("status", "code"), [(423, "locked"), (503, "unavailable"), (429, "rate_limit_exceeded"), (500, "server_error")]
)
def test_what_passes_is_tried_again_for_packer(relay: Relay, way: InProcess, status: int, code: str) -> None:
    """Its plugin would give up."""
    way.faults = [refuse(status, code)] * 2
    assert call(relay, "POST", "/ssh_keys", KEY)[0] == 201
    assert relay.failures == []


def test_a_read_or_a_deletion_without_an_answer_is_tried_again(relay: Relay, way: InProcess) -> None:
    """They can be repeated."""
    way.faults = [drop]
    assert call(relay, "GET", "/servers")[0] == 200
    made = call(relay, "POST", "/ssh_keys", KEY)[1]["ssh_key"]["id"]
    way.faults = [drop]
    assert call(relay, "DELETE", f"/ssh_keys/{made}")[0] == 204


def test_a_creation_whose_answer_was_lost_is_not_repeated(relay: Relay, way: InProcess) -> None:
    """Packer gives up, and the bake knows that something may be there."""
    way.faults = [lose(way)]
    status, told = call(relay, "POST", "/ssh_keys", KEY)
    assert (status, told["error"]["code"]) == (503, "unavailable")
    [failed] = relay.failures
    assert (failed.call, failed.lost, failed.passes) == ("POST /ssh_keys", True, True)
    assert len(call(relay, "GET", "/ssh_keys")[1]["ssh_keys"]) == 1


def do_and_refuse(way: InProcess, status: int, code: str) -> Fault:
    """What was asked for is done, and the answer says otherwise."""

    def fault(request: requests.PreparedRequest) -> requests.Response | None:
        way.faults.insert(0, None)
        way.send(request)
        return refuse(status, code)(request)

    return fault


def test_a_creation_that_was_done_though_its_answer_says_otherwise_is_known(relay: Relay, way: InProcess) -> None:
    """The second try finds the name taken, and the bake looks for what is there."""
    way.faults = [do_and_refuse(way, 504, "timeout")]
    assert call(relay, "POST", "/ssh_keys", KEY)[0] == 503
    assert [(each.code, each.passes) for each in relay.failures] == [("uniqueness_error", True)]
    assert len(call(relay, "GET", "/ssh_keys")[1]["ssh_keys"]) == 1


def test_a_name_that_was_taken_before_is_no_lost_answer(relay: Relay) -> None:
    """Trying again would not help."""
    assert call(relay, "POST", "/ssh_keys", KEY)[0] == 201
    assert call(relay, "POST", "/ssh_keys", KEY)[0] == 409
    assert [(each.code, each.passes) for each in relay.failures] == [("uniqueness_error", False)]


@pytest.mark.parametrize(("done", "left"), [(True, 503), (False, 201)])
def test_no_snapshot_is_taken_twice(relay: Relay, local: LocalCloud, way: InProcess, done: bool, left: int) -> None:
    """Nothing in its name would keep it from having a twin."""
    server = local.make_server()
    local.succeed(f"/servers/{server}/actions/poweroff")
    fault = do_and_refuse(way, 502, "bad_gateway") if done else refuse(502, "bad_gateway")
    way.faults = [None, fault]  # behind the look whether the server is off
    body = {"type": "snapshot", "labels": {**LABELS, "layer": "stack"}}
    status, told = call(relay, "POST", f"/servers/{server}/actions/create_image", body)
    assert (status, told.get("error", {}).get("code")) == (left, "unavailable" if done else None)
    assert [each.lost for each in relay.failures] == [True] * done
    [made] = call(relay, "GET", "/images?type=snapshot")[1]["images"]
    assert made["labels"]["layer"] == "stack"
    local.wait(*call(relay, "GET", f"/servers/{server}/actions")[1]["actions"])


def test_what_does_not_pass_is_handed_on_and_noted(relay: Relay, way: InProcess) -> None:
    """By its code, with what support asks for."""
    way.faults = [refuse(403, "forbidden")]
    status, told = call(relay, "POST", "/ssh_keys", KEY)
    assert (status, told["error"]["code"]) == (403, "forbidden")
    [failed] = relay.failures
    assert (failed.code, failed.correlation_id, failed.passes) == ("forbidden", "c0ffee", False)


@pytest.mark.parametrize(("told_code", "noted"), [("action_failed", "action_failed"), ("placement_error",) * 2])
def test_an_action_that_failed_is_noted(relay: Relay, local: LocalCloud, told_code: str, noted: str) -> None:
    """It comes in an answer that went well; that there is no room elsewhere helps."""
    fault = {"path": "/v1/servers", "method": "POST", "kind": "action_failed", "code": told_code, "times": 1}
    local.call("PUT", "/_local/faults", {"faults": [fault]})
    told = call(relay, "POST", "/servers", {"name": "b", "server_type": "cx23", "image": "debian-13"})[1]
    local.wait(told["action"])
    call(relay, "GET", f"/actions/{told['action']['id']}")
    assert [(each.code, each.passes) for each in relay.failures] == [(noted, True)]
    local.wait(*told["next_actions"])


def test_a_snapshot_waits_until_the_server_is_off(relay: Relay, local: LocalCloud, way: InProcess) -> None:
    """Shutdown's success says only that the button was pressed."""
    server = local.make_server()
    way.faults = [None] * 3
    seen: list[str] = []

    def power_off_at_the_third_look(request: requests.PreparedRequest) -> None:
        seen.append(local.status(server))
        if len(seen) == 3:
            local.succeed(f"/servers/{server}/actions/poweroff")

    way.faults = [power_off_at_the_third_look] * 3
    status, told = call(relay, "POST", f"/servers/{server}/actions/create_image", {"type": "snapshot"})
    assert status == 201
    assert seen == ["running"] * 3
    local.wait(told["action"])


def test_no_snapshot_is_taken_of_a_server_that_does_not_go_down(
    relay: Relay, local: LocalCloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layer is baked again; with luck the next server goes down."""
    server = local.make_server()
    monkeypatch.setattr(relay_module, "_OFF_PATIENCE_S", 0.02)
    assert call(relay, "POST", f"/servers/{server}/actions/create_image", {"type": "snapshot"})[0] == 503
    assert [(each.code, each.passes) for each in relay.failures] == [("timeout", True)]
    assert call(relay, "GET", "/images?type=snapshot")[1]["images"] == []


def test_once_it_is_closed_nothing_is_made_any_more(relay: Relay, way: InProcess) -> None:
    """Packer may be gone while its call is still tried again; what that made would outlive the look at the rest."""
    tried = threading.Event()

    def refuse_on(request: requests.PreparedRequest) -> requests.Response | None:
        tried.set()
        way.faults.append(refuse_on)
        return refuse(503, "unavailable")(request)

    way.faults = [refuse_on]
    relay._patience_s = 1e6
    with relay.opened():
        packer = threading.Thread(target=call_by_another, args=(relay, way))
        packer.start()
        assert tried.wait(10)
    assert relay._calls == 0
    packer.join(10)
    assert not packer.is_alive()
    way.faults, made = [], len(way.calls)
    assert call(relay, "POST", "/ssh_keys", KEY)[0] == 503
    assert len(way.calls) == made


def call_by_another(relay: Relay, way: InProcess) -> None:
    relay._local.session = requests.Session()
    relay._local.session.mount("http://", way)
    call(relay, "POST", "/ssh_keys", KEY)


@pytest.mark.parametrize(
    ("key", "length"), [("wrong", "5"), (None, str(1 << 40)), (None, "-1"), (None, "many"), (None, "\u00b2")]
)
def test_nothing_is_read_of_who_may_not_ask_or_says_too_much(
    relay: Relay, way: InProcess, key: str | None, length: str
) -> None:
    """Every user of the machine can reach it; for each the connection ends there."""
    handled = relay._handler()
    handler = handled.__new__(handled)
    handler.headers = Message()
    handler.headers["Authorization"], handler.headers["Content-Length"] = f"Bearer {key or relay.token}", length
    handler.command, handler.path, handler.requestline = "POST", "/v1/ssh_keys", ""
    handler.request_version, handler.close_connection = "HTTP/1.1", False
    handler.rfile = None  # type: ignore[assignment]  # so that reading it would fail
    handler.wfile = io.BytesIO()
    handler.do_POST()  # type: ignore[attr-defined]  # of a class made in a function
    assert handler.wfile.getvalue().startswith(b"HTTP/1.1 401")
    assert handler.close_connection
    assert way.calls == []
