"""`make bench` and `make bench-servers`, once of everything: no figures beside other tests, but they measure."""

from tests.typed import measure


def test_one_round() -> None:
    """Each of the figures is there, and is more than nothing."""
    names = (
        "later start: from the command to a first token",
        "time that the stack adds, keys, limits, audit on, p50",
        "requests/s over FastAPI + uvicorn, same core",
        "web process, resident",
        "tokens/s through HTTP over the bare adapter",
        "tokens/s through HTTP over gpt4all's generate()",
        "decode against the memory's limit",
        "/health while talkative-q4_0 generates, p99",
    )
    assert min(measure('make bench BENCH="--rounds 1 --model talkative"', 300, *names).values()) > 0


def test_one_life_of_the_server() -> None:
    """Without its peers, whose builds take long."""
    options = "--rounds 1 --model talkative --without llama-server Ollama"
    told = measure(f'make bench-servers BENCH="{options}"', 300, "mini-llm ended by SIGTERM alone, without its drain:")
    assert told
