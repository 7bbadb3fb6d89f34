"""Owns the words between the API and the machines behind it: what a server is made of, and what can be done to it."""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class MachineSpec:
    """All that a server needs at power-on; the API keeps it and hands it over each time.

    ``ipv4`` is the public address; ``ipv6_network`` the /64 whose address ``::1`` the server has; None where it has
    none. ``public_keys`` are OpenSSH lines for root. ``root_password`` is None if keys were given.
    """

    server_id: int
    name: str
    ipv4: str | None
    ipv6_network: str | None
    public_keys: tuple[str, ...]
    root_password: str | None
    user_data: str
    cores: int
    memory_gb: float
    location: str


class Machines(Protocol):
    """Servers and images by the ids that the API gave them; any method may be called from any thread.

    Two calls for the same server never overlap: the API locks it. Every method raises MachineFailed with one line
    for people if the host does not do what is asked; PoolFull, a kind of it, if the disk is full.
    """

    def create_disk(self, server_id: int, image: int | str) -> None:
        """Makes a server's disk from a snapshot (its id) or a system image (its name, such as ``debian-13``)."""
        ...

    def delete_disk(self, server_id: int) -> None:
        """Removes the disk of a server that is off; one that is not there is no error."""
        ...

    def start(self, spec: MachineSpec) -> None:
        """Powers on; returns once the machine's init runs, long before SSH answers."""
        ...

    def shutdown(self, server_id: int) -> None:
        """Presses the power button and returns at once; the server goes off when its own programs have ended."""
        ...

    def power_off(self, server_id: int) -> None:
        """Pulls the plug; returns once the machine is off. One that is off already is no error."""
        ...

    def is_running(self, server_id: int) -> bool: ...

    def wait_off(self, server_id: int, timeout_s: float) -> bool:
        """Waits until a machine is off; tells whether it is."""
        ...

    def snapshot(self, server_id: int, image_id: int) -> float:
        """Copies a disk into an image; returns what the image holds, in GB. Works on a running machine too."""
        ...

    def delete_image(self, image_id: int) -> None:
        """Removes an image; one that is not there is no error."""
        ...


class MachineFailed(Exception):
    """The host did not do what was asked."""


class PoolFull(MachineFailed):
    """There is no room for another disk or image."""
