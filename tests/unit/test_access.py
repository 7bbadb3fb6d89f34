"""Who asks: addresses through proxies, requests without keys, scopes."""

from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest

from service.access import Access, identify_address, is_direct
from service.errors import Forbidden, KeysUnusable, Unauthenticated
from service.keys import KeyFile, add_key

LOCAL = {"REMOTE_ADDR": "127.0.0.1", "HTTP_HOST": "127.0.0.1:8080"}


@pytest.mark.parametrize(
    ("peer", "forwarded", "address"),
    [
        ("203.0.113.9", None, "203.0.113.9"),
        ("203.0.113.9", "1.1.1.1", "203.0.113.9"),  # nobody whom we trust says so
        ("10.0.0.1", None, "10.0.0.1"),
        ("10.0.0.1", "198.51.100.7", "198.51.100.7"),
        ("10.0.0.1", "1.1.1.1, 198.51.100.7", "198.51.100.7"),  # the first was said by the client
        ("10.0.0.1", "1.1.1.1, 198.51.100.7, 10.0.0.2", "198.51.100.7"),
        ("10.0.0.1", "10.9.9.9, 10.0.0.2", "10.9.9.9"),
        ("10.0.0.1", "rubbish", "10.0.0.1"),
        ("10.0.0.1", "1.1.1.1, rubbish, 10.0.0.2", "10.0.0.2"),
        ("10.0.0.1", "", "10.0.0.1"),
        ("10.0.0.1", "198.51.100.7:4711", "198.51.100.7"),
        ("10.0.0.1", "[2001:db8::5]:80", "2001:db8::5"),
        ("::ffff:203.0.113.9", None, "203.0.113.9"),
        ("::ffff:10.0.0.1", "198.51.100.7", "198.51.100.7"),
        ("", None, "unknown"),
        ("10.0.0.1", ",".join(["1.1.1.1"] * 1000 + ["10.0.0.5"] * 100), "10.0.0.5"),
    ],
)
def test_address(peer: str, forwarded: str | None, address: str) -> None:
    """X-Forwarded-For counts from the right, as far as trusted proxies have written it."""
    access = Access(None, (ip_network("10.0.0.0/8"),))
    environ = {"REMOTE_ADDR": peer} | ({} if forwarded is None else {"HTTP_X_FORWARDED_FOR": forwarded})
    assert access.address(environ) == address


def test_ipv6_is_limited_by_its_network() -> None:
    """A customer has a /64 whole, so that is what is counted; IPv4 addresses are counted one by one."""
    network = identify_address("2001:db8::1")
    assert network == identify_address("2001:db8::ffff:1") != identify_address("2001:db8:0:1::1")
    assert identify_address("203.0.113.1") != identify_address("203.0.113.2")


@pytest.mark.parametrize(
    ("change", "direct"),
    [
        ({}, True),
        ({"HTTP_HOST": "localhost:8080"}, True),
        ({"HTTP_HOST": "LOCALHOST"}, True),
        ({"HTTP_HOST": "[::1]:8080", "REMOTE_ADDR": "::1"}, True),
        ({"REMOTE_ADDR": "127.9.9.9"}, True),
        ({"REMOTE_ADDR": "192.168.1.7"}, False),
        ({"REMOTE_ADDR": ""}, False),
        ({"HTTP_HOST": "evil.example"}, False),
        ({"HTTP_HOST": "127.0.0.1.nip.io"}, False),
        ({"HTTP_HOST": "localhost.evil.example"}, False),
        ({"HTTP_HOST": ""}, False),
        ({"HTTP_HOST": "192.168.1.7"}, False),
        *(
            ({header: value}, False)
            for header, value in {
                "HTTP_X_FORWARDED_FOR": "127.0.0.1",
                "HTTP_FORWARDED": "for=127.0.0.1",
                "HTTP_X_REAL_IP": "127.0.0.1",
                "HTTP_X_FORWARDED_HOST": "localhost",
                "HTTP_X_FORWARDED_PROTO": "http",
                "HTTP_VIA": "1.1 proxy",
            }.items()
        ),
        ({"HTTP_X_FORWARDED_FOR": ""}, False),
        ({"HTTP_X_FORWARDED_PORT": "80"}, False),
        ({"HTTP_CF_CONNECTING_IP": "1.1.1.1"}, False),
        ({"SERVER_PROTOCOL": "HTTP/1.0"}, False),
        ({"SERVER_PROTOCOL": "HTTP/1.1"}, True),
        ({"HTTP_ORIGIN": "http://127.0.0.1:8080", "HTTP_SEC_FETCH_SITE": "same-origin"}, True),
        ({"HTTP_ORIGIN": "https://evil.example"}, False),
        ({"HTTP_ORIGIN": "http://127.0.0.1:9090"}, False),
        ({"HTTP_ORIGIN": "null"}, False),
        ({"HTTP_SEC_FETCH_SITE": "cross-site"}, False),
        ({"HTTP_HOST": "localhost:80,evil.example"}, False),
        ({"HTTP_HOST": "[::1].evil.example"}, False),
        ({"HTTP_HOST": "localhost:80:80"}, False),
    ],
)
def test_direct_requests(change: dict[str, str], direct: bool) -> None:
    """Direct is what comes from this machine, through no proxy, under a name that only this machine has."""
    assert is_direct({**LOCAL, **change}) is direct


