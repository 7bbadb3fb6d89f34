"""Owns the one project of the local cloud: what all resources share."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from scripts.local_cloud.api.actions import Actions
from scripts.local_cloud.api.addresses import AddressRanges
from scripts.local_cloud.api.catalogue import CATALOGUE, Catalogue
from scripts.local_cloud.api.errors import NotFound, NotUnique
from scripts.local_cloud.api.life import Life
from scripts.local_cloud.machine_interface import Machines
from scripts.local_cloud.store import Store

Document = dict[str, Any]


@dataclass(frozen=True)
class Limits:
    """How much of a thing the project may have, and how many requests an hour."""

    servers: int = 100
    images: int = 200
    floating_ips: int = 100
    firewalls: int = 50
    networks: int = 50
    placement_groups: int = 50
    zones: int = 100
    rrsets_per_zone: int = 1000
    requests_per_hour: int = 3600


@dataclass(frozen=True)
class Project:
    """State, machines and rules; ``old_clients`` adds fields and paths that the real API removed in 2026."""

    store: Store
    actions: Actions
    life: Life
    catalogue: Catalogue
    ranges: AddressRanges
    limits: Limits
    old_clients: bool

    def find(self, kind: str, document_id: int) -> Document:
        """A record of the store; raises NotFound."""
        document = self.store.find(kind, document_id)
        if document is None:
            raise NotFound(f"{kind.replace('_', ' ')} with ID '{document_id}' not found")
        return document

    def require_unique(
        self, others: Iterable[Document], document: Document, field: str, message: str = "name is already used"
    ) -> None:
        """Raises NotUnique if another one has the same value in this field."""
        for other in others:
            if other[field] == document[field] and other["id"] != document.get("id"):
                raise NotUnique(message, field)


def open_project(
    store: Store,
    machines: Machines,
    *,
    catalogue: Catalogue = CATALOGUE,
    ranges: AddressRanges | None = None,
    limits: Limits | None = None,
    old_clients: bool = False,
    workers: int = 8,
) -> Project:
    """The project over a store and machines; nothing runs until its ``life`` is told to reconcile and to watch."""
    actions = Actions(store, workers)
    return Project(
        store=store,
        actions=actions,
        life=Life(store, machines, actions, catalogue),
        catalogue=catalogue,
        ranges=ranges or AddressRanges(),
        limits=limits or Limits(),
        old_clients=old_clients,
    )


def close_project(project: Project, timeout_s: float) -> bool:
    """Stops watching and working, before machines are stopped; tells whether all work ended in time."""
    project.life.close()
    return project.actions.close(timeout_s)
