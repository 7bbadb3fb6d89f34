"""What watches a node, on a real one: metrics by query, who may see them, the report, and alerts that arrive."""

import json
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hcloud.images import BoundImage
from hcloud.ssh_keys import BoundSSHKey

from scripts.local_cloud.machines.network import tag_of, transfer_addresses
from tests.absent import did_not_run
from tests.image.dashboards import queries
from tests.image.harness import CONTAINERS, DOMAIN, Node, node
from tests.image.registry import make_certificate
from tests.image.scripts import ROOT
from tests.image.webhook import Webhook, running_webhook
from tests.local_cloud.harness import LocalCloud, cut_off

STACK = ROOT / "image" / "rootfs" / "usr" / "share" / "mini-llm" / "stack"
MONITORING = f"monitoring.{DOMAIN}"
CONTRACT = (
    "llm_requests_total",
    "llm_request_duration_seconds_count",
    "llm_inference_duration_seconds_count",
    "llm_tokens_generated_total",
    "llm_model_loaded",
    "llm_cpu_usage_percent",
    "llm_memory_usage_bytes",
)
OTHERS = (
    "traefik_service_requests_total",
    "traefik_tls_certs_not_after",
    "node_memory_MemAvailable_bytes",
    "node_filesystem_avail_bytes",
    "engine_daemon_engine_info",
    "mini_llm_image_baked_timestamp_seconds",
    "prometheus_build_info",
    "alertmanager_build_info",
)
# A tenth of every time in the configuration, so that minutes become seconds, and an hour a minute; what promtool says
# of the times as they are is in alerts_test.yaml.
HASTEN = r"""
import re, sys
for path in sys.argv[1:]:
    text = open(path).read()
    tenth = lambda found: f"{int(found[1]) * {'s': 1, 'm': 60, 'h': 600}[found[2]] * 100}ms"
    open(path, "w").write(re.sub(r"\b(\d+)([smh])\b", tenth, text))
"""
SECRETS = ("/etc/mini-llm/facts.yaml", "/run/mini-llm/keys.json", "/var/lib/cloud/instance/user-data.txt")
CONFIGURATION = (
    "/run/mini-llm-prometheus/prometheus.yaml",
    "/usr/share/mini-llm/stack/prometheus/alerts.yaml",
    "/run/mini-llm-alertmanager/alertmanager.yaml",
)


def wait_for_prometheus(own: Node) -> None:
    """It comes up behind Traefik."""
    asked, own_user = "/prometheus/api/v1/query?query=up", ("-u", f"operator:{own.password}")
    end_s = time.monotonic() + 60
    while (status := own.curl(asked, *own_user, host=MONITORING)[0]) != 200:
        assert time.monotonic() < end_s, status
        time.sleep(0.5)


@pytest.fixture(scope="module")
def watched(served: Node) -> Node:
    """A node that serves, and whose monitoring is there."""
    wait_for_prometheus(served)
    return served


def wait_for_series(own: Node, expression: str, patience_s: float = 60.0) -> None:
    """Until Prometheus has it; a scrape is every 15 s."""
    end_s = time.monotonic() + patience_s
    while not own.query(expression):
        assert time.monotonic() < end_s, expression
        time.sleep(1)


def test_every_metric_is_found_by_query(watched: Node) -> None:
    """The contract's seven, and what the proxy, the host, Docker and the image tell."""
    assert watched.ask("/generate", {"prompt": "What is mini-llm?"})[0] == 200
    for name in (*CONTRACT, *OTHERS):
        wait_for_series(watched, name)
    jobs = ("service", "traefik", "node", "docker", "prometheus", "alertmanager", "grafana")
    wait_for_series(watched, f"count(up == 1) == {len(jobs)}")
    assert {one["metric"]["job"] for one in watched.query("up")} == set(jobs)
    assert {one["metric"]["__name__"] for one in watched.query('{job="grafana"}')} == {
        "process_start_time_seconds",
        "up",
        *(f"scrape_{name}" for name in ("duration_seconds", "samples_scraped", "series_added")),
        "scrape_samples_post_metric_relabeling",
    }


