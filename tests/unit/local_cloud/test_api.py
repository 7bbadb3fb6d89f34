"""What all paths share: token, headers, errors, pages, sorting, allowance."""

from collections.abc import Callable

import pytest

from scripts.local_cloud.api.project import Limits
from tests.unit.local_cloud.conftest import PUBLIC_KEY, Cloud

EMPTY = (
    "volumes",
    "load_balancers",
    "load_balancer_types",
    "certificates",
    "isos",
)


@pytest.mark.parametrize("header", [None, "Bearer wrong", "local", "Basic local", "Bearer", "Bearer lo\xe4cal"])
def test_without_the_token_nothing_is_answered(cloud: Cloud, header: str | None) -> None:
    """Known, unknown and the cloud's own paths alike."""
    headers = {} if header is None else {"Authorization": header}
    for path in ("/v1/servers", "/v1/nothing", "/_local/calls"):
        result = cloud.client.simulate_get(path, headers=headers)
        assert (result.status_code, result.json["error"]["code"]) == (401, "unauthorized")


def test_every_answer_carries_an_id_of_its_own(cloud: Cloud) -> None:
    """Errors and the page too."""
    answers = [cloud.call("GET", path) for path in ("/v1/servers", "/v1/servers/1", "/v1/nothing", "/")]
    assert len({answer.headers["X-Correlation-Id"] for answer in answers}) == 4


def test_unknown_paths_and_methods_are_refused_in_the_shape_of_the_api(cloud: Cloud) -> None:
    """404 and 405 have the body of any other error."""
    assert cloud.refuse("GET", "/nothing") == (404, "not_found")
    assert cloud.refuse("GET", "/servers/abc") == (404, "not_found")
    assert cloud.refuse("GET", "/servers/99999999999999999999") == (404, "not_found")
    assert cloud.refuse("PATCH", "/servers") == (405, "method_not_allowed")
    assert cloud.refuse("GET", "/servers/1/actions/poweron") == (405, "method_not_allowed")


@pytest.mark.parametrize("body", [b"{", b"[]", b"\xff", b'"text"', b"[" * 100_000])
def test_bodies_that_are_no_json_objects_are_refused(cloud: Cloud, body: bytes) -> None:
    """With 400 json_error."""
    headers = {"Authorization": "Bearer local"}
    result = cloud.client.simulate_post("/v1/ssh_keys", headers=headers, body=body)
    assert (result.status_code, result.json["error"]["code"]) == (400, "json_error")


def test_an_error_of_fields_names_each_of_them(cloud: Cloud) -> None:
    """All problems at once, as details.fields."""
    error = cloud.call("POST", "/v1/ssh_keys", {"name": 3, "labels": {"-": "v"}}).json["error"]
    assert error["code"] == "invalid_input"
    assert [field["name"] for field in error["details"]["fields"]] == ["name", "public_key", "labels"]
    assert all(field["messages"] for field in error["details"]["fields"])


@pytest.mark.parametrize("key", EMPTY)
def test_what_is_not_there_looks_like_an_empty_account(cloud: Cloud, key: str) -> None:
    """Lists are empty, members unknown, making one is refused plainly."""
    answer = cloud.get(f"/{key}")
    assert answer[key] == []
    assert answer["meta"]["pagination"]["total_entries"] == 0
    assert cloud.refuse("GET", f"/{key}/1") == (404, "not_found")
    if key != "isos":
        assert cloud.refuse("POST", f"/{key}", {}) == (422, "unsupported_error")


def test_datacenters_are_gone_except_for_old_clients(cloud: Cloud, start_cloud: Callable[..., Cloud]) -> None:
    """410 now; before, servers and primary IPs had one."""
    assert cloud.refuse("GET", "/datacenters") == (410, "deprecated_api_endpoint")
    assert cloud.refuse("GET", "/datacenters/1") == (410, "deprecated_api_endpoint")
    old = start_cloud(old_clients=True)
    server_id = old.make_server(datacenter="nbg1-dc3")
    assert old.get(f"/servers/{server_id}")["server"]["datacenter"]["location"]["name"] == "nbg1"
    assert old.get("/primary_ips")["primary_ips"][0]["datacenter"]["name"] == "nbg1-dc3"
    assert len(old.get("/datacenters")["datacenters"]) == 3


def _make_keys(cloud: Cloud, count: int) -> None:
    for number in range(count):
        cloud.project.store.put(
            "ssh_key",
            {
                "id": cloud.project.store.next_id(),
                "name": f"key{number % 3}-{number:02}",
                "fingerprint": str(number),
                "public_key": PUBLIC_KEY,
                "labels": {"n": str(number)},
                "created": "2026-01-01T00:00:00Z",
            },
        )


def test_pages_hold_25_and_tell_of_the_others(cloud: Cloud) -> None:
    """meta.pagination and Link agree; the last page says that none follows."""
    _make_keys(cloud, 60)
    result = cloud.call("GET", "/v1/ssh_keys", page=2)
    assert result.json["meta"]["pagination"] == {
        "page": 2,
        "per_page": 25,
        "previous_page": 1,
        "next_page": 3,
        "last_page": 3,
        "total_entries": 60,
    }
    assert len(result.json["ssh_keys"]) == 25
    assert 'page=3>; rel="next"' in result.headers["Link"]
    assert 'page=1>; rel="prev"' in result.headers["Link"]
    last = cloud.get("/ssh_keys", page=3)
    assert (len(last["ssh_keys"]), last["meta"]["pagination"]["next_page"]) == (10, None)
    assert cloud.get("/ssh_keys", page=4)["ssh_keys"] == []
    assert len(cloud.get("/ssh_keys", per_page=50)["ssh_keys"]) == 50


