"""A stub of the machines: servers and images that exist in memory only, instantaneous or slow on demand."""

import threading
import time
from dataclasses import dataclass, field

from scripts.local_cloud.machine_interface import FirewallRule, MachineFailed, MachineSpec, PrivateLink, Zone


@dataclass
class StubMachines:
    """Remembers what it was asked for; ``delays_s`` slow a method down, ``failing`` maps it to what it fails with,
    ``hanging`` to what it waits for before it fails.
    """

    delays_s: dict[str, float] = field(default_factory=dict)
    hanging: dict[str, threading.Event] = field(default_factory=dict)
    failing: dict[str, MachineFailed] = field(default_factory=dict)
    obeys_button: bool = True
    image_size_gb: float = 1.25
    disks: dict[int, int | str] = field(default_factory=dict)
    images: set[int] = field(default_factory=set)
    running: dict[int, MachineSpec] = field(default_factory=dict)
    asked: list[tuple[str, int]] = field(default_factory=list)
    overlaps: list[int] = field(default_factory=list)
    routes: dict[str, int | None] = field(default_factory=dict)
    filters: dict[int, tuple[FirewallRule, ...] | None] = field(default_factory=dict)
    private: dict[int, tuple[PrivateLink, ...]] = field(default_factory=dict)
    cut: set[int] = field(default_factory=set)
    zones: dict[str, Zone] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._busy: set[int] = set()

    def _ask(self, method: str, subject: int) -> None:
        with self._lock:
            self.asked.append((method, subject))
            if subject in self._busy:
                self.overlaps.append(subject)
            self._busy.add(subject)
        try:
            time.sleep(self.delays_s.get(method, 0))
            if method in self.hanging:
                self.hanging[method].wait()
                raise MachineFailed("whoever asked was killed")
            if method in self.failing:
                raise self.failing[method]
        finally:
            with self._lock:
                self._busy.discard(subject)

    def create_disk(self, server_id: int, image: int | str) -> None:
        self._ask("create_disk", server_id)
        if isinstance(image, int) and image not in self.images:
            raise MachineFailed(f"there is no image {image}")
        self.disks[server_id] = image

    def delete_disk(self, server_id: int) -> None:
        self._ask("delete_disk", server_id)
        assert server_id not in self.running, "the disk of a running machine was deleted"
        self.disks.pop(server_id, None)
        self.filters.pop(server_id, None)
        self.private.pop(server_id, None)
        self.cut.discard(server_id)

    def start(self, spec: MachineSpec) -> None:
        self._ask("start", spec.server_id)
        assert spec.server_id in self.disks, "a machine without a disk was started"
        assert spec.server_id not in self.running, "a running machine was started"
        self.running[spec.server_id] = spec

    def shutdown(self, server_id: int) -> None:
        self._ask("shutdown", server_id)
        if self.obeys_button:
            self.running.pop(server_id, None)

    def power_off(self, server_id: int) -> None:
        self._ask("power_off", server_id)
        self.running.pop(server_id, None)

    def is_running(self, server_id: int) -> bool:
        self._ask("is_running", server_id)
        return server_id in self.running

    def wait_off(self, server_id: int, timeout_s: float) -> bool:
        self._ask("wait_off", server_id)
        return server_id not in self.running

    def route_address(self, address: str, server_id: int | None) -> None:
        self._ask("route_address", server_id or 0)
        assert server_id is None or server_id in self.disks, "an address was led to a server that is not there"
        self.routes[address] = server_id

    def set_firewall(self, server_id: int, rules: tuple[FirewallRule, ...] | None) -> None:
        self._ask("set_firewall", server_id)
        assert server_id in self.disks, "the traffic of a server that is not there was filtered"
        self.filters[server_id] = rules

    def set_private_links(self, server_id: int, links: tuple[PrivateLink, ...]) -> None:
        self._ask("set_private_links", server_id)
        assert server_id in self.disks, "a server that is not there was connected"
        self.private[server_id] = links

    def cut_off(self, server_id: int, cut: bool) -> None:
        self._ask("cut_off", server_id)
        assert server_id in self.disks, "a server that is not there was cut off"
        (self.cut.add if cut else self.cut.discard)(server_id)

    def set_zone(self, zone: Zone) -> None:
        self._ask("set_zone", -1)
        self.zones[zone.name] = zone

    def remove_zone(self, name: str) -> None:
        self._ask("remove_zone", -1)
        self.zones.pop(name, None)

    def snapshot(self, server_id: int, image_id: int) -> float:
        self._ask("snapshot", server_id)
        assert server_id in self.disks, "a machine without a disk was copied"
        self.images.add(image_id)
        return self.image_size_gb

    def delete_image(self, image_id: int) -> None:
        self._ask("delete_image", image_id)
        self.images.discard(image_id)
