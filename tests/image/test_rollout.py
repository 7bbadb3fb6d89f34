"""A new node takes the old one's place under load: nothing fails, nothing is cut, and all that is kept goes along."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hcloud.images import BoundImage

from scripts.bake.answers import given
from scripts.handover_key import make_pair
from tests.bench.model import talkative
from tests.image.acme import AcmeServer
from tests.image.harness import DOMAIN, ROOT, disk_of
from tests.image.kept import kept_image
from tests.image.launch import KEYS, Deployment, api_key, apply_with_names, deployment
from tests.image.launch_by_api import ApiDeployment, api_deployment
from tests.image.load import Load, Way
from tests.image.test_image import reachable_acme_server
from tests.local_cloud.harness import LocalCloud, cut_off, make_key, ssh

_STREAM_TOKENS = 40
_PATIENCE = "_GAP_WITHIN_S, _DRAIN_S = 300.0, 60.0"
_SETTINGS = "cd /proc/sys/net; grep -s . ipv4/ip_forward ipv[46]/conf/all/* netfilter/nf_conntrack_tcp_loose || true"
_AS_SERVICE = "cd /opt/mini-llm && env $(cat /etc/mini-llm/service.env) venv/bin/python -m service"


def ways(ipv4: str, ipv6: str) -> dict[str, list[tuple[Way, float]]]:
    """Six clients with streams back to back, one token every 5 s, ten looks a second; half of all on kept HTTP/1.1."""
    kept, new = Way(ipv4, False, True), Way(ipv4, False, False)
    kept_6, new_6 = Way(ipv6, False, True), Way(ipv6, False, False)
    http2, new_http2_6 = Way(ipv4, True, True), Way(ipv6, True, False)
    return {
        "stream": [(kept, 0.0), (kept, 0.0), (kept_6, 0.0), (new, 0.0), (http2, 0.0), (new_6, 0.0)],
        "short": [(new, 5.0)],
        "look": [(kept, 0.4), (kept, 0.4), (new, 0.4), (http2, 1.0), (kept_6, 1.0), (new_6, 1.0), (new_http2_6, 1.0)],
    }


@pytest.fixture(scope="module")
def talkative_image(cloud: LocalCloud, image: BoundImage, tmp_path_factory: pytest.TempPathFactory) -> BoundImage:
    """The same with random weights, which seldom end an answer before they must."""
    cut_off(cloud)  # a bake fetches
    try:
        model = talkative(ROOT / ".cache" / "bench")
        return kept_image(cloud, tmp_path_factory.mktemp("talkative"), "test-2", "talkative", model)
    finally:
        cut_off(cloud, "*")


@contextmanager
def rolled(
    cloud: LocalCloud, image: BoundImage, program: str, folder: Path, **values: Any
) -> Iterator[tuple[Deployment, AcmeServer]]:
    """A deployment with an ordered certificate and a handover key, applied once; ``id_ed25519`` logs in."""
    key = make_key(folder)
    with reachable_acme_server(cloud, folder) as (server, acme):
        root = folder / "root.pem"
        server.write_root(root)
        with deployment(
            folder,
            cloud,
            program,
            root,
            image_id=image.id,
            acme=acme,
            ready_timeout_s=400,
            handover=make_pair(datetime.now(UTC)),
            ssh_public_keys={"test": key.with_suffix(".pub").read_text()},
            **values,
        ) as made:
            apply_with_names(made, server)
            yield made, server


def unlimited(name: str) -> dict[str, Any]:
    """A key that nothing but the machine holds back."""
    return {field: value for field, value in api_key(name).items() if field != "limits"}


@contextmanager
def forgetful(cloud: LocalCloud) -> Iterator[None]:
    """The same cloud, whose firewalls drop what they have not seen begin."""
    before = list(cloud.command)
    try:
        cloud.stop()
        cloud.command.append("--forget-moved-flows")
        cloud.restart()
        yield
    finally:
        cloud.stop()
        cloud.command[:] = before
        cloud.restart()


def orders(server: AcmeServer) -> int:
    """How many certificates were issued."""
    return server.log.read_text().count("Issued certificate serial")


def on_node(made: Deployment | ApiDeployment, command: str) -> str:
    """What a command on the node that serves prints."""
    return ssh(made.folder.parent / "id_ed25519", made.outputs()["node"]["ipv4"], command)


def tokens_counted(made: Deployment | ApiDeployment, name: str) -> int:
    """What the node that serves has on record for a key, over all nodes."""
    query = f"SELECT sum(amount) FROM counters WHERE name LIKE 'tokens/%/key:{name}'"
    lines = ["import sqlite3", "known = sqlite3.connect('/var/lib/mini-llm/counters.sqlite3')"]
    lines.append(f'print(known.execute("{query}").fetchone()[0])')
    return int(on_node(made, "\n".join(["python3 - <<'END'", *lines, "END"])))


def nodes_measured(made: Deployment | ApiDeployment) -> set[str]:
    """Of which nodes the one that serves knows measurements."""
    query = "http://127.0.0.1:9090/api/v1/query?query=group%20by%20(node)(last_over_time(up%7Bjob%3D%22service%22%7D%5B1h%5D))"
    lines = ["import json, urllib.request", f"told = json.load(urllib.request.urlopen('{query}'))"]
    lines.append("print(*(one['metric']['node'] for one in told['data']['result']))")
    return set(on_node(made, "\n".join(["python3 - <<'END'", *lines, "END"])).split())


def wait_for_history(made: Deployment | ApiDeployment, names: set[str]) -> None:
    """Until the node that serves knows what all of these measured; Prometheus looks for new blocks every 5 s."""
    end_s = time.monotonic() + 60
    while (measured := nodes_measured(made)) != names:
        assert time.monotonic() < end_s, (measured, names)
        time.sleep(2)


def verify_audit(made: Deployment | ApiDeployment) -> str:
    """What the service's own look at the logs of all nodes says."""
    return on_node(
        made,
        "cd /opt/mini-llm && venv/bin/python -m service audit verify /var/lib/mini-llm/audit"
        " /var/lib/mini-llm/audit-before/*",
    )


