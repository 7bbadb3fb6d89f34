"""Calls: what is tried again, what is found again, and what is told."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import requests

from scripts.bake.answers import given
from scripts.bake.cloud import Access, Cloud, find_access
from scripts.bake.errors import CloudFailed, ImageGone, Interrupted, Refused, Unavailable
from scripts.bake.snapshots import Snapshot
from tests.unit.bake.conftest import InProcess, as_response
from tests.unit.local_cloud.conftest import PUBLIC_KEY
from tests.unit.local_cloud.conftest import Cloud as LocalCloud

Fault = Callable[[requests.PreparedRequest], requests.Response | None]
LABELS = {"product": "mini-llm", "run": "20261126-1200-0a1b2c", "deadline": "1"}
END_S = 1e12


def refuse(status: int, code: str) -> Fault:
    """An answer with an error of the API."""
    body = f'{{"error": {{"code": "{code}", "message": "no", "details": null}}}}'.encode()
    headers = {"Content-Type": "application/json", "X-Correlation-Id": "c0ffee"}
    return lambda request: as_response(request, status, body, headers)


def drop(request: requests.PreparedRequest) -> None:
    raise requests.ConnectionError("reset")


def lose(way: InProcess) -> Fault:
    """What was asked for is done, and the answer is never heard."""

    def fault(request: requests.PreparedRequest) -> None:
        way.faults.insert(0, None)
        way.send(request)
        raise requests.ConnectionError("lost")

    return fault


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (409, "conflict"),
        (423, "locked"),
        (429, "rate_limit_exceeded"),
        (500, "server_error"),
        (502, "bad_gateway"),
        (503, "unavailable"),
        (504, "timeout"),
        (422, "resource_in_use"),
    ],
)
def test_what_passes_is_tried_again(cloud: Cloud, way: InProcess, status: int, code: str) -> None:
    """Also locked, which the library leaves to its callers."""
    way.faults = [refuse(status, code)] * 2
    assert cloud.snapshots() == []
    assert len(way.calls) == 3


def test_a_connection_that_breaks_is_tried_again(cloud: Cloud, way: InProcess) -> None:
    """A read can be repeated as it is."""
    way.faults = [drop]
    assert cloud.snapshots() == []


def test_what_does_not_pass_is_told_with_what_support_asks_for(cloud: Cloud, way: InProcess) -> None:
    """At once, in one line, with what to do."""
    way.faults = [refuse(403, "resource_limit_exceeded")]
    with pytest.raises(
        CloudFailed, match=r"list the snapshots: no \(resource_limit_exceeded, correlation id c0ffee\)"
    ) as told:
        cloud.snapshots()
    assert "ask Hetzner" in told.value.hint
    assert len(way.calls) == 1


def test_a_cloud_that_cannot_be_reached_is_given_up(cloud: Cloud, way: InProcess) -> None:
    """After its patience, with its address."""
    way.faults = [drop] * 100_000
    short = Cloud(Access("http://127.0.0.1:8899/v1", "local"), patience_s=0.05)
    short.client._client._session.mount("http://", way)
    with pytest.raises(CloudFailed, match=r"http://127.0.0.1:8899/v1 cannot be reached"):
        short.snapshots()


@pytest.mark.parametrize("code", ["not_found", "invalid_input", "uniqueness_error", "placement_error"])
def test_no_refusal_gets_past_as_an_exception_of_the_library(cloud: Cloud, way: InProcess, code: str) -> None:
    """Of lists and keys there is nothing to tell apart; a path that is not there is an address that is wrong."""
    for look in (cloud.snapshots, cloud.servers, cloud.ssh_keys, cloud.server_types, cloud.pricing):
        way.faults = [refuse(404, code)]
        with pytest.raises(CloudFailed, match=code) as told:
            look()
        assert ("HCLOUD_ENDPOINT" in told.value.hint) == (code == "not_found")
    way.faults = [refuse(409, code)]
    with pytest.raises(CloudFailed, match=code):
        cloud.add_key("key", PUBLIC_KEY, LABELS)


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:8899/v1", "127.0.0.1:8899/v1", "http://:x/v1"])
def test_what_makes_no_sense_is_told_at_once(cloud: Cloud, way: InProcess, endpoint: str) -> None:
    """An address without a scheme, or something that is no API of this kind."""
    made = Cloud(Access(endpoint, "local"))
    made.client._client._session.mount("http://", way)
    way.faults = [lambda request: as_response(request, 200, b'{"hello": "world"}', {})]
    with pytest.raises(CloudFailed, match="makes no sense") as told:
        made.snapshots()
    assert "HCLOUD_ENDPOINT" in told.value.hint


@pytest.mark.parametrize("code", ["conflict", "timeout"])
def test_the_library_does_not_try_again_by_itself(
    cloud: Cloud, way: InProcess, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pauses of up to a minute would come on top, unseen: a wrong address was to be told within seconds."""
    waited_s: list[float] = []
    monkeypatch.setattr("hcloud._client.time.sleep", waited_s.append)

    def time_out(request: requests.PreparedRequest) -> None:
        raise requests.ConnectTimeout("no answer")

    way.faults = [time_out, refuse(409, code), None]
    assert cloud.snapshots() == []
    assert max(waited_s) <= 1.0  # the pauses of bake's own, which begin anew for each call


