"""The name server's answers, in process: what zones say, what is asked elsewhere, and what fits into a datagram."""

from typing import Any

import dns.edns
import dns.exception
import dns.flags
import dns.message
import dns.opcode
import dns.rcode
import dns.rdatatype
import pytest

from scripts.local_cloud.machine_interface import MachineFailed, RecordSet, Zone
from scripts.local_cloud.machines import name_server, zone_answers
from scripts.local_cloud.machines.network import Network

SOA = "hydrogen.ns.hetzner.com. dns.hetzner.com. 2026112600 86400 10800 3600000 600"


def _set(name: str, kind: str, *values: str, ttl_s: int = 3600) -> RecordSet:
    return RecordSet(name, kind, ttl_s, values)


ZONES = tuple(
    zone_answers.load(each)
    for each in (
        Zone(
            "example.org",
            (
                _set("example.org", "SOA", SOA),
                _set("example.org", "NS", "hydrogen.ns.hetzner.com.", "oxygen.ns.hetzner.com."),
                _set("example.org", "A", "192.0.2.1"),
                _set("example.org", "MX", "10 mail", "20 mail.example.net."),
                _set("www.example.org", "A", "192.0.2.2", "192.0.2.3", ttl_s=60),
                _set("www.example.org", "AAAA", "2001:db8::2", ttl_s=90),
                _set("alias.example.org", "CNAME", "www"),
                _set("other.example.org", "CNAME", "www.example.com."),
                _set("astray.example.org", "CNAME", "nowhere"),
                _set("away.example.org", "CNAME", "www.example.net."),
                _set("circle.example.org", "CNAME", "circle"),
                _set("*.wild.example.org", "A", "192.0.2.4"),
                _set("known.wild.example.org", "TXT", '"known"'),
                _set("a.b.c.example.org", "A", "192.0.2.5"),
                _set("sub.example.org", "NS", "ns.example.net."),
                _set("long.example.org", "TXT", *(f'"{number:03}{"x" * 200}"' for number in range(20))),
            ),
        ),
        Zone("example.com", (_set("example.com", "SOA", SOA), _set("www.example.com", "A", "192.0.2.9"))),
    )
)


def _query(name: str, kind: str = "A", **options: Any) -> dns.message.QueryMessage:
    return dns.message.make_query(name, kind, **options)


def _ask(query: dns.message.Message, over_tcp: bool = False) -> dns.message.Message:
    told = name_server.respond(query.to_wire(), ZONES, over_tcp)
    assert isinstance(told, bytes)
    answer = dns.message.from_wire(told)
    assert answer.id == query.id
    assert answer.flags & dns.flags.QR
    return answer


def _records(answer: dns.message.Message) -> list[str]:
    """One line each, those of one name in order: they are sent in a random one."""
    return [line for each in answer.answer for line in sorted(each.to_text().splitlines())]


@pytest.mark.parametrize(
    ("name", "kind", "lines"),
    [
        ("example.org", "A", ["example.org. 3600 IN A 192.0.2.1"]),
        ("www.example.org", "A", ["www.example.org. 60 IN A 192.0.2.2", "www.example.org. 60 IN A 192.0.2.3"]),
        ("WwW.eXample.org", "AAAA", ["www.example.org. 90 IN AAAA 2001:db8::2"]),
        (
            "example.org",
            "MX",
            ["example.org. 3600 IN MX 10 mail.example.org.", "example.org. 3600 IN MX 20 mail.example.net."],
        ),
        (
            "example.org",
            "NS",
            ["example.org. 3600 IN NS hydrogen.ns.hetzner.com.", "example.org. 3600 IN NS oxygen.ns.hetzner.com."],
        ),
        ("example.org", "SOA", [f"example.org. 3600 IN SOA {SOA}"]),
        ("known.wild.example.org", "TXT", ['known.wild.example.org. 3600 IN TXT "known"']),
        ("any.wild.example.org", "A", ["any.wild.example.org. 3600 IN A 192.0.2.4"]),
        ("deep.any.wild.example.org", "A", ["deep.any.wild.example.org. 3600 IN A 192.0.2.4"]),
        ("alias.example.org", "CNAME", ["alias.example.org. 3600 IN CNAME www.example.org."]),
        (
            "alias.example.org",
            "AAAA",
            ["alias.example.org. 3600 IN CNAME www.example.org.", "www.example.org. 90 IN AAAA 2001:db8::2"],
        ),
        (
            "other.example.org",
            "A",
            ["other.example.org. 3600 IN CNAME www.example.com.", "www.example.com. 3600 IN A 192.0.2.9"],
        ),
    ],
)
def test_names_of_zones_are_answered(name: str, kind: str, lines: list[str]) -> None:
    """With authority and their own times to live; aliases are followed, into another zone as well."""
    answer = _ask(_query(name, kind))
    assert [line.lower() for line in _records(answer)] == [line.lower() for line in lines]
    assert answer.rcode() == dns.rcode.NOERROR
    assert answer.flags & dns.flags.AA
    assert answer.question[0].name.to_text() == f"{name}."  # in the letters that it was asked in


