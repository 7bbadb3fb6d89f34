"""Every file of the tree is what it seems: data parse and say nothing twice, and what documents name is there."""

import json
import re
import tomllib
from collections.abc import Hashable
from pathlib import PurePosixPath
from typing import Any

import pytest
import yaml

from tests.tree import list_files, read_texts

TEXTS = read_texts()
DOCUMENTS = [name for name in TEXTS if name.endswith(".md")]
YAML = [name for name in TEXTS if name.endswith((".yaml", ".yml", ".yaml.tftpl")) or "/cloud.cfg.d/" in name]
# What documents name by its path and is made on a machine, each beside what makes it.
MADE = {
    ".tofu",  # an ending
    ".venv/bin/python",  # scripts/setup_venv.py
    "chat/completions",  # a path of the API
    "engine/process",  # a module
    "handover.auto.tfvars.json",  # scripts/handover_key.py
    "head.json",  # service/audit.py
    "plan.json",  # whoever wants faults
    "terraform/handover.auto.tfvars.json",
    "terraform/image.auto.tfvars.json",  # scripts/bake/channels.py
    "terraform/prices.auto.tfvars.json",  # scripts/cost.py
    "terraform/terraform.tfstate",  # Terraform
    "terraform/terraform.tfvars",  # whoever launches
    "venv/bin/python",  # on a node, image/provision/stack.sh
}


class _Strict(yaml.SafeLoader):
    """YAML takes the last of two equal names in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        names = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        twice = {name for name in names if names.count(name) > 1}
        assert not twice, f"line {node.start_mark.line + 1}: {twice} twice"
        return super().construct_mapping(node, deep)


def refuse_twins(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object, if it has no name twice."""
    made = dict(pairs)
    assert len(made) == len(pairs), [name for name, _ in pairs]
    return made


@pytest.mark.parametrize("name", YAML)
def test_yaml_parses(name: str) -> None:
    """All of it, without a name twice; a template with something in the place of what is put in."""
    text = re.sub(r"\$\{.*?\}", "x", TEXTS[name]) if name.endswith(".tftpl") else TEXTS[name]
    assert [each for each in yaml.load_all(text, _Strict) if each is not None]


@pytest.mark.parametrize("name", [name for name in TEXTS if name.endswith((".json", "flake.lock"))])
def test_json_parses(name: str) -> None:
    """Without a name twice."""
    json.loads(TEXTS[name], object_pairs_hook=refuse_twins)


@pytest.mark.parametrize("name", [name for name in TEXTS if name.endswith(".toml")])
def test_toml_parses(name: str) -> None:
    """TOML itself refuses names that are there twice."""
    tomllib.loads(TEXTS[name])


def test_a_name_that_is_there_twice_is_found() -> None:
    """The checks above do see it, also beside a merge."""
    assert yaml.load("a: &a {b: 1}\nc: {<<: *a, b: 2}", _Strict)["c"] == {"b": 2}
    with pytest.raises(AssertionError, match="twice"):
        yaml.load("a:\n  b: 1\n  b: 2", _Strict)
    with pytest.raises(AssertionError):
        json.loads('{"a": {"b": 1, "b": 2}}', object_pairs_hook=refuse_twins)


def test_user_data_is_what_cloud_init_takes_for_it() -> None:
    """Its first line decides; with another one cloud-init would do nothing, and not say why."""
    found = [name for name in YAML if name.startswith("cloud-init/")]
    assert found
    for name in found:
        assert TEXTS[name].startswith("#cloud-config\n"), name


def anchors(text: str) -> set[str]:
    """What a document's headings are linked by, as GitHub makes it of them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def find_dead_links(name: str, text: str) -> list[str]:
    """Links of a document to files and headings that are not there. Addresses of others are not looked at."""
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, heading = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        led = (_folder_of(name) / path).as_posix() if path else name
        if led not in list_files() or (heading and heading not in anchors(TEXTS[led])):
            dead.append(target)
    return dead


def _folder_of(document: str) -> PurePosixPath:
    """The folder that a document's links begin at."""
    return PurePosixPath(document).parent


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name: str) -> None:
    """To files and headings that are there."""
    assert find_dead_links(name, TEXTS[name]) == []


def test_dead_links_are_found() -> None:
    """A file, a heading, a heading of this very document."""
    text = "[a](service/README.md) [b](gone.md) [c](ARCHITECTURE.md#boundaries) [d](ARCHITECTURE.md#gone) [e](#gone)"
    assert find_dead_links("README.md", text) == ["gone.md", "ARCHITECTURE.md#gone", "#gone"]


def find_dead_names(name: str, text: str) -> list[str]:
    """Files and folders that a document names as `code` or in a drawing, and that are nowhere in the tree."""
    written = [word for code in re.findall(r"`([^`\n]+)`", text) for word in code.split()]
    for drawing in re.findall(r"^```\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        written += re.findall(r"(?<![\w./*])[\w./-]+\.(?:py|sh|json|yaml|tftpl|hcl|tf)\b", drawing)
    files = list_files()
    folders = {parent.as_posix() for file in files for parent in PurePosixPath(file).parents}
    places = {f"/{place}/" for place in (*folders, *files)}
    dead = []
    for word in written:
        path = word.rstrip(",;:").strip("()").removeprefix("../").rstrip("/")
        # NODE/… is an address, with a name to put in.
        told = re.fullmatch(r"\.?[\w@.-]+(/[\w@.-]+)*", path) and not re.match(r"[A-Z]+/|.*-$", path)
        if not told or not ("/" in path or re.search(r"\.(py|sh|md|json|ya?ml|tf|tofu|hcl|toml|tftpl|txt|in)$", path)):
            continue
        if path not in MADE and not any(place.endswith(f"/{path}/") for place in places):
            dead.append(path)
    return dead


@pytest.mark.parametrize("name", DOCUMENTS)
def test_files_that_are_named_exist(name: str) -> None:
    """Or are made on a machine, and stand above by name."""
    assert find_dead_names(name, TEXTS[name]) == []


def test_names_of_nothing_are_found() -> None:
    """As code and in a drawing; what lies on a node is no file of the tree."""
    text = "`service/app.py` `gone.py` `service/gone/` `/etc/gone.yaml` `python scripts/gone.py`\n"
    text += "```\na → lost.py\n```\n"
    assert find_dead_names("README.md", text) == ["gone.py", "service/gone", "scripts/gone.py", "lost.py"]
