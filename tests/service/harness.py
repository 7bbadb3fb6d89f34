"""Starts the real service (gunicorn, engine process) on a free port of loopback, talks to it, and ends it for sure."""

import hashlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import psutil

from service.engine import gguf
from tests.gguf_writer import STRING, UINT32, small_model
from tests.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
STARTER = ROOT / "service" / "starter" / "starter.gguf"
FAKE = "tests.fake_engine"
SMALL = "a model of random weights"
_DEADLINE_S = 60.0
_RECORDED: dict[tuple[str, str | None], tuple[str, bytes]] = {}  # name and content of a golden answer's file


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Service:
    """A running service; ``log`` is a file of its JSON lines."""

    port: int
    process: subprocess.Popen[bytes]
    log_path: Path
    state_dir: Path
    environment: dict[str, str]

    def request(self, method: str, path: str, body: Any = None, timeout_s: float = 60.0, /, **headers: str) -> Answer:
        """One request on a connection of its own; a body that is not bytes is sent as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)
        try:
            data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            fields = {"Content-Type": "application/json"} if data is not None else {}
            fields.update({name.replace("_", "-"): value for name, value in headers.items()})
            connection.request(method, path, data, fields)
            response = connection.getresponse()
            return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
        finally:
            connection.close()

    def generate(self, prompt: str, timeout_s: float = 60.0, **fields: Any) -> Answer:
        return self.request("POST", "/generate", {"prompt": prompt, **fields}, timeout_s)

    def get(self, path: str) -> Answer:
        return self.request("GET", path)

    @contextmanager
    def kept_connection(self) -> Iterator[http.client.HTTPConnection]:
        """A connection that has carried one request and is kept open."""
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)) as connection:
            connection.request("GET", "/health")
            connection.getresponse().read()
            yield connection

    def open(self, raw: bytes, timeout_s: float = 60.0) -> socket.socket:
        """A connection on which ``raw`` was sent."""
        client = socket.create_connection(("127.0.0.1", self.port), timeout=timeout_s)
        client.sendall(raw)
        return client

    def open_generate(self, prompt: str, **fields: Any) -> socket.socket:
        """A connection on which a generation was asked for."""
        body = json.dumps({"prompt": prompt, **fields}).encode()
        head = "POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        return self.open(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)

    def metric(self, name: str, **labels: str) -> float:
        """Sum of all samples of that name with these labels."""
        total = 0.0
        for line in self.get("/metrics").body.decode().splitlines():
            sample, _, value = line.rpartition(" ")
            if sample.partition("{")[0] == name and all(f'{k}="{v}"' in sample for k, v in labels.items()):
                total += float(value)
        return total

    def logs(self, event: str) -> list[dict[str, Any]]:
        end_s = time.monotonic() + 1.0
        while (told := self.log_path.read_text()) and not told.endswith("\n") and time.monotonic() < end_s:
            time.sleep(0.001)  # the last line is being written, or was when its writer was killed
        lines = [line for line in told[: told.rfind("\n") + 1].splitlines() if line.startswith("{")]
        return [entry for entry in map(json.loads, lines) if entry.get("event") == event]

    def wait_request(self, timeout_s: float = 5.0, **facts: Any) -> dict[str, Any]:
        """The line of a request with these facts, which is written once all is over; fails at the deadline."""
        end_s = time.monotonic() + timeout_s
        while time.monotonic() < end_s:
            for line in self.logs("request"):
                if facts.items() <= line.items():
                    return line
            time.sleep(0.01)
        raise AssertionError(f"no line with {facts}:\n{self.last_log()}")

    def last_log(self) -> str:
        return "\n".join(self.log_path.read_text().splitlines()[-15:])

    def wait_phase(self, *phases: str, timeout_s: float = _DEADLINE_S) -> dict[str, Any]:
        """Waits until ``/ready`` shows one of these phases; fails at the deadline."""
        end_s = time.monotonic() + timeout_s
        seen: dict[str, Any] = {}
        while time.monotonic() < end_s:
            if self.process.poll() is not None:
                raise AssertionError(f"gunicorn ended with {self.process.returncode}:\n{self.last_log()}")
            try:
                seen = self.get("/ready").json
                if seen["status"] in phases:
                    return seen
                if seen["status"] == "failed":
                    break
            except (OSError, http.client.HTTPException):
                pass  # not listening yet
            time.sleep(0.02)
        raise AssertionError(f"never {phases}, last {seen}:\n{self.last_log()}")

    def wait_idle(self, timeout_s: float = 10.0) -> float:
        """Waits until nothing runs or waits; returns the seconds it took, fails at the deadline."""
        start_s = time.monotonic()
        while time.monotonic() - start_s < timeout_s:
            seen = self.get("/ready").json
            if seen["running"] == seen["waiting"] == 0:
                return time.monotonic() - start_s
            time.sleep(0.005)
        raise AssertionError(f"not idle after {timeout_s} s: {seen}")

    def wait_running(self, running: int, waiting: int = 0, timeout_s: float = 10.0) -> None:
        end_s = time.monotonic() + timeout_s
        while time.monotonic() < end_s:
            seen = self.get("/ready").json
            if (seen["running"], seen["waiting"]) == (running, waiting):
                return
            time.sleep(0.005)
        raise AssertionError(f"never {running} running and {waiting} waiting: {seen}")

    @property
    def web(self) -> psutil.Process:
        """The web worker."""
        return next(p for p in psutil.Process(self.process.pid).children() if "gunicorn" in " ".join(p.cmdline()))

    @property
    def engine(self) -> psutil.Process:
        """The engine's process."""
        return next(p for p in self.web.children() if "service.engine.worker" in p.cmdline())

    def drain(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.run("drain", *arguments)

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """``python -m service`` with this service's settings."""
        return subprocess.run(
            [sys.executable, "-m", "service", *arguments],
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def keys(self, *arguments: str) -> str:
        """What ``python -m service keys`` prints; a new key, for one."""
        done = self.run("keys", *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def terminate(self, timeout_s: float = 30.0) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout_s)


def write_small_model(folder: Path, pre_tokenizer: str | None = "llama-bpe", longest_space: int = 1) -> Path:
    """A valid model of random weights, with room for long answers and no wish to end them at temperature 0.

    Without a pre-tokenizer its vocabulary is one of SentencePiece; ``longest_space`` is for ``small_model``.
    """
    model = small_model(tokenizer="llama" if pre_tokenizer is None else "gpt2", longest_space=longest_space)
    if pre_tokenizer is not None:
        model.put("tokenizer.ggml.pre", STRING, pre_tokenizer.encode())
    model.put("llama.context_length", UINT32, 2048)
    head = model.tensor("output.weight")
    row_bytes, weights = len(head.data) // head.shape[1], bytearray(head.data)
    for token in gguf.read_header(BytesIO(model.to_bytes())).end_token_ids:
        # A logit of zero is never the largest of hundreds that are random around zero.
        weights[token * row_bytes : (token + 1) * row_bytes] = bytes(row_bytes)
    head.data = bytes(weights)
    path = folder / "small.gguf"
    path.write_bytes(model.to_bytes())
    return path


def service_environment(state_dir: Path, port: int, **settings: Any) -> dict[str, str]:
    """The environment of a service: nothing of the person's own settings, ``settings`` as LLM_* variables.

    Keys are off unless ``auth`` says otherwise; None leaves a setting to its default.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LLM_")}
    values = {"port": port, "state_dir": state_dir, "cache_dir": state_dir, "auth": "off", **settings}
    environment.update({f"LLM_{name.upper()}": str(value) for name, value in values.items() if value is not None})
    return environment


def _record(model: Path, adapter: str | None, environment: dict[str, str], folder: Path) -> None:
    """Has the golden answer recorded, once for all services with this model and adapter; the starter brings its own."""
    what = (hashlib.sha256(model.read_bytes()).hexdigest(), adapter)
    if what not in _RECORDED:
        command = [sys.executable, "-m", "service", "record"]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        [file] = folder.iterdir()
        _RECORDED[what] = (file.name, file.read_bytes())
    name, told = _RECORDED[what]
    folder.mkdir(mode=0o700, exist_ok=True)
    (folder / name).write_bytes(told)


@contextmanager
def running_service(record: bool = True, wait: bool = True, **settings: Any) -> Iterator[Service]:
    """A service with these settings; its golden answer is recorded first unless ``record`` is False.

    ``model=SMALL`` asks for a small valid model of random weights; the fake engine gets one too, for its file is
    verified like any other. Afterwards every process that was started is gone, also when the test failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        state_dir, port = Path(folder), free_port()
        if settings.get("engine_adapter") == FAKE or settings.get("model") == SMALL:
            settings["model"] = write_small_model(state_dir)
        environment = service_environment(state_dir, port, **settings)
        if record and "model" in settings:
            _record(Path(settings["model"]), settings.get("engine_adapter"), environment, state_dir / "golden")
        log_path = state_dir / "service.log"
        with log_path.open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "gunicorn", "-c", "service/gunicorn.conf.py"],
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        service = Service(port, process, log_path, state_dir, environment)
        family: list[psutil.Process] = []
        try:
            if wait:
                service.wait_phase("ready")
            yield service
        finally:
            if process.poll() is None:
                family = psutil.Process(process.pid).children(recursive=True)
                process.terminate()
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
            _, survivors = psutil.wait_procs(family, timeout=5)
            for survivor in survivors:
                survivor.kill()
            assert not survivors, f"processes outlived the service: {survivors}"


def read_events(client: socket.socket) -> Iterator[tuple[str, Any]]:
    """Server-sent events of a chunked answer: ("comment" | "data" | event name, text or document); closes it."""
    with client, closing(http.client.HTTPResponse(client)) as response:
        response.begin()
        assert response.status == 200, response.read()
        kind = "data"
        while line := response.readline():
            text = line.decode().rstrip("\n")
            if text.startswith(":"):
                yield "comment", text
            elif text.startswith("event: "):
                kind = text.removeprefix("event: ")
            elif text.startswith("data: "):
                yield kind, json.loads(text.removeprefix("data: "))
                kind = "data"
