"""A local cloud in process, over the stub of the machines."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import falcon.testing
import pytest

from scripts.local_cloud.api.app import create_app
from scripts.local_cloud.api.faults import Faults
from scripts.local_cloud.api.project import Limits, Project, close_project, open_project
from scripts.local_cloud.store import Store
from tests.hetzner_api import find_operation, problems
from tests.unit.local_cloud.stub_machines import StubMachines

TOKEN = "local"
PUBLIC_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAICH1zDu3S8lQJ2WZhVbVU9lYGKb6bqkNPnNdlo3vYqGp somebody@somewhere"
PATIENCE_S = 5.0

Document = dict[str, Any]


def wait_until(met: Callable[[], Any]) -> Any:
    """What ``met`` returns once it is true; fails after a while."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if result := met():
            return result
        time.sleep(0.002)
    raise AssertionError("it did not come to be in time")


class LocalClient(falcon.testing.TestClient):
    """Asks under the name that the cloud is reached by, unless told otherwise; whatever works has Hetzner's shape."""

    def simulate_request(self, method: str, path: str, **options: Any) -> falcon.testing.Result:
        result = super().simulate_request(method, path, **{"host": "127.0.0.1:8899", **options})
        operation = find_operation(method, path.removeprefix("/v1")) if path.startswith("/v1/") else None
        if operation:
            told = result.json if result.content else None
            assert problems(operation, result.status_code, options.get("json"), told) == []
        return result


@dataclass
class Cloud:
    """A running cloud; a stop and a start keep its folder and its machines."""

    folder: Path
    machines: StubMachines
    limits: Limits
    old_clients: bool
    project: Project
    faults: Faults
    client: falcon.testing.TestClient
    stopped: bool = False

    def call(self, method: str, path: str, body: Document | None = None, /, **query: Any) -> falcon.testing.Result:
        """One request with the token."""
        headers = {"Authorization": f"Bearer {TOKEN}"}
        given = {} if body is None else {"json": body}
        return self.client.simulate_request(method, path, headers=headers, params=query, params_csv=False, **given)

    def get(self, path: str, /, **query: Any) -> Document:
        """The answer to a GET that works."""
        result = self.call("GET", f"/v1{path}", **query)
        assert result.status_code == 200, result.json
        return dict(result.json)

    def post(self, path: str, body: Document | None = None) -> Document:
        """The answer to a POST that works."""
        result = self.call("POST", f"/v1{path}", body)
        assert result.status_code == 201, result.json
        return dict(result.json)

    def refuse(self, method: str, path: str, body: Document | None = None, /, **query: Any) -> tuple[int, str]:
        """Status and code of the error that a request meets."""
        result = self.call(method, f"/v1{path}", body, **query)
        assert set(result.json) == {"error"}, result.json
        assert set(result.json["error"]) == {"code", "message", "details"}
        return result.status_code, result.json["error"]["code"]

    def wait(self, *actions: Document) -> list[Document]:
        """The actions once they have ended."""

        def ended(action_id: int) -> Document | None:
            action = self.get(f"/actions/{action_id}")["action"]
            return action if action["status"] != "running" else None

        return [wait_until(partial(ended, action["id"])) for action in actions]

    def succeed(self, path: str, body: Document | None = None) -> Document:
        """Does an action and returns it, ended well."""
        action = self.wait(self.post(path, body)["action"])[0]
        assert action["status"] == "success", action
        return action

    def make_server(self, name: str = "web", **values: Any) -> int:
        """The id of a server that runs, or is off if told so."""
        answer = self.post("/servers", {"name": name, "server_type": "cx23", "image": "debian-13", **values})
        for action in self.wait(answer["action"], *answer["next_actions"]):
            assert action["status"] == "success", action
        return int(answer["server"]["id"])

    def make_image(self, server_id: int, **values: Any) -> int:
        """The id of a snapshot that is there."""
        answer = self.post(f"/servers/{server_id}/actions/create_image", values)
        assert self.wait(answer["action"])[0]["status"] == "success"
        return int(answer["image"]["id"])

    def status(self, server_id: int) -> str:
        """The status of a server."""
        return str(self.get(f"/servers/{server_id}")["server"]["status"])

    def stop(self) -> None:
        """Stops it as a person would; once is enough."""
        if self.stopped:
            return
        self.stopped = True
        assert close_project(self.project, PATIENCE_S)
        self.faults.close()
        self.project.store.close()

    def start_again(self) -> "Cloud":
        """Another cloud over the same state; a cloud that was not stopped stands for one that was killed."""
        return start(self.folder, self.machines, self.limits, self.old_clients)


def start(folder: Path, machines: StubMachines, limits: Limits, old_clients: bool) -> Cloud:
    """A cloud over what the folder holds."""
    project = open_project(Store(folder / "state.sqlite"), machines, limits=limits, old_clients=old_clients)
    faults = Faults(calls_path=folder / "calls.jsonl")
    project.life.reconcile()
    client = LocalClient(create_app(project, faults, TOKEN))
    return Cloud(folder, machines, limits, old_clients, project, faults, client)


@pytest.fixture
def start_cloud(tmp_path: Path) -> Iterator[Callable[..., Cloud]]:
    """Starts clouds with settings of one's own."""
    clouds: list[Cloud] = []

    def begin(machines: StubMachines | None = None, limits: Limits | None = None, old_clients: bool = False) -> Cloud:
        folder = tmp_path / str(len(clouds))
        folder.mkdir()
        clouds.append(start(folder, machines or StubMachines(), limits or Limits(), old_clients))
        return clouds[-1]

    yield begin
    for each in clouds:
        each.stop()
        assert each.machines.overlaps == [], "two pieces of work on one server overlapped"


@pytest.fixture
def cloud(start_cloud: Callable[..., Cloud]) -> Cloud:
    """A cloud as it is without settings."""
    return start_cloud()
