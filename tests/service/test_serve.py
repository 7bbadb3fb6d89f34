"""``python -m service serve``, which ``make serve`` runs: from the command to the printed line and back to nothing."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

import psutil
import pytest

from tests.absent import did_not_run
from tests.ports import free_port
from tests.service.harness import ROOT, service_environment, write_small_model


class Terminal:
    """A running command whose stderr is gathered line by line."""

    def __init__(self, process: subprocess.Popen[bytes], errors: TextIO):
        self.process, self._errors = process, errors
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with suppress(OSError):  # how a terminal says that the other side has gone
            for line in self._errors:
                self.lines.append(line.rstrip("\n"))

    def close(self) -> None:
        """Called once the command has ended, and with it the other side."""
        self._reader.join(5)
        self._errors.close()

    def wait_line(self, part: str, timeout_s: float = 30.0) -> str:
        end_s = time.monotonic() + timeout_s
        while time.monotonic() < end_s:
            for line in self.lines:
                if part in line:
                    return line
            time.sleep(0.02)
        raise AssertionError(f"no line with {part!r}: {self.lines}")


@contextmanager
def serving(state_dir: Path, port: int, tty: bool = False, **settings: Any) -> Iterator[Terminal]:
    """The command; its messages go to a pipe, or to a terminal as a person has one."""
    ours, theirs = os.openpty() if tty else os.pipe()
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "service", "serve"],
            cwd=ROOT,
            env=service_environment(state_dir, port, **{"auth": None, **settings}),
            stdout=subprocess.DEVNULL,
            stderr=theirs,
            start_new_session=True,
        )
    finally:
        os.close(theirs)
    terminal = Terminal(process, os.fdopen(ours, encoding="utf-8"))
    try:
        yield terminal
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(20)
        terminal.close()


def test_printed_curl_line_works_as_printed(tmp_path: Path) -> None:
    """The line that is printed once the model is ready gets text when it is pasted into a shell."""
    if shutil.which("curl") is None:
        did_not_run("curl is not installed (Debian: sudo apt-get install curl)")
    with serving(tmp_path, free_port()) as terminal:
        line = terminal.wait_line("curl -s").strip()
        done = subprocess.run(["sh", "-c", line], capture_output=True, timeout=30)
        document = json.loads(done.stdout)
        assert document["response"].strip()
        assert document["finish_reason"] == "stop"
        assert any("starter" in said for said in terminal.lines)


def test_ctrl_c_ends_everything(tmp_path: Path) -> None:
    """Ctrl-C, which reaches the whole foreground group, ends gunicorn and engine quickly and without a traceback."""
    with serving(tmp_path, free_port()) as terminal:
        terminal.wait_line("curl -s")
        family = psutil.Process(terminal.process.pid).children(recursive=True)
        assert len(family) >= 2
        start_s = time.monotonic()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        psutil.Process(terminal.process.pid).send_signal(signal.SIGINT)
        for process in family:
            if "gunicorn" in " ".join(process.cmdline()):
                process.send_signal(signal.SIGINT)
        assert terminal.process.wait(10) in (0, 130, -signal.SIGINT)
        assert time.monotonic() - start_s < 5
        _, alive = psutil.wait_procs(family, timeout=5)
        assert not alive
        assert not any("Traceback" in line for line in terminal.lines)


@pytest.mark.parametrize("order", [(signal.SIGINT, signal.SIGQUIT), (signal.SIGTERM, signal.SIGINT)])
def test_signals_that_come_at_once_are_one_ending(tmp_path: Path, order: tuple[signal.Signals, ...]) -> None:
    """As on a busy machine: a signal and the one gunicorn hands on are both there before the first is dealt with."""
    with serving(tmp_path, free_port()) as terminal:
        terminal.wait_line("curl -s")
        family = psutil.Process(terminal.process.pid).children(recursive=True)
        worker = next(one for one in family if "gunicorn" in " ".join(one.cmdline()))
        worker.suspend()
        for each in order:
            worker.send_signal(each)
        terminal.process.send_signal(signal.SIGINT)
        worker.resume()
        assert terminal.process.wait(10) == 0
        _, alive = psutil.wait_procs(family, timeout=5)
        assert not alive
    assert not any("Traceback" in line or "Signal" in line for line in terminal.lines)


def test_own_model_is_recorded_once_in_a_visible_step(tmp_path: Path) -> None:
    """The first start with a file of one's own records its golden answer and says so; the second start checks it."""
    model = write_small_model(tmp_path)
    with serving(tmp_path, free_port(), model=model) as terminal:
        terminal.wait_line("recording its golden answer, once")
        terminal.wait_line("curl -s")
    with serving(tmp_path, free_port(), model=model) as terminal:
        terminal.wait_line("curl -s")
        assert not any("golden" in line for line in terminal.lines)


