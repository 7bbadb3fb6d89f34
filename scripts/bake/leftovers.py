"""Owns what dead runs leave at the cloud: how it is told from all else, and its removal.

A thing is a leftover if a run made it, by its label, or by its name where it has none, and that run is over. Whatever
has neither, and whatever a run has finished (a verified image, a whole layer), is not looked at.
"""

import logging
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from hcloud.servers import BoundServer
from hcloud.ssh_keys import BoundSSHKey

from scripts.bake.answers import given
from scripts.bake.cloud import Cloud
from scripts.bake.errors import BakeError
from scripts.bake.runs import Run, is_over, run_of_server
from scripts.bake.snapshots import PRODUCT, Snapshot

_log = logging.getLogger(__name__)
_DELETE_PATIENCE_S = 900.0
# Ctrl-C while a server was asked for: the cloud makes it all the same, a little later.
_UNANSWERED_S, _LOOK_EVERY_S = 15.0, 1.0


@dataclass(frozen=True)
class Leftovers:
    """What goes."""

    servers: list[BoundServer]
    keys: list[BoundSSHKey]
    snapshots: list[Snapshot]

    def __len__(self) -> int:
        return len(self.servers) + len(self.keys) + len(self.snapshots)

    def lines(self) -> list[str]:
        """One for each, for a person."""
        return [
            *(f"server {each.name} ({each.id})" for each in self.servers),
            *(f"SSH key {each.name} ({each.id})" for each in self.keys),
            *(f"snapshot {each.id}, {each.layer or 'no layer'}, {each.description}" for each in self.snapshots),
        ]


def _run_of(thing: BoundServer | BoundSSHKey) -> str | None:
    labels = thing.labels or {}
    if labels.get("product") == PRODUCT and "run" in labels:
        return str(labels["run"])
    return run_of_server(given(thing.name))


def find_leftovers(cloud: Cloud, state: Path, spared_inputs: Collection[str] = ()) -> Leftovers:
    """What runs that are over have left; whole snapshots of the inputs that are spared are somebody's who goes on."""

    def over(run: str | None) -> bool:
        return run is not None and is_over(state, run)

    return Leftovers(
        [each for each in cloud.servers() if over(_run_of(each))],
        [each for each in cloud.ssh_keys() if over(_run_of(each))],
        [
            each
            for each in cloud.snapshots()
            if _is_unfinished(each)
            and (over(each.run) or (each.deadline_s is not None and each.deadline_s < time.time()))
            and not (each.input in spared_inputs and each.status == "available")
        ],
    )


def _is_unfinished(snapshot: Snapshot) -> bool:
    return snapshot.deadline_s is not None and snapshot.verified_at is None


def remove(cloud: Cloud, leftovers: Leftovers) -> list[str]:
    """Removes them, servers first; a line for each that could not be, for the next sweep comes to it again."""
    problems = []
    end_s = time.time() + _DELETE_PATIENCE_S
    things: tuple[BoundServer | BoundSSHKey | Snapshot, ...] = (
        *leftovers.servers,
        *leftovers.keys,
        *leftovers.snapshots,
    )
    for thing in things:
        try:
            if isinstance(thing, Snapshot):
                _remove_snapshot(cloud, thing)
            elif isinstance(thing, BoundServer):
                cloud.delete_server(thing, end_s)
            else:
                cloud.delete_key(thing)
        except BakeError as error:
            problems.append(str(error))
    return problems


def _remove_snapshot(cloud: Cloud, seen: Snapshot) -> None:
    """Looks once more: a bake may have adopted or finished it meanwhile."""
    now = cloud.snapshot(seen.id)
    if now is None or not _is_unfinished(now) or now.run != seen.run or now.deadline_s != seen.deadline_s:
        return
    cloud.delete_snapshot(now)


def servers_of(cloud: Cloud, run: Run) -> list[BoundServer]:
    """The servers of a run."""
    return [each for each in cloud.servers() if _run_of(each) == run.id]


def take_back(cloud: Cloud, run: Run) -> list[str]:
    """Removes a run's own servers and keys, and snapshots of it that did not become whole; problems as lines."""
    try:
        end_s = time.monotonic() + (_UNANSWERED_S if cloud.unanswered else 0.0)
        while not servers_of(cloud, run) and time.monotonic() < end_s:
            time.sleep(_LOOK_EVERY_S)
        own = Leftovers(
            servers_of(cloud, run),
            [each for each in cloud.ssh_keys() if _run_of(each) == run.id],
            [
                each
                for each in cloud.snapshots()
                if each.run == run.id and _is_unfinished(each) and each.status == "unavailable"
            ],
        )
    except BakeError as error:
        return [str(error)]
    return remove(cloud, own)


def describe(problems: Iterable[str]) -> str:
    """What to say of what could not be removed."""
    return f"not removed, bake.py sweep will: {'; '.join(problems)}"
