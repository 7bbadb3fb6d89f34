"""A client that leaves stops its generation, in each phase, streamed and not; nobody else notices."""

import socket
import threading
import time

import pytest

from tests.service.harness import FAKE, Service, read_events, running_service


@pytest.mark.parametrize("stream", [False, True])
def test_leaving_while_decoding_frees_the_slot(fake: Service, stream: bool) -> None:
    """During decode the slot is free within a token and a look at the socket."""
    client = fake.open_generate("pause 0.1", max_tokens=300, stream=stream)
    fake.wait_running(1)
    time.sleep(0.3)
    client.close()
    assert fake.wait_idle() < 1.5
    assert fake.metric("llm_cancelled_total", reason="client") == 1
    assert fake.wait_request(client_left=True)["status"] == 499


@pytest.mark.parametrize("stream", [False, True])
def test_leaving_during_prefill_frees_the_slot(fake: Service, stream: bool) -> None:
    """During prefill the slot is free within one batch (0.4 s here)."""
    client = fake.open_generate("prefill 0.05 " + "x " * 300, max_tokens=5, stream=stream)
    fake.wait_running(1)
    time.sleep(0.2)
    client.close()
    assert fake.wait_idle() < 2.0
    assert fake.metric("llm_tokens_generated_total") == 0


@pytest.mark.parametrize("stream", [False, True])
def test_leaving_the_queue_takes_effect_at_once(fake: Service, stream: bool) -> None:
    """A waiting request whose client leaves gives its place back while the running one goes on."""
    running = fake.open_generate("pause 0.05", max_tokens=60, stream=True)
    fake.wait_running(1)
    waiting = fake.open_generate("say never", stream=stream)
    fake.wait_running(1, 1)
    waiting.close()
    fake.wait_running(1, 0, timeout_s=2.0)
    events = list(read_events(running))
    assert events[-1][1]["usage"]["completion_tokens"] == 60
    running.close()


def test_half_open_reset_is_a_leaving_too(fake: Service) -> None:
    """A connection reset (not only closed) cancels as well."""
    client = fake.open_generate("pause 0.1", max_tokens=300)
    fake.wait_running(1)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
    client.close()
    assert fake.wait_idle() < 1.5


def test_real_engine_stops_within_a_token() -> None:
    """The real engine lets go of an answer in the middle, and the next request is served at once."""
    with running_service(record=False) as service:
        context = service.get("/version").json["model"]["context_length"]
        prompt_tokens = service.generate("tell", max_tokens=1).json["usage"]["prompt_tokens"]
        left = 0
        for _ in range(20):
            # Hot sampling keeps the small model talking for long.
            client = service.open_generate(
                "tell", max_tokens=context - prompt_tokens, temperature=2, top_k=1000, top_p=1, stream=True
            )
            client.recv(4096)
            client.close()
            service.wait_idle(2.0)
            left += 1
        assert service.generate("tell", max_tokens=1).status == 200
        assert service.metric("llm_engine_restarts_total") == 0
        assert left == 20


def test_queued_streams_hear_from_the_service() -> None:
    """A queued stream gets a comment line every few seconds, so that proxies hold on."""
    with running_service(engine_adapter=FAKE) as service:
        running = service.open_generate("pause 0.1", max_tokens=120, stream=True)
        service.wait_running(1)
        with service.open_generate("say done", stream=True) as waiting:
            seen = []
            for kind, event in read_events(waiting):
                seen.append((kind, event))
                if len([1 for kind, _ in seen if kind == "comment"]) >= 3:
                    break
            assert seen[1] == ("comment", ": waiting")
        running.close()


def test_queue_is_first_come_first_served(fake: Service) -> None:
    """Requests get their turns in the order in which they came."""
    done: list[int] = []

    def ask(number: int) -> None:
        assert fake.generate("pause 0.05 say a b c").status == 200
        done.append(number)

    threads = []
    for number in range(4):
        thread = threading.Thread(target=ask, args=(number,))
        thread.start()
        threads.append(thread)
        fake.wait_running(1, number)
    for thread in threads:
        thread.join()
    assert done == [0, 1, 2, 3]
