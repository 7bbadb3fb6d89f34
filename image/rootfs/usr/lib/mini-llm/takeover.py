"""Owns how a new node takes the place of the one that serves: what it brings over, and how the addresses come to it.

``python3 takeover.py METADATA FOLDER STATE``, as a unit that is ready once service and Traefik may start. It looks for
the node that the addresses lead to, among its neighbours in the deployment's private network (the URL METADATA tells
which that is), by the deployment's certificate in FOLDER. Before service and Traefik start it takes over the
certificate and the end of the audit log; then counters and revoked keys, again and again, until the old node has given
its last answer under the addresses that have moved; then the audit log's files and Prometheus' history. The file STATE
says how far it is. A node that finds no other is the first.
"""

import asyncio
import http.client
import ipaddress
import json
import math
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import yaml

sys.path.insert(0, str(Path(__file__).parent))  # Python's isolated mode leaves it out
import handover
import private_network
import stack
import tunnel

_NETWORK_WITHIN_S, _CONNECT_TIMEOUT_S, _ASK_TIMEOUT_S = 60.0, 1.5, 10.0
_LARGEST_NETWORK = 1024  # addresses that are tried one by one
_FINISH_TIMEOUT_S = 800.0  # Traefik and service, each with the time that its answers have
_BEFORE_WITHIN_S = 840.0
# Accounts and answers are worth an apply that fails; the monitoring's history is not, least of all where the old node's
# Prometheus is what is broken.
_INSIST_S, _INSIST_ON_HISTORY_S, _INSIST_EVERY_S = 1800.0, 60.0, 5.0
_LOOKS, _LOOK_AGAIN_S = 3, 2.0
_LARGEST_ARCHIVE_BYTES = 4 << 30
_NODE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]{0,62}")
T = TypeVar("T")
_LOOK_EVERY_S, _SYNC_EVERY_S = 0.2, 1.0
_GONE_AFTER_S, _TRIES = 20.0, 3
# After the move: connections on which nobody asks are ended by the old node, long before they would end by themselves.
_IDLE_S = 10.0
# Where moved flows would be cut: how long to wait for a moment without answers, and, if there is none, for their end
# while new connections are kept waiting; how long these wait while the rest ends, and at most until the addresses move.
_GAP_WITHIN_S, _DRAIN_S = 300.0, 60.0
_REST_S, _HELD_S, _HOLD_AGAIN_S, _HOLD_WITHIN_S = 15.0, 30, 10.0, 60.0
_KEPT_AUDIT_FILES = 32
_SHA256 = re.compile(r"[0-9a-f]{64}")
_AUDIT_HEAD = re.compile(r'\{"seq":[0-9]+,"hash":"([0-9a-f]{64})"\}\s*')


class Refused(Exception):
    """The node that serves does not hand over; nobody must take its place like this."""


class Gone(Exception):
    """The other node does not answer any more."""


class Trouble(Refused):
    """The other node is there, and cannot do what it was asked for; it may, a little later."""


@dataclass(frozen=True)
class State:
    """How far it is, for who waits for this node: ``state`` is looking, first, prepared, moved, finished or failed."""

    state: str = "looking"
    reason: str | None = None
    predecessor: str | None = None
    certificate: bool = False  # whether the old node's was taken over
    flows: str | None = None  # kept, or cut where the cloud's firewall drops what it has not seen begin
    answers: int | None = None  # in flight on the old node
    connections: int | None = None
    notes: tuple[str, ...] = ()


@dataclass
class Board:
    """The state, and the file that others read it from."""

    path: Path
    state: State = field(default_factory=State)

    def tell(self, **changes: Any) -> None:
        """Changes it, in the file as well; raises OSError."""
        before, self.state = self.state, replace(self.state, **changes)
        unfinished = self.path.with_name(f"{self.path.name}.unfinished")
        unfinished.write_text(json.dumps(asdict(self.state)) + "\n")
        os.chown(unfinished, -1, self.path.parent.stat().st_gid)
        unfinished.chmod(0o640)
        unfinished.replace(self.path)
        if before.state != self.state.state:
            print(f"takeover: {self.state.state}" + (f": {self.state.reason}" if self.state.reason else ""))

    def note(self, text: str) -> None:
        """Adds what an operator should know though nothing is stopped by it."""
        print(f"takeover: {text}")
        self.tell(notes=(*self.state.notes, text))


