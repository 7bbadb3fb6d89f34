"""`make bench-cloud`, once of everything: what it measures beside other tests is no figure, but it measures."""

from tests.typed import measure


def test_one_round(host: None) -> None:
    """Each of its figures is there, and took time."""
    names = ("create to SSH", "power-off and snapshot", "snapshot to SSH")
    assert min(measure('sudo make bench-cloud BENCH="--rounds 1"', 300, *names).values()) > 0
