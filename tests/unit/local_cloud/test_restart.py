"""What a start of the cloud finds, after a stop and after a SIGKILL."""

import threading
from collections.abc import Callable, Iterator

import pytest

from scripts.local_cloud.machine_interface import MachineFailed
from tests.unit.local_cloud.conftest import Cloud, wait_until
from tests.unit.local_cloud.stub_machines import StubMachines

BODY = {"name": "web", "server_type": "cx23", "image": "debian-13"}


@pytest.fixture
def hang(start_cloud: Callable[..., Cloud]) -> Iterator[Callable[[str], Cloud]]:
    """A cloud that will be killed while its machines do one thing, which lasts until the test is over."""
    over = threading.Event()
    yield lambda method: start_cloud(StubMachines(hanging={method: over}))
    over.set()


def _kill_and_start(cloud: Cloud, method: str) -> Cloud:
    """Starts again over the same state while the old cloud's thread still hangs, over machines that lost power."""
    wait_until(lambda: method in [asked for asked, _ in cloud.machines.asked])
    fresh = StubMachines(disks=dict(cloud.machines.disks), images=set(cloud.machines.images))
    cloud.machines = fresh
    return cloud.start_again()


def test_servers_that_were_on_are_started_again(cloud: Cloud) -> None:
    """Those that were off stay off; addresses and user data are the same."""
    on, off = cloud.make_server("on", user_data="x"), cloud.make_server("off")
    cloud.succeed(f"/servers/{off}/actions/poweroff")
    before = cloud.machines.running[on]
    cloud.stop()
    cloud.machines.running.clear()
    again = cloud.start_again()
    wait_until(lambda: again.status(on) == "running")
    assert again.status(off) == "off"
    assert cloud.machines.running == {on: before}
    assert again.get(f"/servers/{on}/actions")["actions"][-1]["command"] == "start_server"
    again.stop()


def test_machines_that_end_after_the_stop_count_as_on(cloud: Cloud) -> None:
    """The cloud stops watching before it takes its machines down."""
    server_id = cloud.make_server()
    cloud.project.life.watch()
    cloud.stop()
    cloud.machines.running.clear()
    again = cloud.start_again()
    wait_until(lambda: again.status(server_id) == "running")
    again.stop()


def test_a_server_whose_machine_survived_runs_on(cloud: Cloud) -> None:
    """It is not started twice."""
    server_id = cloud.make_server()
    again = cloud.start_again()
    wait_until(lambda: again.status(server_id) == "running")
    assert [asked for asked in cloud.machines.asked if asked[0] == "start"] == [("start", server_id)]
    again.stop()


def test_a_creation_cut_short_leaves_nothing(hang: Callable[[str], Cloud]) -> None:
    """Its actions are errors that say why; name and addresses are free."""
    cloud = hang("create_disk")
    answer = cloud.post("/servers", BODY)
    again = _kill_and_start(cloud, "create_disk")
    for action in (answer["action"], *answer["next_actions"]):
        ended = again.get(f"/actions/{action['id']}")["action"]
        assert (ended["status"], ended["error"]["code"]) == ("error", "action_failed")
        assert "stopped" in ended["error"]["message"]
    assert again.get("/servers")["servers"] == []
    assert again.get("/primary_ips")["primary_ips"] == []
    again.stop()


def test_a_deletion_cut_short_is_finished(hang: Callable[[str], Cloud]) -> None:
    """The server is gone, though its action is an error."""
    cloud = hang("delete_disk")
    server_id = cloud.make_server()
    cloud.call("DELETE", f"/v1/servers/{server_id}")
    again = _kill_and_start(cloud, "delete_disk")
    assert again.refuse("GET", f"/servers/{server_id}") == (404, "not_found")
    assert again.machines.disks == {}
    assert again.get(f"/servers/{server_id}/actions")["actions"][-1]["status"] == "error"
    again.stop()


def test_a_snapshot_cut_short_is_unavailable(hang: Callable[[str], Cloud]) -> None:
    """What was written of it is freed; the server runs."""
    cloud = hang("snapshot")
    server_id = cloud.make_server()
    image_id = cloud.post(f"/servers/{server_id}/actions/create_image", {})["image"]["id"]
    again = _kill_and_start(cloud, "snapshot")
    assert again.get(f"/images/{image_id}")["image"]["status"] == "unavailable"
    assert ("delete_image", image_id) in again.machines.asked
    wait_until(lambda: again.status(server_id) == "running")
    again.stop()


def test_a_rebuild_cut_short_leaves_a_server_that_can_be_rebuilt(hang: Callable[[str], Cloud]) -> None:
    """Off and without a disk until then."""
    cloud = hang("delete_disk")
    server_id = cloud.make_server()
    cloud.post(f"/servers/{server_id}/actions/rebuild", {"image": "debian-13"})
    again = _kill_and_start(cloud, "delete_disk")
    assert again.status(server_id) == "off"
    again.succeed(f"/servers/{server_id}/actions/rebuild", {"image": "debian-13"})
    assert again.status(server_id) == "running"
    again.stop()


def test_nothing_is_locked_after_a_start(hang: Callable[[str], Cloud]) -> None:
    """An action that was cut short holds nothing any more."""
    cloud = hang("power_off")
    server_id = cloud.make_server()
    cloud.post(f"/servers/{server_id}/actions/poweroff")
    again = _kill_and_start(cloud, "power_off")
    wait_until(lambda: not again.get(f"/servers/{server_id}")["server"]["locked"])
    again.succeed(f"/servers/{server_id}/actions/poweroff")
    again.stop()


def test_a_start_goes_on_where_machines_fail(cloud: Cloud) -> None:
    """One broken server does not keep the others from being found."""
    server_id = cloud.make_server()
    cloud.succeed(f"/servers/{server_id}/actions/poweroff")
    cloud.machines.failing["power_off"] = MachineFailed("stuck")
    cloud.stop()
    again = cloud.start_again()
    assert len(again.get("/servers")["servers"]) == 1
    cloud.machines.failing.clear()
    again.stop()