@dataclass
class Peer:
    """The other node, by one connection that is made anew when it ends."""

    address: str
    context: ssl.SSLContext
    own: str = ""  # this node's address on that way
    _connection: http.client.HTTPSConnection | None = None

    def _open(self, timeout_s: float) -> http.client.HTTPSConnection:
        if self._connection is None:
            self._connection = http.client.HTTPSConnection(
                self.address, handover.PORT, context=self.context, timeout=timeout_s
            )
            self._connection.connect()
            self.own = self._connection.sock.getsockname()[0]
        self._connection.sock.settimeout(timeout_s)
        return self._connection

    def ask(
        self, path: str, body: dict[str, Any] | None = None, timeout_s: float = _ASK_TIMEOUT_S
    ) -> http.client.HTTPResponse:
        """The answer, its body unread. Raises Refused for another key than its own, Gone."""
        words = ("GET", path) if body is None else ("POST", path, json.dumps(body))
        for last in (False, True):
            fresh = self._connection is None
            try:
                connection = self._open(timeout_s)
                connection.request(*words)
                answer = connection.getresponse()
            except ssl.SSLError as error:
                self.close()
                raise Refused(
                    f"{self.address} and this node do not have the same handover key ({error.reason})"
                ) from error
            except (OSError, http.client.HTTPException) as error:
                self.close()
                if last or fresh or isinstance(error, TimeoutError):
                    raise Gone(f"{self.address} does not answer: {type(error).__name__}") from error
                continue  # it had ended the connection meanwhile
            if answer.status == http.HTTPStatus.INTERNAL_SERVER_ERROR:
                raise Trouble(f"{self.address} cannot do {path}: {answer.read(500).decode(errors='replace')}")
            return answer
        raise AssertionError("unreachable")

    def tell(self, path: str, body: dict[str, Any] | None = None, timeout_s: float = _ASK_TIMEOUT_S) -> dict[str, Any]:
        """The answer, as JSON. Raises Refused, Gone."""
        try:
            return dict(json.loads(self.ask(path, body, timeout_s).read()))
        except (OSError, ValueError, http.client.HTTPException) as error:
            self.close()
            raise Gone(f"{self.address} answers something else than a node would") from error

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


@dataclass(frozen=True)
class Neighbourhood:
    """This node's place in the private network of its deployment."""

    own: str
    network: ipaddress.IPv4Network
    gateway: str | None  # through which all that is in there is reached


def read_neighbourhood(text: str) -> Neighbourhood | None:
    """From the metadata of private networks; None where there is none yet. Raises ValueError."""
    try:
        listed = yaml.safe_load(text) or []
        if not listed:
            return None
        first = listed[0]
        network = ipaddress.IPv4Network(first.get("subnet") or first["network"])
        found = Neighbourhood(str(first["ip"]), network, str(first["gateway"]) if first.get("gateway") else None)
    except (yaml.YAMLError, TypeError, LookupError, AttributeError) as error:
        raise ValueError("the metadata of private networks are no list of them") from error
    if network.num_addresses > _LARGEST_NETWORK:
        raise ValueError(f"the private network {network} is too large to look for a neighbour in; take a /24")
    return found


def wait_for_neighbourhood(url: str, ask: Callable[[str], str] = private_network.ask) -> Neighbourhood:
    """Once the private network is there, with this node's address on one of its interfaces. Raises Refused."""
    end_s, reason = time.monotonic() + _NETWORK_WITHIN_S, "the metadata tell of none"
    while time.monotonic() < end_s:
        try:
            found = read_neighbourhood(ask(url))
            if found is not None:
                with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as trying:
                    reason = f"no interface has {found.own}"
                    trying.bind((found.own, 0))
                return found
        except (OSError, http.client.HTTPException) as error:
            reason = f"{reason} ({error})"
        except ValueError as error:
            raise Refused(str(error)) from error
        time.sleep(_LOOK_EVERY_S)
    raise Refused(f"the private network was not there within {_NETWORK_WITHIN_S:.0f} s: {reason}")


