"""Owns the public addresses: which one the next primary or floating IP gets."""

from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network

from scripts.local_cloud.api.errors import LimitExceeded
from scripts.local_cloud.store import Store

# The first addresses of a range belong to gateways and to the host.
_FIRST_IPV4 = 10
_FIRST_IPV6 = 1
_DEFAULT_IPV4 = IPv4Network("198.18.0.0/16")
_DEFAULT_IPV6 = IPv6Network("fd00:198:18::/48")
_HOLDERS = ("primary_ip", "floating_ip")
_CURSORS = "address_cursor"
_CURSOR_IDS = {"ipv4": 1, "ipv6": 2}


@dataclass(frozen=True)
class AddressRanges:
    """Where public addresses come from: single IPv4 addresses, and /64 networks out of a larger IPv6 network."""

    ipv4: IPv4Network = _DEFAULT_IPV4
    ipv6: IPv6Network = _DEFAULT_IPV6

    def _count(self, kind: str) -> int:
        return self.ipv4.num_addresses if kind == "ipv4" else 2 ** max(0, 64 - self.ipv6.prefixlen)

    def _render(self, kind: str, index: int) -> str | None:
        if kind == "ipv6":
            return str(IPv6Network((int(self.ipv6.network_address) + (index << 64), 64)))
        address = self.ipv4[index]
        # The first and the last of every /24 are left out: old programs take them for networks and broadcasts.
        return None if int(address) & 0xFF in (0, 0xFF) or address == self.ipv4.broadcast_address else str(address)

    def _walk(self, kind: str, start: int) -> Iterator[tuple[int, str]]:
        first, count = (_FIRST_IPV4 if kind == "ipv4" else _FIRST_IPV6), self._count(kind)
        for offset in range(count - first):
            index = first + (max(first, start) - first + offset) % (count - first)
            if (address := self._render(kind, index)) is not None:
                yield index, address

    def take(self, store: Store, kind: str) -> str:
        """The next free address of a kind; one given back comes again last of all; raises LimitExceeded."""
        with store.transaction():
            used = {each["ip"] for holder in _HOLDERS for each in store.read_all(holder)}
            cursor = store.find(_CURSORS, _CURSOR_IDS[kind]) or {"id": _CURSOR_IDS[kind], "next": 0}
            for index, address in self._walk(kind, cursor["next"]):
                if address not in used:
                    store.put(_CURSORS, {"id": cursor["id"], "next": index + 1})
                    return address
        raise LimitExceeded("primary_ip_limit")
