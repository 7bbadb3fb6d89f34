"""Keys, limits, fairness and audit of the real service: what is promised holds, also in a bad hour."""

import base64
import json
import signal
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from typing import Any

import pytest

from tests.service.harness import FAKE, Answer, Service, read_events, running_service

SLOW = "pause 0.05"  # 20 tokens a second


@pytest.fixture
def keyed() -> Iterator[Service]:
    """The fake engine behind keys, one a test, with room for many waiting requests."""
    with running_service(engine_adapter=FAKE, auth="keys", queue_size=64) as service:
        yield service


def ask(service: Service, key: str | None, prompt: str = "say x", **fields: Any) -> Answer:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    return service.request("POST", "/generate", {"prompt": prompt, **fields}, **headers)


def open_stream(service: Service, key: str, prompt: str, **fields: Any) -> socket.socket:
    body = json.dumps({"prompt": prompt, "stream": True, **fields}).encode()
    head = f"POST /generate HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {key}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return service.open(head.encode() + body)


def audit_lines(service: Service, least: int = 0) -> list[dict[str, Any]]:
    """The log's lines, once there are that many: a request's last one is written after its answer."""
    end_s = time.monotonic() + 5
    while True:
        files = sorted((service.state_dir / "audit").glob("*.jsonl"))
        lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
        if len(lines) >= least or time.monotonic() > end_s:
            return lines
        time.sleep(0.02)


def verify(service: Service) -> str:
    done = service.run("audit", "verify")
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_no_key_file_refuses_everything_until_there_is_one(keyed: Service) -> None:
    """Without a key file nobody gets in, with 503; the first key opens the door without a restart."""
    refused = ask(keyed, "mllm_guess")
    assert refused.status == 503
    assert refused.json["type"].endswith("keys-unusable")
    assert keyed.get("/health").status == keyed.get("/ready").status == 200
    key = keyed.keys("add", "alice")
    assert ask(keyed, key).status == 200
    (keyed.state_dir / "keys.json").write_text("{")
    assert ask(keyed, key).status == 503
    assert "damaged" in keyed.logs("failure")[-1]["error"]


def test_credentials_over_http(keyed: Service) -> None:
    """curl -u and Bearer get in; anything else is a 401 with both challenges, and the log holds no key."""
    key = keyed.keys("add", "alice")
    basic = base64.b64encode(f"alice:{key}".encode()).decode()
    assert keyed.request("POST", "/generate", {"prompt": "say x"}, Authorization=f"Basic {basic}").status == 200
    refused = ask(keyed, None)
    assert refused.status == 401
    assert "Bearer realm=" in refused.headers["www-authenticate"]
    assert "Basic realm=" in refused.headers["www-authenticate"]
    assert ask(keyed, key + "x").status == 401
    assert keyed.metric("llm_refusals_total", reason="unauthenticated") == 2
    text = keyed.log_path.read_text() + json.dumps(audit_lines(keyed))
    assert key not in text
    assert basic not in text


def test_keys_come_and_go_while_requests_run(keyed: Service) -> None:
    """A key that is revoked is refused at once, its running answer ends as it should, and others notice nothing."""
    first, second = keyed.keys("add", "first"), keyed.keys("add", "second")
    events = read_events(open_stream(keyed, first, SLOW, max_tokens=40))
    assert next(event for event in events if event[0] == "data")
    keyed.keys("revoke", "first")
    assert ask(keyed, first).status == 401
    third = keyed.keys("add", "third", "--expires", "1h")
    results: list[int] = []
    threads = [
        threading.Thread(target=lambda key=key: results.append(ask(keyed, key).status)) for key in (second, third)
    ]
    for thread in threads:
        thread.start()
    *_, (kind, last) = events
    assert (kind, last["finish_reason"], last["usage"]["completion_tokens"]) == ("data", "length", 40)
    for thread in threads:
        thread.join()
    assert results == [200, 200]
    assert [line["key"] for line in audit_lines(keyed) if line["event"] in ("key-added", "key-revoked")] == [
        *("first", "second", "first", "third")
    ]


def test_expired_key(keyed: Service) -> None:
    """A key works until its time is over, and not longer."""
    expires = datetime.fromtimestamp(time.time() + 4, UTC).isoformat()
    key = keyed.keys("add", "guest", "--expires", expires)
    assert ask(keyed, key).status == 200
    time.sleep(4.2)
    refused = ask(keyed, key)
    assert refused.status == 401
    assert "expired" in refused.json["detail"]


