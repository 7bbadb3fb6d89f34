"""The document at ``/openapi.json`` against the running service: schemathesis, and answers of each kind."""

import http.client
import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.openapi_document import Document
from tests.service.harness import FAKE, ROOT, Answer, Service, running_service

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
TEXTS = ("/generate", CHAT, COMPLETIONS)
GUARDED = ("/usage", "/v1/models", "/v1/models/{model}")
PROXIED = {"X-Forwarded-For": "192.0.2.1"}
# What must be said to a request that keeps to the document. Three of these need a second look, which openapi_checks
# takes: 400 is for its length in tokens alone, 503 for its deadline alone.
CONFIGURATION = """
hooks = "tests.service.openapi_checks"
seed = 20261125
continue-on-failure = true
request-timeout = 120

[cache]
enabled = false

[headers]
Authorization = "Bearer ${SERVICE_KEY}"

[generation]
mode = "all"
max-examples = 15
database = "none"

[phases.stateful.generation]
max-examples = 3

[checks.not_a_server_error]
expected-statuses = ["2xx", "3xx", "4xx", 503]

[checks.positive_data_acceptance]
expected-statuses = [200, 304, 400, 503]

[checks.negative_data_rejection]
expected-statuses = [400, 404, 415, 422]

[warnings]
fail-on = true
"""
CHECKS = {
    "allow_header_conformance",
    "content_type_conformance",
    "ensure_resource_availability",
    "idle_service_is_available",
    "ignored_auth",
    "missing_required_header",
    "negative_data_rejection",
    "not_a_server_error",
    "object_level_authorization",
    "positive_data_acceptance",
    "response_headers_conformance",
    "response_schema_conformance",
    "status_code_conformance",
    "unsupported_method",
    "use_after_free",
    "valid_request_is_refused_for_its_length_alone",
}


class Keyed:
    """A running service that needs keys, its document, and a key that may do everything."""

    def __init__(self, service: Service):
        self.service = service
        self.key = service.keys("add", "all", "--scope", "generate", "--scope", "metrics", "--scope", "admin")
        self.document = Document(service.get("/openapi.json").json)
        (self.model,) = (entry["id"] for entry in self.ask("GET", "/v1/models").json["data"])

    def ask(self, method: str, path: str, body: Any = None, key: str | None = None, **headers: str) -> Answer:
        """One request with the key, or with another; the answer is as the document tells."""
        asked = path.replace("{model}", self.model.replace(" ", "%20")) if "{" in path else path
        credentials = {"Authorization": f"Bearer {self.key if key is None else key}"} if key != "" else {}
        answer = self.service.request(method, asked, body, **credentials, **headers)
        return self.checked(method, path, answer)

    def checked(self, method: str, path: str, answer: Answer) -> Answer:
        self.document.check(path, method.lower(), answer.status, answer.headers, answer.body)
        return answer

    def body(self, path: str, text: str = "What is mini-llm?", **fields: Any) -> dict[str, Any]:
        """A body of a path that generates."""
        match path:
            case "/generate":
                return {"prompt": text, **fields}
            case "/v1/completions":
                return {"model": self.model, "prompt": text, **fields}
        return {"model": self.model, "messages": [{"role": "user", "content": text}], **fields}


@pytest.fixture(scope="module")
def keyed() -> Iterator[Keyed]:
    """gunicorn, gpt4all and the starter model behind keys; short answers on one thread, for there will be many."""
    settings = {"auth": "keys", "largest_max_tokens": 2, "default_max_tokens": 2, "threads": 1}
    with running_service(record=False, wait=False, **settings) as service:
        service.wait_phase("ready")
        yield Keyed(service)


@pytest.fixture(scope="module")
def obeying() -> Iterator[Keyed]:
    """gunicorn and the fake engine behind keys, with little patience and little room."""
    with running_service(
        engine_adapter=FAKE, auth="keys", body_limit_bytes=2000, header_timeout_s=1, body_timeout_s=1, queue_size=0
    ) as service:
        yield Keyed(service)