def test_every_panel_has_data(watched: Node) -> None:
    """Each query of each dashboard, asked as Grafana would: after some traffic none is empty."""
    asked = list(queries("1m"))
    assert len(asked) > 50
    empty = asked
    end_s = time.monotonic() + 120
    while empty and time.monotonic() < end_s:
        assert watched.ask("/generate", {"prompt": "What is mini-llm?"})[0] == 200
        assert watched.ask("/generate", {"prompt": ""})[0] == 422
        time.sleep(5)
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda one: watched.query(one.expr), empty))
        empty = [one for one, series in zip(empty, answers, strict=True) if not series]
    assert empty == []


def test_the_monitoring_is_for_who_has_its_password(watched: Node) -> None:
    """The same name shows pages, two APIs and the report; nothing of it can be changed from there."""
    paths = ("/", "/prometheus/api/v1/query?query=up", "/alertmanager/api/v2/status", "/node")
    for path in paths:
        assert watched.curl(path, host=MONITORING)[0] == 401
        assert watched.curl(path, "-u", "operator:wrong", host=MONITORING)[0] == 401
        assert watched.curl(path, "-H", f"Authorization: Bearer {watched.api_key}", host=MONITORING)[0] == 401
        watched.see(path)
        if path != "/":
            own = ("-u", f"operator:{watched.password}", "-X", "POST")
            assert watched.curl(path, *own, host=MONITORING)[0] == 404
    hidden = ("/prometheus/", "/prometheus/metrics", "/prometheus/-/quit", "/alertmanager/-/reload")
    for path in hidden:
        assert watched.curl(path, "-u", f"operator:{watched.password}", host=MONITORING)[0] == 404
    # Grafana would ask Prometheus whatever it is told to there, by any method.
    handed_on = "/api/datasources/uid/prometheus/resources/api/v1/admin/tsdb/delete_series?match[]=up"
    for path in (handed_on, handed_on.replace("resources", "RESOURCES"), "/api/datasources/proxy/uid/prometheus/x"):
        for method in ("GET", "POST"):
            words = ("-g", "-u", f"operator:{watched.password}", "-X", method)
            assert watched.curl(path, *words, host=MONITORING)[0] == 404
    # What a stranger asks costs nothing: neither a password without end, nor headers without end.
    assert watched.curl("/node", "-u", f"operator:{'x' * 1000}", host=MONITORING)[0] == 404
    for host in (DOMAIN, MONITORING):
        assert watched.curl("/version", "--http1.1", "-H", f"X: {'x' * 50_000}", host=host)[0] == 431
    grafana = watched.see("/")
    assert "not Grafana" in grafana["stand_in"]
    assert grafana["authorization"] == ""
    configuration = watched.see("/prometheus/api/v1/status/config")["data"]["yaml"]
    assert "mllm_" not in configuration


def test_the_node_s_report(watched: Node) -> None:
    """What somebody would otherwise log in for, and no secret."""
    watched.see("/prometheus/api/v1/query?query=up")
    report = watched.see("/node")
    assert report["image"]["version"] == "test-1"
    assert report["audit"] == {"findings": []}
    assert report["failed_units"] == []
    assert sorted(report["versions"]["containers"]) == sorted(CONTAINERS)
    assert len(report["versions"]["packages"]) > 100
    assert "the facts are right" in report["logs"]["facts"][-1] + report["logs"]["facts"][-2]
    assert all(report["logs"][name] for name in ("service", "stack", "traefik", "prometheus", "grafana"))
    text = json.dumps(report)
    assert watched.api_key not in text
    assert watched.password not in text
    boot = json.loads(watched.ask("/version")[1])["boot"]
    order = ("userspace_s", "facts_s", "service_s", "model_s")
    assert [boot[name] for name in order] == sorted(boot[name] for name in order)
    assert boot["userspace_s"] == 0  # a container's kernel is its host's
    assert 0 < boot["certificate_s"] < 60
    assert boot["facts_s"] == report["boot"]["facts_s"]


