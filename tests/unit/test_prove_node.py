"""Terraform's gate: what makes it wait, what ends it at once, and what it takes for proof."""

import json
from collections.abc import Callable
from typing import Any, cast

import pytest
import requests

from scripts import prove_node
from scripts.prove_node import Never, NotYet, Order, ask_once, prove, prove_once, read_order

ORDER = Order("192.0.2.1", "llm.example.org", "mllm_x", 1.0, True)
RIGHT = {
    "PROOF_STAGE": "gate",
    "PROOF_ADDRESS": "192.0.2.1",
    "PROOF_DOMAIN": "llm.example.org",
    "PROOF_KEY": "mllm_x",
    "PROOF_TIMEOUT_S": "60",
    "PROOF_CERTIFICATE": "valid",
    "PROOF_AUTHORITY": "",
}


def answer(status: int, body: Any) -> Callable[[], requests.Response]:
    def make() -> requests.Response:
        made = requests.Response()
        made.status_code = status
        made._content = (body if isinstance(body, str) else json.dumps(body)).encode()
        return made

    return make


def fail(error: Exception) -> Callable[[], requests.Response]:
    def make() -> requests.Response:
        raise error

    return make


class Session:
    """Answers /ready and /generate as told."""

    def __init__(self, ready: Callable[[], requests.Response], generate: Callable[[], requests.Response]):
        self._ready, self._generate = ready, generate
        self.headers: dict[str, str] = {}
        self.rollout: dict[str, Any] = {"state": "none"}
        self.ended = False

    def as_session(self) -> requests.Session:
        """It, in the place of the real one."""
        return cast(requests.Session, self)

    def get(self, url: str, **more: Any) -> requests.Response:
        if url.partition("?")[0] == "https://192.0.2.1/rollout":
            return answer(200, self.rollout)()
        assert url == "https://192.0.2.1/ready"
        return self._ready()

    def delete(self, url: str, headers: dict[str, str], **more: Any) -> requests.Response:
        assert (url, headers) == ("https://192.0.2.1/rollout", {"Authorization": "Bearer mllm_x"})
        self.ended = True
        return answer(200, {})()

    def post(self, url: str, headers: dict[str, str], **more: Any) -> requests.Response:
        assert url == "https://192.0.2.1/generate"
        assert headers == {"Authorization": "Bearer mllm_x"}
        return self._generate()

    def mount(self, *words: Any) -> None:
        """Nothing is connected to."""


READY, SAYS = answer(200, {"status": "ready"}), answer(200, {"response": "Red"})


def test_a_generation_is_the_proof() -> None:
    """What the model says is handed on."""
    assert ask_once(Session(READY, SAYS).as_session(), ORDER) == "Red"