def test_requests_a_minute_are_limited_and_released(keyed: Service) -> None:
    """The third request of two a minute is a 429; after Retry-After, and not before, the next one is taken."""
    key = keyed.keys("add", "alice", "--requests-per-minute", "2")
    start_s = time.monotonic()
    first = ask(keyed, key)
    assert first.headers["ratelimit-policy"] == '"key-requests";q=2;w=60'
    assert first.headers["ratelimit"].startswith('"key-requests";r=1;t=')
    time.sleep(2)
    assert ask(keyed, key).status == 200
    refused = ask(keyed, key)
    assert refused.status == 429
    assert refused.json["type"].endswith("key-requests")
    wait_s = int(refused.headers["retry-after"])
    assert 55 <= wait_s <= 60
    # What is asked that takes no turn is not counted.
    assert keyed.request("GET", "/usage", Authorization=f"Bearer {key}").status == 200
    assert ask(keyed, keyed.keys("add", "bob")).status == 200
    time.sleep(max(0.0, wait_s - 3 - (time.monotonic() - start_s) + 2))
    assert ask(keyed, key).status == 429
    time.sleep(3.2)
    assert ask(keyed, key).status == 200


def test_parallel_requests_are_limited_and_released(keyed: Service) -> None:
    """One at a time: the second is a 429 whose Retry-After is the time that the first still needs."""
    key = keyed.keys("add", "alice", "--parallel", "1")
    for _ in range(8):
        ask(keyed, key, SLOW, max_tokens=10)
    running = open_stream(keyed, key, SLOW, max_tokens=60)  # 3 s
    keyed.wait_running(1)
    refused = ask(keyed, key)
    assert refused.status == 429
    assert refused.json["type"].endswith("key-parallel")
    wait_s = int(refused.headers["retry-after"])
    assert 2 <= wait_s <= 4
    time.sleep(wait_s + 0.3)
    assert ask(keyed, key).status == 200
    running.close()


def test_tokens_a_day_are_reserved_and_settled(keyed: Service) -> None:
    """What runs has its tokens reserved; what it did not use comes back; the rest of the day is told in seconds."""
    key = keyed.keys("add", "alice", "--tokens-per-day", "50")
    running = open_stream(keyed, key, "pause 0.2 say a b c d e f g h", max_tokens=40)
    keyed.wait_running(1)
    refused = ask(keyed, key, max_tokens=20)
    assert refused.status == 429
    assert refused.json["type"].endswith("key-tokens")
    assert int(refused.headers["retry-after"]) < 60  # the running request may give back enough
    assert list(read_events(running))[-1][1]["usage"]["completion_tokens"] == 8
    assert ask(keyed, key, "say " + "a " * 30, max_tokens=42).json["usage"]["completion_tokens"] == 30
    usage = keyed.request("GET", "/usage", Authorization=f"Bearer {key}").json
    assert usage["keys"][0]["tokens_today"] == 38
    # Without max_tokens an answer is as long as the day still allows.
    cut = ask(keyed, key, "say " + "a " * 30)
    assert (cut.json["finish_reason"], cut.json["usage"]["completion_tokens"]) == ("length", 12)
    refused = ask(keyed, key, max_tokens=1)
    now = datetime.now(UTC)
    midnight_s = 86_400 - (now.hour * 3600 + now.minute * 60 + now.second)
    assert abs(int(refused.headers["retry-after"]) - midnight_s) <= 3
    too_many = ask(keyed, key, max_tokens=51)
    assert (too_many.status, too_many.json["field"]) == (422, "max_tokens")


def test_daily_counters_outlive_a_kill() -> None:
    """SIGKILL of all its processes: what was used is still used, and what was under way stays reserved."""
    with running_service(engine_adapter=FAKE, auth="keys") as service:
        key = service.keys("add", "alice", "--tokens-per-day", "100")
        assert ask(service, key, "say a b c d", max_tokens=50).status == 200
        running = open_stream(service, key, SLOW, max_tokens=30)
        service.wait_running(1)
        time.sleep(0.2)  # counters are written behind by 20 ms
        worker = service.web
        worker.send_signal(signal.SIGKILL)
        worker.wait(10)
        running.close()
        service.wait_phase("ready")  # gunicorn has started another worker
        usage = service.request("GET", "/usage", Authorization=f"Bearer {key}").json
        assert usage["keys"][0]["tokens_today"] == 4 + 30
        refused = ask(service, key, max_tokens=67)
        assert refused.status == 429
        assert ask(service, key, "say a", max_tokens=66).status == 200
        verify(service)