def test_each_container_is_held_where_it_is(watched: Node) -> None:
    """No root, no capability, nothing to write, no socket of Docker, no user-data."""
    for name in CONTAINERS:
        state = json.loads(watched.run(f"docker inspect mini-llm-{name}-1"))[0]
        host = state["HostConfig"]
        assert (host["ReadonlyRootfs"], host["CapDrop"], host["Privileged"]) == (True, ["ALL"], False)
        assert host["SecurityOpt"] == ["no-new-privileges:true"]
        assert "docker.sock" not in json.dumps(state["Mounts"])
        pid, user = state["State"]["Pid"], int(state["Config"]["User"].split(":")[0])
        status = dict(line.split(":\t", 1) for line in watched.run(f"cat /proc/{pid}/status").splitlines())
        assert (status["Uid"].split()[0], status["CapEff"], status["NoNewPrivs"]) == (str(user), "0" * 16, "1")
        ask = "curl -s -m 2 -o /dev/null -w '%{http_code}' http://169.254.169.254/hetzner/v1/userdata || true"
        held = f"setpriv --reuid {user} --regid {user} --clear-groups"
        assert watched.run(f"{held} sh -c {shlex.quote(ask)}").strip() == "000"
        read = f"cat {' '.join(SECRETS)} || true"
        assert watched.run(f"{held} sh -c {shlex.quote(read)} 2>/dev/null") == ""
    for path in SECRETS:  # root has something to read there
        assert watched.run(f"cat {path}")


def test_each_alert_fires_for_its_reason_and_resolves(
    cloud: LocalCloud, image: BoundImage, known: BoundSSHKey, key: Path, tmp_path: Path
) -> None:
    """On a node whose times are a tenth: every one arrives at a webhook, and once more when it is over."""
    groups = yaml.safe_load((STACK / "prometheus" / "alerts.yaml").read_text())["groups"]
    expected = {rule["alert"] for group in groups for rule in group["rules"]}
    host, _ = transfer_addresses(tag_of(cloud.state))
    names = (f"DNS:{DOMAIN}", f"DNS:{MONITORING}")
    for part in ("soon", "late"):
        (tmp_path / part).mkdir()
    soon, soon_key = make_certificate(tmp_path / "soon", *names, days=3)
    late, late_key = make_certificate(tmp_path / "late", *names)
    (tmp_path / "both.pem").write_text(soon.read_text() + late.read_text())
    certificate = {"chain": soon.read_text(), "key": soon_key.read_text()}
    cut_off(cloud)
    try:
        with (
            running_webhook(host) as webhook,
            node(
                cloud.client(),
                image,
                known,
                key,
                more={
                    "alerts": {"webhook": webhook.address, "watchdog": webhook.watchdog},
                    "certificate": certificate,
                },
            ) as made,
        ):
            own = replace(made, authority=tmp_path / "both.pem")
            own.wait_ready()
            own.run(f"python3 -c {shlex.quote(HASTEN)} {' '.join(CONFIGURATION)}")
            own.run("docker restart mini-llm-prometheus-1 mini-llm-alertmanager-1")
            wait_for_prometheus(own)
            wait_for_series(own, 'up{job="service"} == 1')
            _cause_what_the_service_tells(own, webhook)
            own.run(
                f"cd /run/mini-llm-traefik; printf %s {shlex.quote(late.read_text())} > certificate.pem; "
                f"printf %s {shlex.quote(late_key.read_text())} > certificate.key; {_REREAD}"
            )
            _cause_a_service_that_is_gone(own, webhook)
            _cause_a_history_that_cannot_be_written(own, webhook)
            assert webhook.fired == expected
            # The links of each lead its reader to the dashboards.
            start = f"https://{MONITORING}"
            assert len(webhook.links) > 2
            assert {link for link in webhook.links if not link.startswith(start)} == set()
            for link in webhook.links:
                path = link.removeprefix(start) or "/"
                status, page = own.curl(path, "-L", "-u", f"operator:{own.password}", host=MONITORING)
                assert (status, "not Grafana" in page) == (200, True), (link, page)
            _wait_until(lambda: expected - webhook.over, 180)
            left = own.see("/alertmanager/api/v2/alerts")
            assert [alert["labels"]["alertname"] for alert in left] == ["Watchdog"]
            assert webhook.pings >= 5  # every half minute here
    finally:
        cut_off(cloud, "*")