@pytest.mark.parametrize(
    ("ready", "generate", "kind", "reason"),
    [
        (fail(requests.ConnectionError()), SAYS, NotYet, "does not answer: ConnectionError"),
        (
            fail(requests.exceptions.SSLError("self-signed")),
            SAYS,
            NotYet,
            "certificate is not valid for llm.example.org",
        ),
        (answer(503, {"status": "loading", "reason": "the engine is loading"}), SAYS, NotYet, "the engine is loading"),
        (answer(503, {"status": "failed", "reason": "wrong facts"}), SAYS, Never, "/ready says 503: wrong facts"),
        (READY, answer(200, "<html>"), NotYet, "does not answer: JSONDecodeError"),
        (answer(502, []), SAYS, NotYet, "something else than mini-llm"),
        (READY, answer(401, {}), Never, "-replace=terraform_data.node"),
        (READY, answer(503, {"detail": "busy"}), NotYet, "POST /generate says 503"),
        (READY, answer(503, "no available server"), NotYet, "POST /generate says 503: no available server"),
        (READY, answer(200, {"answer": "x"}), NotYet, "something else than mini-llm"),
        (READY, answer(200, {"response": " "}), Never, "its model says nothing"),
    ],
)
def test_what_is_no_proof(
    ready: Callable[[], requests.Response],
    generate: Callable[[], requests.Response],
    kind: type[Exception],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What may pass is waited for, what needs somebody to act is told at once."""
    monkeypatch.setattr(prove_node, "open_session", lambda order: Session(READY, SAYS))
    with pytest.raises(kind, match=reason.replace("?", r"\?")):
        ask_once(Session(ready, generate).as_session(), ORDER)


def test_a_node_without_a_certificate_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong facts are told at once, though nobody can trust who tells them; the gate stays shut either way."""
    told = answer(503, {"status": "failed", "reason": "certificate: it is not for llm.example.org"})
    monkeypatch.setattr(prove_node, "open_session", lambda order: Session(told, SAYS) if not order.verify else None)
    with pytest.raises(Never, match=r"it is not for llm\.example\.org"):
        ask_once(Session(fail(requests.exceptions.SSLError("self-signed")), SAYS).as_session(), ORDER)


@pytest.mark.parametrize(
    ("stage", "told", "expected"),
    [
        ("gate", {"state": "looking"}, "looks for the node that serves"),
        ("gate", {"state": "first"}, None),
        ("gate", {"state": "prepared", "flows": "kept", "answers": 3}, None),
        ("gate", {"state": "looking", "reason": "waiting for a moment"}, "waiting for a moment"),
        ("gate", {"state": "failed", "reason": "another key"}, "did not take over: another key"),
        ("gate", {"state": "moved"}, None),
        ("served", {"state": "prepared"}, "not done yet"),
        ("served", {"state": "moved", "answers": 2, "connections": 3}, "2 answers, 3 connections"),
        ("served", {"state": "finished"}, None),
        ("served", {"state": "none"}, None),
        ("served", {"state": "finished", "key_is_void": True}, None),
    ],
)
def test_a_takeover_is_waited_for(stage: str, told: dict[str, Any], expected: str | None) -> None:
    """Before the addresses move as far as they may, after it to its end, with which the key of the proof ends."""
    session, order = Session(READY, SAYS), Order("192.0.2.1", "llm.example.org", "mllm_x", 1.0, True, stage)
    session.rollout = told
    if expected is None:
        answered = prove_once(session.as_session(), order)
        assert answered == ("proved before" if "key_is_void" in told else "Red")
    else:
        with pytest.raises((NotYet, Never), match=expected):
            prove_once(session.as_session(), order)
    assert session.ended == (stage == "served" and told == {"state": "finished"})


@pytest.mark.parametrize(
    "generate",
    [
        fail(requests.exceptions.ReadTimeout()),
        answer(503, {"type": "urn:mini-llm:problem:queue-full"}),
        answer(503, {"type": "urn:mini-llm:problem:queue-timeout"}),
    ],
)
@pytest.mark.parametrize("stage", ["gate", "served"])
def test_who_has_clients_already_may_be_busy(stage: str, generate: Callable[[], requests.Response]) -> None:
    """Before that it must have answered; then its queue is no reason to fail what went well."""
    session = Session(READY, generate)
    session.rollout = {"state": "first" if stage == "gate" else "finished"}
    order = Order("192.0.2.1", "llm.example.org", "mllm_x", 1.0, True, stage)
    if stage == "gate":
        with pytest.raises(NotYet):
            prove_once(session.as_session(), order)
    else:
        assert prove_once(session.as_session(), order).startswith("busy: ")
        assert session.ended


def test_a_certificate_that_was_taken_over_is_proved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though none is asked for where one is still to be ordered."""
    session, order = Session(READY, SAYS), Order("192.0.2.1", "llm.example.org", "mllm_x", 1.0, False)
    session.rollout = {"state": "prepared", "flows": "kept", "certificate": True}
    other = Session(fail(requests.exceptions.SSLError("expired")), SAYS)
    monkeypatch.setattr(prove_node, "open_session", lambda order: other if order.verify else session)
    with pytest.raises(NotYet, match="certificate is not valid"):
        prove_once(session.as_session(), order)


def test_it_waits_for_what_may_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """And says the last reason once its time is up."""
    tries = iter([fail(requests.ConnectionError()), answer(503, {"reason": "loading"}), READY, READY])
    monkeypatch.setattr(requests, "Session", lambda: Session(lambda: next(tries)(), SAYS))
    monkeypatch.setattr(prove_node.time, "sleep", lambda seconds: None)
    assert prove(ORDER) == "Red"
    clock = iter(range(100))
    monkeypatch.setattr(prove_node.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(requests, "Session", lambda: Session(fail(requests.ConnectionError()), SAYS))
    with pytest.raises(Never, match=r"not within 1 s: 192.0.2.1 does not answer"):
        prove(ORDER)


def test_the_order_comes_from_terraform() -> None:
    """What is missing or makes no sense is told by its name."""
    assert read_order(RIGHT) == Order("192.0.2.1", "llm.example.org", "mllm_x", 60.0, True)
    assert read_order({**RIGHT, "PROOF_CERTIFICATE": "any"}).verify is False
    assert read_order({**RIGHT, "PROOF_AUTHORITY": __file__}).verify == __file__
    for change, reason in (
        ({"PROOF_CERTIFICATE": "none"}, "must be valid or any"),
        ({"PROOF_AUTHORITY": "/none"}, "/none, which should hold"),
    ):
        with pytest.raises(Never, match=reason):
            read_order({**RIGHT, **change})
    with pytest.raises(Never, match="PROOF_KEY is missing"):
        read_order({name: value for name, value in RIGHT.items() if name != "PROOF_KEY"})