@pytest.mark.timeout(900)  # half a minute on two cores of its own
def test_schemathesis_finds_no_failure(keyed: Keyed, tmp_path: Path) -> None:
    """All checks of schemathesis, in all its phases, with valid and invalid data, on the real engine: no failure."""
    configuration, report = tmp_path / "schemathesis.toml", tmp_path / "report.ndjson"
    configuration.write_text(CONFIGURATION)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "schemathesis.cli", "--config-file", configuration),
            *("run", f"http://127.0.0.1:{keyed.service.port}/openapi.json", "--no-color"),
            *("--report", "ndjson", "--report-ndjson-path", report),
        ],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "SERVICE_KEY": keyed.key,
            "HYPOTHESIS_STORAGE_DIRECTORY": str(tmp_path / "hypothesis"),
        },
        capture_output=True,
        text=True,
        timeout=840,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "No issues found" in done.stdout
    assert not keyed.service.logs("failure")
    assert_thorough(keyed.document, read_report(report))


def read_report(report: Path) -> list[dict[str, Any]]:
    """The scenarios of a run that sent anything."""
    events = [json.loads(line) for line in report.read_text().splitlines()]
    scenarios = [event["ScenarioFinished"] for event in events if "ScenarioFinished" in event]
    return [scenario for scenario in scenarios if scenario["recorder"].get("cases")]


def assert_thorough(document: Document, scenarios: list[dict[str, Any]]) -> None:
    """A run without failures says something only if it got somewhere: every operation, check, phase and kind."""
    checks, answers = set(), defaultdict(set)
    for scenario in scenarios:
        recorder = scenario["recorder"]
        checks |= {check["name"] for found in recorder["checks"].values() for check in found}
        for interaction in recorder["interactions"].values():
            response = interaction["response"]
            kind = response["headers"].get("content-type", ["none"])[0].partition(";")[0]
            answers[recorder["label"]].add((response["status_code"], kind))
    assert checks == CHECKS
    assert {scenario["phase"] for scenario in scenarios} == {"examples", "coverage", "fuzzing", "stateful"}
    # It leaves out the path that it read the document from.
    operations = {f"{method.upper()} {path}" for path, method, _ in document.operations() if path != "/openapi.json"}
    assert operations <= set(answers)
    for path in TEXTS:
        statuses = {status for status, _ in answers[f"POST {path}"]}
        assert {(200, "application/json"), (200, "text/event-stream")} <= answers[f"POST {path}"]
        assert {200, 400, 401, 405, 415} <= statuses
    assert 422 in {status for status, _ in answers["POST /generate"]}
    for path in GUARDED:
        assert {200, 401} <= {status for status, _ in answers[f"GET {path}"]}


@pytest.mark.parametrize("path", TEXTS)
def test_answers_and_streams_are_as_told(keyed: Keyed, path: str) -> None:
    """The real engine's answers are as told, whole and streamed, with usage at the end or without."""
    assert keyed.ask("POST", path, keyed.body(path)).status == 200
    for fields in ({}, {"stop": "zzz", "temperature": 0}, {"stream_options": {"include_usage": True}}):
        if "stream_options" in fields and path == "/generate":
            continue
        streamed = keyed.ask("POST", path, keyed.body(path, stream=True, **fields))
        assert streamed.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert streamed.body.count(b"data: ") > 2


def test_all_that_is_read_is_as_told(keyed: Keyed) -> None:
    """Everything that can be read without a body is as told: state, models, usage, page."""
    for path, method, _ in keyed.document.operations():
        if method != "post":
            answer = keyed.ask(method.upper(), path)
            assert answer.status == 200, path
            if "etag" in answer.headers:
                assert keyed.ask(method.upper(), path, If_None_Match=answer.headers["etag"]).status == 304


