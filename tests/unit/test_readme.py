"""What the README states of the catalogue, the API and the settings is what the code does."""

import re
from pathlib import Path

from service.models import load_catalogue
from service.schema import TokenBounds, parse_generate
from service.settings import Settings
from tests.conftest import TIERS

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def rows(heading: str) -> list[list[str]]:
    """Cells of the table whose first heading this is."""
    lines = README[README.index(f"| {heading} |") :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_catalogue_table_is_the_catalogue() -> None:
    """Every model that can be served stands in the README with its size and memory, and no other."""
    table = {name.strip("`"): (size, memory) for name, size, memory in rows("name")}
    loadable = {name: entry for name, entry in load_catalogue().items() if entry.unloadable is None}
    assert table == {
        name: (f"{entry.size_bytes / 1e9:.2f} GB", f"{entry.ram_gb:g} GB") for name, entry in loadable.items()
    }


def test_fields_and_defaults_are_those_of_the_schema() -> None:
    """Each field of the table is taken, with the default that it shows."""
    table = {field.strip("`"): default for field, default, _ in rows("field")}
    assert set(table) == {
        *("prompt", "system", "max_tokens", "temperature", "top_p", "top_k", "min_p", "repeat_penalty", "stop"),
        "stream",
    }
    sampling = parse_generate({"prompt": "x"}, TokenBounds(256, 4096)).sampling
    for field in ("temperature", "top_p", "top_k", "min_p", "repeat_penalty"):
        assert float(table[field]) == getattr(sampling, field), field
    assert table["max_tokens"].startswith(f"{Settings.default_max_tokens},")


def test_every_make_target_named_exists() -> None:
    """Commands in the README are targets of the Makefile."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"make ([a-z-]+)", README))
    assert named
    assert named <= targets


def test_every_setting_named_exists() -> None:
    """LLM_* variables in the README are settings."""
    for variable in re.findall(r"LLM_([A-Z_]+)", README):
        assert variable.lower() in Settings.__dataclass_fields__, variable


def test_tiers_are_those_that_a_run_tells() -> None:
    """In the same order, with the same needs."""
    assert [(tier, needs) for tier, _, needs in rows("tier")] == [(tier, needs) for tier, (needs, _) in TIERS.items()]
