"""Owns ``make bench-bake``: what a bake takes beside Packer alone, and what is spared when things are there already."""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.bench.image import Figure
from tests.bench.options import make_parser
from tests.image.bakery import Bakery, running_bakery
from tests.image.harness import packer

OVERHEAD_GOAL = 1.15  # of Packer alone, without the probe
SERVICE_GOAL_S = 60.0
NOTHING_GOAL_S = 2.0
_SCRAPE = "the checks wait for Prometheus' next scrape, every 15 s"


def bare(bakery: Bakery, folder: Path) -> float:
    """Packer alone, by hand: the same layers in the same two runs; their snapshots are gone afterwards."""
    folder.mkdir()
    client = bakery.cloud.client()
    given = [f"-var=pins_file={bakery.more[1]}", f"-var=extra_ca_file={bakery.authorities}"]
    template = str(bakery.tree / "image")
    begin_s = time.monotonic()
    packer(folder, bakery.environment, "build", *given, "-var=last_layer=stack", "-var=image_version=bare", template)
    stack = client.images.get_all(type=["snapshot"], sort=["id:desc"])[0]
    words = ["-var=first_layer=service", f"-var=from_image={stack.id}", "-var=image_version=bare-2"]
    packer(folder, bakery.environment, "build", *given, *words, template)
    took_s = time.monotonic() - begin_s
    for each in client.images.get_all(type=["snapshot"]):
        each.delete()
    return took_s


def compare(unproved_s: float, packer_s: float) -> list[Figure]:
    """What a bake without its probe and checks takes beside Packer alone."""
    overhead = unproved_s / packer_s
    goal = f"≤ {OVERHEAD_GOAL}"
    return [
        Figure("Packer alone, the same layers, two runs", f"{packer_s:.1f} s", "", None, ""),
        Figure("the same without the probe, over Packer", f"{overhead:.2f}", goal, overhead <= OVERHEAD_GOAL, "1"),
    ]


def timed(bakery: Bakery, *words: str) -> tuple[float, dict[str, float]]:
    """Seconds of a build as a whole, and of its phases."""
    begin_s = time.monotonic()
    told = bakery.tell("build", *words)
    return time.monotonic() - begin_s, told["times_s"]


def change_service(bakery: Bakery) -> list[Figure]:
    """What a bake takes after a change of the service alone."""
    bakery.change("service/stops.py", "# changed\n")
    took_s, phases_s = timed(bakery)
    floor = f"{phases_s['layer service']:.1f} s Packer; {_SCRAPE}"
    return [Figure("service changed", f"{took_s:.1f} s", f"≤ {SERVICE_GOAL_S:.0f} s", took_s <= SERVICE_GOAL_S, floor)]


def measure(bakery: Bakery, folder: Path, without: list[str]) -> list[Figure]:
    """All figures, one after the other in one cloud; without Packer alone what is compared with it is left out too."""
    packer_s = None if "packer" in without else bare(bakery, folder / "bare")
    first_s, phases_s = timed(bakery, "--promote")
    proof_s = phases_s["probe"] + phases_s["checks"]
    nothing_s, _ = timed(bakery, "--promote")
    changed = [] if "service" in without else change_service(bakery)
    stack_s = None if "stack" in without else timed(bakery, "--again", "service")[0]
    return [
        Figure("nothing there", f"{first_s:.1f} s", "", None, f"{proof_s:.1f} s of it are probe and checks"),
        *([] if packer_s is None else compare(first_s - proof_s, packer_s)),
        *([] if stack_s is None else [Figure("stack there", f"{stack_s:.1f} s", "", None, _SCRAPE)]),
        *changed,
        Figure(
            "nothing changed",
            f"{nothing_s:.2f} s",
            f"≤ {NOTHING_GOAL_S:.0f} s",
            nothing_s <= NOTHING_GOAL_S,
            "starting Python, hashing the tree, one call",
        ),
    ]


def main() -> int:
    """Prints the figures; exit code 1 if a goal was missed."""
    options = make_parser("tests.bench.bake", __doc__, parts=["packer", "stack", "service"]).parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with running_bakery(folder) as bakery:
            try:
                figures = measure(bakery, folder, options.without)
            except subprocess.CalledProcessError as error:
                print(error.stderr, file=sys.stderr)
                raise
    for figure in figures:
        print(figure.line())
    return 1 if any(figure.good is False for figure in figures) else 0


if __name__ == "__main__":
    sys.exit(main())
