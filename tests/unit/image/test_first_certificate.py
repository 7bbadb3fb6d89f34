"""The first certificate's order goes on with right answers alone, and leaves Traefik a store that it can go on with."""

import base64
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.message import Message
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.image.scripts import load_script

first_certificate = load_script("rootfs/usr/lib/mini-llm/first_certificate.py")

HOST = "acme.example.net"
PLACES = {"newNonce": "/nonce", "newAccount": "/account", "newOrder": "/order"}
CHALLENGES = [{"type": kind, "url": f"https://{HOST}/answer/{kind}", "token": "t"} for kind in ("dns-01", "http-01")]
PROBLEM = {"type": "urn:ietf:params:acme:error:unauthorized", "detail": "404 from 192.0.2.1"}

Answer = tuple[int, dict[str, str], bytes]


def answer(status: int, body: object, **headers: str) -> Answer:
    """One of the authority's; a nonce comes with each."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return status, {"Replay-Nonce": "nonce", **headers}, content


def delivered(address: str) -> Answer:
    """An order that has come to its certificate."""
    return answer(200, {"status": "valid", "certificate": address})


PENDING = answer(200, {"status": "pending", "challenges": CHALLENGES})
FAILED = {**CHALLENGES[1], "error": PROBLEM}


@pytest.fixture
def traefik(tmp_path: Path) -> Path:
    """Traefik's folder, with an order for two names."""
    acme = {"caServer": f"https://{HOST}:443/dir", "email": "a@example.org", "httpChallenge": {"entryPoint": "http"}}
    (tmp_path / "traefik.yaml").write_text(json.dumps({"certificatesResolvers": {"acme": {"acme": acme}}}))
    (tmp_path / "ordered").write_text("llm.example.org\nmonitoring.llm.example.org\n")
    return tmp_path


@pytest.fixture
def authority(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What the authority answers to whom, in turn (the last for good), what it was asked, and what was open for it."""
    told = SimpleNamespace(asked=[], opened=[], now_s=0.0)
    told.answers = {
        "/dir": [answer(200, {name: f"https://{HOST}{path}" for name, path in PLACES.items()})],
        "/nonce": [answer(200, b"")],
        "/account": [answer(201, {"status": "valid"}, Location=f"https://{HOST}/account/7")],
        "/order": [
            answer(
                201,
                {"status": "pending", "authorizations": [f"https://{HOST}/authz"], "finalize": f"https://{HOST}/end"},
                Location=f"https://{HOST}/order/9",
            )
        ],
        "/authz": [
            PENDING,
            PENDING,
            answer(200, {"status": "valid", "challenges": CHALLENGES}),
        ],
        "/answer/http-01": [answer(200, {"status": "processing"})],
        "/end": [answer(200, {"status": "processing"})],
        "/order/9": [
            answer(200, {"status": "processing"}),
            delivered(f"https://{HOST}/chain?of=9"),
        ],
        "/chain?of=9": [answer(200, b"-----BEGIN CERTIFICATE-----\n")],
    }

    class Connection:
        def __init__(self, host: str, port: int, **_: object) -> None:
            assert (host, port) == (HOST, 443)

        def request(self, method: str, place: str, body: bytes | None, headers: dict[str, str]) -> None:
            told.asked.append((method, place, json.loads(body) if body else None, bool(told.opened)))
            queue = told.answers[place]
            self.next = queue.pop(0) if len(queue) > 1 else queue[0]

        def getresponse(self) -> SimpleNamespace:
            if callable(self.next):
                self.next()
            status, headers, content = self.next
            message = Message()
            for name, value in headers.items():
                message[name] = value
            return SimpleNamespace(status=status, headers=message, read=lambda limit: content[:limit])

        def close(self) -> None:
            told.asked.append("closed")

    def openssl(*words: str, stdin: bytes = b"") -> bytes:
        for option, text in (("-out", "-----BEGIN RSA PRIVATE KEY-----\nAA\nBB==\n"), ("-keyout", "the key")):
            if option in words:
                Path(words[words.index(option) + 1]).write_text(text)
        return {"rsa": b"Modulus=C0FFEE\n", "dgst": b"signed", "req": b"the request"}.get(words[0], b"")

    @contextmanager
    def answering(place: str, text: str) -> Iterator[None]:
        told.opened.append((place, text))
        yield
        told.opened.clear()

    def sleep(pause_s: float) -> None:
        told.now_s += pause_s

    monkeypatch.setattr(first_certificate, "HTTPSConnection", Connection)
    monkeypatch.setattr(first_certificate, "openssl", openssl)
    monkeypatch.setattr(first_certificate, "answering", answering)
    monkeypatch.setattr(first_certificate, "time", SimpleNamespace(monotonic=lambda: told.now_s, sleep=sleep))
    return told


def ordered(traefik: Path) -> tuple[dict[str, Any], list[dict[str, Any]] | None]:
    """What lies in Traefik's store afterwards: account, certificates."""
    store = traefik / "acme.json"
    first_certificate.main(traefik, store)
    assert store.stat().st_mode & 0o777 == 0o600
    assert not (traefik / "acme.unfinished").exists()
    resolver = json.loads(store.read_text())["acme"]
    return resolver["Account"], resolver["Certificates"]


def test_nothing_is_ordered_before_the_addresses_lead_here(traefik: Path, authority: SimpleNamespace) -> None:
    """An authority that asks there would find nobody, and Traefik wait for that."""
    (traefik / "arrival").write_text("told\n")
    account, certificates = ordered(traefik)
    assert account["Registration"]["uri"] == f"https://{HOST}/account/7"
    assert certificates is None
    assert "/order" not in [request[1] for request in authority.asked if request != "closed"]


def decoded(text: str) -> Any:
    """A part of a signed request."""
    return json.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)) or "null")


