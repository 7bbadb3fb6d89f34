"""Owns ``make bench-image``: how long a node takes to its first token, beside the usual way, and where it goes."""

import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from hcloud import Client
from hcloud.images import BoundImage
from hcloud.ssh_keys import BoundSSHKey

from scripts.local_cloud.machines.network import tag_of, transfer_addresses
from tests.bench.by_hand import usual_way
from tests.bench.model import billion
from tests.bench.options import make_parser
from tests.image.acme import running_acme_server
from tests.image.harness import DOMAIN, ROOT, Node, bake, node, stand_in_registry
from tests.image.kept import kept_image
from tests.local_cloud.harness import LocalCloud, cut_off, make_key, running_cloud, wait_until_off

ROUNDS, FRESH_ROUNDS = 5, 3
PATIENCE_S = 60.0
POWER_ON_GOAL_S = 3.0  # with the certificate at hand
ORDER_GOAL_S = 6.0  # with a certificate that is ordered at Pebble
RATIO_GOAL = 20.0
STARTER = ROOT / "service" / "starter" / "starter.gguf"
# What of the image starts at boot and is not Docker; bash, root's shell, spells it out.
OWN_UNITS = (
    "mini-llm.socket mini-llm.service "
    "mini-llm-{facts,model,stack,monitoring,first-certificate,certificate,boot,private-network}.service"
)


@dataclass(frozen=True)
class Figure:
    """One line of the report; ``good`` is None where no goal was set."""

    what: str
    value: str
    goal: str
    good: bool | None
    floor: str

    def line(self) -> str:
        mark = {None: "", True: "good", False: "MISSED"}[self.good]
        return f"  {self.what:39} {self.value:23} {self.goal:7} {mark:7} {self.floor}".rstrip()


@dataclass(frozen=True)
class Bench:
    """What all measurements need."""

    cloud: LocalCloud
    client: Client
    known: BoundSSHKey
    key: Path


def seconds(what: str, times_s: list[float], floor: str, goal_s: float | None = None) -> Figure:
    """A figure of times: their median, and from the smallest to the largest."""
    median_s = statistics.median(times_s)
    value = f"{median_s:.1f} s ({min(times_s):.1f} to {max(times_s):.1f})"
    if goal_s is None:
        return Figure(what, value, "", None, floor)
    return Figure(what, value, f"≤ {goal_s:.0f} s", median_s <= goal_s, floor)


def wait_listening(address: str, port: int, begun_s: float) -> None:
    """Returns once somebody listens there, to within some hundredths of a second.

    Asked from here: a program for each question, ten times a second, would take a part of the processors that boot the
    node.
    """
    while True:
        try:
            socket.create_connection((address, port), timeout=0.1).close()
            return
        except OSError:
            assert time.monotonic() - begun_s < PATIENCE_S, "nobody listens after a minute"
            time.sleep(0.02)


def first_token_s(own: Node, begun_s: float) -> float:
    """Seconds until the whole of a one-token answer is there."""
    wait_listening(own.address, 443, begun_s)
    while own.ask("/generate", {"prompt": "What is mini-llm?", "max_tokens": 1}, None, "--max-time", "30")[0] != 200:
        assert time.monotonic() - begun_s < PATIENCE_S, "no token after a minute"
        time.sleep(0.02)
    return time.monotonic() - begun_s


def any_answer_s(own: Node, begun_s: float) -> float:
    """Seconds until a web server answers at port 80, whatever it says."""
    wait_listening(own.address, 80, begun_s)
    while own.curl("/", "--max-time", "5", scheme="http")[0] == 0:
        assert time.monotonic() - begun_s < PATIENCE_S, "no answer after a minute"
        time.sleep(0.02)
    return time.monotonic() - begun_s


