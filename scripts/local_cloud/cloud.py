"""Owns one local cloud from its start to its end: builds its parts, starts them in order, takes them down again."""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path

from scripts.local_cloud.api.addresses import AddressRanges
from scripts.local_cloud.api.app import create_app
from scripts.local_cloud.api.faults import Faults
from scripts.local_cloud.api.http_server import HttpServer
from scripts.local_cloud.api.project import Limits, Project, close_project, open_project
from scripts.local_cloud.machines.machines import LocalMachines
from scripts.local_cloud.store import Store

# For actions that are under way at the end: while their machines run, and after.
_FIRST_WAIT_S = 5.0
_LAST_WORK_S = 10.0
_STATE_FILES = ("cloud.sqlite3", "cloud.sqlite3-wal", "cloud.sqlite3-shm", "calls.jsonl")


@dataclass(frozen=True)
class CloudSettings:
    """What a cloud is told: where its state and the base image's cache lie, where it listens, what it begins with.

    ``addresses`` are the servers' public ones; ``plan`` is a file of faults; ``old_clients`` answers removed fields;
    ``forgets_moved_flows`` is how firewalls take moved flows; ``resolvers`` are asked for names in no zone, None stands
    for the host's.
    """

    state: Path
    cache: Path
    port: int
    token: str
    addresses: IPv4Network
    requests_per_hour: int
    plan: Path | None
    old_clients: bool
    forgets_moved_flows: bool
    resolvers: tuple[str, ...] | None


@dataclass(frozen=True)
class Cloud:
    """A cloud that runs."""

    endpoint: str
    project: Project
    machines: LocalMachines


@contextmanager
def running_cloud(settings: CloudSettings, log: Callable[[str], None]) -> Iterator[Cloud]:
    """Runs a cloud for as long as the block lasts; disks, images and their record stay.

    Raises HostUnfit, MachineFailed, StoreUnusable, InvalidInput for a plan that is none, OSError for a port in use.
    """
    plan = json.loads(settings.plan.read_text("utf-8")) if settings.plan else None
    projects: list[Project] = []

    def on_off(server_id: int) -> None:
        for project in projects:
            project.life.notice_off(server_id)

    machines = LocalMachines(
        settings.state,
        settings.cache,
        str(settings.addresses),
        on_off,
        log,
        settings.forgets_moved_flows,
        settings.resolvers,
    )
    with ExitStack() as ends:
        machines.prepare()
        ends.callback(machines.close)
        store = Store(settings.state / _STATE_FILES[0])
        ends.callback(store.close)
        faults = Faults(plan, settings.state / "calls.jsonl")
        project = open_project(
            store,
            machines,
            ranges=AddressRanges(settings.addresses, _ipv6_range(settings.state)),
            limits=Limits(requests_per_hour=settings.requests_per_hour),
            old_clients=settings.old_clients,
        )
        # Work under way waits for machines (a guest that reboots may take a minute); without them it ends at once.
        ends.callback(close_project, project, _LAST_WORK_S)
        ends.callback(machines.close)
        ends.callback(close_project, project, _FIRST_WAIT_S)
        ends.callback(faults.close)
        server = HttpServer(create_app(project, faults, settings.token), port=settings.port)
        ends.callback(server.stop)
        project.life.reconcile()
        project.life.watch()
        projects.append(project)
        server.start()
        yield Cloud(server.endpoint, project, machines)


def clean(state: Path, cache: Path, addresses: IPv4Network, log: Callable[[str], None]) -> None:
    """Removes a cloud that does not run, with its servers, snapshots and record. Raises HostUnfit, MachineFailed."""
    LocalMachines(state, cache, str(addresses), log=log).clean(also=_STATE_FILES)


def _ipv6_range(state: Path) -> IPv6Network:
    """A network of one's own for each state directory, so that two clouds on one host do not share addresses."""
    digest = hashlib.sha256(str(state.resolve()).encode()).digest()
    return IPv6Network((int.from_bytes(b"\xfd" + digest[:5] + bytes(10)), 48))
