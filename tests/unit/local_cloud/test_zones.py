"""Zones and their record sets: what may be in them, what is refused, and what the machines are told to answer."""

from collections.abc import Callable
from typing import Any

import pytest

from scripts.local_cloud.api import record_sets
from scripts.local_cloud.api.project import Limits
from scripts.local_cloud.machine_interface import MachineFailed, Zone
from tests.unit.local_cloud.conftest import Cloud, wait_until

Document = dict[str, Any]
RRSETS = "/zones/example.org/rrsets"
WWW = f"{RRSETS}/www/A"


def _records(*values: str) -> list[Document]:
    return [{"value": value} for value in values]


def _make(cloud: Cloud, **values: object) -> Document:
    answer = cloud.post("/zones", {"name": "example.org", "mode": "primary", **values})
    assert cloud.wait(answer["action"])[0]["status"] == "success"
    return dict(answer["zone"])


def _add(cloud: Cloud, name: str, kind: str, *values: str, **more: object) -> Document:
    answer = cloud.post(RRSETS, {"name": name, "type": kind, "records": _records(*values), **more})
    assert cloud.wait(answer["action"])[0]["status"] == "success"
    return dict(answer["rrset"])


def _told(cloud: Cloud, name: str, kind: str) -> tuple[int, tuple[str, ...]] | None:
    """Time to live and values that the machines were told of a name."""
    found = cloud.machines.zones["example.org"].record_sets
    return next(((each.ttl_s, each.values) for each in found if (each.name, each.type) == (name, kind)), None)


def test_a_zone_begins_with_its_authority(cloud: Cloud) -> None:
    """A SOA and three name servers; it is found by id and by name, and answered for once its action has ended."""
    zone = _make(cloud, labels={"a": "b"})
    assert (zone["mode"], zone["ttl"], zone["status"], zone["record_count"]) == ("primary", 3600, "updating", 4)
    assert zone["authoritative_nameservers"]["assigned"] == list(record_sets.NAMESERVERS)
    for name in ("example.org", zone["id"]):
        assert cloud.get(f"/zones/{name}")["zone"] == {**zone, "status": "ok"}
    [soa, servers] = cloud.get(RRSETS)["rrsets"][::-1]
    assert (soa["id"], servers["id"], soa["ttl"], soa["zone"]) == ("@/SOA", "@/NS", None, zone["id"])
    today = zone["created"][:10].replace("-", "")
    assert soa["records"] == _records(f"hydrogen.ns.hetzner.com. dns.hetzner.com. {today}00 86400 10800 3600000 3600")
    assert _told(cloud, "example.org", "NS") == (3600, record_sets.NAMESERVERS)


def test_zones_are_listed_by_name_mode_and_label(cloud: Cloud) -> None:
    """As all else is; labels can be replaced, and nothing else by a PUT."""
    zone, other = _make(cloud, labels={"a": "b"}), _make(cloud, name="example.net")
    assert [each["id"] for each in cloud.get("/zones", sort="name")["zones"]] == [other["id"], zone["id"]]
    assert [each["id"] for each in cloud.get("/zones", name="example.org")["zones"]] == [zone["id"]]
    assert [each["id"] for each in cloud.get("/zones", label_selector="a=b")["zones"]] == [zone["id"]]
    assert cloud.get("/zones", mode="secondary")["zones"] == []
    changed = cloud.call("PUT", "/v1/zones/example.org", {"labels": {"c": "d"}}).json["zone"]
    assert (changed["labels"], changed["name"]) == ({"c": "d"}, "example.org")