def test_traefik_finds_account_and_certificate(traefik: Path, authority: SimpleNamespace) -> None:
    """As its own store has them; only the first name's is ordered."""
    account, certificates = ordered(traefik)
    assert account == {
        "Email": "a@example.org",
        "Registration": {
            "body": {"status": "valid", "contact": ["mailto:a@example.org"]},
            "uri": f"https://{HOST}/account/7",
        },
        "PrivateKey": "AABB==",
        "KeyType": "P256",
    }
    assert certificates is not None
    (certificate,) = certificates
    assert certificate["domain"] == {"main": "llm.example.org"}
    assert base64.b64decode(certificate["certificate"]) == b"-----BEGIN CERTIFICATE-----\n"
    assert base64.b64decode(certificate["key"]) == b"the key"
    assert authority.asked[-1] == "closed"


def test_each_request_is_signed_for_its_place(traefik: Path, authority: SimpleNamespace) -> None:
    """The account by its key at first, by its address then; what only reads has no payload."""
    ordered(traefik)
    signed = [(place, body) for method, place, body, _ in authority.asked[:-1] if method == "POST"]
    headers = [decoded(body["protected"]) for _, body in signed]
    assert [header["url"] for header in headers] == [f"https://{HOST}{place}" for place, _ in signed]
    assert {header["alg"] for header in headers} == {"RS256"}
    assert headers[0]["jwk"] == {"e": "AQAB", "kty": "RSA", "n": "wP_u"}
    assert all(header["kid"] == f"https://{HOST}/account/7" and "jwk" not in header for header in headers[1:])
    payloads = {place: decoded(body["payload"]) for place, body in signed}
    assert payloads["/order"] == {"identifiers": [{"type": "dns", "value": "llm.example.org"}]}
    assert payloads["/answer/http-01"] == {}
    assert payloads["/authz"] is payloads["/order/9"] is payloads["/chain?of=9"] is None


def test_the_challenge_can_be_fetched_while_the_authority_looks(traefik: Path, authority: SimpleNamespace) -> None:
    """From before it is told to look, until it has said that it has seen it."""
    ordered(traefik)
    during = [place for _, place, _, opened in authority.asked[:-1] if opened]
    assert during == ["/answer/http-01", "/authz", "/authz"]


def test_a_nonce_that_is_too_old_is_replaced(traefik: Path, authority: SimpleNamespace) -> None:
    """By the one that came with the refusal; not for ever."""
    old = answer(400, {"type": "urn:ietf:params:acme:error:badNonce"})
    authority.answers["/order"][:0] = [old, old]
    assert ordered(traefik)[1]
    authority.answers["/account"] = [old]
    authority.asked.clear()
    assert ordered(traefik)[1] is None
    assert [place for _, place, _, _ in authority.asked[:-1]].count("/account") == 3


def fail() -> None:
    """A connection that breaks."""
    raise ConnectionResetError("reset by peer")


