"""Owns what a node hands over to the one that takes its place, and what it does for it while addresses move.

``python3 handover.py FOLDER`` serves one connection, which systemd makes standard input: TLS, in which both ends show
the deployment's certificate of FOLDER and take no other; then HTTP/1.1. Nothing is handed over but by this way.
"""

import http.client
import json
import os
import re
import shutil
import socket
import sqlite3
import ssl
import stat
import struct
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # Python's isolated mode leaves it out
import stack
import tunnel

PORT = 7700
_TLS_TIMEOUT_S, _IDLE_TIMEOUT_S = 5.0, 120.0
_HASH = re.compile(r"(?m)^[0-9a-f]{64}$")
_LARGEST_BODY_BYTES = 64 << 10
_STOP_TIMEOUT_S = 400  # longer than any unit that it stops waits for answers
_ASK_TIMEOUT_S = 3.0
_HISTORY_TIMEOUT_S = 60.0
_LARGEST_FILE_BYTES = 16 << 20
# Prometheus looks for blocks every 5 s (compose.yaml); what it does not know by then it cannot read.
_KNOWN_WITHIN_S, _KNOWN_EVERY_S = 20.0, 2.0
BLOCK = re.compile(r"[0-9A-HJKMNP-TV-Z]{26}")  # the name of a block of Prometheus', a ULID
_SNAPSHOT = re.compile(r"[0-9]{8}T[0-9]{6}Z-[0-9a-f]+")
_BUSY = ("looking", "prepared", "moved")
_TOUCH_EVERY_S = 5.0
# The last member of an archive, without which it was cut.
END = "end-of-handover"


@dataclass(frozen=True)
class Places:
    """Where what is handed over lies."""

    state: Path = Path("/var/lib/mini-llm")
    acme: Path = Path("/var/lib/mini-llm-traefik/acme.json")
    traefik: Path = Path("/run/mini-llm-traefik")
    prometheus: Path = Path("/var/lib/mini-llm-prometheus")
    scraping_key: Path = Path("/run/mini-llm-prometheus/service.key")
    node: Path = Path("/var/lib/mini-llm-node")
    addresses: Path = Path("/run/mini-llm/addresses")
    run: Path = Path("/run/mini-llm-rollout")


@contextmanager
def acting_as_owner(folder: Path) -> Iterator[None]:
    """With the rights of the user whose folder it is: wherever his links lead, he gets what he could read himself.

    Raises OSError.
    """
    owner, user, group = folder.lstat(), os.geteuid(), os.getegid()
    os.setegid(owner.st_gid)
    try:
        os.seteuid(owner.st_uid)
        yield
    finally:
        os.seteuid(user)
        os.setegid(group)


def read_bounded(path: Path) -> bytes:
    """A file of another user's, who may have made anything of it; raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(f"{path} is no file")
        content = file.read(_LARGEST_FILE_BYTES + 1)
    if len(content) > _LARGEST_FILE_BYTES:
        raise OSError(f"{path} is larger than any such file")
    return content


def read_revoked(path: Path) -> set[str]:
    """The hashes of revoked keys, and nothing else that may stand there; raises OSError."""
    try:
        return set(_HASH.findall(read_bounded(path).decode("ascii", "replace")))
    except FileNotFoundError:
        return set()


def make_context(folder: Path, purpose: int) -> ssl.SSLContext:
    """For either end: only who holds the deployment's key is spoken with. Raises OSError (an SSLError is one)."""
    context = ssl.SSLContext(purpose)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # one certificate is trusted, whoever shows it
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(folder / "certificate.pem")
    context.load_cert_chain(folder / "certificate.pem", folder / "key.pem")
    return context


def holds_since(node: Path) -> float | None:
    """Since when the addresses lead here (epoch, seconds); None if they never did, or lead to a successor."""
    arrived = node / "arrived"
    return arrived.stat().st_mtime if arrived.exists() and not (node / "successor").exists() else None


def read_counters(path: Path) -> dict[str, tuple[int, float]]:
    """What the service has counted for a day, by name: amount and expiry. Raises sqlite3.Error."""
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=_ASK_TIMEOUT_S)) as database:
        rows = database.execute(
            "SELECT name, amount, expires_s FROM counters WHERE name LIKE 'tokens/%' AND expires_s > ?", (time.time(),)
        )
        return {name: (amount, expires_s) for name, amount, expires_s in rows}


