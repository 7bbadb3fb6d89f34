"""A disk with no byte left, under a local cloud that runs: it costs what cannot be kept, and nothing that is there."""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hcloud import APIException, Client
from hcloud.images import Image
from hcloud.server_types import ServerType

from scripts.bake.answers import given
from tests.local_cloud.harness import LocalCloud, address_of, running_cloud, ssh, traces

SMALL, DEBIAN = ServerType(name="cx23"), Image(name="debian-13")
DISK_BYTES = 6 << 30  # a pool takes all but two GiB, and two more must be free in it


@pytest.fixture
def disk(host: None, tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, small enough to be filled."""
    image, place = tmp_path / "disk.img", tmp_path / "disk"
    place.mkdir()
    with image.open("wb") as file:
        file.truncate(DISK_BYTES)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


def fill(place: Path) -> Path:
    """Takes all that is free, to the last block."""
    filling = place / "filling"
    with filling.open("wb") as file:
        with suppress(OSError):
            os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(place).free)
        with suppress(OSError):
            file.seek(0, os.SEEK_END)
            while True:
                os.write(file.fileno(), bytes(1 << 20))
    with (place / "filling-too").open("wb") as file, suppress(OSError):
        while True:
            os.write(file.fileno(), bytes(4096))
    assert shutil.disk_usage(place).free == 0
    return filling


def agree(cloud: LocalCloud, client: Client) -> set[str]:
    """The servers' names; records and disks tell of the same servers."""
    servers = client.servers.get_all()
    disks = {path.name for path in (cloud.state / "pool" / "servers").iterdir() if path.name.isdigit()}
    assert disks == {str(server.id) for server in servers}
    return {given(server.name) for server in servers}


def test_a_full_disk_ends_nothing_that_runs(disk: Path, key: Path) -> None:
    """Servers run on though they talk; what is refused is not done; a stop, a start and room make all well."""
    with running_cloud(disk) as cloud:
        client = cloud.client()
        known = client.ssh_keys.create("known", key.with_suffix(".pub").read_text())
        made = [client.servers.create(name, SMALL, DEBIAN, ssh_keys=[known]) for name in ("talks", "goes")]
        for one in made:
            for action in (one.action, *one.next_actions):
                action.wait_until_finished()
        talks, goes = (one.server for one in made)
        address = address_of(talks)
        ssh(key, address, "echo kept > /srv/kept && sync")
        filling = fill(disk)
        ssh(key, address, "for i in $(seq 200); do echo a line that nobody can keep, number $i > /dev/console; done")
        write = "dd if=/dev/zero of=/srv/more bs=1M count=20 2>/dev/null && sync && cat /srv/kept"
        assert ssh(key, address, write) == "kept\n"
        for attempt in range(3):
            with suppress(APIException):
                created = client.servers.create(f"new-{attempt}", SMALL, DEBIAN)
                with suppress(Exception):  # no room for its disk
                    for action in (created.action, *created.next_actions):
                        action.wait_until_finished()
        with suppress(APIException):
            goes.delete().wait_until_finished()
        assert ssh(key, address, "hostname").strip() == "talks"
        assert agree(cloud, client) - {"goes"} == {"talks"}
        # A stop always works; a start may say that there is no room, in one line.
        cloud.process.send_signal(signal.SIGINT)
        assert cloud.process.wait(60) == 0
        with suppress(AssertionError):
            cloud.restart()
        assert "Traceback" not in cloud.output()
        cloud.stop()
        filling.unlink()
        (disk / "filling-too").unlink()
        cloud.restart()
        assert ssh(key, address, "cat /srv/kept").strip() == "kept"
        assert given(client.servers.get_by_name("talks")).status == "running"
        again = client.servers.create("again", SMALL, DEBIAN, start_after_create=False)
        again.action.wait_until_finished()
        assert agree(cloud, client) - {"goes"} == {"talks", "again"}
    assert traces(cloud.state) == {}
