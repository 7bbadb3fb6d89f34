"""What of Debian's packages is wanted is told by name, and nothing is installed without a yes."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import setup_host


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Nobody has said yes, nobody is at a terminal; the commands that would have run."""
    ran: list[tuple[str, ...]] = []

    def run(*words: str, **more: object) -> bool:
        ran.append(words)
        return True

    def unpack(package: str) -> bool:
        ran.append(("unpack", package))
        return True

    monkeypatch.delenv("YES", raising=False)
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr(setup_host.os, "geteuid", lambda: 0)
    monkeypatch.setattr(setup_host.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(setup_host, "go_is_too_old", lambda: False)
    monkeypatch.setattr(setup_host, "run", run)
    monkeypatch.setattr(setup_host, "unpack", unpack)
    monkeypatch.setattr(setup_host, "find_missing", lambda needs: ["docker-registry", "git"])
    return ran


@pytest.mark.parametrize(("goal", "code"), [("test", 0), ("demo", 1), ("bench-image", 1)])
def test_nothing_is_installed_without_a_yes(
    quiet: list[tuple[str, ...]], capsys: pytest.CaptureFixture[str], goal: str, code: int
) -> None:
    """It says what is missing and how to get it; tests can go on without, a demo cannot."""
    assert setup_host.main([goal]) == code
    assert quiet == []
    said = capsys.readouterr().err
    assert "to install on this system: git\n" in said
    assert "to unpack below .cache: docker-registry\n" in said
    assert f"make {goal} YES=1" in said


@pytest.mark.parametrize("goal", setup_host._NEEDS)
def test_make_asks_for_what_is_missing_first(goal: str) -> None:
    """A bench that began without a registry ended in a traceback."""
    recipe = (setup_host.ROOT / "Makefile").read_text().partition(f"\n{goal}:\n")[2]
    assert recipe.startswith(f"\t@$(PYTHON) scripts/setup_host.py {goal}\n")


def test_who_is_not_root_is_told_to_be(
    quiet: list[tuple[str, ...]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even with a yes."""
    monkeypatch.setenv("YES", "1")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert [setup_host.main([goal]) for goal in ("demo", "bench-image", "test")] == [1, 1, 0]
    assert quiet == []
    said = capsys.readouterr().err
    assert "only root can start: sudo make demo\n  `make serve`" in said
    assert "only root can start: sudo make bench-image\n" in said
    assert "as root: sudo make test" in said


def test_a_yes_installs_programs_and_unpacks_services(
    quiet: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A service that were installed would start with the host."""
    monkeypatch.setenv("YES", "1")
    assert setup_host.main(["test"]) == 0
    assert [words[-1] for words in quiet] == ["update", "docker-registry", "git"]
    assert quiet[1] == ("unpack", "docker-registry")
    assert quiet[2][:2] == ("apt-get", "-qq")


def test_programs_are_looked_for_where_they_are_unpacked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As well as on the PATH."""
    monkeypatch.setattr(setup_host.host, "find_tool", lambda name: None)
    monkeypatch.setattr(setup_host.host, "KEYRING", tmp_path)
    monkeypatch.setattr(setup_host, "UNPACKED", tmp_path)
    needs = {"pebble": "pebble", "hcloud": "hcloud-cli"}
    assert setup_host.find_missing(needs) == ["hcloud-cli", "pebble"]
    (tmp_path / "usr" / "bin").mkdir(parents=True)
    (tmp_path / "usr" / "bin" / "pebble").write_text("")
    assert setup_host.find_missing(needs) == ["hcloud-cli", "pebble"]  # cut off, for what it knows
    (tmp_path / "usr" / "bin" / "pebble").chmod(0o755)
    assert setup_host.find_missing(needs) == ["hcloud-cli"]


@pytest.mark.parametrize(
    ("candidate", "old"),
    [("2:1.19~1", True), ("2:1.24~2", False), ("2:1.21~1build1", False), ("(none)", True), ("", True)],
)
def test_an_old_go_is_not_installed(monkeypatch: pytest.MonkeyPatch, candidate: str, old: bool) -> None:
    """Debian 12's cannot fetch a newer one."""
    said = f"golang-go:\n  Installed: (none)\n  Candidate: {candidate}\n" if candidate else ""
    done = subprocess.CompletedProcess([], 0, said, "")
    monkeypatch.setattr(setup_host.subprocess, "run", lambda *words, **_: done)
    assert setup_host.go_is_too_old() is old


def test_what_is_unpacked_is_wanted() -> None:
    """A name that nobody needs would be a slip."""
    packages = {package for needs in setup_host._NEEDS.values() for package in needs.values()}
    assert set(setup_host._TO_UNPACK) <= packages


@pytest.mark.parametrize(("value", "yes"), [("true", True), ("1", True), ("false", False), ("0", False), ("", False)])
def test_ci_is_a_yes_where_it_is_one(monkeypatch: pytest.MonkeyPatch, value: str, yes: bool) -> None:
    """Some set it to false."""
    monkeypatch.delenv("YES", raising=False)
    monkeypatch.setenv("CI", value)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    assert setup_host.is_yes() is yes


def test_an_interruption_is_told_without_a_traceback(
    quiet: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And how to mend what it may have cut off."""

    def stop(package: str) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setenv("YES", "1")
    monkeypatch.setattr(setup_host, "unpack", stop)
    with pytest.raises(SystemExit, match="dpkg --configure -a"):
        setup_host.main(["test"])


@pytest.mark.parametrize(("shown", "fetched"), [(b"Package: promtool\n", "promtool"), (b"", "prometheus")])
def test_promtool_is_fetched_where_this_release_has_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, shown: bytes, fetched: str
) -> None:
    """Debian 13 has it in a package of its own; before, Prometheus' brought it."""
    ran: list[str] = []

    def run(*words: str, **more: object) -> bool:
        ran.append(words[-1])
        return False

    done = subprocess.CompletedProcess([], 0 if shown else 100, shown, b"")
    monkeypatch.setattr(setup_host.subprocess, "run", lambda *words, **_: done)
    monkeypatch.setattr(setup_host, "UNPACKED", tmp_path)
    monkeypatch.setattr(setup_host, "run", run)
    assert not setup_host.unpack("promtool")
    assert ran == [fetched]


def test_what_is_unpacked_is_there_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A program that was cut off is never found; the package's other files are not kept."""
    monkeypatch.setattr(setup_host, "UNPACKED", tmp_path)

    def run(*words: str, cwd: Path = tmp_path) -> bool:
        if words[0] == "apt-get":
            (cwd / "pebble_1.deb").write_text("")
            return True
        folder = Path(words[-1]) / "usr" / "bin"
        folder.mkdir(parents=True)
        (folder / "pebble").write_text("half")
        return words[-1].endswith(".draft") and not failing

    monkeypatch.setattr(setup_host, "run", run)
    for failing in (True, False):
        assert setup_host.unpack("pebble") is not failing
        assert (tmp_path / "usr" / "bin" / "pebble").exists() is not failing
    assert [each.name for each in tmp_path.iterdir()] == ["usr"]
