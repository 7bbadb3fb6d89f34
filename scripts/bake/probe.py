"""Owns the server that proves an image: throw-away facts, a certificate made for the occasion, and the way to ask it.

The node is asked at its address, by the name in its facts, over HTTPS that trusts that one certificate. Nobody logs in.
"""

import hashlib
import json
import secrets
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import bcrypt
import requests
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519
from requests.adapters import HTTPAdapter

from scripts.bake.certificates import sign_own

DOMAIN = "probe.mini-llm.internal"  # no name that anybody can own
MONITORING = f"monitoring.{DOMAIN}"
_USER = "probe"
_TIMEOUT_S = (5.0, 60.0)
_VALID = timedelta(days=30)  # longer than what an alert calls near its end
_CHEAPEST_BCRYPT = 4  # of a random password that lives for minutes


@dataclass(frozen=True)
class ProbeFacts:
    """What a probe is told, and what is needed to ask it; all of it is worth nothing once the probe is gone."""

    user_data: str
    api_key: str
    password: str
    certificate: Path


def make_public_key() -> str:
    """An SSH key in OpenSSH's form whose private half nobody keeps: with it, the cloud mails no password for root."""
    key = ed25519.Ed25519PrivateKey.generate().public_key()
    form = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    return key.public_bytes(*form).decode() + " mini-llm-bake"


def make_facts(folder: Path) -> ProbeFacts:
    """Facts for one probe; the certificate, which is public, lies in the folder. Raises OSError."""
    api_key, password = f"mllm_{secrets.token_hex(24)}", secrets.token_hex(16)
    chain, key = _make_certificate()
    path = folder / "probe.pem"
    path.write_text(chain)
    scopes = ["generate", "metrics"]
    facts = {
        "domain": DOMAIN,
        "certificate": {"chain": chain, "key": key},
        "api_keys": [{"name": "probe", "sha256": hashlib.sha256(api_key.encode()).hexdigest(), "scopes": scopes}],
        "monitoring": {
            "user": _USER,
            "password_hash": bcrypt.hashpw(password.encode(), bcrypt.gensalt(_CHEAPEST_BCRYPT)).decode(),
        },
    }
    # YAML reads JSON.
    files = [{"path": "/etc/mini-llm/facts.yaml", "permissions": "0600", "content": json.dumps(facts)}]
    return ProbeFacts("#cloud-config\n" + json.dumps({"write_files": files}) + "\n", api_key, password, path)


def _make_certificate() -> tuple[str, str]:
    now = datetime.now(UTC)
    return sign_own(DOMAIN, now - timedelta(days=1), now + _VALID, (DOMAIN, MONITORING))  # clocks differ


class ByAddress(HTTPAdapter):
    """Connects to an address, asks for a name, and verifies another or, for None, none."""

    def __init__(self, verified: str | None, asked_for: str):
        self._names: dict[str, Any] = {"server_hostname": asked_for, "assert_hostname": verified or False}
        super().__init__()

    def init_poolmanager(self, connections: int, maxsize: int, block: bool = False, **more: Any) -> None:
        super().init_poolmanager(connections, maxsize, block, **self._names, **more)


def open_session(name: str, verify: bool | str) -> requests.Session:
    """Asks addresses for a name; ``verify`` is what requests takes, and without it the name is not verified either."""
    session = requests.Session()
    session.trust_env = False  # neither a proxy nor a netrc of who asks
    session.mount("https://", ByAddress(name if verify else None, name))
    session.headers["Host"] = name
    session.verify = verify
    return session


class Probe:
    """A node that is asked; answers are requests' own, and so are the errors of a node that does not answer."""

    def __init__(self, address: str, facts: ProbeFacts):
        self.address, self._facts = address, facts
        self._sessions = {name: open_session(name, str(facts.certificate)) for name in (DOMAIN, MONITORING)}
        self._sessions[MONITORING].auth = (_USER, facts.password)

    def ask(self, path: str, key: str | None = "", **more: Any) -> requests.Response:
        """The service's answer, by the probe's own key, by another, or by none for None; a ``json`` makes it a POST."""
        headers = {} if key is None else {"Authorization": f"Bearer {key or self._facts.api_key}"}
        method = "POST" if "json" in more else "GET"
        return self._sessions[DOMAIN].request(
            method, f"https://{self.address}{path}", headers=headers, timeout=_TIMEOUT_S, **more
        )

    def ask_plain(self, path: str) -> requests.Response:
        """The answer on port 80, wherever it leads to."""
        return self._sessions[DOMAIN].get(
            f"http://{self.address}{path}", headers={"Host": DOMAIN}, timeout=_TIMEOUT_S, allow_redirects=False
        )

    def see(self, path: str, **parameters: str) -> Any:
        """What the monitoring says, as JSON. Raises requests.RequestException, which a wrong answer is as well."""
        answer = self._sessions[MONITORING].get(f"https://{self.address}{path}", params=parameters, timeout=_TIMEOUT_S)
        answer.raise_for_status()
        return answer.json()

    def wait_ready(self, patience_s: float) -> str | None:
        """None once /ready says 200; otherwise the last thing that was heard of it."""
        end_s = time.monotonic() + patience_s
        while True:
            try:
                answer = self.ask("/ready")
                if answer.status_code == 200:
                    return None
                heard = f"/ready says {answer.status_code}: {answer.text[:300].strip()}"
            except requests.RequestException as error:
                heard = f"{self.address} does not answer over HTTPS ({type(error).__name__})"
            if time.monotonic() > end_s:
                return heard
            time.sleep(0.2)