def test_without_keys_only_direct_requests_are_served() -> None:
    """Authentication that is off holds for direct requests; through a proxy there is no way in, trusted or not."""
    access = Access(None, (ip_network("127.0.0.0/8"),))
    caller = access.identify(LOCAL, "127.0.0.1", "generate")
    assert (caller.name, caller.address) == ("local", "127.0.0.1")
    for more in ({"HTTP_X_FORWARDED_FOR": "127.0.0.1"}, {"HTTP_VIA": "1.1 x"}, {"HTTP_HOST": "llm.example.org"}):
        with pytest.raises(Unauthenticated):
            access.identify({**LOCAL, **more}, "127.0.0.1", "generate")


@pytest.fixture
def keyed(tmp_path: Path) -> tuple[Access, dict[str, str]]:
    path = tmp_path / "keys.json"
    scopes = {"user": {"generate"}, "scraper": {"metrics"}, "boss": {"generate", "admin"}}
    secrets = {name: add_key(path, name, frozenset(wanted)) for name, wanted in scopes.items()}
    return Access(KeyFile(path)), {name: f"Bearer {secret}" for name, secret in secrets.items()}


def ask(access: Access, scope: str, header: str | None, **more: str) -> str:
    environ: dict[str, Any] = {**LOCAL, **more} | ({} if header is None else {"HTTP_AUTHORIZATION": header})
    return access.identify(environ, access.address(environ), scope).name


def test_scopes(keyed: tuple[Access, dict[str, str]]) -> None:
    """A key may do what its scopes hold and nothing else."""
    access, headers = keyed
    assert ask(access, "generate", headers["user"]) == "user"
    assert ask(access, "metrics", headers["scraper"]) == "scraper"
    for scope, name in (("generate", "scraper"), ("metrics", "user"), ("admin", "user"), ("metrics", "boss")):
        with pytest.raises(Forbidden, match=scope):
            ask(access, scope, headers[name])


def test_loopback_alone_is_no_key(keyed: tuple[Access, dict[str, str]]) -> None:
    """Where keys are needed, they are needed on loopback too."""
    with pytest.raises(Unauthenticated):
        ask(keyed[0], "generate", None)


def test_metrics_are_open_to_direct_requests(keyed: tuple[Access, dict[str, str]]) -> None:
    """Metrics need no key on loopback without a proxy, and one everywhere else; a wrong key is never overlooked."""
    access, headers = keyed
    assert ask(access, "metrics", None) == "local"
    for more in ({"REMOTE_ADDR": "10.0.0.3"}, {"HTTP_X_FORWARDED_FOR": "127.0.0.1"}, {"HTTP_HOST": "llm.example.org"}):
        with pytest.raises(Unauthenticated):
            ask(access, "metrics", None, **more)
        assert ask(access, "metrics", headers["scraper"], **more) == "scraper"
    with pytest.raises(Unauthenticated):
        ask(access, "metrics", "Bearer wrong")


def test_no_key_file_no_service(tmp_path: Path) -> None:
    """A missing key file refuses everybody."""
    with pytest.raises(KeysUnusable):
        ask(Access(KeyFile(tmp_path / "none")), "generate", "Bearer x")