def _cause_what_the_service_tells(own: Node, webhook: Webhook) -> None:
    """A full queue, an engine that is killed and cannot come back, and what can be wrong with the node itself."""
    engine = "-f '[s]ervice.engine.worker'"
    own.run(f"pkill -STOP {engine}")
    with ThreadPoolExecutor(40) as pool:
        asked = [pool.submit(own.ask, "/generate", {"prompt": "Tell me all"}) for _ in range(40)]
        _wait_until(lambda: {"503"} - {str(each.result()[0]) for each in asked if each.done()}, 30)
        own.run(f"pkill -CONT {engine}")
    assert {each.result()[0] for each in asked} == {200, 503}
    # A receiver that refuses what is told: what is left untold is told once it listens again.
    webhook.deaf = True
    wait_for_series(own, "increase(alertmanager_notifications_failed_total[1m]) > 0")
    webhook.deaf = False
    _wait_until(lambda: {"AlertsUntold", "QueueFull"} - webhook.fired, 60)
    # Ended again once a scrape has seen it back: one that ends sooner is one start more to nobody.
    for _ in range(3):
        before = _find_starts(own)
        own.run("systemctl kill -s KILL mini-llm")
        end_s = time.monotonic() + 60
        while not _find_starts(own) - before:
            assert time.monotonic() < end_s, before
            time.sleep(0.2)
    _wait_until(lambda: {"CrashLoop"} - webhook.fired, 60)
    own.wait_ready()  # so that there is an engine to end
    own.run("mv /opt/mini-llm/models /opt/mini-llm/away; pkill -9 -f '[s]ervice.engine.worker'")
    own.run("docker stop mini-llm-node-exporter-1")
    _wait_until(lambda: {"QueueFull", "EngineRestarted", "ModelNotLoaded", "TargetDown"} - webhook.fired, 90)
    # A small disk in the place of one that grows, nearly full.
    own.run("cp -a /var/lib/mini-llm-node /var/lib/node-before; mount -t tmpfs -o size=32m none /var/lib/mini-llm-node")
    own.run("cp -a /var/lib/node-before/. /var/lib/mini-llm-node; fallocate -l 30M /var/lib/mini-llm-node/filler")
    metrics = "/var/lib/mini-llm-node/metrics/image.prom"
    own.run(f"sed -i -e 's/^\\(mini_llm_image_baked.*\\) .*/\\1 1700000000/' -e 's/findings 0/findings 1/' {metrics}")
    own.run("echo 'mini_llm_certificate_delivered{name=\"x\"} 0' > /var/lib/mini-llm-node/metrics/certificate.prom")
    own.run("docker start mini-llm-node-exporter-1")
    told = {"DiskFull", "ImageOld", "ImageUnclean", "CertificateEnds", "CertificateMissing"}
    _wait_until(lambda: told - webhook.fired, 120)
    own.run("mv /opt/mini-llm/away /opt/mini-llm/models; systemctl restart mini-llm")
    own.run("umount -l /var/lib/mini-llm-node; docker restart mini-llm-node-exporter-1")


def _find_starts(own: Node) -> set[str]:
    """When the service began, as Prometheus last saw it; nothing while it is down."""
    return {one["value"][1] for one in own.query('process_start_time_seconds{job="service"}')}


