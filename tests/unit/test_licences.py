"""What is installed and what is in the image has licences that were looked at, and the README tells them."""

import email
import importlib.metadata
import json
import re
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from service.models import load_catalogue

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
TOLD = README[README.index("\n## Licences\n") :]
# Each lets a program under the MIT licence use it, and asks for its notice, MPL-2.0 also for changes of its own files.
ALLOWED = {"Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "ISC", "MIT", "MIT-0", "MPL-2.0", "PSF-2.0"}
# What older packages say in words.
_CLASSIFIED = {
    "Apache Software License": "Apache-2.0",
    "BSD License": "BSD-3-Clause",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
}


def required_here(lock: str) -> list[str]:
    """Packages that a lock installs on this Python and system."""
    lines = re.findall(r"^([A-Za-z0-9][^\\\n]*)", (ROOT / lock).read_text(), re.MULTILINE)
    wanted = [Requirement(line) for line in lines]
    return sorted({each.name for each in wanted if each.marker is None or each.marker.evaluate()})


def licences(metadata: Any) -> set[str]:
    """Every licence that a package's own metadata name, also where one of them would do."""
    told = metadata.get("License-Expression") or metadata.get("License") or ""
    if told and "\n" not in told:
        return set(re.split(r"\s+(?:AND|OR|WITH)\s+", told.replace("(", "").replace(")", "")))
    classes = [line.split(" :: ")[-1] for line in metadata.get_all("Classifier") or [] if line.startswith("License")]
    return {_CLASSIFIED.get(each, each) for each in classes}


@pytest.mark.parametrize(
    ("lock", "name"),
    [(lock, name) for lock in ("service/requirements.txt", "scripts/requirements.txt") for name in required_here(lock)],
)
def test_a_package_has_a_licence_that_is_allowed(lock: str, name: str) -> None:
    """The service's go into the image, the scripts' onto the machine of who bakes."""
    told = licences(importlib.metadata.metadata(name))
    assert told
    assert told <= ALLOWED


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("License-Expression: MPL-2.0 AND (Apache-2.0 OR MIT)", {"MPL-2.0", "Apache-2.0", "MIT"}),
        ("License: GPL-3.0-only", {"GPL-3.0-only"}),
        ("Classifier: License :: OSI Approved :: MIT License", {"MIT"}),
        ("Classifier: License :: OSI Approved :: GNU General Public License v3", {"GNU General Public License v3"}),
        ("Classifier: Typing :: Typed", set()),
    ],
)
def test_licences_are_read_in_each_of_their_forms(lines: str, expected: set[str]) -> None:
    """And what is none of the allowed ones stays itself."""
    assert licences(email.message_from_string(f"Name: x\n{lines}\n")) == expected


def test_the_readme_tells_of_all_that_ships() -> None:
    """Each container, each package that the service asks for by name, each family of models."""
    containers = json.loads((ROOT / "image" / "pins.json").read_text())["images"]
    wanted = re.findall(r"^([\w-]+)==", (ROOT / "service" / "requirements.in").read_text(), re.MULTILINE)
    families = {re.split(r"[-\d.]", name)[0] for name in load_catalogue()}
    for name in (*containers, *wanted, *families, "docker", "debian", "llama.cpp", "starter"):
        assert re.search(rf"\b{re.escape(name)}", TOLD, re.IGNORECASE), name


def test_the_packages_licences_are_those_that_the_readme_tells() -> None:
    """Of those that the service asks for by name, in brackets behind them."""
    for name, told in re.findall(r"`([\w-]+)` \(([^)]+)\)", TOLD):
        assert set(re.split(r", ", told)) == licences(importlib.metadata.metadata(name)), name
