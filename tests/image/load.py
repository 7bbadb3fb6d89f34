"""Owns the load of a rollout's test: what clients ask, over which connections, and what came of each request."""

import json
import ssl
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

_TIMEOUT_S = 180.0


@dataclass(frozen=True)
class Way:
    """How a client reaches the service: at which address, in which HTTP, and whether it keeps its connection."""

    address: str
    http2: bool
    kept: bool


@dataclass(frozen=True)
class Asked:
    """One request: what it was, how it ended (``ok``, or why not), how long it took, how many tokens it was given.

    ``connect_s`` is the time until a new connection was there, with TLS, ``tcp_s`` of it without; None for one that
    was there already.
    """

    kind: str
    way: Way
    end: str
    began_s: float
    took_s: float
    tokens: int = 0
    connect_s: float | None = None
    tcp_s: float | None = None


@dataclass
class Load:
    """Clients that ask until they are told to stop."""

    domain: str
    key: str
    authority: Path  # of the service's certificate
    seen: list[Asked] = field(default_factory=list)

    def _client(self, way: Way) -> httpx2.Client:
        host = f"[{way.address}]" if ":" in way.address else way.address
        limits = httpx2.Limits(max_keepalive_connections=1 if way.kept else 0)
        return httpx2.Client(
            base_url=f"https://{host}",
            verify=ssl.create_default_context(cafile=self.authority),
            limits=limits,
            timeout=_TIMEOUT_S,
            trust_env=False,
            headers={"Host": self.domain, "Authorization": f"Bearer {self.key}"},
        )

    def _repeat_by_curl(self, over: threading.Event, kind: str, way: Way, every_s: float, body: str | None) -> None:
        """HTTP/2, by curl: httpx gives up on an answer in flight when it hears GOAWAY, which lets it finish."""
        host = f"[{way.address}]" if ":" in way.address else way.address
        path, number = ("/v1/models" if body is None else "/generate"), (5 if way.kept else 1)
        with tempfile.TemporaryDirectory() as folder:
            outputs = [Path(folder) / f"{each}" for each in range(number)]
            command = ["curl", "-s", "--http2", "--max-time", f"{_TIMEOUT_S}", "--cacert", str(self.authority)]
            command += ["--resolve", f"{self.domain}:443:{host}", "-H", f"Authorization: Bearer {self.key}"]
            command += [] if body is None else ["-H", "Content-Type: application/json", "-d", body]
            command += [
                "-w",
                "%{http_code} %{http_version} %{num_connects} %{time_connect} %{time_appconnect} %{time_total}"
                " %{exitcode}\n",
            ]
            for output in outputs:
                command += ["-o", str(output), f"https://{self.domain}{path}"]
            while not over.is_set():
                for output in outputs:
                    output.unlink(missing_ok=True)
                began_s = time.monotonic()
                try:
                    done = subprocess.run(command, capture_output=True, text=True, timeout=number * _TIMEOUT_S)
                    for line, output in zip(done.stdout.splitlines(), outputs, strict=True):
                        self.seen.append(_read_curl(kind, way, began_s, line, output))
                except (subprocess.TimeoutExpired, OSError, ValueError) as error:
                    self.seen.append(Asked(kind, way, f"curl: {error}"[:200], began_s, time.monotonic() - began_s))
                over.wait(max(0.0, began_s + number * every_s - time.monotonic()))

    def _ask(self, client: httpx2.Client, kind: str, way: Way, send: Callable[..., int]) -> None:
        began_s, connecting = time.monotonic(), dict[str, float]()

        def trace(event: str, info: object) -> None:
            connecting[event] = time.monotonic()

        try:
            tokens, end = send(client, {"sni_hostname": self.domain, "trace": trace}), "ok"
        except Exception as error:  # whatever it was, the client did not get its answer
            tokens, end = 0, f"{type(error).__name__}: {error}"[:200]
        now_s = time.monotonic()
        begun_s = connecting.get("connection.connect_tcp.started", now_s)
        done_s = [connecting.get(f"connection.{step}.complete") for step in ("start_tls", "connect_tcp")]
        connect_s, tcp_s = (None if each_s is None else each_s - begun_s for each_s in done_s)
        self.seen.append(Asked(kind, way, end, began_s, now_s - began_s, tokens, connect_s, tcp_s))

    def _repeat(self, over: threading.Event, kind: str, way: Way, every_s: float, send: Callable[..., int]) -> None:
        client = self._client(way)
        try:
            while not over.is_set():
                next_s = time.monotonic() + every_s
                self._ask(client, kind, way, send)
                if not way.kept:
                    client.close()
                    client = self._client(way)
                over.wait(max(0.0, next_s - time.monotonic()))
        finally:
            client.close()

    @contextmanager
    def running(self, tokens: int, ways: dict[str, list[tuple[Way, float]]]) -> Iterator["Load"]:
        """Clients ask meanwhile, by kind: ``stream``, ``short``, ``look``; each way with its interval in seconds."""
        over = threading.Event()
        sends = {"stream": make_stream(tokens), "short": make_stream(1), "look": look}
        bodies = {"stream": make_body(tokens), "short": make_body(1), "look": None}
        threads = [
            threading.Thread(target=self._repeat_by_curl, args=(over, kind, way, every_s, bodies[kind]))
            if way.http2
            else threading.Thread(target=self._repeat, args=(over, kind, way, every_s, sends[kind]))
            for kind, listed in ways.items()
            for way, every_s in listed
        ]
        for thread in threads:
            thread.start()
            time.sleep(0.05)
        try:
            yield self
        finally:
            over.set()
            for thread in threads:
                thread.join(_TIMEOUT_S)
            asking = [thread for thread in threads if thread.is_alive()]
            self.seen += [Asked("client", Way("", False, False), "it still waits", 0.0, _TIMEOUT_S) for _ in asking]

    def failed(self) -> list[Asked]:
        return [one for one in self.seen if one.end != "ok"]

    def print_failed(self, start_s: float) -> None:
        """Each that failed, with when it began, in seconds after ``start_s``, and how long it took."""
        for one in self.failed():
            print(f"{one.began_s - start_s:.2f} + {one.took_s:.2f} s: {one.kind} {one.way} {one.end}")

    def print_slow(self, start_s: float) -> None:
        """Each new connection of more than a second, likewise: what TCP took of it, and the request as a whole."""
        for one in self.seen:
            if one.connect_s is not None and one.connect_s > 1.0:
                times = f"TCP {one.tcp_s:.2f} s, with TLS {one.connect_s:.2f} s, in all {one.took_s:.2f} s"
                print(f"{one.began_s - start_s:.2f} s: {one.kind} {one.way} {times}")

    def describe(self) -> str:
        """What is to be seen of it in one line a kind."""
        lines = []
        for kind in ("stream", "short", "look", "client"):
            mine = [one for one in self.seen if one.kind == kind]
            if not mine:
                continue
            failures = Counter(one.end for one in mine if one.end != "ok")
            took = sorted(one.took_s for one in mine)
            lines.append(
                f"{kind}: {len(mine)} asked, {sum(failures.values())} failed {dict(failures)},"
                f" median {took[len(took) // 2]:.2f} s, longest {took[-1]:.2f} s"
            )
        connects = sorted(one.connect_s for one in self.seen if one.connect_s is not None)
        lines.append(f"{len(connects)} new connections, slowest {connects[-1]:.2f} s" if connects else "none new")
        by_way = Counter((":" in one.way.address, one.way.http2, one.way.kept) for one in self.seen)
        names = [
            f"{'IPv6' if v6 else 'IPv4'} {'HTTP/2' if http2 else 'HTTP/1.1'} {'kept' if kept else 'new'}: {number}"
            for (v6, http2, kept), number in sorted(by_way.items())
        ]
        return "\n".join([*lines, ", ".join(names)])


