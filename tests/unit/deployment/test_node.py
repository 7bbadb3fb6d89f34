"""How nodes are asked: what is taken for an answer, and who is told the password."""

import argparse
import json
import ssl
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import requests
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from requests.adapters import BaseAdapter

from scripts import cost, drift, node, status, sweep
from scripts.bake.errors import Refused
from scripts.bake.probe import make_facts
from scripts.node import NotTold, Way, add_options, query, read_boot, read_certificate, read_way, see, why_not_ready

WAY = Way("llm.example.org", user="operator", password="secret-word")
Answer = requests.Response | Exception


class Scripted(BaseAdapter):
    """Answers every request with the same, and remembers the requests."""

    def __init__(self, answer: Answer):
        super().__init__()
        self._answer = answer
        self.seen: list[tuple[requests.PreparedRequest, Any]] = []

    def send(self, request: requests.PreparedRequest, *words: Any, **options: Any) -> requests.Response:
        self.seen.append((request, options["verify"]))
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer

    def close(self) -> None:
        """Nothing is held open."""


def answer(status: int, body: Any) -> requests.Response:
    made = requests.Response()
    made.status_code = status
    made._content = (body if isinstance(body, str) else json.dumps(body)).encode()
    return made


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[Answer], Scripted]:
    """Puts a scripted answer in the place of the network."""
    real = node.open_session

    def make(told: Answer) -> Scripted:
        adapter = Scripted(told)

        def open_session(name: str, verify: bool | str) -> requests.Session:
            session = real(name, verify)
            session.mount("https://", adapter)
            return session

        monkeypatch.setattr(node, "open_session", open_session)
        return adapter

    return make


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        (answer(200, {"status": "ready"}), None),
        (answer(503, {"status": "loading", "reason": "the model loads"}), "/ready says 503: the model loads"),
        (answer(502, "Bad Gateway"), "/ready says 502: Bad Gateway"),
        (answer(503, ["?"]), '/ready says 503: ["?"]'),
    ],
)
def test_ready_or_why_not(told: requests.Response, reason: str | None, script: Callable[[Answer], Scripted]) -> None:
    """By the node's own reason where it gives one; nothing secret is asked, so any certificate will do."""
    asked = script(told)
    assert why_not_ready("2001:db8::1", WAY) == reason
    [(request, verify)] = asked.seen
    assert request.url == "https://[2001:db8::1]/ready"
    assert request.headers["Host"] == "llm.example.org"
    assert verify is False
    assert "Authorization" not in request.headers


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        (answer(401, ""), "does not take operator's password"),
        (answer(404, ""), "open no monitoring"),
        (answer(500, ""), "does not answer \\(HTTPError\\)"),
        (answer(200, "<html>"), "does not answer \\(JSONDecodeError\\)"),
        (requests.exceptions.SSLError("self-signed"), "told nothing secret"),
        (requests.ConnectTimeout(), "does not answer \\(ConnectTimeout\\)"),
    ],
)
def test_a_monitoring_that_does_not_tell(told: Answer, reason: str, script: Callable[[Answer], Scripted]) -> None:
    """Each reason is a line; the password is in none of them."""
    asked = script(told)
    with pytest.raises(NotTold, match=reason) as caught:
        see("192.0.2.1", WAY, "/node")
    assert WAY.password not in str(caught.value) + repr(WAY)
    [(request, verify)] = asked.seen
    assert verify is True  # the password goes to whom a certificate proves
    assert request.headers["Host"] == "monitoring.llm.example.org"


def test_prometheus_answers_with_a_number_or_none(script: Callable[[Answer], Scripted]) -> None:
    """No series, and a quotient of nothing by nothing, are no number."""

    def ask(*values: str) -> float | None:
        script(answer(200, {"data": {"result": [{"value": [0, value]} for value in values]}}))
        return query("192.0.2.1", WAY, "up")

    assert ask("12.5") == 12.5
    assert ask() is None
    assert ask("NaN") is None
    script(answer(200, {"data": {}}))
    with pytest.raises(NotTold, match="makes no sense"):
        query("192.0.2.1", WAY, "up")


