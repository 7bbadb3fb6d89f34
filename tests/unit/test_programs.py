"""What tests build once is there whole or not at all, and a build that was killed leaves nothing for good."""

import os
from pathlib import Path

import pytest

from tests.programs import ProgramMissing, find_kept, forget_old, keep


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where it is kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "mini-llm" / "programs"


def test_it_is_built_once(cache: Path) -> None:
    """A file; what was needed beside it is gone."""
    built: list[Path] = []

    def build(draft: Path) -> None:
        built.append(draft)
        (draft.parent / "source").mkdir()
        draft.write_text("program")

    assert keep("one-1", build).read_text() == "program"
    assert keep("one-1", build) == cache / "one-1"
    assert len(built) == 1
    assert sorted(each.name for each in cache.iterdir()) == ["one-1", "one-1.lock"]


def test_a_folder_is_kept_likewise(cache: Path) -> None:
    """With what lies in it."""
    kept = keep("two-1", lambda draft: (draft / "bin").mkdir(parents=True))
    assert (kept / "bin").is_dir()


def test_a_build_that_fails_leaves_nothing_and_is_tried_again(cache: Path) -> None:
    """Nor does one that was killed."""
    (cache / "one-1.building").mkdir(parents=True)
    (cache / "one-1.building" / "half").write_text("of a killed one")

    def fail(draft: Path) -> None:
        assert list(draft.parent.iterdir()) == []
        draft.write_text("half")
        raise ProgramMissing("no compiler")

    with pytest.raises(ProgramMissing, match="no compiler"):
        keep("one-1", fail)
    assert [each.name for each in cache.iterdir()] == ["one-1.lock"]

    def build(draft: Path) -> None:
        draft.write_text("whole")

    assert keep("one-1", build).read_text() == "whole"


def test_the_newest_are_left(cache: Path) -> None:
    """By their time, whatever their names, files and folders; locks, drafts and what is called otherwise stay."""
    for number in range(4):
        kept = keep(f"image-{9 - number}", Path.mkdir if number % 2 else Path.touch)
        os.utime(kept, (number, number))
    (cache / "image-8.building").mkdir()
    keep("traefik-3", Path.touch)
    forget_old("image-*", 2)
    left = sorted(each.name for each in cache.iterdir() if each.suffix != ".lock")
    assert left == ["image-6", "image-7", "image-8.building", "traefik-3"]
    assert len(list(cache.glob("*.lock"))) == 5


def test_what_is_not_kept_is_not_found(cache: Path) -> None:
    assert find_kept("one-1") is None
    assert keep("one-1", Path.touch) == find_kept("one-1")
