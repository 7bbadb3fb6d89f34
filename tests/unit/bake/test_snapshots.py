"""What labels say, and which snapshots may go."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from scripts.bake.snapshots import Snapshot, format_time, holders, is_channel_name, keep_reasons, with_labels

NOW = datetime(2026, 11, 26, 12, tzinfo=UTC)


def make(number: int, layer: str = "service", **more: Any) -> Snapshot:
    plain = Snapshot(
        id=number,
        layer=layer,
        version=f"v{number}",
        description="",
        created=NOW + timedelta(hours=number),
        status="available",
        size_gb=1.0,
        disk_gb=40,
        parent="",
        input=f"input-{number}",
        model="starter",
        commit="",
        run="",
        deadline_s=None,
        verified_at=NOW if layer == "service" else None,
        withdrawn="",
    )
    return replace(plain, **more)


def test_the_holder_is_the_verified_image_with_the_highest_number() -> None:
    """An unverified one with a higher number holds nothing."""
    snapshots = [
        make(1, channels={"stable": 1}),
        make(2, channels={"stable": 3}),
        make(3, channels={"stable": 2, "beta": 9}),
        make(4, channels={"stable": 99}, verified_at=None),
    ]
    assert [each.id for each in holders(snapshots, "stable")] == [2, 3, 1]
    assert [each.id for each in holders(snapshots, "beta")] == [3]
    assert holders(snapshots, "none") == []


def test_what_stays() -> None:
    """What runs, holders and who they go back to, the newest, what is being made, and layers of all these."""
    snapshots = [
        make(1, channels={"stable": 1}),
        make(2, channels={"stable": 2}, parent="20"),
        make(3, channels={"stable": 3}),
        make(4),
        make(5),
        make(6),
        make(7, verified_at=None, deadline_s=1),
        make(8, status="creating"),
        make(20, "stack"),
        make(21, "stack"),
        make(22, "stack"),
        make(23, "stack", input="wanted"),
        make(24, "stack", input="wanted"),
        make(25, "stack", deadline_s=5),
    ]
    reasons = keep_reasons(snapshots, running=[4], newest=1, wanted_inputs=["wanted"])
    gone = {each.id for each in snapshots} - reasons.keys()
    assert gone == {1, 5, 21, 22, 23}
    assert reasons[3] == "holds stable"
    assert reasons[2] == "stable goes back to it"
    assert reasons[4] == "a server runs it"
    assert reasons[6] == "one of the newest 1"
    assert reasons[20] == "an image that stays was baked on it"
    assert reasons[24] == "the next bake starts from it"


def test_the_newest_layer_of_a_model_stays_for_another_tree() -> None:
    """Who prunes from an old checkout does not cost the others a download."""
    snapshots = [make(1, "stack"), make(2, "stack"), make(3, "stack", model="llama")]
    assert set(keep_reasons(snapshots, [], 3, [])) == {2, 3}


def test_a_layer_that_is_not_finished_does_not_take_the_place_of_a_whole_one() -> None:
    """A bake that works on it, as with --again, may fail, and there would be none to start from."""
    old, again = make(1, "stack", input="wanted"), make(2, "stack", input="wanted", deadline_s=5)
    creating = make(3, "stack", input="wanted", status="creating")
    reasons = keep_reasons([old, again, creating], [], 3, ["wanted"])
    assert reasons[1] == "the next bake starts from it"
    assert set(reasons) == {1, 2, 3}


@pytest.mark.parametrize("name", ["stable", "beta-2", "x"])
def test_channel_names(name: str) -> None:
    """Words that can be labels beside bake's own."""
    assert is_channel_name(name)


@pytest.mark.parametrize("name", ["", "version", "verified-at", "2x", "-x", "x-", "a b", "ü", "x" * 33, "a/b"])
def test_names_that_are_no_channels(name: str) -> None:
    """What is a label of bake's own, or none at all."""
    assert not is_channel_name(name)


def test_labels_are_changed_and_kept() -> None:
    """What is not named stays as it is."""
    snapshot = make(1, labels={"a": "1", "deadline": "5"})
    assert with_labels(snapshot, "deadline", verified_at="x") == {"a": "1", "verified-at": "x"}


def test_a_time_fits_into_a_label() -> None:
    """No colon, and always UTC."""
    assert format_time(datetime.fromisoformat("2026-11-26T13:00:00+01:00")) == "20261126T120000Z"
