"""A layer whose bake fails: what is tried again, after which pause, and what is told."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from scripts.bake import build
from scripts.bake.errors import LayerFailed, Unavailable
from scripts.bake.packer import PackerEnded
from scripts.bake.preflight import Place
from scripts.bake.relay import CallFailed

PLACES = [Place("cx23", "fsn1", 40, 0.01), Place("cx23", "nbg1", 40, 0.01)]


class Bench:
    """A bake whose Packer always ends as told; remembers pauses, lines and where it baked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, ended: PackerEnded, failures: list[CallFailed]):
        self.pauses_s: list[float] = []
        self.said: list[str] = []
        self.places: list[str] = []

        class Relay:
            endpoint, token = "http://127.0.0.1:1/v1", "x"

            def __init__(self, *words: Any):
                self.failures = failures

            @contextmanager
            def opened(self) -> Iterator[None]:
                yield

        def run_packer(run: Any, template: Any, variables: dict[str, Any], *more: Any) -> None:
            self.places.append(variables["location"])
            raise ended

        monkeypatch.setattr(build, "Relay", Relay)
        monkeypatch.setattr(build.packer, "build", run_packer)
        monkeypatch.setattr(build, "servers_of", lambda cloud, run: [])
        monkeypatch.setattr(build, "_find_made", lambda *words: None)
        monkeypatch.setattr(build, "_variables", lambda bake, first, last, start, place: {"location": place.location})
        monkeypatch.setattr(build.time, "sleep", self.pauses_s.append)

    def bake(self) -> None:
        console = SimpleNamespace(say=self.said.append, show=lambda text: None)
        run = SimpleNamespace(labels={}, deadline_s=1e12)
        tree, places = SimpleNamespace(folder=Path("/")), SimpleNamespace(bake=PLACES)
        made: Any = SimpleNamespace(
            cloud=SimpleNamespace(access=None), run=run, places=places, tree=tree, console=console
        )
        build._bake_segment(made, "model", "stack", None)


def test_what_is_outside_is_given_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A script that says so is tried again after growing pauses; the last word names what may help."""
    lines = ["ERROR: No matching distribution", "Build 'x' errored after 2 seconds"]
    bench = Bench(monkeypatch, PackerEnded(lines, 75), [])
    with pytest.raises(LayerFailed, match="No matching distribution") as told:
        bench.bake()
    assert bench.pauses_s == [5, 10, 20]
    assert len(bench.places) == 4
    assert "it said: ERROR: No matching distribution" in bench.said[0]
    assert "--extra-ca-file" in told.value.hint


def test_what_a_script_calls_wrong_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be so each time, and each time costs a server."""
    bench = Bench(monkeypatch, PackerEnded(["E: Unable to locate package"], 100), [])
    with pytest.raises(LayerFailed, match="Unable to locate package"):
        bench.bake()
    assert (len(bench.places), bench.pauses_s) == (1, [])


def test_where_there_is_no_room_the_next_place_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """In their order, each once."""
    no_room = CallFailed("POST /servers", "resource_unavailable", "no", "")
    bench = Bench(monkeypatch, PackerEnded([], None), [no_room])
    with pytest.raises(Unavailable):
        bench.bake()
    assert bench.places == ["fsn1", "nbg1"]
