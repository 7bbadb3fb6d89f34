"""Start, drain, stop, and the deaths of the engine and of the web process."""

import json
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

from tests.ports import free_port
from tests.service.harness import (
    FAKE,
    ROOT,
    Answer,
    Service,
    read_events,
    running_service,
)


def test_drain_under_load_loses_nothing(fake: Service) -> None:
    """Drain: accepted requests finish, new ones get 503 and a closed connection, and SIGTERM then ends it with 0."""
    answers: list[Answer] = []
    threads = [
        threading.Thread(target=lambda: answers.append(fake.generate("pause 0.1", max_tokens=8))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    fake.wait_running(1, 2)
    drained: list[float] = []

    def drain() -> None:
        assert fake.drain().returncode == 0
        drained.append(time.monotonic())

    drainer = threading.Thread(target=drain)
    refusals = []
    with fake.kept_connection() as kept:
        drainer.start()
        fake.wait_phase("draining")
        kept.request("POST", "/generate", b'{"prompt": "say x"}', {"Content-Type": "application/json"})
        refused = kept.getresponse()
        refusals.append((refused.status, refused.headers["Connection"], refused.headers["Retry-After"]))
    assert refusals == [(503, "close", "1")]
    assert fake.get("/ready").status == 503
    assert fake.get("/health").status == 200
    for thread in threads:
        thread.join()
    finished_s = time.monotonic()
    drainer.join()
    assert [answer.status for answer in answers] == [200] * 3
    assert [answer.json["usage"]["completion_tokens"] for answer in answers] == [8] * 3
    assert drained[0] >= finished_s - 1
    engine = fake.engine
    assert fake.terminate() == 0
    assert not engine.is_running()


def test_drain_limit_cuts_what_is_left(fake: Service) -> None:
    """At the limit the rest is ended politely: text so far, finish reason cancelled, the command says how many."""
    client = fake.open_generate("pause 0.1", max_tokens=400, stream=True)
    fake.wait_running(1)
    done = fake.drain("--limit", "0.5")
    assert done.returncode == 0
    assert "1 cancelled" in done.stderr
    last = list(read_events(client))[-1][1]
    assert last["finish_reason"] == "cancelled"
    assert last["usage"]["completion_tokens"] > 0
    client.close()


def test_sigterm_alone_lets_streams_end(fake: Service) -> None:
    """SIGTERM without a drain: the running and the queued stream end whole, exit code 0."""
    running = fake.open_generate("pause 0.1", max_tokens=10, stream=True)
    fake.wait_running(1)
    queued = fake.open_generate("say a b c", stream=True)
    fake.wait_running(1, 1)
    fake.process.send_signal(signal.SIGTERM)
    assert list(read_events(running))[-1][1]["usage"]["completion_tokens"] == 10
    assert list(read_events(queued))[-1][1]["finish_reason"] == "stop"
    assert fake.process.wait(10) == 0


def test_ctrl_c_mid_stream_is_quick(fake: Service) -> None:
    """Ctrl-C (SIGINT to the whole foreground group) does not wait for answers; nothing outlives it."""
    with fake.open_generate("pause 0.1", max_tokens=400, stream=True):
        fake.wait_running(1)
        web, engine = fake.web, fake.engine
        start_s = time.monotonic()
        web.send_signal(signal.SIGINT)
        fake.process.send_signal(signal.SIGINT)
        assert fake.process.wait(10) in (0, -signal.SIGINT)
        _, alive = psutil.wait_procs([web, engine], timeout=3)
        assert not alive
        assert time.monotonic() - start_s < 4


def test_a_ctrl_c_that_is_handed_on_is_one(fake: Service) -> None:
    """By gunicorn, whenever it comes to it, be that in the middle of what the first signal began."""
    with fake.open_generate("pause 0.1", max_tokens=400, stream=True):
        fake.wait_running(1)
        web, engine = fake.web, fake.engine
        for _ in range(100):
            web.send_signal(signal.SIGINT)
            web.send_signal(signal.SIGQUIT)
        fake.process.send_signal(signal.SIGINT)
        _, alive = psutil.wait_procs([web, engine], timeout=4)
        assert not alive
        assert fake.process.wait(10) in (0, -signal.SIGINT)


def test_idle_stop_is_quick(fake: Service) -> None:
    """Without requests SIGTERM ends everything within 3 s, exit code 0."""
    start_s = time.monotonic()
    assert fake.terminate() == 0
    assert time.monotonic() - start_s < 6


def test_a_stop_that_is_signalled_again_and_again_is_one(fake: Service) -> None:
    """A stop of a whole group signals every process, and gunicorn hands it on: still an end with 0, and soon."""
    web = fake.web
    for _ in range(100):
        web.send_signal(signal.SIGTERM)
    fake.process.send_signal(signal.SIGTERM)
    assert fake.process.wait(10) == 0


def test_drain_without_a_service_says_so(fake: Service) -> None:
    """The drain command fails with one clear line where no service runs."""
    fake.terminate()
    done = fake.drain()
    assert done.returncode == 1
    assert done.stderr.startswith("error: no service answers at ")
    assert len(done.stderr.splitlines()) == 1


def test_killed_engine_costs_one_request(fake: Service) -> None:
    """SIGKILL of the engine: an error event in the running stream, the queue is served after one restart."""
    running = fake.open_generate("pause 0.1", max_tokens=200, stream=True)
    fake.wait_running(1)
    queued = fake.open_generate("say still here", stream=True)
    fake.wait_running(1, 1)
    web = fake.web.pid
    fake.engine.kill()
    start_s = time.monotonic()
    events = list(read_events(running))
    assert time.monotonic() - start_s < 3
    kind, problem = events[-1]
    assert kind == "error"
    assert problem["status"] == 500
    assert any(line["id"] == problem["id"] and "SIGKILL" in line["error"] for line in fake.logs("failure"))
    answer = "".join(event["response"] for kind, event in read_events(queued) if kind == "data")
    assert answer == "still here"
    assert fake.metric("llm_engine_restarts_total") == 1
    assert fake.web.pid == web
    fake.wait_phase("ready")


def test_abort_in_the_engine_is_a_500_with_an_id(fake: Service) -> None:
    """An abort inside the engine: the request that caused it gets a 500 whose id stands in the log; others go on."""
    with fake.kept_connection() as kept:
        answer = fake.generate("abort")
        assert answer.status == 500
        assert any(line["id"] == answer.json["id"] and "SIGABRT" in line["error"] for line in fake.logs("failure"))
        kept.request("GET", "/health")
        assert kept.getresponse().status == 200
    assert fake.generate("say again").json["response"] == "again"
    assert fake.generate("fail").status == 500
    assert fake.generate("abort-on-count").status == 500
    assert fake.generate("say again").json["response"] == "again"


def test_request_during_a_restart_waits_for_it(fake: Service) -> None:
    """A request that comes while the engine restarts is served afterwards."""
    fake.engine.kill()
    assert fake.generate("say patience").json["response"] == "patience"


def test_killed_web_process_takes_its_engine_along(fake: Service) -> None:
    """SIGKILL of the web process mid-stream: its engine goes within seconds, another pair serves."""
    client = fake.open_generate("pause 0.1", max_tokens=200, stream=True)
    fake.wait_running(1)
    web, engine = fake.web, fake.engine
    web.kill()
    psutil.wait_procs([engine], timeout=3)
    assert not engine.is_running()
    client.close()
    fake.wait_phase("ready")
    assert fake.generate("say back").json["response"] == "back"
    assert fake.engine.pid != engine.pid


def test_killed_master_leaves_nothing(fake: Service) -> None:
    """SIGKILL of gunicorn's master: web and engine process go by themselves."""
    web, engine = fake.web, fake.engine
    fake.process.kill()
    fake.process.wait()
    _, alive = psutil.wait_procs([web, engine], timeout=8)
    assert not alive


def test_engine_that_dies_at_each_start_ends_in_not_ready() -> None:
    """A model that kills its engine at each start: some tries with growing pauses, then not ready with the reason."""
    with running_service(record=False, wait=False, engine_adapter=FAKE, model_name="abort-at-load") as service:
        seen = service.wait_phase("failed", timeout_s=30)
        assert "SIGABRT" in seen["reason"]
        assert "told to abort" in seen["reason"]
        starts = [line for line in service.logs("engine") if line["phase"] == "starting"]
        assert len(starts) == 5
        assert service.get("/health").status == 200
        assert service.metric("llm_model_loaded") == 0
        refused = service.generate("x")
        assert refused.status == 503
        assert refused.headers["retry-after"]


def test_hanging_engine_is_replaced() -> None:
    """An engine that gives no sign of life is killed, its request fails, the next is served."""
    with running_service(engine_adapter=FAKE, stall_timeout_s=1) as service:
        start_s = time.monotonic()
        assert service.generate("hang").status == 500
        assert time.monotonic() - start_s < 4
        assert service.generate("say fine").json["response"] == "fine"


def test_frozen_engine_does_not_hold_the_service(fake: Service) -> None:
    """An engine that is frozen while a large prompt is on its way to it is replaced; nobody waits for ever."""
    frozen = fake.engine
    frozen.suspend()
    start_s = time.monotonic()
    answers: list[Answer] = []
    threads = [
        threading.Thread(target=lambda prompt=prompt: answers.append(fake.generate(prompt)))
        for prompt in ("x " * 300_000, "say small")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(50)
    assert time.monotonic() - start_s < 45
    assert sorted(answer.status for answer in answers) in ([200, 400], [200, 500])
    assert not frozen.is_running()
    fake.wait_phase("ready")


def test_short_memory_at_a_restart_is_not_the_end(tmp_path: Path) -> None:
    """A model that was served and does not fit for a while is tried until it fits again."""
    shortage = tmp_path / "shortage"
    with running_service(engine_adapter=FAKE, model_name=shortage) as service:
        shortage.touch()
        service.engine.kill()
        end_s = time.monotonic() + 20
        while len([line for line in service.logs("engine") if "short of memory" in line["reason"]]) < 6:
            assert time.monotonic() < end_s
            time.sleep(0.1)
        assert service.get("/ready").json["status"] != "failed"
        shortage.unlink()
        service.wait_phase("ready")


def test_reload_keeps_the_drain_command(fake: Service) -> None:
    """After SIGHUP the new worker answers the drain command, also once the old one has gone."""
    old = fake.web.pid
    fake.process.send_signal(signal.SIGHUP)
    end_s = time.monotonic() + 20
    while psutil.pid_exists(old) or not [p for p in psutil.Process(fake.process.pid).children() if p.pid != old]:
        assert time.monotonic() < end_s
        time.sleep(0.05)
    fake.wait_phase("ready")
    assert fake.drain("--limit", "0").returncode == 0


def test_gunicorns_arguments_cannot_open_the_service(fake: Service) -> None:
    """GUNICORN_CMD_ARGS with another address is refused with one line; nothing listens there."""
    environment = {**fake.environment, "GUNICORN_CMD_ARGS": "--bind 127.0.0.2:18777", "LLM_PORT": str(free_port())}
    command = [sys.executable, "-m", "gunicorn", "-c", "service/gunicorn.conf.py"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=30)
    assert done.returncode != 0
    assert "error: bind, workers" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_control_socket_of_another_service_is_refused_in_one_line(fake: Service) -> None:
    """That service keeps it, and the new one ends."""
    own = {"LLM_PORT": str(free_port()), "LLM_CONTROL_SOCKET": str(fake.state_dir / f"control-{fake.port}.sock")}
    command = [sys.executable, "-m", "gunicorn", "-c", "service/gunicorn.conf.py"]
    with tempfile.TemporaryDirectory() as state_dir:
        environment = {**fake.environment, **own, "LLM_STATE_DIR": state_dir}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=30)
    assert done.returncode != 0
    assert "already; name another with LLM_CONTROL_SOCKET" in done.stderr + done.stdout
    assert "Traceback" not in done.stderr + done.stdout
    assert fake.drain("--limit", "0").returncode == 0


def test_unknown_failures_do_not_quote_prompts(fake: Service) -> None:
    """A failure inside the engine whose message would quote the prompt is logged by type and place."""
    assert fake.generate("pause SECRET-PROMPT-TEXT").status == 500
    assert "SECRET" not in fake.log_path.read_text()
    assert any("ValueError at fake_engine.py" in line["error"] for line in fake.logs("failure"))


def test_loading_is_told() -> None:
    """While the model loads: not ready with the reason, 503 with Retry-After, alive."""
    with running_service(record=False, wait=False) as service:
        seen = service.wait_phase("starting", "verifying", "loading", "checking")
        assert seen["reason"]
        refused = service.generate("x")
        assert refused.status in (200, 503)
        if refused.status == 503:
            assert refused.json["type"].endswith("loading")
            assert refused.headers["retry-after"]
        service.wait_phase("ready")


def test_without_a_golden_answer_it_does_not_serve() -> None:
    """A start never records the golden answer that it checks: without a record it says what to do."""
    with running_service(record=False, wait=False, engine_adapter=FAKE) as service:
        assert "python -m service record" in service.wait_phase("failed")["reason"]
        assert not (service.state_dir / "golden").exists()


def test_wrong_golden_answer_is_not_ready() -> None:
    """An engine whose answer differs from the recorded one never becomes ready."""
    with running_service(engine_adapter=FAKE) as service:
        record = next((service.state_dir / "golden").iterdir())
        document = json.loads(record.read_text())
        record.write_text(json.dumps({**document, "response": document["response"] + "!"}))
        service.engine.kill()
        assert "golden answer is wrong" in service.wait_phase("failed")["reason"]
        assert service.generate("say x").status == 503
