"""Owns the first order of this node's certificate, which is made while Docker still starts.

``python3 first_certificate.py TRAEFIK STORE`` orders one for the first name in ``TRAEFIK/ordered``, by HTTP-01
(RFC 8555), and writes Traefik's store, so that Traefik finds account and certificate at its start and looks after them
from then on. Its own client would come later, spend seconds of a processor on the account's key, and look for the
authority's answer every five seconds only. Without a certificate the store has the account alone: then Traefik orders,
as it does for all further names, for TLS-ALPN-01, and for each renewal. So it is where ``TRAEFIK/arrival`` says that
addresses lead here only once the node serves: an order before that takes all its time, and fails.
"""

import base64
import hashlib
import json
import os
import socket
import ssl
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse, HTTPSConnection
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingTCPServer
from subprocess import SubprocessError, run
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

_KEY_BITS = 2048  # what Let's Encrypt's own client has for RSA, the only kind that Traefik takes
_ORDER_LIMIT_S = 15.0  # Traefik waits for it
_ANSWER_LIMIT_S = 5.0
_LARGEST_ANSWER_BYTES = 1 << 20
_LONGEST_REASON = 1000  # characters in the journal, of whatever the authority has said
_PAUSES_S = (0.05, 0.1, 0.2, 0.4, 0.8)  # between two looks at what the authority works on; the last again and again
_NONCES_TRIED = 3
_BAD_NONCE = "urn:ietf:params:acme:error:badNonce"
_CHALLENGES = "/.well-known/acme-challenge/"


class Refused(Exception):
    """The authority's answer is not what an order goes on with; the message says what it was."""


class Late(Refused):
    """There is no answer yet, and it is not waited for any longer."""


@dataclass(frozen=True)
class Settings:
    """What is ordered, and where: Traefik's own settings."""

    resolver: str
    server: str
    email: str
    authority: Path | None  # whom the server is trusted by, if not by the system's
    by_http: bool
    domain: str


def read_settings(traefik: Path) -> Settings:
    """From Traefik's folder. Raises OSError, ValueError, LookupError."""
    ((resolver, each),) = json.loads((traefik / "traefik.yaml").read_text())["certificatesResolvers"].items()
    acme, authority = each["acme"], traefik / "acme-authority.pem"
    return Settings(
        resolver,
        acme["caServer"],
        acme["email"],
        authority if authority.exists() else None,
        "httpChallenge" in acme,
        (traefik / "ordered").read_text().split()[0],
    )


def openssl(*words: str, stdin: bytes = b"") -> bytes:
    """What it prints. Raises OSError, SubprocessError."""
    return run(["openssl", *words], check=True, input=stdin, capture_output=True, timeout=10).stdout


def encode(content: bytes) -> str:
    """Base64 for URLs, without padding: RFC 7515."""
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()


def find_server(url: str) -> tuple[str, int]:
    """Host and port of an address by HTTPS. Raises Refused, ValueError."""
    parts = urlsplit(url)
    if parts.scheme != "https" or not parts.hostname:
        raise Refused(f"{url!r} is no address by HTTPS")
    return parts.hostname, parts.port or 443


