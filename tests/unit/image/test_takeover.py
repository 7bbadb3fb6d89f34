"""How a new node finds the one that serves, and what it brings over from it."""

import io
import json
import os
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.image.scripts import load_script

takeover = load_script("rootfs/usr/lib/mini-llm/takeover.py")
handover = takeover.handover
ADDRESSES = ("203.0.113.5", "2001:db8::1")
IDLE = {"answers": 0, "connections": 0}


def told(node: str, since_s: float | None = None, successor: str | None = None) -> dict[str, Any]:
    return {"node": node, "holds_since_s": since_s, "successor": successor, **IDLE}


@pytest.mark.parametrize(
    ("states", "chosen"),
    [
        ({}, None),
        ({"a": told("a")}, None),  # one that never got the addresses
        ({"a": told("a"), "b": told("b", 5.0)}, "b"),
        ({"a": told("a", 9.0), "b": told("b", 5.0)}, "a"),
        ({"a": told("a", None, "me"), "b": told("b", 5.0)}, "a"),  # this node was there already, and started again
        ({"a": told("a", None, "other")}, None),
    ],
)
def test_the_predecessor_is_who_the_addresses_lead_to(states: dict[str, Any], chosen: str | None) -> None:
    """Of several the one that got them last."""
    assert takeover.choose(states, "me") == chosen


def test_a_neighbour_is_asked_before_it_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is busy is asked again, one that hangs is noted, and one with another key stops everything."""
    answers: dict[str, list[Any]] = {}

    class Peer:
        def __init__(self, address: str, context: Any):
            self.address = address

        def tell(self, path: str) -> dict[str, Any]:
            answer = answers[self.address].pop(0)
            if isinstance(answer, Exception):
                raise answer
            return dict(answer)

        def close(self) -> None:
            """Nothing is open."""

    monkeypatch.setattr(takeover, "Peer", Peer)
    monkeypatch.setattr(takeover.time, "sleep", lambda seconds: None)
    board = takeover.Board(tmp_path / "board.json")
    gone, refused = takeover.Gone("a does not answer"), takeover.Refused("another key")
    answers = {"a": [gone, gone, told("old", 5.0)]}
    assert takeover.find_predecessor(answers, None, board).address == "a"
    assert board.state.predecessor == "old"
    answers = {"a": [gone] * 3, "b": [told("never", None)]}
    assert takeover.find_predecessor(answers, None, board) is None
    assert board.state.notes == ("a does not answer: nothing is taken over from it",)
    answers = {"a": [refused], "b": [told("never", None)]}
    with pytest.raises(takeover.Refused, match="another key"):
        takeover.find_predecessor(answers, None, board)
    answers = {"a": [refused], "b": [told("old", 1.0)]}
    assert takeover.find_predecessor(answers, None, board).address == "b"


def test_the_neighbourhood() -> None:
    """The deployment's own network, if it is small enough to look through."""
    text = "- ip: 10.77.0.3\n  network: 10.77.0.0/24\n  mac_address: 86:00:00:00:00:0a\n"
    found = takeover.read_neighbourhood(text)
    assert (found.own, str(found.network), found.gateway) == ("10.77.0.3", "10.77.0.0/24", None)
    assert takeover.read_neighbourhood(f"{text}  gateway: 10.77.0.1\n").gateway == "10.77.0.1"
    assert takeover.read_neighbourhood("") is None
    with pytest.raises(ValueError, match="too large"):
        takeover.read_neighbourhood(text.replace("/24", "/8").replace("10.77.0.0", "10.0.0.0"))
    for damaged in ("- 5\n", "{", "- ip: 10.77.0.3\n"):
        with pytest.raises(ValueError, match=r"no list of them|address"):
            takeover.read_neighbourhood(damaged)


