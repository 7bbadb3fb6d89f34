"""What the containers are told of the facts."""

import json
import re
from typing import Any

import yaml

from service.settings import Settings
from tests.image.scripts import ROOT, load_script

stack = load_script("rootfs/usr/lib/mini-llm/stack.py")
handover = load_script("rootfs/usr/lib/mini-llm/handover.py")
UNITS = ROOT / "image" / "rootfs" / "etc" / "systemd" / "system"
STACK = ROOT / "image" / "rootfs" / "usr" / "share" / "mini-llm" / "stack"
FACTS: dict[str, Any] = {
    "domain": "llm.example.org",
    "acme": {"email": "a@example.org"},
    "monitoring": {"user": "operator", "password_hash": "$apr1$x$y"},
    "alerts": {
        "webhook": "https://hooks.example.org/x",
        "mail": {"to": "a@b.org", "from": "b@b.org", "smarthost": "b.org:587", "username": "u", "password": "p"},
    },
}


def routes(facts: dict[str, Any] | None) -> dict[str, Any]:
    """Traefik's dynamic configuration."""
    return dict(json.loads(stack.traefik_files(facts)["dynamic/node.yaml"])["http"])


def test_the_monitoring_is_open_to_its_password_alone() -> None:
    """Every one of its routers asks for it, and only Grafana takes more than reading."""
    opened = {name: router for name, router in routes(FACTS)["routers"].items() if "monitoring." in router["rule"]}
    assert sorted(opened) == ["alertmanager", "grafana", "graph", "prometheus", "report"]
    for name, router in opened.items():
        assert "operator" in router["middlewares"], name
        assert router["tls"] == {"certResolver": "acme"}
        assert ("(Method(`GET`) || Method(`HEAD`))" in router["rule"]) == (name not in ("grafana", "graph"))
    asked = routes(FACTS)["middlewares"]["operator"]["basicAuth"]
    assert (asked["users"], asked["removeHeader"]) == (["operator:$apr1$x$y"], True)


def test_without_a_password_there_is_no_monitoring_to_reach() -> None:
    """Nor is a certificate ordered for its name."""
    closed = {name: value for name, value in FACTS.items() if name != "monitoring"}
    assert "monitoring." not in json.dumps(routes(closed))
    assert stack.traefik_files(closed)["ordered"] == "llm.example.org\n"
    assert stack.traefik_files(FACTS)["ordered"] == "llm.example.org\nmonitoring.llm.example.org\n"


def test_whether_the_addresses_lead_here_already_is_told() -> None:
    """To who orders certificates: elsewhere an order would fail until they do, and only a takeover says when."""
    plain = {name: value for name, value in FACTS.items() if name not in ("addresses", "handover")}
    floating = {**plain, "addresses": {"ipv4": "203.0.113.5"}}
    assert "arrival" not in stack.traefik_files(plain)
    assert stack.traefik_files(floating)["arrival"] == "untold\n"
    assert stack.traefik_files({**floating, "handover": {}})["arrival"] == "told\n"


def test_a_rollout_asks_past_the_service() -> None:
    """Where a key was given for it, before all that the service answers; nowhere else."""
    told = routes({**FACTS, "proof": {"sha256": "0" * 64, "expires": "2027-01-31T12:00:00Z"}})
    router = told["routers"]["rollout"]
    assert router["rule"] == "Host(`llm.example.org`) && Path(`/rollout`)"
    assert router["priority"] > max(len(other["rule"]) for other in told["routers"].values())
    assert told["services"]["rollout"]["loadBalancer"]["servers"] == [{"url": f"http://{stack.ROLLOUT}"}]
    assert "rollout" not in routes(FACTS)["routers"]
    # Each question is a process, of which there are four at a time: nobody has more than one, with all of a network.
    limits = [told["middlewares"][name] for name in router["middlewares"] if name != "hardened"]
    assert [list(limit) for limit in limits] == [["rateLimit"], ["inFlightReq"]]
    for limit in limits:
        [settings] = limit.values()
        assert settings["sourceCriterion"] == {"ipStrategy": {"ipv6Subnet": 64}}


def test_what_is_measured_names_its_node() -> None:
    """All of it, and nothing else of the image's configuration changes."""
    image = yaml.safe_load((STACK / "prometheus" / "prometheus.yaml").read_text())
    told = json.loads(stack.prometheus_file(image, "node-1"))
    for job in told["scrape_configs"]:
        for each in job["static_configs"]:
            assert each.pop("labels") == {"node": "node-1"}
    assert told == image


def test_alerts_go_where_the_facts_say() -> None:
    """To a webhook, by mail over TLS, to both, or to nobody."""
    [receiver] = json.loads(stack.alertmanager_file(FACTS))["receivers"]
    assert receiver["webhook_configs"] == [{"url": "https://hooks.example.org/x", "send_resolved": True}]
    [mail] = receiver["email_configs"]
    assert (mail["auth_username"], mail["auth_password"], mail["require_tls"]) == ("u", "p", True)
    assert json.loads(stack.alertmanager_file({"domain": "x"}))["receivers"] == [{"name": "operator"}]