def test_changed_model_is_recorded_as_another(tmp_path: Path) -> None:
    """A file that was replaced is another model with a golden answer of its own."""
    model = write_small_model(tmp_path)
    with serving(tmp_path, free_port(), model=model) as terminal:
        terminal.wait_line("curl -s")
    data = bytearray(model.read_bytes())
    data[-100] ^= 1
    model.write_bytes(data)
    with serving(tmp_path, free_port(), model=model) as terminal:
        terminal.wait_line("recording its golden answer, once")
        terminal.wait_line("curl -s")
    assert len(list((tmp_path / "golden").iterdir())) == 2


def test_taken_port_is_told(tmp_path: Path) -> None:
    """A port in use: one line that says so and what to type instead."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with serving(tmp_path, other.getsockname()[1]) as terminal:
            line = terminal.wait_line("error: ")
            assert "make serve PORT=" in line
            assert terminal.process.wait(10) == 1


def test_loopback_needs_no_key_and_says_so(tmp_path: Path) -> None:
    """On loopback ``serve`` runs without keys, says so, and makes no key."""
    with serving(tmp_path, free_port()) as terminal:
        assert "without keys: only this machine" in terminal.wait_line("Serving on")
        terminal.wait_line("curl -s")
    assert not (tmp_path / "keys.json").exists()


def test_other_hosts_need_a_key_which_is_shown_once(tmp_path: Path) -> None:
    """On another host a first key is made and shown on a terminal, and nowhere else; the curl line works with it."""
    port = free_port()
    with serving(tmp_path, port, host="0.0.0.0") as terminal:  # nobody sees it
        assert "keys add" in terminal.wait_line("error: ")
        assert terminal.process.wait(10) == 1
    assert not (tmp_path / "keys.json").exists()
    with serving(tmp_path, port, tty=True, host="0.0.0.0") as terminal:
        export = terminal.wait_line("export LLM_KEY=").strip()
        assert "plain HTTP" in terminal.wait_line("plain HTTP")
        line = terminal.wait_line("curl -s").strip()
        assert "$LLM_KEY" in line
        assert f"http://127.0.0.1:{port}/" in line
        done = subprocess.run(["sh", "-c", f"{export}; {line}"], capture_output=True, timeout=30)
        assert json.loads(done.stdout)["response"].strip()
        refused = subprocess.run(["sh", "-c", f"LLM_KEY=; {line}"], capture_output=True, timeout=30)
        assert json.loads(refused.stdout)["status"] == 401
    secret = export.partition("=")[2]
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or secret.encode() not in path.read_bytes(), path
    with serving(tmp_path, port, tty=True, host="0.0.0.0") as terminal:
        terminal.wait_line("curl -s")
        assert not any("mllm_" in line for line in terminal.lines)


def test_keys_cannot_be_switched_off_on_other_hosts(tmp_path: Path) -> None:
    """Without keys anybody could use the model: refused before anything listens."""
    with serving(tmp_path, free_port(), host="0.0.0.0", auth="off") as terminal:
        assert "LLM_AUTH=off" in terminal.wait_line("error: ")
        assert terminal.process.wait(10) == 2
