"""`make bench-bake`, some of it: what it measures beside other tests is no figure, but it measures."""

from tests.typed import measure


def test_a_bake_and_what_is_spared(host: None, programs: None) -> None:
    """Where nothing has changed next to nothing is done."""
    names = ("nothing there", "nothing changed")
    told = measure('sudo make bench-bake BENCH="--without packer stack service"', 600, *names)
    assert told["nothing changed"] < told["nothing there"]
