"""Owns the reading of the image's dashboards: what they are, and every query that they make."""

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from tests.image.scripts import ROOT

GRAFANA = ROOT / "image" / "rootfs" / "usr" / "share" / "mini-llm" / "stack" / "grafana"


class Query(NamedTuple):
    """One query of one panel, as Prometheus takes it."""

    dashboard: str
    panel: str
    expr: str


def dashboards() -> dict[str, Any]:
    """Every dashboard by its file's name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted((GRAFANA / "dashboards").glob("*.json"))}


def queries(rate_interval: str) -> Iterator[Query]:
    """Every query of every dashboard; what Grafana would put in for its own intervals is ``rate_interval``."""
    for name, dashboard in dashboards().items():
        for panel in dashboard["panels"]:
            for target in panel["targets"]:
                expr = re.sub(r"\$__(rate_interval|range)\b", rate_interval, target["expr"])
                yield Query(name, panel["title"], expr)