def read_gauges(text: str, names: dict[str, str]) -> dict[str, float]:
    """The sums of some gauges in Prometheus' text format, by the name they are wanted under."""
    sums = dict.fromkeys(names, 0.0)
    for line in text.splitlines():
        for wanted, start in names.items():
            if line.startswith(start):
                sums[wanted] += float(line.rsplit(" ", 1)[1])
    return sums


def fetch(
    address: str, path: str, key: str | None = None, method: str = "GET", timeout_s: float = _ASK_TIMEOUT_S
) -> str:
    """What a program of this node answers; raises OSError, ValueError."""
    connection = http.client.HTTPConnection(address, timeout=timeout_s)
    try:
        connection.request(method, path, headers={"Authorization": f"Bearer {key}"} if key else {})
        answer = connection.getresponse()
        body = answer.read().decode()
    except http.client.HTTPException as error:
        raise OSError(f"{address} answers no HTTP") from error
    finally:
        connection.close()
    if answer.status != HTTPStatus.OK:
        raise OSError(f"{address}{path}: status {answer.status}")
    return body


def count_open(places: Places, fetch: Callable[..., str] = fetch) -> dict[str, int | None]:
    """Answers in flight and connections of clients; None where that program is gone, -1 where it hangs.

    Raises OSError, ValueError.
    """
    # A node whose service hangs is one that most needs to be replaced.
    try:
        key = places.scraping_key.read_text().strip()
        service = read_gauges(
            fetch(stack.SERVICE, "/metrics", key),
            {"running": "llm_requests_in_flight ", "waiting": "llm_queue_depth "},
        )
        answers = int(service["running"] + service["waiting"])
    except ConnectionRefusedError:
        answers = None
    except TimeoutError:
        answers = -1
    try:
        told = fetch(stack.TRAEFIK, "/metrics")
        open_ones = read_gauges(told, {"open": 'traefik_open_connections{entrypoint="https"'})["open"]
        connections = int(open_ones)
    except ConnectionRefusedError:
        connections = None
    except TimeoutError:
        connections = -1
    return {"answers": answers, "connections": connections}


def end_connections(traefik: Path, end: bool = True) -> None:
    """Has Traefik end each connection with its next answer, or no more: ``Connection: close``, in HTTP/2 a GOAWAY."""
    path = traefik / "dynamic" / "node.yaml"
    document = json.loads(path.read_text())
    headers = document["http"]["middlewares"]["hardened"]["headers"]
    kept = {name: value for name, value in headers.get("customResponseHeaders", {}).items() if name != "Connection"}
    headers["customResponseHeaders"] = {**kept, **({"Connection": "close"} if end else {})}
    status = path.stat()
    unfinished = path.with_name("node.unfinished")  # of a name that Traefik does not read
    unfinished.write_text(json.dumps(document, indent=1))
    os.chown(unfinished, status.st_uid, status.st_gid)
    unfinished.chmod(status.st_mode & 0o777)
    unfinished.replace(path)


def make_knock(source: str, target: str, port: int = 443) -> bytes:
    """A TCP segment (RFC 9293) of a connection that never began: an acknowledgement of nothing."""
    head = struct.pack("!HHIIBBHHH", 40_000, port, 1, 1, 5 << 4, 0x10, 1024, 0, 0)
    pseudo = socket.inet_aton(source) + socket.inet_aton(target) + struct.pack("!BBH", 0, socket.IPPROTO_TCP, len(head))
    total = sum(struct.unpack(f"!{len(pseudo + head) // 2}H", pseudo + head))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return head[:16] + struct.pack("!H", ~total & 0xFFFF) + head[18:]


