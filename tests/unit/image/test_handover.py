"""What a node hands over, and to whom."""

import json
import os
import socket
import ssl
import struct
import tempfile
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
import yaml

from scripts import handover_key
from scripts.handover_key import main, make_pair
from service.counters import NodeStorage
from tests.image.scripts import ROOT, load_script

handover = load_script("rootfs/usr/lib/mini-llm/handover.py")
stack = load_script("rootfs/usr/lib/mini-llm/stack.py")


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """A deployment's key and certificate."""
    for name, text in make_pair(datetime.now(UTC)).items():
        (tmp_path / f"{name}.pem").write_text(text)
    return tmp_path


def ask(folder: Path, own: Path, request: bytes) -> bytes:
    """What a node with the keys in ``folder`` answers to one with those in ``own``."""
    ours, theirs = socket.socketpair()
    serving = threading.Thread(target=handover.serve, args=(theirs, folder))
    serving.start()
    try:
        with handover.make_context(own, ssl.PROTOCOL_TLS_CLIENT).wrap_socket(ours) as secured:
            secured.sendall(request)
            answer = b""
            try:
                while piece := secured.recv(65536):
                    answer += piece
            except ConnectionError:
                if not answer:
                    raise
                # It hangs up after its answer, which newer versions of OpenSSL take for a fault.
            return answer
    finally:
        serving.join()
        theirs.close()


STATE = b"GET /state HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