async def find_open(addresses: Iterable[str]) -> list[str]:
    """The addresses at which somebody hands over."""

    async def attempt(address: str) -> str | None:
        try:
            async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                _, writer = await asyncio.open_connection(address, handover.PORT)
            writer.close()
        except (OSError, TimeoutError):
            return None
        return address

    return [found for found in await asyncio.gather(*map(attempt, addresses)) if found]


def choose(states: dict[str, dict[str, Any]], own_name: str) -> str | None:
    """The address of the node that the service's addresses lead to, or have led to before they came here."""
    to_us = [address for address, told in states.items() if told["successor"] == own_name]
    holding = [address for address, told in states.items() if told["holds_since_s"] is not None]
    if to_us:
        return to_us[0]
    return max(holding, key=lambda address: float(states[address]["holds_since_s"]), default=None)


def patiently(ask: Callable[[], T], sleep: Callable[[float], None] = time.sleep) -> T:
    """A node that only has much to do must not be taken for one that hangs. Raises Refused, Gone."""
    for _ in range(_TRIES - 1):
        try:
            return ask()
        except (Gone, Trouble) as reason:
            print(f"takeover: {reason}; once more")
            sleep(_SYNC_EVERY_S)
    return ask()


def find_predecessor(neighbours: Iterable[str], context: ssl.SSLContext, board: Board) -> Peer | None:
    """The node that serves, or None. Raises Refused where one may be it and takes another key."""
    states: dict[str, dict[str, Any]] = {}
    peers, refusals = {}, []
    for address in neighbours:
        peers[address] = Peer(address, context)
        try:
            states[address] = patiently(partial(peers[address].tell, "/state"))
        except Refused as refusal:
            refusals.append(str(refusal))
        except Gone as gone:
            board.note(f"{gone}: nothing is taken over from it")
    chosen = choose(states, socket.gethostname())
    for address, peer in peers.items():
        if address != chosen:
            peer.close()
    if chosen is None and refusals:
        raise Refused("; ".join(refusals))
    if chosen is None:
        return None
    board.tell(predecessor=str(states[chosen]["node"]))
    end_s = time.monotonic() + _BEFORE_WITHIN_S
    while states[chosen].get("taking_over"):
        if time.monotonic() > end_s:
            raise Refused(f"{board.state.predecessor} does not come to the end of its own takeover")
        board.tell(reason=f"{board.state.predecessor} still takes over from the node before it")
        time.sleep(_SYNC_EVERY_S)
        states[chosen] = patiently(lambda: peers[chosen].tell("/state"))
    board.tell(reason=None)
    return peers[chosen]


def _write(path: Path, content: bytes, mode: int) -> None:
    """Writes a file as a whole; it belongs to whom its folder belongs to."""
    owner = path.parent.stat()
    unfinished = path.with_name(f"{path.name}.unfinished")
    with os.fdopen(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, mode), "wb") as file:
        os.fchown(file.fileno(), owner.st_uid, owner.st_gid)
        os.fchmod(file.fileno(), mode)
        file.write(content)
    unfinished.replace(path)


def fits(store: bytes, traefik: Path) -> bool:
    """Whether the old node's store has a certificate for this node's domain, from the ACME server of this node's facts.

    Where that was changed, or never came to a certificate, another one is to be ordered.
    """
    domain = (traefik / "ordered").read_text().split()[0]
    settings = json.loads((traefik / "traefik.yaml").read_text())["certificatesResolvers"]["acme"]["acme"]
    try:
        resolver = json.loads(store)["acme"]
        account = str(resolver["Account"]["Registration"]["uri"])
        names = {one["domain"]["main"] for one in resolver["Certificates"] or ()}
    except (ValueError, TypeError, LookupError):
        return False
    return domain in names and urlsplit(account).hostname == urlsplit(settings["caServer"]).hostname


def take_first(peer: Peer, places: handover.Places, board: Board) -> None:
    """What service and Traefik must find at their start. Raises Refused, Gone, OSError."""
    if (places.traefik / "ordered").exists() and not places.acme.exists():
        answer = peer.ask("/certificate")
        content = answer.read()
        if answer.status == http.HTTPStatus.OK and fits(content, places.traefik):
            _write(places.acme, content, 0o600)
            board.tell(certificate=True)
    head = _AUDIT_HEAD.fullmatch(peer.ask("/audit/head").read().decode(errors="replace"))
    if head:
        _write(places.addresses.with_name("takeover.env"), f"LLM_AUDIT_BEGIN={head[1]}\n".encode(), 0o640)


