"""Damaged models through the real engine process: each is refused with one line, and none kills the process."""

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from service.engine.process import EngineProcess, EngineSettings, EngineState
from tests.damaged_models import DAMAGES, HASH_ONLY
from tests.ports import free_port
from tests.service.harness import ROOT, running_service, service_environment, write_small_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_model(tmp_path_factory.mktemp("base"))


def start(path: Path, state_dir: Path, sha256: str | None) -> tuple[EngineState, int]:
    """Where an engine with this file ends up, and how often its process was started again."""
    settings = EngineSettings(str(path), sha256, None, None, 1, str(state_dir), str(state_dir), golden="record")
    engine = EngineProcess(settings, load_timeout_s=20)
    engine.start()
    try:
        engine.wait_ready(60)
        return engine.state, engine.restarts
    finally:
        engine.stop()


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_model_is_refused(base: Path, tmp_path: Path, name: str) -> None:
    """Each kind of damage ends in ``failed`` with one clear line at the first start; no abort, no loop, no hang."""
    copy = tmp_path / "model.gguf"
    shutil.copy(base, copy)
    sha256 = hashlib.sha256(base.read_bytes()).hexdigest() if name in HASH_ONLY else None
    state, restarts = start(DAMAGES[name](copy), tmp_path / "state", sha256)
    assert state.phase == "failed"
    assert restarts == 0
    assert len(state.reason.splitlines()) == 1
    assert 10 < len(state.reason) < 400
    if name in HASH_ONLY:
        assert "SHA-256" in state.reason


def test_undamaged_model_is_taken(base: Path, tmp_path: Path) -> None:
    """The same way with the file as it is leads to ready; the refusals above are not the way's fault."""
    state, _ = start(base, tmp_path, hashlib.sha256(base.read_bytes()).hexdigest())
    assert state.phase == "ready", state.reason


def test_there_are_forty_kinds() -> None:
    """The list is at least as long as promised."""
    assert len(DAMAGES) >= 40


def test_service_with_a_damaged_model_lives_and_says_why(base: Path, tmp_path: Path) -> None:
    """The whole service: alive, not ready with the reason, metrics served, requests refused with 503."""
    copy = tmp_path / "model.gguf"
    copy.write_bytes(base.read_bytes()[:-100])
    with running_service(record=False, wait=False, model=copy) as service:
        reason = service.wait_phase("failed")["reason"]
        assert "model" in reason or "file" in reason
        assert service.get("/health").status == 200
        assert service.metric("llm_model_loaded") == 0
        refused = service.generate("x")
        assert refused.status == 503
        assert reason in refused.json["detail"]
        assert service.terminate() == 0


@pytest.mark.parametrize("model", ["nowhere.gguf", "no-such-name", "/dev/null", "/etc/passwd"])
def test_serve_refuses_a_wrong_model_in_one_line(tmp_path: Path, model: str) -> None:
    """The command a person types: one line that says what is wrong, exit code 1, no traceback."""
    done = subprocess.run(
        [sys.executable, "-m", "service", "serve"],
        cwd=ROOT,
        env=service_environment(tmp_path, free_port(), model=model),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "Traceback" not in done.stderr


def test_context_that_memory_cannot_hold_is_refused(base: Path, tmp_path: Path) -> None:
    """A context beyond what the file allows is refused before the engine touches the model."""
    settings = EngineSettings(str(base), None, None, 1 << 20, 1, str(tmp_path), str(tmp_path), golden="record")
    engine = EngineProcess(settings)
    engine.start()
    try:
        assert not engine.wait_ready(30)
        assert "context ends at 2048" in engine.state.reason
    finally:
        engine.stop()
