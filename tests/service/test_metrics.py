"""The metrics of a service that has really worked, judged by Prometheus' own tool and by their truth."""

import shutil
import subprocess

from tests.absent import did_not_run
from tests.service.harness import Service


def test_promtool_has_nothing_to_say(real: Service) -> None:
    """``promtool check metrics`` accepts every name, type and help text without a word."""
    promtool = shutil.which("promtool")
    if promtool is None:
        did_not_run("promtool is not here; as root, make test gets it")
    real.generate("hello", max_tokens=3)
    real.request("POST", "/generate", b"{")
    text = real.get("/metrics").body
    done = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_metrics_tell_the_truth(real: Service) -> None:
    """Tokens, requests and durations add up to what was answered; memory includes the engine's process."""
    names = ("llm_tokens_generated_total", "llm_prompt_tokens_total", "llm_inference_duration_seconds_count")
    before = {name: real.metric(name) for name in names}
    usage = [real.generate(f"question {number}", max_tokens=5).json["usage"] for number in range(4)]
    after = {name: real.metric(name) - before[name] for name in names}
    assert after["llm_tokens_generated_total"] == sum(one["completion_tokens"] for one in usage)
    assert after["llm_prompt_tokens_total"] == sum(one["prompt_tokens"] for one in usage)
    assert after["llm_inference_duration_seconds_count"] == 4
    assert real.metric("llm_requests_total", endpoint="/generate", status="200", method="POST") >= 4
    web, engine = real.web.memory_info().rss, real.engine.memory_info().rss
    assert abs(real.metric("llm_memory_usage_bytes") - web - engine) < 0.1 * (web + engine)
    assert real.metric("llm_model_loaded") == 1
    assert real.metric("process_start_time_seconds") == real.web.create_time()
