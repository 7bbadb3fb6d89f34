"""Integration tests of the flake: Nix evaluates it, with a small stand-in for nixpkgs. Nothing of it is built."""

import shutil
from pathlib import Path

import pytest

from scripts.local_cloud.machines.host import HostUnfit
from tests.absent import did_not_run
from tests.nix.debian_nix import Nix, obtain_nix
from tests.programs import ProgramMissing

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def nix(tmp_path_factory: pytest.TempPathFactory) -> Nix:
    """Nix; where it cannot be had, each test says so and what to install."""
    try:
        return obtain_nix(tmp_path_factory.mktemp("nix"))
    except (HostUnfit, ProgramMissing) as error:
        did_not_run(error)


@pytest.fixture
def flake(tmp_path: Path) -> Path:
    """A folder with the flake and what its evaluation reads, to be changed at will."""
    folder = tmp_path / "flake"
    for name in ("flake.nix", "flake.lock", "service/requirements.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder
