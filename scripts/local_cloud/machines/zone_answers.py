"""Owns what DNS answers for zones: which records a question is for, and how it is told that there are none."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import dns.edns
import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.opcode
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import dns.rrset

from scripts.local_cloud.machine_interface import MachineFailed, Zone

_ALIASES_FOLLOWED = 16
_ZONE_TRANSFERS = (dns.rdatatype.AXFR, dns.rdatatype.IXFR)
# What passes every network in one piece; larger answers are asked for again over TCP.
_LARGEST_DATAGRAM = 1232
_SMALLEST_DATAGRAM = 512
_LARGEST_MESSAGE = 65535

_Node = Mapping[dns.rdatatype.RdataType, dns.rrset.RRset]


@dataclass(frozen=True)
class LoadedZone:
    """A zone to answer from: what there is at each name, names that only have others below them included."""

    origin: dns.name.Name
    nodes: Mapping[dns.name.Name, _Node]
    negative: dns.rrset.RRset  # the SOA as it stands beside the answer that there is nothing


@dataclass(frozen=True)
class Answer:
    """A message, and where an alias in it leads that is in none of the zones, or None."""

    message: dns.message.Message
    elsewhere: dns.name.Name | None = None


def load(zone: Zone) -> LoadedZone:
    """Raises MachineFailed for a zone that DNS cannot hold."""
    origin = dns.name.from_text(zone.name)
    nodes: dict[dns.name.Name, dict[dns.rdatatype.RdataType, dns.rrset.RRset]] = {origin: {}}
    try:
        for each in zone.record_sets:
            name = dns.name.from_text(each.name)
            found = dns.rrset.from_text_list(
                name, each.ttl_s, "IN", each.type, each.values, origin=origin, relativize=False
            )
            nodes.setdefault(name, {})[found.rdtype] = found
            while name != origin:
                name = name.parent()
                nodes.setdefault(name, {})
        soa = nodes[origin][dns.rdatatype.SOA]
    except (dns.exception.DNSException, ValueError, KeyError) as error:
        raise MachineFailed(f"the zone {zone.name} cannot be served: {error}") from error
    negative = soa.copy()  # type: ignore[no-untyped-call]  # dnspython leaves it without annotations
    negative.ttl = min(soa.ttl, soa[0].minimum)
    return LoadedZone(origin, nodes, negative)


def find_zone(zones: Iterable[LoadedZone], name: dns.name.Name) -> LoadedZone | None:
    """The zone that a name is in, the smallest if it is in several."""
    found = [zone for zone in zones if name.is_subdomain(zone.origin)]
    return max(found, key=lambda zone: len(zone.origin), default=None)


def answer(zones: Iterable[LoadedZone], query: dns.message.Message) -> Answer | None:
    """What the zones say to a query; None if it is for none of them."""
    if query.opcode() != dns.opcode.QUERY:
        return Answer(refuse(query, dns.rcode.NOTIMP))
    if len(query.question) != 1:
        return Answer(refuse(query, dns.rcode.FORMERR))
    if query.edns > 0:
        return Answer(refuse(query, dns.rcode.BADVERS))
    question = query.question[0]
    zones = tuple(zones)
    zone = find_zone(zones, question.name)
    if zone is None:
        return None
    if question.rdclass != dns.rdataclass.IN or question.rdtype in _ZONE_TRANSFERS:
        return Answer(refuse(query, dns.rcode.REFUSED))
    message = refuse(query, dns.rcode.NOERROR)
    message.flags |= dns.flags.AA
    name = question.name
    for _ in range(_ALIASES_FOLLOWED):
        alias = _tell(message, zone, name, question.rdtype)
        if alias is None:
            return Answer(message)
        name, zone = alias, find_zone(zones, alias)
        if zone is None:
            return Answer(message, elsewhere=alias)
    return Answer(message)  # they lead in a circle: whoever asked sees it


def _tell(
    message: dns.message.Message, zone: LoadedZone, name: dns.name.Name, kind: dns.rdatatype.RdataType
) -> dns.name.Name | None:
    """Adds to a message what a zone has of a name; the name to go on with if it has an alias."""
    if (referral := _find_referral(zone, name)) is not None:
        message.flags &= ~dns.flags.AA
        message.authority.append(referral)
        return None
    node = _find_node(zone, name)
    if node is None:
        message.set_rcode(dns.rcode.NXDOMAIN)
        message.authority.append(zone.negative)
        return None
    if kind == dns.rdatatype.ANY:
        found = list(node.values())
    else:
        found = [node[each] for each in (kind, dns.rdatatype.CNAME) if each in node][:1]
    for each in found:
        message.answer.append(_rename(each, name))
    if not found:
        message.authority.append(zone.negative)
    elif kind not in (found[0].rdtype, dns.rdatatype.ANY):
        target: dns.name.Name = found[0][0].target
        return target
    return None


def _find_referral(zone: LoadedZone, name: dns.name.Name) -> dns.rrset.RRset | None:
    """The name servers of the highest part below the zone's own name that belongs to others, if a name is in one."""
    for length in range(len(zone.origin) + 1, len(name) + 1):
        if found := zone.nodes.get(name.split(length)[1], {}).get(dns.rdatatype.NS):
            return found
    return None


def _find_node(zone: LoadedZone, name: dns.name.Name) -> _Node | None:
    """What there is of a name: its own, or a wildcard's below the closest name that there is; None if there is none."""
    if name in zone.nodes:
        return zone.nodes[name]
    closest = name.parent()
    while closest not in zone.nodes:
        closest = closest.parent()
    return zone.nodes.get(dns.name.Name(("*", *closest.labels)))


def _rename(found: dns.rrset.RRset, name: dns.name.Name) -> dns.rrset.RRset:
    return dns.rrset.from_rdata_list(name, found.ttl, list(found))


def refuse(query: dns.message.Message, code: dns.rcode.Rcode) -> dns.message.Message:
    """An answer that says a code and nothing else."""
    message = dns.message.make_response(query, recursion_available=True, our_payload=_LARGEST_DATAGRAM)
    message.set_rcode(code)
    return message


def render(query: dns.message.Message, message: dns.message.Message, over_tcp: bool) -> bytes:
    """A message as it is sent; what the asker cannot take in one datagram is cut, and says so."""
    if over_tcp:
        return message.to_wire(max_size=_LARGEST_MESSAGE, prefer_truncation=True)
    room = query.payload if query.edns >= 0 else _SMALLEST_DATAGRAM
    return message.to_wire(max_size=max(_SMALLEST_DATAGRAM, min(room, _LARGEST_DATAGRAM)), prefer_truncation=True)
