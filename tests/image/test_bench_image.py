"""`make bench-image`, some of it, once: what it measures beside other tests is no figure, but it measures."""

from tests.typed import measure


def test_one_round(host: None, tools: None) -> None:
    """All but the large model and the usual way."""
    names = (
        "power-on to first token",
        "create to first token",
        "create to first token, order at Pebble",
    )
    told = measure('sudo make bench-image BENCH="--rounds 1 --without large usual"', 600, *names)
    assert min(told.values()) > 0