def tell_service(control: Path, counters: dict[str, Any]) -> None:
    """Hands counters to the running service; raises OSError, ValueError."""
    with socket.socket(socket.AF_UNIX) as service:
        service.settimeout(_ASK_TIMEOUT_S)
        service.connect(str(control))
        service.sendall(json.dumps({"command": "inherit", "counters": counters}).encode() + b"\n")
        with service.makefile("rb") as lines:
            if not json.loads(lines.readline() or b"{}").get("done"):
                raise ValueError("the service did not take the counters over")


def revoke(path: Path, hashes: Iterable[str]) -> None:
    """Adds hashes to the list of revoked keys; raises OSError."""
    known = handover.read_revoked(path)
    more = {each for each in hashes if _SHA256.fullmatch(each)} - known
    if more:
        _write(path, "".join(f"{each}\n" for each in sorted(known | more)).encode(), 0o600)


def read_arrived(listed: str) -> set[str]:
    """The addresses in the sets that ``nft --json list table inet rollout`` prints."""
    return _read_sets(listed, "arrived_4", "arrived_6")


def _read_sets(listed: str, *names: str) -> set[str]:
    found: set[str] = set()
    for one in json.loads(listed)["nftables"]:
        if "set" in one and one["set"]["name"] in names:
            elements = one["set"].get("elem", [])
            found |= {str(each["elem"]["val"] if isinstance(each, dict) else each) for each in elements}
    return found


def was_knocked(listed: str, source: str) -> bool:
    """Whether a segment of an unknown flow has come through from an address, from the same."""
    return source in _read_sets(listed, "knocked")


def _count_files(name: str, within: int) -> int:
    folder = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=within)
    try:
        return len(os.listdir(folder))  # noqa: PTH208 - by the folder's descriptor
    finally:
        os.close(folder)


@contextmanager
def _opened(folder: Path, owner: os.stat_result) -> Iterator[int]:
    """A folder in another user's place, made if it is not there, by a descriptor: a link is not followed."""
    try:
        folder.mkdir(mode=0o700)
        os.chown(folder, owner.st_uid, owner.st_gid, follow_symlinks=False)
    except FileExistsError:
        pass  # of an earlier rollout, or somebody's link, which is not opened
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def _unpacked(answer: http.client.HTTPResponse, aside: Path, owner: os.stat_result) -> Iterator[list[Path]]:
    """An archive's folders, in a place of root's alone until they belong to whom they are for. Raises as `_unpack`."""
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(mode=0o700)
    try:
        _unpack(answer, aside)
        for path in aside.rglob("*"):
            os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)
        yield sorted(path for path in aside.iterdir() if path.is_dir())
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def take_audit(answer: http.client.HTTPResponse, state: Path, aside: Path) -> None:
    """The old node's audit log, and those before it, beside this node's own; raises OSError, TarError."""
    owner = state.stat()
    with _unpacked(answer, aside, owner) as folders, _opened(state / "audit-before", owner) as before:
        for path in folders:
            if not _NODE.fullmatch(path.name):
                raise OSError("the archive has a folder that is no node's")
            shutil.rmtree(path.name, ignore_errors=True, dir_fd=before)
            os.rename(path, path.name, dst_dir_fd=before)
        kept = sorted(os.listdir(before), key=lambda name: os.lstat(name, dir_fd=before).st_mtime)  # noqa: PTH208
        while len(kept) > 1 and sum(_count_files(name, before) for name in kept) > _KEPT_AUDIT_FILES:
            shutil.rmtree(kept.pop(0), ignore_errors=True, dir_fd=before)


def take_history(answer: http.client.HTTPResponse, prometheus: Path, aside: Path) -> int:
    """The old node's blocks, beside this one's: Prometheus finds them within seconds. How many; raises as above."""
    with _unpacked(answer, aside, prometheus.stat()) as folders:
        blocks = [path for path in folders if handover.BLOCK.fullmatch(path.name)]
        for path in blocks:
            if not (prometheus / path.name).exists():
                path.rename(prometheus / path.name)
        return len(blocks)


