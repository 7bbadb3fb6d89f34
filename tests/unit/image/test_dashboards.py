"""The dashboards are what Grafana's published schema says, and what their readers and each other may count on."""

import copy
import enum
import json
import re
import types
import typing
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from tests.image.dashboards import GRAFANA, dashboards, queries

with warnings.catch_warnings():
    # Grafana would rather have the schema of resources; its provisioning from files takes the classic one as well.
    warnings.simplefilter("ignore", DeprecationWarning)
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.cog.plugins import register_default_plugins
    from grafana_foundation_sdk.cog.runtime import Runtime
    from grafana_foundation_sdk.models import units
    from grafana_foundation_sdk.models.dashboard import Dashboard

DASHBOARDS = dashboards()
DATA_SOURCE = {"type": "prometheus", "uid": "prometheus"}
UNITS = {value for value in vars(units).values() if isinstance(value, str)}


def lost(source: Any, written: Any, place: str = "") -> Iterator[str]:
    """Places of the source that are missing or other in what was written; defaults that were added are none."""
    if isinstance(source, dict) and isinstance(written, dict):
        for name, value in source.items():
            if name not in written:
                yield f"{place}.{name}"
            else:
                yield from lost(value, written[name], f"{place}.{name}")
    elif isinstance(source, list) and isinstance(written, list) and len(source) == len(written):
        for i, (value, other) in enumerate(zip(source, written, strict=True)):
            yield from lost(value, other, f"{place}[{i}]")
    elif type(source) is not type(written) or source != written:
        yield place


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of the type that the schema gives it; an object is looked into by :func:`misfits`."""
    if hint is typing.Any:
        return True
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, argument) for argument in arguments)
    if origin is typing.Literal:
        return value in arguments
    if origin is list:
        return isinstance(value, list) and all(fits(item, arguments[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(fits(item, arguments[1]) for item in value.values())
    if issubclass(hint, enum.Enum):
        return value in [member.value for member in hint]
    if hint in (int, float):
        return isinstance(value, int | hint) and not isinstance(value, bool)
    return isinstance(value, hint)


def misfits(thing: Any, place: str = "") -> Iterator[str]:
    """Places of a parsed dashboard whose values are not of the schema's types: the package does not check them."""
    if isinstance(thing, list):
        for i, item in enumerate(thing):
            yield from misfits(item, f"{place}[{i}]")
    elif hasattr(thing, "to_json"):
        hints = typing.get_type_hints(type(thing))
        for name, value in vars(thing).items():
            if name in hints and not fits(value, hints[name]):
                yield f"{place}.{name}"
            yield from misfits(value, f"{place}.{name}")


def mistakes(dashboard: dict[str, Any]) -> list[str]:
    """Where a dashboard is not as Grafana's schema says."""
    register_default_plugins()
    unknown = [panel["type"] for panel in dashboard["panels"] if Runtime().panelcfg_config(panel["type"]) is None]
    if unknown:
        return [f"panel type {name}" for name in unknown]
    parsed = Dashboard.from_json(copy.deepcopy(dashboard))
    return [*lost(dashboard, json.loads(json.dumps(parsed, cls=JSONEncoder))), *misfits(parsed)]


@pytest.fixture(params=sorted(DASHBOARDS))
def dashboard(request: pytest.FixtureRequest) -> Any:
    """Each dashboard, a copy to change."""
    return copy.deepcopy(DASHBOARDS[request.param])


def test_there_are_four() -> None:
    """With uids that stay, for links from outside, and titles that differ."""
    assert {name: value["uid"] for name, value in DASHBOARDS.items()} == {
        name: f"mini-llm-{name}" for name in ("api", "cost", "model", "system")
    }
    assert len({value["title"] for value in DASHBOARDS.values()}) == 4


def test_a_dashboard_is_what_the_schema_says(dashboard: dict[str, Any]) -> None:
    """Grafana's own types read every field of it, panels' options included, and nothing is lost or of a wrong type."""
    assert mistakes(dashboard) == []
    assert dashboard["schemaVersion"] == Dashboard().schema_version


PANEL, TARGET = ("panels", 0), ("panels", 0, "targets", 0)
GRAPH = ("panels", 6)  # of the dashboard on the API: the first that is no stat


