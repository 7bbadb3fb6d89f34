"""A container that its own data keep from starting starts without them; nobody else's data are touched."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.image.scripts import load_script

mend_data = load_script("rootfs/usr/lib/mini-llm/mend_data.py")
BEFORE = {"id": "a", "restarts": 4, "tried": False}


class Containers:
    """Docker with one container, which stays if its folder is as ``likes`` wants it."""

    def __init__(self, folder: Path, likes: Any):
        self.folder, self.likes = folder, likes
        self.words: list[Any] = []

    def ask(self, *words: str) -> str:
        self.words.append(words[0])
        return ""

    def look(self, name: str) -> Any:
        stays = self.likes(self.folder)
        return mend_data.Seen("a", 0 if stays else 5, 20.0 if stays else 0.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A container's data, one file of them damaged, and what an earlier trial left."""
    made = tmp_path / "mini-llm-x"
    made.mkdir(mode=0o700)
    (made / "nflog").write_text("damaged")
    (tmp_path / "mini-llm-x.damaged").mkdir()
    (tmp_path / "mini-llm-x.damaged" / "older").touch()
    return made


def test_a_container_is_seen_as_docker_tells_it() -> None:
    """Between two starts it does not run, whatever else is said."""

    def ask(*words: str) -> str:
        state = {"Running": True, "Restarting": restarting, "StartedAt": "1970-01-01T00:01:40.123456789Z"}
        return json.dumps([{"Id": "a", "RestartCount": 3, "State": state}])

    restarting = False
    assert mend_data.look_at("x", ask, lambda: 200.0) == mend_data.Seen("a", 3, pytest.approx(99.88, abs=0.01))
    restarting = True
    assert mend_data.look_at("x", ask, lambda: 200.0).running_s == 0


@pytest.mark.parametrize(
    ("seen", "before", "due"),
    [
        (("a", 6, 0.0), BEFORE, True),
        (("a", 9, 5.0), BEFORE, True),
        (("a", 5, 0.0), BEFORE, False),  # once is no loop
        (("a", 9, 61.0), BEFORE, False),  # it has come to rest
        (("b", 9, 0.0), BEFORE, False),  # another container
        (("a", 9, 0.0), {**BEFORE, "tried": True}, False),
        (("a", 9, 0.0), None, False),  # the first look
    ],
)
def test_a_trial_is_due_for_what_keeps_ending(
    seen: tuple[str, int, float], before: dict[str, Any] | None, due: bool
) -> None:
    """And for nothing else: each costs what the container has not written yet."""
    assert mend_data.keeps_ending(mend_data.Seen(*seen), before) == due


def test_damaged_data_are_put_aside(folder: Path) -> None:
    """In the place of earlier ones; the new folder is as closed as the old one was."""
    containers = Containers(folder, lambda folder: not any(folder.iterdir()))
    assert mend_data.try_without_data("x", folder, containers.ask, containers.look, lambda pause_s: None)
    assert containers.words == ["stop", "start"]
    assert folder.stat().st_mode & 0o777 == 0o700
    assert [path.name for path in folder.with_name("mini-llm-x.damaged").iterdir()] == ["nflog"]
    assert sorted(path.name for path in folder.parent.iterdir()) == ["mini-llm-x", "mini-llm-x.damaged"]


def test_data_that_were_not_the_reason_are_put_back(folder: Path) -> None:
    """The container starts with what it had, as soon as it can."""
    containers = Containers(folder, lambda folder: False)
    assert not mend_data.try_without_data("x", folder, containers.ask, containers.look, lambda pause_s: None)
    assert containers.words == ["stop", "start", "stop", "start"]
    assert (folder / "nflog").read_text() == "damaged"
    assert [path.name for path in folder.parent.iterdir()] == ["mini-llm-x"]


def test_a_trial_that_was_cut_off_loses_nothing(folder: Path) -> None:
    """By a power cut; the container goes on with the new folder."""
    aside = folder.with_name("mini-llm-x.aside")
    folder.rename(aside)
    folder.mkdir()
    mend_data.end_trial(folder)
    assert [path.name for path in folder.with_name("mini-llm-x.damaged").iterdir()] == ["nflog"]
    assert not aside.exists()


def test_a_disk_that_is_full_costs_no_data(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There may be no room for as much as an empty folder."""

    def fail(*words: object, **more: object) -> None:
        raise OSError("no space left on device")

    containers = Containers(folder, lambda folder: True)
    monkeypatch.setattr(mend_data.Path, "mkdir", fail)
    with pytest.raises(OSError, match="no space"):
        mend_data.try_without_data("x", folder, containers.ask, containers.look, lambda pause_s: None)
    assert (folder / "nflog").exists()
    assert containers.words == ["stop", "start"]
