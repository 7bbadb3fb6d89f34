"""More requests than room or time: refused at once, with a truthful Retry-After, while health goes on."""

import re
import socket
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.service.harness import FAKE, Service, running_service, write_small_model


def test_full_queue_is_refused_with_retry_after(fake: Service) -> None:
    """With every slot and place taken a request is refused at once; after Retry-After it is taken."""
    for _ in range(8):  # the service learns its speed: 20 tokens/s
        fake.generate("pause 0.05", max_tokens=20)
    clients = [fake.open_generate("pause 0.05", max_tokens=40, stream=True) for _ in range(4)]
    fake.wait_running(1, 3)
    start_s = time.monotonic()
    refused = fake.generate("say no")
    assert time.monotonic() - start_s < 1.5
    assert refused.status == 503
    assert refused.headers["content-type"] == "application/problem+json"
    assert refused.json["type"].endswith("queue-full")
    retry_after_s = int(refused.headers["retry-after"])
    assert 1 <= retry_after_s <= 4
    time.sleep(retry_after_s + 0.3)
    assert fake.generate("say yes").status == 200
    assert fake.metric("llm_refusals_total", reason="queue_full") == 1
    for client in clients:
        client.close()


def test_deadline_that_cannot_be_met_is_refused_at_once(fake: Service) -> None:
    """A declared deadline shorter than the predicted time is a 503 that tells the prediction."""
    for _ in range(8):
        fake.generate("pause 0.02", max_tokens=20)
    refused = fake.request("POST", "/generate", {"prompt": "pause 0.02", "max_tokens": 400}, X_Deadline_S="2")
    assert refused.status == 503
    predicted = re.search(r"ready in about ([0-9.]+) s", refused.json["detail"])
    assert predicted is not None
    assert 6 < float(predicted[1]) < 12
    met = fake.request("POST", "/generate", {"prompt": "pause 0.02", "max_tokens": 20}, X_Deadline_S="5")
    assert met.status == 200


def test_deadline_that_passes_cuts_the_answer(fake: Service) -> None:
    """An answer that turns out slower than predicted is cut at the deadline, and says so."""
    for _ in range(8):
        fake.generate("pause 0.001", max_tokens=50)
    late = fake.request("POST", "/generate", {"prompt": "pause 0.2", "max_tokens": 50}, X_Deadline_S="1.5")
    assert late.status == 200
    assert late.json["finish_reason"] == "cancelled"
    assert 0 < late.json["usage"]["completion_tokens"] < 10


def test_fresh_service_takes_a_deadline() -> None:
    """The first request of all may have a deadline; what was measured while starting says that it can be met."""
    with running_service(engine_adapter=FAKE) as service:
        answer = service.request("POST", "/generate", {"prompt": "say x"}, X_Deadline_S="2")
        assert answer.status == 200


@pytest.mark.parametrize("header", ["", "0", "-1", "1e9", "nan", "soon", "٣", "1" * 40])
def test_deadline_must_be_a_number_of_seconds(real: Service, header: str) -> None:
    """A malformed deadline is a 422 that names the header."""
    answer = real.request("POST", "/generate", {"prompt": "x"}, X_Deadline_S=header.encode().decode("latin-1"))
    assert answer.status == 422
    assert answer.json["field"] == "X-Deadline-S"


def test_queue_wait_has_a_limit() -> None:
    """A request whose turn does not come in time is told so."""
    with running_service(engine_adapter=FAKE, queue_wait_s=0.5) as service:
        running = service.open_generate("pause 0.1", max_tokens=100, stream=True)
        service.wait_running(1)
        start_s = time.monotonic()
        refused = service.generate("say late")
        assert refused.status == 503
        assert 0.4 < time.monotonic() - start_s < 3
        assert refused.json["type"].endswith("queue-timeout")
        running.close()


def test_slow_clients_do_not_stop_health() -> None:
    """Fifty connections that drip their headers or bodies are cut at their deadline; health answers meanwhile."""
    with running_service(record=False, header_timeout_s=1.5, body_timeout_s=2.5) as service:
        head = b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 500\r\n"
        head += b"Content-Type: application/json\r\n"
        clients = [service.open(head if number % 2 else head + b'\r\n{"pro') for number in range(50)]
        idle = [service.open(b"") for _ in range(100)]
        slowest_s, end_s = 0.0, time.monotonic() + 4
        while time.monotonic() < end_s:
            for client in clients:
                try:
                    client.send(b"x")
                except OSError:
                    pass  # cut, as it should be
            start_s = time.monotonic()
            assert service.get("/health").status == 200
            slowest_s = max(slowest_s, time.monotonic() - start_s)
            time.sleep(0.1)
        assert slowest_s < 1.5
        for client in clients:
            client.settimeout(1)
            try:
                rest = client.recv(4096)
            except ConnectionResetError:
                rest = b""
            assert rest == b"" or b" 408 " in rest
            client.close()
        for client in idle:
            client.close()
        assert service.metric("llm_requests_total", status="408") >= 25
        assert sum(line["status"] == 408 for line in service.logs("request")) >= 25
        assert service.generate("hello", max_tokens=1).status == 200


def test_half_bodies_without_a_key_hold_nobody_up() -> None:
    """Who has no key is told so before the body is there, and the connection ends; with the body there it is kept."""
    with running_service(engine_adapter=FAKE, auth="keys", body_timeout_s=20) as service:
        service.keys("add", "somebody")
        head = b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        clients = [service.open(head + b"Content-Length: 500\r\n\r\n{") for _ in range(80)]
        for client in clients:
            client.settimeout(5)
            answer = client.recv(4096)
            assert answer.startswith(b"HTTP/1.1 401 ")
            assert b"Connection: close" in answer
            client.close()
        assert service.get("/health").status == 200
        with service.open(head + b"Content-Length: 2\r\n\r\n{}") as client:
            assert b"Connection: keep-alive" in client.recv(4096)
            client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert client.recv(4096).startswith(b"HTTP/1.1 200 ")


