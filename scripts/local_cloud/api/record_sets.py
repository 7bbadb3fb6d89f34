"""Owns what the record sets of a zone may be: their names, types and values, and how they are shown and served."""

import re
from collections.abc import Iterable
from typing import Any

import dns.exception
import dns.name
import dns.rdata
import dns.tokenizer

from scripts.local_cloud.api.bodies import Fields
from scripts.local_cloud.api.clock import render_now
from scripts.local_cloud.machine_interface import RecordSet, Zone

Document = dict[str, Any]

APEX = "@"
TYPES = (
    "A",
    "AAAA",
    "CAA",
    "CNAME",
    "DS",
    "HINFO",
    "HTTPS",
    "MX",
    "NS",
    "PTR",
    "RP",
    "SOA",
    "SRV",
    "SVCB",
    "TLSA",
    "TXT",
)
NAMESERVERS = ("hydrogen.ns.hetzner.com.", "oxygen.ns.hetzner.com.", "helium.ns.hetzner.de.")
SHORTEST_TTL_S, LONGEST_TTL_S = 60, 2**31 - 1

_FIRST_SOA = f"{NAMESERVERS[0]} dns.hetzner.com. {{serial}} 86400 10800 3600000 3600"
_SOA_WORDS, _SERIAL_PLACE = 7, 2
_RECORDS_LIMIT = 50
_LONGEST_NAME = 253
_LONGEST_STRING = 255
_NAME = re.compile(r"(?:\*|[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?)(?:\.[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?)*")


class ValueInvalid(Exception):
    """The value is none of its type; the message says why."""


def make_record_set(
    name: str, kind: str, records: list[Document], ttl: int | None = None, labels: dict[str, str] | None = None
) -> Document:
    """A record set as it stands in its zone's record."""
    return {
        "name": name,
        "type": kind,
        "ttl": ttl,
        "labels": labels or {},
        "protection": {"change": False},
        "records": records,
        "created": render_now(),
    }


def make_first_sets(serial: int) -> list[Document]:
    """What every zone begins with."""
    return [
        make_record_set(APEX, "SOA", [{"value": _FIRST_SOA.format(serial=serial)}]),
        make_record_set(APEX, "NS", [{"value": name} for name in NAMESERVERS]),
    ]


def render_record_set(zone: Document, record_set: Document) -> Document:
    """The document of the API, and ``created`` to sort by."""
    return {"id": f"{record_set['name']}/{record_set['type']}", **record_set, "zone": zone["id"]}


def find_record_set(zone: Document, name: str, kind: str) -> Document | None:
    """The record set of a zone by name and type, or None."""
    return next((each for each in zone["rrsets"] if (each["name"], each["type"]) == (name, kind)), None)


def count_up(zone: Document, today: str) -> None:
    """Gives a zone that has changed its next serial: the day and a number, as in 2026112600; never a lower one."""
    zone["serial"] = max(int(f"{today}00"), zone["serial"] + 1)
    soa = find_record_set(zone, APEX, "SOA")
    if soa is not None:
        words = soa["records"][0]["value"].split()
        words[_SERIAL_PLACE] = str(zone["serial"])
        soa["records"][0]["value"] = " ".join(words)


def serve(zone: Document) -> Zone:
    """A zone as the machines' name server is told of it."""
    return Zone(
        zone["name"],
        tuple(
            RecordSet(
                name=zone["name"] if each["name"] == APEX else f"{each['name']}.{zone['name']}",
                type=each["type"],
                ttl_s=zone["ttl"] if each["ttl"] is None else each["ttl"],
                values=tuple(record["value"] for record in each["records"]),
            )
            for each in zone["rrsets"]
        ),
    )


def read_ttl(fields: Fields, required: bool = False) -> int | None:
    """The time to live that a request names, in seconds."""
    return fields.integer("ttl", SHORTEST_TTL_S, LONGEST_TTL_S, required)


def read_name_and_type(fields: Fields, zone_name: str) -> tuple[str, str]:
    """The name and the type of a record set that a request makes."""
    name, kind = fields.text("name", required=True) or "", fields.one_of("type", TYPES, required=True) or ""
    if fields.has("name") and (problem := _describe_name(name, zone_name)):
        fields.blame("name", problem)
    if kind == "SOA":
        fields.blame("type", "must not be SOA: that record is made with its zone")
    return name, kind


