"""Owns ``make bench-cloud``: how long the local cloud's servers take from the call to SSH, and its snapshots."""

import statistics
import sys
import tempfile
import time
from pathlib import Path

from hcloud.images import Image
from hcloud.server_types import ServerType
from hcloud.servers import BoundServer

from tests.bench.options import make_parser
from tests.local_cloud.harness import address_of, make_key, running_cloud, ssh, wait_until_off

ROUNDS = 5
SMALL, DEBIAN = ServerType(name="cx23"), Image(name="debian-13")
GOALS_S = {"create to SSH": 5.0, "power-off and snapshot": 3.0, "snapshot to SSH": 5.0}


def main() -> int:
    rounds = make_parser("tests.bench.cloud", __doc__, rounds=ROUNDS).parse_args().rounds
    seen: dict[str, list[float]] = {name: [] for name in GOALS_S}
    with tempfile.TemporaryDirectory() as folder, running_cloud(Path(folder)) as cloud:
        client, key = cloud.client(), make_key(Path(folder))
        known = client.ssh_keys.create("bench", key.with_suffix(".pub").read_text())

        def boot(image: Image) -> tuple[float, BoundServer]:
            begun_s = time.monotonic()
            made = client.servers.create("bench", SMALL, image, ssh_keys=[known])
            ssh(key, address_of(made.server), "true")
            return time.monotonic() - begun_s, made.server

        for _ in range(rounds):
            took_s, server = boot(DEBIAN)
            seen["create to SSH"].append(took_s)
            begun_s = time.monotonic()
            server.shutdown().wait_until_finished()
            wait_until_off(client, server)
            made = server.create_image("bench")
            made.action.wait_until_finished()
            seen["power-off and snapshot"].append(time.monotonic() - begun_s)
            server.delete().wait_until_finished()
            took_s, server = boot(made.image)
            seen["snapshot to SSH"].append(took_s)
            server.delete().wait_until_finished()
            made.image.delete()
    good = True
    for name, times_s in seen.items():
        median_s = statistics.median(times_s)
        good &= median_s <= GOALS_S[name]
        mark = "good" if median_s <= GOALS_S[name] else "MISSED"
        span = f"({min(times_s):.1f} to {max(times_s):.1f})"
        print(f"  {name:24} {median_s:.1f} s {span}   ≤ {GOALS_S[name]:.0f} s   {mark}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