def _unpack(answer: http.client.HTTPResponse, folder: Path) -> None:
    if answer.status != http.HTTPStatus.OK:
        raise OSError(f"status {answer.status}")
    left, ended = _LARGEST_ARCHIVE_BYTES, False
    with tarfile.open(fileobj=answer, mode="r|") as archive:
        for member in archive:
            left, ended = left - member.size, member.name == handover.END
            if left < 0:
                raise OSError("the archive is larger than any that is handed over")
            if not ended:
                archive.extract(member, folder, filter="data")
    if not ended:
        raise OSError("the archive was cut")


@dataclass
class Takeover:
    """One takeover, from the first look to the old node's last answer."""

    board: Board
    places: handover.Places
    control: Path
    link: str
    addresses: tuple[str, ...]
    is_ready: Callable[[], bool]
    ask: tunnel.Run = tunnel.run
    now_s: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep

    def prepare(self, peer: Peer) -> None:
        """Opens the tunnel and finds out whether moved flows will come through. Raises Refused, Gone, OSError."""
        peer.tell("/tunnel", {}, 30.0)
        tunnel.open_new(tunnel.Ends(peer.own, peer.address), self.link, self.addresses, tunnel.MEMORY, self.ask)
        self.board.tell(flows="kept" if self._test_flows(peer) else "cut")

    def _test_flows(self, peer: Peer) -> bool:
        own = outer_address(self.ask(["ip", "-j", "-4", "address", "show", "dev", self.link, "scope", "global"], ""))
        source = str(peer.tell("/knock", {"ipv4": own})["from"])
        self.sleep(_LOOK_EVERY_S)
        return was_knocked(self._list(), source)

    def _list(self) -> str:
        return self.ask(["nft", "--json", "list", "table", "inet", "rollout"], "")

    def follow(self, peer: Peer) -> None:
        """Until the old node has given its last answer. Raises Refused, Gone, OSError."""
        if self.board.state.flows == "cut":
            self.wait_for_gap(peer)
        told: set[str] = set()
        heard_s, synced_s = self.now_s(), -_SYNC_EVERY_S
        moved_s: float | None = None
        asked_s = held_s = self.now_s()
        lost = False
        while True:
            try:
                if lost:
                    print("takeover: the old node's end of the tunnel is gone; it is opened again")
                    self.prepare(peer)
                    lost = False
                if self.board.state.flows == "cut" and moved_s is None and self.now_s() - held_s > _HOLD_AGAIN_S:
                    held_s = self.now_s()
                    if held_s - asked_s < _HOLD_WITHIN_S:
                        peer.tell("/hold", {"seconds": _HELD_S})
                arrived = read_arrived(self._list()) & set(self.addresses)
                if arrived - told:
                    if self._main() in arrived:
                        arrived = set(self.addresses)  # it moves last
                        mark_arrived(self.places.node)
                    peer.tell("/moved", {"node": socket.gethostname(), "addresses": sorted(arrived)})
                    told |= arrived
                    heard_s = self.now_s()
                    if moved_s is None and self._main() in told:
                        moved_s = asked_s = self.now_s()
                        self.board.tell(state="moved")
                if self.now_s() - synced_s >= _SYNC_EVERY_S:
                    synced_s = self.now_s()
                    open_ones = self.sync(peer)
                    heard_s = self.now_s()
                    lost = not told and not open_ones.get("tunnel", True)
                    if open_ones["answers"] != 0:
                        asked_s = heard_s
                    if self.board.state.state == "looking":
                        self.board.tell(state="prepared")
                    if moved_s is not None and self._is_over(open_ones, moved_s, asked_s):
                        return
            except (Gone, Trouble, OSError, ValueError, subprocess.SubprocessError) as error:
                peer.close()
                print(f"takeover: {error}")
                if self.now_s() - heard_s > _GONE_AFTER_S:
                    if moved_s is None or isinstance(error, Gone):
                        raise
                    # It still has what it is to hand over, and is deleted once this node says that it is done.
                    self.board.note(f"its answers were not followed to the end: {error}")
                    return
            self.sleep(_LOOK_EVERY_S)

    def wait_for_gap(self, peer: Peer) -> None:
        """Until the addresses can move without cutting an answer, or there is no such moment. Raises Refused, Gone."""
        while not self.is_ready():
            self.sleep(_LOOK_EVERY_S)
        peer.tell("/hold", {"seconds": 0})
        begin_s = self.now_s()
        self.board.tell(reason="the cloud's firewall would cut answers in flight; waiting for a moment without any")
        if self._wait_for(peer, lambda told: (told["answers"] or 0) <= 0, _GAP_WITHIN_S)["answers"]:
            self._wait_for(peer, lambda told: (told["answers"] or 0) <= 0, _DRAIN_S, held=True)
        rest = self._wait_for(peer, lambda told: not told["connections"], _REST_S, held=True)
        waited = f"{self.now_s() - begin_s:.0f} s were waited for a moment without answers"
        cut = f"; there was none, so {rest['answers']} of them are cut" if (rest["answers"] or 0) > 0 else ""
        self.board.note(f"the cloud's firewall drops connections that move: {waited}{cut}")
        self.board.tell(reason=None)

    def _wait_for(
        self, peer: Peer, is_so: Callable[[dict[str, Any]], bool], within_s: float, held: bool = False
    ) -> dict[str, Any]:
        """What is open on the old node, once it is so, or too late; ``held``: nobody begins a connection meanwhile."""
        end_s, hold_s = self.now_s() + within_s, self.now_s() if held else math.inf
        while True:
            if self.now_s() >= hold_s:
                hold_s = self.now_s() + _HOLD_AGAIN_S
                patiently(partial(peer.tell, "/hold", {"seconds": _HELD_S}), self.sleep)
            if is_so(told := patiently(partial(self.sync, peer), self.sleep)) or self.now_s() >= end_s:
                return told
            self.sleep(_LOOK_EVERY_S)

    def _main(self) -> str:
        """The address that moves last, and that somebody is sure to ask at."""
        return next((each for each in self.addresses if ":" not in each), self.addresses[0])

    def _is_over(self, open_ones: dict[str, Any], moved_s: float, asked_s: float) -> bool:
        if open_ones["connections"] in (0, None):
            return True
        now_s = self.now_s()
        return now_s - asked_s > _IDLE_S or now_s - moved_s > stack.LONGEST_ANSWER_S

    def sync(self, peer: Peer) -> dict[str, Any]:
        """Counters and revoked keys as they are on the old node by now; what is open there."""
        told = peer.tell("/sync")
        revoke(self.places.state / "revoked", told["revoked"])
        if self.control.exists():
            tell_service(self.control, told["counters"])
        self.board.tell(answers=told["answers"], connections=told["connections"])
        return told

    def finish(self, peer: Peer) -> None:
        """What the old node can give only once it serves nobody any more; what cannot be had is a note."""
        aside = self.places.node / "taken-over"

        def history() -> None:
            take_history(peer.ask("/history", timeout_s=120.0), self.places.prometheus, aside)

        def audit() -> None:
            take_audit(peer.ask("/audit", timeout_s=60.0), self.places.state, aside)

        self._insist(peer, "its end", lambda: peer.tell("/finish", {}, _FINISH_TIMEOUT_S), _INSIST_S)
        self._insist(peer, "its last counters", lambda: self.sync(peer), _INSIST_S)
        self._insist(peer, "its audit log", audit, _INSIST_S)
        self._insist(peer, "its history", history, _INSIST_ON_HISTORY_S)
        self.board.tell(reason=None)

    def _insist(self, peer: Peer, what: str, step: Callable[[], Any], within_s: float) -> None:
        """Tries a step again as long as the old node is there: it is deleted once this one says that it is done."""
        end_s = self.now_s() + within_s
        while True:
            try:
                step()
                return
            except (Refused, OSError, ValueError, tarfile.TarError, http.client.HTTPException) as error:
                reason = f"{what} did not come over from the old node: {error}"
                print(f"takeover: {reason}")
            except Gone as gone:
                reason, end_s = f"{what} did not come over from the old node: {gone}", min(end_s, self.now_s() + 1)
            finally:
                peer.close()  # an archive ends with its connection
            if self.now_s() > end_s:
                self.board.note(reason)
                return
            self.board.tell(reason=reason)
            self.sleep(_INSIST_EVERY_S)

    def wait_for_addresses(self) -> None:
        """Without a predecessor: until somebody has asked at the address."""
        tunnel.watch(self.link, self.addresses, self.ask)
        while self._main() not in read_arrived(self._list()):
            self.sleep(_SYNC_EVERY_S)
        mark_arrived(self.places.node)