@pytest.mark.parametrize(
    ("place", "answers", "said"),
    [
        ("/authz", [PENDING, answer(200, {"status": "invalid", "challenges": [FAILED]})], "404 from 192.0.2.1"),
        ("/authz", [PENDING], "still pending after 15 s"),
        ("/authz", [answer(200, {"status": "pending", "challenges": CHALLENGES[:1]})], "ValueError"),
        ("/order", [answer(429, {"type": "urn:ietf:params:acme:error:rateLimited", "detail": "wait"})], "rateLimited"),
        ("/order", [answer(502, b"<html>" + b"x" * 100_000)], "502 <html>"),
        ("/order", [answer(201, b"<html>", Location="/")], "JSONDecodeError"),
        ("/order", [answer(201, b"null", Location="/")], "TypeError"),
        ("/order", [answer(201, b"{}", Location="/")], "KeyError"),
        ("/order/9", [answer(200, {"status": "invalid", "error": PROBLEM})], "unauthorized"),
        (
            "/order/9",
            [answer(200, {"status": "valid", "certificate": "https://other.example/"})],
            "is not of the server",
        ),
        (
            "/order/9",
            [answer(200, {"status": "valid", "certificate": f"http://{HOST}/chain"})],
            "is no address by HTTPS",
        ),
        ("/chain?of=9", [answer(200, b"<html>")], "no certificate"),
        ("/end", [fail], "reset by peer"),
    ],
)
def test_what_goes_wrong_is_traefiks_to_mend(
    traefik: Path,
    authority: SimpleNamespace,
    capsys: pytest.CaptureFixture[str],
    place: str,
    answers: list[Answer | Callable[[], None]],
    said: str,
) -> None:
    """It finds the account, and orders by itself; the journal says why."""
    authority.answers[place] = answers
    account, certificates = ordered(traefik)
    assert certificates is None
    assert account["Registration"]["uri"] == f"https://{HOST}/account/7"
    told = capsys.readouterr().out
    assert said in told
    assert len(told) < 1200
    assert authority.asked[-1] == "closed"


@pytest.mark.parametrize(
    "made",
    [
        answer(301, b"", Location=f"https://{HOST}/elsewhere"),
        answer(201, {}, Location="https://other.example/account/7"),
        answer(201, {}),
    ],
)
def test_an_account_without_an_address_is_not_kept(traefik: Path, authority: SimpleNamespace, made: Answer) -> None:
    """Traefik would never make another; with none it registers the same key."""
    authority.answers["/account"] = [made]
    account, certificates = ordered(traefik)
    assert (account["Registration"], account["PrivateKey"], certificates) == (None, "AABB==", None)


def test_what_is_given_up_does_not_meet_traefiks_order(traefik: Path, authority: SimpleNamespace) -> None:
    """An authority gives the same pending one out again."""
    authority.answers["/authz"] = [PENDING]
    ordered(traefik)
    _, place, body, opened = authority.asked[-2]
    assert (place, decoded(body["payload"]), opened) == ("/authz", {"status": "deactivated"}, True)


def test_what_an_earlier_try_left_is_in_no_ones_way(traefik: Path, authority: SimpleNamespace) -> None:
    """Whatever it is: a link would be written through, a file would keep its mode."""
    (traefik / "elsewhere").write_text("kept")
    (traefik / "acme.unfinished").symlink_to(traefik / "elsewhere")
    assert ordered(traefik)[1]
    assert (traefik / "elsewhere").read_text() == "kept"


def test_without_a_network_there_is_the_accounts_key(traefik: Path, authority: SimpleNamespace) -> None:
    """Traefik registers it then."""
    authority.answers["/dir"] = [fail]
    account, certificates = ordered(traefik)
    assert (account["Registration"], account["PrivateKey"], certificates) == (None, "AABB==", None)


def test_an_order_by_the_https_port_is_traefiks(traefik: Path, authority: SimpleNamespace) -> None:
    """Only it answers there."""
    settings = (traefik / "traefik.yaml").read_text().replace("httpChallenge", "tlsChallenge")
    (traefik / "traefik.yaml").write_text(settings)
    account, certificates = ordered(traefik)
    assert account["Registration"] is not None
    assert certificates is None
    assert "/order" not in [place for _, place, _, _ in authority.asked[:-1]]