@pytest.mark.parametrize(
    ("values", "refusal"),
    [
        ({"name": "Example.org"}, (422, "invalid_input")),
        ({"name": "example.org."}, (422, "invalid_input")),
        ({"name": "org"}, (422, "invalid_input")),
        ({"name": None}, (422, "invalid_input")),
        ({"name": "www.taken.org"}, (422, "invalid_input")),
        ({"name": "taken.org"}, (409, "uniqueness_error")),
        ({"mode": None}, (422, "invalid_input")),
        ({"mode": "secondary"}, (422, "unsupported_error")),
        ({"zonefile": "@ IN A 192.0.2.1"}, (422, "unsupported_error")),
        ({"ttl": 59}, (422, "invalid_input")),
        ({"ttl": 2**31}, (422, "invalid_input")),
        ({"labels": {"-": ""}}, (422, "invalid_input")),
        ({"rrsets": [{"name": "www", "type": "A", "records": []}]}, (422, "invalid_input")),
        ({"rrsets": [{"name": "@", "type": "CNAME", "records": _records("a.example.")}]}, (422, "invalid_input")),
        ({"rrsets": ["www"]}, (422, "invalid_input")),
    ],
)
def test_zones_that_break_a_rule_are_refused(cloud: Cloud, values: Document, refusal: tuple[int, str]) -> None:
    """And nothing is made."""
    _make(cloud, name="taken.org")
    assert cloud.refuse("POST", "/zones", {"name": "example.org", "mode": "primary", **values}) == refusal
    assert len(cloud.get("/zones")["zones"]) == 1


def test_a_zone_is_made_with_its_records(cloud: Cloud) -> None:
    """Of name servers those that are given; TTLs of one's own before the zone's."""
    given = [
        {"name": "www", "type": "A", "ttl": 60, "records": _records("192.0.2.1", "192.0.2.2"), "labels": {"x": "y"}},
        {"name": "@", "type": "NS", "records": _records("ns.example.net.")},
    ]
    zone = _make(cloud, ttl=7200, rrsets=given)
    assert zone["record_count"] == 4
    assert _told(cloud, "www.example.org", "A") == (60, ("192.0.2.1", "192.0.2.2"))
    assert _told(cloud, "example.org", "NS") == (7200, ("ns.example.net.",))
    assert cloud.get(WWW)["rrset"]["labels"] == {"x": "y"}
    cloud.succeed("/zones/example.org/actions/change_ttl", {"ttl": 300})
    assert _told(cloud, "example.org", "NS") == (300, ("ns.example.net.",))


def test_record_sets_come_change_and_go(cloud: Cloud) -> None:
    """Each change is on record at once and answered when its action has ended; the serial counts up."""
    zone = _make(cloud)
    made = _add(cloud, "www", "A", "192.0.2.1", ttl=60, labels={"a": "b"})
    assert made == {
        "id": "www/A",
        "name": "www",
        "type": "A",
        "ttl": 60,
        "labels": {"a": "b"},
        "protection": {"change": False},
        "records": _records("192.0.2.1"),
        "zone": zone["id"],
    }
    action = cloud.succeed(f"{WWW}/actions/set_records", {"records": [{"value": "192.0.2.2", "comment": "two"}]})
    assert (action["command"], action["resources"]) == ("set_rrset_records", [{"id": zone["id"], "type": "zone"}])
    assert _told(cloud, "www.example.org", "A") == (60, ("192.0.2.2",))
    cloud.succeed(f"{WWW}/actions/add_records", {"records": _records("192.0.2.3")})
    assert _told(cloud, "www.example.org", "A") == (60, ("192.0.2.2", "192.0.2.3"))
    cloud.succeed(f"{WWW}/actions/change_ttl", {"ttl": None})
    assert _told(cloud, "www.example.org", "A") == (3600, ("192.0.2.2", "192.0.2.3"))
    body = {"records": [{"value": "192.0.2.3", "comment": "three"}]}
    updated = cloud.call("POST", f"/v1{WWW}/actions/update_records", body)
    assert (updated.status_code, updated.json["action"]["command"]) == (200, "update_rrset_records")
    assert [each["comment"] for each in cloud.get(WWW)["rrset"]["records"]] == ["two", "three"]
    cloud.wait(updated.json["action"])
    relabelled = cloud.call("PUT", f"/v1{WWW}", {"labels": {}}).json["rrset"]
    assert (relabelled["labels"], relabelled["ttl"]) == ({}, None)
    cloud.succeed(f"{WWW}/actions/remove_records", {"records": _records("192.0.2.2")})
    assert cloud.get("/zones/example.org")["zone"]["record_count"] == 5
    cloud.wait(cloud.call("DELETE", f"/v1{WWW}").json["action"])
    assert _told(cloud, "www.example.org", "A") is None
    assert cloud.refuse("GET", WWW) == (404, "not_found")
    serial = cloud.get(f"{RRSETS}/@/SOA")["rrset"]["records"][0]["value"].split()[2]
    assert serial.endswith("07")
    commands = [each["command"] for each in cloud.get("/zones/example.org/actions")["actions"]]
    assert commands[:3] == ["create_zone", "create_rrset", "set_rrset_records"]
    assert [each["command"] for each in cloud.get(f"/zones/{zone['id']}/actions")["actions"]] == commands
    assert len(cloud.get("/zones/actions")["actions"]) == len(commands) == 8