def test_rollouts_under_load(cloud: LocalCloud, talkative_image: BoundImage, program: str, tmp_path: Path) -> None:
    """Three in a row: to other keys; to another place with another key for SSH; with that renamed, back to the first.

    0 failed, 0 cut, no certificate ordered, all counted.
    """
    first_keys, other_keys = [unlimited("alice")], [unlimited("alice"), unlimited("berta")]
    with rolled(cloud, talkative_image, program, tmp_path, api_keys=first_keys) as (made, server):
        told, issued = made.outputs(), orders(server)
        load = Load(DOMAIN, KEYS["alice"], tmp_path / "root.pem")
        settings = on_node(made, _SETTINGS)
        took_s, start_s, names = [], time.monotonic(), {told["node"]["name"]}
        with load.running(_STREAM_TOKENS, ways(told["ipv4_address"], told["ipv6_address"])):
            time.sleep(5)
            for keys in (other_keys, [*other_keys, unlimited("carla")], first_keys):
                more: dict[str, Any] = {}
                if len(names) == 2:
                    (tmp_path / "id_ed25519").unlink()
                    new = make_key(tmp_path).with_suffix(".pub").read_text()
                    more = {"location": "nbg1", "ssh_public_keys": {"test": new}}
                if len(names) == 3:  # the same key under another name, with another comment
                    kind, text, _ = new.split()
                    more = {"ssh_public_keys": {"renamed": f"{kind} {text} me@elsewhere"}}
                begin_s = time.monotonic()
                said = made.apply(api_keys=keys, **more)
                print("\n".join(line for line in said.splitlines() if "serves after" in line or "note:" in line))
                took_s.append(time.monotonic() - begin_s)
                names.add(made.outputs()["node"]["name"])
                if len(names) == 2:
                    on_node(made, f"{_AS_SERVICE} keys revoke berta")
                if len(names) in (2, 3):  # the facts still name it, on this node and on the next
                    assert made.generate(told["ipv4_address"], KEYS["berta"]) == 401
            time.sleep(5)
        print(load.describe())
        load.print_failed(start_s)
        load.print_slow(start_s)
        print("rollouts:", ", ".join(f"{each:.1f} s" for each in took_s))
        logs = "/var/lib/mini-llm/audit/*.jsonl /var/lib/mini-llm/audit-before/*/*.jsonl"
        odd = f"""cat {logs} | grep '"ended"' | grep -v '"outcome":"\\(stop\\|length\\)"' || true"""
        print(on_node(made, odd))
        assert made.changes() == ""
        assert load.failed() == []
        connects = [one.connect_s for one in load.seen if one.connect_s is not None]
        assert max(connects) <= 2.0
        assert orders(server) == issued
        # Nothing of the rollout is left on the node.
        assert on_node(made, "ip -o -4 rule").split("\n")[0].split() == ["0:", "from", "all", "lookup", "local"]
        assert "rollout" not in on_node(made, "ip -o link; nft list tables")  # the node's own table has rules for one
        assert on_node(made, _SETTINGS) == settings
        assert tokens_counted(made, "alice") == sum(one.tokens for one in load.seen)
        said = verify_audit(made)
        print(said)
        assert said.count("chain of") == 4
        assert said.count("begins zeros") == 1
        assert said.count("begins after hash") == 3
        assert "\nwhole" in said
        admitted = int(on_node(made, f"""cat {logs} | grep '"admitted"' | grep -c '"alice"'"""))
        assert admitted == sum(one.kind != "look" for one in load.seen)
        wait_for_history(made, names)


def power_cut(cloud: LocalCloud, node: str) -> None:
    """And power again, at once."""
    given(cloud.client().servers.get_by_name(node)).reset().wait_until_finished()


