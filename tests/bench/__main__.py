"""Owns ``make bench``: every figure is measured beside its baseline in the same run, and stands against its goal."""

import json
import os
import selectors
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy

from service.engine import host
from tests.bench.model import MODELS, prompt_of, threads_of
from tests.bench.options import make_parser
from tests.ports import free_port
from tests.service.harness import FAKE, ROOT, Service, running_service, service_environment

ROUNDS = 12
LIMIT = 1_000_000  # never reached, always counted
PROMPT_LETTERS, ANSWER_TOKENS = 285, 64  # with the template's marks about 300 prompt tokens


_ECHO = """
import socket
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
body = b"x" * 300
answer = b"HTTP/1.1 200 OK\\r\\nContent-Length: 300\\r\\n\\r\\n" + body
while True:
    client, _ = listener.accept()
    while client.recv(65536):
        client.sendall(answer)
"""


@dataclass(frozen=True)
class Figure:
    """One line of the report; ``good`` is None where no goal was set."""

    what: str
    value: str
    goal: str
    good: bool | None


def median_ms(seconds: list[float]) -> float:
    return statistics.median(seconds) * 1000


def percentile_ms(seconds: list[float], share: float) -> float:
    return sorted(seconds)[min(len(seconds) - 1, int(len(seconds) * share))] * 1000


def raw_request(port: int, prompt: str, key: str | None = None) -> bytes:
    body = json.dumps({"prompt": prompt, "max_tokens": 1}).encode()
    head = f"POST /generate HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    if key is not None:
        head += f"Authorization: Bearer {key}\r\n"
    return (head + f"Content-Length: {len(body)}\r\n\r\n").encode() + body


def read_answer(client: socket.socket) -> bytes:
    """One answer with a Content-Length."""
    answer = b""
    while True:
        answer += client.recv(65536)
        head, separator, body = answer.partition(b"\r\n\r\n")
        if separator:
            length = next(
                int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")
            )
            if len(body) >= length:
                return answer


def times_s(port: int, request: bytes, count: int) -> list[float]:
    """Seconds of requests made one after the other on one kept connection."""
    seconds = []
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(count):
            start_s = time.perf_counter()
            client.sendall(request)
            answer = read_answer(client)
            seconds.append(time.perf_counter() - start_s)
            assert answer.startswith(b"HTTP/1.1 200"), answer[:300]
    return seconds


def requests_per_s(port: int, request: bytes, connections: int = 8, duration_s: float = 4.0) -> float:
    """Answers a second over kept connections, each with one request under way."""
    done, end_s = 0, time.perf_counter() + duration_s
    with selectors.DefaultSelector() as selector:
        clients = [socket.create_connection(("127.0.0.1", port)) for _ in range(connections)]
        for client in clients:
            selector.register(client, selectors.EVENT_READ)
            client.sendall(request)
        while time.perf_counter() < end_s:
            for key, _ in selector.select(0.1):
                answered = key.fileobj
                assert isinstance(answered, socket.socket)
                assert read_answer(answered).startswith(b"HTTP/1.1 200")
                done += 1
                answered.sendall(request)
        for client in clients:
            client.close()
    return done / duration_s


class Peer:
    """A baseline in a process of its own that answers lines."""

    def __init__(self, kind: str, model: Path):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.bench.peers", kind, str(model)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line == "ready\n":
                return
        raise SystemExit(f"the baseline {kind} did not start")

    def tokens_per_s(self, prompt: str) -> float:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"prompt": prompt, "max_tokens": ANSWER_TOKENS}) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        # gpt4all tells of no token that ends within a letter, so it may have made a few more than it counts.
        assert 0.9 * ANSWER_TOKENS < answer["tokens"] <= ANSWER_TOKENS, answer
        return ANSWER_TOKENS / float(answer["seconds"])

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@contextmanager
def echo_server() -> Iterator[int]:
    """A process that answers the same bytes to everything: what client, kernel and loopback cost by themselves."""
    with subprocess.Popen([sys.executable, "-c", _ECHO], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline())
        finally:
            process.kill()