def test_record_sets_are_made_and_removed_along_with_records(cloud: Cloud) -> None:
    """By the first record that is added, and the last that is removed, however its value is written."""
    _make(cloud)
    path = f"{RRSETS}/wide/AAAA/actions"
    cloud.succeed(f"{path}/add_records", {"records": _records("2001:db8::1"), "ttl": 120})
    assert _told(cloud, "wide.example.org", "AAAA") == (120, ("2001:db8::1",))
    assert cloud.refuse("POST", f"{path}/add_records", {"records": _records("2001:db8::2"), "ttl": 60})[0] == 422
    assert cloud.refuse("POST", f"{path}/add_records", {"records": _records("2001:db8:0::1")})[0] == 422
    assert cloud.refuse("POST", f"{path}/remove_records", {"records": _records("2001:db8::9")})[0] == 422
    cloud.succeed(f"{path}/remove_records", {"records": _records("2001:0db8::1")})
    assert cloud.refuse("POST", f"{path}/set_records", {"records": _records("2001:db8::1")}) == (404, "not_found")


def test_record_sets_are_listed(cloud: Cloud) -> None:
    """By name, type and label, a hundred on a page."""
    _make(cloud, rrsets=[{"name": f"n{n}", "type": "A", "records": _records("192.0.2.1")} for n in range(98)])
    _add(cloud, "n1", "TXT", '"one"', labels={"a": "b"})
    assert len(cloud.get(RRSETS, per_page="100")["rrsets"]) == 100
    assert cloud.refuse("GET", RRSETS, per_page="101") == (422, "invalid_input")
    assert [each["id"] for each in cloud.get(RRSETS, name="n1")["rrsets"]] == ["n1/A", "n1/TXT"]
    assert [each["id"] for each in cloud.get(RRSETS, type=["TXT", "SOA"])["rrsets"]] == ["@/SOA", "n1/TXT"]
    assert [each["id"] for each in cloud.get(RRSETS, label_selector="a=b")["rrsets"]] == ["n1/TXT"]
    assert len(cloud.get(RRSETS, sort="created:desc")["rrsets"]) == 25


