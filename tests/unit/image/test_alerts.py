"""Every alert says what it is about, and what watches the node is watched itself."""

from typing import Any

import yaml

from tests.image.scripts import ROOT

STACK = ROOT / "image" / "rootfs" / "usr" / "share" / "mini-llm" / "stack"


def jobs() -> dict[str, Any]:
    """What Prometheus reads, by name."""
    document = yaml.safe_load((STACK / "prometheus" / "prometheus.yaml").read_text())
    return {job["job_name"]: job for job in document["scrape_configs"]}


def test_every_container_is_seen_by_prometheus() -> None:
    """One that ends is then told as TargetDown; the node-exporter's job is called after what it shows."""
    containers = set(yaml.safe_load((STACK / "compose.yaml").read_text())["services"])
    assert set(jobs()) == containers - {"node-exporter"} | {"node", "service", "docker"}
