"""Cost: every resource of the deployment by the price list, and tokens beside what others take for them."""

import json
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from scripts import cost
from scripts.bake.answers import given
from scripts.bake.cloud import Cloud
from scripts.bake.errors import Refused
from scripts.bake.prices import Price
from scripts.bake.snapshots import Snapshot
from scripts.cost import Use, count_up, lines, look, main, measure, read_hosted
from scripts.deployment import read_deployment
from scripts.node import NotTold, Way
from tests.unit.local_cloud.conftest import Cloud as LocalCloud

WAY = Way("llm.example.org", user="operator", password="p")
SILENT = Use(None, None, None, 24.0, "it was not asked")
FOUND: dict[str, float | None] = {cost._SPEED: 8.0, cost._GENERATED: 4000.0, cost._PROMPT: 1000.0}


def options(folder: Path, *words: str) -> Any:
    return cost._parse(["--folder", str(folder), *words])


def test_what_a_month_costs(cloud: Cloud, two_nodes: Snapshot, tmp_path: Path) -> None:
    """Two servers with their addresses, the floating one, the product's snapshots; nothing of another deployment."""
    told = look(options(tmp_path), cloud, lambda *words: SILENT)
    rows = {(row.what, row.name): row.price for row in told.rows}
    assert [name for what, name in rows if what.startswith("server")] == ["mini-llm-a", "mini-llm-b"]
    assert sum(1 for what, _ in rows if what == "primary ipv4") == 2
    assert sum(1 for what, _ in rows if what == "floating ipv4") == 1
    snapshots = [price for (what, _), price in rows.items() if what == "snapshot 1.25 GB"]
    assert [price.net_eur for price in snapshots if price] == [pytest.approx(1.25 * 0.014)] * 2
    # The servers, their IPv4 addresses, the floating one, the snapshots.
    assert told.total.net_eur == pytest.approx(2 * 5.49 + 2 * 0.5 + 3 + 2 * 1.25 * 0.014)
    assert told.total.gross_eur == pytest.approx(told.total.net_eur * 1.19)
    text = "\n".join(lines(told))
    assert "the node did not tell its tokens: it was not asked" in text
    assert "unknown" in text


def test_what_tokens_cost(cloud: Cloud, two_nodes: Snapshot) -> None:
    """At full use by the speed, of the last day by what it cost; a node that is younger is counted by its hours."""
    found, types, pricing = read_deployment(cloud, "mini-llm"), cloud.server_types(), cloud.pricing()
    told = count_up(found, types, pricing, Use(10.0, 36_000.0, 9_000.0, 12.0, None), 1.0)
    month_eur = told.total.net_eur
    assert told.eur_per_1000_tokens_full_use == pytest.approx(month_eur / (10 * 3600 * 730) * 1000)
    assert told.eur_per_1000_tokens_last_day == pytest.approx(month_eur / 730 * 12 / 36)
    assert (told.prompt_per_generated, told.prompt_share_is_measured) == (0.25, True)
    assumed = count_up(found, types, pricing, Use(None, 0.0, 0.0, 12.0, None), 3.0)
    assert (assumed.prompt_per_generated, assumed.prompt_share_is_measured) == (3.0, False)
    assert assumed.eur_per_1000_tokens_full_use is None
    assert assumed.eur_per_1000_tokens_last_day is None
    with pytest.raises(Refused, match="in USD"):
        count_up(found, types, {**pricing, "currency": "USD"}, SILENT, 1.0)


def test_hosted_models_are_priced_in_euros(tmp_path: Path) -> None:
    """Output and the prompts that led to it, cheapest first."""
    models = [
        {"provider": "a", "model": "x", "currency": "USD", "input_per_million": 1.2, "output_per_million": 2.4},
        {"provider": "b", "model": "y", "currency": "EUR", "input_per_million": 0.1, "output_per_million": 0.2},
    ]
    path = tmp_path / "prices.json"
    known = {"date": "2026-01-01", "source": "https://example.org"}
    path.write_text(json.dumps({"exchange": {"usd_per_eur": 1.2}, "models": [{**each, **known} for each in models]}))
    told, exchange = read_hosted(0.5, path)
    assert [each.provider for each in told] == ["b", "a"]
    assert [each.eur_per_1000_tokens for each in told] == pytest.approx([0.00025, 0.0025])
    assert exchange["usd_per_eur"] == 1.2