@contextmanager
def fastapi_server(environment: dict[str, str]) -> Iterator[int]:
    port = free_port()
    command = [sys.executable, "-m", "tests.bench.peers", "fastapi", str(port)]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL) as process:
        try:
            end_s = time.monotonic() + 30
            while time.monotonic() < end_s:
                try:
                    socket.create_connection(("127.0.0.1", port)).close()
                    break
                except OSError:
                    time.sleep(0.1)
            yield port
        finally:
            process.kill()


def measure_start(rounds: int) -> Figure:
    """From the command to the last byte of the first answer, with everything set up: the starter model."""
    seconds = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            port = free_port()
            command = [sys.executable, "-m", "service", "serve"]
            environment = service_environment(Path(folder), port)
            start_s = time.perf_counter()
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            try:
                answer = b""
                while not answer.startswith(b"HTTP/1.1 200"):
                    assert time.perf_counter() - start_s < 60
                    time.sleep(0.02)  # asking without a pause would take the CPU that the start needs
                    try:
                        with socket.create_connection(("127.0.0.1", port)) as client:
                            client.sendall(raw_request(port, "What is mini-llm?"))
                            answer = read_answer(client)
                    except OSError:
                        continue  # not listening yet
                seconds.append(time.perf_counter() - start_s)
            finally:
                process.terminate()
                process.wait(20)
    median_s = statistics.median(seconds)
    return Figure("later start: from the command to a first token", f"{median_s:.1f} s", "≤ 3 s", median_s <= 3)


def measure_stack(rounds: int) -> Iterator[Figure]:
    """(a), (c): what the stack adds, beside FastAPI with the same core, and the web process's memory.

    Authentication, all limits of key and address, and the audit log are on; FastAPI has limits and nothing else of it.
    """
    with running_service(
        engine_adapter=FAKE,
        auth="keys",
        address_requests_per_minute=LIMIT,
        address_tokens_per_day=LIMIT,
        address_parallel=LIMIT,
    ) as service:
        limits = [f"--{name}={LIMIT}" for name in ("requests-per-minute", "tokens-per-day", "parallel")]
        request = raw_request(service.port, "say x", service.keys("add", "bench", *limits))
        with echo_server() as echo_port:
            times_s(service.port, request, 300)
            whole_ms, bare_ms = [], []
            for _ in range(rounds):
                whole_ms.append(median_ms(times_s(service.port, request, 500)))
                bare_ms.append(median_ms(times_s(echo_port, request, 500)))
        whole, bare = statistics.median(whole_ms), statistics.median(bare_ms)
        text = f"{whole - bare:.2f} ms ({whole:.2f} less {bare:.2f} of a bare socket)"
        yield Figure("time that the stack adds, keys, limits, audit on, p50", text, "≤ 1 ms", whole - bare <= 1)
        settings = {"model": service.environment["LLM_MODEL"], "engine_adapter": FAKE}
        environment = service_environment(service.state_dir, free_port(), **settings)
        with fastapi_server(environment) as port:
            other = raw_request(port, "say x")
            times_s(port, other, 300)
            both = ((service.port, request), (port, other))
            pairs = [[requests_per_s(*each) for each in both] for _ in range(min(3, rounds))]
        ours, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(a / b for a, b in pairs)
        text = f"{ratio:.2f} ({ours:.0f} to {theirs:.0f} requests/s)"
        yield Figure("requests/s over FastAPI + uvicorn, same core", text, "as found", None)
        resident_mb = service.web.memory_info().rss / 1e6
        yield Figure("web process, resident", f"{resident_mb:.0f} MB", "≤ 60 MB", resident_mb <= 60)


def measure_health(service: Service, model: str, duration_s: float) -> Figure:
    """(a): /health while a generation of this model runs."""
    stop = threading.Event()

    def generate() -> None:
        while not stop.is_set():
            service.generate(prompt_of(PROMPT_LETTERS), max_tokens=ANSWER_TOKENS)

    thread = threading.Thread(target=generate)
    thread.start()
    time.sleep(0.5)
    request = f"GET /health HTTP/1.1\r\nHost: 127.0.0.1:{service.port}\r\n\r\n".encode()
    seconds = []
    end_s = time.monotonic() + duration_s
    while time.monotonic() < end_s:
        seconds += times_s(service.port, request, 10)
        time.sleep(0.02)
    stop.set()
    thread.join()
    p99_ms = percentile_ms(seconds, 0.99)
    return Figure(f"/health while {model} generates, p99", f"{p99_ms:.1f} ms", "≤ 20 ms", p99_ms <= 20)


