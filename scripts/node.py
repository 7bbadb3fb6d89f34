"""Owns how a node is asked from outside: at its own address, by its name, and what of it is trusted.

Whether it is ready is asked in any case; a key and the password of its monitoring go only to whom a certificate proves.
"""

import argparse
import getpass
import math
import os
import socket
import ssl
import sys
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import requests
from cryptography import x509
from urllib3 import disable_warnings
from urllib3.exceptions import InsecureRequestWarning
from urllib3.util.ssl_ import create_urllib3_context

from scripts.bake.errors import Refused
from scripts.bake.probe import open_session

PASSWORD_VARIABLE = "MONITORING_PASSWORD"  # noqa: S105 - the variable's name
_TIMEOUT_S = (5.0, 20.0)
_HANDSHAKE_TIMEOUT_S = 5.0


class NotTold(Exception):
    """The node did not answer, or not what was asked; the message says what was seen."""


@dataclass(frozen=True)
class Way:
    """How a deployment's nodes are asked; ``authority`` is a PEM file where the system does not know who signed."""

    domain: str
    authority: str = ""
    user: str = ""
    password: str = field(default="", repr=False)

    @property
    def monitoring(self) -> str:
        """The name of the monitoring."""
        return f"monitoring.{self.domain}"


@dataclass(frozen=True)
class Certificate:
    """What a node showed in the handshake; ``problem`` is None if clients would take it."""

    days_left: float
    problem: str | None


def in_url(address: str) -> str:
    """An address as it stands in a URL."""
    return f"[{address}]" if ":" in address else address


def read_certificate(address: str, way: Way) -> Certificate:
    """The certificate that the node shows for its domain. Raises NotTold."""
    try:
        try:
            shown, problem = _shake_hands(address, way, _context(way)), None
        except ssl.SSLCertVerificationError as error:
            shown, problem = _shake_hands(address, way, _context(None)), error.verify_message
        ends = x509.load_der_x509_certificate(shown).not_valid_after_utc
    except (OSError, ValueError) as error:
        raise NotTold(f"{address} does not answer over HTTPS ({type(error).__name__})") from error
    return Certificate((ends - datetime.now(UTC)).total_seconds() / 86400, problem)


def _context(way: Way | None) -> ssl.SSLContext:
    """Trusts whom `see` trusts, in the same way; without a way whoever answers."""
    context = create_urllib3_context()
    context.check_hostname = False  # or what follows is refused
    context.verify_mode = ssl.CERT_NONE if way is None else ssl.CERT_REQUIRED
    if way is not None:
        context.check_hostname = True
        context.load_verify_locations(way.authority or requests.utils.DEFAULT_CA_BUNDLE_PATH)
    return context


def _shake_hands(address: str, way: Way, context: ssl.SSLContext) -> bytes:
    with (
        socket.create_connection((address, 443), _HANDSHAKE_TIMEOUT_S) as plain,
        context.wrap_socket(plain, server_hostname=way.domain) as secured,
    ):
        return secured.getpeercert(binary_form=True) or b""


def why_not_ready(address: str, way: Way) -> str | None:
    """None for a node that is ready, whoever signed its certificate; otherwise its own reason. Raises NotTold."""
    disable_warnings(InsecureRequestWarning)  # nothing secret is asked, and the certificate is told beside it
    try:
        answer = open_session(way.domain, verify=False).get(f"https://{in_url(address)}/ready", timeout=_TIMEOUT_S)
    except requests.RequestException as error:
        raise NotTold(f"{address} does not answer over HTTPS ({type(error).__name__})") from error
    if answer.status_code == 200:
        return None
    try:
        reason = answer.json()["reason"]
    except (ValueError, LookupError, TypeError):
        reason = answer.text[:200].strip()
    return f"/ready says {answer.status_code}: {reason}"


def see(address: str, way: Way, path: str, **parameters: str) -> Any:
    """What the node's monitoring says, as JSON. Raises NotTold."""
    session = open_session(way.monitoring, way.authority or True)
    session.auth = (way.user, way.password)
    refusals = {401: f"the monitoring does not take {way.user}'s password", 404: "the node's facts open no monitoring"}
    return _get(session, way.monitoring, f"https://{in_url(address)}{path}", refusals, parameters)


def read_boot(address: str, way: Way) -> dict[str, float | None]:
    """The boot's timeline, in seconds since it began, which the service tells to everybody. Raises NotTold."""
    session = open_session(way.domain, way.authority or True)
    told = _get(session, way.domain, f"https://{in_url(address)}/version", {}, {})
    try:
        return dict(told["boot"])
    except (LookupError, TypeError, ValueError) as error:
        raise NotTold("what the service tells of its boot makes no sense") from error


def _get(session: requests.Session, name: str, url: str, refusals: dict[int, str], parameters: dict[str, str]) -> Any:
    try:
        answer = session.get(url, params=parameters, timeout=_TIMEOUT_S)
        if answer.status_code in refusals:
            raise NotTold(refusals[answer.status_code])
        answer.raise_for_status()
        return answer.json()
    except requests.exceptions.SSLError as error:
        raise NotTold(f"{name} has no valid certificate, so it was told nothing secret") from error
    except requests.RequestException as error:  # a JSONDecodeError is one, too
        raise NotTold(f"{name} does not answer ({type(error).__name__})") from error


def query(address: str, way: Way, expression: str) -> float | None:
    """A single number of the node's Prometheus; None where it has none. Raises NotTold."""
    told = see(address, way, "/prometheus/api/v1/query", query=expression)
    try:
        values = [float(each["value"][1]) for each in told["data"]["result"]]
    except (LookupError, TypeError, ValueError) as error:
        raise NotTold("Prometheus' answer makes no sense") from error
    return values[0] if values and math.isfinite(values[0]) else None


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of every command that asks nodes; a password is none of them, for everybody sees arguments."""
    parser.add_argument("--domain", default="", help="the service's name; Terraform's variable files have it")
    parser.add_argument(
        "--authority",
        type=_file,
        default="",
        metavar="FILE",
        help="PEM of who signed the certificate, if the system does not know",
    )
    parser.add_argument(
        "--monitoring-user",
        default="",
        metavar="NAME",
        help=f"ask the node's monitoring as this user; the password comes from {PASSWORD_VARIABLE}, or is asked for",
    )


def _file(text: str) -> str:
    if text and not Path(text).is_file():  # argparse looks at the default, too
        raise argparse.ArgumentTypeError(f"{text} is no file")
    if text:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(text)
        except OSError as error:
            raise argparse.ArgumentTypeError(f"{text} holds no certificate in PEM that can be read") from error
    return text


def read_way(options: argparse.Namespace, domain: str | None) -> Way | None:
    """The way that the options describe, None without a domain. Raises Refused if a password cannot be had."""
    if not domain:
        return None
    password = os.environ.get(PASSWORD_VARIABLE, "")
    if options.monitoring_user and not password:
        if not sys.stdin.isatty():
            raise Refused(
                f"there is no password for {options.monitoring_user}",
                f"set {PASSWORD_VARIABLE}, or run it in a terminal",
            )
        try:
            password = getpass.getpass(f"password of {options.monitoring_user} at monitoring.{domain}: ")
        except EOFError as error:
            raise Refused(
                "no password was typed",
                f"type it, or set {PASSWORD_VARIABLE}; without --monitoring-user none is needed",
            ) from error
    return Way(domain, options.authority, options.monitoring_user, password)
