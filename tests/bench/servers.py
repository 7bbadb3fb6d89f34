"""Owns ``make bench-servers``: mini-llm over HTTP beside the servers that the README names, all with the same model.

Each server is started alone, measured from its start to its end, and the next one follows; every round begins with
another one, and ratios are of one round each.
"""

import hashlib
import http.client
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.bench.__main__ import ANSWER_TOKENS, read_bandwidth_gb_per_s
from tests.bench.model import CONTEXT_LENGTH, MODELS, threads_of
from tests.bench.options import make_parser
from tests.bench.peer_builds import llama_cpp_build, obtain_llama_server, obtain_ollama
from tests.ports import free_port
from tests.programs import OLLAMA, ProgramMissing
from tests.service.harness import ROOT, service_environment

PROMPT_LETTERS = 300
CLIENTS = 4
ROUNDS = 5
_START_S, _ANSWER_S, _STOP_S = 120.0, 300.0, 90.0
_PIECES_UNDER_WAY = 8  # of all clients together: then answers have begun, and none has ended
_ENDINGS = (signal.SIGINT, signal.SIGTERM)
_OURS = "mini-llm"
_MODEL = "bench"  # what it is asked for by


class NotMeasured(Exception):
    """A server did not do what is measured; the message says what it did."""


@dataclass(frozen=True)
class Server:
    """How one of those compared is started; ``drain`` is what is done before SIGTERM, by its own README."""

    name: str
    version: str
    command: Callable[[int], list[str]]
    environment: Callable[[int], dict[str, str]]
    drain: tuple[str, ...] = ()


@dataclass(frozen=True)
class Seen:
    """One streamed answer as its client saw it; ``whole`` if it came to the end that was asked for."""

    first_s: float | None = None
    last_s: float | None = None
    prompt_tokens: int = 0
    tokens: int = 0
    whole: bool = False


@dataclass
class Life:
    """What was measured of one server from its start to its end."""

    start_s: float = 0.0
    memory_mb: float = 0.0
    prefill_s: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    together: float = 0.0
    whole: int = 0
    prompt_tokens: int = 0


@dataclass(frozen=True)
class Row:
    """One figure of the report, of each server's lives; ``limit`` is what the machine itself allows."""

    what: str
    form: str
    value: Callable[[Life], float]
    limit: str = ""


def prompt(number: int) -> str:
    """A prompt that begins like no other, so that nobody has read a part of it before; its letters are a token each."""
    dice = random.Random(number)
    return "".join(dice.choices("bcdfgjklmpqsuvwxyz", k=PROMPT_LETTERS))


def read_stream(lines: Iterator[bytes], clock: Callable[[], float]) -> Seen:
    """What OpenAI's events told: when the first and the last piece of text came, the counts, and whether it ended."""
    first_s = last_s = None
    prompt_tokens = tokens = 0
    finished = done = False
    for line in lines:
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]":
            done = True
            break
        event = json.loads(data)
        for choice in event.get("choices", ()):
            if choice.get("text"):
                last_s = clock()
                first_s = last_s if first_s is None else first_s
            finished = finished or choice.get("finish_reason") in ("length", "stop")
        if event.get("usage"):
            prompt_tokens = event["usage"]["prompt_tokens"]
            tokens = event["usage"]["completion_tokens"]
    return Seen(first_s, last_s, prompt_tokens, tokens, finished and done)