def test_an_empty_list_has_one_page(cloud: Cloud) -> None:
    """And neither a next nor a Link."""
    result = cloud.call("GET", "/v1/ssh_keys")
    assert result.json["meta"]["pagination"]["last_page"] == 1
    assert result.json["meta"]["pagination"]["next_page"] is None
    assert "Link" not in result.headers


@pytest.mark.parametrize(
    "query",
    [
        {"page": "0"},
        {"page": "x"},
        {"page": "9" * 30},
        {"per_page": "51"},
        {"per_page": "-1"},
        {"sort": "nothing"},
        {"sort": "name:up"},
        {"label_selector": "a in"},
    ],
)
def test_queries_that_make_no_sense_are_refused(cloud: Cloud, query: dict[str, str]) -> None:
    """With the name of the parameter."""
    assert cloud.refuse("GET", "/ssh_keys", **query) == (422, "invalid_input")


def test_lists_are_sorted_by_several_wishes_and_filtered(cloud: Cloud) -> None:
    """The first wish counts most; without one the ids decide."""
    _make_keys(cloud, 6)
    names = [key["name"] for key in cloud.get("/ssh_keys", sort=["name:desc"])["ssh_keys"]]
    assert names == sorted(names, reverse=True)
    ids = [key["id"] for key in cloud.get("/ssh_keys", sort=["created:asc", "id:desc"])["ssh_keys"]]
    assert ids == sorted(ids, reverse=True)
    assert [key["name"] for key in cloud.get("/ssh_keys", label_selector="n in (1,2)")["ssh_keys"]] == [
        "key1-01",
        "key2-02",
    ]
    assert len(cloud.get("/ssh_keys", name="key1-01")["ssh_keys"]) == 1


def test_the_allowance_is_told_and_runs_out(start_cloud: Callable[..., Cloud]) -> None:
    """429 with rate_limit_exceeded; the cloud's own paths cost nothing."""
    cloud = start_cloud(limits=Limits(requests_per_hour=3))
    left = [cloud.call("GET", "/v1/servers").headers["RateLimit-Remaining"] for _ in range(3)]
    assert left == ["2", "1", "0"]
    assert cloud.refuse("GET", "/servers") == (429, "rate_limit_exceeded")
    result = cloud.call("GET", "/v1/servers")
    assert result.headers["RateLimit-Limit"] == "3"
    assert int(result.headers["RateLimit-Reset"]) > 1_700_000_000
    assert cloud.call("GET", "/_local/calls").status_code == 200


def test_server_types_and_pricing_agree(cloud: Cloud) -> None:
    """Prices stand in both, as decimal strings, for every location."""
    types = {each["name"]: each for each in cloud.get("/server_types")["server_types"]}
    assert set(types) == {"cx23", "cx33", "cx43", "cx53", "cpx22", "cpx32", "cpx42", "ccx13"}
    assert (types["cx23"]["cores"], types["cx23"]["memory"], types["cx23"]["disk"]) == (2, 4.0, 40)
    assert [each["name"] for each in types["cx23"]["locations"]] == ["fsn1", "nbg1", "hel1"]
    assert types["cx23"]["prices"][0]["price_monthly"]["net"] == "5.4900000000"
    priced = cloud.get("/pricing")["pricing"]["server_types"]
    assert all(types[each["name"]]["prices"] == each["prices"] for each in priced)
    assert cloud.get("/server_types/114")["server_type"] == types["cx23"]
    assert cloud.get("/locations", name="hel1")["locations"][0]["id"] == 3


def test_the_page_shows_the_state_and_runs_nothing(cloud: Cloud) -> None:
    """No token, no script; names are text and nothing else; foreign names see nothing."""
    cloud.make_image(cloud.make_server("seen"), description="<script>alert(1)</script>")
    result = cloud.client.simulate_get("/", host="127.0.0.1:8899")
    assert result.status_code == 200
    assert "seen" in result.text
    assert "create_image" in result.text
    assert "<script" not in result.text
    assert "default-src 'none'" in result.headers["Content-Security-Policy"]
    assert cloud.client.simulate_get("/", host="evil.example").status_code == 404


@pytest.mark.parametrize(
    "path",
    ["/v1/servers", "//v1/servers", "///v1/servers", "/v1//servers", "//_local/faults", "/_local/calls", "/v1x", "/x"],
)
@pytest.mark.parametrize("method", ["GET", "POST", "PUT"])
def test_nothing_but_the_page_is_open(cloud: Cloud, method: str, path: str) -> None:
    """Without the token no spelling of a path does anything: any web page can send such requests."""
    body = {"name": "evil", "server_type": "cx23", "image": "debian-13", "faults": []}
    result = cloud.client.simulate_request(method, path, host="127.0.0.1:8899", json=body)
    assert result.status_code in (401, 404)
    assert result.json["error"]["code"] in ("unauthorized", "not_found")
    assert cloud.get("/servers")["servers"] == []


@pytest.mark.parametrize("path", ["/", "/v1/servers", "/_local/calls"])
def test_foreign_names_see_nothing(cloud: Cloud, path: str) -> None:
    """Also with the token, which everybody knows: a page's name may have been made to point here."""
    headers = {"Authorization": "Bearer local"}
    for host in ("evil.example:8899", "localhost:x"):
        assert cloud.client.simulate_get(path, host=host, headers=headers).status_code == 404
    assert cloud.client.simulate_get(path, host="localhost:8899", headers=headers).status_code == 200
