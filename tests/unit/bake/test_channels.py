"""Channels: one holder at any time, one write a move, and nothing that nobody verified."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from scripts.bake.channels import promote, refuse_withdrawn, rollback, tfvars_file
from scripts.bake.cloud import Cloud
from scripts.bake.errors import BakeError, ImageGone, Refused
from scripts.bake.snapshots import Snapshot, holders
from tests.unit.bake.conftest import InProcess

VERIFIED = {"verified_at": "20261126T120000Z"}


def held(cloud: Cloud, channel: str = "stable") -> list[int]:
    return [each.id for each in holders(cloud.snapshots(), channel)]


def test_promote_and_rollback_walk_one_line(
    cloud: Cloud, make_snapshot: Callable[..., Snapshot], tmp_path: Path
) -> None:
    """Each promotion is the new end, each rollback takes the end away, and Terraform's file follows."""
    images = [make_snapshot(**VERIFIED) for _ in range(3)]
    for image in images:
        moved = promote(cloud, image, "stable", tmp_path)
    assert held(cloud) == [image.id for image in reversed(images)]
    assert moved.lines()[0] == f"stable: {images[1].id}, 1, starter → {images[2].id}, 1, starter"
    for image in (images[1], images[0]):
        rollback(cloud, "stable", tmp_path)
        assert held(cloud)[0] == image.id
        assert json.loads(tfvars_file(tmp_path / "terraform", "stable").read_text()) == {
            "image_id": image.id,
            "image_version": image.version,
        }
    with pytest.raises(Refused, match="the only one"):
        rollback(cloud, "stable", tmp_path)
    with pytest.raises(Refused, match="nobody holds"):
        rollback(cloud, "beta", tmp_path)


@pytest.mark.parametrize("channel", ["snapshot", "self"])
def test_a_channel_may_be_called_as_a_word_of_the_code(
    cloud: Cloud, make_snapshot: Callable[..., Snapshot], tmp_path: Path, channel: str
) -> None:
    """Its name is a label's, and none of an argument."""
    image = make_snapshot(**VERIFIED)
    promote(cloud, image, channel, tmp_path)
    assert held(cloud, channel) == [image.id]


def test_promoting_the_holder_writes_no_label(
    cloud: Cloud, make_snapshot: Callable[..., Snapshot], tmp_path: Path, way: InProcess
) -> None:
    """A second promotion only makes sure of the file."""
    image = make_snapshot(**VERIFIED)
    promote(cloud, image, "stable", tmp_path)
    tfvars_file(tmp_path / "terraform", "stable").unlink()
    way.calls.clear()
    promote(cloud, image, "stable", tmp_path)
    assert [call for call in way.calls if not call.startswith("GET")] == []
    assert json.loads(tfvars_file(tmp_path / "terraform", "stable").read_text()) == {
        "image_id": image.id,
        "image_version": image.version,
    }


def test_the_file_keeps_what_else_stands_in_it_and_other_channels_have_their_own(
    cloud: Cloud, make_snapshot: Callable[..., Snapshot], tmp_path: Path
) -> None:
    """Terraform reads the default channel's by itself; another one must be named, or it would win or lose by chance."""
    path = tfvars_file(tmp_path / "terraform", "stable")
    path.parent.mkdir()
    path.write_text('{"domain": "llm.example.org", "image_id": 1}')
    image = make_snapshot(**VERIFIED)
    promote(cloud, image, "stable", tmp_path)
    assert json.loads(path.read_text()) == {
        "domain": "llm.example.org",
        "image_id": image.id,
        "image_version": image.version,
    }
    moved = promote(cloud, image, "beta", tmp_path)
    assert moved.file.name == "image.beta.tfvars.json"
    assert moved.lines()[-1].endswith("apply -var-file=image.beta.tfvars.json")


def test_only_verified_images_unless_named(
    cloud: Cloud, make_snapshot: Callable[..., Snapshot], tmp_path: Path
) -> None:
    """Who names an unverified image vouches for it; nothing of a bake's deadline stays on it."""
    image = make_snapshot(deadline="1")
    with pytest.raises(Refused, match="not verified"):
        promote(cloud, image, "stable", tmp_path)
    assert held(cloud) == []
    assert not tfvars_file(tmp_path / "terraform", "stable").exists()
    moved = promote(cloud, image, "stable", tmp_path, unverified=True)
    assert held(cloud) == [image.id]
    assert moved.now.deadline_s is None


def test_what_was_rolled_back_does_not_come_back_by_itself(
    cloud: Cloud, make_snapshot: Callable[..., Snapshot], tmp_path: Path
) -> None:
    """Until somebody promotes it by name."""
    old, new = make_snapshot(**VERIFIED), make_snapshot(**VERIFIED)
    for image in (old, new):
        promote(cloud, image, "stable", tmp_path)
    rollback(cloud, "stable", tmp_path)
    seen = cloud.snapshot(new.id)
    assert seen is not None
    with pytest.raises(Refused, match="was rolled back from stable"):
        refuse_withdrawn(seen, "stable")
    refuse_withdrawn(seen, "beta")
    again = promote(cloud, seen, "stable", tmp_path).now
    refuse_withdrawn(again, "stable")


def test_two_promotions_at_once_leave_one_holder_and_tell_the_other(
    cloud: Cloud, make_snapshot: Callable[..., Snapshot], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both write the same number; the newer image holds."""
    older, newer = make_snapshot(**VERIFIED), make_snapshot(**VERIFIED)
    write = cloud.relabel

    def write_beside(snapshot: Snapshot, *without: str, **more: str) -> Snapshot:
        monkeypatch.setattr(cloud, "relabel", write)
        promote(cloud, newer, "stable", tmp_path)
        return write(snapshot, *without, **more)

    monkeypatch.setattr(cloud, "relabel", write_beside)
    with pytest.raises(BakeError, match=f"somebody else has promoted image {newer.id}"):
        promote(cloud, older, "stable", tmp_path)
    assert held(cloud) == [newer.id, older.id]


def test_an_image_that_is_pruned_meanwhile(
    cloud: Cloud, make_snapshot: Callable[..., Snapshot], tmp_path: Path
) -> None:
    """It is told, and the file is left alone."""
    image = make_snapshot(**VERIFIED)
    cloud.delete_snapshot(image)
    with pytest.raises(ImageGone):
        promote(cloud, image, "stable", tmp_path)
    assert not tfvars_file(tmp_path / "terraform", "stable").exists()