def _describe_name(name: str, zone_name: str) -> str | None:
    if name == APEX:
        return None
    if not _NAME.fullmatch(name):
        return "must be relative to the zone, in lower case and without a dot at its end, or @ for the zone itself"
    if name == zone_name or name.endswith(f".{zone_name}"):
        return "must not end with the name of the zone"
    if len(f"{name}.{zone_name}") > _LONGEST_NAME:
        return f"must be at most {_LONGEST_NAME} characters together with the name of the zone"
    return None


def read_records(fields: Fields, zone_name: str, kind: str, name: str = "records") -> list[Document]:
    """The records that a request names, each with a value that is one of the type, no two of them the same."""
    items = fields.items(name)
    if not items:
        fields.blame(name, "must not be empty")
    if len(items) > _RECORDS_LIMIT:
        fields.blame(name, f"must be at most {_RECORDS_LIMIT}")
        return []
    records: list[Document] = []
    seen: set[dns.rdata.Rdata] = set()
    for number, item in enumerate(items):
        if not isinstance(item, dict):
            fields.blame(name, f"record {number} must be an object")
            continue
        record = Fields(item)
        value, comment = record.text("value", required=True), record.text("comment")
        if value is not None and kind:
            try:
                parsed = parse_value(zone_name, kind, value)
                if parsed in seen:
                    record.blame("value", "must not be there twice")
                seen.add(parsed)
            except ValueInvalid as error:
                record.blame("value", str(error))
        for problem in record.list_problems():
            fields.blame(name, f"record {number}: {problem}")
        records.append({"value": value} | ({} if comment is None else {"comment": comment}))
    if kind in ("CNAME", "SOA") and len(items) > 1:
        fields.blame(name, f"must be one: a {kind} stands alone")
    return records


def parse_value(zone_name: str, kind: str, value: str) -> dns.rdata.Rdata:
    """A value as DNS has it, names in it taken from the zone unless a dot ends them; raises ValueInvalid."""
    if any(ord(character) < 32 for character in value):
        raise ValueInvalid("must be one line")
    try:
        if kind == "TXT":
            _check_strings(value)
        parsed = dns.rdata.from_text("IN", kind, value, dns.name.from_text(zone_name), relativize=False)
    except (dns.exception.DNSException, ValueError) as error:
        raise ValueInvalid(f"is no {kind} record: {error}") from error
    words = value.split()
    if kind == "SOA" and (len(words) != _SOA_WORDS or not words[_SERIAL_PLACE].isdigit()):
        raise ValueInvalid(f"must be {_SOA_WORDS} words, the serial third")
    if parsed.rdcomment is not None:
        raise ValueInvalid("must not hold a comment: that has a field of its own")
    return parsed


def _check_strings(value: str) -> None:
    """Raises ValueInvalid unless the text of a TXT record is strings in quotes that are not too long."""
    reader = dns.tokenizer.Tokenizer(value)
    while not (token := reader.get()).is_eol_or_eof():
        if not token.is_quoted_string():
            raise ValueInvalid("must be one or more strings in quotes")
        if len(token.unescape_to_bytes().value) > _LONGEST_STRING:
            raise ValueInvalid(f"a TXT string exceeds {_LONGEST_STRING} characters")


def find_record(zone_name: str, kind: str, records: Iterable[Document], value: str) -> Document | None:
    """The one of these records that has a value, however that is written, or None."""
    wanted = parse_value(zone_name, kind, value)
    return next((each for each in records if parse_value(zone_name, kind, each["value"]) == wanted), None)


def describe_clash(zone: Document, name: str, kind: str) -> str | None:
    """Why a zone cannot have another record set of this name and type: an alias is all that its name has."""
    others = {each["type"] for each in zone["rrsets"] if each["name"] == name} - {kind}
    if kind == "CNAME" and others:
        return f"a CNAME cannot stand beside other records of the same name: {', '.join(sorted(others))}"
    if "CNAME" in others:
        return "there is a CNAME of this name, and nothing can stand beside it"
    return None