def test_a_watchdog_is_posted_to_as_long_as_all_is_well() -> None:
    """Alone, by an alert that always fires; without one there is no such alert, for nobody would want to hear of it."""
    watched = {**FACTS, "alerts": {"webhook": "https://a.org/", "watchdog": "https://b.org/"}}
    [group] = json.loads(stack.prometheus_rules(watched))["groups"]
    [rule] = group["rules"]
    document = json.loads(stack.alertmanager_file(watched))
    [route] = document["route"]["routes"]
    assert route["matchers"] == [f'alertname="{rule["alert"]}"']
    operator, watchdog = document["receivers"]
    assert operator["webhook_configs"] == [{"url": "https://a.org/", "send_resolved": True}]
    assert (watchdog["name"], watchdog["webhook_configs"]) == (
        route["receiver"],
        [{"url": "https://b.org/", "send_resolved": False}],
    )
    for without in (FACTS, None):
        assert json.loads(stack.prometheus_rules(without)) == {"groups": []}
        assert "routes" not in json.loads(stack.alertmanager_file(without))["route"]


def test_each_container_can_do_as_little_as_it_needs() -> None:
    """No root, no capability, nothing to write but its own, no socket of Docker, no image that is not in the store."""
    document = yaml.safe_load((STACK / "compose.yaml").read_text())
    pins = json.loads((ROOT / "image" / "pins.json").read_text())["images"]
    assert sorted(document["services"]) == sorted(pins)
    for name, container in document["services"].items():
        assert container["image"] == f"mini-llm/{name}:baked"
        assert (container["pull_policy"], container["read_only"], container["cap_drop"]) == ("never", True, ["ALL"])
        assert container["security_opt"] == ["no-new-privileges:true"]
        assert 801 <= int(container["user"].split(":")[0]) <= 805
        assert container["mem_limit"]
        for volume in container["volumes"]:
            parts: list[str] = volume.split(":")
            source, _, mode = parts if len(parts) > 2 else [*parts, ""]
            assert source.startswith(("/run/mini-llm-", "/var/lib/mini-llm-", "/usr/share/mini-llm/stack/"))
            assert mode == "ro" or source == f"/var/lib/mini-llm-{name}"


def test_all_but_traefik_listen_on_loopback() -> None:
    """They are on the host's network, where a filter in front of them would be the only one."""
    document = yaml.safe_load((STACK / "compose.yaml").read_text())["services"]
    for name in ("prometheus", "alertmanager", "node-exporter"):
        [listening] = [word for word in document[name]["command"] if word.startswith("--web.listen-address=")]
        assert listening.startswith("--web.listen-address=127.0.0.1:")
    assert document["grafana"]["environment"]["GF_SERVER_HTTP_ADDR"] == "127.0.0.1"
    jobs = yaml.safe_load((STACK / "prometheus" / "prometheus.yaml").read_text())["scrape_configs"]
    targets = [target for job in jobs for group in job["static_configs"] for target in group["targets"]]
    assert all(target.startswith("127.0.0.1:") for target in targets)


def test_units_listen_where_their_askers_ask() -> None:
    """A unit's file cannot read Python's numbers, and they not it."""
    listens = {"mini-llm": stack.SERVICE, "mini-llm-report": stack.REPORT, "mini-llm-rollout": stack.ROLLOUT}
    for unit, address in listens.items():
        assert f"\nListenStream={address}\n" in (UNITS / f"{unit}.socket").read_text()
    scraped = yaml.safe_load((STACK / "prometheus" / "prometheus.yaml").read_text())["scrape_configs"]
    targets = {job["job_name"]: job["static_configs"][0]["targets"] for job in scraped}
    assert (targets["service"], targets["traefik"]) == ([stack.SERVICE], [stack.TRAEFIK])


def test_nobody_stops_before_the_longest_answer_has_ended() -> None:
    """The service drains, then its unit waits as long as Traefik's container does, and the container's unit longer."""
    assert Settings().drain_limit_s < stack.LONGEST_ANSWER_S
    assert f"\nTimeoutStopSec={stack.LONGEST_ANSWER_S}\n" in (UNITS / "mini-llm.service").read_text()
    services = yaml.safe_load((STACK / "compose.yaml").read_text())["services"]
    assert services["traefik"]["stop_grace_period"] == f"{stack.LONGEST_ANSWER_S}s"
    found = re.search(r"\nTimeoutStopSec=(\d+)\n", (UNITS / "mini-llm-stack.service").read_text())
    assert found
    assert stack.LONGEST_ANSWER_S < int(found[1]) < handover._STOP_TIMEOUT_S
