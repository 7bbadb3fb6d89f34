"""The cloud's name server: real clients change zones, and the host, servers and a second cloud see what it answers.

Debian's hcloud CLI (1.30) is older than zones; Terraform's provider is tried in ``test_clients``.
"""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import dns.exception
import dns.message
import dns.query
import dns.rcode
import dns.rrset
import pytest
from hcloud import Client
from hcloud.firewalls import FirewallResource, FirewallRule
from hcloud.images import Image
from hcloud.server_types import ServerType
from hcloud.zones import BoundZone, ZoneRecord, ZoneRRSet

from scripts.bake.answers import given
from scripts.local_cloud.machine_interface import MachineFailed
from scripts.local_cloud.machines.host_settings import NAMESPACES
from scripts.local_cloud.machines.inner_sockets import listen_in
from scripts.local_cloud.machines.network import tag_of
from tests.local_cloud.harness import LocalCloud, address_of, cut_off, running_cloud, ssh, traces

OUTSIDE = "127.0.77.53"  # where the resolver of the test answers


def _records(*values: str) -> list[ZoneRecord]:
    return [ZoneRecord(value=value) for value in values]


def ask(address: str, name: str, kind: str = "A") -> dns.message.Message:
    """What a name server says, by datagrams and, if that is cut, by TCP."""
    query = dns.message.make_query(name, kind, use_edns=0, payload=1232)
    return dns.query.udp_with_fallback(query, address, timeout=5)[0]


def values(address: str, name: str, kind: str = "A") -> list[str]:
    return sorted(value.to_text() for found in ask(address, name, kind).answer for value in found)


@contextmanager
def outside_resolver() -> Iterator[list[str]]:
    """A resolver on the host's loopback address that knows one address for every name; yields what it was asked."""
    asked: list[str] = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as line:
        line.bind((OUTSIDE, 53))
        line.settimeout(0.1)
        over = threading.Event()

        def serve() -> None:
            while not over.is_set():
                try:
                    wire, caller = line.recvfrom(4096)
                except TimeoutError:
                    continue
                query = dns.message.from_wire(wire)
                name, kind = query.question[0].name, query.question[0].rdtype
                asked.append(name.to_text())
                answer = dns.message.make_response(query)
                if kind == dns.rdatatype.A:
                    answer.answer.append(dns.rrset.from_text(name, 5, "IN", "A", "192.0.2.77"))
                line.sendto(answer.to_wire(), caller)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield asked
        finally:
            over.set()
            thread.join()


@pytest.fixture(scope="module")
def outside() -> Iterator[list[str]]:
    """What somebody outside was asked."""
    with outside_resolver() as asked:
        yield asked


@pytest.fixture(scope="module")
def cloud(host: None, outside: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCloud]:
    """A cloud that asks this test's resolver for all other names."""
    with running_cloud(tmp_path_factory.mktemp("names"), "--resolver", OUTSIDE) as running:
        yield running


@pytest.fixture(scope="module")
def client(cloud: LocalCloud) -> Client:
    return cloud.client()


@pytest.fixture(scope="module")
def zone(client: Client) -> BoundZone:
    """A zone with an address, an alias, a wildcard, a long text."""
    sets = [
        ZoneRRSet(name="@", type="A", ttl=60, records=_records("192.0.2.1")),
        ZoneRRSet(name="www", type="CNAME", records=_records("example.org.")),
        ZoneRRSet(name="out", type="CNAME", records=_records("elsewhere.example.")),
        ZoneRRSet(name="*.any", type="AAAA", records=_records("2001:db8::1")),
        ZoneRRSet(name="long", type="TXT", records=_records(*(f'"{n}{"x" * 240}"' for n in range(10)))),
    ]
    made = client.zones.create(name="example.org", mode="primary", labels={"a": "b"}, rrsets=sets)
    made.action.wait_until_finished()
    return made.zone


def test_the_host_asks_for_what_clients_make(cloud: LocalCloud, client: Client, zone: BoundZone) -> None:
    """Answered within a second of the call, by datagrams and by TCP; the cloud prints where."""
    address = cloud.name_server
    assert f"are answered at {address}" in cloud.output()
    assert values(address, "example.org") == ["192.0.2.1"]
    assert values(address, "www.example.org")[0] == "192.0.2.1"
    assert values(address, "one.any.example.org", "AAAA") == ["2001:db8::1"]
    assert len(values(address, "long.example.org", "TXT")) == 10
    assert values(address, "example.org", "NS")[0] == "helium.ns.hetzner.de."
    assert ask(address, "nowhere.example.org").rcode() == dns.rcode.NXDOMAIN
    assert client.zones.get("example.org").id == zone.id
    assert client.zones.get_all(label_selector="a=b")[0].record_count == 18
    begin_s = time.monotonic()
    made = client.zones.create_rrset(zone, name="new", type="A", ttl=60, records=_records("192.0.2.5"))
    while values(address, "new.example.org") != ["192.0.2.5"]:
        assert time.monotonic() - begin_s < 1
    begin_s = time.monotonic()
    action = made.rrset.set_rrset_records(_records("192.0.2.6"))
    while values(address, "new.example.org") != ["192.0.2.6"]:
        assert time.monotonic() - begin_s < 1
    action.wait_until_finished()
    made.rrset.add_rrset_records(_records("192.0.2.7")).wait_until_finished()
    made.rrset.update_rrset_records([ZoneRecord("192.0.2.7", comment="seven")]).wait_until_finished()
    made.rrset.remove_rrset_records(_records("192.0.2.6")).wait_until_finished()
    made.rrset.change_rrset_ttl(None).wait_until_finished()
    zone.change_ttl(120).wait_until_finished()
    [found] = ask(address, "new.example.org").answer
    assert (found.ttl, [each.address for each in found]) == (120, ["192.0.2.7"])
    assert given(client.zones.get_rrset(zone, "new", "A").records)[0].comment == "seven"
    made.rrset.delete_rrset().action.wait_until_finished()
    assert ask(address, "new.example.org").rcode() == dns.rcode.NXDOMAIN


