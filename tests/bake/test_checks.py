"""A snapshot that boots, but is not what it should be, is never called verified."""

import re
from collections.abc import Iterator

import pytest

from scripts.bake.answers import given
from tests.bake.harness import Bench, commit
from tests.bake.small.service.stand_in_node import MISBEHAVIOURS

# Which check tells, and what; that each is enough by itself stands in tests/unit/bake/test_probe.py.
TOLD = {
    "wrong_answers": "generation: to .* it says 'Nobody knows.', not .*",
    "wrong_key_accepted": "keys: POST /generate by a wrong key says 200, not 401",
    "metrics_routed": "https: /metrics is routed to the outside: 200",
    "alert": "alerts: alerts: ServiceDown",
    "open_port": "ports: open to everybody: 8080",
    "audit_finding": "audit: /etc/left-behind: a private key",
    "unit_failed": "units: failed: stand-in-failure.service",
    "never_ready": "ready: not ready within .* s: .*",
}
# Before it is ready nothing else is asked, so that comes alone.
TOGETHER = (tuple(way for way in TOLD if way != "never_ready"), ("never_ready",))
# What is waited for in vain is so a minute or two as bake.py is.
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
    """Those that the stand-in knows are those above."""
    assert set(TOLD) == set(MISBEHAVIOURS)


def test_an_image_is_verified_again(bench: Bench) -> None:
    """By its number, on a server of its own, which is gone afterwards; it stays verified."""
    [image] = bench.verified()
    done = bench.run("verify", str(image.id))
    assert done.code == 0, done
    assert f"image {image.id} is verified: " in done.output
    assert [one.id for one in bench.verified()] == [image.id]
    assert bench.left() == []


def test_a_layer_is_baked_anew(bench: Bench) -> None:
    """For an update of Debian's: nothing has changed, and all but the model is made again."""
    before = {one.id for one in bench.snapshots()}
    done = bench.run("build", "--again", "base")
    assert done.code == 0, done
    made = [one for one in bench.snapshots() if one.id not in before]
    assert sorted(given(one.labels)["layer"] for one in made) == ["service", "stack"]
    for one in made:  # the tests below begin with what was there before
        one.delete()
    assert bench.left() == []


@pytest.mark.parametrize("ways", TOGETHER, ids=["all-at-once", "never-ready"])
def test_it_is_not_verified(bench: Bench, ways: tuple[str, ...]) -> None:
    """The bake fails, names each check that tells of it and no other, and leaves no other verified image."""
    good = {one.id for one in bench.verified()}
    words = bench.tree / "service" / "misbehave"
    words.write_text("\n".join(ways))
    commit(bench.tree, "Misbehave")
    try:
        done = bench.run("build", "--promote", program=HASTY)
    finally:
        words.unlink()
        commit(bench.tree, "Behave")
    assert done.code == 1, done
    told = re.search(r"^error: the image is not what it should be: (.*)", done.said, re.MULTILINE)
    assert told is not None, done
    assert re.fullmatch("; ".join(TOLD[way] for way in ways), told[1]), done
    assert {one.id for one in bench.verified()} == good
    assert [one.id for one in bench.snapshots() if "stable" in given(one.labels)] == []
    swept = bench.run("sweep", "--yes")
    assert swept.code == 0, swept
    assert bench.left() == []
