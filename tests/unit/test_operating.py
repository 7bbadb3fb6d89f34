"""The operator's page has a line for each alert, and names commands that exist."""

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "OPERATING.md").read_text()
RULES = ROOT / "image/rootfs/usr/share/mini-llm/stack/prometheus/alerts.yaml"


def test_every_alert_has_what_to_do() -> None:
    """In the order of the rules; and no line for an alert that is gone."""
    groups = yaml.safe_load(RULES.read_text())["groups"]
    alerts = [rule["alert"] for group in groups for rule in group["rules"] if "alert" in rule]
    told = re.findall(r"^\| ([A-Z]\w+) \|", PAGE, re.MULTILINE)
    assert told == [name for name in alerts if name != "Watchdog"]


def test_commands_exist() -> None:
    """Targets of the Makefile, scripts, variables of Terraform."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"make ([a-z-]+)", PAGE)) <= targets
    for script in re.findall(r"scripts/\w+\.py", PAGE):
        assert (ROOT / script).is_file(), script
    declared = (ROOT / "terraform" / "variables.tf").read_text()
    for name in ("api_keys", "monitoring", "certificate", "ssh_public_keys", "alerts", "server_type"):
        assert f"`{name}`" in PAGE or f"`{name}." in PAGE, name
        assert f'variable "{name}"' in declared
