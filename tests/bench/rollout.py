"""Owns ``make bench-rollout``: how long a rollout takes from its first call until the old node is gone, and what of it.

Each is made by the calls that Terraform makes, so that every part of it can be told apart; Terraform's own look at what
is there comes on top. On the local cloud a server is created in a second from a snapshot that is not copied; Hetzner
copies it.
"""

import json
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from scripts.bake.answers import given
from scripts.handover_key import make_pair
from scripts.local_cloud.machines.network import tag_of, transfer_addresses
from tests.bench.model import talkative
from tests.bench.options import make_parser
from tests.image.acme import running_acme_server
from tests.image.harness import DOMAIN, ROOT
from tests.image.kept import kept_image
from tests.image.launch import KEYS, api_key
from tests.image.launch_by_api import ApiDeployment, Rollout, api_deployment
from tests.image.load import Load, Way
from tests.local_cloud.harness import make_key, running_cloud

_TOKENS = 150  # of each answer in flight
_KEY = {name: value for name, value in api_key("alice").items() if name != "limits"}


def boot_s(made: ApiDeployment) -> dict[str, float]:
    """The serving node's timeline, in seconds after power-on: ``service`` begins, ``model`` is ready to generate."""
    address = made.outputs()["ipv4_address"]
    words = ["curl", "-s", "--cacert", str(made.authority), "--resolve", f"{DOMAIN}:443:{address}"]
    words += ["-H", f"Authorization: Bearer {KEYS['alice']}", f"https://{DOMAIN}/version"]
    told = json.loads(subprocess.run(words, capture_output=True, text=True, timeout=30, check=True).stdout)["boot"]
    return {"service": told["service_s"], "model": told["model_s"]}


def lines(without: Rollout, loaded: Rollout, boots: list[dict[str, float]], answers_s: float) -> list[str]:
    """The report: each part in both rollouts, and what it cannot be shorter than."""
    rows: list[tuple[str, float, float, str]] = [
        ("create the server", without.created_s, loaded.created_s, "the cloud's own work"),
        (
            "boot, take over, prove",
            without.proved_s,
            loaded.proved_s,
            "power-on to a loaded model, and the loading: "
            + " and ".join(f"{each['model']:.1f} s, {each['model'] - each['service']:.1f} s" for each in boots),
        ),
        ("move both addresses", without.moved_s, loaded.moved_s, "two actions of the cloud"),
        (
            "drain, prove by name",
            without.drained_s,
            loaded.drained_s,
            f"{answers_s:.1f} s until the last answer's end; then log and history come over",
        ),
        ("shut down, delete", without.gone_s, loaded.gone_s, "systemd's stop, the cloud's own work"),
    ]
    told = [f"  {'part':24} {'idle':>8} {'answering':>10}  what it cannot be shorter than"]
    for name, idle_s, busy_s, floor in rows:
        told.append(f"  {name:24} {idle_s:6.1f} s {busy_s:8.1f} s  {floor}")
    floor_s = [boots[0]["model"], boots[1]["model"] + answers_s]
    ratios = [without.total_s / floor_s[0], loaded.total_s / floor_s[1]]
    told.append(
        f"  {'all of it':24} {without.total_s:6.1f} s {loaded.total_s:8.1f} s  "
        f"boot (and drain): {ratios[0]:.1f} and {ratios[1]:.1f} times that"
    )
    return told


def main() -> int:
    """Measures both; exit code 1 if a request failed, which would make the times worthless."""
    make_parser("tests.bench.rollout", __doc__).parse_args()
    with tempfile.TemporaryDirectory() as name, ExitStack() as ends:
        folder = Path(name)
        arguments = ("--old-clients", "--requests-per-hour", "100000")
        cloud = ends.enter_context(running_cloud(folder, *arguments))
        model = talkative(ROOT / ".cache" / "bench")
        image = kept_image(cloud, folder, "test-2", "talkative", model)
        host, _ = transfer_addresses(tag_of(cloud.state))
        server = ends.enter_context(running_acme_server(folder, host))
        root, key = folder / "root.pem", make_key(folder)
        server.write_root(root)
        facts: dict[str, Any] = {
            "acme": {"email": "a@example.org", "server": server.directory, "authority": server.authority.read_text()},
            "handover": make_pair(datetime.now(UTC)),
            "api_keys": [_KEY],
        }
        made = ends.enter_context(
            api_deployment(folder, cloud, root, given(image.id), key.with_suffix(".pub").read_text(), **facts)
        )
        address = made.outputs()["ipv4_address"]
        for each in (DOMAIN, f"monitoring.{DOMAIN}"):
            server.point(each, address)
        made.roll_out()

        without = made.roll_out()
        boots = [boot_s(made)]
        load, new = Load(DOMAIN, KEYS["alice"], root), Way(address, False, False)
        with load.running(_TOKENS, {"stream": [(new, 0.0), (new, 0.0)]}):
            time.sleep(2)
            loaded = made.roll_out()
        boots.append(boot_s(made))
    moved_s = loaded.moved_at_s
    answers_s = max((one.began_s + one.took_s - moved_s for one in load.seen if one.began_s < moved_s), default=0.0)
    print("\n".join(lines(without, loaded, boots, max(0.0, answers_s))))
    print(load.describe())
    return 1 if load.failed() else 0


if __name__ == "__main__":
    sys.exit(main())
