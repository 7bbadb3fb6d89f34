"""Owns who a request comes from: its address as far as proxies are trusted, its key, and whether its scopes suffice."""

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from service.errors import Forbidden, Unauthenticated
from service.keys import SCOPES, KeyFile, Limits
from service.settings import Network

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

# Headers by which proxies make themselves known. A client can forge them, and gains nothing: their presence only ever
# takes a privilege away, and their content counts from the trusted proxies alone.
_PROXY_PREFIX = "HTTP_X_FORWARDED_"
_PROXY_HEADERS = frozenset(
    f"HTTP_{name}"
    for name in (
        *("FORWARDED", "VIA", "X_REAL_IP", "X_CLIENT_IP", "X_CLUSTER_CLIENT_IP", "X_ORIGINAL_FORWARDED_FOR"),
        *("X_ENVOY_EXTERNAL_ADDRESS", "TRUE_CLIENT_IP", "CF_CONNECTING_IP", "FASTLY_CLIENT_IP", "CDN_LOOP"),
    )
)
_LOOPBACK_NAMES = ("localhost", "localhost.localdomain", "ip6-localhost")
_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([a-z0-9.-]+))(?::[0-9]{1,5})?", re.ASCII)
_MOST_HOPS = 32


@dataclass(frozen=True)
class Caller:
    """Who asks: the key's name (``local`` where authentication is off), the client's address, what it may."""

    name: str
    address: str
    scopes: frozenset[str]
    limits: Limits

    @property
    def identity(self) -> str:
        """What the key's requests are counted under."""
        return f"key:{self.name}"

    @property
    def address_identity(self) -> str:
        """What the address's requests are counted under."""
        return identify_address(self.address)


class Access:
    """Tells callers apart; ``keys`` None means that authentication is off, which only loopback may have."""

    def __init__(self, keys: KeyFile | None, trusted_proxies: tuple[Network, ...] = ()):
        self._keys, self._trusted = keys, trusted_proxies

    @property
    def keys(self) -> KeyFile | None:
        return self._keys

    def address(self, environ: Mapping[str, Any]) -> str:
        """The client's address: the last one in X-Forwarded-For that is no trusted proxy's, or the peer's own."""
        peer = _parse_address(environ.get("REMOTE_ADDR") or "")
        if peer is None:
            return "unknown"
        if not self._is_trusted(peer):
            return str(peer)
        client = peer
        for hop in reversed(environ.get("HTTP_X_FORWARDED_FOR", "").split(",")[-_MOST_HOPS:]):
            address = _parse_address(hop.strip())
            if address is None:
                break  # what stands before it was said by nobody who is trusted
            client = address
            if not self._is_trusted(address):
                break
        return str(client)

    def identify(self, environ: Mapping[str, Any], address: str, scope: str) -> Caller:
        """Who asks, from this address, for something that needs this scope.

        Raises Unauthenticated, Forbidden, or KeysUnusable when no key can be checked.
        """
        if self._keys is None:
            if not is_direct(environ):
                raise Unauthenticated(
                    "this service runs without keys, for direct requests from its own machine only; "
                    "behind a proxy it needs LLM_AUTH=keys"
                )
            return Caller("local", address, frozenset(SCOPES), Limits())
        if scope == "metrics" and environ.get("HTTP_AUTHORIZATION") is None and is_direct(environ):
            return Caller("local", address, frozenset({"metrics"}), Limits())
        key = self._keys.authenticate(environ.get("HTTP_AUTHORIZATION"))
        if scope not in key.scopes:
            raise Forbidden(f"the key {key.name} has no scope {scope}")
        return Caller(key.name, address, key.scopes, key.limits)

    def _is_trusted(self, address: Address) -> bool:
        return any(address in network for network in self._trusted)


def is_direct(environ: Mapping[str, Any]) -> bool:
    """Whether a request came from this machine itself, and by no proxy.

    The Host must name loopback too: a page of somebody's whose name was made to point here (DNS rebinding) would
    otherwise pass for a local program. So must the Origin of a browser's request, which has to be this service's own
    page. HTTP/1.0 is what older proxies speak unless told otherwise. A proxy that hides itself altogether cannot be
    told from a local program.
    """
    peer = _parse_address(environ.get("REMOTE_ADDR") or "")
    if peer is None or not peer.is_loopback or environ.get("SERVER_PROTOCOL") == "HTTP/1.0":
        return False
    if any(name in _PROXY_HEADERS or name.startswith(_PROXY_PREFIX) for name in environ):
        return False
    host = environ.get("HTTP_HOST", "").strip().lower()
    parsed = _HOST.fullmatch(host)
    if parsed is None or environ.get("HTTP_SEC_FETCH_SITE", "none") not in ("none", "same-origin"):
        return False
    if environ.get("HTTP_ORIGIN", f"http://{host}").lower() != f"http://{host}":
        return False
    name = parsed[1] or parsed[2]
    address = _parse_address(name)
    return name in _LOOPBACK_NAMES or (address is not None and address.is_loopback)


@lru_cache(maxsize=4096)
def identify_address(address: str) -> str:
    """What address limits count: an IPv4 address, or the /64 of an IPv6 address, which one customer has whole."""
    parsed = _parse_address(address)
    if isinstance(parsed, ipaddress.IPv6Address):
        return f"address:{ipaddress.ip_network((parsed, 64), strict=False)}"
    return f"address:{address}"


@lru_cache(maxsize=4096)
def _parse_address(text: str) -> Address | None:
    if text.startswith("[") and "]" in text:  # some proxies write [address]:port
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    mapped = getattr(address, "ipv4_mapped", None)
    return mapped or address
