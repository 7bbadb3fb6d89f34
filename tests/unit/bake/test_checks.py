"""Checks that must not pass because there is nothing to see."""

from typing import Any, cast

import pytest

from scripts.bake import checks
from scripts.bake.checks import Wrong, _check_alerts, prove
from scripts.bake.inputs import Model
from scripts.bake.probe import Probe


class _Node:
    """A node whose monitoring has no rules and no alerts, or which tells of itself what nobody expects."""

    address = "192.0.2.1"

    def __init__(self, rules: int = 0, told: Any = None):
        self._rules, self._told = rules, told

    def as_probe(self) -> Probe:
        """It, in the place of a real one."""
        return cast(Probe, self)

    def wait_ready(self, patience_s: float) -> str:
        return "connection refused"

    def see(self, path: str, **parameters: str) -> Any:
        if path == "/node":
            return self._told
        if path.endswith("/query"):
            return {"data": {"result": [{"value": [0, "1"]}] * self._rules}}
        return [] if path.startswith("/alertmanager") else {"data": {"alerts": []}}


def test_no_alert_says_something_only_where_there_are_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule file that is not found is no error of Prometheus, and nothing would ever fire."""
    monkeypatch.setattr(checks, "_SCRAPE_PATIENCE_S", 0.0)
    _check_alerts(_Node(rules=1).as_probe())
    with pytest.raises(Wrong, match="no rule"):
        _check_alerts(_Node().as_probe())


@pytest.mark.parametrize("told", [[], ["audit"], {"audit": []}, {"audit": {}}, "fine", {"audit": ["x"]}])
def test_a_node_that_tells_nonsense_fails_and_breaks_nothing(told: Any) -> None:
    """The other checks still say what they see."""
    model = Model("starter", "", 1, 2)
    proof = prove(_Node(told=told).as_probe(), model, checks.Path(), "1", 0.0, lambda name: None)
    assert {each.split(":")[0] for each in proof.problems} >= {"ready", "audit"}
    assert (proof.node is None) is not isinstance(told, dict)  # the report is made from it


def test_a_large_model_has_time_to_be_read_and_to_answer() -> None:
    """At 100 MB/s from a fresh disk, and three times slower than 8B answered on two cores, which was 2 s a GB."""
    small, large = (checks.boot_patience_s(Model("m", "", size, 2)) for size in (1, 4_660_000_000))
    assert 46.6 + 3 * 2 * 4.66 <= large - small < 90