def _cause_a_history_that_cannot_be_written(own: Node, webhook: Webhook) -> None:
    """A small disk under Prometheus, without a byte left; once there is room it goes on."""
    data = "/var/lib/mini-llm-prometheus"
    own.run(
        f"docker stop mini-llm-prometheus-1; cp -a {data} {data}-before; mount -t tmpfs -o size=64m none {data}; "
        f"cp -a {data}-before/. {data}; chown --reference={data}-before {data}; docker start mini-llm-prometheus-1"
    )
    wait_for_prometheus(own)
    wait_for_series(own, 'up{job="prometheus"} == 1')
    own.run(f"cat /dev/zero > {data}/filler || true")
    _wait_until(lambda: {"MonitoringBlind"} - webhook.fired, 90)
    own.run(f"rm {data}/filler")
    _wait_until(lambda: {"MonitoringBlind"} - webhook.over, 120)


# Traefik watches the folder of its routes, and reads the certificate again with them.
_REREAD = "cp -p dynamic/node.yaml again; mv again dynamic/node.yaml"


def _cause_a_service_that_is_gone(own: Node, webhook: Webhook) -> None:
    """Every request fails at the proxy until it is back."""
    own.wait_ready()
    own.run("systemctl stop mini-llm.socket mini-llm.service")
    end_s = time.monotonic() + 90
    while missing := {"ServiceDown", "ErrorRate"} - webhook.fired:
        assert time.monotonic() < end_s, missing
        assert own.ask("/version")[0] == 502
        time.sleep(0.5)
    own.run("systemctl start mini-llm.socket mini-llm.service")
    own.wait_ready()
    # Prometheus is to say so itself: one that is stopped before leaves it to Alertmanager, which waits four minutes.
    _wait_until(lambda: {"ServiceDown"} - webhook.over, 60)


def _wait_until(find_missing: Callable[[], set[str]], patience_s: float) -> None:
    end_s = time.monotonic() + patience_s
    while missing := find_missing():
        assert time.monotonic() < end_s, missing
        time.sleep(0.2)


def test_damaged_data_cost_history_and_nothing_more(
    cloud: LocalCloud, image: BoundImage, known: BoundSSHKey, key: Path
) -> None:
    """Prometheus and Alertmanager, which they keep from starting, start without them; the data are kept aside, once."""
    prometheus, alertmanager = (f"/var/lib/mini-llm-{name}" for name in ("prometheus", "alertmanager"))
    containers = "mini-llm-prometheus-1 mini-llm-alertmanager-1"
    with node(cloud.client(), image, known, key) as own:
        wait_for_prometheus(own)
        own.run(
            f"docker stop {containers}; rm -r {prometheus}/wal; "
            f"echo damaged | tee {prometheus}/wal > {alertmanager}/nflog; docker start {containers}"
        )
        # As its timer does every three minutes.
        own.run("systemctl start mini-llm-mend; sleep 10")
        own_user = ("-u", f"operator:{own.password}")
        assert own.curl("/prometheus/api/v1/query?query=up", *own_user, host=MONITORING)[0] == 502
        own.run("systemctl start mini-llm-mend")
        wait_for_prometheus(own)
        assert own.see("/alertmanager/api/v2/status")["config"]
        aside = f"cat {prometheus}.damaged/wal {alertmanager}.damaged/nflog; stat -c %U {prometheus} {alertmanager}"
        assert own.run(aside).split() == ["damaged", "damaged", "mini-llm-prometheus", "mini-llm-alertmanager"]
        assert own.run("systemctl --failed --no-legend").strip() == ""


def test_the_alerts_times_are_what_they_say(tmp_path: Path) -> None:
    """promtool's own test of the rules as they are in the image."""
    if shutil.which("promtool") is None:
        did_not_run("promtool is not here; as root, make test gets it")
    for words in (
        ["check", "config", "--syntax-only", str(STACK / "prometheus" / "prometheus.yaml")],
        ["check", "rules", str(STACK / "prometheus" / "alerts.yaml")],
        ["test", "rules", str(Path(__file__).with_name("alerts_test.yaml"))],
    ):
        done = subprocess.run(["promtool", *words], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