def test_nobody_is_there_only_where_somebody_could_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as the network's gateway is silent the node that serves may be behind it."""
    now_s, seen, known = [0.0], dict[float, list[str]](), dict[float, str]()

    def latest(told: dict[float, Any], none: Any) -> Any:
        return next((told[at_s] for at_s in sorted(told, reverse=True) if at_s <= now_s[0]), none)

    async def find_open(addresses: Any) -> list[str]:
        return list(latest(seen, []))

    def ask(command: list[str], text: str) -> str:
        assert command == ["ip", "neighbor", "show", "10.77.0.1"]
        return str(latest(known, "10.77.0.1 dev eth1 FAILED\n"))

    monkeypatch.setattr(takeover, "find_open", find_open)
    monkeypatch.setattr(takeover.time, "monotonic", lambda: now_s[0])
    monkeypatch.setattr(takeover.time, "sleep", lambda seconds: now_s.__setitem__(0, now_s[0] + seconds))
    here = takeover.Neighbourhood("10.77.0.3", takeover.ipaddress.IPv4Network("10.77.0.0/24"), "10.77.0.1")
    with pytest.raises(takeover.Refused, match=r"its gateway, 10\.77\.0\.1,"):
        takeover.look_around(here, ["10.77.0.2"], ask)
    assert 60 <= now_s[0] < 64
    now_s[0], seen = 0.0, {20.0: ["10.77.0.2"]}
    assert takeover.look_around(here, ["10.77.0.2"], ask) == ["10.77.0.2"]
    now_s[0], seen, known = 0.0, {}, {12.0: "10.77.0.1 dev eth1 lladdr d2:74:7f:6e:37:e3 REACHABLE\n"}
    assert takeover.look_around(here, ["10.77.0.2"], ask) == []
    assert now_s[0] == 12
    now_s[0], known = 0.0, {}
    without = takeover.replace(here, gateway=None)
    assert takeover.look_around(without, ["10.77.0.2"], ask) == []
    assert now_s[0] == 4


class Network:
    """Answers to what the takeover asks: the kernel's tables, and the old node. Time goes on with each sleep."""

    def __init__(self) -> None:
        self.time_s, self.arrived, self.calls = 0.0, set[str](), list[str]()
        self.gone_since_s: float | None = None
        self.ready_s = 0.0
        self.open = {"answers": 2, "connections": 5}
        self.events: dict[float, Any] = {}

    def ask(self, command: list[str], text: str = "") -> str:
        assert command == ["nft", "--json", "list", "table", "inet", "rollout"]
        sets = [
            {"set": {"name": name, "elem": [one for one in self.arrived if (":" in one) == (name[-1] == "6")]}}
            for name in ("arrived_4", "arrived_6")
        ]
        return json.dumps({"nftables": [{"metainfo": {}}, *sets]})

    def tell(self, path: str, body: dict[str, Any] | None = None, timeout_s: float = 0) -> dict[str, Any]:
        if self.gone_since_s is not None and self.time_s >= self.gone_since_s:
            raise takeover.Gone("it is gone")
        more = "" if body is None else f" {body.get('seconds', '')}{','.join(body.get('addresses', []))}"
        self.calls.append(path + more)
        return {**self.open, "counters": {}, "revoked": []}

    def close(self) -> None:
        """Nothing is held."""

    def sleep(self, seconds: float) -> None:
        self.time_s += seconds
        for at_s in [at_s for at_s in self.events if at_s <= self.time_s]:
            self.events.pop(at_s)()
        assert self.time_s < 2000, "it waits for ever"


def make(tmp_path: Path, network: Network) -> Any:
    for name in ("state", "node"):
        (tmp_path / name).mkdir()
    places = handover.Places(state=tmp_path / "state", node=tmp_path / "node")
    board = takeover.Board(tmp_path / "board.json")
    return takeover.Takeover(
        board,
        places,
        tmp_path / "control",
        "eth0",
        ADDRESSES,
        lambda: network.time_s >= network.ready_s,
        network.ask,
        lambda: network.time_s,
        network.sleep,
    )