@pytest.mark.parametrize(
    ("name", "kind", "code", "count"),
    [
        ("nowhere.example.org", "A", dns.rcode.NXDOMAIN, 0),
        ("below.www.example.org", "A", dns.rcode.NXDOMAIN, 0),
        ("astray.example.org", "A", dns.rcode.NXDOMAIN, 1),
        ("below.known.wild.example.org", "A", dns.rcode.NXDOMAIN, 0),
        ("www.example.org", "TXT", dns.rcode.NOERROR, 0),
        ("any.wild.example.org", "AAAA", dns.rcode.NOERROR, 0),
        ("known.wild.example.org", "A", dns.rcode.NOERROR, 0),
        ("b.c.example.org", "A", dns.rcode.NOERROR, 0),
        ("alias.example.org", "TXT", dns.rcode.NOERROR, 1),
    ],
)
def test_that_there_is_nothing_is_told_with_the_authority(
    name: str, kind: str, code: dns.rcode.Rcode, count: int
) -> None:
    """NXDOMAIN where there is no such name, an empty answer where it has others; kept as long as the SOA allows."""
    answer = _ask(_query(name, kind))
    assert (answer.rcode(), len(answer.answer)) == (code, count)
    [soa] = answer.authority
    assert (soa.rdtype, soa.name.to_text(), soa.ttl) == (dns.rdatatype.SOA, "example.org.", 600)


def test_parts_that_belong_to_others_are_referred_to_them() -> None:
    """Without authority; the name servers come beside the answer."""
    answer = _ask(_query("www.sub.example.org"))
    assert (answer.answer, answer.flags & dns.flags.AA) == ([], 0)
    assert [each.to_text() for each in answer.authority] == ["sub.example.org. 3600 IN NS ns.example.net."]


def test_any_asks_for_all_and_a_circle_ends() -> None:
    """Neither hangs."""
    assert {each.rdtype for each in _ask(_query("www.example.org", "ANY")).answer} == {
        dns.rdatatype.A,
        dns.rdatatype.AAAA,
    }
    assert _ask(_query("circle.example.org")).rcode() == dns.rcode.NOERROR


def test_what_does_not_fit_is_cut_and_comes_whole_over_tcp() -> None:
    """512 bytes without EDNS, what the asker takes with it, at most what passes every network."""
    for options, room in (({}, 512), ({"use_edns": 0, "payload": 800}, 800), ({"use_edns": 0, "payload": 4096}, 1232)):
        query = _query("long.example.org", "TXT", **options)
        wire = name_server.respond(query.to_wire(), ZONES, over_tcp=False)
        assert isinstance(wire, bytes)
        assert len(wire) <= room
        assert dns.message.from_wire(wire).flags & dns.flags.TC
    whole = _ask(_query("long.example.org", "TXT"), over_tcp=True)
    assert not whole.flags & dns.flags.TC
    assert len(whole.answer[0]) == 20


def test_edns_is_answered_with_edns() -> None:
    """And only then; options that are not known are passed over, versions that are not known are refused."""
    assert _ask(_query("www.example.org")).edns == -1
    asked = _query("www.example.org", use_edns=0, options=[dns.edns.ECSOption("192.0.2.0", 24)], want_dnssec=True)
    answer = _ask(asked)
    assert (answer.edns, answer.payload, len(answer.answer)) == (0, 1232, 1)
    assert _ask(_query("www.example.org", use_edns=1)).rcode() == dns.rcode.BADVERS


