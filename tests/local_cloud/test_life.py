"""What a local cloud is after a stop, after a kill, under faults and under many servers at once."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import requests
from hcloud import APIException, Client
from hcloud.actions import ActionTimeoutException
from hcloud.images import Image
from hcloud.server_types import ServerType

from scripts.bake.answers import given
from tests.local_cloud.harness import (
    ROOT,
    TOKEN,
    LocalCloud,
    address_of,
    make_key,
    running_cloud,
    ssh,
    traces,
    wait_until_off,
)

SMALL, DEBIAN = ServerType(name="cx23"), Image(name="debian-13")


def plan(cloud: LocalCloud, *faults: dict[str, str | float]) -> None:
    """Puts a plan of faults in place; none of them takes it away."""
    url = cloud.endpoint.removesuffix("/v1") + "/_local/faults"
    answer = requests.put(url, json={"faults": list(faults)}, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=10)
    assert answer.status_code in (200, 204), answer.text


def calls(cloud: LocalCloud) -> list[dict[str, object]]:
    url = cloud.endpoint.removesuffix("/v1") + "/_local/calls"
    return list(requests.get(url, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=10).json()["calls"])


def test_everything_is_there_after_a_stop_and_after_a_kill(host: None, tmp_path: Path, key: Path) -> None:
    """Servers that were on are on again with their disks, those that were off stay off, snapshots still boot."""
    with running_cloud(tmp_path) as cloud:
        client = cloud.client()
        known = client.ssh_keys.create("known", key.with_suffix(".pub").read_text())
        on = client.servers.create("on", SMALL, DEBIAN, ssh_keys=[known])
        off = client.servers.create("off", SMALL, DEBIAN, ssh_keys=[known], start_after_create=False)
        for action in (on.action, *on.next_actions, off.action):
            action.wait_until_finished()
        address = address_of(on.server)
        ssh(key, address, "echo kept > /srv/kept && sync")
        image = off.server.create_image("kept")
        image.action.wait_until_finished()
        for end in (cloud.stop, cloud.kill):
            end()
            cloud.restart()
            assert ssh(key, address, "cat /srv/kept").strip() == "kept"
            assert client.servers.get_by_id(given(off.server.id)).status == "off"
            assert client.images.get_by_id(given(image.image.id)).status == "available"
        booted = client.servers.create("booted", SMALL, image.image, ssh_keys=[known])
        assert ssh(key, address_of(booted.server), "hostname").strip() == "booted"


def test_work_that_a_kill_cuts_short_has_its_documented_end(host: None, tmp_path: Path) -> None:
    """A creation cut short is gone and its addresses free; its action says why; what is asked again works."""
    with running_cloud(tmp_path) as cloud:
        client = cloud.client()
        plan(cloud, {"path": "/v1/servers", "method": "POST", "kind": "action_lasts", "seconds": 60})
        made = client.servers.create("cut", SMALL, DEBIAN)
        cloud.kill()
        cloud.restart()
        assert client.servers.get_by_name("cut") is None
        assert client.primary_ips.get_all() == []
        action = client.actions.get_by_id(made.action.id)
        assert action.status == "error"
        again = client.servers.create("cut", SMALL, DEBIAN, start_after_create=False)
        again.action.wait_until_finished()


def test_a_stop_during_a_reboot_is_soon_and_the_server_comes_back(host: None, tmp_path: Path, key: Path) -> None:
    """A guest that takes its time to go down keeps nobody waiting, and what was on is on again."""
    with running_cloud(tmp_path) as cloud:
        client = cloud.client()
        known = client.ssh_keys.create("known", key.with_suffix(".pub").read_text())
        made = client.servers.create("slow", SMALL, DEBIAN, ssh_keys=[known])
        address = address_of(made.server)
        stubborn = "systemd-run --quiet --property=TimeoutStopSec=60 sh -c 'trap : TERM; while :; do sleep 1; done'"
        ssh(key, address, stubborn)
        made.server.reboot()
        begun_s = time.monotonic()
        cloud.stop()
        assert time.monotonic() - begun_s < 30
        cloud.restart()
        assert ssh(key, address, "hostname").strip() == "slow"


def test_a_clean_beside_a_running_cloud_is_refused_and_takes_nothing(cloud: LocalCloud) -> None:
    """The record of a cloud that runs is as safe as its disks; a second cloud on it is refused as well."""
    client = cloud.client()
    kept = client.placement_groups.create("kept", "spread").placement_group
    for word in ("clean", "run"):
        command = [sys.executable, "-m", "scripts.local_cloud", word, "--state", str(cloud.state)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
        assert (done.returncode, "end that one first" in done.stderr) == (1, True)
    assert (cloud.state / "cloud.sqlite3").exists()
    cloud.stop()
    cloud.restart()
    assert client.placement_groups.get_by_id(given(kept.id)).name == "kept"
    kept.delete()


def test_a_start_that_is_interrupted_leaves_nothing(
    host: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by Ctrl-C while it makes its pool; nobody else knows its process then, and what it made is removed."""
    state, sleep, begun = tmp_path / "cloud", time.sleep, list[int]()

    def interrupt(seconds: float) -> None:
        sleep(seconds)
        if not begun and (made := traces(state)):
            begun.append(len(made))
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(time, "sleep", interrupt)
        with pytest.raises(KeyboardInterrupt), running_cloud(tmp_path):
            pytest.fail("it was not interrupted")
    assert begun
    end_s = time.monotonic() + 5  # the kernel lets a loop device go once a mount that was under way is over
    while traces(state) and time.monotonic() < end_s:
        time.sleep(0.1)
    assert traces(state) == {}
    words = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(state) not in words


