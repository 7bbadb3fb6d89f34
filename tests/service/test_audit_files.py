"""The audit log written by several processes, one of which may be killed at any moment."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from service.audit import AuditLog
from service.audit_verify import describe_report, verify

ROOT = Path(__file__).resolve().parents[2]

# Writes lines until it is told how many, or for ever, and says each number only after its line is written.
WRITER = """
import sys
from pathlib import Path
from service.audit import AuditLog
log = AuditLog(Path(sys.argv[1]), rotate_bytes=int(sys.argv[3]), keep_files=10**6)
print("opened", flush=True)
number = 0
while number != int(sys.argv[2]):
    log.write("key-added", writer=sys.argv[4], number=number, filling="x" * 3000)
    print(number, flush=True)
    number += 1
log.close()
"""


def start_writer(folder: Path, lines: int, name: str, rotate_bytes: int = 10**8) -> subprocess.Popen[str]:
    arguments = [str(folder), str(lines), str(rotate_bytes), name]
    process = subprocess.Popen([sys.executable, "-c", WRITER, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "opened\n"
    return process


def read_rest(writer: subprocess.Popen[str]) -> str:
    """All that it says until its end; ``communicate`` would miss what came along with the first line."""
    assert writer.stdout is not None
    with writer.stdout:
        said = writer.stdout.read()
    writer.wait()
    return said


def lines_of(folder: Path) -> list[dict[str, object]]:
    files = sorted(folder.glob("audit-*.jsonl"))
    return [json.loads(line) for path in files for line in path.read_bytes().splitlines()]


def test_service_and_command_line_write_one_chain(tmp_path: Path) -> None:
    """1,000 lines of eight threads and 100 of another process, rotating on both sides, verify; none is lost."""
    folder = tmp_path / "audit"
    log = AuditLog(folder, rotate_bytes=50_000)
    other = start_writer(folder, 100, "other", rotate_bytes=50_000)

    def write(number: int) -> None:
        for count in range(125):
            log.write("admitted", writer=number, number=count)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read_rest(other).split()) == 100
    log.write("admitted", writer="last", number=0)
    log.close()
    report = verify([folder])
    assert report.whole, describe_report(report)
    assert not report.torn
    assert report.lines == report.chains[0].last_seq == 1102
    assert report.files > 5
    written = {(line.get("writer"), line.get("number")) for line in lines_of(folder)[1:]}
    expected = {(number, count) for number in range(8) for count in range(125)}
    assert written == expected | {("other", count) for count in range(100)} | {("last", 0)}


def test_killed_writers_leave_whole_chains(tmp_path: Path) -> None:
    """Processes killed in the middle of writing lose no line that they had told of, whoever goes on after them."""
    folder = tmp_path / "audit"
    choice = random.Random(5)
    told: set[tuple[str, int]] = set()
    service = AuditLog(folder, keep_files=10**6)
    for turn in range(12):
        writer = start_writer(folder, -1, str(turn), rotate_bytes=choice.choice([20_000, 10**8]))
        time.sleep(choice.uniform(0.0, 0.15))
        os.kill(writer.pid, signal.SIGKILL)
        told |= {
            (str(turn), int(number)) for number in read_rest(writer).splitlines(keepends=True) if number.endswith("\n")
        }
        report = verify([folder])
        assert report.whole, describe_report(report)
        if turn % 3:  # otherwise the next writer is who finds it
            service.write("admitted", writer="service", number=turn)
            assert not verify([folder]).torn
    service.close()
    report = verify([folder])
    assert report.whole, describe_report(report)
    assert not report.torn
    written = {(line.get("writer"), line.get("number")) for line in lines_of(folder)}
    assert told <= written
    assert len(told) > 100


def test_verify_while_others_write_sees_no_half_line(tmp_path: Path) -> None:
    """Verification of a log in use finds it whole each time, and never torn."""
    folder = tmp_path / "audit"
    writer = start_writer(folder, -1, "busy", rotate_bytes=200_000)
    try:
        drainer = threading.Thread(target=lambda: [None for _ in writer.stdout or ()], daemon=True)
        drainer.start()
        for _ in range(20):
            report = verify([folder])
            assert report.whole, describe_report(report)
            assert not report.torn
    finally:
        writer.kill()
        writer.wait(timeout=60)
        drainer.join()
        assert writer.stdout is not None
        writer.stdout.close()