@pytest.mark.parametrize(
    ("name", "kind", "values"),
    [
        ("WWW", "A", ["192.0.2.1"]),
        ("www.", "A", ["192.0.2.1"]),
        ("a..b", "A", ["192.0.2.1"]),
        ("a.*", "A", ["192.0.2.1"]),
        ("www.example.org", "A", ["192.0.2.1"]),
        ("example.org", "A", ["192.0.2.1"]),
        (f"{'a.' * 121}b", "A", ["192.0.2.1"]),
        ("", "A", ["192.0.2.1"]),
        ("new", "A", []),
        ("new", "A", ["192.0.2.256"]),
        ("new", "A", ["192.0.2.1 ; a comment"]),
        ("new", "A", ["192.0.2.1\n192.0.2.2"]),
        ("new", "A", ["192.0.2.1", "192.0.2.1"]),
        ("new", "AAAA", ["192.0.2.1"]),
        ("new", "AAAA", ["2001:db8::1", "2001:db8:0::1"]),
        ("new", "MX", ["mail.example.org."]),
        ("new", "TXT", ["without quotes"]),
        ("new", "TXT", [f'"{"x" * 256}"']),
        ("new", "CNAME", ["a.example.", "b.example."]),
        ("new", "SPF", ['"v=spf1"']),
        ("new", "SOA", ["hydrogen.ns.hetzner.com. dns.hetzner.com. 1 86400 10800 3600000 3600"]),
        ("@", "CNAME", ["a.example."]),
        ("www", "CNAME", ["a.example."]),
        ("alias", "A", ["192.0.2.1"]),
    ],
)
def test_record_sets_that_break_a_rule_are_refused(cloud: Cloud, name: str, kind: str, values: list[str]) -> None:
    """And nothing is made."""
    _make(cloud)
    _add(cloud, "www", "A", "192.0.2.1")
    _add(cloud, "alias", "CNAME", "www")
    body = {"name": name, "type": kind, "records": _records(*values)}
    assert cloud.refuse("POST", RRSETS, body) == (422, "invalid_input")
    assert len(cloud.get(RRSETS)["rrsets"]) == 4
    more = {"ttl": 59}
    assert cloud.refuse("POST", RRSETS, {"name": "x", "type": "A", "records": _records("192.0.2.1"), **more})[0] == 422
    assert cloud.refuse("POST", RRSETS, {"name": "x", "type": "A", "records": "192.0.2.1"})[0] == 422
    assert cloud.refuse("POST", RRSETS, {"name": "x", "type": "A", "records": ["192.0.2.1"]})[0] == 422


@pytest.mark.parametrize(
    ("name", "kind", "value"),
    [
        ("@", "A", "192.0.2.1"),
        ("*", "A", "192.0.2.1"),
        ("*.deep", "AAAA", "2001:db8::1"),
        ("_acme-challenge", "TXT", '"one" "and another"'),
        ("@", "TXT", f'"{"x" * 255}" "a \\"quoted\\" word; and no comment"'),
        ("@", "MX", "10 mail"),
        ("@", "CAA", '0 issue "letsencrypt.org"'),
        ("_sip._tcp", "SRV", "10 5 5060 sip.example.net."),
        ("sub", "NS", "ns.example.net."),
        ("sub", "DS", "12345 13 2 " + "ab" * 32),
        ("@", "HTTPS", "1 . alpn=h2"),
    ],
)
def test_records_of_all_kinds_are_taken(cloud: Cloud, name: str, kind: str, value: str) -> None:
    """As they came, names relative or whole; the same name and type again is refused."""
    _make(cloud)
    assert _add(cloud, name, kind, value)["records"] == _records(value)
    body = {"name": name, "type": kind, "records": _records(value)}
    assert cloud.refuse("POST", RRSETS, body) == (409, "uniqueness_error")


def test_the_authority_stays(cloud: Cloud) -> None:
    """A SOA changes its words, but not its serial, and goes with its zone."""
    _make(cloud)
    path = f"{RRSETS}/@/SOA"
    cloud.succeed(f"{path}/actions/set_records", {"records": _records("ns.example. me.example. 1 2 3 4 60")})
    words = cloud.get(path)["rrset"]["records"][0]["value"].split()
    assert (words[:2], words[3:], words[2][-2:]) == (["ns.example.", "me.example."], ["2", "3", "4", "60"], "01")
    assert cloud.refuse("DELETE", path)[0] == 423
    assert cloud.refuse("POST", f"{path}/actions/remove_records", {"records": _records(" ".join(words))})[0] == 422
    assert cloud.refuse("POST", f"{path}/actions/set_records", {"records": _records("a. b. (1 2 3 4 5 )")})[0] == 422
    assert cloud.refuse("POST", f"{path}/actions/set_records", {"records": []})[0] == 422