def test_twenty_servers_at_once(host: None, tmp_path: Path) -> None:
    """All of them come up, with addresses of their own, all of them go, and nothing of them is left behind."""
    with running_cloud(tmp_path) as cloud:
        client = cloud.client()
        before = traces(cloud.state) | {"groups": []}
        made = [client.servers.create(f"many-{number}", SMALL, DEBIAN) for number in range(20)]
        for one in made:
            for action in (one.action, *one.next_actions):
                action.wait_until_finished()
        servers = client.servers.get_all()
        assert {server.status for server in servers} == {"running"}
        assert len({address_of(server) for server in servers}) == 20
        assert traces(cloud.state) != before
        for action in [server.delete() for server in servers]:
            action.wait_until_finished()
        assert client.servers.get_all() == []
        assert traces(cloud.state) | {"groups": []} == before  # the group of them all stays as long as the cloud runs
    assert traces(cloud.state) == {}


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (412, "resource_unavailable"),
        (423, "locked"),
        (500, "server_error"),
        (503, "unavailable"),
    ],
)
def test_faults_that_a_client_is_told(cloud: LocalCloud, status: int, code: str) -> None:
    """Hetzner's own client raises what the plan says, once, and the call after it is served."""
    client = cloud.client()
    plan(cloud, {"path": "/v1/ssh_keys", "method": "GET", "kind": "error", "status": status, "call": 1})
    with pytest.raises(APIException) as caught:
        client.ssh_keys.get_all()
    assert caught.value.code == code
    assert client.ssh_keys.get_all() == []


@pytest.mark.parametrize("status", [409, 429, 502, 504])
def test_faults_that_a_client_tries_again(cloud: LocalCloud, status: int) -> None:
    """Hetzner's own client tries these again; the record tells both calls."""
    plan(cloud, {"path": "/v1/ssh_keys", "method": "GET", "kind": "error", "status": status, "call": 1})
    before = len(calls(cloud))
    assert cloud.client().ssh_keys.get_all() == []
    assert [call["status"] for call in calls(cloud)[before:] if call["path"] == "/v1/ssh_keys"] == [status, 200]


def test_reset_and_lost_answer(cloud: LocalCloud, tmp_path: Path) -> None:
    """A reset call did nothing; one whose answer is lost did its work, and the caller never hears of it."""
    client = cloud.client()
    public_key = make_key(tmp_path).with_suffix(".pub").read_text()
    for kind, there in (("reset", False), ("lost_answer", True)):
        plan(cloud, {"path": "/v1/ssh_keys", "method": "POST", "kind": kind})
        with pytest.raises(requests.ConnectionError):
            client.ssh_keys.create("lost", public_key)
        plan(cloud)
        assert (client.ssh_keys.get_by_name("lost") is not None) == there
    given(client.ssh_keys.get_by_name("lost")).delete()


def test_actions_that_fail_or_last(cloud: LocalCloud) -> None:
    """An action of the plan fails or takes its time; the server is locked meanwhile."""
    client: Client = cloud.client()
    made = client.servers.create("slow", SMALL, DEBIAN, start_after_create=False)
    made.action.wait_until_finished()
    actions = "/v1/servers/*/actions/*"
    plan(cloud, {"path": actions, "method": "POST", "kind": "action_failed", "code": "action_failed", "call": 1})
    failing = made.server.power_on()
    with pytest.raises(Exception, match="fault of the plan"):
        failing.wait_until_finished()
    plan(cloud, {"path": actions, "method": "POST", "kind": "action_lasts", "seconds": 1.5, "call": 1})
    begun_s = time.monotonic()
    lasting = made.server.power_on()
    with pytest.raises(APIException) as caught:
        made.server.create_image("too early")
    assert caught.value.code == "locked"
    lasting.wait_until_finished()
    assert time.monotonic() - begun_s >= 1.5
    plan(cloud)
    made.server.delete().wait_until_finished()


def test_slow_answers_and_stuck_actions(cloud: LocalCloud) -> None:
    """A slow answer comes late; a stuck action is running until another plan is there, and is done then."""
    client = cloud.client()
    plan(cloud, {"path": "/v1/locations", "method": "GET", "kind": "slow_answer", "seconds": 1.5, "call": 1})
    begun_s = time.monotonic()
    assert client.locations.get_all()
    assert time.monotonic() - begun_s >= 1.5
    plan(cloud, {"path": "/v1/servers", "method": "POST", "kind": "action_stuck", "call": 1})
    made = client.servers.create("stuck", SMALL, DEBIAN, start_after_create=False)
    with pytest.raises(ActionTimeoutException):
        made.action.wait_until_finished(max_retries=20)
    plan(cloud)
    made.action.wait_until_finished()
    made.server.delete().wait_until_finished()


def test_a_server_loses_its_power_at_a_named_moment(cloud: LocalCloud) -> None:
    """When the call of the plan comes, the machine is off, as if somebody had pulled the plug."""
    client = cloud.client()
    made = client.servers.create("unlucky", SMALL, DEBIAN)
    for action in (made.action, *made.next_actions):
        action.wait_until_finished()
    plan(cloud, {"path": "/v1/locations", "method": "GET", "kind": "power_lost", "server": "unlucky", "call": 1})
    client.locations.get_all()
    wait_until_off(client, made.server)
    plan(cloud)
    made.server.power_on().wait_until_finished()
    assert client.servers.get_by_id(given(made.server.id)).status == "running"
    made.server.delete().wait_until_finished()