def test_the_boot_is_told_to_everybody(script: Callable[[Answer], Scripted]) -> None:
    """By whom a certificate proves, without a password."""
    own = Way("llm.example.org", authority="/a.pem", user="operator", password="secret-word")
    asked = script(answer(200, {"boot": {"model_s": 1.5}}))
    assert read_boot("192.0.2.1", own) == {"model_s": 1.5}
    [(request, verify)] = asked.seen
    assert ("Authorization" in request.headers, verify) == (False, "/a.pem")
    script(answer(200, {}))
    with pytest.raises(NotTold, match="makes no sense"):
        read_boot("192.0.2.1", own)


def test_the_certificate_is_read_also_where_nobody_would_take_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its remaining days are told beside the reason."""
    chain = make_facts(tmp_path).certificate.read_bytes()
    shown = x509.load_pem_x509_certificate(chain).public_bytes(serialization.Encoding.DER)

    def shake_hands(address: str, way: Way, context: ssl.SSLContext) -> bytes:
        if context.verify_mode == ssl.CERT_REQUIRED:
            error = ssl.SSLCertVerificationError(1, "failed")
            error.verify_message = "self-signed certificate"
            raise error
        return shown

    monkeypatch.setattr(node, "_shake_hands", shake_hands)
    told = read_certificate("192.0.2.1", WAY)
    assert told.problem == "self-signed certificate"
    ends = x509.load_pem_x509_certificate(chain).not_valid_after_utc
    assert told.days_left == pytest.approx((ends - datetime.now(UTC)).total_seconds() / 86400, abs=0.01)
    monkeypatch.setattr(node, "_shake_hands", lambda *words: b"no certificate")
    with pytest.raises(NotTold, match="does not answer over HTTPS"):
        read_certificate("192.0.2.1", WAY)


def test_the_password_comes_from_the_environment_or_a_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Never from an argument; without either the command says what to do."""
    parser = argparse.ArgumentParser()
    add_options(parser)
    assert [action.dest for action in parser._actions if "password" in action.dest] == []
    no_pem = tmp_path / "authority.pem"
    no_pem.write_text("not one\n")
    for wrong, reason in ((no_pem, "holds no certificate in PEM"), (tmp_path / "none", "is no file")):
        with pytest.raises(SystemExit):
            parser.parse_args(["--authority", str(wrong)])
        assert reason in capsys.readouterr().err
    options = parser.parse_args(["--monitoring-user", "operator"])
    monkeypatch.setenv(node.PASSWORD_VARIABLE, "x1")
    assert read_way(options, None) is None
    told = read_way(options, "llm.example.org")
    assert told is not None
    assert (told.user, told.password) == ("operator", "x1")
    monkeypatch.delenv(node.PASSWORD_VARIABLE)
    monkeypatch.setattr(node.sys.stdin, "isatty", lambda: False)
    with pytest.raises(Refused, match="no password for operator"):
        read_way(options, "llm.example.org")
    monkeypatch.setattr(node.sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr(node.getpass, "getpass", lambda prompt: "x2")
    told = read_way(options, "llm.example.org")
    assert told is not None
    assert told.password == "x2"

    def end(prompt: str) -> str:
        raise EOFError

    monkeypatch.setattr(node.getpass, "getpass", end)
    with pytest.raises(Refused, match="no password was typed"):
        read_way(options, "llm.example.org")


@pytest.mark.parametrize("program", [cost, drift, status, sweep], ids=lambda each: each.__name__)
def test_ctrl_c_ends_without_a_traceback(program: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the code by which a shell tells it, for each of the operator's looks."""
    monkeypatch.setattr(program, "find_access", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert program.main(["--folder", str(tmp_path)]) == 130