def power_on_s(
    bench: Bench, own: Node, rounds: int, until_s: Callable[[Node, float], float], before: Callable[[], object]
) -> list[float]:
    """Seconds from the call that powers on, round after round; ``before`` runs while the node is off."""
    times_s = []
    for _ in range(rounds):
        own.server.power_off().wait_until_finished()
        wait_until_off(bench.client, own.server)
        before()
        begun_s = time.monotonic()
        own.server.power_on()
        times_s.append(until_s(own, begun_s))
    return times_s


def created_s(bench: Bench, image: BoundImage, rounds: int) -> list[float]:
    """Seconds from the call that creates a node, its certificate among its facts."""
    times_s = []
    for _ in range(rounds):
        begun_s = time.monotonic()
        with node(bench.client, image, bench.known, bench.key) as own:
            times_s.append(first_token_s(own, begun_s))
    return times_s


def ordered_s(bench: Bench, image: BoundImage, folder: Path, rounds: int) -> tuple[list[float], int]:
    """The same with a certificate that each node orders, verified by Pebble's root; and how many orders failed."""
    host, _ = transfer_addresses(tag_of(bench.cloud.state))
    times_s = []
    with running_acme_server(folder, host) as server:
        root = folder / "root.pem"
        server.write_root(root)
        acme = {"email": "a@example.org", "server": server.directory, "authority": server.authority.read_text()}
        for _ in range(rounds):
            begun_s = time.monotonic()
            with node(bench.client, image, bench.known, bench.key, acme=acme) as own:
                for name in (DOMAIN, f"monitoring.{DOMAIN}"):
                    server.point(name, own.address)  # long before the order: the node is just booting
                times_s.append(first_token_s(replace(own, authority=root), begun_s))
        return times_s, server.log.read_text().count("set INVALID")


def by_hand_s(bench: Bench, folder: Path) -> dict[str, float]:
    """Seconds of each step of the usual way, with the same container images and the same ACME server."""
    host, _ = transfer_addresses(tag_of(bench.cloud.state))
    (folder / "acme").mkdir()
    with (
        stand_in_registry(bench.cloud, folder) as (pins_file, authorities),
        running_acme_server(folder / "acme", host) as acme,
    ):
        return usual_way(bench.client, bench.known, bench.key, STARTER, acme, pins_file, authorities)


