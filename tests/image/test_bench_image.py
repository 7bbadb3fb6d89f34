"""`make bench-image`, once of everything but the large model: no figures beside other tests, but it measures."""

from tests.typed import measure


def test_one_round(host: None, programs: None) -> None:
    """A node comes sooner than the usual way, whatever else runs here."""
    names = (
        "power-on to first token",
        "create to first token",
        "create to first token, order at Pebble",
        "the usual way / create, order at Pebble",
    )
    told = measure('sudo make bench-image BENCH="--rounds 1 --without large"', 600, *names)
    assert min(told.values()) > 0
    assert told["the usual way / create, order at Pebble"] > 1