class Account:
    """An RSA key, and what is signed by it. Its file is for its owner alone. Methods raise as ``openssl`` does."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "account.pem"
        openssl("genrsa", "-traditional", "-out", str(self.path), str(_KEY_BITS))
        modulus = openssl("rsa", "-in", str(self.path), "-noout", "-modulus").split(b"=")[1].strip()
        self.jwk = {"e": "AQAB", "kty": "RSA", "n": encode(bytes.fromhex(modulus.decode()))}
        canonical = json.dumps(self.jwk, separators=(",", ":"), sort_keys=True).encode()
        self.thumbprint = encode(hashlib.sha256(canonical).digest())  # RFC 7638

    def sign(self, header: dict[str, Any], payload: dict[str, Any] | None) -> bytes:
        """A JWS; without a payload it is a request to read something."""
        protected = encode(json.dumps(header).encode())
        content = "" if payload is None else encode(json.dumps(payload).encode())
        signature = openssl("dgst", "-sha256", "-sign", str(self.path), stdin=f"{protected}.{content}".encode())
        return json.dumps({"protected": protected, "payload": content, "signature": encode(signature)}).encode()


class Authority:
    """An ACME server over one connection. Methods raise OSError, HTTPException, ValueError, LookupError, Refused."""

    def __init__(self, directory: str, trusted: Path | None, account: Account) -> None:
        self._server, self._account, self._kid, self._nonce = find_server(directory), account, "", ""
        context = ssl.create_default_context(cafile=str(trusted) if trusted else None)
        # Python asks more of an authority of one's own than Traefik, or RFC 8555, does.
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        host, port = self._server
        self._connection = HTTPSConnection(host, port, timeout=_ANSWER_LIMIT_S, context=context)
        self.places = json.loads(self._fetch("GET", directory)[1])

    def close(self) -> None:
        """Ends the connection."""
        self._connection.close()

    def _check_server(self, url: str) -> None:
        if find_server(url) != self._server:
            raise Refused(f"{url} is not of the server that was asked")

    def _fetch(self, method: str, url: str, body: bytes | None = None) -> tuple[HTTPResponse, bytes]:
        self._check_server(url)
        parts = urlsplit(url)
        place = f"{parts.path}?{parts.query}" if parts.query else parts.path
        kind = {"Content-Type": "application/jose+json"} if body else {}
        self._connection.request(method, place, body, {"User-Agent": "mini-llm", **kind})
        answer = self._connection.getresponse()
        self._nonce = answer.headers.get("Replay-Nonce", "")
        return answer, answer.read(_LARGEST_ANSWER_BYTES)

    def ask(self, url: str, payload: dict[str, Any] | None = None) -> tuple[HTTPResponse, bytes]:
        """One signed request."""
        who = {"kid": self._kid} if self._kid else {"jwk": self._account.jwk}
        for _ in range(_NONCES_TRIED):
            if not self._nonce:
                self._fetch("HEAD", self.places["newNonce"])
            header = {"alg": "RS256", "nonce": self._nonce, "url": url, **who}
            answer, content = self._fetch("POST", url, self._account.sign(header, payload))
            if answer.status in (200, 201):
                return answer, content
            if _BAD_NONCE.encode() not in content:
                break
        raise Refused(f"{url}: {answer.status} {content.decode(errors='replace')}")

    def register(self, email: str) -> dict[str, Any]:
        """Makes the account; what Traefik keeps of it."""
        contact = [f"mailto:{email}"]
        body = {"contact": contact, "termsOfServiceAgreed": True}
        answer, _ = self.ask(self.places["newAccount"], body)
        location = answer.headers["Location"] or ""
        self._check_server(location)  # Traefik would never come away from a wrong one
        self._kid = location
        return {"body": {"status": "valid", "contact": contact}, "uri": self._kid}

    def watch(self, url: str, until: str, end_s: float) -> dict[str, Any]:
        """Looks until it has this status; ``end_s`` is of the monotonic clock."""
        pauses_s = iter(_PAUSES_S)
        while True:
            found: dict[str, Any] = json.loads(self.ask(url)[1])
            if found["status"] == until:
                return found
            if found["status"] not in ("pending", "processing", "ready"):
                errors = [each["error"] for each in found.get("challenges", ()) if "error" in each]
                raise Refused(json.dumps(errors or found))
            if time.monotonic() > end_s:
                raise Late(f"{url} is still {found['status']} after {_ORDER_LIMIT_S:.0f} s")
            time.sleep(next(pauses_s, _PAUSES_S[-1]))


@contextmanager
def answering(place: str, text: str, port: int = 80) -> Iterator[None]:
    """Whoever asks this node's port for a challenge gets the answer; all else has to wait for Traefik."""

    class Answer(BaseHTTPRequestHandler):
        timeout = _ANSWER_LIMIT_S

        def do_GET(self) -> None:
            content = text.encode() if self.path == place else b"not ready yet\n"
            self.send_response_only(200 if self.path == place else 503)
            self.send_header("Content-Type", "text/plain")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Strangers write nothing into the journal."""

    class Server(ThreadingTCPServer):  # not HTTPServer, which asks DNS for this node's own name first
        address_family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
        allow_reuse_address = daemon_threads = True
        request_queue_size = 64

        def server_bind(self) -> None:
            if self.address_family == socket.AF_INET6:
                self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            super().server_bind()

        def handle_error(self, *_: object) -> None:
            """Nor by going away."""

    server = Server(("", port), Answer)
    with server:
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield
        finally:
            server.shutdown()


def order(authority: Authority, account: Account, domain: str, folder: Path) -> dict[str, Any]:
    """A certificate as Traefik keeps it. Raises as ``Authority`` and ``openssl`` do."""
    end_s = time.monotonic() + _ORDER_LIMIT_S
    answer, content = authority.ask(authority.places["newOrder"], {"identifiers": [{"type": "dns", "value": domain}]})
    place, made = answer.headers["Location"], json.loads(content)
    for url in made["authorizations"]:
        found = json.loads(authority.ask(url)[1])
        (challenge,) = (each for each in found["challenges"] if each["type"] == "http-01")
        token = challenge["token"]
        with answering(f"{_CHALLENGES}{token}", f"{token}.{account.thumbprint}"):
            authority.ask(challenge["url"], {})
            try:
                authority.watch(url, "valid", end_s)
            except Late:
                # Or Traefik's order would get the same one, which fails as soon as nobody answers here.
                authority.ask(url, {"status": "deactivated"})
                raise
    key = folder / "certificate.key"
    kind = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", str(key))
    named = ("-subj", "/", "-addext", f"subjectAltName=DNS:{domain}")
    request = openssl("req", "-new", *kind, *named, "-outform", "DER")
    authority.ask(made["finalize"], {"csr": encode(request)})
    _, chain = authority.ask(authority.watch(place, "valid", end_s)["certificate"])
    if not chain.startswith(b"-----BEGIN CERTIFICATE-----"):
        raise Refused(f"no certificate but {chain[:100]!r}")
    return {
        "domain": {"main": domain},
        "certificate": base64.b64encode(chain).decode(),
        "key": base64.b64encode(key.read_bytes()).decode(),
        "Store": "default",
    }


def write_store(store: Path, resolver: str, account: dict[str, Any], certificates: list[dict[str, Any]]) -> None:
    """Replaces Traefik's store by a whole one, as its pkg/provider/acme reads it. Raises OSError."""
    unfinished = store.with_suffix(".unfinished")
    unfinished.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    with os.fdopen(os.open(unfinished, flags, 0o600), "w") as file:  # Traefik takes none that others may read
        json.dump({resolver: {"Account": account, "Certificates": certificates or None}}, file)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(store)