def test_it_is_told_to_who_holds_the_key(keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As JSON over TLS 1.3; what nobody knows is not there."""
    monkeypatch.setattr(handover, "count_open", lambda places: {"answers": 1, "connections": 2})
    head, _, body = ask(keys, keys, STATE).partition(b"\r\n\r\n")
    assert b" 200 " in head.splitlines()[0]
    assert json.loads(body)["connections"] == 2
    assert b" 404 " in ask(keys, keys, STATE.replace(b"/state", b"/etc/passwd")).splitlines()[0]


def test_nobody_else_hears_anything(keys: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Whoever has another deployment's key."""
    other = tmp_path_factory.mktemp("other")
    for name, text in make_pair(datetime.now(UTC)).items():
        (other / f"{name}.pem").write_text(text)
    with pytest.raises((ssl.SSLError, ConnectionError)):
        ask(keys, other, STATE)


@pytest.mark.parametrize("shown", ["nothing", "another"])
def test_the_node_itself_refuses_strangers(shown: str, keys: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Who trusts anybody, and shows no certificate, or another one."""
    other = tmp_path_factory.mktemp("other")
    for name, text in make_pair(datetime.now(UTC)).items():
        (other / f"{name}.pem").write_text(text)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if shown == "another":
        context.load_cert_chain(other / "certificate.pem", other / "key.pem")
    ours, theirs = socket.socketpair()
    serving = threading.Thread(target=handover.serve, args=(theirs, keys))
    serving.start()
    answer = b""
    try:
        with context.wrap_socket(ours) as secured:
            secured.sendall(STATE)
            answer = secured.recv(65536)
    except (ssl.SSLError, ConnectionError):
        pass  # as it should
    serving.join()
    theirs.close()
    assert answer == b""


def test_counters_are_read_while_the_service_counts(tmp_path: Path) -> None:
    """Those of tokens alone, none that were taken over from somebody else under another name."""
    storage = NodeStorage(tmp_path / "counters.sqlite3")
    storage.incr("tokens/1/key:alice", 1000, 7)
    storage.inherit({"tokens/1/key:alice": (5, 4e9)})
    assert handover.read_counters(tmp_path / "counters.sqlite3") == {"tokens/1/key:alice": (12, 4e9)}
    storage.close()


def test_traefik_ends_connections_with_their_next_answers(tmp_path: Path) -> None:
    """By a header on every route; all else stays, and what it reads is never half there."""
    (tmp_path / "dynamic").mkdir()
    facts = {"domain": "llm.example.org", "proof": {"sha256": "0" * 64}}
    text = stack.traefik_files(facts)["dynamic/node.yaml"]
    (tmp_path / "dynamic" / "node.yaml").write_text(text)
    handover.end_connections(tmp_path)
    before, after = json.loads(text), json.loads((tmp_path / "dynamic" / "node.yaml").read_text())
    assert all("hardened" in router["middlewares"] for router in after["http"]["routers"].values())
    headers = after["http"]["middlewares"]["hardened"]["headers"]["customResponseHeaders"]
    assert headers.pop("Connection") == "close"
    assert after == before
    assert [path.name for path in (tmp_path / "dynamic").iterdir()] == ["node.yaml"]


def test_connections_are_kept_again_where_a_rollout_came_to_nothing(tmp_path: Path) -> None:
    """To the letter as before."""
    (tmp_path / "dynamic").mkdir()
    path = tmp_path / "dynamic" / "node.yaml"
    path.write_text(stack.traefik_files({"domain": "llm.example.org"})["dynamic/node.yaml"])
    before = json.loads(path.read_text())
    for end in (True, True, False, False):
        handover.end_connections(tmp_path, end)
    assert json.loads(path.read_text()) == before


class Old:
    """An old node whose programs are written down instead of run."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.did: list[str] = []
        self.rules = ""
        for name in ("state", "node", "run", "traefik/dynamic"):
            (folder / name).mkdir(parents=True)
        (folder / "addresses").write_text("203.0.113.5\n2001:db8::1\n")
        text = stack.traefik_files({"domain": "llm.example.org"})["dynamic/node.yaml"]
        (folder / "traefik/dynamic/node.yaml").write_text(text)
        names = ("state", "node", "run", "traefik")
        self.places = handover.Places(addresses=folder / "addresses", **{name: folder / name for name in names})
        monkeypatch.setattr(handover.Handler, "places", self.places)
        monkeypatch.setattr(handover.tunnel, "run", self.run)
        monkeypatch.setattr(handover, "systemctl", lambda *words: self.did.append(" ".join(words)))
        self.stop_code = 0
        monkeypatch.setattr(handover.subprocess, "Popen", self.stop)

    def stop(self, command: list[str], **more: object) -> "Old":
        """In the place of a process, with what is asked of it."""
        self.did.append(" ".join(command[1:]))
        return self

    def __enter__(self) -> "Old":
        return self

    def __exit__(self, *error: object) -> None:
        """It is over."""

    def poll(self) -> int:
        return self.stop_code

    def kill(self) -> None:
        """It is over."""

    @property
    def returncode(self) -> int:
        return self.stop_code

    def run(self, command: list[str], text: str = "") -> str:
        self.did.append(" ".join(command) + text)
        return self.rules

    def post(self, keys: Path, path: str, body: object) -> int:
        told = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(told)}\r\n\r\n"
        return int(ask(keys, keys, head.encode() + told).split()[1])

    def ends_connections(self) -> bool:
        return '"Connection": "close"' in (self.places.traefik / "dynamic/node.yaml").read_text()


def test_what_has_moved_is_answered_through_the_tunnel(
    keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each address as it moves, once; with the last the node has a successor and orders no certificate any more.

    Before that it is still the one that serves: the next rollout, should this one end here, takes over from it.
    """
    old = Old(tmp_path / "old", monkeypatch)
    old.rules = marked = "19999:\tfrom 2001:db8::1 fwmark 0x4d4c lookup 107\n"  # of the tunnel itself
    assert old.post(keys, "/moved", {"node": "next", "addresses": ["2001:db8::1"]}) == 200
    assert "ip -6 rule add from 2001:db8::1 lookup 107 priority 20000" in old.did
    assert not any("rule add from 203.0.113.5" in each for each in old.did)
    assert "stop --no-block mini-llm-certificate.service" not in old.did
    assert not (old.places.node / "successor").exists()
    assert old.ends_connections()
    old.did.clear()
    old.rules = f"{marked}20000:\tfrom 2001:db8::1 lookup 107\n"
    assert old.post(keys, "/moved", {"node": "next", "addresses": ["2001:db8::1"]}) == 200
    assert not any("rule add" in each for each in old.did)
    assert old.post(keys, "/moved", {"node": "next", "addresses": ["2001:db8::1", "203.0.113.5"]}) == 200
    assert (old.places.node / "successor").read_text() == "next\n"
    assert "stop --no-block mini-llm-certificate.service" in old.did


def test_new_connections_are_kept_waiting_only_when_it_is_asked_for(
    keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For as long as it was asked, at both addresses, and no other ports."""
    old = Old(tmp_path / "old", monkeypatch)
    assert old.post(keys, "/hold", {"seconds": 0}) == 200
    assert (old.did, old.ends_connections()) == ([], True)
    assert old.post(keys, "/hold", {"seconds": 30}) == 200
    [told] = old.did
    assert "elements = { 80 timeout 30s, 443 timeout 30s }" in told
    assert "ip daddr 203.0.113.5 tcp dport @ports" in told
    assert "ip6 daddr 2001:db8::1 tcp dport @ports" in told


def test_the_end_stops_what_answers_and_nothing_starts_it_again(
    keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traefik first; the service with its socket."""
    old = Old(tmp_path / "old", monkeypatch)
    assert old.post(keys, "/finish", {}) == 200
    assert old.did == ["stop mini-llm-stack.service", "stop mini-llm.socket mini-llm.service"]
    # What may still answer is no end: the new node asks again.
    old.stop_code = 1
    assert old.post(keys, "/finish", {}) == 500
    assert old.did[2:] == ["stop mini-llm-stack.service"]


@pytest.mark.skipif(os.geteuid() != 0, reason="did not run: only root reads what others may not")
def test_links_of_the_service_lead_nowhere_that_it_may_not_read(keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root hands its logs over, and would have followed them to the user-data."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:  # whose parents let everybody through
        folder, nobody = Path(name), 65534
        folder.chmod(0o755)
        old = Old(folder, monkeypatch)
        (folder / "instances/1").mkdir(parents=True)
        for path in (folder / "instances/1/user-data.txt", old.places.state / "audit/log.jsonl"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"in {path.name}")
            path.chmod(0o600)
        (old.places.state / "audit-before").symlink_to(folder / "instances")
        for path in (old.places.state, *old.places.state.rglob("*")):
            os.chown(path, nobody, nobody, follow_symlinks=False)
        answer = ask(keys, keys, b"GET /audit HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"in log.jsonl" in answer
        assert b"in user-data.txt" not in answer
        assert handover.END.encode() not in answer  # who asks takes that for cut, and nothing of it
        (old.places.state / "audit-before").unlink()
        assert handover.END.encode() in ask(keys, keys, b"GET /audit HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (os.geteuid(), os.getegid()) == (0, 0)


def test_a_command_that_fails_is_told_as_trouble(keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not as if nothing were there."""
    old = Old(tmp_path / "old", monkeypatch)
    monkeypatch.setattr(handover, "systemctl", lambda *words: (_ for _ in ()).throw(OSError("no")))
    both = old.places.addresses.read_text().split()
    assert old.post(keys, "/moved", {"node": "next", "addresses": both}) == 500


def test_a_knock_is_an_acknowledgement_of_nothing() -> None:
    """With a checksum that adds up, or the kernel there would drop it whatever the firewall does."""
    segment = handover.make_knock("192.0.2.1", "198.51.100.2")
    assert struct.unpack("!HH", segment[:4]) == (40_000, 443)
    assert segment[13] == 0x10
    pseudo = socket.inet_aton("192.0.2.1") + socket.inet_aton("198.51.100.2") + struct.pack("!BBH", 0, 6, 20)
    total = sum(struct.unpack("!16H", pseudo + segment))
    assert (total & 0xFFFF) + (total >> 16) == 0xFFFF


def test_what_is_open(tmp_path: Path) -> None:
    """Running and waiting answers, clients' connections; None of one that is gone, not 0; -1 where it hangs."""
    (tmp_path / "key").write_text("k")
    told = {
        stack.SERVICE: "# HELP x\nllm_requests_in_flight 1.0\nllm_queue_depth 4.0\n",
        stack.TRAEFIK: 'traefik_open_connections{entrypoint="https",protocol="TCP"} 7\n'
        'traefik_open_connections{entrypoint="metrics",protocol="TCP"} 1\n',
    }
    places = handover.Places(scraping_key=tmp_path / "key")
    assert handover.count_open(places, lambda address, *_: told[address]) == {"answers": 5, "connections": 7}

    def fail(error: type[OSError]) -> Callable[..., str]:
        def fetch(*_: str) -> str:
            raise error("no")

        return fetch

    assert handover.count_open(places, fail(ConnectionRefusedError)) == {"answers": None, "connections": None}
    # Who is only busy is not gone; and one that hangs is to be replaced.
    assert handover.count_open(places, fail(TimeoutError)) == {"answers": -1, "connections": -1}
    with pytest.raises(ConnectionResetError):
        handover.count_open(places, fail(ConnectionResetError))


def test_a_node_holds_the_addresses_until_it_has_a_successor(tmp_path: Path) -> None:
    """And never before somebody asked there."""
    assert handover.holds_since(tmp_path) is None
    (tmp_path / "arrived").touch()
    assert handover.holds_since(tmp_path) > 0
    (tmp_path / "successor").write_text("next\n")
    assert handover.holds_since(tmp_path) is None


def test_a_key_that_was_not_made_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the next call would take it for the key that running nodes have."""
    monkeypatch.setattr(handover_key, "make_pair", lambda now: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        main([str(tmp_path / "handover.auto.tfvars.json")])
    assert list(tmp_path.iterdir()) == []


def test_the_key_is_made_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """For its owner alone; a second time changes nothing, and a place that is none is told."""
    path = tmp_path / "handover.auto.tfvars.json"
    assert main([str(path)]) == 0
    first = path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    assert set(json.loads(first)["handover"]) == {"certificate", "key"}
    assert main([str(path)]) == 0
    assert path.read_text() == first
    assert main([str(tmp_path / "none" / "file")]) == 1
    with pytest.raises(SystemExit) as ended:
        main(["a", "b"])
    assert ended.value.code == 2
    assert "cannot be written" in capsys.readouterr().err


BLOCKS = (f"01{24 * 'A'}", f"01{24 * 'B'}")


def prometheus_that_knows(monkeypatch: pytest.MonkeyPatch, folder: Path, *known: tuple[str, ...]) -> list[Path]:
    """One in whose folder both blocks lie; its snapshots, each of which holds what it knows by then."""
    made: list[Path] = []

    def fetch(*words: object, **more: object) -> bytes:
        made.append(folder / "snapshots" / f"20261127T1200{len(made):02}Z-1f")
        for name in known[min(len(made), len(known)) - 1]:
            (made[-1] / name).mkdir(parents=True)
        return json.dumps({"data": {"name": made[-1].name}}).encode()

    for name in (*BLOCKS, f"{BLOCKS[0]}.tmp-for-creation", "wal"):
        (folder / name).mkdir()
    monkeypatch.setattr(handover, "fetch", fetch)
    return made


def test_history_waits_for_what_the_node_before_brought(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which Prometheus does not know at once; a snapshot without it is removed."""
    made = prometheus_that_knows(monkeypatch, tmp_path, BLOCKS[1:], BLOCKS[1:], BLOCKS)
    slept: list[float] = []
    assert handover.take_snapshot(tmp_path, slept.append, lambda: sum(slept)) == made[2]
    assert len(slept) == 2
    assert [path.exists() for path in made] == [False, False, True]


def test_history_does_not_wait_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """For a block that cannot be read, say: it is told, and the rest is handed over."""
    made = prometheus_that_knows(monkeypatch, tmp_path, BLOCKS[1:])
    slept: list[float] = []
    assert handover.take_snapshot(tmp_path, slept.append, lambda: sum(slept)) == made[-1]
    assert 15 < sum(slept) < 30
    assert [path.exists() for path in made] == [False] * (len(made) - 1) + [True]
    assert BLOCKS[0] in capsys.readouterr().err


def test_history_waits_longer_than_prometheus_needs_to_find_a_block() -> None:
    """Three of its looks, as compose.yaml has them."""
    compose = yaml.safe_load((ROOT / "image/rootfs/usr/share/mini-llm/stack/compose.yaml").read_text())
    [every] = [word for word in compose["services"]["prometheus"]["command"] if "block-reload-interval" in word]
    assert 3 * int(every.partition("=")[2].removesuffix("s")) <= handover._KNOWN_WITHIN_S