def test_protection_protects_and_the_limits_limit(start_cloud: Callable[..., Cloud]) -> None:
    """423 and 403; labels of a protected record set can be changed."""
    cloud = start_cloud(limits=Limits(zones=1, rrsets_per_zone=3))
    _make(cloud)
    _add(cloud, "www", "A", "192.0.2.1")
    body = {"name": "two", "type": "A", "records": _records("192.0.2.1")}
    assert cloud.refuse("POST", RRSETS, body) == (403, "resource_limit_exceeded")
    body = {"name": "example.net", "mode": "primary"}
    assert cloud.refuse("POST", "/zones", body) == (403, "resource_limit_exceeded")
    cloud.succeed(f"{WWW}/actions/change_protection", {"change": True})
    assert cloud.get(WWW)["rrset"]["protection"] == {"change": True}
    records = {"records": _records("192.0.2.1")}
    for name, sent in (("set_records", records), ("add_records", records), ("remove_records", records)):
        assert cloud.refuse("POST", f"{WWW}/actions/{name}", sent) == (423, "protected")
    assert cloud.refuse("POST", f"{WWW}/actions/change_ttl", {"ttl": 60}) == (423, "protected")
    assert cloud.refuse("DELETE", WWW) == (423, "protected")
    assert cloud.call("PUT", f"/v1{WWW}", {"labels": {"a": "b"}}).status_code == 200
    assert cloud.refuse("POST", f"{WWW}/actions/change_protection", {}) == (422, "invalid_input")
    cloud.succeed("/zones/example.org/actions/change_protection", {"delete": True})
    assert cloud.refuse("DELETE", "/zones/example.org") == (423, "protected")
    cloud.succeed("/zones/example.org/actions/change_protection", {"delete": False})
    answer = cloud.call("DELETE", "/v1/zones/example.org")
    assert (answer.status_code, cloud.wait(answer.json["action"])[0]["command"]) == (201, "delete_zone")
    assert cloud.refuse("GET", "/zones/example.org") == (404, "not_found")
    assert cloud.machines.zones == {}
    zone_id = answer.json["action"]["resources"][0]["id"]
    assert cloud.get(f"/zones/{zone_id}/actions/{answer.json['action']['id']}")["action"]["status"] == "success"


def test_what_zones_in_primary_mode_do_not_have_is_refused(cloud: Cloud) -> None:
    """Primary name servers; and zone files are not there yet."""
    _make(cloud)
    body = {"primary_nameservers": [{"address": "192.0.2.1"}]}
    path = "/zones/example.org/actions"
    assert cloud.refuse("POST", f"{path}/change_primary_nameservers", body) == (422, "incorrect_zone_mode")
    assert cloud.refuse("POST", f"{path}/import_zonefile", {"zonefile": ""}) == (422, "unsupported_error")
    assert cloud.refuse("GET", "/zones/example.org/zonefile") == (422, "unsupported_error")
    assert cloud.refuse("GET", "/zones/7/rrsets") == (404, "not_found")
    assert cloud.refuse("GET", f"/zones/{'9' * 19}") == (404, "not_found")
    assert cloud.refuse("POST", f"{RRSETS}/www/SPF/actions/add_records", {"records": _records('"x"')})[0] == 422
    assert cloud.refuse("GET", f"{RRSETS}/www/SPF") == (404, "not_found")