def test_every_hosted_price_says_where_and_when_it_was_seen() -> None:
    """In the one file that has them; at least four, and none is from the future."""
    told = json.loads(cost._HOSTED.read_text())
    assert "date" in told["about"]
    assert len(told["models"]) >= 4
    assert len({(each["provider"], each["model"]) for each in told["models"]}) == len(told["models"])
    for each in (*told["models"], told["exchange"]):
        assert each["source"].startswith("https://")
        assert date.fromisoformat(each["date"]) <= datetime.now(UTC).date()
    for each in told["models"]:
        assert 0 < each["input_per_million"] <= each["output_per_million"] < 10
        assert each["currency"] in ("USD", "EUR")


def test_the_node_is_asked_for_its_tokens(cloud: Cloud, two_nodes: Snapshot, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that holds the address; a silent one is a reason, not an end."""
    found = read_deployment(cloud, "mini-llm")
    node = cost.choose_node(found)
    assert node is not None
    assert node.name == "mini-llm-a"
    monkeypatch.setattr(cost, "query", lambda address, way, expression: FOUND[expression])
    created = given(node.created)
    now = created + timedelta(hours=6)
    assert measure(node, WAY, now) == Use(8.0, 4000.0, 1000.0, 6.0, None)
    assert measure(node, WAY, created + timedelta(days=9)).hours == 24.0

    def silent(*words: object) -> float:
        raise NotTold("the monitoring does not answer (ConnectTimeout)")

    monkeypatch.setattr(cost, "query", silent)
    assert measure(node, WAY, now).silence == "the monitoring does not answer (ConnectTimeout)"
    assert "--monitoring-user" in (measure(node, None, now).silence or "")
    assert measure(None, WAY, datetime.now(UTC)).silence == "there is no node"


def test_the_metrics_have_the_services_names() -> None:
    """The names are the service's contract."""
    metrics = (cost.ROOT / "service" / "metrics.py").read_text()
    for name in ("llm_tokens_generated_total", "llm_prompt_tokens_total", "llm_inference_duration_seconds"):
        assert f'"{name}"' in metrics
        assert name in cost._SPEED + cost._PROMPT


def test_terraform_is_told_the_prices(cloud: Cloud, two_nodes: Snapshot, tmp_path: Path) -> None:
    """As a file of variables that it reads by itself."""
    look(options(tmp_path, "--terraform"), cloud, lambda *words: SILENT)
    told = json.loads((tmp_path / "prices.auto.tfvars.json").read_text())["monthly_prices_eur"]
    assert told["servers"]["cx23"]["fsn1"] == 5.49
    assert told["primary_ipv4"]["fsn1"] == 0.5
    assert (told["floating_ipv4"]["fsn1"], told["floating_ipv6"]["hel1"]) == (3.0, 1.0)
    declared = (cost.ROOT / "terraform" / "cost.tf").read_text()
    assert all(f"{name} " in declared for name in told)


def test_exit_codes(
    cloud: Cloud,
    local: LocalCloud,
    make_snapshot: Callable[..., Snapshot],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Counted, a price that is missing, wrong usage, a cloud that cannot be asked."""
    image = make_snapshot()
    labels = {"product": "mini-llm", "deployment": "mini-llm"}
    local.make_server("node", image=str(image.id), labels=labels)
    monkeypatch.setattr(cost, "find_access", lambda: None)
    monkeypatch.setattr(cost, "Cloud", lambda access: cloud)
    words = ["--folder", str(tmp_path), "--tokens-per-s", "12.5", "--json"]
    assert main(words) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["use"]["tokens_per_s"] == 12.5
    assert told["eur_per_1000_tokens_full_use"] > 0
    monkeypatch.setattr(cost, "price_of_server", lambda *words: None)
    assert main(words[:2]) == 3
    assert "no price for node" in capsys.readouterr().err
    for wrong in (["--tokens-per-s", "0"], ["--folder", "/none"]):
        with pytest.raises(SystemExit) as ended:
            main(wrong)
        assert ended.value.code == 2
    monkeypatch.undo()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("HCLOUD_TOKEN", raising=False)
    assert main(["--folder", str(tmp_path)]) == 3
    assert "there is no token" in capsys.readouterr().err


def test_a_price_is_counted_by_pieces() -> None:
    """Net and gross alike."""
    assert Price(1.0, 1.19).times(2) == Price(2.0, 2.38)
