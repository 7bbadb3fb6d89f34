"""The flake: every output evaluates, its lock file fits, and its scripts do what they say. Nothing of it is built."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.absent import did_not_run
from tests.nix.conftest import ROOT
from tests.nix.debian_nix import Nix
from tests.programs import OPENTOFU, PACKER, ProgramMissing, obtain

STAND_IN = Path(__file__).with_name("nixpkgs")
BOTH = ["aarch64-linux", "x86_64-linux"]
SERVING = ["x86_64-linux"]  # where gpt4all exists
OUTPUTS = {
    "packages": (SERVING, ["default"]),
    "apps": (SERVING, ["bake", "cloud", "serve"]),
    "devShells": (BOTH, ["default"]),
    "checks": (BOTH, ["alerts", "lint", "packer", "scripts", "terraform"]),
}
TOOLS = {"alerts": "promtool", "lint": "ruff", "packer": "packer", "scripts": "shellcheck", "terraform": "terraform"}
BUILT = {"packer": PACKER, "terraform": OPENTOFU}  # where nobody has installed them; both format alike


def evaluate(nix: Nix, flake: Path, command: str, *words: str) -> "subprocess.CompletedProcess[str]":
    """A command of ``nix`` on the flake, with the stand-in in the place of nixpkgs."""
    name, *options = command.split()
    place = f"path:{flake}" + (words[0] if words else "")
    stand_in = ["--no-write-lock-file", "--override-input", "nixpkgs", f"path:{STAND_IN}"]
    return nix.run(name, *options, *stand_in, place, *words[1:])


def value(nix: Nix, flake: Path, output: str) -> Any:
    """An output as JSON; a derivation is the path that it would have."""
    done = evaluate(nix, flake, "eval --json", f"#{output}")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def change(flake: Path, old: str, new: str) -> None:
    """Changes one place of a copied flake."""
    text = (flake / "flake.nix").read_text()
    assert text.count(old) == 1
    (flake / "flake.nix").write_text(text.replace(old, new))


def text_of(nix: Nix, flake: Path, derivation: str, attribute: str) -> str:
    """A script of a derivation, in which the flake's sources are this checkout."""
    done = evaluate(nix, flake, "eval --raw", f"#{derivation}.{attribute}")
    assert done.returncode == 0, done.stderr
    return re.sub(r"/nix/store/[a-z0-9]{32}-source\b", str(ROOT), done.stdout)


def test_every_output_evaluates(nix: Nix, flake: Path) -> None:
    """Each output on each of its systems, to the last name of a package; what it would build is not built."""
    done = evaluate(nix, flake, "flake check --all-systems --no-build")
    assert done.returncode == 0, done.stderr
    shown = evaluate(nix, flake, "flake show --all-systems --json")
    assert shown.returncode == 0, shown.stderr
    told = json.loads(shown.stdout)
    assert {
        name: (sorted(systems), sorted({each for outputs in systems.values() for each in outputs}))
        for name, systems in told.items()
    } == OUTPUTS
    for name in OUTPUTS:
        value(nix, flake, name)
    kept = {path.name for path in nix.store.iterdir()} - {".links"}
    assert [name for name in kept if not name.endswith(("-source", ".drv"))] == []


@pytest.mark.parametrize("name", ["gnumake", "prometheus.cli", "writeShellApplication", "stdenv.cc.cc.lib"])
def test_a_name_that_nixpkgs_lacks_is_found(nix: Nix, flake: Path, name: str) -> None:
    """A wrong letter in a package's name, an output's or a function's fails with that name."""
    text = (flake / "flake.nix").read_text()
    (flake / "flake.nix").write_text(text.replace(f"pkgs.{name}", f"pkgs.{name}x"))
    done = evaluate(nix, flake, "flake check --all-systems --no-build")
    assert done.returncode != 0
    assert f"attribute '{name.rpartition('.')[2]}x' missing" in done.stderr


@pytest.mark.parametrize("name", ["packer", "terraform"])
def test_what_is_not_free_is_allowed_by_name(nix: Nix, flake: Path, name: str) -> None:
    """Packer and Terraform, which nixpkgs refuses otherwise; the stand-in sees to it that nothing else is."""
    change(flake, f'              "{name}"\n', "")
    done = evaluate(nix, flake, "flake check --no-build")
    assert done.returncode != 0
    assert f"nixpkgs refuses {name}: its license is unfree" in done.stderr


def test_nothing_else_that_is_not_free_is_allowed(nix: Nix, flake: Path) -> None:
    """A predicate that allows everything fails."""
    change(flake, "builtins.elem (lib.getName package) [", "true || builtins.elem (lib.getName package) [")
    assert evaluate(nix, flake, "flake check --no-build").returncode != 0


def test_the_lock_file_fits_and_names_the_revision(nix: Nix, flake: Path) -> None:
    """Nix would write the same, and the revision is the one for which the stand-in's names were looked up."""
    done = nix.run("flake", "metadata", "--json", "--no-update-lock-file", f"path:{flake}")
    assert done.returncode == 0, done.stderr
    (name,) = set(json.loads(done.stdout)["locks"]["nodes"]) - {"root"}
    pinned = json.loads((flake / "flake.lock").read_text())["nodes"][name]
    assert pinned["original"] == {"type": "github", "owner": "NixOS", "repo": "nixpkgs", "ref": "nixos-26.05"}
    locked = pinned["locked"]
    assert (locked["type"], locked["owner"], locked["repo"]) == ("github", "NixOS", "nixpkgs")
    assert re.fullmatch(r"sha256-[A-Za-z0-9+/]{43}=", locked["narHash"])
    looked_up = nix.run("eval", "--raw", f"path:{STAND_IN}#revision")
    assert locked["rev"] == looked_up.stdout


