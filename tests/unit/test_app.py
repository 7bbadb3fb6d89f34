"""The application in process, over a fake engine: status codes, problem documents, metrics, log."""

import io
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import falcon.inspect
import falcon.testing
import pytest
from limits.storage import MemoryStorage
from prometheus_client.parser import text_string_to_metric_families

from service.access import Access
from service.accounts import Log
from service.app import create_app
from service.audit import AuditLog
from service.engine.process import EngineState
from service.errors import AuditUnwritable, SettingsInvalid, StateUnwritable
from service.generation import Generator
from service.keys import KeyFile, Limits, add_key
from service.limits import Limiter
from service.metrics import Metrics
from service.scheduler import Scheduler
from service.settings import Settings
from tests.fake_engine import FakeEngine
from tests.local_engine import LocalEngine

CONTRACT = {
    "llm_requests_total": "counter",
    "llm_request_duration_seconds": "histogram",
    "llm_inference_duration_seconds": "histogram",
    "llm_tokens_generated_total": "counter",
    "llm_model_loaded": "gauge",
    "llm_cpu_usage_percent": "gauge",
    "llm_memory_usage_bytes": "gauge",
}


class FakeAudit:
    """Keeps its lines in memory; ``full`` stands for a full disk."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []
        self.full = False

    def as_log(self) -> AuditLog:
        """It, in the place of the real one."""
        return cast(AuditLog, self)

    def write(self, event: str, **facts: Any) -> None:
        if self.full:
            raise AuditUnwritable("the audit log cannot be written: no space left on device")
        self.lines.append({"event": event, **facts})

    def note(self, event: str, **facts: Any) -> bool:
        if not self.full:
            self.write(event, **facts)
        return not self.full

    def refuse(self, **facts: Any) -> None:
        self.write("refused", **facts)


class Bench:
    """An application with its parts at hand."""

    def __init__(self, **settings: Any):
        self.engine = LocalEngine(FakeEngine(context_length=64))
        process = self.engine.as_process()
        self.scheduler = Scheduler(queue_size=settings.pop("queue_size", 2))
        self.settings = Settings(**{"body_limit_bytes": 2000, "auth": "off", **settings})
        self.metrics = Metrics(process, self.scheduler, 3.6)
        self.limiter = Limiter(self.settings.address_limits, MemoryStorage(), self.scheduler.predicted_end_s)
        self.generator = Generator(process, self.scheduler, self.limiter, self.metrics, self.settings)
        self.audit = FakeAudit()
        self.lines = io.StringIO()
        access = Access(KeyFile(self.settings.keys_file) if self.settings.keys_required else None)
        app = create_app(self.generator, access, self.audit.as_log(), Log(self.lines))

        def from_loopback(environ: dict[str, Any], start_response: Any) -> Any:
            environ.setdefault("REMOTE_ADDR", "127.0.0.1")
            return app(environ, start_response)

        self.client = falcon.testing.TestClient(from_loopback, headers={"Host": "127.0.0.1:8080"})

    def post(self, document: Any = None, **more: Any) -> falcon.testing.Result:
        body = more.pop("body", None) or json.dumps(document)
        headers = {"Content-Type": "application/json", **more.pop("headers", {})}
        return self.client.simulate_post("/generate", body=body, headers=headers)

    def open_stream(self, prompt: str) -> Any:
        """The body of an answer as a server gets it: events to read one by one, and a close."""
        told: list[str] = []
        environ = falcon.testing.create_environ(
            "/generate",
            method="POST",
            host="127.0.0.1:8080",
            headers={"Content-Type": "application/json"},
            body=json.dumps({"prompt": prompt, "stream": True}),
        )

        def start_response(status: str, headers: object, exc_info: object = None) -> Callable[[bytes], object]:
            told.append(status)
            return lambda data: None  # what the application has no use for

        body = self.client.app(environ, start_response)
        assert told == ["200 OK"]
        return body

    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines.getvalue().splitlines()]


@pytest.fixture
def bench() -> Bench:
    return Bench()


def assert_problem(result: falcon.testing.Result, status: int, kind: str) -> dict[str, Any]:
    assert result.status_code == status
    assert result.headers["content-type"] == "application/problem+json"
    document: dict[str, Any] = result.json
    assert document["type"] == f"urn:mini-llm:problem:{kind}"
    assert document["status"] == status
    assert document["id"] == result.headers["x-request-id"]
    assert document["detail"]
    return document


def test_generate(bench: Bench) -> None:
    """A valid request gets its text, counts and finish reason."""
    document = bench.post({"prompt": "say a b c"}).json
    assert document["response"] == "a b c"
    assert document["finish_reason"] == "stop"
    assert document["usage"] == {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    assert document["model"] == "fake"


def test_default_max_tokens_is_cut_to_the_room(bench: Bench) -> None:
    """Without max_tokens the answer may fill what the context leaves, and says that it was cut there."""
    document = bench.post({"prompt": "go"}).json
    assert document["usage"]["total_tokens"] == 64
    assert document["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("body", "headers", "status", "kind"),
    [
        ("{", {}, 400, "malformed"),
        ('{"prompt": 1}', {}, 400, "malformed"),
        ('{"prompt": "x", "seed": 1}', {}, 400, "unsupported-field"),
        ('{"prompt": "x", "temperature": 3}', {}, 422, "out-of-bounds"),
        ('{"prompt": "x"}', {"Content-Type": "text/plain"}, 415, "unsupported-media-type"),
        ('{"prompt": "x"}', {"Content-Type": ""}, 415, "unsupported-media-type"),
        ('{"prompt": "x"}', {"Content-Encoding": "gzip"}, 415, "unsupported-media-type"),
        ('{"prompt": "x"}', {"X-Deadline-S": "now"}, 422, "out-of-bounds"),
        ('{"prompt": "' + "x" * 3000 + '"}', {}, 413, "body-too-large"),
        ('{"prompt": "' + "x " * 900 + '"}', {}, 400, "context-exceeded"),
        ('{"prompt": "x", "max_tokens": 61}', {}, 400, "context-exceeded"),
        ('{"prompt": "fail"}', {}, 500, "engine-failed"),
    ],
)
def test_problems(bench: Bench, body: str, headers: dict[str, str], status: int, kind: str) -> None:
    """Each refusal is a problem document of its kind, and the slot is free afterwards."""
    assert_problem(bench.post(body=body, headers=headers), status, kind)
    assert bench.scheduler.counts() == (0, 0)


def test_charset_is_accepted(bench: Bench) -> None:
    """A content type with parameters is JSON too."""
    headers = {"Content-Type": "application/json; charset=utf-8"}
    assert bench.post({"prompt": "say x"}, headers=headers).status_code == 200


def test_context_problem_tells_the_counts(bench: Bench) -> None:
    """The 400 holds exact counts as numbers."""
    document = assert_problem(bench.post({"prompt": "a b c", "max_tokens": 60}), 400, "context-exceeded")
    assert (document["prompt_tokens"], document["max_tokens"], document["context_length"]) == (6, 60, 64)


@pytest.mark.parametrize(
    ("method", "path", "status", "kind"),
    [
        ("GET", "/nowhere", 404, "not-found"),
        ("GET", "/generate", 405, "method-not-allowed"),
        ("POST", "/health", 405, "method-not-allowed"),
        ("DELETE", "/metrics", 405, "method-not-allowed"),
        ("GET", "/health/", 404, "not-found"),
    ],
)
def test_wrong_paths_and_methods(bench: Bench, method: str, path: str, status: int, kind: str) -> None:
    """Unknown paths are 404, known ones with the wrong method 405 with Allow."""
    result = bench.client.simulate_request(method, path)
    assert_problem(result, status, kind)
    assert (status != 405) or "allow" in result.headers


@pytest.mark.parametrize("path", ["/health", "/ready", "/version", "/metrics", "/usage", "/openapi.json", "/v1/models"])
def test_head_tells_what_get_would(bench: Bench, path: str) -> None:
    """As programs ask that only want to know whether it is there."""
    whole, head = bench.client.simulate_get(path), bench.client.simulate_request("HEAD", path)
    assert (head.status_code, head.text) == (200, "")
    assert head.headers["content-type"] == whole.headers["content-type"]


def test_options_are_told_to_everybody(tmp_path: Path) -> None:
    """Without a key."""
    add_key(tmp_path / "keys.json", "alice", frozenset({"generate"}))
    bench = Bench(auth="on", keys_file=tmp_path / "keys.json")
    told = bench.client.simulate_options("/generate")
    assert told.status_code == 200
    assert told.headers["allow"] == "POST"


def test_unknown_failure_is_500_without_its_message(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug answers 500 with an id; log and answer hold type and place, never the message, which may quote a prompt."""

    def broken(*args: Any) -> None:
        raise RuntimeError("secret prompt text")

    monkeypatch.setattr(bench.generator, "begin", broken)
    document = assert_problem(bench.post({"prompt": "secret prompt text"}), 500, "internal")
    failure = next(line for line in bench.log() if line["event"] == "failure")
    assert failure["id"] == document["id"]
    assert "RuntimeError at " in failure["error"]
    assert "secret" not in bench.lines.getvalue() + json.dumps(document)