@pytest.mark.parametrize(
    ("path", "name", "value", "place"),
    [
        ((), "refesh", "30s", ".refesh"),
        ((), "refresh", 30, ".refresh"),
        ((), "editable", "false", ".editable"),
        (("time",), "until", "now", ".time.until"),
        (("links", 0), "kind", "dashboards", ".links[0].kind"),
        (("links", 0), "type", "dashboard", ".links[0].type_val"),
        (PANEL, "subtitle", "x", ".panels[0].subtitle"),
        (PANEL, "title", None, ".panels[0].title"),
        (PANEL, "type", "grahp", "panel type grahp"),
        ((*PANEL, "gridPos"), "width", 4, ".panels[0].gridPos.width"),
        ((*PANEL, "gridPos"), "w", "4", ".panels[0].grid_pos.w"),
        (TARGET, "legend", "x", ".panels[0].targets[0].legend"),
        (TARGET, "instant", "yes", ".panels[0].targets[0].instant"),
        (TARGET, "format", "tabel", ".panels[0].targets[0].format_val"),
        ((*PANEL, "fieldConfig", "defaults"), "units", "s", ".panels[0].fieldConfig.defaults.units"),
        ((*PANEL, "fieldConfig", "defaults", "color"), "mode", "fix", ".panels[0].field_config.defaults.color.mode"),
        ((*PANEL, "options"), "graphMode", "lines", ".panels[0].options.graph_mode"),
        ((*PANEL, "options"), "showLegend", True, ".panels[0].options.showLegend"),
        ((*GRAPH, "options", "legend"), "calc", [], ".panels[6].options.legend.calc"),
        ((*GRAPH, "options", "legend"), "calcs", "max", ".panels[6].options.legend.calcs"),
        ((*GRAPH, "options", "tooltip"), "mode", "every", ".panels[6].options.tooltip.mode"),
        ((*GRAPH, "fieldConfig", "defaults", "custom"), "drawStlye", "bars", "custom.drawStlye"),
        ((*GRAPH, "fieldConfig", "defaults", "custom"), "drawStyle", "bar", "custom.draw_style"),
    ],
)
def test_what_the_schema_does_not_have_is_found(path: tuple[str | int, ...], name: str, value: Any, place: str) -> None:
    """Misspelt names and wrong values, at every depth: the test above would see them."""
    dashboard = copy.deepcopy(DASHBOARDS["api"])
    dashboard["panels"][0].setdefault("options", {})
    thing: Any = dashboard
    for step in path:
        thing = thing[step]
    thing[name] = value
    assert [found for found in mistakes(dashboard) if found.endswith(place)]


def test_panels_tell_and_fit(dashboard: dict[str, Any]) -> None:
    """Each has a number, a title and a description of its own, a known unit, and a place on the grid to itself."""
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert len({panel["title"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        assert len(panel["description"]) > 20, panel["title"]
        unit = panel["fieldConfig"]["defaults"]["unit"]
        assert unit in UNITS or unit.startswith("suffix:"), panel["title"]
        at = panel["gridPos"]
        assert at["x"] >= 0, panel["title"]
        assert at["x"] + at["w"] <= 24, panel["title"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells
    assert len(taken) == 24 * (1 + max(y for _, y in taken)), "there is a hole"


def test_panels_ask_the_one_data_source(dashboard: dict[str, Any]) -> None:
    """The one that is provisioned; and queries of a panel have names of their own."""
    [source] = yaml.safe_load((GRAFANA / "provisioning" / "datasources" / "prometheus.yaml").read_text())["datasources"]
    assert {name: source[name] for name in DATA_SOURCE} == DATA_SOURCE
    for panel in dashboard["panels"]:
        assert panel["datasource"] == DATA_SOURCE
        assert [target["datasource"] for target in panel["targets"]] == [DATA_SOURCE] * len(panel["targets"])
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"]) > 0


def test_a_stat_tells_one_value(dashboard: dict[str, Any]) -> None:
    """After a rollout the node before is there, too, as far as the range goes back: no node's series stands alone."""
    for panel in dashboard["panels"]:
        for target in panel["targets"] if panel["type"] == "stat" else ():
            outermost = re.sub(
                r"\b(sum|max|min|avg)( by \([a-z]+\))? ?\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)", "", target["expr"]
            )
            assert not re.search(r"(llm|node|mini_llm|traefik|engine_daemon)_\w+", outermost), target["expr"]


def test_dashboards_lead_to_each_other(dashboard: dict[str, Any]) -> None:
    """By the tag they share; nobody changes them in the browser."""
    [link] = dashboard["links"]
    assert (link["type"], link["tags"]) == ("dashboards", dashboard["tags"]) == ("dashboards", ["mini-llm"])
    assert (dashboard["editable"], dashboard["refresh"]) == (False, "30s")
    [provider] = yaml.safe_load((GRAFANA / "provisioning" / "dashboards" / "mini-llm.yaml").read_text())["providers"]
    assert (provider["disableDeletion"], provider["allowUiUpdates"]) == (True, False)


def test_queries_are_whole() -> None:
    """Every query comes out, with nothing left that only Grafana understands."""
    found = list(queries("1m"))
    assert len(found) == sum(len(panel["targets"]) for board in DASHBOARDS.values() for panel in board["panels"])
    assert not [query for query in found if "$" in query.expr]
    assert any("[1m]" in query.expr for query in found)
