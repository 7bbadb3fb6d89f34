"""Owns an ACME server for tests: Debian's Pebble, and the DNS that it asks, both on an address that servers reach."""

import json
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import requests

from tests.image.registry import make_certificate
from tests.ports import free_port

_START_TIMEOUT_S = 20.0


@dataclass(frozen=True)
class AcmeServer:
    """One that runs: its directory, the PEM file that it is trusted by, and where its log lies."""

    directory: str
    authority: Path
    log: Path
    _dns: str
    _management: str

    def point(self, name: str, address: str) -> None:
        """From now on the name has this address and no other, in the eyes of the ACME server."""
        for call, more in (("clear-a", {}), ("add-a", {"addresses": [address]})):
            body = {"host": f"{name}.", **more}
            requests.post(f"{self._dns}/{call}", json=body, timeout=10).raise_for_status()

    def write_root(self, path: Path) -> None:
        """The certificate that what it issues is trusted by."""
        answer = requests.get(f"{self._management}/roots/0", verify=str(self.authority), timeout=10)
        answer.raise_for_status()
        path.write_text(answer.text)


@contextmanager
def running_acme_server(
    folder: Path, host: str, name_server: str | None = None, validity_s: int = 157_766_400
) -> Iterator[AcmeServer]:
    """An ACME server that validates at ports 80 and 443; gone afterwards, and all that it knew.

    It finds addresses by a name server, or where ``point`` says. Its certificates are good for five years, or as told.
    """
    chain, key = make_certificate(folder, f"IP:{host}")
    acme, management, dns, dns_management = (free_port() for _ in range(4))
    config = {
        "listenAddress": f"{host}:{acme}",
        "managementListenAddress": f"{host}:{management}",
        "certificate": str(chain),
        "privateKey": str(key),
        "httpPort": 80,
        "tlsPort": 443,
        "ocspResponderURL": "",
        "externalAccountBindingRequired": False,
        "certificateValidityPeriod": validity_s,
    }
    (folder / "pebble.json").write_text(json.dumps({"pebble": config}))
    # Pebble waits and refuses at random, to train its clients; here that would only be chance.
    environment = {**os.environ, "PEBBLE_VA_NOSLEEP": "1", "PEBBLE_WFE_NONCEREJECT": "0"}
    none = ["-http01", "", "-https01", "", "-tlsalpn01", "", "-defaultIPv6", "", "-defaultIPv4", ""]
    commands = {
        "dns": ["pebble-challtestsrv", *none, "-dns01", f"{host}:{dns}", "-management", f"127.0.0.1:{dns_management}"],
        "pebble": ["pebble", "-config", str(folder / "pebble.json"), "-dnsserver", name_server or f"{host}:{dns}"],
    }
    with ExitStack() as ends:
        for name, command in commands.items():
            log = ends.enter_context((folder / f"{name}.log").open("wb"))
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
            ends.callback(process.wait, 10)
            ends.callback(process.terminate)
        directory = f"https://{host}:{acme}/dir"
        end_s = time.monotonic() + _START_TIMEOUT_S
        while True:
            try:
                requests.get(directory, verify=str(chain), timeout=5).raise_for_status()
                break
            except requests.ConnectionError:
                assert time.monotonic() < end_s, (folder / "pebble.log").read_text()
                time.sleep(0.1)
        log_path = folder / "pebble.log"
        yield AcmeServer(
            directory, chain, log_path, f"http://127.0.0.1:{dns_management}", f"https://{host}:{management}"
        )
