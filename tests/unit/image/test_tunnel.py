"""The tunnel of a rollout: what leads through it, and that it leaves nothing behind."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.image.harness import ROOT
from tests.image.scripts import load_script

tunnel = load_script("rootfs/usr/lib/mini-llm/tunnel.py")
handover = load_script("rootfs/usr/lib/mini-llm/handover.py")
ROOTFS = ROOT / "image" / "rootfs"
ENDS = tunnel.Ends("10.77.0.3", "10.77.0.2")
RULES = "0:\tfrom all lookup local\n32766:\tfrom all lookup main\n32767:\tfrom all lookup default\n"


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The kernel's, in a folder."""
    root = tmp_path / "net"
    names = [*tunnel._BOTH, *tunnel._NEW_ONLY]
    for name in (*names, "ipv4/conf/rollout/rp_filter", "ipv4/conf/rollout/accept_local"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("before\n")
    monkeypatch.setattr(tunnel, "_SETTINGS", root)
    return root


class Kernel:
    """Takes words for ``ip`` and ``nft``, and keeps rules as the kernel would."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.rules = {"-4": {0: "local", 32766: "main"}, "-6": {0: "local", 32766: "main"}}

    def ask(self, command: list[str], text: str = "") -> str:
        self.asked.append(" ".join(command[1:]) + text)
        match command:
            case ["ip", family, "rule"]:
                return "".join(f"{at}:\tfrom all lookup {to}\n" for at, to in sorted(self.rules[family].items()))
            case ["ip", family, "rule", "add", *words]:
                self.rules[family][int(words[-1])] = words[words.index("lookup") + 1]
            case ["ip", family, "rule", "delete", "priority", at]:
                del self.rules[family][int(at)]
            case ["ip", "link", "delete", *_]:
                raise subprocess.CalledProcessError(1, command)
        return ""


def test_the_new_end_comes_and_goes(settings: Path, tmp_path: Path) -> None:
    """Marked packets go through it before anything else; afterwards rules and settings are as they were."""
    kernel, memory = Kernel(), tmp_path / "memory"
    tunnel.open_new(ENDS, "eth0", ["203.0.113.5", "2001:db8::1"], memory, kernel.ask)
    for family in ("-4", "-6"):
        assert kernel.rules[family] == {1: tunnel.TABLE, 10: "local", 32766: "main"}
    assert (settings / "ipv4/ip_forward").read_text() == "1"
    assert any(words.startswith("link add rollout mtu 1400 type vxlan") for words in kernel.asked)
    tunnel.close(memory, kernel.ask)
    for family in ("-4", "-6"):
        assert kernel.rules[family] == {0: "local", 32766: "main"}
    for name in (*tunnel._BOTH, *tunnel._NEW_ONLY):
        assert (settings / name).read_text() == "before"
    assert not memory.exists()


def test_opened_twice_it_remembers_what_was_before_the_first(settings: Path, tmp_path: Path) -> None:
    """A unit that was killed and started again must not take its own settings for the old ones."""
    kernel, memory = Kernel(), tmp_path / "memory"
    for _ in range(2):
        tunnel.open_new(ENDS, "eth0", ["203.0.113.5"], memory, kernel.ask)
    tunnel.close(memory, kernel.ask)
    assert (settings / "ipv6/conf/all/forwarding").read_text() == "before"
    assert kernel.rules["-4"] == {0: "local", 32766: "main"}


def test_the_old_end_leads_little_until_told(settings: Path, tmp_path: Path) -> None:
    """Answers to who came through it; then all that is sent under the address, but not what goes to this node."""
    kernel, memory = Kernel(), tmp_path / "memory"
    tunnel.open_old(ENDS, ["203.0.113.5", "2001:db8::1"], memory, kernel.ask)
    for family, address in (("-4", "203.0.113.5"), ("-6", "2001:db8::1")):
        assert kernel.rules[family] == {0: "local", 19999: tunnel.TABLE, 32766: "main"}
        words = f"rule add from {address} fwmark {tunnel._MARK} lookup {tunnel.TABLE} priority 19999"
        assert f"{family} {words}" in kernel.asked
    kernel.ask(["ip", *tunnel.moved_command("203.0.113.5").split()])
    assert kernel.rules["-4"] == {0: "local", 19999: tunnel.TABLE, 20000: tunnel.TABLE, 32766: "main"}
    tunnel.close(memory, kernel.ask)
    for family in ("-4", "-6"):
        assert kernel.rules[family] == {0: "local", 32766: "main"}


def test_only_unknown_flows_of_the_addresses_are_handed_on() -> None:
    """And only where there is a tunnel; the node is a router for nobody else."""
    text = tunnel.render_watch("eth0", ["203.0.113.5", "2001:db8::1"], hand_on=True)
    assert f'iifname "eth0" ip daddr 203.0.113.5 ct state invalid meta mark set {tunnel._MARK}' in text
    assert f'iifname "eth0" ip6 daddr 2001:db8::1 ct state invalid meta mark set {tunnel._MARK}' in text
    assert "hook forward priority filter; policy drop;" in text
    watching = tunnel.render_watch("eth0", ["203.0.113.5"], hand_on=False)
    assert "meta mark set" not in watching
    assert "forward" not in watching
    assert "update @arrived_4 { ip daddr }" in watching


def test_the_link_outside() -> None:
    """By the default route."""
    assert tunnel.find_link("default via 172.31.1.1 dev enp1s0 proto dhcp\n") == "enp1s0"
    with pytest.raises(ValueError, match="no link leads outside"):
        tunnel.find_link("")


def test_the_nodes_own_table_lets_a_rollout_through_and_nothing_else() -> None:
    """Its two ports, by the names and numbers that the programs have; forwarded is the tunnel alone."""
    table = (ROOTFS / "etc/nftables.conf").read_text()
    assert f"iifname @private tcp dport {handover.PORT} accept" in table
    assert f"iifname @private ip saddr @peers udp dport {tunnel._VXLAN_PORT} accept" in table
    forward = table.partition("chain forward {")[2].partition("}")[0]
    assert "policy drop" in forward
    accepted = [line.strip() for line in forward.splitlines() if line.endswith("accept")]
    assert accepted == [f'{side}ifname "{tunnel.INTERFACE}" accept' for side in ("i", "o")]
    listening = (ROOTFS / "etc/systemd/system/mini-llm-handover.socket").read_text()
    assert f"ListenStream=0.0.0.0:{handover.PORT}\n" in listening


@pytest.mark.parametrize(("interface", "there"), [("lo", True), ("nobody-s", False)])
def test_whether_there_is_an_end_of_it(monkeypatch: pytest.MonkeyPatch, interface: str, there: bool) -> None:
    """By the kernel's own word: whatever took it away, it is gone."""
    monkeypatch.setattr(tunnel, "INTERFACE", interface)
    assert tunnel.is_open() is there


def test_the_lease_ends_by_a_clock_that_does_not_jump(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes on as long as it is touched, whatever time of day that gives it."""
    (tmp_path / "addresses").write_text("203.0.113.5\n")
    lease, now_s, slept = tmp_path / "lease", [0.0], [0]
    lease.touch()

    def sleep(seconds: float) -> None:
        now_s[0] += seconds
        slept[0] += 1
        if slept[0] <= 30:  # three leases long, each time at another time of day, the first of them long ago
            os.utime(lease, (slept[0], slept[0]))

    monkeypatch.setattr(tunnel, "open_old", lambda *words: None)
    monkeypatch.setattr(tunnel, "tell_ready", lambda: None)
    monkeypatch.setattr(tunnel.time, "sleep", sleep)
    monkeypatch.setattr(tunnel.time, "monotonic", lambda: now_s[0])
    tunnel.keep_open(tunnel.Ends("10.0.0.2", "10.0.0.3"), lease, tmp_path / "addresses", tmp_path)
    assert now_s[0] == pytest.approx(4 * tunnel._LEASE_S, rel=0.05)
