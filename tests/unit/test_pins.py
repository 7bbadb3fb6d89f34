"""Every pin has one home; wherever else a version is told, it is the pinned one, and why is said here."""

import json
import re
import tomllib
from collections import defaultdict
from typing import Any

import pytest

from scripts.setup_venv import OLDEST_PYTHON
from tests import programs
from tests.programs import Program
from tests.tree import read_texts

TEXTS = read_texts()
PINS: dict[str, Any] = json.loads(TEXTS["image/pins.json"])
LOCKS = [name for name in TEXTS if name.endswith("requirements.txt") and name.replace(".txt", ".in") in TEXTS]
WANTED = [name.replace(".txt", ".in") for name in LOCKS]
PROGRAMS = [each for each in vars(programs).values() if isinstance(each, Program)]

# Without what a program writes, the versions of all things in it.
_BY_PROGRAMS = ("go.mod", "go.sum", "flake.lock", ".terraform.lock.hcl")
WRITTEN = {name: TEXTS[name] for name in TEXTS if name not in LOCKS and not name.endswith(_BY_PROGRAMS)}

# Where a version may be told beside its home, and why. That it is the pinned one is checked in all of them.
TOLD = {
    "ARCHITECTURE.md": "a decision was made with it",
    "README.md": "it is what was tried and measured",
    "image/real-machine.md": "it is what was tried",
    "scripts/local_cloud/__main__.py": "an option is for that version alone",
    "service/engine/gguf.py": "what is refused was found in that version",
    "service/engine/gpt4all_adapter.py": "the layout in memory is of that version",
    "service/models.json": "what cannot be loaded was tried with that version",
    "service/starter/text/documentation.md": "the starter model was trained to say so",
    "service/starter/text/operations.toml": "the starter model was trained to say so",
    "tests/bench/usual_way/requirements.txt": "it is copied to a server alone; a test below holds it to the locks",
    "tests/programs/__init__.py": "a module's version may be written in another way; a test below holds it to go.mod",
}


def found(pattern: str, text: str) -> str:
    """What a pattern's group finds, once."""
    [told] = re.findall(pattern, text, re.MULTILINE)
    return str(told)


def locked(name: str) -> dict[str, set[str]]:
    """Packages of a lock, each with its versions: another Python may need another one."""
    versions = defaultdict(set)
    for package, version in re.findall(r"^([\w.-]+)==([^ ;\\\n]+)", TEXTS[name], re.MULTILINE):
        versions[package.lower().replace("_", "-")].add(version)
    return dict(versions)


def pinned_by_hand() -> dict[str, tuple[str, str]]:
    """Names in the words of people, each with its version and its home."""
    pins = {name: (pin["version"].lstrip("v"), "image/pins.json") for name, pin in PINS["images"].items()}
    provider = found(r'source  = "hetznercloud/hcloud"\n\s+version = "([\d.]+)"', TEXTS["terraform/versions.tf"])
    pins["hetznercloud/hcloud"] = (provider, "terraform/versions.tf")
    plugin = found(r'hetznercloud/hcloud"\n\s+version = ">= ([\d.]+)"', TEXTS["image/mini-llm.pkr.hcl"])
    pins["packer-plugin-hcloud"] = (plugin, "image/mini-llm.pkr.hcl")
    for wanted in WANTED:
        for package, version in re.findall(r"^([\w.-]+)==([\w.]+)", TEXTS[wanted], re.MULTILINE):
            assert package not in pins, f"{package} is pinned in {wanted} and in {pins[package][1]}"
            pins[package] = (version, wanted)
    return pins


def find_strays(version: str, home: str) -> list[str]:
    """Files that tell a version and are neither its home nor allowed to."""
    told = re.compile(rf"(?<![\d.]){re.escape(version)}(?!\w|\.\d)")
    return [name for name, text in WRITTEN.items() if name != home and name not in TOLD and told.search(text)]


@pytest.mark.parametrize(("name", "pin"), pinned_by_hand().items())
def test_a_version_stands_in_its_home(name: str, pin: tuple[str, str]) -> None:
    """And nowhere else, but where it is said above why."""
    assert find_strays(*pin) == [], name


def test_strays_are_found() -> None:
    """Whoever looks for the home of something else finds the real one."""
    version, home = pinned_by_hand()["gpt4all"]
    assert find_strays(version, "elsewhere") == [home]


def test_nobody_is_allowed_to_tell_versions_for_nothing() -> None:
    """Each file of the list above tells at least one."""
    for name in TOLD:
        assert any(version in TEXTS[name] for version, _ in pinned_by_hand().values()), name


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("gpt4all", "gpt4all"),
        ("hetznercloud/hcloud", "hetznercloud/hcloud"),
        ("traefik", "traefik"),
        ("prometheus", "prometheus"),
        ("alertmanager", "alertmanager"),
        ("node-exporter", "node-exporter"),
        ("falcon", "falcon"),
        ("gunicorn", "gunicorn"),
    ],
)
def test_versions_told_in_words_are_those_that_are_pinned(words: str, name: str) -> None:
    """A name and a version anywhere, or as much of it as is told; of programs also the versions that tests build."""
    known = {pinned_by_hand()[name][0], *(each.version for each in PROGRAMS if each.name == name)}
    for file, text in WRITTEN.items():
        for told in re.findall(rf"\b{words} v?(\d+\.\d+(?:\.\d+)*)", text, re.IGNORECASE):
            assert any(f"{version}.".startswith(f"{told}.") for version in known), f"{file}: {words} {told}"


