"""Where a bake and its proof may stand, and what is warned of."""

from pathlib import Path

import pytest

from scripts.bake.answers import given
from scripts.bake.cloud import Cloud
from scripts.bake.errors import Refused
from scripts.bake.inputs import Model, Tree
from scripts.bake.preflight import (
    check_tree,
    find_places,
    forget_limit,
    price_of_bake,
    project_id,
    remember_limit,
    warn_of_limit,
)


def make_tree(memory_gb: int = 2, size_bytes: int = 0, dirty: tuple[str, ...] = ()) -> Tree:
    model = Model("m", "", size_bytes, memory_gb)
    return Tree(Path("/"), "c0ffee", list(dirty), {"base_image": "debian-13"}, model, {})


def test_the_cheapest_that_fits_comes_first_at_each_location(cloud: Cloud) -> None:
    """Both for the bake and for the proof; the bake's disk is never larger than the node's."""
    places = find_places(cloud.server_types(), make_tree(), [], "", "")
    assert [(each.server_type, each.location) for each in places.bake[:3]] == [
        ("cx23", "fsn1"),
        ("cx23", "nbg1"),
        ("cx23", "hel1"),
    ]
    assert places.probe[0].server_type == "cx23"
    assert {each.disk_gb for each in places.bake} == {40}
    large = find_places(cloud.server_types(), make_tree(memory_gb=8, size_bytes=4_700_000_000), ["hel1"], "", "")
    assert (large.bake[0].server_type, large.bake[0].location) == ("cx33", "hel1")


def test_types_by_name(cloud: Cloud) -> None:
    """Just these, and only if the image will fit."""
    places = find_places(cloud.server_types(), make_tree(), ["fsn1"], "cx23", "ccx13")
    assert [each.server_type for each in places.bake] == ["cx23"]
    assert [each.server_type for each in places.probe] == ["ccx13"]
    for bake, node, problem in (
        ("cx21", "", "no server type cx21"),
        ("cx33", "cx23", "does not fit on a node of 40 GB"),
    ):
        with pytest.raises(Refused, match=problem):
            find_places(cloud.server_types(), make_tree(), ["fsn1"], bake, node)
    with pytest.raises(Refused, match="has 40 GB, 58 GB are needed"):
        find_places(cloud.server_types(), make_tree(size_bytes=50_000_000_000), ["fsn1"], "cx23", "ccx13")
    with pytest.raises(Refused, match="is offered at mars"):
        find_places(cloud.server_types(), make_tree(), ["mars"], "", "")


def test_what_is_sold_out_is_not_asked_for(cloud: Cloud) -> None:
    """As the price list says it."""
    offered = cloud.server_types()
    for each in offered:
        if each.name == "cx23":
            for place in given(each.locations):
                place.available = place.location.name == "hel1"
    places = find_places(offered, make_tree(), [], "", "cx23")
    assert [each.location for each in places.probe] == ["hel1"]


def test_the_price_is_that_of_the_list(cloud: Cloud) -> None:
    """An hour of each server, and a month of the snapshot."""
    places = find_places(cloud.server_types(), make_tree(), ["fsn1"], "cx23", "cx33")
    price = price_of_bake(places, 2, 10.0, cloud.pricing())
    assert price["once_eur"] == pytest.approx(2 * 0.0088 + 0.0136, abs=1e-4)
    assert price["monthly_eur"] == pytest.approx(10 * float(cloud.pricing()["image"]["price_per_gb_month"]["net"]))


def test_a_dirty_tree_must_be_meant() -> None:
    """It says what differs."""
    check_tree(make_tree(), dirty_allowed=False)
    dirty = make_tree(dirty=("a", "b", "c", "d"))
    check_tree(dirty, dirty_allowed=True)
    with pytest.raises(Refused, match="differs from its commit: a, b, c and 1 more"):
        check_tree(dirty, dirty_allowed=False)


def test_a_limit_that_was_hit_is_warned_of(state: Path) -> None:
    """Until there are fewer servers, or one could be made; of this project alone."""
    remember_limit(state, "p", 5, 0)
    assert warn_of_limit(state, "p", 4) is None
    assert warn_of_limit(state, "q", 9) is None
    warning = warn_of_limit(state, "p", 5)
    assert warning is not None
    assert "5 are there now" in warning
    forget_limit(state, "p")
    assert warn_of_limit(state, "p", 5) is None


def test_a_projects_name_does_not_tell_its_token() -> None:
    """And is the same each time."""
    assert project_id("token") == project_id("token") != project_id("other")
    assert "token" not in project_id("token")