def mark_arrived(node: Path) -> None:
    """From now on this is the node that the addresses lead to."""
    (node / "arrived").touch()


def outer_address(listed: str) -> str:
    """The server's own public address, from what ``ip -j address show`` prints. Raises ValueError."""
    for one in json.loads(listed):
        for each in one.get("addr_info", []):
            if each.get("scope") == "global" and each.get("family") == "inet":
                return str(each["local"])
    raise ValueError("the link that leads outside has no IPv4 address")


def find_out(url: str, folder: Path, board: Board) -> Peer | None:
    """The predecessor, if there is one. Raises Refused, OSError, SubprocessError."""
    here = wait_for_neighbourhood(url)
    others = [str(address) for address in here.network.hosts() if str(address) != here.own]
    context = handover.make_context(folder, ssl.PROTOCOL_TLS_CLIENT)
    return find_predecessor(look_around(here, others), context, board)


def look_around(here: Neighbourhood, others: list[str], ask: tunnel.Run = tunnel.run) -> list[str]:
    """The neighbours that may be the predecessor. Raises Refused where nobody could be seen, SubprocessError.

    A private network that has just come may not carry anything yet; that nobody is there is only known once it does.
    """
    end_s, looks = time.monotonic() + _NETWORK_WITHIN_S, 0
    while True:
        if found := asyncio.run(find_open(others)):
            return found
        looks += 1
        # Each look asked the gateway, so the kernel knows by now whether it answers.
        is_silent = here.gateway is not None and "lladdr" not in ask(["ip", "neighbor", "show", here.gateway], "")
        if looks >= _LOOKS and not is_silent:
            return []
        if time.monotonic() > end_s:
            raise Refused(f"the private network carries nothing: its gateway, {here.gateway}, does not answer")
        time.sleep(_LOOK_AGAIN_S)


