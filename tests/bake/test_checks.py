"""A snapshot that boots, but is not what it should be, is never called verified."""

import re
from collections.abc import Iterator

import pytest

from scripts.bake.answers import given
from tests.bake.harness import Bench, commit
from tests.bake.small.service.stand_in_node import MISBEHAVIOURS

# Which check tells.
TOLD_BY = {
    "wrong_answers": "generation",
    "open_port": "ports",
    "audit_finding": "audit",
    "alert": "alerts",
    "wrong_key_accepted": "keys",
    "never_ready": "ready",
    "metrics_routed": "https",
    "unit_failed": "units",
}
# What is waited for in vain, a minute or two as bake.py is.
NEVER_SAID = ("alert", "never_ready")
HASTY = ("-m", "tests.bake.hasty")


@pytest.fixture(scope="module", autouse=True)
def layers(bench: Bench) -> Iterator[None]:
    """A bake that passes, so that those to come start from its layers."""
    done = bench.run("build")
    assert done.code == 0, done
    assert len(bench.verified()) == 1
    yield
    bench.clear()


def test_each_way_to_misbehave_is_tried() -> None:
    """Those that the stand-in knows are those below."""
    assert set(TOLD_BY) == set(MISBEHAVIOURS)


def test_an_image_is_verified_again(bench: Bench) -> None:
    """By its number, on a server of its own, which is gone afterwards; it stays verified."""
    [image] = bench.verified()
    done = bench.run("verify", str(image.id))
    assert done.code == 0, done
    assert f"image {image.id} is verified: " in done.output
    assert [one.id for one in bench.verified()] == [image.id]
    assert bench.left() == []


@pytest.mark.parametrize(("way", "check"), TOLD_BY.items())
def test_it_is_not_verified(bench: Bench, way: str, check: str) -> None:
    """The bake fails, names the check, and leaves no verified image beside the good one."""
    good = {one.id for one in bench.verified()}
    word = bench.tree / "service" / "misbehave"
    word.write_text(f"{way}\n")
    commit(bench.tree, f"Misbehave: {way}")
    try:
        words = ("build", "--promote")
        done = bench.run(*words, program=HASTY) if way in NEVER_SAID else bench.run(*words)
    finally:
        word.unlink()
        commit(bench.tree, "Behave")
    assert done.code == 1, done
    told = re.search(r"^error: the image is not what it should be: (.*)", done.said, re.MULTILINE)
    assert told is not None, done
    # All other checks pass.
    assert re.findall(r"(?:^|; )([a-z]+): ", told[1]) == [check], done
    assert {one.id for one in bench.verified()} == good
    assert [one.id for one in bench.snapshots() if "stable" in given(one.labels)] == []
    swept = bench.run("sweep", "--yes")
    assert swept.code == 0, swept
    assert bench.left() == []