def test_the_old_node_is_followed_to_its_last_answer(tmp_path: Path) -> None:
    """IPv6 has come, then IPv4, which moves last and stands for both; then until no connection is left."""
    network = Network()
    own = make(tmp_path, network)
    network.events = {
        5.0: lambda: network.arrived.add(ADDRESSES[1]),
        7.0: lambda: network.arrived.add(ADDRESSES[0]),
        40.0: lambda: network.open.update(connections=0, answers=0),
    }
    own.follow(network)
    moves = [call for call in network.calls if call.startswith("/moved")]
    assert moves == [f"/moved {ADDRESSES[1]}", f"/moved {','.join(sorted(ADDRESSES))}"]
    assert own.board.state.state == "moved"
    assert 40 <= network.time_s < 43
    assert (tmp_path / "node" / "arrived").exists()
    assert json.loads((tmp_path / "board.json").read_text())["state"] == "moved"


def test_connections_on_which_nobody_asks_do_not_hold_it_up(tmp_path: Path) -> None:
    """Nor does an answer that takes longer than any may."""
    for answers, at_least_s, at_most_s in ((0, 10, 15), (2, 330, 335)):
        network = Network()
        network.arrived, network.open = set(ADDRESSES), {"answers": answers, "connections": 3}
        folder = tmp_path / str(answers)
        folder.mkdir()
        make(folder, network).follow(network)
        assert at_least_s <= network.time_s <= at_most_s


@pytest.mark.parametrize(
    ("gap_s", "holds", "at_least_s", "cut"), [(60.0, 1, 60, False), (340.0, 4, 340, False), (None, 8, 375, True)]
)
def test_where_flows_would_be_cut_a_moment_without_answers_is_waited_for(
    tmp_path: Path, gap_s: float | None, holds: int, at_least_s: float, cut: bool
) -> None:
    """Once this node could serve; then new connections are kept waiting.

    If there is no such moment, they wait until the answers have ended; what takes longer is cut, and that is told.
    """
    network = Network()
    own = make(tmp_path, network)
    own.board.tell(flows="cut")
    network.ready_s = 8.0
    if gap_s is not None:
        network.events[gap_s] = lambda: network.open.update(answers=0, connections=0)
    own.wait_for_gap(network)
    first, *rest = [call for call in network.calls if call != "/sync"]
    assert first == "/hold 0"
    assert set(rest) == {"/hold 30"}
    assert abs(len(rest) - holds) <= 1
    assert at_least_s <= network.time_s <= at_least_s + 30
    [note] = own.board.state.notes
    assert ("2 of them are cut" in note) == cut


def test_a_lost_call_does_not_end_the_waiting(tmp_path: Path) -> None:
    """A takeover that is given up there would cut all answers."""
    network = Network()
    own = make(tmp_path, network)
    own.board.tell(flows="cut")
    lost = iter(["/sync", "/hold"])

    class Losing:
        missing: str | None = next(lost)

        def tell(self, path: str, body: dict[str, Any] | None = None, timeout_s: float = 0) -> dict[str, Any]:
            if path == self.missing and (path != "/hold" or body != {"seconds": 0}):
                self.missing = next(lost, None)
                raise takeover.Gone("it did not answer")
            return network.tell(path, body, timeout_s)

    network.events[30.0] = lambda: network.open.update(answers=0, connections=0)
    losing = Losing()
    own.wait_for_gap(losing)
    assert losing.missing is None
    assert 30 <= network.time_s <= 40


def test_a_node_that_dies_is_waited_for_a_while(tmp_path: Path) -> None:
    """Then this one goes on alone; an interruption is none."""
    network = Network()
    own = make(tmp_path, network)
    network.gone_since_s = 30.0
    with pytest.raises(takeover.Gone):
        own.follow(network)
    assert 49 <= network.time_s <= 53
    assert own.board.state.state == "prepared"


def test_trouble_in_passing_does_not_end_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the old node, of this one's service, of the kernel: the next look is a second later."""
    network = Network()
    own = make(tmp_path, network)
    errors = [takeover.Trouble("busy"), OSError("a stale socket"), ValueError("not taken"), takeover.Gone("for once")]
    real = network.tell

    def tell(path: str, *more: Any) -> dict[str, Any]:
        if errors and network.time_s > 5:
            raise errors.pop()
        return dict(real(path, *more))

    monkeypatch.setattr(network, "tell", tell)
    network.arrived = set(ADDRESSES)
    network.events = {60.0: lambda: network.open.update(connections=0, answers=0)}
    own.follow(network)
    assert errors == []
    assert own.board.state.state == "moved"


