"""Integration tests of the bake: the real program and Packer, on a local cloud, with a small tree."""

from collections.abc import Iterator

import pytest

from scripts.local_cloud.machines.host import HostUnfit, require_tools
from tests.absent import did_not_run
from tests.bake.harness import Bench, running_bench
from tests.local_cloud.conftest import host  # noqa: F401 - a fixture
from tests.programs import PACKER, PACKER_PLUGIN_HCLOUD, ProgramMissing, obtain


@pytest.fixture(scope="session")
def packer(host: None) -> None:  # noqa: F811
    """What bakes; built here, where it is missing, and not within the time of a command that needs it."""
    try:
        require_tools({"git": "git"})
        for each in (PACKER, PACKER_PLUGIN_HCLOUD):
            obtain(each)
    except (HostUnfit, ProgramMissing) as error:
        did_not_run(error)


@pytest.fixture(scope="module")
def bench(packer: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """A cloud, a small tree and Packer; tests leave it as they found it."""
    with running_bench(tmp_path_factory.mktemp("bake")) as made:
        yield made
