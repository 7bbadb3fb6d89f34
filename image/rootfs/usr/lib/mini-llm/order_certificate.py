"""Owns the patience with the certificate's order: Traefik orders once, when its configuration changes, and never again.

``python3 order_certificate.py TRAEFIK ACME_JSON ARRIVED NOTE METRICS`` looks whether the certificates of the names in
``TRAEFIK/ordered`` are there, changes something in Traefik's configuration if one is not, ever more rarely, and ends
with 0 once all are. Where ``TRAEFIK/arrival`` says that the file ARRIVED will tell when the addresses lead here, that
begins with it. Into the file NOTE goes when the first of the certificates, the domain's own, was there; into METRICS,
for Prometheus, which are there.
"""

import json
import os
import stat
import sys
import time
from collections.abc import Callable, Iterator
from itertools import chain, repeat
from pathlib import Path

_LARGEST_STORE_BYTES = 4 << 20
# Let's Encrypt lets five orders of a name fail, and one more every twelve minutes (letsencrypt.org/docs/rate-limits).
# Two may have failed when the first pause begins: the one before Traefik's start (first_certificate.py) or as the
# addresses arrive, and Traefik's, which may be waited for even then: as long as it is, no other of the name is begun.
# Where a day was not enough, it is the name's records that are missing, for weeks perhaps; and thousands of failures in
# a row make Let's Encrypt pause a name.
_PAUSES_S = (15, 60, 300, *[900] * 96, 3600)
_AWAITED_S = (*[900] * 96, 3600)
_LOOK_EVERY_S = 1


def pauses_s() -> Iterator[int]:
    """How long to look before each further order."""
    return chain(_PAUSES_S, repeat(_PAUSES_S[-1]))


def is_there(acme: Path, domain: str) -> bool:
    """Whether Traefik's store holds a certificate for a domain."""
    try:
        resolvers = json.loads(_read_bounded(acme)).values()
        certificates = [one for resolver in resolvers for one in (resolver or {}).get("Certificates") or []]
        return any(one["domain"]["main"] == domain for one in certificates)
    except (OSError, ValueError, AttributeError, TypeError, LookupError, RecursionError):  # not there yet, or no store
        return False


def _read_bounded(path: Path) -> bytes:
    """A file of another user's, who may have made anything of it; raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(f"{path} is no file")
        return file.read(_LARGEST_STORE_BYTES)


def order_again(traefik: Path, number: int) -> None:
    """Changes what Traefik watches, in a part that nothing uses."""
    text = json.dumps({"http": {"middlewares": {"again": {"addPrefix": {"prefix": f"/{number}"}}}}})
    folder = traefik / "dynamic"
    unfinished = folder / "again.unfinished"  # of a name that Traefik does not read, until it may
    with os.fdopen(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o640), "w") as file:
        os.fchown(file.fileno(), -1, folder.stat().st_gid)
        file.write(text)
    unfinished.replace(folder / "again.yaml")


def _note(path: Path) -> None:
    unfinished = path.with_suffix(".unfinished")  # whoever reads a time finds it whole
    unfinished.write_text(f"{time.clock_gettime(time.CLOCK_BOOTTIME):.2f}\n")
    unfinished.replace(path)


def render_metrics(names: list[str], missing: list[str]) -> str:
    """The text exposition; of no name, where nothing is ordered."""
    lines = [
        "# HELP mini_llm_certificate_delivered Whether the certificate that is ordered for a name is there.",
        "# TYPE mini_llm_certificate_delivered gauge",
        *(f'mini_llm_certificate_delivered{{name="{name}"}} {int(name not in missing)}' for name in names),
    ]
    return "".join(f"{line}\n" for line in lines)


def _write_whole(path: Path, text: str) -> None:
    unfinished = path.with_suffix(".unfinished")
    try:
        unfinished.write_text(text)
        unfinished.chmod(0o644)
        unfinished.replace(path)
    except OSError as error:  # a full disk must not keep the order from being made
        print(f"{path} cannot be written: {error.strerror}")


def main(
    traefik: Path,
    acme: Path,
    arrived: Path,
    note: Path,
    metrics: Path,
    wait: Callable[[float], None] = time.sleep,
) -> int:
    """Waits, looks, orders again; ends when there is nothing to order or all was delivered."""
    ordered = traefik / "ordered"
    if not ordered.exists():
        print("no certificate is to be ordered")
        _write_whole(metrics, render_metrics([], []))  # an earlier boot's facts may have ordered some
        _note(note)
        return 0
    names = ordered.read_text().split()
    missing, written = list(names), None
    awaited = _is_told_of_arrival(traefik) and not arrived.exists()
    # Seldom before, for a takeover that has failed never tells, and somebody may lead the addresses here all the same.
    pauses = chain(_AWAITED_S, repeat(_AWAITED_S[-1])) if awaited else pauses_s()
    number, rest_s = 0, next(pauses)
    while True:
        for name in [name for name in missing if is_there(acme, name)]:
            print(f"the certificate of {name} is there")
            missing.remove(name)
            if name == names[0]:
                _note(note)
        if missing != written:
            _write_whole(metrics, render_metrics(names, missing))
            written = list(missing)
        if not missing:
            return 0
        if awaited and arrived.exists():
            awaited, pauses, rest_s = False, pauses_s(), 0  # no order before this could succeed
        if rest_s == 0:
            told = ", ".join(missing)
            print(f"no certificate of {told} yet; ordering again (Traefik's log says why the last order failed)")
            number += 1
            order_again(traefik, number)
            rest_s = next(pauses)
        wait(_LOOK_EVERY_S)
        rest_s -= _LOOK_EVERY_S


def _is_told_of_arrival(traefik: Path) -> bool:
    arrival = traefik / "arrival"
    return arrival.exists() and arrival.read_text().strip() == "told"


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # a file's, of which the stubs are not sure
    TRAEFIK, ACME, ARRIVED, NOTE, METRICS = map(Path, sys.argv[1:])
    sys.exit(main(TRAEFIK, ACME, ARRIVED, NOTE, METRICS))