def test_a_prompt_over_the_context_is_as_told(keyed: Keyed) -> None:
    """What JSON Schema cannot tell: more tokens than the context holds, a long run; a 400 with its kind and counts."""
    refused = keyed.ask("POST", "/generate", {"prompt": "word " * 3000})
    assert (refused.status, refused.json["type"]) == (400, "urn:mini-llm:problem:context-exceeded")
    assert refused.json["context_length"] == keyed.service.get("/version").json["model"]["context_length"]
    for path in (CHAT, COMPLETIONS):
        refused = keyed.ask("POST", path, keyed.body(path, "word " * 3000))
        assert (refused.status, refused.json["error"]["code"]) == (400, "context_length_exceeded")
    refused = keyed.ask("POST", "/generate", {"prompt": "a" * 60_000})
    assert (refused.status, refused.json["type"]) == (400, "urn:mini-llm:problem:malformed")


def test_metrics_need_a_key_unless_asked_from_here(keyed: Keyed) -> None:
    """The key of /metrics is told to be optional, and it is for direct requests alone: a proxy's need it."""
    assert {} in keyed.document.document["paths"]["/metrics"]["get"]["security"]
    assert keyed.ask("GET", "/metrics", key="").status == 200
    assert keyed.ask("GET", "/metrics", key="", **PROXIED).status == 401
    assert keyed.ask("GET", "/metrics", key="mllm_wrong").status == 401
    assert keyed.ask("GET", "/metrics", **PROXIED).status == 200
    without = keyed.service.keys("add", "no-metrics")
    assert keyed.ask("GET", "/metrics", key=without).status == 403


def test_keys_are_told_where_they_are_needed(keyed: Keyed) -> None:
    """Exactly the operations that are told to need a key refuse those without one, and those without the scope."""
    reader = keyed.service.keys("add", "reader", "--scope", "metrics")
    for path, method, operation in keyed.document.operations():
        body = keyed.body(path) if method == "post" else None
        needed = bool(operation.get("security")) and {} not in operation["security"]
        assert needed == (path in (*TEXTS, *GUARDED)), path
        assert keyed.ask(method.upper(), path, body, key="").status == (401 if needed else 200)
        assert keyed.ask(method.upper(), path, body, key=reader).status == (403 if needed else 200)


def test_without_keys_none_are_told() -> None:
    """Where keys are off the document asks for none, and tells that requests by a proxy are refused."""
    with running_service(engine_adapter=FAKE) as service:
        document = Document(service.get("/openapi.json").json)
        assert "securitySchemes" not in document.document["components"]
        for path in ("/usage", "/metrics", "/v1/models"):
            assert not document.document["paths"][path]["get"]["security"]
            for headers, status in (({}, 200), (PROXIED, 401)):
                answer = service.request("GET", path, **headers)
                assert answer.status == status
                document.check(path, "get", status, answer.headers, answer.body)


@pytest.mark.parametrize("path", TEXTS)
def test_refusals_are_as_told(obeying: Keyed, path: str) -> None:
    """Each refusal of a request for text is as told: status, shape, kind, headers."""
    limited = obeying.service.keys("add", f"limited{path.replace('/', '-')}", "--requests-per-minute", "1")
    out_of_bounds = 422 if path == "/generate" else 400
    tries: list[tuple[int, Any, dict[str, str]]] = [
        (400, b"{", {}),
        (400, obeying.body(path, seed=1), {}),
        (400, obeying.body(path, max_tokens=3000), {}),
        (413, obeying.body(path, "x" * 3000), {}),
        (415, obeying.body(path), {"Content-Type": "text/plain"}),
        (out_of_bounds, obeying.body(path, temperature=3), {}),
        (out_of_bounds, obeying.body(path), {"X-Deadline-S": "0"}),
        (500, obeying.body(path, "fail"), {}),
    ]
    for status, body, headers in tries:
        assert obeying.ask("POST", path, body, **headers).status == status, body
    assert obeying.ask("POST", path, obeying.body(path, "say a"), key=limited).status == 200
    refused = obeying.ask("POST", path, obeying.body(path, "say a"), key=limited)
    assert (refused.status, refused.headers["ratelimit"][:18]) == (429, '"key-requests";r=0')
    if path != "/generate":
        assert obeying.ask("POST", path, {**obeying.body(path), "model": "other"}).status == 404