def ask(port: int, text: str, max_tokens: int, on_piece: Callable[[], None] = lambda: None) -> Seen:
    """One streamed completion; a connection that breaks is an answer that did not come whole."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_ANSWER_S)
    body = {"model": _MODEL, "prompt": text, "max_tokens": max_tokens, "temperature": 0}
    options = {"stream": True, "stream_options": {"include_usage": True}}

    def clock() -> float:
        on_piece()
        return time.perf_counter()

    try:
        connection.request("POST", "/v1/completions", json.dumps(body | options), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            response.read()
            return Seen()
        return read_stream(iter(response.readline, b""), clock)
    except (OSError, http.client.HTTPException):
        return Seen()
    finally:
        connection.close()


def ask_at_once(port: int, numbers: list[int], on_piece: Callable[[], None] = lambda: None) -> list[Seen]:
    """The answers of clients that ask at the same time."""
    answers: list[Seen] = []
    clients = [
        threading.Thread(target=lambda n=n: answers.append(ask(port, prompt(n), ANSWER_TOKENS, on_piece)), daemon=True)
        for n in numbers
    ]
    for client in clients:
        client.start()
    for client in clients:
        client.join(_ANSWER_S + _START_S)
    return answers


@contextmanager
def started(server: Server, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """The server's process; afterwards it and all that it started are gone."""
    process = subprocess.Popen(
        server.command(port),
        cwd=ROOT,
        env=server.environment(port),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    family: list[psutil.Process] = []
    try:
        yield process
    finally:
        with suppress(psutil.NoSuchProcess):
            family = psutil.Process(process.pid).children(recursive=True)
        if process.poll() is None:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(20)
        if process.poll() is None:
            process.kill()
            process.wait()
        for survivor in psutil.wait_procs(family, timeout=5)[1]:
            survivor.kill()
        with suppress(ProcessLookupError):  # whoever is left of its session, if it ended before its children
            os.killpg(process.pid, signal.SIGKILL)


def wait_for_token(process: subprocess.Popen[bytes], port: int) -> float:
    """When the first token came; asks as soon as somebody listens, again and again, up to a deadline."""
    end_s = time.perf_counter() + _START_S
    while time.perf_counter() < end_s:
        if process.poll() is not None:
            raise NotMeasured(f"it ended with {process.returncode} instead of serving")
        seen = ask(port, "What is mini-llm?", 1)
        if seen.first_s is not None:
            return seen.first_s
        time.sleep(0.02)  # asking without a pause would take the CPU that the start needs
    raise NotMeasured(f"it gave no token within {_START_S:.0f} s")


def resident_mb(process: subprocess.Popen[bytes]) -> float:
    """Memory of a process and all that it started; what they share counts once."""
    parent = psutil.Process(process.pid)
    return sum(each.memory_full_info().pss for each in (parent, *parent.children(recursive=True))) / 1e6


def end_while_streaming(
    server: Server, process: subprocess.Popen[bytes], port: int, numbers: list[int], drain: bool = True
) -> int:
    """How many of the answers that run or wait come whole when the server is ended."""
    streaming, answers = threading.Semaphore(0), []
    clients = threading.Thread(
        target=lambda: answers.extend(ask_at_once(port, numbers, streaming.release)), daemon=True
    )
    clients.start()
    for _ in range(_PIECES_UNDER_WAY):
        if not streaming.acquire(timeout=_ANSWER_S):
            raise NotMeasured(f"it gave no answers to {len(numbers)} clients at once")
    if drain and server.drain:
        environment = server.environment(port)
        subprocess.run(server.drain, cwd=ROOT, env=environment, capture_output=True, timeout=_STOP_S, check=True)
    process.send_signal(signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(_STOP_S)
    clients.join(_STOP_S)
    return sum(each.whole and each.tokens == ANSWER_TOKENS for each in answers)


def live(server: Server, first_number: int) -> Life:
    """One life of a server, with prompts of its own."""
    life, port, begun_s = Life(), free_port(), time.perf_counter()
    with started(server, port) as process:
        life.start_s = wait_for_token(process, port) - begun_s
        life.memory_mb = resident_mb(process)
        for number in range(first_number, first_number + 3):
            asked_s = time.perf_counter()
            seen = ask(port, prompt(number), ANSWER_TOKENS)
            if seen.first_s is None or seen.last_s is None or seen.tokens != ANSWER_TOKENS:
                raise NotMeasured(f"it gave no answer of {ANSWER_TOKENS} tokens: {seen}")
            life.prefill_s.append(seen.first_s - asked_s)
            life.decode.append((seen.tokens - 1) / (seen.last_s - seen.first_s))
            life.prompt_tokens = seen.prompt_tokens
        asked_s = time.perf_counter()
        answers = ask_at_once(port, list(range(first_number + 10, first_number + 10 + CLIENTS)))
        life.together = sum(each.tokens for each in answers) / (time.perf_counter() - asked_s)
        if sum(each.whole for each in answers) != CLIENTS:
            raise NotMeasured(f"it did not answer all of {CLIENTS} clients at once: {answers}")
        numbers = list(range(first_number + 20, first_number + 20 + CLIENTS))
        life.whole = end_while_streaming(server, process, port, numbers)
    return life


def mini_llm(model: Path, folder: Path) -> Server:
    """This checkout, as an image runs it, its golden answer recorded."""
    state = folder / "mini-llm"
    state.mkdir()

    def environment(port: int) -> dict[str, str]:
        alike = {"threads": threads_of(model), "context_length": CONTEXT_LENGTH, "model_name": _MODEL}
        return service_environment(state, port, model=model, **alike)

    record = [sys.executable, "-m", "service", "record"]
    subprocess.run(record, cwd=ROOT, env=environment(free_port()), capture_output=True, timeout=_START_S, check=True)
    command = [sys.executable, "-m", "gunicorn", "-c", "service/gunicorn.conf.py"]
    drain = (sys.executable, "-m", "service", "drain")
    return Server(_OURS, "this checkout", lambda port: command, environment, drain)


def llama_server(model: Path, folder: Path) -> Server:
    """With its own defaults, four answers at a time, but for threads and context length."""
    threads = str(threads_of(model))
    command = [str(obtain_llama_server()), "--model", str(model), "--host", "127.0.0.1", "--offline"]
    command += ["--threads", threads, "--threads-batch", threads, "--ctx-size", str(CONTEXT_LENGTH)]
    environment = {**os.environ, "HOME": str(folder)}
    return Server(
        "llama-server",
        f"of llama.cpp b{llama_cpp_build()}",
        lambda port: [*command, "--port", str(port)],
        lambda port: environment,
    )


def ollama(model: Path, folder: Path) -> Server:
    """With four answers at a time, which it does not do by itself; the model is taken into its store first."""
    program = str(obtain_ollama())
    state = folder / "ollama"
    state.mkdir()

    def environment(port: int) -> dict[str, str]:
        mine = {name: value for name, value in os.environ.items() if not name.startswith("OLLAMA_")}
        own = {"HOST": f"127.0.0.1:{port}", "MODELS": str(state), "NUM_PARALLEL": str(CLIENTS), "NO_CLOUD": "1"}
        return mine | {"HOME": str(state)} | {f"OLLAMA_{name}": value for name, value in own.items()}

    server = Server("Ollama", OLLAMA.version, lambda port: [program, "serve"], environment)
    port = free_port()
    with started(server, port):
        _give_to_ollama(port, model)
    return server


def _give_to_ollama(port: int, model: Path) -> None:
    with model.open("rb") as file:
        digest = f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
    parameters = {"num_thread": threads_of(model), "num_ctx": CONTEXT_LENGTH}
    # Prompts as they are, like the others' completions: it would guess a template and put it around them.
    as_it_is = {"parameters": parameters, "template": "{{ .Prompt }}"}
    create = {"model": _MODEL, "files": {model.name: digest}, "stream": False, **as_it_is}
    end_s = time.monotonic() + 30
    while True:
        try:
            with model.open("rb") as file:
                _post(port, f"/api/blobs/{digest}", file)
            break
        except ConnectionRefusedError:
            if time.monotonic() > end_s:
                raise NotMeasured("it did not listen within 30 s") from None
            time.sleep(0.1)
    _post(port, "/api/create", json.dumps(create))


def _post(port: int, path: str, body: Any) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_START_S)
    try:
        connection.request("POST", path, body)
        response = connection.getresponse()
        said = response.read()
        if response.status not in (200, 201):
            raise NotMeasured(f"{path}: {response.status} {said[:300]!r}")
    finally:
        connection.close()


_PEERS = {"llama-server": llama_server, "Ollama": ollama}


def reading_s(path: Path) -> float:
    """What reading a file takes that the kernel holds already."""
    buffer, begun_s = bytearray(1 << 22), time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return time.perf_counter() - begun_s


def rows_of(model: Path) -> list[Row]:
    """The figures, each with what the machine allows where that can be told."""
    weights_gb = model.stat().st_size / 1e9
    limit = read_bandwidth_gb_per_s() / weights_gb
    reading_s(model)
    read = f"{reading_s(model):.2f} s, to read the file from memory"
    return [
        Row("from the process's start to the first token", "{:.2f} s", lambda life: life.start_s, read),
        Row("to the first token of a prompt of 300", "{:.2f} s", lambda life: statistics.median(life.prefill_s)),
        Row(
            "tokens/s of one client, once it writes",
            "{:.1f}",
            lambda life: statistics.median(life.decode),
            f"{limit:.0f}, as fast as memory is read",
        ),
        Row(f"tokens/s of {CLIENTS} clients at once, prompts read", "{:.1f}", lambda life: life.together),
        Row(
            f"whole answers of {CLIENTS} when it is ended",
            "{:.0f}",
            lambda life: life.whole,
            f"{CLIENTS}",
        ),
        Row(
            "resident memory, all processes, model loaded",
            "{:.0f} MB",
            lambda life: life.memory_mb,
            f"{weights_gb * 1000:.0f} MB of weights",
        ),
    ]


def report(rows: list[Row], lives: dict[str, list[Life]], missing: dict[str, str], base: str) -> Iterator[str]:
    """Lines: under each figure every server, the ratio of ``base`` to it as the median over rounds, and its span."""
    for row in rows:
        yield f"{row.what}{f'  (limit: {row.limit})' if row.limit else ''}"
        ours = [row.value(life) for life in lives[base]]
        for name, their_lives in lives.items():
            values = [row.value(life) for life in their_lives]
            shown = row.form.format(statistics.median(values))
            span = f"{row.form.format(min(values))} to {row.form.format(max(values))}"
            line = f"  {name:14} {shown:>10}   {span:22}"
            pairs = [(a, b) for a, b in zip(ours, values, strict=True) if b]
            if name != base and pairs:
                line += f"  {base} over it: {statistics.median(a / b for a, b in pairs):.2f}"
            yield line.rstrip()
        for name, reason in missing.items():
            yield f"  {name:14} not measured: {reason}"


def measure(model: Path, rounds: int, without: list[str]) -> int:
    """Prints all of it; the exit code tells whether this checkout itself could be measured."""
    servers: list[Server] = []
    missing = dict.fromkeys(without, "it was left out")
    with tempfile.TemporaryDirectory() as name:
        for peer, recipe in {_OURS: mini_llm, **_PEERS}.items():
            if peer in missing:
                continue
            try:
                servers.append(recipe(model, Path(name)))
            except (ProgramMissing, NotMeasured) as error:
                missing[peer] = str(error)
        before = f"load {os.getloadavg()[0]:.1f} before"
        print(f"{os.cpu_count()} CPUs, {threads_of(model)} threads, {before}; {model.name}")
        print(", ".join(f"{server.name} {server.version}" for server in servers), flush=True)
        lives: dict[str, list[Life]] = {server.name: [] for server in servers}
        for number in range(rounds):
            servers = [*servers[1:], servers[0]]  # nobody is always first
            for place, server in enumerate(list(servers)):
                try:
                    lives[server.name].append(live(server, 1000 * number + 100 * place))
                except NotMeasured as error:
                    missing[server.name] = str(error)
                    servers.remove(server)
                    del lives[server.name]
            print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
        ours = [server for server in servers if server.name == _OURS]
        if not ours:
            print(f"{_OURS}: {missing[_OURS]}")
            return 1
        told = {server: each[-1].prompt_tokens for server, each in lives.items()}
        print(f"prompt tokens by their own counts: {told}; {ANSWER_TOKENS} tokens of answer, temperature 0")
        print("\n".join(report(rows_of(model), lives, missing, _OURS)), flush=True)
        ended = [_end_at_once(ours[0], 100_000 + 100 * number) for number in range(rounds)]
        print(f"{_OURS} ended by SIGTERM alone, without its drain: whole of {CLIENTS}: {ended}")
        return 0


def _end_at_once(server: Server, number: int) -> int:
    port = free_port()
    with started(server, port) as process:
        wait_for_token(process, port)
        return end_while_streaming(server, process, port, list(range(number, number + CLIENTS)), drain=False)


def end_once(number: int, frame: object) -> None:
    """Ends this program; while it ends what it started, which has its deadline, a second signal does not end it."""
    for each in _ENDINGS:
        signal.signal(each, signal.SIG_IGN)
    sys.exit(128 + number)


def main() -> int:
    parser = make_parser("tests.bench.servers", __doc__, rounds=ROUNDS, parts=list(_PEERS), model="half-billion")
    arguments = parser.parse_args()
    for number in _ENDINGS:
        signal.signal(number, end_once)
    return measure(MODELS[arguments.model](ROOT / ".cache" / "bench"), arguments.rounds, arguments.without)


if __name__ == "__main__":
    sys.exit(main())