def forget(*files: Path) -> None:
    """Drops files from the page cache of this host, and nothing else from it."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())  # what is not on the disk yet would stay
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_s(path: Path) -> float:
    """Seconds to read a file once, from front to back."""
    begun_s, buffer = time.monotonic(), bytearray(1 << 20)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return time.monotonic() - begun_s


def measure_starter(bench: Bench, image: BoundImage, rounds: int) -> tuple[list[Figure], str]:
    """Power-on of one node, the floor under it, and the critical chain of its last boot."""
    with node(bench.client, image, bench.known, bench.key) as own:
        own.wait_ready()
        times_s = power_on_s(bench, own, rounds, first_token_s, lambda: None)
        own.run("systemctl is-system-running --wait || true")  # before that there is no chain
        chain = own.run("systemd-analyze critical-chain --no-pager mini-llm-stack.service mini-llm.service")
        # The same disk with nothing of ours at boot; the smallest web server at hand is Traefik without a word to say.
        own.run(
            f"systemctl disable --quiet {OWN_UNITS}; rm -r /etc/systemd/system/docker.service.d; "
            "docker rm -f $(docker ps -aq); "
            "docker run -d --restart always --network host mini-llm/traefik:baked --entrypoints.web.address=:80; sync"
        )
        floor_s = power_on_s(bench, own, min(FRESH_ROUNDS, rounds), any_answer_s, lambda: None)
    floor = f"{statistics.median(floor_s):.1f} s until an idle Traefik in Docker answers"
    return [seconds("power-on to first token", times_s, floor, POWER_ON_GOAL_S)], chain


def measure_large(bench: Bench, image: BoundImage, name: str, rounds: int) -> list[Figure]:
    """Power-on with a model of real shape, in the page cache and not in it, beside the reading of its bytes.

    A fresh node has hashed the file once; at later starts it is known by its stamp.
    """
    figures = []
    with node(bench.client, image, bench.known, bench.key) as own:
        own.wait_ready()
        pool = bench.cloud.state / "pool.img"  # what the servers' disks lie in has pages of its own
        model = bench.cloud.state / "pool" / "servers" / str(own.server.id) / "opt/mini-llm/models" / name
        size_mb, floors_s = model.stat().st_size / 1e6, []

        def make_cold() -> None:
            forget(model, pool)
            floors_s.append(read_s(model))
            forget(model, pool)

        for state, before in (("cold", make_cold), ("warm", lambda: floors_s.append(read_s(model)))):
            floors_s.clear()
            times_s = power_on_s(bench, own, rounds, first_token_s, before)
            # The engine may have kept some of it by now, so this is no more than a hint at what the first one computed.
            asked_s = statistics.median(first_token_s(own, time.monotonic()) for _ in range(rounds))
            floor_s = statistics.median(floors_s)
            floor = f"{floor_s:.1f} s to read it at {size_mb / floor_s:.0f} MB/s, {asked_s:.1f} s when asked again"
            figures.append(seconds(f"power-on to first token, {size_mb:.0f} MB {state}", times_s, floor))
    return figures


def main() -> int:
    options = make_parser("tests.bench.image", __doc__, rounds=ROUNDS, parts=["large"]).parse_args()
    fresh_rounds = min(FRESH_ROUNDS, options.rounds)
    with ExitStack() as ends:
        folder = Path(ends.enter_context(tempfile.TemporaryDirectory()))
        for name in ("starter", "large", "acme", "by-hand"):
            (folder / name).mkdir()
        arguments = ("--old-clients", "--requests-per-hour", "100000")
        cloud = ends.enter_context(running_cloud(folder, *arguments))
        client, key = cloud.client(), make_key(folder)
        bench = Bench(cloud, client, client.ssh_keys.create("bench", key.with_suffix(".pub").read_text()), key)

        image = kept_image(cloud, folder / "starter", "test-1", "starter")
        if with_large := "large" not in options.without:
            file = billion(ROOT / ".cache" / "bench")
            large = bake(cloud, folder / "large", image_version="bench-large", model="random-1b", model_file=str(file))
        steps_s = by_hand_s(bench, folder / "by-hand")
        told = ", ".join(f"{name} {took_s:.1f}" for name, took_s in steps_s.items())
        print(f"  the usual way, in seconds: {told}", flush=True)
        order_s, failed = ordered_s(bench, image, folder / "acme", fresh_rounds)

        cut_off(cloud, "*")  # from here on nobody reaches the outside
        create_s = created_s(bench, image, fresh_rounds)
        starter, chain = measure_starter(bench, image, options.rounds)
        figures = [
            *starter,
            seconds("create to first token", create_s, "a first boot: identity, keys, cloud-init anew"),
            seconds(
                "create to first token, order at Pebble",
                order_s,
                f"{statistics.median(create_s):.1f} s without an order; {failed} orders failed",
                ORDER_GOAL_S,
            ),
            *(measure_large(bench, large, file.name, fresh_rounds) if with_large else []),
        ]
        usual_s = sum(steps_s.values())
        ratio = usual_s / statistics.median(order_s)
        figures.append(
            Figure(
                "the usual way / create, order at Pebble",
                f"{ratio:.0f} x",
                f"≥ {RATIO_GOAL:.0f} x",
                ratio >= RATIO_GOAL,
                f"{usual_s:.0f} s by the usual way, order too; from a mirror and a registry next door",
            )
        )
    print(f"{chain}\n  {'figure':39} {'median (span)':23} {'goal':15} floor, physical limit")
    print("\n".join(figure.line() for figure in figures))
    return 0 if all(figure.good is not False for figure in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