def test_a_key_whose_answer_was_lost_is_found_and_not_made_twice(cloud: Cloud, way: InProcess) -> None:
    """By its name."""
    way.faults = [lose(way)]
    made = cloud.add_key("mini-llm-bake-20261126-1200-0a1b2c", PUBLIC_KEY, LABELS)
    assert [each.id for each in cloud.ssh_keys()] == [made.id]


@pytest.fixture
def image(make_snapshot: Callable[..., Snapshot]) -> int:
    return make_snapshot().id


def create(cloud: Cloud, image: int, *places: tuple[str, str]) -> str:
    key = cloud.add_key("key", PUBLIC_KEY, LABELS)
    made = cloud.create_server("probe", image, places or [("cx23", "fsn1")], key, "#cloud-config\n", LABELS, END_S)
    return f"{given(made.server_type).name} at {given(made.location).name}, {made.status}"


def test_a_server_is_created_and_runs(cloud: Cloud, image: int) -> None:
    """With its labels."""
    assert create(cloud, image) == "cx23 at fsn1, running"
    assert given(cloud.client.servers.get_by_name("probe")).labels == LABELS


def test_a_server_whose_answer_was_lost_is_waited_for(cloud: Cloud, image: int, way: InProcess) -> None:
    """One server, and it runs."""
    way.faults = [None, lose(way)]
    assert create(cloud, image).endswith("running")
    assert len(cloud.servers()) == 2  # and the one that the image is from


def test_whether_a_server_was_asked_for_in_vain_is_known(cloud: Cloud, image: int, way: InProcess) -> None:
    """After Ctrl-C the cloud may still make it; a refusal and an answer say that it does not, or that it has."""

    def interrupt(request: requests.PreparedRequest) -> None:
        assert request.method == "POST"
        raise Interrupted("Ctrl-C")

    way.faults = [None, interrupt]
    with pytest.raises(Interrupted):
        create(cloud, image)
    assert cloud.unanswered
    key = given(cloud.client.ssh_keys.get_by_name("key"))
    way.faults = [refuse(403, "resource_limit_exceeded")]
    with pytest.raises(CloudFailed):
        cloud.create_server("probe", image, [("cx23", "fsn1")], key, "", LABELS, END_S)
    assert not cloud.unanswered
    cloud.create_server("probe", image, [("cx23", "fsn1")], key, "", LABELS, END_S)
    assert not cloud.unanswered


def test_where_there_is_no_room_the_next_place_is_tried(cloud: Cloud, image: int, way: InProcess) -> None:
    """In the order given; none at all is told with all that was tried."""
    way.faults = [None, refuse(412, "resource_unavailable")]
    assert create(cloud, image, ("cx23", "fsn1"), ("cx23", "nbg1")) == "cx23 at nbg1, running"
    key = given(cloud.client.ssh_keys.get_by_name("key"))
    way.faults = [refuse(412, "resource_unavailable")] * 2
    with pytest.raises(Unavailable, match="cx23 at fsn1, cx33 at hel1"):
        cloud.create_server("other", image, [("cx23", "fsn1"), ("cx33", "hel1")], key, "", LABELS, END_S)


def test_a_server_whose_action_fails_is_made_anew(cloud: Cloud, local: LocalCloud, image: int) -> None:
    """The one that failed is gone."""
    fault = {"path": "/v1/servers", "method": "POST", "kind": "action_failed", "times": 1}
    assert local.call("PUT", "/_local/faults", {"faults": [fault]}).status_code == 200
    assert create(cloud, image).endswith("running")
    assert len(cloud.servers()) == 2