def test_trouble_that_lasts_does_not_lose_what_the_old_node_keeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once the addresses are here it is deleted, so it is asked for that all the same; one that is gone is not."""
    for error, raised in ((takeover.Trouble("its service hangs"), False), (takeover.Gone("it is gone"), True)):
        network = Network()
        (tmp_path / str(raised)).mkdir()
        own = make(tmp_path / str(raised), network)

        def tell(path: str, *more: Any, error: Exception = error, old: Network = network) -> dict[str, Any]:
            if path == "/sync" and old.time_s > 10:
                raise error
            return dict(Network.tell(old, path, *more))

        monkeypatch.setattr(network, "tell", tell)
        network.arrived = set(ADDRESSES)
        if raised:
            with pytest.raises(takeover.Gone):
                own.follow(network)
        else:
            own.follow(network)
            assert own.board.state.notes == ("its answers were not followed to the end: its service hangs",)
        assert own.board.state.state == "moved"
        assert 29 <= network.time_s < 33


def test_a_tunnel_that_the_old_node_lost_is_opened_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a reboot, say. Once something has moved there is nothing to open it for: those flows are gone."""
    network = Network()
    own = make(tmp_path, network)
    opened: list[float] = []

    def prepare(peer: Any) -> None:
        opened.append(network.time_s)
        if len(opened) == 1:
            raise takeover.Trouble("not yet")
        network.open["tunnel"] = True

    monkeypatch.setattr(own, "prepare", prepare)
    network.open["tunnel"] = True
    network.events = {
        5.0: lambda: network.open.update(tunnel=False),
        20.0: lambda: network.arrived.update(ADDRESSES),
        30.0: lambda: network.open.update(tunnel=False),
        40.0: lambda: network.open.update(connections=0, answers=0),
    }
    own.follow(network)
    assert len(opened) == 2  # it was tried until it was there
    assert 5 <= opened[0] < opened[1] < 7


def test_counters_and_revoked_keys_come_over_at_each_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the service as soon as it is there, and to the list that outlives it."""
    network = Network()
    own = make(tmp_path, network)
    counters = {"tokens/1/key:alice": [5, 4e9]}
    told: list[Any] = []
    answer = {**IDLE, "counters": counters, "revoked": ["a" * 64]}
    monkeypatch.setattr(network, "tell", lambda path: answer if path == "/sync" else None)
    monkeypatch.setattr(takeover, "tell_service", lambda control, counters: told.append(counters))
    own.sync(network)
    assert told == []
    (tmp_path / "control").touch()
    own.sync(network)
    assert told == [counters]
    assert (tmp_path / "state" / "revoked").read_text().split() == ["a" * 64]
    assert own.board.state.connections == 0


@pytest.mark.parametrize(("knocked", "flows"), [(["198.51.100.7"], "kept"), (["192.0.2.99"], "cut"), ([], "cut")])
def test_whether_moved_flows_pass_is_found_out(
    knocked: list[str], flows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a segment of the old node's; what strangers send proves nothing."""
    network = Network()
    own = make(tmp_path, network)
    asked: list[Any] = []

    def tell(path: str, body: dict[str, Any], timeout_s: float = 0) -> dict[str, Any]:
        asked.append((path, body))
        return {"from": "198.51.100.7"}

    def ask(command: list[str], text: str = "") -> str:
        if command[0] == "nft":
            return json.dumps({"nftables": [{"set": {"name": "knocked", "elem": knocked}}]})
        return json.dumps([{"addr_info": [{"family": "inet", "scope": "global", "local": "198.51.100.8"}]}])

    peer = SimpleNamespace(tell=tell, own="10.77.0.3", address="10.77.0.2")
    opened: list[Any] = []
    monkeypatch.setattr(takeover.tunnel, "open_new", lambda *words: opened.append(words[0]))
    own.ask = ask
    own.prepare(peer)
    assert asked == [("/tunnel", {}), ("/knock", {"ipv4": "198.51.100.8"})]
    assert [(ends.own, ends.peer) for ends in opened] == [("10.77.0.3", "10.77.0.2")]
    assert own.board.state.flows == flows


