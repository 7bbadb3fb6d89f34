"""The image on the local cloud: baked by Packer, booted cut off from the outside, served, attacked, broken."""

import http.client
import json
import re
import shlex
import shutil
import socket
import ssl
import struct
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from hcloud.images import BoundImage
from hcloud.server_types import ServerType
from hcloud.ssh_keys import BoundSSHKey

from scripts.bake.answers import given
from scripts.local_cloud.machines.network import tag_of, transfer_addresses
from tests.absent import did_not_run
from tests.image.acme import AcmeServer, running_acme_server
from tests.image.harness import DOMAIN, ROOT, Node, bake, disk_of, node, packer
from tests.image.scripts import load_script
from tests.local_cloud.harness import LocalCloud, address_of, cut_off, traces
from tests.programs import ProgramMissing
from tests.tree import list_files

PROBE = Path(__file__).with_name("probe.py")
# The same unit, with another program in the service's place.
PROBE_UNIT = """[Service]
Type=oneshot
ExecStart=
ExecStart=/usr/bin/python3 -I /usr/share/probe.py
ExecStop=
Restart=no
StandardOutput=truncate:/run/probe.json
"""


def test_the_template_is_valid_and_formatted(tmp_path: Path) -> None:
    """Without a cloud; wrong values are refused with what would be right."""
    environment = {"HCLOUD_TOKEN": "local", "PATH": "/usr/bin:/bin"}
    try:
        packer(tmp_path, environment, "validate", "image")
    except ProgramMissing as error:
        did_not_run(error)
    packer(tmp_path, environment, "fmt", "-check", "image")
    for variable, message in (
        ("model=Bad Name", "must be a name of service/models.json"),
        ("first_layer=top", "must be model, base, stack or service"),
        ("from_image=debian", "must be the id of a snapshot"),
    ):
        with pytest.raises(AssertionError, match=message):
            packer(tmp_path, environment, "validate", f"-var={variable}", "image")


