"""Bake's own calls against the local cloud's API in process, over the stub of the machines."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests
from requests.adapters import BaseAdapter

from scripts.bake import cloud as cloud_module
from scripts.bake.cloud import Access, Cloud
from scripts.bake.snapshots import Snapshot, read_snapshot
from tests.unit.local_cloud.conftest import Cloud as LocalCloud
from tests.unit.local_cloud.conftest import start_cloud  # noqa: F401 - a fixture


class InProcess(BaseAdapter):
    """Hands requests to a local cloud's application; ``faults`` are taken one a call, None lets it pass."""

    def __init__(self, local: LocalCloud):
        super().__init__()
        self._local = local
        self.faults: list[Callable[[requests.PreparedRequest], requests.Response | None] | None] = []
        self.calls: list[str] = []

    def send(self, request: requests.PreparedRequest, *words: Any, **options: Any) -> requests.Response:
        path, _, query = request.path_url.partition("?")
        self.calls.append(f"{request.method} {path}")
        fault = self.faults.pop(0) if self.faults else None
        if fault is not None and (answer := fault(request)) is not None:
            return answer
        body = request.body.encode() if isinstance(request.body, str) else request.body
        result = self._local.client.simulate_request(
            request.method, path, query_string=query, headers=dict(request.headers), body=body
        )
        return as_response(request, result.status_code, result.content, dict(result.headers))

    def close(self) -> None:
        """Nothing is held open."""


def as_response(
    request: requests.PreparedRequest, status: int, content: bytes, headers: dict[str, str]
) -> requests.Response:
    """What requests would make of an answer."""
    response = requests.Response()
    response.status_code, response.url, response.request = status, request.url or "", request
    response.headers.update(headers)
    response.raw = io.BytesIO(content)
    return response


@pytest.fixture
def local(start_cloud: Callable[..., LocalCloud]) -> LocalCloud:  # noqa: F811
    """A local cloud without servers."""
    return start_cloud()


@pytest.fixture
def way(local: LocalCloud) -> InProcess:
    """The way of bake's calls, on which faults can be laid."""
    return InProcess(local)


@pytest.fixture
def cloud(way: InProcess, monkeypatch: pytest.MonkeyPatch) -> Cloud:
    """Bake's view of it, which does not really wait."""
    monkeypatch.setattr(cloud_module.time, "sleep", lambda seconds: None)
    made = Cloud(Access("http://127.0.0.1:8899/v1", "local"), patience_s=5.0)
    made.client._client._session.mount("http://", way)
    return made


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """An empty state folder."""
    folder = tmp_path / "state"
    (folder / "runs").mkdir(parents=True)
    (folder / "reports").mkdir()
    return folder


@pytest.fixture
def make_snapshot(local: LocalCloud, cloud: Cloud) -> Callable[..., Snapshot]:
    """Makes snapshots with labels of one's own; underscores in names stand for dashes."""
    server = local.make_server("origin")

    def make(**labels: str) -> Snapshot:
        told = {"product": "mini-llm", "layer": "service", "version": "1", "model": "starter", **labels}
        number = local.make_image(server, labels={name.replace("_", "-"): value for name, value in told.items()})
        return read_snapshot(cloud.client.images.get_by_id(number))

    return make