def is_ready() -> bool:
    """Whether this node could serve."""
    try:
        handover.fetch(stack.SERVICE, "/ready")
    except (OSError, ValueError):
        return False
    return True


def wait_for_service(control: Path, sleep: Callable[[float], None] = time.sleep) -> None:
    """So that counters have somebody to go to; a service that never comes is told by /ready."""
    for _ in range(600):
        if control.exists():
            return
        sleep(_LOOK_EVERY_S)


def main(url: str, folder: Path, state: Path, control: Path) -> int:
    """Takes over; the boundary where what went wrong becomes a state that others can read."""
    board, places = Board(state), handover.Places()
    try:
        board.tell()
        # Where the facts say so, nobody is asked: that is how a deployment's key is changed.
        peer = None if (folder / "alone").exists() else find_out(url, folder, board)
        if peer is not None:
            patiently(partial(take_first, peer, places, board))
    except Gone as gone:
        board.note(f"{gone}: nothing was taken over from it")
        peer = None
    except (Refused, OSError, ValueError, subprocess.SubprocessError) as error:
        board.tell(state="failed", reason=str(error))
        tunnel.tell_ready()
        return 0  # the node shall be reachable, and say this
    tunnel.tell_ready()
    link = tunnel.find_link(tunnel.run(["ip", "-o", "route", "show", "default"]))
    own = Takeover(board, places, control, link, tuple(places.addresses.read_text().split()), is_ready)
    try:
        if peer is not None:
            wait_for_service(control)
            patiently(lambda: own.prepare(peer))
            own.follow(peer)
            own.finish(peer)
    except Gone as gone:
        board.note(f"{gone}; it is not waited for any more")
    except (Refused, OSError, ValueError, subprocess.SubprocessError) as error:
        if board.state.state != "moved":
            board.tell(state="failed", reason=str(error))
            return 0
        board.note(f"not followed to the end: {error}")
    if board.state.state != "moved":
        board.tell(state="first")
        own.wait_for_addresses()
    board.tell(state="finished", answers=None, connections=None)
    (places.node / "took-over").touch()
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # a file's, of which the stubs are not sure
    sys.exit(main(sys.argv[1], *map(Path, sys.argv[2:])))
