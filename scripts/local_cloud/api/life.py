"""Owns the life of servers: what each action does to machine and record, and what a start of the cloud sets right."""

import logging
import sqlite3
import threading
from collections import defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from scripts.local_cloud.api import attachments
from scripts.local_cloud.api.actions import ActionFailed, Actions, Step
from scripts.local_cloud.api.catalogue import Catalogue
from scripts.local_cloud.api.firewall_rules import delist, enlist, find_effective_rules, forget_server
from scripts.local_cloud.api.record_sets import serve
from scripts.local_cloud.machine_interface import MachineFailed, Machines, MachineSpec
from scripts.local_cloud.store import Store

Document = dict[str, Any]

_log = logging.getLogger(__name__)
# A guest that has not obeyed the power button by then is rebooted the hard way.
_REBOOT_PATIENCE_S = 30.0
_WATCH_INTERVAL_S = 0.2
# A server whose button was pressed is looked at each time, any other one this rarely.
_SLOW_ROUNDS = 5


class Life:
    """Does the work of actions on servers; two pieces of work on one server never overlap.

    Ends that others rely on: a server whose creation fails or is cut short is gone; one whose rebuild is has no disk
    and stays off until the next rebuild; one whose deletion is cut short is gone after the next start; an image that
    could not be written is ``unavailable``; an attachment to a network that is cut short is gone; a zone that could not
    be published has the status ``error``. Whatever went wrong with floating IPs, firewalls, networks and zones, the
    next start of the cloud tells the machines anew what the records say.
    """

    def __init__(self, store: Store, machines: Machines, actions: Actions, catalogue: Catalogue):
        self._store, self._machines, self._actions, self._catalogue = store, machines, actions, catalogue
        self._guards: defaultdict[int, threading.Lock] = defaultdict(threading.Lock)
        self._routing = threading.Lock()  # taken after a guard, never before
        self._cutting = threading.Lock()  # the same
        self._publishing = threading.Lock()  # the same
        self._cut_names: tuple[str, ...] = ()
        self._pressed: set[int] = set()
        self._stopping = threading.Event()
        self._watcher: threading.Thread | None = None

    def make(self, server_id: int, image: int | str) -> None:
        """Gives a new server its disk; ``image`` is a snapshot's id or a system image's name."""
        with self._guard(server_id):
            self._machines.create_disk(server_id, image)
            self._change(server_id, has_disk=True, status="off")

    def remove(self, server_id: int) -> None:
        """Ends a server: its machine, its disk, its record; its addresses go with it or become free."""
        with self._guard(server_id):
            self._machines.power_off(server_id)
            self._machines.delete_disk(server_id)
            self._free_floating_ips(server_id)
            with self._store.transaction():
                forget_server(self._store, server_id)
                attachments.forget_server(self._store, server_id)
                for address in self._store.read_all("primary_ip"):
                    if address["assignee_id"] != server_id:
                        continue
                    if address["auto_delete"]:
                        self._store.delete("primary_ip", address["id"])
                    else:
                        self._store.change("primary_ip", address["id"], assignee_id=None)
                self._store.delete("server", server_id)
        self._pressed.discard(server_id)

    def start(self, server_id: int) -> None:
        """Powers on; one that runs is left as it is."""
        with self._guard(server_id):
            self._start(server_id)

    def power_off(self, server_id: int) -> None:
        """Pulls the plug."""
        with self._guard(server_id):
            self._machines.power_off(server_id)
            self._change(server_id, status="off", power="off")

    def press_button(self, server_id: int) -> None:
        """Asks the guest to shut down; the server is off when the guest has obeyed, which may be never."""
        with self._guard(server_id):
            if self._find(server_id)["status"] == "running":
                self._machines.shutdown(server_id)
                self._pressed.add(server_id)

    def reboot(self, server_id: int) -> None:
        """Presses the button, waits, and powers on again; one that is off stays off."""
        with self._guard(server_id):
            if self._find(server_id)["status"] != "running":
                return
            self._machines.shutdown(server_id)
            if not self._machines.wait_off(server_id, _REBOOT_PATIENCE_S):
                self._machines.power_off(server_id)
            self._change(server_id, status="starting")
            self._start(server_id)

    def reset(self, server_id: int) -> None:
        """Pulls the plug and powers on."""
        with self._guard(server_id):
            self._machines.power_off(server_id)
            self._change(server_id, status="starting", power="on")
            self._start(server_id)

    def rebuild(self, server_id: int, image: int | str, **values: Any) -> None:
        """Replaces the disk by one made of the image, changes these values of the record, and powers on."""
        with self._guard(server_id):
            self._machines.power_off(server_id)
            self._change(server_id, has_disk=False, power="off")
            self._machines.delete_disk(server_id)
            self._machines.create_disk(server_id, image)
            self._change(server_id, has_disk=True, power="on", **values)
            self._start(server_id)

    def snapshot(self, server_id: int, image_id: int) -> None:
        """Writes a server's disk into an image."""
        with self._guard(server_id):
            if not self._find(server_id)["has_disk"]:
                raise ActionFailed("the server has no disk: its last rebuild failed")
            size_gb = self._machines.snapshot(server_id, image_id)
            self._store.change("image", image_id, status="available", image_size=round(size_gb, 4))

    def spoil_image(self, image_id: int) -> None:
        """The end of an image that could not be written; its record stays until somebody deletes it."""
        self._store.change("image", image_id, status="unavailable")
        self._machines.delete_image(image_id)

    def delete_image(self, image_id: int) -> None:
        """Frees what a deleted image holds; what fails now is tried again at the next start."""
        try:
            self._machines.delete_image(image_id)
            self._store.change("image", image_id, has_data=False)
        except (MachineFailed, sqlite3.Error) as error:
            _log.warning("image %d may still hold room: %s", image_id, error)

    def route(self, floating_ip_id: int, server_id: int | None) -> None:
        """Leads a floating IP to a server, or to nobody."""
        with self._guard(server_id) if server_id is not None else nullcontext(), self._routing:
            record = self._store.find("floating_ip", floating_ip_id)
            if record is None:
                raise ActionFailed("the floating IP is gone")
            if server_id is not None:
                self._find(server_id)
            self._machines.route_address(record["ip"], server_id)
            self._store.change("floating_ip", floating_ip_id, server_id=server_id)

    def filter(self, server_id: int) -> None:
        """Makes a server's firewalls hold as their records are; without a disk they hold from the next start on."""
        with self._guard(server_id):
            self._filter(server_id)

    def take_firewall(self, server_id: int, firewall_id: int) -> None:
        """Ends that a firewall is applied to a server; it stays if the machine could not be told."""
        with self._guard(server_id):
            delist(self._store, firewall_id, server_id)
            try:
                self._filter(server_id)
            except MachineFailed:
                enlist(self._store, firewall_id, server_id)
                raise

    def connect(self, server_id: int) -> None:
        """Makes a server's private networks hold as their records are; without a disk they hold from the next start."""
        with self._guard(server_id):
            self._connect(server_id)

    def attach(self, server_id: int, attachment_id: int) -> None:
        """Attaches a server to a network; where that fails it is not attached, and the record is gone."""
        with self._guard(server_id):
            try:
                self._connect(server_id)
            except MachineFailed:
                attachments.delist(self._store, attachment_id)
                self._try(self._connect, server_id)
                raise
            attachments.settle(self._store, attachment_id)

    def detach(self, attachment: Document) -> None:
        """Ends an attachment; it stays if the machine could not be told."""
        server_id = attachment["server_id"]
        with self._guard(server_id):
            attachments.delist(self._store, attachment["id"])
            try:
                self._connect(server_id)
            except MachineFailed:
                attachments.put_back(self._store, attachment)
                raise

    def publish(self, zone_id: int) -> None:
        """Has a zone answered as its record is."""
        with self._publishing:
            zone = self._store.find("zone", zone_id)
            if zone is None:
                raise ActionFailed("the zone is gone")
            self._machines.set_zone(serve(zone))
            with self._store.transaction():
                now = self._store.find("zone", zone_id)
                # What was changed meanwhile has an action of its own, which publishes it.
                if now is not None and now["serial"] == zone["serial"]:
                    self._store.change("zone", zone_id, status="ok")

    def note_unpublished(self, zone_id: int) -> None:
        """The end of a change that was not published: it stands on record, and the next one publishes it too."""
        self._store.change("zone", zone_id, status="error")

    def remove_zone(self, zone_id: int) -> None:
        """Ends a zone: its name is not known any more, and its record is gone."""
        with self._publishing:
            zone = self._store.find("zone", zone_id)
            if zone is None:
                raise ActionFailed("the zone is gone")
            self._machines.remove_zone(zone["name"])
            self._store.delete("zone", zone_id)

    @property
    def cut_names(self) -> tuple[str, ...]:
        """The names of servers that are cut off from the outside; ``*`` stands for all."""
        return self._cut_names

    def cut_off(self, names: Sequence[str]) -> None:
        """Cuts the servers of these names off from the outside, those to come too, and connects all others again.

        Raises MachineFailed.
        """
        with self._cutting:
            self._cut_names = tuple(names)
            for server in self._store.read_all("server"):
                if server["has_disk"]:
                    self._machines.cut_off(server["id"], self._is_cut(server))

    def settle(self, server_id: int) -> None:
        """Sets the record to what the machine is, after something failed."""
        with self._guard(server_id):
            server = self._store.find("server", server_id)
            if server is not None:
                running = server["has_disk"] and self._machines.is_running(server_id)
                self._change(server_id, status="running" if running else "off", power="on" if running else "off")

    def reconcile(self) -> None:
        """Ends what a stop of the cloud cut short, and begins to start the servers that were on.

        Call it once, before the first request is answered.
        """
        ended = [action for action in self._actions.end_interrupted() if action["command"] == "create_server"]
        half_made = {resource["id"] for action in ended for resource in action["resources"]}
        for image in self._store.read_all("image"):
            if image["status"] == "creating":
                self._try(self.spoil_image, image["id"])
            elif image["deleted"] and image["has_data"]:
                self.delete_image(image["id"])
        for address in self._store.read_all("floating_ip"):
            if address["server_id"] is not None:
                self._try(self._route_anew, address["id"])
        for zone in self._store.read_all("zone"):
            self._try(self.publish, zone["id"])
        attachments.forget_pending(self._store)
        for firewall in self._store.read_all("firewall"):
            self._store.change("firewall", firewall["id"], pending=[])
        for server in self._store.read_all("server"):
            if server["id"] in half_made or server["status"] in ("initializing", "deleting"):
                self._try(self.remove, server["id"])
            elif server["power"] == "on" and server["has_disk"]:
                self._change(server["id"], status="starting")
                self.begin_start(server["id"])
            else:
                self._try(self.power_off, server["id"])

    def begin_start(self, server_id: int) -> None:
        """Begins an action that powers on."""
        resource = ("server", server_id)
        step = Step("start_server", (resource,), lambda: self.start(server_id), lambda: self.settle(server_id))
        self._actions.begin([step], hold=[resource])

    def watch(self) -> None:
        """Begins to notice servers that go off by themselves, until ``close``."""
        self._watcher = threading.Thread(target=self._watch, name="watch-servers", daemon=True)
        self._watcher.start()

    def close(self) -> None:
        """Ends the watch; machines that are stopped after that count as on and are started again next time."""
        self._stopping.set()
        if self._watcher:
            self._watcher.join()

    def cut_power(self, name: str) -> None:
        """Pulls a server's plug behind the API's back; that it is off is noticed as any other end is."""
        for server in self._store.read_all("server"):
            if server["name"] == name:
                with self._guard(server["id"]):
                    self._try(self._machines.power_off, server["id"])

    def notice_off(self, server_id: int) -> None:
        """Looks whether a running server's machine is off by now, unless an action is busy with it.

        Machines may call it as soon as one went off by itself; without that the watch finds out within a second.
        """
        if self._stopping.is_set():
            return
        guard = self._guard(server_id)
        if not guard.acquire(blocking=False):
            return
        try:
            if self._machines.is_running(server_id):
                return
            with self._store.transaction():
                server = self._store.find("server", server_id)
                # An action that began meanwhile waits for the guard, and finds a server that runs.
                locked = self._actions.is_locked(("server", server_id))
                if server and server["status"] == "running" and not locked and not self._stopping.is_set():
                    self._change(server_id, status="off", power="off")
                    self._pressed.discard(server_id)
        except MachineFailed as error:
            _log.warning("whether server %d is on cannot be told: %s", server_id, error)
        except sqlite3.Error as error:
            _log.debug("that server %d is off is written down later: %s", server_id, error)
        finally:
            guard.release()

    def _watch(self) -> None:
        number = 0
        while not self._stopping.wait(_WATCH_INTERVAL_S):
            number += 1
            try:
                servers = self._store.read_all("server")
            except sqlite3.Error:  # a full disk can keep even a reader out, for a while
                continue
            for server in servers:
                due = server["id"] in self._pressed or number % _SLOW_ROUNDS == 0
                if due and server["status"] == "running" and not self._stopping.is_set():
                    self.notice_off(server["id"])

    def _guard(self, server_id: int) -> threading.Lock:
        with self._store.hold():
            return self._guards[server_id]

    def _find(self, server_id: int) -> Document:
        server = self._store.find("server", server_id)
        if server is None:
            raise ActionFailed("the server is gone")
        return server

    def _change(self, server_id: int, **values: Any) -> None:
        self._store.change("server", server_id, **values)

    def _start(self, server_id: int) -> None:
        server = self._find(server_id)
        if not server["has_disk"]:
            raise ActionFailed("the server has no disk: its last rebuild failed, rebuild it again")
        # Before the machine starts: nothing gets through that should not, and a filter that failed keeps it off.
        rules = find_effective_rules(self._store, server)
        if rules is not None:
            self._machines.set_firewall(server_id, rules)
        if links := attachments.find_links(self._store, server_id):
            self._machines.set_private_links(server_id, links)
        with self._cutting:
            if self._cut_names:
                self._machines.cut_off(server_id, self._is_cut(server))
        if not self._machines.is_running(server_id):
            self._machines.start(self._specify(server))
        self._pressed.discard(server_id)
        self._change(server_id, status="running", power="on")

    def _is_cut(self, server: Document) -> bool:
        return "*" in self._cut_names or server["name"] in self._cut_names

    def _filter(self, server_id: int) -> None:
        server = self._store.find("server", server_id)
        if server is not None and server["has_disk"]:
            self._machines.set_firewall(server_id, find_effective_rules(self._store, server))

    def _connect(self, server_id: int) -> None:
        server = self._store.find("server", server_id)
        if server is not None and server["has_disk"]:
            self._machines.set_private_links(server_id, attachments.find_links(self._store, server_id))

    def _free_floating_ips(self, server_id: int) -> None:
        with self._routing:
            for address in self._store.read_all("floating_ip"):
                if address["server_id"] == server_id:
                    self._store.change("floating_ip", address["id"], server_id=None)
                    self._try(self._route_anew, address["id"])

    def _route_anew(self, floating_ip_id: int) -> None:
        record = self._store.find("floating_ip", floating_ip_id)
        if record is not None:
            self._machines.route_address(record["ip"], record["server_id"])

    def _specify(self, server: Document) -> MachineSpec:
        server_type = self._catalogue.find_server_type(server["server_type"])
        if server_type is None:
            raise ActionFailed(f"there is no server type {server['server_type']} any more")
        addresses = [each for each in self._store.read_all("primary_ip") if each["assignee_id"] == server["id"]]
        by_type = {each["type"]: each["ip"] for each in addresses}
        return MachineSpec(
            server_id=server["id"],
            name=server["name"],
            ipv4=by_type.get("ipv4"),
            ipv6_network=by_type.get("ipv6"),
            public_keys=tuple(server["public_keys"]),
            root_password=server["root_password"],
            user_data=server["user_data"],
            cores=server_type.cores,
            memory_gb=server_type.memory_gb,
            location=server["location"],
        )

    def _try(self, work: Any, resource_id: int) -> None:
        try:
            work(resource_id)
        except MachineFailed as error:
            _log.warning("%s(%d) failed: %s", work.__name__, resource_id, error)
