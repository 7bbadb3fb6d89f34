"""`make bench-servers` ends whatever it started, however it is ended itself."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from tests.bench.servers import Server, started
from tests.service.harness import ROOT

# What is told to end takes a second for it, as servers do that have answers under way.
_INTERRUPTED = """
import signal, sys, time
from tests.bench import servers
slow = ["sh", "-c", "trap 'sleep 1; exit' TERM; while :; do sleep 0.1; done"]
for each in (signal.SIGINT, signal.SIGTERM):
    signal.signal(each, servers.end_once)
with servers.started(servers.Server("slow", "1", lambda port: slow, lambda port: {"PATH": "/usr/bin:/bin"}), 1) as one:
    print(one.pid, flush=True)
    time.sleep(60)
"""


def wait_gone(pid: int) -> None:
    end_s = time.monotonic() + 10
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end_s, f"{pid} is still there"
        time.sleep(0.05)


def test_children_of_a_server_that_has_ended(tmp_path: Path) -> None:
    """A server that dies leaves nothing behind."""
    told = tmp_path / "pid"
    script = f"sleep 300 & echo $! > {told}.draft; mv {told}.draft {told}"
    server = Server("short", "1", lambda port: ["sh", "-c", script], lambda port: dict(os.environ))
    with started(server, 1) as process:
        process.wait(10)
        child = int(told.read_text())
        assert psutil.pid_exists(child)
    wait_gone(child)


def test_signals_that_come_twice() -> None:
    """The second, as from a terminal and its make, does not stop the ending of what was started."""
    for number in (signal.SIGTERM, signal.SIGINT):
        bench = subprocess.Popen([sys.executable, "-c", _INTERRUPTED], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        try:
            assert bench.stdout is not None
            server = int(bench.stdout.readline())
            bench.send_signal(number)
            time.sleep(0.3)
            bench.send_signal(number)
            assert bench.wait(30) == 128 + number
            wait_gone(server)
        finally:
            bench.kill()
            bench.communicate()