def knock(target: str) -> str:
    """Sends a few such segments to another server's address; from which of this one's. Raises OSError."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        asking.connect((target, 443))
        source: str = asking.getsockname()[0]
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP) as raw:
        for _ in range(5):
            raw.sendto(make_knock(source, target), (target, 0))
            time.sleep(0.05)
    return source


def take_snapshot(
    prometheus: Path, sleep: Callable[[float], None] = time.sleep, now_s: Callable[[], float] = time.monotonic
) -> Path:
    """A copy of all that Prometheus knows, in its own folder, once it knows the blocks that lie there: the node before
    may just have brought some. Raises OSError, ValueError.
    """
    end_s = now_s() + _KNOWN_WITHIN_S
    while True:
        told = fetch(stack.PROMETHEUS, "/api/v1/admin/tsdb/snapshot", method="POST", timeout_s=_HISTORY_TIMEOUT_S)
        name = str(json.loads(told)["data"]["name"])
        if not _SNAPSHOT.fullmatch(name) or (prometheus / "snapshots").is_symlink():
            raise ValueError("Prometheus names a snapshot that is none")
        snapshot = prometheus / "snapshots" / name
        lying = {path.name for path in prometheus.iterdir() if BLOCK.fullmatch(path.name)}
        unknown = lying - {path.name for path in snapshot.iterdir()}
        if not unknown or now_s() >= end_s:
            if unknown:
                print(f"stays here, for Prometheus does not know it: {', '.join(sorted(unknown))}", file=sys.stderr)
            return snapshot
        shutil.rmtree(snapshot, ignore_errors=True)
        sleep(_KNOWN_EVERY_S)


def systemctl(*words: str) -> None:
    """Raises SubprocessError."""
    subprocess.run(["systemctl", *words], check=True, timeout=_STOP_TIMEOUT_S, stdin=subprocess.DEVNULL)


class Handler(BaseHTTPRequestHandler):
    """One connection of the node that takes over."""

    protocol_version = "HTTP/1.1"
    timeout = _IDLE_TIMEOUT_S
    places = Places()
    _streams = False

    def do_GET(self) -> None:
        ways: dict[str, Callable[[], None]] = {
            "/state": lambda: self._tell(self._state()),
            "/certificate": lambda: self._send(read_bounded(self.places.acme)),
            "/audit/head": lambda: self._send(read_bounded(self.places.state / "audit" / "head.json")),
            "/sync": self._sync,
            "/audit": self._send_audit,
            "/history": self._send_history,
        }
        self._answer(ways)

    def do_POST(self) -> None:
        length = min(int(self.headers.get("Content-Length") or 0), _LARGEST_BODY_BYTES)
        self._body: dict[str, Any] = json.loads(self.rfile.read(length) or b"{}")
        ways: dict[str, Callable[[], None]] = {
            "/tunnel": self._open_tunnel,
            "/knock": self._knock,
            "/hold": self._hold,
            "/moved": self._moved,
            "/finish": self._finish,
        }
        self._answer(ways)

    def _answer(self, ways: dict[str, Callable[[], None]]) -> None:
        try:
            ways.get(self.path, lambda: self._send(b"", HTTPStatus.NOT_FOUND))()
        except FileNotFoundError:
            if not self._streams:
                self._send(b"", HTTPStatus.NOT_FOUND)
            self.close_connection |= self._streams
        except (OSError, ValueError, LookupError, sqlite3.Error, subprocess.SubprocessError, tarfile.TarError) as error:
            print(f"{self.command} {self.path}: {error}", file=sys.stderr)
            self.close_connection = True
            if self._streams:
                return  # the archive ends without its last member
            self._send(f"{type(error).__name__}: {error}".encode(), HTTPStatus.INTERNAL_SERVER_ERROR)

    def _send(self, body: bytes, status: HTTPStatus = HTTPStatus.OK) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _tell(self, document: Any) -> None:
        self._send(json.dumps(document).encode())

    def _state(self) -> dict[str, Any]:
        successor = self.places.node / "successor"
        return {
            "node": socket.gethostname(),
            "holds_since_s": holds_since(self.places.node),
            "successor": successor.read_text().strip() if successor.exists() else None,
            # The tunnel of its own takeover must end before it can open another one.
            "taking_over": self._is_taking_over(),
            **count_open(self.places),
        }

    def _is_taking_over(self) -> bool:
        board = self.places.addresses.with_name("rollout.json")
        return board.exists() and json.loads(board.read_text()).get("state") in _BUSY

    def _sync(self) -> None:
        lease = self.places.run / "lease"
        if lease.exists():
            lease.touch()
        with acting_as_owner(self.places.state):
            counters = read_counters(self.places.state / "counters.sqlite3")
        self._tell(
            {
                **self._state(),
                "tunnel": tunnel.is_open(),
                "counters": counters,
                "revoked": sorted(read_revoked(self.places.state / "revoked")),
            }
        )

    def _open_tunnel(self) -> None:
        own, peer = self.connection.getsockname()[0], self.client_address[0]
        self.places.run.joinpath("lease").touch()
        self.places.run.joinpath("ends.env").write_text(f"OWN={own}\nPEER={peer}\n")
        systemctl("restart", "mini-llm-tunnel.service")
        self._tell({})

    def _knock(self) -> None:
        self._tell({"from": knock(str(self._body["ipv4"]))})

    def _hold(self) -> None:
        """Where moved flows would be cut: connections end with their next answer, new ones wait for ``seconds``."""
        end_connections(self.places.traefik)
        if seconds := int(self._body["seconds"]):
            tunnel.run(["nft", "-f", "-"], tunnel.render_hold(self.places.addresses.read_text().split(), seconds))
        self._tell({})

    def _moved(self) -> None:
        ready = f"{tunnel.MOVED_PRIORITY}:"
        addresses = self.places.addresses.read_text().split()
        for address in addresses:
            told = address in self._body["addresses"]
            known = tunnel.run(["ip", tunnel.family_of(address), "rule", "show", "from", address])
            if told and ready not in known:
                tunnel.run(["ip", *tunnel.moved_command(address).split()])
        end_connections(self.places.traefik)
        if set(addresses) <= set(self._body["addresses"]):
            # Until then this node is still the one that the next takes over from, should this rollout end here.
            self.places.node.joinpath("successor").write_text(f"{self._body['node']}\n")
            systemctl("stop", "--no-block", "mini-llm-certificate.service")
        print(f"{', '.join(self._body['addresses'])} moved to {self._body['node']}", file=sys.stderr)
        self._tell({})

    def _finish(self) -> None:
        """Everybody has been answered: what is written from here on would be lost with this node."""
        self._stop("mini-llm-stack.service")
        # With its socket, or Prometheus' next look would start it again.
        self._stop("mini-llm.socket", "mini-llm.service")
        self._tell({})

    def _stop(self, *units: str) -> None:
        """Stops units; meanwhile the tunnel stays, for what they still answer. Raises SubprocessError if they go on."""
        end_s = time.monotonic() + _STOP_TIMEOUT_S
        with subprocess.Popen(["systemctl", "stop", *units], stdin=subprocess.DEVNULL) as stopping:
            while stopping.poll() is None and time.monotonic() < end_s:
                self.places.run.joinpath("lease").touch()
                with suppress(subprocess.TimeoutExpired):
                    stopping.wait(_TOUCH_EVERY_S)
            stopping.kill()
        if stopping.returncode:
            raise subprocess.CalledProcessError(stopping.returncode, ["systemctl", "stop", *units])

    def _send_audit(self) -> None:
        state = self.places.state
        with acting_as_owner(state):
            folders = [state / "audit", *sorted((state / "audit-before").glob("*"))]
            self._send_folders([(path, socket.gethostname() if path == folders[0] else path.name) for path in folders])

    def _send_history(self) -> None:
        snapshot = take_snapshot(self.places.prometheus)
        try:
            with acting_as_owner(self.places.prometheus):
                self._send_folders([(path, path.name) for path in sorted(snapshot.iterdir())])
            # From here on it would only tell of this node's end.
            systemctl("stop", "--no-block", "mini-llm-monitoring.service")
        finally:
            shutil.rmtree(snapshot, ignore_errors=True)

    def _send_folders(self, folders: list[tuple[Path, str]]) -> None:
        """As a tar archive; how long it is nobody knows before, so the connection ends with it."""
        self._streams = True
        self.send_response(HTTPStatus.OK)
        self.send_header("Connection", "close")
        self.end_headers()
        with tarfile.open(fileobj=self.wfile, mode="w|") as archive:
            for path, name in folders:
                archive.add(path, name)
            archive.addfile(tarfile.TarInfo(END))

    def log_message(self, *words: object) -> None:
        """What was done stands in the journal."""


def serve(connection: socket.socket, folder: Path) -> None:
    """Serves one connection to its end; who does not hold the key hears nothing."""
    connection.settimeout(_TLS_TIMEOUT_S)
    try:
        context = make_context(folder, ssl.PROTOCOL_TLS_SERVER)
        with context.wrap_socket(connection, server_side=True) as secured:
            Handler(secured, secured.getpeername(), None)  # type: ignore[arg-type]  # it has no server: systemd took the connection
    except OSError as error:  # an SSLError is one
        print(f"not spoken with: {error}", file=sys.stderr)


if __name__ == "__main__":
    if sys.argv[1:] == ["keep-connections"]:
        if not (Handler.places.node / "successor").exists():
            end_connections(Handler.places.traefik, end=False)
        sys.exit(0)
    with socket.socket(fileno=os.dup(sys.stdin.fileno())) as own:
        serve(own, Path(sys.argv[1]))
