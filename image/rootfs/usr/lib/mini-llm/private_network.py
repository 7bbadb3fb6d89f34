"""Owns the way from the cloud's private networks to the node's filter: whose interfaces lead there, under any name.

``python3 private_network.py METADATA FOLDER`` asks at the URL METADATA which hardware addresses belong to private
networks, at its start and whenever an interface comes, goes or changes. Their interfaces are the set ``private`` of
the node's table; ``FOLDER/private.nft`` makes it again when the table is loaded anew. An interface that nobody has
given an address within some seconds (Hetzner's own images do) gets one by DHCP, from systemd-networkd.
"""

import fcntl
import http.client
import re
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import yaml

_LARGEST_ANSWER_BYTES = 64 << 10
_PATIENCE_S = 2.0
# After a change: which of interface and metadata comes first nobody says.
_PAUSES_S = (1, 2, 4, 8, 16, 32)
_REST_S = 600
_SETTLE_S = 0.3
_OWN_ADDRESS_AFTER_S = 12
_MAC = re.compile(r"([0-9a-f]{2}:){5}[0-9a-f]{2}")
_NAME = re.compile(r"[A-Za-z0-9._-]{1,15}")  # of those that the kernel takes; others would need quotes
_LINKS = 1  # RTMGRP_LINK
_GET_ADDRESS = 0x8915  # SIOCGIFADDR
_PREFIX = "70-mini-llm-"


def read_macs(text: str) -> set[str]:
    """The hardware addresses that the metadata tell; raises ValueError for what is no such list."""
    try:
        macs = {str(one["mac_address"]).lower() for one in yaml.safe_load(text) or ()}
    except (yaml.YAMLError, TypeError, LookupError) as error:
        raise ValueError("the metadata of private networks are no list of them") from error
    if not all(_MAC.fullmatch(mac) for mac in macs):
        raise ValueError("the metadata of private networks have a hardware address that is none")
    return macs


def find_interfaces(devices: Path, macs: set[str]) -> dict[str, str]:
    """The interfaces, in the kernel's list, that have these hardware addresses: name to address."""
    found = {}
    for path in sorted(devices.glob("*/address")):
        try:
            mac = path.read_text().strip().lower()
        except OSError:
            continue  # it has just gone
        if mac in macs and _NAME.fullmatch(path.parent.name):
            found[path.parent.name] = mac
    return found


def render_set(names: Iterable[str]) -> str:
    """What makes the set hold these names and no other."""
    elements = ", ".join(f'"{name}"' for name in names)
    return "flush set inet node private\n" + (f"add element inet node private {{ {elements} }}\n" if elements else "")


def render_network(mac: str) -> str:
    """systemd-networkd's file for an interface: its address and the networks' routes, but no way to everywhere."""
    return (
        f"[Match]\nMACAddress={mac}\n\n"
        "[Network]\nDHCP=ipv4\nIPv6AcceptRA=no\n\n"
        "[DHCPv4]\nUseGateway=no\nUseDNS=no\nUseNTP=no\nUseDomains=no\nUseHostname=no\n"
    )


def has_address(name: str) -> bool:
    """Whether an interface has an IPv4 address."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        try:
            fcntl.ioctl(asking, _GET_ADDRESS, name.encode().ljust(40, b"\0"))
        except OSError:
            return False
    return True


def run(command: list[str]) -> None:
    """Raises SubprocessError."""
    subprocess.run(command, check=True, timeout=30, stdin=subprocess.DEVNULL)


@dataclass
class PrivateNetworks:
    """What filter and networkd were told last."""

    folder: Path
    networkd: Path = Path("/run/systemd/network")
    devices: Path = Path("/sys/class/net")
    run: Callable[[list[str]], None] = run
    has_address: Callable[[str], bool] = has_address
    now_s: Callable[[], float] = time.monotonic
    _told: dict[str, str] | None = None
    _since_s: dict[str, float] = field(default_factory=dict)

    def follow(self, macs: set[str]) -> None:
        """Tells them what the metadata say by now; raises OSError, SubprocessError."""
        found = find_interfaces(self.devices, macs)
        if found != self._told:
            path = self.folder / "private.nft"
            path.write_text(render_set(found))
            self.run(["nft", "-f", str(path)])
            self._told = found
            print(f"interfaces of private networks: {', '.join(found) or 'none'}")
        self._give_addresses(found, macs)

    def _give_addresses(self, found: dict[str, str], macs: set[str]) -> None:
        self._since_s = {name: self._since_s.get(name, self.now_s()) for name in found}
        files = {self.networkd / f"{_PREFIX}{mac.replace(':', '')}.network": mac for mac in macs}
        old = [path for path in self.networkd.glob(f"{_PREFIX}*") if path not in files]
        waiting = {
            mac
            for name, mac in found.items()
            if not self.has_address(name) and self.now_s() - self._since_s[name] >= _OWN_ADDRESS_AFTER_S
        }
        new = [path for path, mac in files.items() if mac in waiting and not path.exists()]
        for path in old:
            path.unlink()
        for path in new:
            path.write_text(render_network(files[path]))
            path.chmod(0o644)
        if old or new:
            # Only for these files: where something else sees to the network, networkd has not run and manages nothing.
            self.run(["systemctl", "reload-or-restart", "systemd-networkd.service"])


def ask(url: str) -> str:
    """The answer's text; raises OSError, HTTPException, ValueError."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=_PATIENCE_S)
    try:
        connection.request("GET", parts.path)
        answer = connection.getresponse()
        if answer.status != http.HTTPStatus.OK:
            raise ValueError(f"the metadata of private networks: status {answer.status}")
        return answer.read(_LARGEST_ANSWER_BYTES).decode()
    finally:
        connection.close()


def wait_for_change(links: socket.socket, patience_s: float) -> bool:
    """Whether an interface came, went or changed in the meantime."""
    if not select.select([links], [], [], patience_s)[0]:
        return False
    time.sleep(_SETTLE_S)  # one change is several messages
    try:
        while links.recv(65536, socket.MSG_DONTWAIT):
            pass
    except OSError:
        pass  # nothing more is there, or more than the kernel could keep: either way there was a change
    return True


def main(url: str, folder: Path) -> None:
    """Looks at each change and some times after it, for ever."""
    networks, pauses_s = PrivateNetworks(folder), iter(_PAUSES_S)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as links:
        links.bind((0, _LINKS))
        while True:
            try:
                networks.follow(read_macs(ask(url)))
            except (OSError, ValueError, http.client.HTTPException, subprocess.SubprocessError) as error:
                print(f"not known which interfaces lead to private networks: {error}")
            if wait_for_change(links, next(pauses_s, _REST_S)):
                pauses_s = iter(_PAUSES_S)


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # a file's, of which the stubs are not sure
    main(sys.argv[1], Path(sys.argv[2]))