@pytest.mark.parametrize("path", TEXTS)
def test_half_a_body_is_as_told(obeying: Keyed, path: str) -> None:
    """A body that does not arrive in time is refused as told."""
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {obeying.key}\r\n"
    head += "Content-Type: application/json\r\nContent-Length: 50\r\n\r\n{"
    with obeying.service.open(head.encode()) as client, closing(http.client.HTTPResponse(client)) as response:
        response.begin()
        found = {name.lower(): value for name, value in response.getheaders()}
        answer = obeying.checked("POST", path, Answer(response.status, found, response.read()))
    assert (answer.status, answer.headers["connection"]) == (408, "close")


@pytest.mark.parametrize("path", TEXTS)
def test_streams_that_fail_are_as_told(obeying: Keyed, path: str) -> None:
    """A failure on the way is an event that is told."""
    streamed = obeying.ask("POST", path, obeying.body(path, "fail", stream=True))
    assert streamed.status == 200
    assert b"engine" in streamed.body
    assert b"[DONE]" not in streamed.body


@pytest.mark.parametrize("path", TEXTS)
def test_a_busy_service_is_as_told(obeying: Keyed, path: str) -> None:
    """Without room in the queue, and with a deadline that is too short, the 503 is as told."""
    service = obeying.service
    service.wait_idle()  # there is no queue, and the slot of the test before is free only a moment after its answer
    busy = json.dumps({"prompt": "pause 0.05", "max_tokens": 60, "stream": True}).encode()
    head = f"POST /generate HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {obeying.key}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(busy)}\r\n\r\n"
    with service.open(head.encode() + busy):
        service.wait_running(1)
        assert obeying.ask("POST", path, obeying.body(path, "say a")).status == 503
    service.wait_idle()
    late = obeying.ask("POST", path, obeying.body(path, "pause 0.05", max_tokens=60), X_Deadline_S="0.4")
    if late.status == 200:  # not foreseen, but ended: only /generate has a word for that
        assert late.json["finish_reason"] == "cancelled"
    else:
        assert late.status == 503


@pytest.mark.parametrize(
    ("status", "request_line", "headers"),
    [
        (400, "{method} {path} HTTP/1.1", "Bad Name: x"),
        (414, "{method} {path}?" + "x" * 5000 + " HTTP/1.1", ""),
        (417, "{method} {path} HTTP/1.1", "Expect: wonders"),
        (431, "{method} {path} HTTP/1.1", "X-Long: " + "x" * 9000),
        (501, "{method} {path} HTTP/1.1", "Transfer-Encoding: wonders"),
    ],
)
def test_what_is_no_request_is_as_told(obeying: Keyed, status: int, request_line: str, headers: str) -> None:
    """What the web server refuses before the path is known is told for each operation."""
    opened = []
    for path, method, _ in obeying.document.operations():
        asked = request_line.format(method=method.upper(), path=path.replace("{model}", "x"))
        lines = [asked, "Host: localhost", "Connection: close", *([headers] if headers else []), "", ""]
        opened.append((path, method, obeying.service.open("\r\n".join(lines).encode())))
    for path, method, client in opened:
        with client, closing(http.client.HTTPResponse(client, method=method.upper())) as response:
            response.begin()
            found = {name.lower(): value for name, value in response.getheaders()}
            answer = Answer(response.status, found, response.read())
        assert answer.status == status
        if method != "head":
            obeying.checked(method, path, answer)