def test_addresses_are_limited_behind_a_proxy() -> None:
    """A trusted proxy's word tells addresses apart; a client's own word is nothing."""
    with running_service(
        engine_adapter=FAKE,
        auth="keys",
        trusted_proxies="127.0.0.1",
        address_requests_per_minute=2,
        address_parallel=1,
    ) as service:
        key = service.keys("add", "alice")

        def ask_from(forwarded: str) -> Answer:
            headers = {"Authorization": f"Bearer {key}", "X-Forwarded-For": forwarded}
            return service.request("POST", "/generate", {"prompt": "say x"}, **headers)

        assert [ask_from("198.51.100.1").status for _ in range(3)] == [200, 200, 429]
        assert ask_from("198.51.100.2").status == 200
        # Forged in front of what the proxy adds: it is still the same client.
        forged = ask_from("198.51.100.99, 198.51.100.1")
        assert forged.status == 429
        assert forged.json["type"].endswith("address-requests")
        assert {line.get("address") for line in audit_lines(service) if line["event"] == "admitted"} == {
            *("198.51.100.1", "198.51.100.2")
        }


def test_forged_proxy_headers() -> None:
    """Without trusted proxies, headers of proxies change no address; without keys they close the door."""
    with running_service(engine_adapter=FAKE, auth="keys", address_requests_per_minute=2) as service:
        key = service.keys("add", "alice")
        statuses = [
            service.request(
                "POST", "/generate", {"prompt": "say x"}, Authorization=f"Bearer {key}", X_Forwarded_For=f"1.1.1.{last}"
            ).status
            for last in range(3)
        ]
        assert statuses == [200, 200, 429]
        for header in ("X-Forwarded-For", "Forwarded", "Via", "X-Real-IP"):
            assert service.request("GET", "/metrics", **{header: "127.0.0.1"}).status == 401
        assert service.request("GET", "/metrics", Host="llm.example.org").status == 401
        assert service.get("/metrics").status == 200
        scraper = service.keys("add", "prometheus", "--scope", "metrics")
        headers = {"Authorization": f"Bearer {scraper}", "X-Forwarded-For": "10.0.0.1"}
        assert service.request("GET", "/metrics", **headers).status == 200
        assert service.request("GET", "/usage", Authorization=f"Bearer {scraper}").status == 403
    with running_service(engine_adapter=FAKE, auth="off") as service:
        assert service.generate("say x").status == 200
        for header in ("X-Forwarded-For", "Forwarded", "Via", "X-Real-IP", "X-Forwarded-Proto"):
            assert service.request("POST", "/generate", {"prompt": "say x"}, **{header: "127.0.0.1"}).status == 401
        assert service.request("POST", "/generate", {"prompt": "say x"}, Host="evil.example").status == 401


def test_turns_go_between_keys(keyed: Service) -> None:
    """One key with 50 requests queued delays another's first by at most one generation, measured."""
    greedy, other = keyed.keys("add", "greedy"), keyed.keys("add", "other")
    tokens = 10
    alone_s = statistics.median(_time_s(keyed, other, tokens) for _ in range(3))
    with ExitStack() as clients:
        # The first is long enough for all the others to be there before it ends.
        clients.enter_context(open_stream(keyed, greedy, SLOW, max_tokens=80))
        keyed.wait_running(1)
        for _ in range(48):
            clients.enter_context(open_stream(keyed, greedy, SLOW, max_tokens=tokens))
        keyed.wait_running(1, 48)
        keyed.wait_running(1, 47)  # the long one is over
        waits_s = [_time_s(keyed, other, tokens) for _ in range(4)]
        done = sum(line.get("key") == "greedy" for line in keyed.logs("request"))
    assert max(waits_s) < 2 * alone_s + 0.35, (alone_s, waits_s)
    assert 4 <= done <= 7  # it has its turns between
    keyed.wait_idle()


def _time_s(service: Service, key: str, tokens: int) -> float:
    start_s = time.monotonic()
    assert ask(service, key, SLOW, max_tokens=tokens).status == 200
    return time.monotonic() - start_s


def test_usage_is_told_to_its_owner(keyed: Service) -> None:
    """A key sees its own counts; one with the scope admin sees all; another scope sees nothing."""
    alice = keyed.keys("add", "alice", "--tokens-per-day", "100", "--requests-per-minute", "9")
    admin = keyed.keys("add", "boss", "--scope", "generate", "--scope", "admin")
    ask(keyed, alice, "say a b c")
    mine = keyed.request("GET", "/usage", Authorization=f"Bearer {alice}").json["keys"]
    assert [key["name"] for key in mine] == ["alice"]
    assert {use["name"]: (use["used"], use["limit"]) for use in mine[0]["limits"]} == {
        "key-requests": (1, 9),
        "key-tokens": (3, 100),
    }
    everyone = keyed.request("GET", "/usage", Authorization=f"Bearer {admin}").json["keys"]
    assert {key["name"]: key["tokens_today"] for key in everyone} == {"alice": 3, "boss": 0}
    assert keyed.get("/usage").status == 401


