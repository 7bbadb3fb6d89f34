"""Integration tests of the bake: the real program and Packer, on a local cloud, with a small tree."""

from collections.abc import Iterator

import pytest

from scripts.local_cloud.machines.host import HostUnfit, require_tools
from tests.absent import did_not_run
from tests.bake.harness import Bench, running_bench
from tests.local_cloud.conftest import host  # noqa: F401 - a fixture
from tests.programs import ProgramMissing


@pytest.fixture(scope="module")
def bench(host: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:  # noqa: F811
    """A cloud, a small tree and Packer; tests leave it as they found it."""
    try:
        require_tools({"git": "git"})
        with running_bench(tmp_path_factory.mktemp("bake")) as made:
            yield made
    except (HostUnfit, ProgramMissing) as error:
        did_not_run(error)