def test_a_lock_file_of_another_branch_is_refused(nix: Nix, flake: Path) -> None:
    """Whoever changes the branch in flake.nix has to lock it again."""
    change(flake, "nixos-26.05", "nixos-26.11")
    done = nix.run("flake", "metadata", "--no-update-lock-file", f"path:{flake}")
    assert done.returncode != 0


@pytest.mark.parametrize("check", OUTPUTS["checks"][1])
def test_the_checks_pass(nix: Nix, flake: Path, check: str, tmp_path: Path) -> None:
    """Each check's own commands on this checkout, with this machine's tool."""
    tool = TOOLS[check]
    here = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], str(tmp_path)])
    if shutil.which(tool, path=here) is None:
        try:
            if tool not in BUILT:
                raise ProgramMissing(f"{tool} is not installed")
            (tmp_path / tool).symlink_to(obtain(BUILT[tool]))
        except ProgramMissing as error:
            did_not_run(error)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text_of(nix, flake, f"checks.x86_64-linux.{check}", "buildCommand")],
        env={"PATH": here, "TMPDIR": str(tmp_path), "out": str(tmp_path / "out")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "out").exists()


def run_script(text: str, folder: Path, path: str, *words: str) -> "subprocess.CompletedProcess[str]":
    """Runs a script as nixpkgs' writeShellApplication would have it run."""
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text, "script", *words],
        env={"PATH": path, "HOME": str(folder)},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
    )


def scripts_of(nix: Nix, flake: Path, name: str) -> list[str]:
    """The texts of what an app of this name starts, among all that was evaluated so far."""
    value(nix, flake, "apps")
    places = [f"/nix/store/{path.name}" for path in nix.store.glob(f"*-{name}.drv")]
    shown = nix.run("derivation", "show", *places)
    assert shown.returncode == 0, shown.stderr
    return [each["env"]["text"] for each in json.loads(shown.stdout).values()]


def test_the_package_serves_its_own_sources_on_an_environment_in_the_cache(
    nix: Nix, flake: Path, tmp_path: Path
) -> None:
    """The package's script in any folder, with a setup whose Python only tells how it was called."""
    source, folder = tmp_path / "source", tmp_path / "elsewhere"
    for each in (source / "service", source / "scripts", folder):
        each.mkdir(parents=True)
    (source / "service" / "requirements.txt").touch()
    (source / "scripts" / "python").write_text(
        '#!/bin/sh\nprintf "%s\\n" "$PWD" "$PYTHONPATH" "$LD_LIBRARY_PATH" "$@"\n'
    )
    (source / "scripts" / "python").chmod(0o755)
    (source / "scripts" / "setup_venv.py").write_text(
        "import os, shutil, sys\n"
        "assert os.path.exists(sys.argv[1])\n"
        "os.makedirs('.venv/bin', exist_ok=True)\n"
        "shutil.copy('scripts/python', '.venv/bin')\n"
    )
    text = text_of(nix, flake, "packages.x86_64-linux.default", "text").replace(str(ROOT), str(source))
    for _ in range(2):  # what the first start has made is there at the second
        done = run_script(text, folder, os.environ["PATH"], "keys", "add", "a name")
        assert done.returncode == 0, done.stderr
        place, path, libraries, *words = done.stdout.splitlines()
        assert (place, path) == (str(folder), str(source))
        assert libraries.endswith("-gcc-lib-stand-in/lib")
        assert words == ["-P", "-m", "service", "keys", "add", "a name"]
    (made,) = (folder / ".cache" / "mini-llm").iterdir()
    assert sorted(path.name for path in made.iterdir()) == [".venv", "scripts", "service"]


@pytest.mark.parametrize("app", ["bake", "cloud"])
def test_bake_and_cloud_are_the_makefiles(nix: Nix, flake: Path, app: str, tmp_path: Path) -> None:
    """In a checkout the target of that name, with Nix's Python and what was given; elsewhere a refusal."""
    make = tmp_path / "make"
    make.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    make.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    text = scripts_of(nix, flake, app)[0]
    done = run_script(text, tmp_path, path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: this works on a checkout of mini-llm\n")
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "setup_venv.py").touch()
    done = run_script(text, tmp_path, path, f"{app.upper()}=--help me")
    target, python, *words = done.stdout.splitlines()
    assert target == app
    assert re.fullmatch(r"PYTHON=/nix/store/.+-python313-stand-in/bin/python3", python)
    assert words == [f"{app.upper()}=--help me"]


@pytest.mark.parametrize("script", [*OUTPUTS["apps"][1], "mini-llm"])
def test_shellcheck_has_nothing_to_say_of_the_scripts(nix: Nix, flake: Path, script: str) -> None:
    """What the apps start."""
    if shutil.which("shellcheck") is None:
        did_not_run("shellcheck is not installed (Debian: sudo apt-get install shellcheck)")
    texts = scripts_of(nix, flake, script)
    assert texts
    for text in texts:
        done = subprocess.run(
            ["shellcheck", "--shell=bash", "-"], input=text, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stdout
