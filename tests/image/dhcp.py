"""Owns a DHCP server for tests: ``python3 dhcp.py INTERFACE SERVER OFFERED RANGE`` answers one client until it ends.

It says what Hetzner's says to members of a private network: an address of its own (/32), the gateway, which is the
server itself, and the network behind it.
"""

import ipaddress
import socket
import struct
import sys
from collections.abc import Iterator

_COOKIE = b"\x63\x82\x53\x63"
_KIND, _SERVER, _LEASE, _MASK, _ROUTES = 53, 54, 51, 1, 121
_ANSWERS = {1: 2, 3: 5}  # discover: offer, request: acknowledgement


def _options(data: bytes) -> Iterator[tuple[int, bytes]]:
    place = 0
    while place < len(data) and data[place] != 255:
        if data[place] == 0:
            place += 1
            continue
        length = data[place + 1]
        yield data[place], data[place + 2 : place + 2 + length]
        place += 2 + length


def answer(asked: bytes, server: str, offered: str, behind: str) -> bytes | None:
    """The answer to a datagram, or None."""
    if asked[236:240] != _COOKIE or (kind := dict(_options(asked[240:])).get(_KIND, b"\0")[0]) not in _ANSWERS:
        return None
    own, network = socket.inet_aton(server), ipaddress.ip_network(behind)
    length = (network.prefixlen + 7) // 8
    routes = b"\x20" + own + bytes(4) + bytes([network.prefixlen]) + network.network_address.packed[:length] + own
    options = {
        _KIND: bytes([_ANSWERS[kind]]),
        _SERVER: own,
        _LEASE: struct.pack("!I", 3600),
        _MASK: b"\xff" * 4,
        _ROUTES: routes,
    }
    head = b"\x02" + asked[1:3] + b"\0" + asked[4:12] + bytes(4) + socket.inet_aton(offered) + own + bytes(4)
    body = b"".join(bytes([number, len(value)]) + value for number, value in options.items())
    return head + asked[28:44] + bytes(192) + _COOKIE + body + b"\xff"


def main(interface: str, server: str, offered: str, behind: str) -> None:
    """Answers to all who can hear, for the client has no address yet."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, interface.encode())
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        listening.bind(("", 67))
        print("listening", flush=True)
        while True:
            told = answer(listening.recv(4096), server, offered, behind)
            if told is not None:
                listening.sendto(told, ("255.255.255.255", 68))


if __name__ == "__main__":
    main(*sys.argv[1:])
