"""Owns the whole of the local machines: disks, network, containers and metadata behind the Machines interface."""

import fcntl
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import IO

from scripts.local_cloud.machine_interface import FirewallRule, MachineFailed, MachineSpec, PrivateLink, Zone
from scripts.local_cloud.machines import base_image, seed, zone_answers
from scripts.local_cloud.machines.cgroups import ControlGroups
from scripts.local_cloud.machines.container import Containers, Launch, kill_leftovers, machine_name
from scripts.local_cloud.machines.host import check_host
from scripts.local_cloud.machines.host_settings import NAMESPACES
from scripts.local_cloud.machines.metadata import MetadataService
from scripts.local_cloud.machines.name_server import NameServer, parse_resolvers
from scripts.local_cloud.machines.network import Network, tag_of
from scripts.local_cloud.machines.pool import Pool

DEFAULT_CACHE = Path("/var/cache/mini-llm")
DEFAULT_RANGE = "198.18.0.0/16"
_ORDERLY_STOP_S = 10.0
_PRESS_AGAIN_S = 0.5
_WATCH_S = 0.5
_HOST_RESOLVERS = Path("/etc/resolv.conf")
_NSPAWN_RUNTIME = Path("/run/systemd/nspawn")


class LocalMachines:
    """Servers as system containers on this host; see ``Machines`` for what can be done to them.

    ``state`` holds disks, images and consoles; ``cache`` the base image; ``address_range`` is where the servers'
    public IPv4 addresses lie. ``on_off(server_id)`` is called from a thread of its own when a server went off and
    nobody had called ``power_off``. ``log`` takes lines for people. ``forgets_moved_flows``: see ``firewall.table``.
    ``resolvers`` are asked for the names that are in no zone; None stands for those of the host.
    """

    def __init__(
        self,
        state: Path,
        cache: Path = DEFAULT_CACHE,
        address_range: str = DEFAULT_RANGE,
        on_off: Callable[[int], None] = lambda server_id: None,
        log: Callable[[str], None] = lambda line: None,
        forgets_moved_flows: bool = False,
        resolvers: tuple[str, ...] | None = None,
    ) -> None:
        self._state = state.resolve()
        self._cache = cache
        self._log = log
        self.tag = tag_of(self._state)
        self.pool = Pool(self._state, log)
        self.network = Network(self.tag, address_range, log, forgets_moved_flows)
        self._groups = ControlGroups(self.tag, log)
        self._containers = Containers(self._server_ended, on_off, log)
        self._base = ""
        self._specs: dict[int, MachineSpec] = {}
        self._given_resolvers = resolvers
        self._resolvers = [self.network.name_server_address]  # of the servers
        self._zones: dict[str, zone_answers.LoadedZone] = {}  # never changed, but replaced: it is read meanwhile
        self._naming = threading.Lock()
        self._names: NameServer | None = None
        self._metadata: MetadataService | None = None
        self._lock_file: IO[str] | None = None
        self._closing = threading.Event()
        self._watcher: threading.Thread | None = None

    def prepare(self) -> None:
        """Removes what a killed predecessor left, then sets up; builds the base image if there is none.

        Raises HostUnfit if the host cannot do it, MachineFailed if it does not.
        """
        check_host()
        self._state.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._hold()
        self._closing.clear()
        try:
            self._remove_leftovers()
            self._containers.open()
            (self._state / "consoles").mkdir(exist_ok=True)
            self.pool.open()
            image = base_image.current_name()
            self._base = f"base/{image}"
            if not self.pool.exists(self._base):
                self.pool.unpack(base_image.cached_tar(self._cache, self._log), self._base)
            self.pool.keep_only("base", image)
            self.network.open()
            self._names = NameServer(
                NAMESPACES / self.network.namespace,
                self.network.name_server_address,
                lambda: self._zones.values(),
                self._find_resolvers,
                self._is_cut_off,
            )
            self._metadata = MetadataService(
                NAMESPACES / self.network.namespace,
                self._find_by_address,
                lambda: self._resolvers,
                self.network.private.find_interfaces,
            )
        except BaseException:
            try:
                self._take_down()
            except MachineFailed as error:
                self._log(f"while giving up: {error}")
            raise
        self._watcher = threading.Thread(target=self._watch_room, name="pool-watcher", daemon=True)
        self._watcher.start()

    def close(self) -> None:
        """Stops all servers and removes all but disks and images; raises MachineFailed if something stays."""
        if self._lock_file is None:
            return
        self._closing.set()
        try:
            give_up_s = time.monotonic() + _ORDERLY_STOP_S
            while (running := self._containers.all_running()) and time.monotonic() < give_up_s:
                for server_id in running:
                    self._containers.press_power_button(server_id)  # again and again: a young init does not listen yet
                self._containers.wait_off(running[0], _PRESS_AGAIN_S)
            for server_id in running:
                self._log(f"server {server_id} did not power off in {_ORDERLY_STOP_S:g} s; its plug is pulled")
        finally:
            self._take_down()

    def clean(self, also: Iterable[str] = ()) -> None:
        """Removes everything that belongs to the state directory, whoever made it, disks and images too.

        ``also`` are names of further files in it. Nothing is touched while another local cloud runs with it: then it
        raises MachineFailed.
        """
        check_host()
        if not self._state.exists():
            self._remove_leftovers()
            return
        self.close()
        self._hold()
        try:
            self._remove_leftovers()
            self.pool.erase()
            shutil.rmtree(self._state / "consoles", ignore_errors=True)
            for name in also:
                (self._state / name).unlink(missing_ok=True)
        finally:
            self._let_go()
        (self._state / "machines.lock").unlink(missing_ok=True)
        if not any(self._state.iterdir()):
            self._state.rmdir()

    def create_disk(self, server_id: int, image: int | str) -> None:
        if isinstance(image, str) and image != base_image.NAME:
            raise MachineFailed(f"there is no system image {image}")
        self.pool.copy(self._base if isinstance(image, str) else f"images/{image}", f"servers/{server_id}")

    def delete_disk(self, server_id: int) -> None:
        if self.is_running(server_id):
            raise MachineFailed(f"server {server_id} is running")
        self.pool.delete(f"servers/{server_id}")
        self.network.filter(server_id, None)
        self.network.cut_off(server_id, False)
        self.network.private.replace(server_id, ())
        self.console(server_id).unlink(missing_ok=True)

    def start(self, spec: MachineSpec) -> None:
        if self._closing.is_set():
            raise MachineFailed("the local cloud is stopping")
        if self.is_running(spec.server_id):
            raise MachineFailed(f"server {spec.server_id} is running already")
        disk = self.pool.path(f"servers/{spec.server_id}")
        if not disk.is_dir():
            raise MachineFailed(f"server {spec.server_id} has no disk")
        self.pool.make_room()
        seed.write(disk, spec, self._resolvers)
        self._specs[spec.server_id] = spec
        try:
            self.network.add_server(spec)
            self._containers.start(
                Launch(
                    server_id=spec.server_id,
                    machine=machine_name(self.tag, spec.server_id),
                    hostname=spec.name,
                    directory=disk,
                    namespace=NAMESPACES / self.network.server_namespace(spec.server_id),
                    console=self.console(spec.server_id),
                    groups=tuple(self._groups.make(spec.server_id, spec.cores, spec.memory_gb)),
                )
            )
        except MachineFailed:
            if not self.is_running(spec.server_id):
                self._server_ended(spec.server_id)
            raise

    def shutdown(self, server_id: int) -> None:
        self._containers.press_power_button(server_id)

    def power_off(self, server_id: int) -> None:
        self._containers.pull_plug(server_id)

    def is_running(self, server_id: int) -> bool:
        return self._containers.is_running(server_id)

    def wait_off(self, server_id: int, timeout_s: float) -> bool:
        return self._containers.wait_off(server_id, timeout_s)

    def route_address(self, address: str, server_id: int | None) -> None:
        self.network.route(address, server_id)

    def set_firewall(self, server_id: int, rules: tuple[FirewallRule, ...] | None) -> None:
        self.network.filter(server_id, rules)

    def set_private_links(self, server_id: int, links: tuple[PrivateLink, ...]) -> None:
        self.network.private.replace(server_id, links)

    def cut_off(self, server_id: int, cut: bool) -> None:
        self.network.cut_off(server_id, cut)

    def set_zone(self, zone: Zone) -> None:
        loaded = zone_answers.load(zone)
        with self._naming:
            self._zones = {**self._zones, zone.name: loaded}

    def remove_zone(self, name: str) -> None:
        with self._naming:
            self._zones = {other: zone for other, zone in self._zones.items() if other != name}

    def snapshot(self, server_id: int, image_id: int) -> float:
        self.pool.copy(f"servers/{server_id}", f"images/{image_id}")
        return self.pool.held_gb(f"images/{image_id}")

    def delete_image(self, image_id: int) -> None:
        self.pool.delete(f"images/{image_id}")

    def console(self, server_id: int) -> Path:
        """The file that a server's console is written to."""
        return self._state / "consoles" / f"{server_id}.log"

    def _find_by_address(self, address: str) -> MachineSpec | None:
        return next((spec for spec in list(self._specs.values()) if spec.ipv4 == address), None)

    def _find_resolvers(self) -> list[str]:
        """Whom to ask for names that are in no zone; the host's may change while a cloud runs."""
        if self._given_resolvers is not None:
            return list(self._given_resolvers)
        try:
            text = _HOST_RESOLVERS.read_text(errors="replace")
        except OSError:
            return []
        return parse_resolvers(text, self.network.name_server_address)

    def _is_cut_off(self, address: str) -> bool:
        spec = self._find_by_address(address)
        return self.network.is_cut_off(spec.server_id if spec else self.network.find_floating(address))

    def _server_ended(self, server_id: int) -> None:
        for path in _NSPAWN_RUNTIME.glob(f"*/{machine_name(self.tag, server_id)}"):
            shutil.rmtree(path, ignore_errors=True)
        spec = self._specs.pop(server_id, None)
        self.network.remove_server(server_id, spec.ipv6_network if spec else None)
        self._groups.remove(server_id)

    def _watch_room(self) -> None:
        said: type[Exception] | None = None
        while not self._closing.wait(_WATCH_S):
            if not self._containers.all_running():
                continue
            try:
                self.pool.make_room()
                said = None
            except (MachineFailed, OSError) as error:
                if type(error) is not said:  # the numbers in its words change all the time
                    said = type(error)
                    self._log(str(error))

    def _take_down(self) -> None:
        """Removes all but disks and images; goes on after a failure and raises the first in the end."""
        self._closing.set()
        failures: list[MachineFailed] = []
        for server_id in self._containers.all_running():
            _collect(failures, partial(self._containers.pull_plug, server_id))
        if self._watcher is not None:
            self._watcher.join()
            self._watcher = None
        if self._names is not None:
            self._names.close()
            self._names = None
        if self._metadata is not None:
            self._metadata.close()
            self._metadata = None
        _collect(failures, self._remove_leftovers)
        self._containers.close()
        self._let_go()
        if failures:
            raise failures[0]

    def _remove_leftovers(self) -> None:
        servers = [path for path in self.network.namespaces() if path.name != self.network.namespace]
        failures: list[MachineFailed] = []
        _collect(failures, lambda: kill_leftovers(self.tag, servers))
        _collect(failures, self.network.close)
        _collect(failures, self._groups.close)
        _collect(failures, self._remove_locks)
        _collect(failures, self.pool.close)
        if failures:
            raise failures[0]

    def _remove_locks(self) -> None:
        """Takes away what systemd-nspawn itself would if it were not killed."""
        for path in _NSPAWN_RUNTIME.glob(f"*/mlc-{self.tag}-*"):
            shutil.rmtree(path, ignore_errors=True)
        for disk in self.pool.path("servers").glob("[0-9]*"):
            status = disk.stat()
            (_NSPAWN_RUNTIME / "locks" / f"inode-{status.st_dev}:{status.st_ino}").unlink(missing_ok=True)
        if not self.pool.is_read_only():  # then they do no harm: the next start takes the disks writable
            for lock in self.pool.path("servers").glob(".#*.lck"):
                lock.unlink()

    def _hold(self) -> None:
        file = (self._state / "machines.lock").open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.close()
            raise MachineFailed(f"another local cloud runs with {self._state}; end that one first") from error
        self._lock_file = file

    def _let_go(self) -> None:
        if self._lock_file is not None:
            self._lock_file.close()
            self._lock_file = None


def _collect(failures: list[MachineFailed], step: Callable[[], object]) -> None:
    try:
        step()
    except MachineFailed as error:
        failures.append(error)
    except OSError as error:
        failures.append(MachineFailed(str(error)))