@pytest.mark.parametrize(
    "program",
    [each for each in PROGRAMS if f"tests/programs/{each.name}/go.sum" in TEXTS],
    ids=lambda program: program.name,
)
def test_programs_are_of_the_version_that_their_module_is(program: Program) -> None:
    """Some modules count v3.15 as v0.315."""
    module = found(r"^require (\S+ v[\d.]+)$", TEXTS[f"tests/programs/{program.name}/go.mod"])
    path, version = module.split(" v")
    assert program.package.startswith(path)
    major, minor, patch = program.version.split(".")
    assert version in (program.version, f"0.{major}{minor}.{patch}")


def test_tests_run_what_the_image_has() -> None:
    """Prometheus and its exporter; image/real-machine.md tells of the others that they differ."""
    built = {each.name: each.version for each in PROGRAMS}
    for name in ("prometheus", "node-exporter"):
        assert PINS["images"][name]["version"] == f"v{built[name]}"
    assert pinned_by_hand()["packer-plugin-hcloud"][0] == built["packer-plugin-hcloud"]


def test_no_package_has_two_versions() -> None:
    """What several locks hold is of the same version in all of them, for the same Python."""
    versions: dict[str, set[frozenset[str]]] = defaultdict(set)
    for name in LOCKS:
        for package, told in locked(name).items():
            versions[package].add(frozenset(told))
    assert {package: told for package, told in versions.items() if len(told) > 1} == {}


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_holds_all_that_is_wanted_by_hash(name: str) -> None:
    """And names no index: whose that is, is for who installs."""
    text = TEXTS[name]
    wanted = re.findall(r"^([\w-]+)", TEXTS[name.replace(".txt", ".in")], re.MULTILINE)
    assert wanted
    assert {each.lower() for each in wanted} <= locked(name).keys()
    entries = re.split(r"\n(?=[a-zA-Z])", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE))
    assert [entry.split()[0] for entry in entries if "--hash=sha256:" not in entry] == []
    assert "://" not in text
    assert not re.search(r"^\s*--(index|extra-index|find-links)", text, re.MULTILINE)


def test_the_usual_way_installs_what_the_locks_have() -> None:
    """Or it would be compared with something else."""
    all_of_them = {package: versions for name in LOCKS for package, versions in locked(name).items()}
    told = re.findall(r"^([\w-]+)==([\d.]+)$", TEXTS["tests/bench/usual_way/requirements.txt"], re.MULTILINE)
    assert len(told) == 3
    for package, version in told:
        assert version in all_of_them[package], package


def test_a_digest_stands_in_one_file() -> None:
    """Of images, models and whatever else; examples of a key's hash are none."""
    places = defaultdict(set)
    for name, text in WRITTEN.items():
        for digest in re.findall(r"(?<![0-9a-f])(?:[0-9a-f]{64}|[0-9a-f]{32})(?![0-9a-f])", text):
            places[digest].add(name)
    example = "0123456789abcdef" * 4
    assert places.pop(example) == {"cloud-init/node.yaml"}
    assert {digest: names for digest, names in places.items() if len(names) > 1} == {}
    assert {name for names in places.values() for name in names} >= {"image/pins.json", "service/models.json"}


def test_nothing_asks_for_the_latest() -> None:
    """Of containers, modules or packages."""
    asking = re.compile(r"[\w/-]+[:@]latest\b")
    assert {name: asking.findall(text) for name, text in WRITTEN.items() if asking.search(text)} == {}


def test_the_oldest_python_is_told_alike() -> None:
    """In the project's description, the set-up, the README, the locks and to ruff."""
    oldest = ".".join(map(str, OLDEST_PYTHON))
    project = tomllib.loads(TEXTS["pyproject.toml"])
    assert project["project"]["requires-python"] == f">={oldest}"
    assert project["tool"]["ruff"]["target-version"] == f"py{oldest.replace('.', '')}"
    assert f"Python ≥ {oldest} " in TEXTS["README.md"]
    assert f"--python-version {oldest} " in TEXTS["Makefile"]


@pytest.mark.parametrize(
    ("name", "home"), [("Packer", "image/mini-llm.pkr.hcl"), ("Terraform", "terraform/versions.tf")]
)
def test_the_oldest_program_is_told_alike(name: str, home: str) -> None:
    """In the README as in the files that the program itself reads."""
    oldest = found(r'required_version = ">= ([\d.]+)"', TEXTS[home])
    assert f"{name} {oldest.removesuffix('.0')} or newer" in TEXTS["README.md"]
