#!/usr/bin/env python3
"""Proves that a node serves: Terraform's gate, before addresses move to a new node, and after. Told by its environment.

PROOF_STAGE (``gate``, before the addresses move: has it taken over from the node that serves? or ``served``, after:
has that one given its last answer?), PROOF_ADDRESS (whom to ask), PROOF_DOMAIN (by which name), PROOF_KEY (a key of
its service), PROOF_TIMEOUT_S, PROOF_CERTIFICATE (``valid``, or ``any`` while it cannot be there yet) and
PROOF_AUTHORITY (PEM file, where the system does not know who signed it). Exit code 0 once the node has answered a
generation and the stage is reached, 1 with the reason if it never was.
"""

import os
import sys
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

try:
    import requests
    from urllib3.exceptions import InsecureRequestWarning

    from scripts.bake import probe
except ModuleNotFoundError as error:
    sys.exit(f"error: Python has no module {error.name}; run `make bake`, or name another one: -var python=…")

_REQUEST_TIMEOUT_S = (5.0, 120.0)  # a generation of some tokens by a large model
_BUSY = ("urn:mini-llm:problem:queue-full", "urn:mini-llm:problem:queue-timeout")
_PAUSE_S = 1.0
_SAID_EVERY_S = 15.0
_QUESTION: dict[str, Any] = {"prompt": "Name three colours.", "max_tokens": 8, "temperature": 0}


class NotYet(Exception):
    """The node does not serve; it may later."""


class Busy(NotYet):
    """The node serves, but others are before."""


class Never(Exception):
    """The node does not serve, and waiting will not help."""


@dataclass(frozen=True)
class Order:
    """What to prove; ``verify`` is what requests takes for its certificate."""

    address: str
    domain: str
    key: str
    timeout_s: float
    verify: bool | str
    stage: str = "gate"
    authority: bool | str = True  # what a certificate is verified with once it must be there


def read_order(environment: dict[str, str]) -> Order:
    """The order in an environment. Raises Never if it makes no sense."""
    try:
        certificate = environment["PROOF_CERTIFICATE"]
        if certificate not in ("valid", "any"):
            raise Never("PROOF_CERTIFICATE must be valid or any")
        authority = environment.get("PROOF_AUTHORITY", "")
        if authority and not Path(authority).is_file():
            raise Never(f"{authority}, which should hold the authority's certificate, is no file")
        stage = environment["PROOF_STAGE"]
        if stage not in ("gate", "served"):
            raise Never("PROOF_STAGE must be gate or served")
        return Order(
            environment["PROOF_ADDRESS"],
            environment["PROOF_DOMAIN"],
            environment["PROOF_KEY"],
            float(environment["PROOF_TIMEOUT_S"]),
            (authority or True) if certificate == "valid" else False,
            stage,
            authority or True,
        )
    except KeyError as error:
        raise Never(f"{error.args[0]} is missing; Terraform sets it") from error


def _judge(ready: requests.Response) -> None:
    """Raises NotYet, or Never where it stays so until somebody acts: a failed engine, wrong facts."""
    if ready.status_code == 200:
        return
    told = ready.json()
    kind = Never if told.get("status") == "failed" else NotYet
    raise kind(f"/ready says {ready.status_code}: {told.get('reason') or ready.text[:500]}")


def _judge_unverified(order: Order) -> None:
    """A node with wrong facts has no certificate, and says why to whoever asks."""
    try:
        told = open_session(replace(order, verify=False)).get(
            f"https://{order.address}/ready", timeout=_REQUEST_TIMEOUT_S
        )
        _judge(told)
    except (requests.RequestException, AttributeError):
        pass  # it says nothing more than its certificate does


def open_session(order: Order) -> requests.Session:
    """A session that connects to the node's address and asks for its name."""
    return probe.open_session(order.domain, order.verify)


def ask_ready(session: requests.Session, order: Order) -> None:
    """Raises NotYet or Never as long as the node says that it does not serve, or nothing."""
    try:
        _judge(session.get(f"https://{order.address}/ready", timeout=_REQUEST_TIMEOUT_S))
    except requests.exceptions.SSLError as error:
        _judge_unverified(order)
        raise NotYet(f"its certificate is not valid for {order.domain}: {error}") from error
    except requests.RequestException as error:  # a JSONDecodeError is one, too
        raise NotYet(f"{order.address} does not answer: {type(error).__name__}") from error
    except (TypeError, AttributeError) as error:
        raise NotYet(f"{order.address} answers something else than mini-llm would") from error


