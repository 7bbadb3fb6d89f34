"""Integration tests of the bake: the real program and Packer, on a local cloud, with a small tree."""

import os
from collections.abc import Iterator

import pytest

from scripts.local_cloud.machines.host import HostUnfit, require_tools
from tests.bake.fault_plan import Clean, record
from tests.bake.harness import Bench, running_bench
from tests.local_cloud.conftest import host  # noqa: F401 - a fixture
from tests.programs import ProgramMissing


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/bake" in str(item.path):
            item.add_marker(pytest.mark.integration)
            item.add_marker(pytest.mark.timeout(900))


@pytest.fixture(scope="module")
def bench(host: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:  # noqa: F811
    """A cloud, a small tree and Packer; tests leave it as they found it."""
    try:
        require_tools({"git": "git"})
        with running_bench(tmp_path_factory.mktemp("bake"), addresses="198.19.9.0/24") as made:
            yield made
    except (HostUnfit, ProgramMissing) as error:
        if os.environ.get("CI"):
            raise  # there it must run
        pytest.skip(f"did not run: {error}")


@pytest.fixture(scope="module")
def clean(bench: Bench) -> Clean:
    """What a bake does that nothing befalls."""
    return record(bench)