def test_not_ready_is_told_with_retry_after(bench: Bench) -> None:
    """While the model loads, /ready and /generate are 503 with the reason; /health is 200."""
    bench.engine.state = EngineState("loading", "the engine is loading the model")
    ready = bench.client.simulate_get("/ready")
    assert (ready.status_code, ready.json["status"]) == (503, "loading")
    assert ready.json["reason"] == "the engine is loading the model"
    refused = bench.post({"prompt": "x"})
    assert_problem(refused, 503, "loading")
    assert int(refused.headers["retry-after"]) >= 1
    bench.client.simulate_post("/v1/completions", json={"model": "fake", "prompt": "x"})
    counted = families(bench)["llm_refusals"].samples
    assert [each.value for each in counted if each.labels == {"reason": "loading"}][:1] == [2]
    assert bench.client.simulate_get("/health").status_code == 200
    assert bench.client.simulate_get("/version").json["model"] is None


def test_restart_that_outlasts_the_deadline_is_told(bench: Bench) -> None:
    """A request that waits for a restarting engine waits no longer than its own deadline."""
    bench.engine.state = EngineState("restarting", "the engine ended by SIGKILL")
    start_s = time.monotonic()
    refused = bench.post({"prompt": "say x"}, headers={"X-Deadline-S": "0.2"})
    document = assert_problem(refused, 503, "deadline")
    assert document["detail"] == "the deadline is over: the engine ended by SIGKILL"
    assert refused.headers["x-should-retry"] == "false"
    assert 0.15 < time.monotonic() - start_s < 3
    assert bench.scheduler.counts() == (0, 0)