def test_what_is_no_question_is_refused() -> None:
    """Each with its code; answers are not answered, or two servers could go on for ever."""
    assert _ask(_query("example.org", "AXFR")).rcode() == dns.rcode.REFUSED
    assert _ask(_query("example.org", "A", rdclass="CH")).rcode() == dns.rcode.REFUSED
    notify = _query("example.org", "SOA")
    notify.set_opcode(dns.opcode.NOTIFY)
    assert _ask(notify).rcode() == dns.rcode.NOTIMP
    twice = _query("example.org")
    twice.question.append(_query("www.example.org").question[0])
    assert _ask(twice).rcode() == dns.rcode.FORMERR
    wire = _query("example.org").to_wire()
    told = name_server.respond(wire[:-3], ZONES, over_tcp=False)
    assert isinstance(told, bytes)
    assert told[:4] == wire[:2] + b"\x80\x01"
    assert name_server.respond(_ask(_query("example.org")).to_wire(), ZONES, over_tcp=False) is None
    assert name_server.respond(b"short", ZONES, over_tcp=False) is None


def _later(name: str, over_tcp: bool = False) -> name_server.Later:
    told = name_server.respond(_query(name).to_wire(), ZONES, over_tcp)
    assert isinstance(told, name_server.Later)
    return told


def test_other_names_are_handed_on_as_they_came() -> None:
    """The same way; without anybody to ask they are refused, and a silence is told as a failure."""
    later, asked = _later("www.example.net", over_tcp=True), []

    def forward(wire: bytes, over_tcp: bool) -> bytes:
        asked.append((wire, over_tcp))
        return b"told"

    assert name_server.finish(later, forward) == b"told"
    assert asked == [(later.wire, True)]
    refused = dns.message.from_wire(name_server.finish(later, None))
    assert (refused.rcode(), refused.id) == (dns.rcode.REFUSED, later.query.id)
    failed = dns.message.from_wire(name_server.finish(later, lambda wire, over_tcp: None))
    assert failed.rcode() == dns.rcode.SERVFAIL


def test_aliases_are_followed_out_of_the_zones() -> None:
    """Over TCP if need be; who does not ask for that is told the alias alone."""
    asked = []

    def forward(wire: bytes, over_tcp: bool) -> bytes:
        asked.append(over_tcp)
        answer = dns.message.make_response(dns.message.from_wire(wire))
        if over_tcp:
            answer.answer.append(dns.rrset.from_text("www.example.net.", 5, "IN", "A", "192.0.2.7"))
        else:
            answer.flags |= dns.flags.TC
        return answer.to_wire()

    alias = "away.example.org. 3600 IN CNAME www.example.net."
    told = dns.message.from_wire(name_server.finish(_later("away.example.org"), forward))
    assert _records(told) == [alias, "www.example.net. 5 IN A 192.0.2.7"]
    assert asked == [False, True]
    assert _records(dns.message.from_wire(name_server.finish(_later("away.example.org"), None))) == [alias]
    failed = name_server.finish(_later("away.example.org"), lambda wire, over_tcp: None)
    assert dns.message.from_wire(failed).rcode() == dns.rcode.SERVFAIL
    alone = _query("away.example.org")
    alone.flags &= ~dns.flags.RD
    assert _records(_ask(alone)) == [alias]


def test_a_host_that_asks_this_server_is_not_asked_by_it() -> None:
    """The question would go round for ever; its resolvers on loopback are as good as any."""
    text = "# a comment\nnameserver 127.0.0.53\nsearch a\nnameserver 169.254.17.3\nnameserver ::1\nnameserver\n"
    assert name_server.parse_resolvers(text, "169.254.17.3") == ["127.0.0.53", "::1"]


def test_a_zone_that_cannot_be_served_is_told_so() -> None:
    """Whatever the API let through."""
    for sets in ((), (_set("example.org", "SOA", SOA), _set("www.example.org", "A", "no address"))):
        with pytest.raises(MachineFailed, match=r"the zone example.org cannot be served"):
            zone_answers.load(Zone("example.org", sets))


def test_two_clouds_have_two_name_servers() -> None:
    """Each at an address of its own."""
    addresses = {Network(tag, "198.18.0.0/16", print).name_server_address for tag in ("abcdef", "abcdee")}
    assert len(addresses) == 2