def read_bandwidth_gb_per_s() -> float:
    """What the host reads from memory with as many threads as the engine has: the ceiling of decoding.

    By BLAS's product of a vector with itself: numpy's sum adds more slowly than memory is read (30 to 38 GB/s).
    """
    part = numpy.ones(128_000_000, dtype=numpy.float32)
    parts = numpy.array_split(part, host.threads_here())
    best_s = float("inf")
    for _ in range(5):
        threads = [threading.Thread(target=piece.dot, args=(piece,)) for piece in parts]
        start_s = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        best_s = min(best_s, time.perf_counter() - start_s)
    return part.nbytes / best_s / 1e9


def measure_engine(model: Path, rounds: int) -> Iterator[Figure]:
    """(b): tokens a second through HTTP over the bare adapter, and over gpt4all's own generate()."""
    weights_gb = model.stat().st_size / 1e9
    prompt = prompt_of(PROMPT_LETTERS)
    with running_service(model=model) as service:

        def through_http() -> float:
            start_s = time.perf_counter()
            document = service.generate(prompt, max_tokens=ANSWER_TOKENS, temperature=0).json
            assert document["usage"]["completion_tokens"] == ANSWER_TOKENS, document
            return ANSWER_TOKENS / (time.perf_counter() - start_s)

        peers = {kind: Peer(kind, model) for kind in ("adapter", "gpt4all")}
        runs: dict[str, Callable[[], float]] = {
            "http": through_http,
            **{kind: partial(peer.tokens_per_s, prompt) for kind, peer in peers.items()},
        }
        seen: dict[str, list[float]] = {name: [] for name in runs}
        names = list(runs)
        for number in range(rounds + 1):
            names = [*names[1:], names[0]]  # nobody is always first
            for name in names:
                value = runs[name]()
                if number:  # the first round warms up
                    seen[name].append(value)
        for peer in peers.values():
            peer.close()
        for name, goal in (("adapter", 0.97), ("gpt4all", 1.1)):
            ratio = statistics.median(a / b for a, b in zip(seen["http"], seen[name], strict=True))
            what = {"adapter": "the bare adapter", "gpt4all": "gpt4all's generate()"}[name]
            rates = f"{statistics.median(seen['http']):.1f} to {statistics.median(seen[name]):.1f} tokens/s"
            yield Figure(f"tokens/s through HTTP over {what}", f"{ratio:.2f} ({rates})", f"≥ {goal}", ratio >= goal)
        document = service.generate("x", max_tokens=ANSWER_TOKENS, temperature=0).json
        decode = document["timings"]["tokens_per_second"]
        limit = read_bandwidth_gb_per_s() / weights_gb
        share = f"{decode:.1f} of {limit:.0f} tokens/s ({decode / limit:.0%})"
        yield Figure("decode against the memory's limit", share, "as found", None)
        yield measure_health(service, model.stem, min(15.0, 3.0 * rounds))


def main() -> int:
    options = make_parser("tests.bench", __doc__, rounds=ROUNDS, model="half-billion").parse_args()
    model = MODELS[options.model](ROOT / ".cache" / "bench")
    print(f"{os.cpu_count()} CPUs, {model.stem} with {threads_of(model)} threads; medians, baselines alternated")
    figures: list[Figure] = []
    few = min(5, options.rounds)
    for measure in (
        lambda: [measure_start(few)],
        lambda: measure_stack(few),
        lambda: measure_engine(model, options.rounds),
    ):
        for figure in measure():
            figures.append(figure)
            mark = {True: "good", False: "MISSED", None: ""}[figure.good]
            print(f"  {figure.what:52} {figure.value:52} {figure.goal:9} {mark}", flush=True)
    return 1 if any(figure.good is False for figure in figures) else 0


if __name__ == "__main__":
    sys.exit(main())
