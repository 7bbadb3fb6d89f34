"""Integration tests of the local cloud: real servers, real clients, one cloud for all that only use it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.local_cloud.machines.host import HostUnfit, check_host, check_image_tools
from tests.absent import did_not_run
from tests.local_cloud.harness import LocalCloud, make_key, running_cloud


@pytest.fixture(scope="session")
def host() -> None:
    """A host that can run servers; where it cannot, each test says so and what to install."""
    try:
        check_host()
        check_image_tools()
    except HostUnfit as error:
        did_not_run(error)


@pytest.fixture(scope="module")
def cloud(host: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCloud]:
    """A cloud for a whole module; its tests clean up after themselves."""
    with running_cloud(tmp_path_factory.mktemp("cloud"), "--requests-per-hour", "100000") as running:
        yield running


@pytest.fixture(scope="session")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A private key; the public one lies beside it."""
    return make_key(tmp_path_factory.mktemp("key"))
