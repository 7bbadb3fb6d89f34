"""What five hundred requests leave behind: nothing."""

import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import psutil

from tests.service.harness import SMALL, Service, running_service


def resident_bytes(service: Service) -> dict[str, int]:
    return {"web": service.web.memory_info().rss, "engine": service.engine.memory_info().rss}


def ask_mixed(service: Service, count: int) -> None:
    """Plain, streamed, refused and abandoned requests in turn."""
    for number in range(count):
        match number % 4:
            case 0 | 1:
                assert service.generate(f"hello {number}", max_tokens=8).status == 200
            case 2:
                assert service.generate("x", max_tokens=0).status == 422
            case 3:
                client = service.open_generate(f"hello {number}", max_tokens=64, stream=True)
                client.recv(100)
                client.close()
    service.wait_idle()


def test_memory_threads_and_descriptors_stay(tmp_path: object) -> None:
    """After 500 mixed requests memory is within 5 % of that after 50; threads and descriptors do not grow."""
    with running_service(model=SMALL) as service:
        # Each of the server's threads gets its stack and arena first, so that what is compared is a warm process.
        threads = [threading.Thread(target=service.get, args=("/health",)) for _ in range(100)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        ask_mixed(service, 50)
        before, descriptors = resident_bytes(service), service.web.num_fds()
        ask_mixed(service, 450)
        gc.collect()
        after = resident_bytes(service)
        for name, value in after.items():
            assert value <= before[name] * 1.05, (name, before, after)
        assert service.web.num_fds() <= descriptors + 2
        assert service.web.num_threads() <= 130
        assert psutil.Process(service.process.pid).is_running()


def test_memory_of_large_bodies_is_given_back() -> None:
    """A rush of them takes what they are as text, and none of it for good: each thread had kept the largest it saw."""
    with running_service(model=SMALL) as service:
        before = resident_bytes(service)["web"]
        body = '{"max_tokens": 1, "prompt": "\U0001f600%s"}' % ("a b " * 260_000)
        with ThreadPoolExecutor(60) as pool:
            for answer in pool.map(lambda _: service.request("POST", "/generate", body.encode()), range(400)):
                assert answer.status in (400, 429, 503)
        service.wait_idle()
        assert resident_bytes(service)["web"] < before + (60 << 20)