def test_what_the_old_node_leaves_is_insisted_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is deleted once this one is done, and the audit log with it; only a node that is gone is not asked again."""
    network = Network()
    own = make(tmp_path, network)
    came: list[str] = []
    troubles = [OSError("full"), takeover.Trouble("busy"), OSError("the archive was cut")]

    def take_audit(*words: Any) -> None:
        if troubles:
            raise troubles.pop()
        came.append("audit")

    def take_history(*words: Any) -> int:
        raise takeover.Gone("it is gone")

    def tell(path: str, *more: Any) -> dict[str, Any]:
        came.append(path)
        return {**IDLE, "counters": {}, "revoked": []}

    monkeypatch.setattr(takeover, "take_audit", take_audit)
    monkeypatch.setattr(takeover, "take_history", take_history)
    monkeypatch.setattr(network, "ask", lambda path, **more: came.append(path))
    monkeypatch.setattr(network, "tell", tell)
    own.finish(network)
    assert came[:2] == ["/finish", "/sync"]
    assert came.count("audit") == 1
    assert network.time_s < 60
    assert own.board.state.notes == ("its history did not come over from the old node: it is gone",)
    assert own.board.state.reason is None


def test_a_history_that_cannot_be_had_holds_up_no_rollout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the old node's Prometheus is what is broken, long before Terraform's patience of 900 s ends."""
    network = Network()
    own = make(tmp_path, network)
    monkeypatch.setattr(network, "ask", lambda path, **more: None)
    monkeypatch.setattr(takeover, "take_audit", lambda *words: None)

    def take_history(*words: Any) -> int:
        raise takeover.Trouble("Prometheus does not answer")

    monkeypatch.setattr(takeover, "take_history", take_history)
    monkeypatch.setattr(network, "tell", lambda *words, **more: {**IDLE, "counters": {}, "revoked": []})
    own.finish(network)
    assert network.time_s < 120
    assert own.board.state.notes == ("its history did not come over from the old node: Prometheus does not answer",)


def test_revoked_keys_are_only_added(tmp_path: Path) -> None:
    """What is no hash is nothing."""
    path = tmp_path / "revoked"
    takeover.revoke(path, ["a" * 64, "nonsense", "../x"])
    takeover.revoke(path, ["b" * 64])
    assert path.read_text().split() == ["a" * 64, "b" * 64]
    assert path.stat().st_mode & 0o777 == 0o600


class Answer(io.BytesIO):
    status = 200


def archive(files: dict[str, str], ended: bool = True) -> Answer:
    packed = io.BytesIO()
    files = {**files, **({handover.END: ""} if ended else {})}
    with tarfile.open(fileobj=packed, mode="w|") as writing:
        for name, text in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(text)
            writing.addfile(info, io.BytesIO(text.encode()))
    return Answer(packed.getvalue())


def test_history_is_blocks_and_nothing_else(tmp_path: Path) -> None:
    """What is there already stays; nothing lands beside its place."""
    block, known = "01HZZZZZZZZZZZZZZZZZZZZZZZ", "01HYYYYYYYYYYYYYYYYYYYYYYY"
    (tmp_path / known).mkdir()
    (tmp_path / known / "meta.json").write_text("mine")
    files = {f"{block}/meta.json": "{}", f"{known}/meta.json": "other", "wal/0001": "x"}
    aside = tmp_path.with_name("aside")
    assert takeover.take_history(archive(files), tmp_path, aside) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [known, block]
    assert (tmp_path / known / "meta.json").read_text() == "mine"
    with pytest.raises(tarfile.TarError):
        takeover.take_history(archive({"../outside": "x"}), tmp_path, aside)
    assert not (tmp_path.parent / "outside").exists()
    with pytest.raises(OSError, match="was cut"):
        takeover.take_history(archive(files, ended=False), tmp_path, aside)
    assert not aside.exists()