def test_changes_do_not_wait_for_each_other_but_a_deletion_does(cloud: Cloud) -> None:
    """Terraform makes several record sets at once; a zone that has something under way is locked for its end."""
    _make(cloud)
    cloud.machines.delays_s["set_zone"] = 0.1
    answers = [
        cloud.post(RRSETS, {"name": name, "type": "A", "records": _records("192.0.2.1")}) for name in ("a", "b", "c")
    ]
    assert cloud.get("/zones/example.org")["zone"]["status"] == "updating"
    assert cloud.refuse("DELETE", "/zones/example.org") == (423, "locked")
    cloud.wait(*(each["action"] for each in answers))
    assert cloud.get("/zones/example.org")["zone"]["status"] == "ok"
    assert [_told(cloud, f"{name}.example.org", "A") for name in ("a", "b", "c")] == [(3600, ("192.0.2.1",))] * 3


def test_a_zone_that_could_not_be_published_says_so(cloud: Cloud) -> None:
    """Its change stands on record, and the next one publishes both; a deletion that failed leaves it."""
    _make(cloud)
    cloud.machines.failing["set_zone"] = MachineFailed("no")
    answer = cloud.post(RRSETS, {"name": "www", "type": "A", "records": _records("192.0.2.1")})
    assert cloud.wait(answer["action"])[0]["error"] == {"code": "action_failed", "message": "no"}
    assert cloud.get("/zones/example.org")["zone"]["status"] == "error"
    assert _told(cloud, "www.example.org", "A") is None
    del cloud.machines.failing["set_zone"]
    _add(cloud, "two", "A", "192.0.2.2")
    assert cloud.get("/zones/example.org")["zone"]["status"] == "ok"
    assert _told(cloud, "www.example.org", "A") == (3600, ("192.0.2.1",))
    cloud.machines.failing["remove_zone"] = MachineFailed("no")
    action = cloud.call("DELETE", "/v1/zones/example.org").json["action"]
    assert cloud.wait(action)[0]["status"] == "error"
    assert cloud.get("/zones/example.org")["zone"]["record_count"] == 6


def test_the_plan_of_faults_strikes_zones_too(cloud: Cloud) -> None:
    """Calls and actions, by path and by command."""
    _make(cloud)
    cloud.faults.replace(
        {
            "faults": [
                {"path": "/v1/zones/*/rrsets", "method": "POST", "kind": "error", "status": 503, "call": 1},
                {
                    "path": "/v1/zones/**",
                    "method": "POST",
                    "kind": "action_failed",
                    "command": "create_rrset",
                    "call": 2,
                },
            ]
        }
    )
    body = {"name": "www", "type": "A", "records": _records("192.0.2.1")}
    assert cloud.refuse("POST", RRSETS, body) == (503, "unavailable")
    answer = cloud.post(RRSETS, body)
    assert cloud.wait(answer["action"])[0]["status"] == "error"
    assert cloud.get("/zones/example.org")["zone"]["status"] == "error"


def test_a_start_publishes_them_anew(cloud: Cloud) -> None:
    """Also what a kill kept from being published."""
    _make(cloud)
    cloud.machines.failing["set_zone"] = MachineFailed("no")
    cloud.wait(cloud.post(RRSETS, {"name": "www", "type": "A", "records": _records("192.0.2.1")})["action"])
    cloud.stop()
    cloud.machines.failing.clear()
    cloud.machines.zones.clear()
    again = cloud.start_again()
    wait_until(lambda: again.machines.zones)
    assert _told(again, "www.example.org", "A") == (3600, ("192.0.2.1",))
    assert again.get("/zones/example.org")["zone"]["status"] == "ok"
    again.stop()


def test_serials_never_go_back() -> None:
    """More than a hundred changes a day, and a clock that was set back."""
    zone: Document = {"serial": 2026112699, "rrsets": record_sets.make_first_sets(2026112699), "name": "a.b", "ttl": 60}

    def count_up(today: str) -> int:
        record_sets.count_up(zone, today)
        return int(zone["serial"])

    assert count_up("20261126") == 2026112700
    assert count_up("20261101") == 2026112701
    assert count_up("20261201") == 2026120100
    served: Zone = record_sets.serve(zone)
    assert "2026120100" in served.record_sets[0].values[0]
