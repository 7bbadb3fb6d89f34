"""Integration tests of the image: one bake for all of them."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hcloud.images import BoundImage
from hcloud.ssh_keys import BoundSSHKey

from scripts.local_cloud.machines.host import HostUnfit, require_tools
from scripts.setup_host import IMAGE
from tests.absent import did_not_run
from tests.image.harness import CONTAINERS, Node, node
from tests.image.kept import kept_image
from tests.image.launch import find_program
from tests.local_cloud.conftest import host, key  # noqa: F401 - fixtures
from tests.local_cloud.harness import LocalCloud, cut_off, running_cloud
from tests.programs import PACKER, PACKER_PLUGIN_HCLOUD, ProgramMissing, obtain


@pytest.fixture(scope="session")
def tools() -> None:
    """What stands in for the world outside; where it is missing, each test says so and what to install."""
    try:
        require_tools(IMAGE)
    except HostUnfit as error:
        did_not_run(error)


@pytest.fixture(scope="session")
def programs(tools: None) -> None:
    """All that a bake and its containers need, built here, where it is missing, and not in the time of a command."""
    try:
        for each in (PACKER, PACKER_PLUGIN_HCLOUD, *CONTAINERS.values()):
            obtain(each)
    except ProgramMissing as error:
        did_not_run(error)


@pytest.fixture(scope="session")
def cloud(host: None, tools: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCloud]:  # noqa: F811
    """A local cloud with what Packer's plugin of 2022 needs."""
    folder = tmp_path_factory.mktemp("image")
    arguments = ("--old-clients", "--requests-per-hour", "100000")
    with running_cloud(folder, *arguments) as running:
        yield running


@pytest.fixture(scope="session")
def image(cloud: LocalCloud, tmp_path_factory: pytest.TempPathFactory) -> BoundImage:
    """The snapshot of a whole bake, all layers on one server, perhaps an earlier run's; nobody reaches the outside."""
    try:
        made = kept_image(cloud, tmp_path_factory.mktemp("packer"), "test-1", "starter")
    except ProgramMissing as error:
        did_not_run(error)
    cut_off(cloud, "*")
    return made


@pytest.fixture(scope="session")
def known(cloud: LocalCloud, key: Path) -> BoundSSHKey:  # noqa: F811
    return cloud.client().ssh_keys.create("known", key.with_suffix(".pub").read_text())


@pytest.fixture(scope="module")
def served(cloud: LocalCloud, image: BoundImage, known: BoundSSHKey, key: Path) -> Iterator[Node]:  # noqa: F811
    """A node that serves."""
    with node(cloud.client(), image, known, key) as made:
        made.wait_ready()
        yield made


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Terraform or OpenTofu with its provider, or a word that the tests did not run."""
    found, why = find_program(tmp_path_factory.mktemp("provider"))
    if found is None:
        did_not_run(why, may_in_ci=True)
    return found