def fill_store(settings: Settings, store: Path, folder: Path, led_here: bool) -> None:
    """With the account at once, with a certificate if the name leads here and it can be had now.

    Raises OSError, SubprocessError.
    """
    account = Account(folder)
    body = "".join(line for line in account.path.read_text().splitlines() if not line.startswith("-----"))
    kept: dict[str, Any] = {
        "Email": settings.email,
        "Registration": None,  # Traefik makes up for it
        "PrivateKey": body,
        "KeyType": "P256",  # of certificates
    }
    certificates: list[dict[str, Any]] = []
    write_store(store, settings.resolver, kept, certificates)
    try:
        authority = Authority(settings.server, settings.authority, account)
        try:
            kept["Registration"] = authority.register(settings.email)
            if settings.by_http and led_here:
                certificates.append(order(authority, account, settings.domain, folder))
                print(f"the certificate of {settings.domain} is there")
        finally:
            authority.close()
    except (OSError, HTTPException, ValueError, TypeError, LookupError, Refused, SubprocessError) as error:
        print(f"Traefik has to order the certificate of {settings.domain}: {repr(error)[:_LONGEST_REASON]}")
    write_store(store, settings.resolver, kept, certificates)


def main(traefik: Path, store: Path) -> None:
    """Leaves a store with an account, and with a certificate if there is one."""
    with tempfile.TemporaryDirectory() as folder:
        fill_store(read_settings(traefik), store, Path(folder), led_here=not (traefik / "arrival").exists())


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