def make_body(tokens: int) -> str:
    """A question whose answer is streamed."""
    return json.dumps({"prompt": "Tell me of rollouts.", "max_tokens": tokens, "stream": True, "temperature": 1.5})


def read_stream(text: str) -> int:
    """How many tokens a streamed answer had. Raises ValueError for one that does not end as it should."""
    events = [line.removeprefix("data: ") for line in text.splitlines() if line]
    last = json.loads(events[-1]) if events else {}
    if "usage" not in last:
        raise ValueError(f"cut after {len(events)} events: {events[-1:]}"[:120])
    return int(last["usage"]["completion_tokens"])


def _read_curl(kind: str, way: Way, began_s: float, line: str, output: Path) -> Asked:
    """One line of what curl was told to say."""
    status, version, connects, tcp_s, connected_s, took_s, code = line.split()
    tokens, end = 0, "ok"
    if (status, code, version) != ("200", "0", "2"):
        end = f"status {status}, HTTP/{version}, curl ends with {code}"
    elif kind != "look":
        try:
            tokens = read_stream(output.read_text())
        except ValueError as error:
            end = str(error)
    times_s = (float(connected_s), float(tcp_s)) if connects != "0" else (None, None)
    return Asked(kind, way, end, began_s, float(took_s), tokens, *times_s)


def make_stream(tokens: int) -> Callable[..., int]:
    """Asks for a streamed answer; how many tokens it had."""
    body = make_body(tokens)

    def send(client: httpx2.Client, extensions: dict[str, Any]) -> int:
        headers = {"Content-Type": "application/json"}
        with client.stream("POST", "/generate", content=body, headers=headers, extensions=extensions) as answer:
            if answer.status_code != 200:
                raise ValueError(f"status {answer.status_code}: {answer.read()[:120]!r}")
            return read_stream(answer.read().decode())

    return send


def look(client: httpx2.Client, extensions: dict[str, Any]) -> int:
    """Asks for nothing that has to be generated."""
    answer = client.get("/v1/models", extensions=extensions)
    if answer.status_code != 200:
        raise ValueError(f"status {answer.status_code}")
    return 0