def test_audit_logs_of_nodes_before_are_kept_up_to_a_bound(tmp_path: Path) -> None:
    """The oldest nodes' go first, whole."""
    for number in range(3):
        files = {f"node-{number}/audit-{seq:012d}.jsonl": "x" for seq in range(1, 15)}
        takeover.take_audit(archive(files), tmp_path, tmp_path.with_name("aside"))
        os.utime(tmp_path / "audit-before" / f"node-{number}", (number, number))
    assert sorted(path.name for path in (tmp_path / "audit-before").iterdir()) == ["node-1", "node-2"]


def test_a_service_that_was_taken_over_by_others_gets_nothing_of_roots(tmp_path: Path) -> None:
    """It owns the folder, and may lay links there: none is followed, and nothing but hashes is copied."""
    secret, state = tmp_path / "secret", tmp_path / "state"
    secret.mkdir()
    (secret / "key").write_text("a secret\n")
    state.mkdir()
    (state / "audit-before").symlink_to(secret)
    with pytest.raises(OSError, match="audit-before"):
        takeover.take_audit(archive({"node-1/audit-000000000001.jsonl": "x"}), state, tmp_path / "aside")
    assert [path.name for path in secret.iterdir()] == ["key"]
    (state / "revoked").symlink_to(secret / "key")
    with pytest.raises(OSError, match="revoked"):
        takeover.revoke(state / "revoked", ["a" * 64])
    (state / "revoked").unlink()
    (state / "revoked").write_text(f"a secret\n{'b' * 64}\n")
    takeover.revoke(state / "revoked", ["a" * 64])
    assert (state / "revoked").read_text().split() == ["a" * 64, "b" * 64]
    (state / "revoked").unlink()
    os.mkfifo(state / "revoked")
    with pytest.raises(OSError, match="is no file"):
        handover.read_revoked(state / "revoked")


@pytest.mark.parametrize(
    ("store", "taken"),
    [
        ({}, True),
        ({"domain": "other.example.org"}, False),
        ({"server": "https://staging.example.org/acct/1"}, False),
        ({"certificates": None}, False),
    ],
)
def test_a_certificate_is_taken_over_if_it_is_the_one_wanted(
    store: dict[str, Any], taken: bool, tmp_path: Path
) -> None:
    """Of this domain, from this ACME server; whoever mends those settings must not be held to the old ones."""
    (tmp_path / "ordered").write_text("llm.example.org\nmonitoring.llm.example.org\n")
    settings = {"certificatesResolvers": {"acme": {"acme": {"caServer": "https://acme.example.org/dir"}}}}
    (tmp_path / "traefik.yaml").write_text(json.dumps(settings))
    known = {"server": "https://acme.example.org/acct/1", "domain": "llm.example.org", **store}
    certificates = store.get("certificates", [{"domain": {"main": known["domain"]}}])
    document = {"acme": {"Account": {"Registration": {"uri": known["server"]}}, "Certificates": certificates}}
    assert takeover.fits(json.dumps(document).encode(), tmp_path) == taken
    assert not takeover.fits(b"nonsense", tmp_path)


def test_what_arrived_and_what_was_let_through() -> None:
    """As nft tells it, with and without a time at an element."""
    listed = json.dumps(
        {
            "nftables": [
                {"set": {"name": "arrived_4", "elem": ["203.0.113.5"]}},
                {"set": {"name": "arrived_6", "elem": [{"elem": {"val": "2001:db8::1", "expires": 5}}]}},
                {"set": {"name": "knocked", "elem": ["198.51.100.1"]}},
            ]
        }
    )
    assert takeover.read_arrived(listed) == set(ADDRESSES)
    assert takeover.was_knocked(listed, "198.51.100.1")
    assert not takeover.was_knocked(listed, "203.0.113.5")