def test_the_snapshot_holds_nothing_of_who_baked(cloud: LocalCloud, image: BoundImage) -> None:
    """No key, identity, log, list or cache; nothing beside the model that a node does not need."""
    disk = disk_of(cloud, image)
    assert load_script("rootfs/usr/lib/mini-llm/audit_image.py").audit(disk) == []
    components = (disk / part for part in ("usr", "var", "opt/mini-llm/venv", "opt/mini-llm/models"))
    parts = subprocess.run(
        ["du", "--summarize", "--one-file-system", "--block-size=1000000", disk, *components],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    print(f"size in MB by component:\n{parts}")
    assert 100 < int(parts.split()[0]) < 1200
    assert list(disk.glob("opt/mini-llm/venv/**/*cuda*")) == []


def test_a_first_boot_enables_nothing(cloud: LocalCloud, image: BoundImage, served: Node) -> None:
    """What starts on a node was chosen in the bake; systemd would enable what the bake left out."""
    disk = disk_of(cloud, image)
    baked = {str(path.relative_to(disk)) for path in disk.glob("etc/systemd/system/*.wants/*")}
    assert set(served.run("cd / && ls -1 etc/systemd/system/*.wants/*").split()) == baked


def test_it_serves_without_the_outside(cloud: LocalCloud, served: Node) -> None:
    """Cut off from its first moment: ready, a generation by its key, streamed too; a wrong key is refused."""
    status, answer = served.ask("/generate", {"prompt": "How do I run the tests?", "temperature": 0})
    assert status == 200, answer
    assert "make test" in json.loads(answer)["response"]
    status, stream = served.ask("/generate", {"prompt": "How do I run the tests?", "stream": True})
    assert status == 200
    assert stream.count("data: ") > 3
    assert served.ask("/generate", {"prompt": "x"}, key="mllm_" + "0" * 32)[0] == 401
    version = json.loads(served.ask("/version")[1])
    assert version["image"]["version"] == "test-1"
    assert "llm_cost_eur_total" in served.run(
        f"curl -s -H 'Authorization: Bearer {served.api_key}' http://127.0.0.1:8080/metrics"
    )
    assert json.loads(served.run("cat /var/lib/mini-llm-node/image_audit.json")) == {"findings": []}
    assert served.run("systemctl --failed --no-legend").strip() == ""
    names = ("ipv4.conf.eth0.rp_filter", "ipv4.conf.eth0.send_redirects", "ipv6.conf.eth0.accept_redirects")
    assert served.run(f"sysctl -n {' '.join(f'net.{name}' for name in names)}").split() == ["2", "0", "0"]
    # When memory ends the engine goes first, and the model's pages last.
    assert served.run("cat /proc/$(pgrep -f '[s]ervice.engine.worker')/oom_score_adj").strip() == "800"
    assert served.run("systemctl show -P CPUWeight model.slice").strip() == "1000"
    kept = served.run("systemctl show -P MemoryMin model.slice; stat -c %s /opt/mini-llm/models/*.gguf").split()
    assert kept[0] == kept[1]
    # The way out counts what it drops: the node has asked for nothing out there.
    tag = tag_of(cloud.state)
    rules = subprocess.run(
        ["ip", "netns", "exec", f"mlc-{tag}", "nft", "list", "chain", "inet", f"mlc_{tag}", "outside"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "counter packets 0 bytes 0 drop" in rules, rules


def test_the_proxy(cloud: LocalCloud, served: Node) -> None:
    """HTTP leads to HTTPS, the metrics stay inside, headers protect, and no secret gets into its log."""
    status, _ = served.curl("/generate", "-o", "/dev/null", scheme="http")
    assert status in (301, 308)
    assert served.ask("/metrics")[0] == 404
    assert served.ask("/%2Fmetrics")[0] == 400  # of which the service would make another path
    status, headers = served.ask("/health", None, None, "-D", "-", "-o", "/dev/null")
    assert status == 200
    lines = {line.partition(":")[0].lower(): line.partition(":")[2].strip() for line in headers.splitlines()}
    assert lines["strict-transport-security"] == "max-age=31536000"
    assert lines["x-content-type-options"] == "nosniff"
    assert "server" not in lines
    served.ask("/health?secret=in-the-query")
    # Who holds them need not send a header for it; some of those before may still be at their end.
    assert 250 <= hold_connections(served, 300) <= 256
    for secure in (False, True):
        assert ask_at_once(served, 600, secure)[429] > 100
    assert served.curl("/x", "--insecure", host="stranger.test")[0] == 404
    log = served.run("journalctl --no-pager -o cat CONTAINER_NAME=mini-llm-traefik-1")
    assert "RouterName" in log
    assert "in-the-query" not in log
    assert "stranger" not in log  # what leads nowhere has no line: it has no limit either
    assert '"DownstreamStatus":200' in log
    assert '"DownstreamStatus":429' not in log  # of which there may be thousands a second
    assert served.api_key not in log
    state = json.loads(served.run("docker inspect mini-llm-traefik-1"))[0]
    host = state["HostConfig"]
    assert (host["ReadonlyRootfs"], host["CapDrop"], host["Privileged"]) == (True, ["ALL"], False)
    assert host["SecurityOpt"] == ["no-new-privileges:true"]
    assert state["Config"]["User"] == "801:801"
    assert "docker.sock" not in json.dumps(host)
    assert served.run("grep -h CapEff /proc/$(pgrep -x traefik)/status").split()[1] == "0" * 16
    # The service sees who asked, not the proxy.
    assert served.ask("/generate", {"prompt": "x", "max_tokens": 1})[0] == 200
    audited = served.run("tail -n 2 /var/lib/mini-llm/audit/*.jsonl")
    assert f'"{transfer_addresses(tag_of(cloud.state))[0]}"' in audited
    assert '"127.0.0.1"' not in audited


def hold_connections(served: Node, wanted: int) -> int:
    """How many of so many connections one client gets at the same time; all of them are ended."""
    with ExitStack() as held:
        for number in range(wanted):
            client = held.enter_context(socket.socket())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            try:
                client.connect((served.address, 443))
            except ConnectionRefusedError:
                return number
    return wanted


def ask_at_once(served: Node, times: int, secure: bool) -> Counter[int]:
    """Statuses of so many requests on one connection, as fast as they go."""
    statuses = Counter[int]()
    connection: http.client.HTTPConnection = http.client.HTTPConnection(served.address, timeout=10)
    if secure:
        unverified = ssl._create_unverified_context()
        connection = http.client.HTTPSConnection(served.address, timeout=10, context=unverified)
    with closing(connection):
        for _ in range(times):
            connection.request("GET", "/health", headers={"Host": DOMAIN})
            answer = connection.getresponse()
            answer.read()
            statuses[answer.status] += 1
    return statuses


@contextmanager
def reachable_acme_server(
    cloud: LocalCloud, folder: Path, name_server: str | None = None, **settings: int
) -> Iterator[tuple[AcmeServer, dict[str, str]]]:
    """An ACME server that nodes reach as long as it runs, and the facts that lead them to it."""
    host, _ = transfer_addresses(tag_of(cloud.state))
    cut_off(cloud)
    try:
        with running_acme_server(folder, host, name_server, **settings) as server:
            server.write_root(folder / "root.pem")
            authority = server.authority.read_text()
            yield server, {"email": "a@example.org", "server": server.directory, "authority": authority}
    finally:
        cut_off(cloud, "*")


def test_the_first_certificate_is_there_before_traefik(
    cloud: LocalCloud, image: BoundImage, known: BoundSSHKey, key: Path, tmp_path: Path
) -> None:
    """Which takes it and its account over, and so renews it by the same account: this one is soon at its end."""
    with (
        reachable_acme_server(cloud, tmp_path, validity_s=10 * 86400) as (server, acme),
        node(cloud.client(), image, known, key, acme=acme) as own,
    ):
        for name in (DOMAIN, f"monitoring.{DOMAIN}"):
            server.point(name, own.address)
        trusting = replace(own, authority=tmp_path / "root.pem")
        end_s = time.monotonic() + 60
        while trusting.ask("/generate", {"prompt": "How do I run the tests?"})[0] != 200:
            assert time.monotonic() < end_s, server.log.read_text()[-2000:]
            time.sleep(0.5)
        ended, started = own.run(
            "systemctl show --value -p InactiveEnterTimestampMonotonic mini-llm-first-certificate; "
            "systemctl show --value -p ActiveEnterTimestampMonotonic mini-llm-stack"
        ).split()
        assert 0 < int(ended) < int(started)
        unit = own.run("journalctl --no-pager -o cat -u mini-llm-first-certificate")
        assert f"the certificate of {DOMAIN} is there" in unit
        restart_s = time.monotonic() + 10
        while (issued := server.log.read_text().count("Issued certificate")) < 3:  # first, monitoring's, renewed
            assert time.monotonic() < end_s, (issued, server.log.read_text()[-2000:])
            if time.monotonic() > restart_s:  # it had tried before it answered at port 80
                own.run("docker restart mini-llm-traefik-1")
                restart_s = time.monotonic() + 10
            time.sleep(0.5)
        assert "There are now 2 accounts" not in server.log.read_text()
        # Afterwards there is nothing to do before Traefik.
        own.run("systemctl restart mini-llm-first-certificate")
        assert "ConditionResult=no" in own.run("systemctl show mini-llm-first-certificate")
        # A store that was cut short is put aside, or Traefik would order nothing as long as the node lives.
        own.run(
            "systemctl stop mini-llm-stack; truncate -s 700 /var/lib/mini-llm-traefik/acme.json; "
            "systemctl start mini-llm-stack; test -s /var/lib/mini-llm-traefik/acme.json.torn"
        )
        end_s = time.monotonic() + 60
        while trusting.ask("/health")[0] != 200:
            assert time.monotonic() < end_s, server.log.read_text()[-2000:]
            time.sleep(0.5)
        assert server.log.read_text().count("Issued certificate") > issued


def test_a_certificate_is_ordered_until_it_is_there(
    cloud: LocalCloud, image: BoundImage, known: BoundSSHKey, key: Path, tmp_path: Path
) -> None:
    """The name leads nowhere at first, so both orders fail; once it leads to the node the next one is served."""
    with (
        reachable_acme_server(cloud, tmp_path) as (server, acme),
        node(cloud.client(), image, known, key, acme=acme) as own,
    ):
        end_s = time.monotonic() + 30
        # The one before Traefik's start, then Traefik's of both names.
        while len(re.findall(r"authz \S+ set INVALID", server.log.read_text())) < 3:
            assert time.monotonic() < end_s, server.log.read_text()
            time.sleep(0.2)
        assert own.curl("/health")[0] == 0  # nobody vouches for it yet
        path = "/var/lib/mini-llm-node/metrics/certificate.prom"
        metrics = f"timeout 20 sh -c 'until cat {path} 2>/dev/null; do sleep 0.2; done'"
        assert f'mini_llm_certificate_delivered{{name="{DOMAIN}"}} 0' in own.run(metrics)
        server.point(DOMAIN, own.address)
        trusting = replace(own, authority=tmp_path / "root.pem")
        end_s = time.monotonic() + 90
        while (status := trusting.ask("/generate", {"prompt": "How do I run the tests?"})[0]) != 200:
            assert time.monotonic() < end_s, (status, server.log.read_text()[-2000:])
            time.sleep(0.5)
        assert "ordering again" in own.run("journalctl --no-pager -u mini-llm-certificate")
        own.run("sleep 1.5")  # it looks each second
        assert f'mini_llm_certificate_delivered{{name="{DOMAIN}"}} 1' in own.run(metrics)
        store = own.run("stat -c '%a %U' /var/lib/mini-llm-traefik/acme.json")
        assert store.split() == ["600", "mini-llm-traefik"]


def test_a_certificate_is_ordered_by_its_own_port(
    cloud: LocalCloud, image: BoundImage, known: BoundSSHKey, key: Path, tmp_path: Path
) -> None:
    """TLS-ALPN-01 in place of HTTP-01; the name of the monitoring gets one as well."""
    with (
        reachable_acme_server(cloud, tmp_path) as (server, acme),
        node(cloud.client(), image, known, key, acme={**acme, "challenge": "tls-alpn-01"}) as own,
    ):
        for name in (DOMAIN, f"monitoring.{DOMAIN}"):
            server.point(name, own.address)
        trusting = replace(own, authority=tmp_path / "root.pem")
        end_s = time.monotonic() + 90
        signs: list[Callable[[], bool]] = [
            lambda: trusting.ask("/generate", {"prompt": "How do I run the tests?"})[0] == 200,
            lambda: trusting.curl("/node", host=f"monitoring.{DOMAIN}")[0] == 401,
            lambda: json.loads(trusting.ask("/version")[1])["boot"]["certificate_s"] is not None,
        ]
        for seen in signs:
            while not seen():
                assert time.monotonic() < end_s, server.log.read_text()[-2000:]
                time.sleep(0.5)
        assert "tlsChallenge" in own.run("cat /run/mini-llm-traefik/traefik.yaml")


def test_the_scripts_are_as_shellcheck_wants_them() -> None:
    """Every shell script of the project."""
    if shutil.which("shellcheck") is None:
        did_not_run("shellcheck is not installed (Debian: sudo apt-get install shellcheck)")
    scripts = [path for name, path in list_files().items() if name.endswith(".sh") or name == ".ci/run"]
    done = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


def test_every_ban_of_the_unit_holds(cloud: LocalCloud, image: BoundImage, known: BoundSSHKey, key: Path) -> None:
    """Each is tried from inside; by root outside the unit most are possible, so the attempts themselves are sound."""
    with node(cloud.client(), image, known, key) as own:
        own.wait_ready()
        assert float(own.run("systemd-analyze security mini-llm --no-pager | tail -1").split()[-3]) <= 2.0
        program = shlex.quote(PROBE.read_text())
        own.run(f"printf %s {program} > /usr/share/probe.py")
        own.run(
            f"mkdir -p /etc/systemd/system/mini-llm.service.d; printf %s {shlex.quote(PROBE_UNIT)} "
            "> /etc/systemd/system/mini-llm.service.d/probe.conf; systemctl daemon-reload"
        )
        own.run("systemctl stop mini-llm.socket mini-llm.service; systemctl start mini-llm.service")
        seen = json.loads(own.run("cat /run/probe.json"))
        outside = json.loads(own.run("python3 -I /usr/share/probe.py"))
    assert len(seen) > 40
    assert {name: what for name, what in seen.items() if what != "refused"} == {}
    also_refused = sorted(name for name, what in outside.items() if what == "refused")
    print(f"refused to root as well, so that the unit's ban shows nothing here: {', '.join(also_refused)}")
    assert len(also_refused) < len(seen) / 2


def test_what_is_open_and_who_may_log_in(served: Node) -> None:
    """22, 80 and 443 alone; by key alone."""
    opened, filtered = [], []
    for port in (*range(20, 26), 53, 80, 111, 443, 3000, 8080, 8082, 8083, 9090, 9093, 9100, 9323):
        with socket.socket() as client:
            client.settimeout(0.3)
            try:
                client.connect((served.address, port))
                opened.append(port)
            except TimeoutError:
                filtered.append(port)
    assert opened == [22, 80, 443]
    assert filtered == [20, 21, 23, 24, 25, 53, 111, 3000, 8080, 8082, 8083, 9090, 9093, 9100, 9323]
    options = ["StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "PubkeyAuthentication=no", "BatchMode=yes"]
    words = [word for option in options for word in ("-o", option)]
    done = subprocess.run(["ssh", *words, f"root@{served.address}", "true"], capture_output=True, text=True, timeout=30)
    assert done.returncode == 255
    assert "Permission denied (publickey)" in done.stderr
    # The kind that sshd uses, and none whose making would hold the first boot up.
    list_keys = "ls /etc/ssh/ssh_host_*_key"
    assert served.run(list_keys).split() == ["/etc/ssh/ssh_host_ed25519_key"]
    # Where cloud-init made none, that kind is made all the same, or nobody could log in to see why.
    again = "/run/systemd/system/sshd-keygen.service.d"
    begin = f"mkdir -p {again}; printf '[Unit]\\nConditionFirstBoot=\\n' > {again}/again.conf; systemctl daemon-reload"
    made = f"rm /etc/ssh/ssh_host_*; systemctl restart sshd-keygen; {list_keys}"
    assert served.run(f"{begin}; {made}").split() == ["/etc/ssh/ssh_host_ed25519_key"]
    served.run(f"rm -r {again}; systemctl daemon-reload; systemctl restart ssh")
    # Docker has made no rules; the node's own go and come without those of others.
    assert served.run("nft list tables") == "table inet node\n"
    tables = served.run(
        "nft add table ip other && systemctl restart nftables && nft list tables; nft delete table ip other"
    )
    assert sorted(tables.splitlines()) == ["table inet node", "table ip other"]
    # Only root itself may ask the metadata service, which holds the user-data.
    ask = "curl -s -m 2 -o /dev/null -w '%{http_code}' http://169.254.169.254/hetzner/v1/userdata || true"
    assert served.run(ask).strip() == "200"
    as_service = "setpriv --reuid mini-llm --clear-groups sh -c"
    assert served.run(f"{as_service} {shlex.quote(ask)}").strip() == "000"
    # Nor at its address of IPv6, which the local cloud has not; here it is one of the node's own for a moment.
    ask = "curl -s -m 2 -o /dev/null -w '%{http_code}' 'http://[fe80::a9fe:a9fe%25eth0]:8099/' || true"
    # (Python's http.server would first ask for its own name, which nobody here knows.)
    lines = ["import socket", "server = socket.socket(socket.AF_INET6)"]
    lines += ["server.bind(socket.getaddrinfo('fe80::a9fe:a9fe%eth0', 8099)[0][4])", "server.listen()", "while True:"]
    lines += ["    client, _ = server.accept()", "    client.recv(4096)"]
    lines += [r"    client.sendall(b'HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n')"]
    told = served.run(
        f"ip address add fe80::a9fe:a9fe/128 dev eth0 nodad; python3 -c {shlex.quote(chr(10).join(lines))} >&2 & "
        "for try in $(seq 50); do ss -Hltn sport = 8099 | grep -q . && break; sleep 0.1; done; "
        f"{ask}; echo; {as_service} {shlex.quote(ask)}; echo; kill $!; ip address delete fe80::a9fe:a9fe/128 dev eth0"
    )
    assert told.split() == ["200", "000"]


def test_who_manages_the_network_leaves_a_rollout_alone(served: Node) -> None:
    """The tunnel's rules and routes are in none of its files; without a word of ours it would take them away."""
    begin = "ip rule add from 192.0.2.9 lookup 107 priority 20000; ip route add 192.0.2.9 dev lo table 107"
    end = "{ ip rule delete priority 20000; ip route flush table 107; } 2>/dev/null"
    look = f"{begin}; systemctl restart systemd-networkd; sleep 2; ip rule; ip route show table 107; {end}"
    said, aside = "/etc/systemd/networkd.conf.d/mini-llm.conf", "/run/networkd.conf"
    unsaid = served.run(f"mv {said} {aside}; {look}; mv {aside} {said}; systemctl restart systemd-networkd")
    assert "from 192.0.2.9 lookup 107" not in unsaid
    told = served.run(f"{look}; true")
    assert "from 192.0.2.9 lookup 107" in told
    assert "192.0.2.9 dev lo" in told


def test_wrong_facts_are_told_and_nothing_is_served(
    cloud: LocalCloud, image: BoundImage, known: BoundSSHKey, key: Path
) -> None:
    """At /ready and on the console; root still gets in."""
    facts = "domain: llm.test\nacme: {email: a@example.org}\napi_keys: [{name: a, sha256: oops}]"
    with node(cloud.client(), image, known, key, facts=facts) as own:
        expected = "api_keys[0].sha256: must be the key's SHA-256"
        end_s = time.monotonic() + 30
        while expected not in (answer := own.curl("/ready", "--insecure")[1]):
            assert time.monotonic() < end_s, answer
            time.sleep(0.2)
        assert own.curl("/ready", "--insecure")[0] == 503
        assert own.curl("/version", "--insecure")[0] == 404
        refused = own.run("curl -s -o /dev/null -w '%{http_code}' -d '{}' http://127.0.0.1:8080/generate")
        assert refused in ("401", "503")
        console = (cloud.state / "consoles" / f"{own.server.id}.log").read_text(errors="replace")
        assert f"this node does not serve: {expected}" in console


def test_a_snapshot_of_a_node_is_not_that_node(cloud: LocalCloud, served: Node, known: BoundSSHKey) -> None:
    """Without facts of its own it serves nobody, whatever it has of the other's; and says so."""
    client = cloud.client()
    made = served.server.create_image("of a node that serves")
    made.action.wait_until_finished()
    copy = client.servers.create("copy", ServerType(name="cx23"), made.image, ssh_keys=[known])
    try:
        own = replace(served, server=copy.server, address=address_of(copy.server))
        end_s = time.monotonic() + 30
        while "is another server's" not in (answer := own.curl("/ready", "--insecure")[1]):
            assert time.monotonic() < end_s, answer
            time.sleep(0.2)
        assert own.ask("/generate", {"prompt": "x"}, None, "--insecure")[0] == 404
    finally:
        copy.server.delete().wait_until_finished()
        made.image.delete()


def test_it_serves_again_after_whatever_happens(served: Node) -> None:
    """A killed engine, service or Docker, Docker started again or at the second try, a power cut, a reboot."""
    drop_in = "/run/systemd/system/docker.service.d"
    fails = "[Service]\\nExecStartPre=/bin/sh -c 'test -e /run/failed || { touch /run/failed; exit 1; }'\\n"
    fail_once = (
        f'mkdir -p {drop_in}; printf "{fails}" > {drop_in}/fails.conf; systemctl daemon-reload; '
        "systemctl stop docker.socket docker; systemctl start --no-block mini-llm-stack mini-llm-monitoring"
    )
    for end in (
        "pkill -9 -f '[s]ervice.engine.worker'",
        "systemctl kill -s KILL mini-llm",
        "pkill -9 -x dockerd",
        "systemctl restart docker",
        fail_once,
    ):
        served.run(end)
        units = "docker mini-llm mini-llm-stack mini-llm-monitoring"
        wait = f"for unit in {units}; do until systemctl --quiet is-active $unit; do sleep 0.5; done; done"
        served.run(f"sleep 3; timeout 60 sh -c '{wait}'")
        served.wait_ready()
        assert served.run("docker ps --quiet | wc -l").strip() == "5"
    body = json.dumps({"prompt": "Tell me all", "max_tokens": 900, "temperature": 1.5})
    served.run(
        f"nohup curl -s -H 'Authorization: Bearer {served.api_key}' -H 'Content-Type: application/json' "
        f"-d {shlex.quote(body)} http://127.0.0.1:8080/generate > /dev/null 2>&1 & sleep 0.3"
    )
    for restart in (served.server.reset, served.server.reboot):
        restart().wait_until_finished()
        served.wait_ready()
        assert served.ask("/generate", {"prompt": "How do I run the tests?"})[0] == 200
        # By its unit, which knows this boot's facts, and not by Docker at its own start.
        started_us, unit_us = served.run(
            "awk '{print $22 * 10000}' /proc/$(pgrep -x traefik)/stat; "  # in hundredths of a second since boot
            "systemctl show -P InactiveExitTimestampMonotonic mini-llm-stack"
        ).split()
        assert int(started_us) + 10_000 >= int(unit_us)
    assert "whole" in served.run(
        "cd /opt/mini-llm && set -a && . /etc/mini-llm/service.env && setpriv --reuid mini-llm --regid mini-llm "
        "--clear-groups env HOME=/nonexistent venv/bin/python -m service audit verify"
    )


def test_a_full_disk_costs_answers_and_nothing_else(
    cloud: LocalCloud, image: BoundImage, known: BoundSSHKey, key: Path
) -> None:
    """What cannot be told to the audit log is refused, and a service that cannot start is started once it can.

    The service's state lies on a small disk of its own here: the pool, which all servers share, grows when it fills.
    """
    state = "/var/lib/mini-llm"
    with node(cloud.client(), image, known, key) as own:
        own.wait_ready()
        own.run(
            f"systemctl stop mini-llm; cp -a {state} {state}-before; mount -t tmpfs -o size=16m none {state}; "
            f"cp -a {state}-before/. {state}; chown mini-llm: {state}; systemctl start mini-llm"
        )
        own.wait_ready()
        question = {"prompt": "How do I run the tests?", "max_tokens": 4}
        assert own.ask("/generate", question)[0] == 200
        own.run(f"cat /dev/zero > {state}/filler || true")
        answers = [own.ask("/generate", question) for _ in range(30)]  # what has begun already has its room
        assert {status for status, _ in answers} <= {200, 503}
        assert json.loads(answers[-1][1])["type"] == "urn:mini-llm:problem:records-unwritable"
        assert own.ask("/health")[0] == 200
        own.run(f"rm {state}/filler")
        end_s = time.monotonic() + 5  # what could not be put on the disk is tried again each second
        while (told := own.ask("/generate", question))[0] != 200:
            assert time.monotonic() < end_s, told
            assert json.loads(told[1])["type"] == "urn:mini-llm:problem:records-unwritable"
            time.sleep(0.2)
        own.run(f"systemctl stop mini-llm; cat /dev/zero > {state}/filler; systemctl start --no-block mini-llm")
        time.sleep(3)
        assert own.ask("/generate", question, None, "--max-time", "5")[0] != 200
        own.run(f"rm {state}/filler")
        own.wait_ready(patience_s=90)  # it is tried again ever more slowly, each minute at last
        assert own.ask("/generate", question)[0] == 200


def test_the_service_alone_is_baked_on_top_of_a_snapshot(
    cloud: LocalCloud, image: BoundImage, known: BoundSSHKey, key: Path, tmp_path: Path
) -> None:
    """Its layer starts from a snapshot that has those before it, needs nothing from outside, and serves."""
    begun_s = time.monotonic()
    again = bake(cloud, tmp_path, image_version="test-2", first_layer="service", from_image=str(image.id))
    print(f"the layer of the service alone took {time.monotonic() - begun_s:.0f} s")
    labels = given(again.labels)
    assert (labels["version"], labels["layer"]) == ("test-2", "service")
    assert cloud.client().ssh_keys.get_all(label_selector="!kept", name="packer") == []
    with node(cloud.client(), again, known, key) as own:
        own.wait_ready()
        assert json.loads(own.ask("/version")[1])["image"]["version"] == "test-2"
        # Nothing stays of what the image below did on the server that baked: it served there, and was watched.
        assert own.see("/node")["audit"]["findings"] == []


def test_user_data_is_as_cloud_init_wants_it(served: Node) -> None:
    """Each example, by cloud-init's own schema; a wrong one shows that it looks."""
    for path in sorted((ROOT / "cloud-init").glob("*.yaml")):
        told = shlex.quote(path.read_text())
        served.run(f"printf %s {told} > /run/user-data.yaml && cloud-init schema -c /run/user-data.yaml")
    with pytest.raises(AssertionError, match="Invalid"):
        served.run("printf '#cloud-config\\nwrite_files: 5\\n' > /run/wrong.yaml; cloud-init schema -c /run/wrong.yaml")


def test_nothing_is_left_by_the_bakes(cloud: LocalCloud, image: BoundImage) -> None:
    """Neither Packer's servers nor its keys."""
    client = cloud.client()
    assert [one.name for one in client.servers.get_all() if "bake" in given(one.name)] == []
    assert [one.name for one in client.ssh_keys.get_all()] == ["known"]
    assert traces(cloud.state) != {}
