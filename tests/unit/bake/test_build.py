"""The way from a candidate to a verified image, where others are at work beside."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from scripts.bake import build as build_module
from scripts.bake.build import Wishes, _Bake, _bake, _find_finished, _find_version, _plan
from scripts.bake.checks import Checked, Proof
from scripts.bake.cloud import Cloud
from scripts.bake.console import Console
from scripts.bake.errors import ChecksFailed, Refused
from scripts.bake.inputs import Model, Tree
from scripts.bake.preflight import Place, Places
from scripts.bake.runs import new_run
from scripts.bake.snapshots import LAYERS, Snapshot

Prove = Callable[[Snapshot], Proof]
FAILED = Proof([Checked("alerts", "alerts: InstanceDown", 0.1)], None, None)


@pytest.fixture
def bake_candidate(
    cloud: Cloud, state: Path, make_snapshot: Callable[..., Snapshot], monkeypatch: pytest.MonkeyPatch
) -> Callable[[Prove], Snapshot]:
    """Bakes with a candidate that is there already, and a proof of one's own; the candidate."""

    def bake(prove: Prove) -> Snapshot:
        with new_run(state) as run:
            candidate = make_snapshot(run=run.id, deadline=str(run.deadline_s))
            monkeypatch.setattr(build_module, "_adopt", lambda bake: candidate)
            monkeypatch.setattr(build_module, "prove_image", lambda *words: (prove(candidate), "cx23 at fsn1"))
            digests: Mapping[str, Any] = {}
            tree = Tree(state, "none", [], {}, Model("starter", "", 1, 2), digests)
            console, places = Console(state, "test"), Places([], [])
            with pytest.raises(ChecksFailed) as told:
                _bake(_Bake(Wishes(state), tree, cloud, state, console, run, "1", places, "1.14.2"))
            assert ("is gone" in told.value.hint) == (cloud.snapshot(candidate.id) is None)
            return candidate

    return bake


def test_a_candidate_that_fails_goes(cloud: Cloud, bake_candidate: Callable[[Prove], Snapshot]) -> None:
    """Nobody can launch it by mistake."""
    assert cloud.snapshot(bake_candidate(lambda candidate: FAILED).id) is None


def test_a_candidate_that_somebody_promoted_meanwhile_stays(
    cloud: Cloud, bake_candidate: Callable[[Prove], Snapshot]
) -> None:
    """By its id and --unverified: Terraform may have launched it by now."""

    def prove(candidate: Snapshot) -> Proof:
        cloud.relabel(candidate, "deadline", verified_at="20261126T120000Z", stable="1")
        return FAILED

    assert cloud.snapshot(bake_candidate(prove).id) is not None


def test_a_version_that_nobody_asked_for_is_free(make_snapshot: Callable[..., Snapshot], state: Path) -> None:
    """Also twice in one minute, as with --again; one that is asked for must be."""
    digests = dict.fromkeys(LAYERS, "0a1b2c3d" * 5)
    tree = Tree(state, "none", [], {}, Model("starter", "", 1, 2), digests)
    first = _find_version(Wishes(state), tree, [])
    taken = [make_snapshot(version=version, verified_at="20261126T120000Z") for version in ("1", first)]
    assert _find_version(Wishes(state), tree, taken) not in ("1", first)
    assert _find_version(Wishes(state, version="2"), tree, taken) == "2"
    with pytest.raises(Refused, match=f"image {taken[0].id} is called 1 already"):
        _find_version(Wishes(state, version="1"), tree, taken)


def test_a_layer_of_a_larger_disk_is_not_started_from(make_snapshot: Callable[..., Snapshot], state: Path) -> None:
    """It was baked where there was room; on a smaller server no bake could ever begin with it."""
    tree = Tree(state, "none", [], {}, Model("starter", "", 1, 2), dict.fromkeys(LAYERS, "0a1b2c3d" * 5))
    layer = make_snapshot(layer="stack", version="", input=tree.digests["stack"])
    assert layer.disk_gb == 40
    for disk_gb, segments in ((40, [("service", "service")]), (39, [("model", "stack"), ("service", "service")])):
        places = Places([Place("cx23", "fsn1", 20, 0.01), Place("cx23", "nbg1", disk_gb, 0.01)], [])
        bake = SimpleNamespace(wishes=Wishes(state), tree=tree, places=places)
        assert _plan(cast(Any, bake), [layer])[1] == segments
    newer = replace(layer, id=layer.id + 1, disk_gb=80)
    assert _find_finished([layer, newer], tree, "stack") == layer
    assert _find_finished([layer, replace(newer, disk_gb=40)], tree, "stack") != layer