def test_where_placing_a_server_fails_the_next_place_is_tried(cloud: Cloud, local: LocalCloud, image: int) -> None:
    """That there is no room may be told by the action only; nothing stays there."""
    fault = {"path": "/v1/servers", "method": "POST", "kind": "action_failed", "code": "placement_error", "times": 1}
    assert local.call("PUT", "/_local/faults", {"faults": [fault]}).status_code == 200
    assert create(cloud, image, ("cx23", "fsn1"), ("cx23", "nbg1")) == "cx23 at nbg1, running"
    assert len(cloud.servers()) == 2


def test_a_server_from_a_snapshot_that_is_gone(cloud: Cloud, image: int) -> None:
    """It is told apart from all other refusals: the bake can make the snapshot again."""
    cloud.client.images.get_by_id(image).delete()
    with pytest.raises(ImageGone):
        create(cloud, image)


def test_deleting_twice_is_no_error(cloud: Cloud, make_snapshot: Callable[..., Snapshot]) -> None:
    """Somebody else may have been first."""
    snapshot = make_snapshot()
    for _ in range(2):
        cloud.delete_snapshot(snapshot)
    server = cloud.servers()[0]
    for _ in range(2):
        cloud.delete_server(server, END_S)
    assert cloud.servers() == []


def test_labels_are_read_anew_before_they_are_written(cloud: Cloud, make_snapshot: Callable[..., Snapshot]) -> None:
    """What somebody else has written since stays."""
    seen = make_snapshot()
    cloud.relabel(seen, stable="1")
    assert cloud.relabel(seen, "version", verified_at="x").labels == {
        "product": "mini-llm",
        "layer": "service",
        "model": "starter",
        "stable": "1",
        "verified-at": "x",
    }


def test_the_token_comes_from_the_environment_or_the_commands_own_file(tmp_path: Path) -> None:
    """And stands in no representation."""
    told = find_access({"HCLOUD_TOKEN": "secret-1", "HCLOUD_ENDPOINT": "http://127.0.0.1:1/v1/"})
    assert (told.endpoint, told.token) == ("http://127.0.0.1:1/v1", "secret-1")
    assert "secret" not in repr(told)
    config = tmp_path / ".config" / "hcloud" / "cli.toml"
    with pytest.raises(Refused, match="no token"):
        find_access({"HOME": str(tmp_path)})
    config.parent.mkdir(parents=True)
    config.write_text(
        'active_context = "b"\n[[contexts]]\nname = "a"\ntoken = "t-a"\n[[contexts]]\nname = "b"\ntoken = "t-b"\n'
    )
    assert find_access({"HOME": str(tmp_path)}).token == "t-b"
    assert find_access({"HOME": str(tmp_path), "HCLOUD_CONTEXT": "a"}).token == "t-a"
    with pytest.raises(Refused, match="no active context"):
        find_access({"HOME": str(tmp_path), "HCLOUD_CONTEXT": "c"})
    config.write_text("active_context = ")
    with pytest.raises(Refused, match="cannot be read"):
        find_access({"HOME": str(tmp_path)})


def test_a_deletion_whose_action_fails_is_tried_again(cloud: Cloud, local: LocalCloud) -> None:
    """And told if it fails for good."""
    local.make_server("probe")
    fault = {"path": "/v1/servers/*", "method": "DELETE", "kind": "action_failed", "times": 2}
    local.call("PUT", "/_local/faults", {"faults": [fault]})
    cloud.delete_server(cloud.servers()[0], END_S)
    assert cloud.servers() == []
    local.make_server("probe")
    local.call("PUT", "/_local/faults", {"faults": [{**fault, "times": 9}]})
    with pytest.raises(CloudFailed, match="delete server probe: a fault of the plan"):
        cloud.delete_server(cloud.servers()[0], END_S)


@pytest.mark.parametrize("token", ["…", "two words", "one\nline more"])
def test_what_cannot_be_a_token_is_refused_unseen(tmp_path: Path, token: str) -> None:
    """Such as the dots of the README."""
    with pytest.raises(Refused, match="HCLOUD_TOKEN holds no token") as told:
        find_access({"HCLOUD_TOKEN": token})
    assert token not in f"{told.value} {told.value.hint}"
    path = tmp_path / "cli.toml"
    path.write_text(f'active_context = "a"\n[[contexts]]\nname = "a"\ntoken = {json.dumps(token)}\n')
    with pytest.raises(Refused, match=r"cli\.toml holds no token"):
        find_access({"HCLOUD_CONFIG": str(path)})