def test_failed_engine_stays_told(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that has failed for good, and was never ready, answers 503 with its reason."""
    monkeypatch.setattr(bench.engine, "describe", lambda: None)
    bench.engine.state = EngineState("failed", "the model's file is truncated")
    document = assert_problem(bench.post({"prompt": "x"}), 503, "engine-failed")
    assert document["detail"] == "the model's file is truncated"


def test_another_requests_crash_while_counting_is_survived(bench: Bench) -> None:
    """A prompt that was being counted when the engine died is counted again; twice in a row it is its own fault."""
    bench.engine.lose_counts = 1
    assert bench.post({"prompt": "say x"}).status_code == 200
    bench.engine.lose_counts = 2
    assert_problem(bench.post({"prompt": "say x"}), 500, "engine-failed")
    bench.engine.lose_counts, bench.engine.begun = 5, False  # five crashes while this one only waited its turn
    assert bench.post({"prompt": "say x"}).status_code == 200


def test_drained_service_refuses_and_closes(bench: Bench) -> None:
    """Draining: 503, Retry-After and Connection: close."""
    bench.scheduler.drain()
    refused = bench.post({"prompt": "x"})
    assert_problem(refused, 503, "draining")
    assert refused.headers["connection"] == "close"
    assert bench.client.simulate_get("/ready").json["status"] == "draining"


def test_stream(bench: Bench) -> None:
    """A stream holds its pieces, then one event with counts; a failure is an error event."""
    result = bench.post({"prompt": "say a b", "stream": True})
    assert result.headers["content-type"] == "text/event-stream; charset=utf-8"
    events = [json.loads(line[6:]) for line in result.text.splitlines() if line.startswith("data: ")]
    assert [event["response"] for event in events] == ["a", " b", ""]
    assert events[-1]["done"] is True
    assert events[-1]["usage"]["completion_tokens"] == 2
    failed = bench.post({"prompt": "fail", "stream": True}).text
    assert "event: error\ndata: " in failed
    assert json.loads(failed.partition("event: error\ndata: ")[2])["status"] == 500
    assert bench.scheduler.counts() == (0, 0)


def test_stream_that_is_never_read_gives_its_slot_back(bench: Bench) -> None:
    """A server that closes a response before it reads the first byte leaves no slot taken."""
    response = bench.open_stream("pause 0.01")
    assert sum(bench.scheduler.counts()) == 1
    response.close()
    assert bench.scheduler.counts() == (0, 0)
    assert bench.log()[-1]["event"] == "request"


def test_a_client_that_leaves_before_its_turn_has_left(bench: Bench) -> None:
    """However far its request has come, it is no failure of the service."""
    response = bench.open_stream("pause 0.01")
    assert next(iter(response)) == b": accepted\n\n"
    response.close()
    line = bench.log()[-1]
    assert (line["status"], line["cancelled_by"]) == (499, "client")
    assert bench.audit.lines[-1]["outcome"] == "client"


def test_an_event_is_one_line_to_everybody(bench: Bench) -> None:
    """Also to programs that split lines at all that Unicode calls an end of a line."""
    text = bench.post({"prompt": "say a\u2028b\u2029c\u0085d", "stream": True}).text
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]
    assert "".join(event["response"] for event in events).split() == ["a", "b", "c", "d"]


def test_text_that_was_held_back_for_a_stop_is_given_at_the_deadline(bench: Bench) -> None:
    """It was generated and charged, and nothing can follow it any more."""
    asked = {"prompt": "pause 0.1 say a b c d e f g h", "stop": [" b c d e f g h i"]}
    document = bench.post(asked, headers={"X-Deadline-S": "0.5"}).json
    assert document["finish_reason"] == "cancelled"
    assert document["response"].split() == list("abcdefgh")[: document["usage"]["completion_tokens"]]


@pytest.mark.parametrize("named", [{}, {"max_tokens": 50}])
def test_a_deadline_is_refused_for_tokens_that_were_asked_for(bench: Bench, named: dict[str, int]) -> None:
    """An answer of no named length may be short enough; and the same again would be too late."""
    for _ in range(8):
        bench.scheduler.speed.learn(1, 0.0, 50, 5.0, 50)
    result = bench.post({"prompt": "say a", **named}, headers={"X-Deadline-S": "2"})
    if named:
        assert_problem(result, 503, "deadline")
        assert result.headers["x-should-retry"] == "false"
        assert "retry-after" not in result.headers  # it would never be met
        counted = {each.labels["reason"]: each.value for each in families(bench)["llm_refusals"].samples}
        assert (counted["deadline_too_short"], counted["deadline"]) == (1, 0)  # nobody waits, so no alert says so
    else:
        assert result.json["response"] == "a"


@pytest.mark.parametrize("prompt", ["say a b", "fail"])
def test_the_last_word_of_a_stream_comes_when_all_is_free_again(bench: Bench, prompt: str) -> None:
    """Whoever has it may ask again at once, and must meet neither the slot nor the limits of the answer before."""
    response = bench.open_stream(prompt)
    seen = [(event, bench.scheduler.counts()) for event in response]
    response.close()
    assert sum(seen[0][1]) == 1
    assert b'"done":true' in seen[-1][0] or b"event: error" in seen[-1][0]
    assert seen[-1][1] == (0, 0)


def test_queue_is_bounded(bench: Bench) -> None:
    """One running and two waiting; the fourth is refused, and all others are answered."""
    results: list[int] = []

    def ask() -> None:
        results.append(bench.post({"prompt": "pause 0.05 say a b c d"}).status_code)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    wait_until(lambda: bench.scheduler.counts() == (1, 2))
    assert_problem(bench.post({"prompt": "say x"}), 503, "queue-full")
    for thread in threads:
        thread.join()
    assert results == [200, 200, 200]


def wait_until(condition: Callable[[], bool]) -> None:
    end_s = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.001)


def families(bench: Bench) -> dict[str, Any]:
    text = bench.client.simulate_get("/metrics").text
    return {family.name: family for family in text_string_to_metric_families(text)}


def test_metric_names_are_the_contract(bench: Bench) -> None:
    """The seven names of the contract are there, of their types, and requests carry method, endpoint and status."""
    bench.post({"prompt": "say a b c"})
    bench.client.simulate_get("/nowhere/secret-path")
    seen = families(bench)
    for name, kind in CONTRACT.items():
        assert seen[name.removesuffix("_total")].type == kind, name
    samples = {tuple(sorted(sample.labels.items())): sample.value for sample in seen["llm_requests"].samples}
    assert samples[("endpoint", "/generate"), ("method", "POST"), ("status", "200")] == 1
    assert samples[("endpoint", "none"), ("method", "GET"), ("status", "404")] == 1
    assert seen["llm_tokens_generated"].samples[0].value == 3
    assert seen["llm_prompt_tokens"].samples[0].value == 7
    assert "secret-path" not in bench.client.simulate_get("/metrics").text
    buckets = seen["llm_inference_duration_seconds"].samples
    assert "600.0" in [sample.labels.get("le") for sample in buckets]


def test_metrics_follow_naming_rules(bench: Bench) -> None:
    """What promtool would say of names and help texts: counters end in _total, all have help, base units only."""
    for family in families(bench).values():
        assert family.documentation
        assert not any(word in family.name for word in ("_ms", "milliseconds", "minutes", "_kb", "megabytes"))
        if family.type == "counter":
            assert all(sample.name.endswith("_total") for sample in family.samples)
        else:
            assert not family.name.endswith(("_total", "_count", "_sum", "_bucket"))


def test_the_first_refusal_is_seen_by_a_rate(bench: Bench) -> None:
    """A series that is born with its first event hides that event from `increase`, so those of the alert are there."""
    born = {sample.labels["reason"]: sample.value for sample in families(bench)["llm_refusals"].samples}
    assert {"queue_full": 0, "queue_timeout": 0, "deadline": 0}.items() <= born.items()


def test_cost_grows_with_time(bench: Bench) -> None:
    """At 3.6 EUR an hour a thousandth of a euro a second is counted."""
    first = families(bench)["llm_cost_eur"].samples[0].value
    time.sleep(0.05)
    grown = families(bench)["llm_cost_eur"].samples[0].value - first
    assert 0.00004 < grown < 0.001


def test_odd_methods_do_not_make_labels(bench: Bench) -> None:
    """A method outside the usual seven is counted as OTHER."""
    bench.client.simulate_request("TRACE", "/health")
    assert any(s.labels["method"] == "OTHER" for s in families(bench)["llm_requests"].samples)


def test_log_line(bench: Bench) -> None:
    """One line a request with id, status, counts and waits, and no text of prompt or answer."""
    result = bench.post({"prompt": "say verysecret"})
    (line,) = bench.log()
    assert line["id"] == result.json["id"]
    expected = {"event": "request", "status": 200, "endpoint": "/generate", "prompt_tokens": 5, "completion_tokens": 1}
    assert expected.items() <= line.items()
    assert {"duration_ms", "queue_ms", "prefill_ms", "decode_ms"} <= set(line)
    assert "verysecret" not in bench.lines.getvalue()


def keyed_bench(folder: Path, *, limits: Limits | None = None, **settings: Any) -> tuple[Bench, dict[str, str]]:
    """A bench that needs keys, and the header of one."""
    path = folder / "keys.json"
    secret = add_key(path, "alice", limits=limits)
    bench = Bench(auth="keys", keys_file=path, **settings)
    return bench, {"Authorization": f"Bearer {secret}"}


GUARDED = [
    ("POST", "/generate"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/fake"),
    ("GET", "/usage"),
]
OPEN = ["/health", "/ready", "/version", "/openapi.json", "/", "/page.js", "/page.css"]


@pytest.mark.parametrize(("method", "path"), GUARDED)
def test_guarded_paths_need_a_key(tmp_path: Path, method: str, path: str) -> None:
    """Without a key: 401 with both challenges, in the path's own shape, whatever the body; and nothing is counted."""
    bench, _ = keyed_bench(tmp_path)
    refused = bench.client.simulate_request(method, path, body="{")
    assert refused.status_code == 401
    assert "Bearer" in refused.headers["www-authenticate"]
    assert "Basic" in refused.headers["www-authenticate"]
    assert ("error" in refused.json) == path.startswith("/v1/")
    assert bench.scheduler.counts() == (0, 0)
    assert [(line["event"], line["reason"]) for line in bench.audit.lines] == [("refused", "unauthenticated")]


@pytest.mark.parametrize("path", OPEN)
def test_open_paths_need_none(tmp_path: Path, path: str) -> None:
    """What watches the service, describes it or shows the page needs no key, and leaves no audit line."""
    bench, _ = keyed_bench(tmp_path)
    assert bench.client.simulate_get(path).status_code == 200
    assert not bench.audit.lines


def test_every_route_is_guarded_or_known_to_be_open() -> None:
    """A new route is guarded unless this test's list says that it is open."""
    app: Any = create_app(Bench().generator, Access(None), FakeAudit().as_log(), Log(io.StringIO()))
    routes = {route.path for route in falcon.inspect.inspect_routes(app._application)}
    unguarded = {
        route.path
        for route in falcon.inspect.inspect_routes(app._application)
        if getattr(app._application._router.find(route.path.replace("{model:path}", "x"))[0], "scope", None) is None
    }
    assert unguarded == {*OPEN, "/page.svg"}
    assert len(routes) > len(unguarded)


def test_metrics_guard(tmp_path: Path) -> None:
    """Metrics are open on loopback, and guarded through a proxy."""
    bench, headers = keyed_bench(tmp_path)
    assert bench.client.simulate_get("/metrics").status_code == 200
    proxied = {"X-Forwarded-For": "127.0.0.1"}
    assert_problem(bench.client.simulate_get("/metrics", headers=proxied), 401, "unauthenticated")
    assert_problem(bench.client.simulate_get("/metrics", headers={**proxied, **headers}), 403, "forbidden")


def test_audit_lines_of_a_request(tmp_path: Path) -> None:
    """Admission and end, with key, address and counts."""
    bench, headers = keyed_bench(tmp_path)
    result = bench.post({"prompt": "say a b", "max_tokens": 9}, headers=headers)
    admitted, ended = bench.audit.lines
    assert admitted == {
        **{"event": "admitted", "id": result.json["id"], "key": "alice", "address": "127.0.0.1"},
        **{"endpoint": "/generate", "prompt_tokens": 6, "max_tokens": 9},
    }
    assert (ended["event"], ended["outcome"], ended["completion_tokens"]) == ("ended", "stop", 2)


def test_nothing_is_generated_unless_the_audit_log_says_so(tmp_path: Path) -> None:
    """A log that cannot be written closes the service: 503, no token, slot and reservation given back."""
    bench, headers = keyed_bench(tmp_path)
    bench.audit.full = True
    for stream in (False, True):
        refused = bench.post({"prompt": "say x", "stream": stream}, headers=headers)
        problem = assert_problem(refused, 503, "records-unwritable")
        assert "space" not in problem["detail"]
    assert bench.scheduler.counts() == (0, 0)
    assert bench.limiter.tokens_today("alice") == 0
    assert families(bench)["llm_tokens_generated"].samples[0].value == 0
    assert any(line["event"] == "failure" and "AuditUnwritable" in line["error"] for line in bench.log())
    bench.audit.full = False
    assert bench.post({"prompt": "say x"}, headers=headers).status_code == 200


def test_surprise_at_the_admission_takes_no_slot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever goes wrong while the admission is written down, slot, place and tokens are given back."""
    bench, headers = keyed_bench(tmp_path, limits=Limits(parallel=1))

    def surprise(event: str, **facts: Any) -> None:
        if event == "admitted":
            raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(bench.audit, "write", surprise)
        assert_problem(bench.post({"prompt": "say a"}, headers=headers), 500, "internal")
    assert bench.scheduler.counts() == (0, 0)
    assert bench.limiter.tokens_today("alice") == 0
    assert bench.post({"prompt": "say a"}, headers=headers).status_code == 200


def test_counters_that_fail_cost_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When tokens cannot be settled the answer is sent all the same; the next request is refused, nothing is lost."""
    bench, headers = keyed_bench(tmp_path, limits=Limits(parallel=1))
    storage = bench.limiter._counters
    count, calls = storage.incr, []

    def fail_after_the_first(*arguments: Any) -> int:
        calls.append(arguments)
        if len(calls) > 1:
            raise StateUnwritable("the counters cannot be used: disk full")
        return count(*arguments)

    monkeypatch.setattr(storage, "incr", fail_after_the_first)
    assert bench.post({"prompt": "say a"}, headers=headers).json["response"] == "a"
    assert_problem(bench.post({"prompt": "say a"}, headers=headers), 503, "records-unwritable")
    monkeypatch.setattr(storage, "incr", count)
    assert bench.post({"prompt": "say a"}, headers=headers).status_code == 200
    assert bench.scheduler.counts() == (0, 0)


def test_large_prompts_of_one_key_hold_up_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a key's prompt is being counted its next one waits; another key's is counted and answered meanwhile."""
    bench, greedy = keyed_bench(tmp_path, queue_size=4)
    other = {"Authorization": f"Bearer {add_key(tmp_path / 'keys.json', 'other')}"}
    count, free, counted = bench.engine.count_tokens, threading.Event(), []

    def count_slowly(messages: Any) -> int:
        counted.append(messages[0].content)
        if messages[0].content == "large":
            assert free.wait(10)
        return count(messages)

    monkeypatch.setattr(bench.engine, "count_tokens", count_slowly)
    results: list[int] = []
    threads = [
        threading.Thread(target=lambda: results.append(bench.post({"prompt": "large"}, headers=greedy).status_code))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    wait_until(lambda: bench.scheduler.counts() == (0, 2) and counted == ["large"])
    assert bench.post({"prompt": "say x"}, headers=other).status_code == 200
    assert counted == ["large", "say x"]
    free.set()
    for thread in threads:
        thread.join()
    assert results == [200, 200]


def test_limits_over_http(tmp_path: Path) -> None:
    """Headers tell what is left on every answer; a 429 tells when to come again, in both shapes."""
    bench, headers = keyed_bench(tmp_path, limits=Limits(requests_per_minute=2, tokens_per_day=50))
    first = bench.post({"prompt": "say a b c"}, headers=headers)
    assert first.headers["ratelimit"].startswith('"key-requests";r=1;t=')
    assert '"key-tokens";r=47;t=' in first.headers["ratelimit"]
    assert bench.post(body="{", headers=headers).status_code == 400  # counted: whoever sends rubbish sends requests
    refused = bench.post({"prompt": "say x"}, headers=headers)
    assert_problem(refused, 429, "key-requests")
    assert 50 <= int(refused.headers["retry-after"]) <= 60
    body = json.dumps({"model": "fake", "messages": [{"role": "user", "content": "say x"}]})
    openai = {"Content-Type": "application/json", **headers}
    chat = bench.client.simulate_post("/v1/chat/completions", body=body, headers=openai)
    assert chat.status_code == 429
    assert chat.json["error"]["code"] == "rate_limit_exceeded"
    assert "retry-after" in chat.headers
    assert bench.client.simulate_get("/v1/models", headers=headers).status_code == 200


def test_places_of_a_key_are_given_back_whatever_happens(tmp_path: Path) -> None:
    """Failures, refusals and streams that are never read leave no place and no token taken."""
    bench, headers = keyed_bench(tmp_path, limits=Limits(parallel=1, tokens_per_day=1000))
    for document in (
        {"prompt": "fail"},
        {"prompt": "fail", "stream": True},
        {"prompt": "x", "max_tokens": 4000},
        {"prompt": "x " * 900},
        {"prompt": "x", "seed": 1},
        {"prompt": "say a", "stream": True},
    ):
        assert bench.post(document, headers=headers).status_code in (200, 400, 500)
    refused = bench.post({"prompt": "pause 0.1"}, headers={**headers, "X-Deadline-S": "0.0001"})
    assert refused.status_code in (200, 503)
    assert bench.post({"prompt": "say a"}, headers=headers).status_code == 200
    assert bench.limiter.tokens_today("alice") <= 3
    bench.scheduler.drain()
    assert bench.post({"prompt": "say a"}, headers=headers).status_code == 503
    assert not bench.limiter._parallel


def test_openai_stream(bench: Bench) -> None:
    """Role first, pieces, reason, usage if asked for, then [DONE]; a failure is an error document without [DONE]."""

    def events(document: dict[str, Any]) -> list[str]:
        body = json.dumps({"model": "fake", "stream": True, **document})
        headers = {"Content-Type": "application/json"}
        result = bench.client.simulate_post("/v1/chat/completions", body=body, headers=headers)
        assert result.headers["content-type"] == "text/event-stream; charset=utf-8"
        return [line[6:] for line in result.text.splitlines() if line.startswith("data: ")]

    asked = {"messages": [{"role": "user", "content": "say a b"}], "stream_options": {"include_usage": True}}
    *chunks, done = events(asked)
    assert done == "[DONE]"
    parsed = [json.loads(chunk) for chunk in chunks]
    assert [chunk["choices"][0]["delta"] for chunk in parsed[:-1]] == [
        {"role": "assistant", "content": ""},
        {"content": "a"},
        {"content": " b"},
        {},
    ]
    assert parsed[-1]["usage"]["completion_tokens"] == 2
    *_, failure = events({"messages": [{"role": "user", "content": "fail"}]})
    assert json.loads(failure)["error"]["type"] == "server_error"


def test_raw_completion_skips_the_template(bench: Bench) -> None:
    """A plain completion reaches the engine as one text; its answer has OpenAI's default of 16 tokens."""
    headers = {"Content-Type": "application/json"}
    body = json.dumps({"model": "fake", "prompt": "go on"})
    done = bench.client.simulate_post("/v1/completions", body=body, headers=headers).json
    assert done["usage"]["completion_tokens"] == 16
    assert done["choices"][0]["finish_reason"] == "length"


def test_loading_service_has_no_model_yet(bench: Bench) -> None:
    """Before the first load the list of models is empty, and asking is a 503 in OpenAI's shape."""
    bench.engine.state = EngineState("loading", "the engine is loading the model")
    assert bench.client.simulate_get("/v1/models").json["data"] == []
    refused = bench.client.simulate_get("/v1/models/fake")
    assert (refused.status_code, refused.json["error"]["code"]) == (503, "loading")


def test_ready_tells_speed_and_wait(bench: Bench) -> None:
    """The page's figures: predicted wait and measured speed, null before anything was measured."""
    assert bench.client.simulate_get("/ready").json["tokens_per_second"] is None
    bench.post({"prompt": "pause 0.01 say a b c"})
    ready = bench.client.simulate_get("/ready").json
    assert 20 < ready["tokens_per_second"] <= 100
    assert ready["predicted_wait_s"] == 0


def test_a_node_with_a_problem_serves_nothing_and_says_why(tmp_path: Path) -> None:
    """As long as its file is there; whoever wrote it says when it is over."""
    problem = tmp_path / "problem"
    bench = Bench(problem_file=problem)
    assert bench.client.simulate_get("/ready").status_code == 200
    problem.write_text("api_keys: is missing\n")
    ready = bench.client.simulate_get("/ready")
    assert (ready.status_code, ready.json["status"], ready.json["reason"]) == (503, "failed", "api_keys: is missing")
    refused = bench.post({"prompt": "say x"})
    assert assert_problem(refused, 503, "node-problem")["detail"] == "api_keys: is missing"
    problem.write_text("")  # a full disk may have kept its words, which makes it no better
    assert bench.client.simulate_get("/ready").json["reason"] == "this node has a problem that was not told"
    problem.unlink()
    assert bench.post({"prompt": "say x"}).status_code == 200


def test_a_baked_node_tells_its_image(tmp_path: Path) -> None:
    """Elsewhere there is none; a description that cannot be read is told at start."""
    elsewhere = Bench().client.simulate_get("/version").json
    assert (elsewhere["image"], elsewhere["boot"]) == (None, None)
    described = tmp_path / "image.json"
    described.write_text('{"version": "1.2", "baked": "2026-11-26T09:00:00+00:00", "model": {}}')
    shown = Bench(image_file=described).client.simulate_get("/version").json["image"]
    assert shown == {"version": "1.2", "baked": "2026-11-26T09:00:00+00:00"}
    (tmp_path / "begin").write_text("0\n")
    booted = Bench(boot_dir=tmp_path)
    assert booted.client.simulate_get("/version").json["boot"]["first_token_s"] is None
    assert booted.post({"prompt": "say x"}).status_code == 200
    boot = booted.client.simulate_get("/version").json["boot"]
    assert 0 < boot["service_s"] < boot["first_token_s"]
    described.write_text("[]")
    with pytest.raises(SettingsInvalid, match="LLM_IMAGE_FILE"):
        Bench(image_file=described)