def test_audit_log_tells_what_happened(keyed: Service) -> None:
    """Admissions with their ends, refusals and changes of keys stand in the log, with counts and without texts."""
    alice = keyed.keys("add", "alice", "--tokens-per-day", "100")
    ask(keyed, alice, "say verysecret")
    ask(keyed, "mllm_wrong")
    ask(keyed, alice, temperature=9)
    ask(keyed, alice, "fail")
    client = open_stream(keyed, alice, SLOW, max_tokens=50)
    keyed.wait_running(1)
    client.close()
    keyed.wait_idle()
    lines = audit_lines(keyed, 10)
    told = [(line["event"], line.get("key"), line.get("outcome") or line.get("reason")) for line in lines]
    assert told[1:] == [
        ("key-added", "alice", None),
        ("admitted", "alice", None),
        ("ended", "alice", "stop"),
        ("refused", None, "unauthenticated"),
        ("refused", "alice", "out-of-bounds"),
        ("admitted", "alice", None),
        ("ended", "alice", "engine-failed"),
        ("admitted", "alice", None),
        ("ended", "alice", "client"),
    ]
    assert lines[3]["completion_tokens"] == 1
    assert lines[2]["id"] == lines[3]["id"]
    assert "verysecret" not in json.dumps(lines)
    assert "whole" in verify(keyed)


def test_thousand_lines_under_load_verify(keyed: Service) -> None:
    """500 requests from 16 threads make more than a thousand lines, while keys come and go; the chain is whole."""
    key = keyed.keys("add", "alice")
    failures: list[int] = []

    def work(number: int) -> None:
        for _ in range(32):
            status = ask(keyed, key).status
            if status != 200:
                failures.append(status)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for number in range(5):
        keyed.keys("add", f"guest-{number}")
    for thread in threads:
        thread.join()
    assert not failures
    lines = audit_lines(keyed, 1 + 6 + 2 * 16 * 32)
    assert len(lines) >= 1000
    assert sum(line["event"] == "ended" for line in lines) == 16 * 32
    verify(keyed)
    path = next((keyed.state_dir / "audit").glob("*.jsonl"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    done = keyed.run("audit", "verify")
    assert done.returncode == 1
    where = data[: len(data) // 2].count(b"\n") + 1
    assert f"{path.name}:{where}:" in done.stdout


def test_killed_service_goes_on_with_its_chain() -> None:
    """SIGKILL in the middle of work, started again: the chain goes on and is whole."""
    with running_service(engine_adapter=FAKE, auth="keys") as service:
        key = service.keys("add", "alice")
        for _ in range(2):
            clients = [open_stream(service, key, "pause 0.01", max_tokens=50) for _ in range(4)]
            for client in clients:
                assert client.recv(1)  # what is told to the client stands in the log
            worker = service.web
            worker.send_signal(signal.SIGKILL)
            worker.wait(10)
            for client in clients:
                client.close()
            service.wait_phase("ready")
        assert ask(service, key).status == 200
        verify(service)
        lines = audit_lines(service)
        assert sum(line["event"] == "admitted" for line in lines) == 9


def test_commands_tell_what_is_wrong(keyed: Service) -> None:
    """Wrong names, limits, times and scopes are told in one line, and nothing is changed."""
    keyed.keys("add", "alice")
    for arguments, said in (
        (("add", "alice"), "already"),
        (("add", "a b"), "must be 1 to 64"),
        (("add", "bob", "--tokens-per-day", "0"), "whole number"),
        (("add", "bob", "--expires", "soon"), "must be like"),
        (("add", "bob", "--scope", "root"), "invalid choice"),
        (("revoke", "bob"), "no key of the name"),
        ((), "COMMAND"),
    ):
        done = keyed.run("keys", *arguments)
        assert done.returncode in (1, 2)
        assert said in done.stderr, done.stderr
        assert "Traceback" not in done.stderr
    assert [key["name"] for key in json.loads(keyed.keys("list", "--json"))] == ["alice"]
    assert "alice" in keyed.keys("list")
    assert "mllm_" not in keyed.keys("list")