def test_half_bodies_of_one_key_hold_nobody_up() -> None:
    """A few may dawdle; the others have the time of a body that was sent in one go, and the threads are free again."""
    with running_service(engine_adapter=FAKE, auth="keys", body_timeout_s=20) as service:
        key = service.keys("add", "somebody").strip()
        head = b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        head += b"Authorization: Bearer %s\r\nContent-Length: 500\r\n\r\n{" % key.encode()
        clients = [service.open(head) for _ in range(100)]  # there are 80 threads
        start_s = time.monotonic()
        assert service.get("/health").status == 200
        assert time.monotonic() - start_s < 5
        cut = 0
        for client in reversed(clients):  # those with more time came first
            client.settimeout(0.01 if cut >= 92 else 2)
            try:
                cut += client.recv(4096).startswith(b"HTTP/1.1 408 ")
            except TimeoutError:
                pass
        assert cut == 92
        for client in clients:
            client.close()


def test_large_bodies_of_one_key_hold_nobody_up() -> None:
    """While one is parsed no thread works; of more of them than a queue holds, the others are refused for a while."""
    with running_service(engine_adapter=FAKE, auth="keys") as service:
        greedy, other = service.keys("add", "greedy"), service.keys("add", "other")
        body = b'{"prompt":[' + b"[]," * 340_000 + b"[]]}"
        end_s, seen, slowest_s = time.monotonic() + 6, Counter[int](), 0.0

        def ask() -> None:
            while time.monotonic() < end_s:
                answer = service.request("POST", "/generate", body, Authorization=f"Bearer {greedy}")
                assert answer.status == 400 or answer.headers["retry-after"] == "1"
                seen[answer.status] += 1

        with ThreadPoolExecutor(60) as pool:
            for asking in [pool.submit(ask) for _ in range(60)]:
                while not asking.done():
                    start_s = time.monotonic()
                    answer = service.request("POST", "/generate", {"prompt": "x"}, Authorization=f"Bearer {other}")
                    assert answer.status == 200
                    slowest_s = max(slowest_s, time.monotonic() - start_s)
                    time.sleep(0.05)
                asking.result()
        assert slowest_s < 3
        assert set(seen) == {400, 429}


def test_clients_that_do_not_close_hold_nobody_up(fake: Service) -> None:
    """Connections that the service closes and the client does not are lingered for aside, not in front of others."""
    clients = [fake.open(b"GET /health HTTP/1.0\r\n\r\n") for _ in range(40)]
    time.sleep(0.1)
    start_s = time.monotonic()
    assert fake.get("/health").status == 200
    assert time.monotonic() - start_s < 1
    for client in clients:
        client.close()


def test_clients_that_pipeline_and_do_not_read_hold_nobody_up() -> None:
    """Each would hold a thread, and there are more of them than threads; in a crowd they lose it within seconds."""
    with running_service(engine_adapter=FAKE) as service:
        clients = [open_narrow(service) for _ in range(90)]  # there are 80 threads
        for client in clients:
            client.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 5)
        for _ in range(3):
            start_s = time.monotonic()
            assert service.get("/health").status == 200
            assert time.monotonic() - start_s < 8
        for client in clients:
            client.close()


def open_narrow(service: Service) -> socket.socket:
    """A connection for which the kernel keeps some thousand bytes."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 100)
    client.connect(("127.0.0.1", service.port))
    return client


def test_client_that_reads_a_little_loses_its_slot(tmp_path: Path) -> None:
    """It is what it holds up in all that counts, not how long ago it last read; and it makes the engine no slower."""
    with running_service(model=write_small_model(tmp_path)) as service:
        speed = service.get("/ready").json["tokens_per_second"]
        client = open_narrow(service)
        body = b'{"prompt": "x", "max_tokens": 2000, "temperature": 0, "stream": true}'
        head = b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        client.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        service.wait_running(1)
        start_s = time.monotonic()
        while service.get("/ready").json["running"] and time.monotonic() - start_s < 60:
            time.sleep(4)
            try:
                client.recv(2000)
            except OSError:
                break
        assert 15 < time.monotonic() - start_s < 45
        assert service.wait_request(endpoint="/generate")["client_left"] is True
        assert service.get("/ready").json["tokens_per_second"] > speed / 2
        client.close()


def test_client_that_pauses_gets_its_answer_whole(fake: Service) -> None:
    """At a breakpoint, in a pager: the kernel holds what it does not read, and nobody waits for it."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    client.connect(("127.0.0.1", fake.port))
    body = b'{"prompt": "pause 0.0001", "max_tokens": 400, "stream": true}'
    head = b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    client.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    assert fake.wait_request(endpoint="/generate", finish_reason="length")["completion_tokens"] == 400
    time.sleep(17)
    client.settimeout(20)
    with client, client.makefile("rb") as answer:
        assert b'"done":true' in answer.read()


def test_client_that_does_not_read_loses_its_slot(fake: Service) -> None:
    """A client with a tiny window that never reads holds neither the slot nor a drain for ever."""
    client = open_narrow(fake)
    body = b'{"prompt": "pause 0.0001", "max_tokens": 2000, "stream": true}'
    head = b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    client.sendall(head % len(body) + body)
    start_s = time.monotonic()
    assert fake.drain("--limit", "0.5").returncode == 0
    assert time.monotonic() - start_s < 15
    client.close()