def test_a_rollout_without_terraform(cloud: LocalCloud, talkative_image: BoundImage, tmp_path: Path) -> None:
    """Two in a row by the same calls through the API, so that rollouts run where Terraform's provider cannot be had.

    The first is from a node that has lost its power since it came.
    """
    key = make_key(tmp_path)
    with reachable_acme_server(cloud, tmp_path) as (server, acme):
        root, place = tmp_path / "root.pem", tmp_path / "api"
        facts = {"acme": acme, "handover": make_pair(datetime.now(UTC)), "api_keys": [unlimited("alice")]}
        public_key = key.with_suffix(".pub").read_text()
        with api_deployment(place, cloud, root, given(talkative_image.id), public_key, **facts) as made:
            told = made.outputs()
            for name in (DOMAIN, f"monitoring.{DOMAIN}"):
                server.point(name, told["ipv4_address"])
            made.roll_out()
            # The next takes over from it all the same.
            power_cut(cloud, made.outputs()["node"]["name"])
            end_s = time.monotonic() + 60
            while made.generate(told["ipv4_address"], KEYS["alice"]) != 200:
                assert time.monotonic() < end_s
                time.sleep(0.2)
            issued, names = orders(server), {made.outputs()["node"]["name"]}
            before = tokens_counted(made, "alice")
            load = Load(DOMAIN, KEYS["alice"], root)
            begin_s = time.monotonic()
            with load.running(_STREAM_TOKENS, ways(told["ipv4_address"], told["ipv6_address"])):
                time.sleep(3)
                for name in ("berta", "carla"):
                    print(made.roll_out(api_keys=[unlimited("alice"), unlimited(name)]).said)
                    names.add(made.outputs()["node"]["name"])
                time.sleep(3)
            print(load.describe())
            load.print_slow(begin_s)
            assert load.failed() == []
            assert max(one.connect_s for one in load.seen if one.connect_s is not None) <= 2.0
            assert len(names) == 3
            assert made.generate(told["ipv4_address"], KEYS["carla"]) == 200
            assert orders(server) == issued
            assert tokens_counted(made, "alice") == before + sum(one.tokens for one in load.seen)
            said = verify_audit(made)
            assert (said.count("begins zeros"), said.count("begins after hash")) == (1, 2), said
            assert "\nwhole" in said
            wait_for_history(made, names)


def test_what_goes_wrong_leaves_the_old_node_serving(
    cloud: LocalCloud, image: BoundImage, program: str, tmp_path: Path
) -> None:
    """Another handover key, a node that is not ready in time, Terraform killed, the old node dead: each apply heals."""
    with rolled(cloud, image, program, tmp_path, api_keys=[api_key("alice")]) as (made, server):
        address, issued = made.outputs()["ipv4_address"], orders(server)

        def serves() -> bool:
            return made.generate(address, KEYS["alice"]) == 200

        good = made.values["handover"]
        made.values["handover"] = make_pair(datetime.now(UTC))
        code, said = made.run("apply", "-auto-approve", "-input=false")
        assert code == 1
        assert "do not have the same handover key" in " ".join(said.split())
        assert "takeover: takeover: failed" in said  # its last log lines
        assert serves()

        made.values |= {"handover": good, "ready_timeout_s": 3}
        code, said = made.run("apply", "-auto-approve", "-input=false")
        assert code == 1
        assert "not within 3 s" in said
        assert serves()
        made.apply(ready_timeout_s=400)
        assert serves()
        assert len(made.node_names()) == 1

        for after_s in (2.0, 6.0, 11.0):
            made.kill(after_s, api_keys=[api_key("alice"), api_key("berta" if after_s != 6.0 else "carla")])
            assert serves()
            made.sweep()
            made.apply()
            assert serves()
            assert len(made.node_names()) == 1
            assert made.changes() == ""

        assert orders(server) == issued
        old = given(cloud.client().servers.get_by_name(made.outputs()["node"]["name"]))
        dying = threading.Timer(4.0, lambda: old.power_off())
        dying.start()
        made.apply(api_keys=[api_key("alice")])
        dying.join()
        assert serves()  # by a certificate that was ordered anew, if the old one had not handed it over yet
        assert len(made.node_names()) == 1


def test_where_the_firewall_drops_moved_flows(
    program: str, cloud: LocalCloud, talkative_image: BoundImage, tmp_path: Path
) -> None:
    """The new node finds it out, and waits for a moment without answers; connections that begin meanwhile wait too."""
    takeover = disk_of(cloud, talkative_image) / "usr/lib/mini-llm/takeover.py"
    text = takeover.read_text()
    assert text.count(_PATIENCE) == 1
    takeover.write_text(text.replace(_PATIENCE, _PATIENCE.replace("300", "20")))  # these clients leave no such moment
    with (
        forgetful(cloud),
        rolled(cloud, talkative_image, program, tmp_path, api_keys=[unlimited("alice")]) as (made, server),
    ):
        told, issued = made.outputs(), orders(server)
        load, start_s = Load(DOMAIN, KEYS["alice"], tmp_path / "root.pem"), time.monotonic()
        with load.running(_STREAM_TOKENS, ways(told["ipv4_address"], told["ipv6_address"])):
            time.sleep(5)
            said = made.apply(api_keys=[unlimited("alice"), unlimited("berta")])
            time.sleep(5)
        print(load.describe())
        load.print_failed(start_s)
        assert "note: the cloud's firewall drops connections that move" in " ".join(said.split())
        assert load.failed() == []
        assert orders(server) == issued
        assert made.changes() == ""
