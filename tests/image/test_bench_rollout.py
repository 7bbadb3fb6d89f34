"""`make bench-rollout`: what it measures beside other tests is no figure, but it measures, and no request fails."""

from tests.typed import measure


def test_where_the_time_goes(host: None, programs: None) -> None:
    """Each part took time, and all of them together the most."""
    parts = ("create the server", "boot, take over, prove", "move both addresses", "drain, prove by name", "all of it")
    told = measure("sudo make bench-rollout", 600, *parts)
    assert min(told.values()) > 0
    assert max(told.values()) == told["all of it"]