def ask_once(session: requests.Session, order: Order) -> str:
    """What the node answers to the question. Raises Busy, NotYet and Never."""
    ask_ready(session, order)
    try:
        answer = session.post(
            f"https://{order.address}/generate",
            json=_QUESTION,
            headers={"Authorization": f"Bearer {order.key}"},
            timeout=_REQUEST_TIMEOUT_S,
        )
        if answer.status_code == 401:
            raise Never(
                "the key of the proof is not taken: it ends some time after a node was made; "
                "make another node: terraform apply -replace=terraform_data.node"
            )
        if answer.status_code != 200:
            kind = Busy if answer.status_code == 503 and any(busy in answer.text for busy in _BUSY) else NotYet
            raise kind(f"POST /generate says {answer.status_code}: {answer.text[:500]}")
        response = str(answer.json()["response"])
    except requests.exceptions.ReadTimeout as error:
        raise Busy(f"{order.address} does not answer within {_REQUEST_TIMEOUT_S[1]:.0f} s") from error
    except requests.RequestException as error:  # a JSONDecodeError is one, too
        raise NotYet(f"{order.address} does not answer: {type(error).__name__}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise NotYet(f"{order.address} answers something else than mini-llm would") from error
    if not response.strip():
        raise Never("its model says nothing")
    return response


def ask_rollout(session: requests.Session, order: Order, query: str = "") -> dict[str, Any]:
    """How far the node's takeover is; of state ``none`` where it does not take part in any. Raises NotYet."""
    try:
        told = session.get(
            f"https://{order.address}/rollout{query}",
            headers={"Authorization": f"Bearer {order.key}"},
            timeout=_REQUEST_TIMEOUT_S,
        )
        if told.status_code != 200:
            raise NotYet(f"GET /rollout says {told.status_code}")
        return dict(told.json())
    except (requests.RequestException, TypeError, ValueError) as error:
        raise NotYet(f"{order.address} does not tell of its takeover: {type(error).__name__}") from error


def judge_rollout(told: dict[str, Any], order: Order) -> None:
    """Raises NotYet, or Never with the reason, unless the stage's end is reached."""
    state, answers = told.get("state"), told.get("answers")
    if state == "failed":
        raise Never(
            f"it did not take over: {told.get('reason')}; when that is mended, make another node: "
            "terraform apply -replace=terraform_data.node"
        )
    if state == "none":
        return
    if order.stage == "gate":
        if state == "looking":
            raise NotYet(told.get("reason") or "it looks for the node that serves")
    elif state != "finished":
        left = "" if answers is None or answers < 0 else f": {answers} answers, {told.get('connections')} connections"
        raise NotYet(told.get("reason") or f"the old node is not done yet{left}")


def prove_once(session: requests.Session, order: Order) -> str:
    """One look at all that the stage wants; what the node answered. Raises NotYet, Never."""
    ask_ready(session, order)
    told = ask_rollout(session, order)
    if told.get("key_is_void"):
        return "proved before"  # its key ended with that
    # First this: a generation takes a processor from those who are being served.
    judge_rollout(told, order)
    try:
        answer = ask_once(session, order)
    except Busy as busy:
        if order.stage == "gate":
            raise
        # It has answered at the gate; now clients are in the queue, whose answers take minutes.
        ask_ready(session, order)
        answer = f"busy: {busy}"
    if told.get("certificate") and not order.verify:
        # What it took over must be what clients will see.
        proved = replace(order, verify=order.authority)
        ask_once(open_session(proved), proved)
    for note in told.get("notes") or ():
        print(f"note: {note}", flush=True)
    if order.stage == "served" and told.get("state") != "none":
        try:
            session.delete(
                f"https://{order.address}/rollout",
                headers={"Authorization": f"Bearer {order.key}"},
                timeout=_REQUEST_TIMEOUT_S,
            ).raise_for_status()
        except requests.RequestException as error:
            raise NotYet(f"the key of the proof could not be ended: {type(error).__name__}") from error
    return answer


def tell_logs(order: Order) -> list[str]:
    """The node's last log lines, if it still tells them; whose certificate that is does not matter any more."""
    unverified = replace(order, verify=False)
    try:
        logs = ask_rollout(open_session(unverified), unverified, "?logs=1").get("logs") or {}
        return [f"  {name}: {line}" for name, lines in logs.items() for line in lines]
    except NotYet:
        return []


def prove(order: Order) -> str:
    """Asks until the node answers; the answer. Raises Never with the last reason."""
    session = open_session(order)
    begin_s = said_s = time.monotonic()
    while True:
        try:
            return prove_once(session, order)
        except NotYet as reason:
            now_s = time.monotonic()
            if now_s - begin_s > order.timeout_s:
                raise Never(f"not within {order.timeout_s:.0f} s: {reason}") from reason
            if now_s - said_s > _SAID_EVERY_S:
                print(f"{now_s - begin_s:.0f} s: {reason}", flush=True)
                said_s = now_s
            time.sleep(_PAUSE_S)


def main() -> int:
    """Proves what the environment orders."""
    warnings.simplefilter("ignore", InsecureRequestWarning)  # said by PROOF_CERTIFICATE
    try:
        order = read_order(dict(os.environ))
    except Never as reason:
        print(f"error: {reason}")
        return 1
    begin_s = time.monotonic()
    try:
        answer = prove(order)
    except Never as reason:
        print("\n".join(tell_logs(order)))
        print(f"error: the node does not serve: {reason}")
        print("  the addresses were not moved to it, if they were not its own before; the next apply goes on from here")
        return 1
    print(f"{order.domain} at {order.address} serves after {time.monotonic() - begin_s:.1f} s: {answer[:60]!r}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
