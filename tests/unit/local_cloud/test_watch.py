"""What a person sees in the terminal: what there is, and what has changed since the last look."""

import sys
from pathlib import Path

import pytest

from scripts.local_cloud import __main__ as command_line
from scripts.local_cloud.watch import changes, describe
from tests.unit.local_cloud.conftest import Cloud, wait_until


def test_a_look_tells_servers_images_and_actions(cloud: Cloud) -> None:
    """Each with its state; system images, which never change, are not told."""
    server = cloud.post("/servers", {"name": "web", "server_type": "cx23", "image": "debian-13"})["server"]
    wait_until(lambda: cloud.get(f"/servers/{server['id']}")["server"]["status"] == "running")
    image = cloud.post(f"/servers/{server['id']}/actions/create_image", {"description": "kept"})["image"]
    wait_until(lambda: cloud.get(f"/images/{image['id']}")["image"]["status"] == "available")
    seen = describe(cloud.project)
    address = server["public_net"]["ipv4"]["ip"]
    assert seen["server", server["id"]] == f"web: running, cx23, {address}"
    assert seen["image", image["id"]].startswith("kept: available, ")
    assert {kind for kind, _ in seen} == {"server", "image", "action"}
    assert f"start_server of server {server['id']}: success" in seen.values()


def test_changes_are_told_once() -> None:
    """New, changed, gone; actions only fall out of sight."""
    before = {("server", 1): "a: off", ("server", 2): "b: off", ("action", 3): "x: success"}
    now = {("server", 1): "a: running", ("image", 4): "c: creating"}
    assert changes(before, now) == ["server 1  a: running", "image 4  c: creating", "server 2  gone"]
    assert changes(now, now) == []


def test_descriptions_do_not_steer_the_terminal() -> None:
    """They are anybody's text: an escape is shown as a replacement character."""
    assert changes({}, {("image", 4): "\x1b]0;owned\x07 ü"}) == ["image 4  \ufffd]0;owned\ufffd ü"]


def test_a_terminal_that_is_gone_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is said fails, also again and again, and what is done goes on."""
    full = Path("/dev/full").open("w")  # noqa: SIM115 - closing it fails, as the program's own would
    monkeypatch.setattr(sys, "stdout", full)
    for _ in range(3):
        command_line._show("a line")
    assert sys.stdout is not full
    sys.stdout.close()
    with pytest.raises(OSError, match="No space left"):
        full.close()


@pytest.mark.parametrize("value", ["0", "-1", "many"])
def test_an_allowance_of_nothing_is_refused(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything is touched, as every wrong option."""
    with pytest.raises(SystemExit) as end:
        command_line.main(["run", "--requests-per-hour", value])
    assert end.value.code == 2
    assert "--requests-per-hour" in capsys.readouterr().err