def test_other_names_are_asked_for_outside(cloud: LocalCloud, zone: BoundZone, outside: list[str]) -> None:
    """Aliases that lead there are followed."""
    assert values(cloud.name_server, "elsewhere.test") == ["192.0.2.77"]
    assert "elsewhere.test." in outside
    assert values(cloud.name_server, "out.example.org") == ["192.0.2.77", "elsewhere.example."]
    assert "out.example.org." not in outside


def test_servers_resolve_by_it(cloud: LocalCloud, client: Client, zone: BoundZone, key: Path) -> None:
    """It is their only resolver. Cut off, they know zones alone; a firewall for going out holds for names too."""
    known = client.ssh_keys.create("names", key.with_suffix(".pub").read_text())
    made = client.servers.create("asks", ServerType(name="cx23"), Image(name="debian-13"), ssh_keys=[known])
    address = address_of(made.server)

    def getent(name: str) -> str:
        return ssh(key, address, f"timeout 3 getent ahosts {name} | head -n 1 || true").partition(" ")[0].strip()

    try:
        assert cloud.name_server in ssh(key, address, "cat /etc/resolv.conf")
        seen = [getent(name) for name in ("www.example.org", "x.any.example.org", "elsewhere.test")]
        assert seen == ["192.0.2.1", "2001:db8::1", "192.0.2.77"]
        cut_off(cloud, "asks")
        assert [getent(name) for name in ("www.example.org", "elsewhere.test")] == ["192.0.2.1", ""]
        cut_off(cloud)
        assert getent("elsewhere.test") == "192.0.2.77"
        rules = [
            FirewallRule(direction="in", protocol="tcp", port="22", source_ips=["0.0.0.0/0"], destination_ips=[]),
            FirewallRule(direction="out", protocol="tcp", port="443", source_ips=[], destination_ips=["0.0.0.0/0"]),
        ]
        firewall = client.firewalls.create("out", rules, resources=[FirewallResource("server", server=made.server)])
        for action in given(firewall.actions):
            action.wait_until_finished()
        assert getent("www.example.org") == ""
        rules.append(
            FirewallRule(direction="out", protocol="udp", port="53", source_ips=[], destination_ips=["0.0.0.0/0"])
        )
        for action in firewall.firewall.set_rules(rules):
            action.wait_until_finished()
        assert getent("www.example.org") == "192.0.2.1"
    finally:
        made.server.delete().wait_until_finished()


def test_two_clouds_answer_beside_each_other(cloud: LocalCloud, zone: BoundZone, tmp_path: Path) -> None:
    """Each for its own zones, also after a kill, with nobody to ask for other names if told so; nothing is left."""
    with running_cloud(tmp_path, "--resolver", "none") as other:
        assert other.name_server != cloud.name_server
        made = other.client().zones.create(name="example.net", mode="primary")
        made.action.wait_until_finished()
        assert values(other.name_server, "example.net", "NS") == values(cloud.name_server, "example.org", "NS")
        assert ask(other.name_server, "example.org").rcode() == dns.rcode.REFUSED
        assert values(cloud.name_server, "example.net") == ["192.0.2.77"]
        other.kill()
        with pytest.raises((dns.exception.Timeout, OSError)):
            dns.query.udp(dns.message.make_query("example.net", "NS"), other.name_server, timeout=0.5)
        other.restart()
        assert len(values(other.name_server, "example.net", "NS")) == 3
        made.zone.delete().action.wait_until_finished()
        assert ask(other.name_server, "example.net", "NS").rcode() == dns.rcode.REFUSED
        state = other.state
    assert traces(state) == {}


def test_a_port_that_is_taken_is_told(cloud: LocalCloud) -> None:
    """With the address, the port, and why."""
    namespace = NAMESPACES / f"mlc-{tag_of(cloud.state)}"
    for kind, name in ((socket.SOCK_STREAM, "TCP"), (socket.SOCK_DGRAM, "UDP")):
        with pytest.raises(MachineFailed, match=rf"{cloud.name_server}, {name} port 53: Address already in use"):
            listen_in(namespace, cloud.name_server, 53, kind)
