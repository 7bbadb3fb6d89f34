"""A deployment on the local cloud's API in process, seen by bake's calls."""

from collections.abc import Callable

import pytest

from scripts.bake.snapshots import Snapshot
from tests.unit.bake.conftest import cloud, local, make_snapshot, way  # noqa: F401 - fixtures
from tests.unit.local_cloud.conftest import Cloud as LocalCloud
from tests.unit.local_cloud.conftest import start_cloud  # noqa: F401 - a fixture

OWN = {"product": "mini-llm", "deployment": "mini-llm"}


@pytest.fixture
def two_nodes(local: LocalCloud, make_snapshot: Callable[..., Snapshot]) -> Snapshot:  # noqa: F811
    """Two nodes of the deployment, one of another, and an address that leads to the first."""
    image = make_snapshot(version="1.2", verified_at="20261126T120000Z", stable="1")
    make_snapshot(version="0.9")
    first = local.make_server("mini-llm-a", image=str(image.id), labels=OWN)
    local.make_server("mini-llm-b", image=str(image.id), labels=OWN)
    local.make_server("other", image=str(image.id), labels={**OWN, "deployment": "other"})
    body = {"type": "ipv4", "name": "mini-llm-ipv4", "labels": OWN, "server": first}
    made = local.post("/floating_ips", body)
    local.wait(made["action"])
    local.succeed(f"/floating_ips/{made['floating_ip']['id']}/actions/change_protection", {"delete": True})
    return image
