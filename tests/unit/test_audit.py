"""The audit log: what it writes, what it survives, and that every damage is found at its place."""

import errno
import hashlib
import json
import os
import shutil
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from service import audit, audit_lines, audit_verify
from service.audit import AuditLog
from service.audit_lines import LINE_BYTES, ZEROS
from service.audit_verify import Problem, Report, describe_report, last_link, verify
from service.errors import AuditUnwritable, ServiceError

Edit = Callable[[list[bytes]], list[bytes]]
LINES = 30  # of the logs that are damaged here; with ROTATE_BYTES they lie in some files
ROTATE_BYTES = 2000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "audit"


@pytest.fixture
def log(folder: Path) -> Iterator[AuditLog]:
    log = AuditLog(folder, node="a")
    yield log
    log.close()


def make_log(folder: Path, lines: int = LINES, rotate_bytes: int = ROTATE_BYTES, begin: str | None = None) -> Path:
    """A log of some lines, closed; the first line is ``begin``, so its last sequence number is ``lines``."""
    log = AuditLog(folder, node=folder.name, rotate_bytes=rotate_bytes, begin=begin)
    for number in range(2, lines + 1):
        log.write("admitted", key="team-a", address="10.0.0.1", prompt_tokens=number)
    log.close()
    return folder


def files_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("audit-*.jsonl"))


def lines_of(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for path in files_of(folder) for line in path.read_bytes().splitlines()]


def events_of(folder: Path) -> list[object]:
    return [line["event"] for line in lines_of(folder)]


def edit(path: Path, change: Edit) -> None:
    """What a person with an editor does: the file is written again, whatever its mode."""
    lines = change(path.read_bytes().splitlines(keepends=True))
    path.chmod(0o600)
    path.write_bytes(b"".join(lines))


def flip(path: Path, offset: int, mask: int) -> None:
    """Changes bits of one byte in place."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ mask]))


def only_problem(report: Report) -> Problem:
    assert len(report.problems) == 1, "\n".join(describe_report(report))
    assert not report.torn
    return report.problems[0]


def forge(line: bytes, prev: bytes | None = None, **changes: bytes) -> bytes:
    """A line made anew with a hash that fits; ``changes`` replace text in it."""
    body = line[: -len(b',"hash":""}\n') - 64]
    if prev is not None:
        body = body[:-65] + prev + b'"'
    for old, new in changes.items():
        body = body.replace(old.encode(), new)
    return b'%b,"hash":"%b"}\n' % (body, hashlib.sha256(body).hexdigest().encode())


def make_line(seq: bytes, facts: bytes) -> bytes:
    """A line of any content with a hash that fits."""
    time = b'"time":"2026-11-25T10:00:00.000Z"'
    body = b'{%b,%b,%b,"prev":"%b"' % (seq, time, facts, ZEROS.encode())
    return b'%b,"hash":"%b"}\n' % (body, hashlib.sha256(body).hexdigest().encode())


def hash_of(line: bytes) -> bytes:
    return line[-67:-3]


# Writing


def test_line_is_json_with_chain(folder: Path, log: AuditLog) -> None:
    """A line has its number, UTC time in milliseconds, event, facts that are not None, and both hashes at its end."""
    log.write("admitted", key="team-a", tokens=3, stream=None)
    raw = files_of(folder)[0].read_bytes().splitlines(keepends=True)
    first, line = (json.loads(one) for one in raw)
    assert list(line) == ["seq", "time", "event", "key", "tokens", "prev", "hash"]
    assert (line["seq"], line["event"], line["prev"]) == (2, "admitted", first["hash"])
    assert line["time"][10] == "T"
    assert line["time"][-5] == "."
    assert line["time"][-1] == "Z"
    assert line["hash"] == hashlib.sha256(raw[1][: raw[1].rindex(b',"hash"')]).hexdigest()
    assert (first["event"], first["node"], first["prev"]) == ("begin", "a", ZEROS)


def test_only_its_owner_reads_it(folder: Path, log: AuditLog) -> None:
    """The folder has mode 0700 and its files 0600; there are no others than the log and its head."""
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {
        "audit-000000000001.jsonl": 0o600,
        "head.json": 0o600,
    }


def test_log_goes_on_after_it_was_closed(folder: Path) -> None:
    """A log that is opened again goes on with the next number, and begins no second chain."""
    make_log(folder, 3, begin="a" * 64)
    make_log(folder, 3, begin="b" * 64)
    assert [line["seq"] for line in lines_of(folder)] == [1, 2, 3, 4, 5]
    report = verify([folder])
    assert report.whole
    assert report.lines == 5
    assert report.chains[0].last_seq == 5
    assert (5, report.chains[0].last_hash) == last_link(folder)


def test_closed_log_writes_no_more(log: AuditLog) -> None:
    """A line after the end is refused, in a word that tells why; a second close does nothing."""
    log.close()
    log.close()
    with pytest.raises(AuditUnwritable, match="it was closed"):
        log.write("admitted")


def test_chain_members_are_no_facts(log: AuditLog) -> None:
    """A fact cannot take the name of a member of the chain."""
    with pytest.raises(ValueError, match="own"):
        log.write("admitted", prev="0")


@pytest.mark.parametrize("begin", ["", "A" * 64, "0" * 63])
def test_chain_begins_from_a_hash(folder: Path, begin: str) -> None:
    """What is no hash is refused before anything is made."""
    with pytest.raises(ValueError, match="64 hexadecimal"):
        AuditLog(folder, begin=begin)
    assert not folder.exists()


@pytest.mark.parametrize("fact", ["x" * 70_000, "\udcff\n\0\"\\'}", "ü\u2028" * 30_000, ["y" * 70_000], float("nan")])
def test_any_fact_makes_a_line_that_verifies(folder: Path, log: AuditLog, fact: object) -> None:
    """Facts of any length and any characters end in one line that is short enough, and verifies."""
    log.write("admitted", name=fact)
    log.write('odd "event"\n', name="x")
    log.sync()
    assert verify([folder]).whole
    assert max(len(line) for line in files_of(folder)[0].read_bytes().splitlines()) < LINE_BYTES


def test_threads_and_instances_write_one_chain(folder: Path) -> None:
    """1,000 lines by eight threads through two instances, rotating on the way, verify, and none is lost."""
    logs = [AuditLog(folder, rotate_bytes=20_000) for _ in range(2)]

    def write(number: int) -> None:
        for count in range(125):
            logs[number % 2].write("admitted", thread=number, count=count)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for log in logs:
        log.close()
    report = verify([folder])
    assert report.whole, describe_report(report)
    assert report.lines == report.chains[0].last_seq == 1001
    assert report.files > 5
    written = {(line.get("thread"), line.get("count")) for line in lines_of(folder)[1:]}
    assert written == {(number, count) for number in range(8) for count in range(125)}


def test_head_is_written_within_a_second_or_so(folder: Path, log: AuditLog) -> None:
    """The thread brings lines to the disk and then tells head.json, without anybody asking."""
    for number in range(10):
        log.write("admitted", number=number)
    deadline_s = time.monotonic() + 10 * audit.SYNC_INTERVAL_S
    while json.loads((folder / "head.json").read_bytes())["seq"] != 11 and time.monotonic() < deadline_s:
        time.sleep(0.02)
    assert json.loads((folder / "head.json").read_bytes()) == {
        "seq": 11,
        "hash": lines_of(folder)[-1]["hash"],
    }


def test_head_never_goes_back(folder: Path, log: AuditLog) -> None:
    """An instance that syncs fewer lines than another leaves the other's head."""
    other = AuditLog(folder)
    other.write("admitted")
    log.write("admitted")
    log.sync()
    other.close()
    assert json.loads((folder / "head.json").read_bytes())["seq"] == 3


def test_log_of_a_stopped_process_is_waited_for_in_bounds(
    folder: Path, log: AuditLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that keeps the lock makes a line fail after the timeout; the service does not hang."""
    monkeypatch.setattr(audit_lines, "LOCK_TIMEOUT_S", 0.05)
    held = os.open(folder, os.O_RDONLY)
    audit_lines.lock(held)
    with pytest.raises(AuditUnwritable, match="too long"):
        log.write("admitted")
    os.close(held)
    log.write("admitted")


# Refusals


class Clock:
    def __init__(self) -> None:
        self.now_s = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now_s


def test_refusals_beyond_a_number_a_minute_are_counted(folder: Path) -> None:
    """120 refusals of a minute have a line each; the others are told by status and reason when it is over."""
    clock = Clock()
    log = AuditLog(folder, clock=clock)
    for number in range(1000):
        log.refuse(status=401 if number % 4 else 429, reason="key" if number % 4 else "rate", address="10.0.0.9")
    assert events_of(folder).count("refused") == audit.REFUSALS_A_MINUTE == 120
    clock.now_s += 60
    log.refuse(status=401, reason="key")
    log.close()
    *_, more, last = lines_of(folder)
    assert more["event"] == "refused-more"
    assert more["counts"] == {"401 key": 660, "429 rate": 220}
    assert last["event"] == "refused"
    assert verify([folder]).whole


def test_counted_refusals_are_told_by_the_thread_and_at_the_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has to come for the counts to be written, and the end of the service does not lose them."""
    monkeypatch.setattr(audit, "SYNC_INTERVAL_S", 0.02)
    clock = Clock()
    log = AuditLog(folder, clock=clock)
    for _ in range(123):
        log.refuse(status=401, reason="key")
    clock.now_s += 60
    deadline_s = time.monotonic() + 10
    while "refused-more" not in events_of(folder) and time.monotonic() < deadline_s:
        time.sleep(0.02)
    for _ in range(125):
        log.refuse(status=403, reason="key")
    log.close()
    told = [line["counts"] for line in lines_of(folder) if line["event"] == "refused-more"]
    assert told == [{"401 key": 3}, {"403 key": 5}]


def test_kinds_of_counted_refusals_are_bounded(folder: Path) -> None:
    """However many reasons there are, the counts fit one line and none is lost."""
    log = AuditLog(folder, clock=Clock())
    for number in range(1120):
        log.refuse(status=401, reason=str(number))
    log.close()
    counts = lines_of(folder)[-1]["counts"]
    assert isinstance(counts, dict)
    assert sum(counts.values()) == 1000
    assert len(counts) <= 65


# Failing disks


def test_full_disk_leaves_no_half_line(folder: Path, log: AuditLog, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line that the disk takes only in part is taken away again and the caller told; later the chain goes on."""
    log.write("admitted", number=1)
    before = files_of(folder)[0].read_bytes()
    real, taken = os.write, 0

    def full(descriptor: int, data: bytes) -> int:
        nonlocal taken
        if taken:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = real(descriptor, data[:40])
        return taken

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        for _ in range(2):
            with pytest.raises(AuditUnwritable, match="No space left"):
                log.write("admitted", number=2)
    assert taken == 40
    assert files_of(folder)[0].read_bytes() == before
    log.write("admitted", number=3)
    log.close()
    assert [line.get("number") for line in lines_of(folder)] == [None, 1, 3]
    assert verify([folder]).whole


def test_half_line_that_cannot_be_taken_away_is_put_right_later(
    folder: Path, log: AuditLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If even truncating fails, the next line finds the half one, cuts it off and says so."""
    real = os.write

    def fail(*arguments: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:40]))
        patch.setattr(os, "ftruncate", fail)
        with pytest.raises(AuditUnwritable):
            log.write("admitted", number=1)
    log.write("admitted", number=2)
    log.close()
    assert events_of(folder) == ["begin", "recovered", "admitted"]
    assert verify([folder]).whole


def test_failed_sync_ends_all_writing(folder: Path, log: AuditLog, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that lost lines is not trusted again, since its next sync would claim success; the head stays back."""
    log.write("admitted")

    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(AuditUnwritable, match="once the disk is sound"):
            log.sync()
    with pytest.raises(AuditUnwritable, match="once the disk is sound"):
        log.write("admitted")
    with pytest.raises(AuditUnwritable):
        log.close()
    assert json.loads((folder / "head.json").read_bytes())["seq"] == 1


def test_head_that_cannot_be_written_stops_writing_until_it_can(
    folder: Path, log: AuditLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No line is taken while head.json stays behind; once it can be written, all goes on."""
    log.write("admitted")

    def full(self: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        with pytest.raises(AuditUnwritable):
            log.sync()
        with pytest.raises(AuditUnwritable):
            log.write("admitted")
    log.sync()
    log.write("admitted")


def test_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    """A file in the place of the folder is one clear error."""
    (tmp_path / "file").write_text("")
    with pytest.raises(AuditUnwritable, match="cannot be written"):
        AuditLog(tmp_path / "file" / "audit")


# Rotation


def test_files_follow_each_other(folder: Path) -> None:
    """A new file goes on with number and hash, its name has its first number, and finished files are read-only."""
    make_log(folder)
    files = files_of(folder)
    assert len(files) > 3
    for path in files:
        first = json.loads(path.read_bytes().splitlines()[0])
        assert path.name == f"audit-{first['seq']:012d}.jsonl"
        assert path.stat().st_size <= ROTATE_BYTES + 300
        assert bool(path.stat().st_mode & stat.S_IWUSR) == (path == files[-1])
    assert verify([folder]).whole
    assert verify(files).whole


def test_old_files_are_dropped_and_said_to_be(folder: Path) -> None:
    """Beyond keep_files the oldest go; the log says so, and verification begins at the oldest kept line."""
    log = AuditLog(folder, rotate_bytes=ROTATE_BYTES, keep_files=3)
    for number in range(50):
        log.write("admitted", number=number)
        log.sync()
    log.close()
    assert len(files_of(folder)) == 3
    report = verify([folder])
    assert report.whole, describe_report(report)
    assert report.chains[0].first_seq == int(files_of(folder)[0].name[6:18]) > 1
    assert "in none of the given files" in report.chains[0].begins
    files_of(folder)[0].unlink()
    assert "are missing; no line says: dropped" in only_problem(verify([folder])).what


def test_first_file_taken_away_is_found(folder: Path) -> None:
    """An oldest file that is gone, with no line that says it was dropped, is missing."""
    make_log(folder)
    first, second, *_ = files_of(folder)
    first.unlink()
    problem = only_problem(verify([folder]))
    assert problem.place == (second, 1)
    assert problem.seq == 1


def test_rotation_by_another_instance_is_noticed(folder: Path) -> None:
    """An instance that did not rotate goes on in the new file, not in the finished one."""
    one, other = (AuditLog(folder, rotate_bytes=ROTATE_BYTES) for _ in range(2))
    for number in range(20):
        one.write("admitted", number=number)
    other.write("admitted", number=20)
    one.close()
    other.close()
    assert verify([folder]).whole
    assert lines_of(folder)[-1]["number"] == 20


def test_rotation_that_stopped_half_way_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A next file that cannot be made costs the line, not the chain: the one after it makes the file."""
    log = AuditLog(folder, rotate_bytes=300)
    log.write("admitted", number=0)
    with monkeypatch.context() as patch:
        patch.setattr(AuditLog, "_open_new", lambda self: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        with pytest.raises(AuditUnwritable):
            log.write("admitted", number=1)
    log.write("admitted", number=2)
    log.close()
    assert verify([folder]).whole
    assert [line.get("number") for line in lines_of(folder)] == [None, 0, 2]


# Power cuts


def test_line_torn_at_any_byte_is_told_from_tampering(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the last line is cut, with or without NULs after it, it is torn and no damage; opening puts it right."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # thousands of them would take a minute
    whole = make_log(tmp_path / "whole", 4)
    content = files_of(whole)[0].read_bytes()
    last = content.splitlines(keepends=True)[-1]
    head = b'{"seq":3,"hash":"%b"}\n' % hash_of(content.splitlines(keepends=True)[-2])
    for kept in range(1, len(last)):
        for nuls in (0, 5000):
            folder = tmp_path / "cut"
            folder.mkdir()
            path = folder / "audit-000000000001.jsonl"
            torn = last[:kept] + bytes(nuls)
            path.write_bytes(content[: -len(last)] + torn)
            (folder / "head.json").write_bytes(head)
            report = verify([folder])
            assert report.whole, (kept, describe_report(report))
            assert [(one.place, one.size_bytes) for one in report.torn] == [((path, 4), len(torn))]
            assert verify([path]).whole
            make_log(folder, 2)
            report = verify([folder])
            assert report.whole
            assert not report.torn
            recovered, after = lines_of(folder)[-2:]
            assert (recovered["event"], recovered["seq"], after["seq"]) == ("recovered", 4, 5)
            assert recovered["lost_bytes"] == len(torn)
            assert recovered["lost_sha256"] == hashlib.sha256(torn).hexdigest()
            shutil.rmtree(folder)


@pytest.mark.parametrize("size", [1, 4096, 200_000])
def test_nuls_alone_are_torn(folder: Path, size: int) -> None:
    """Blocks that were never written are the power cut's, however many."""
    make_log(folder, 4)
    with files_of(folder)[0].open("ab") as file:
        file.write(bytes(size))
    report = verify([folder])
    assert report.whole
    assert report.torn[0].size_bytes == size
    make_log(folder, 2)
    assert verify([folder]).whole
    assert events_of(folder)[4:] == ["recovered", "admitted"]


def test_hole_beyond_the_head_takes_what_follows_with_it(folder: Path) -> None:
    """Blocks reach the disk in any order: lines after a hole that the head does not know are lost, not changed."""
    make_log(folder, 6)
    path = files_of(folder)[0]
    lines = path.read_bytes().splitlines(keepends=True)
    (folder / "head.json").write_bytes(b'{"seq":3,"hash":"%b"}\n' % hash_of(lines[2]))
    edit(path, lambda lines: [*lines[:3], lines[3][:30] + bytes(len(lines[3]) - 30), *lines[4:]])
    report = verify([folder])
    assert report.whole
    assert report.torn[0].place == (path, 4)
    make_log(folder, 2)
    assert verify([folder]).whole
    assert events_of(folder)[3:] == ["recovered", "admitted"]


def test_line_cut_below_the_head_is_no_power_cut(folder: Path) -> None:
    """A half line that the head knows whole was cut by somebody."""
    make_log(folder, 4)
    path = files_of(folder)[0]
    edit(path, lambda lines: [*lines[:3], lines[3][:50]])
    problem = only_problem(verify([folder]))
    assert (problem.place, problem.seq) == ((path, 4), 4)


def test_first_line_torn(folder: Path) -> None:
    """A power cut in the very first line leaves a log that begins again."""
    folder.mkdir()
    (folder / "audit-000000000001.jsonl").write_bytes(b'{"seq":1,"ti')
    make_log(folder, 2)
    assert events_of(folder) == ["begin", "recovered", "admitted"]
    assert verify([folder]).whole


def test_first_line_of_a_later_file_torn(folder: Path) -> None:
    """A power cut right after a rotation is put right in the new file."""
    make_log(folder)
    last = files_of(folder)[-1]
    seq = int(last.name[6:18])
    line = files_of(folder)[-2].read_bytes().splitlines(keepends=True)[-1]
    (folder / "head.json").write_bytes(b'{"seq":%d,"hash":"%b"}\n' % (seq - 1, hash_of(line)))
    for content in (b"", last.read_bytes()[:70], bytes(4096)):
        last.write_bytes(content)
        assert verify([folder]).whole
    make_log(folder, 2)
    assert verify([folder]).whole
    assert lines_of(folder)[-2]["event"] == "recovered"


def test_garbage_after_the_end_is_not_torn(folder: Path) -> None:
    """Bytes that are no beginning of the next line were put there; they are found also after the log went on."""
    make_log(folder, 4)
    path = files_of(folder)[0]
    with path.open("ab") as file:
        file.write(b"garbage")
    assert only_problem(verify([folder])).place == (path, 5)
    make_log(folder, 3)
    assert only_problem(verify([folder])).place == (path, 5)


# Tampering


def places_of(folder: Path) -> list[tuple[Path, int]]:
    """File and line number of each line, in order."""
    return [(path, line + 1) for path in files_of(folder) for line in range(len(path.read_bytes().splitlines()))]


def seqs_to_damage(folder: Path) -> list[int]:
    """First, second, middle and last lines, and those on both sides of a rotation."""
    border = int(files_of(folder)[2].name[6:18])
    return [1, 2, LINES // 2, border - 2, border - 1, border, border + 1, LINES - 1, LINES]


def at(folder: Path, seq: int, change: Edit) -> tuple[Path, int]:
    """Applies a change to the lines from ``seq`` to the end of its file; returns the place of ``seq``."""
    place = places_of(folder)[seq - 1]
    edit(place[0], lambda lines: lines[: place[1] - 1] + change(lines[place[1] - 1 :]))
    return place


def in_front(new: bytes) -> Edit:
    """A line more, before all others."""
    return lambda lines: [new, *lines]


def in_place(new: bytes) -> Edit:
    """Another line in the place of the first."""
    return lambda lines: [new, *lines[1:]]


def without(number: int) -> Edit:
    """All lines but this one, counted from 0."""
    return lambda lines: lines[:number] + lines[number + 1 :]


@pytest.fixture
def damaged(tmp_path: Path) -> Callable[[], Path]:
    """Copies of one sound log."""
    sound = make_log(tmp_path / "sound")

    def copy() -> Path:
        folder = tmp_path / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(sound, folder)
        return folder

    return copy


def test_every_flipped_byte_is_found_at_its_line(tmp_path: Path) -> None:
    """Each byte of a log, changed alone in some ways, is one problem at that very line, and nothing else."""
    folder = make_log(tmp_path / "a", 3)
    (path,) = files_of(folder)
    content = path.read_bytes()
    for offset in range(len(content)):
        for mask in (0x01, 0x20, 0x0A ^ content[offset], content[offset]):
            if not mask:
                continue
            flip(path, offset, mask)
            problem = only_problem(verify([folder]))
            line = content.count(b"\n", 0, offset) + 1
            assert (problem.place, problem.seq) == ((path, line), line), (offset, mask, problem)
            flip(path, offset, mask)


def test_every_flipped_byte_of_the_head_is_found(tmp_path: Path) -> None:
    """A head that was changed never passes."""
    folder = make_log(tmp_path / "a", 4)
    for offset in range((folder / "head.json").stat().st_size):
        for mask in (0x01, 0x20, 0x80):
            flip(folder / "head.json", offset, mask)
            assert not verify([folder]).whole, (offset, mask)
            flip(folder / "head.json", offset, mask)


def test_removed_head_is_found(folder: Path) -> None:
    """Without its head a log cannot show that its end was not cut; going on leaves a line that tells."""
    make_log(folder)
    (folder / "head.json").unlink()
    problem = only_problem(verify([folder]))
    assert problem.place == (folder / "head.json", 0)
    make_log(folder, 2)
    assert "head-missing" in events_of(folder)


def test_removed_line_is_found(damaged: Callable[[], Path]) -> None:
    """One line that is missing is one problem, where it should stand."""
    for seq in seqs_to_damage(damaged()):
        folder = damaged()
        place = at(folder, seq, lambda lines: lines[1:])
        problem = only_problem(verify([folder]))
        assert (problem.place, problem.seq) == (place, seq)
        assert "missing" in problem.what or "cut at its end" in problem.what


def test_removed_lines_over_a_rotation_are_one_problem(damaged: Callable[[], Path]) -> None:
    """Lines that are missing at the end of one file and the beginning of the next are told together."""
    folder = damaged()
    border = int(files_of(folder)[2].name[6:18])
    at(folder, border, lambda lines: lines[2:])
    at(folder, border - 2, lambda lines: [])
    problem = only_problem(verify([folder]))
    assert problem.seq == border - 2
    assert f"lines seq {border - 2} to {border + 1} are missing" in problem.what


def test_removed_file_is_found(damaged: Callable[[], Path]) -> None:
    """A file in the middle that is gone is missing at the end of the one before; the last one is known to the head."""
    count = len(files_of(damaged()))
    for number in range(1, count):
        folder = damaged()
        before, gone = files_of(folder)[number - 1 : number + 1]
        gone.unlink()
        problem = only_problem(verify([folder]))
        assert problem.place == (before, len(before.read_bytes().splitlines()) + 1)
        assert problem.seq == int(gone.name[6:18])


def test_all_files_removed_are_known_to_the_head(damaged: Callable[[], Path]) -> None:
    """An emptied folder with a head is a cut log, and says so when it goes on."""
    folder = damaged()
    for path in files_of(folder):
        path.unlink()
    assert any(f"up to seq {LINES}" in problem.what for problem in verify([folder]).problems)
    make_log(folder, 2)
    first = lines_of(folder)[0]
    assert (first["seq"], first["event"]) == (LINES + 1, "lines-missing")
    assert not verify([folder]).whole


def test_neighbours_swapped_are_found(damaged: Callable[[], Path]) -> None:
    """Two lines that changed places are one problem, at the first of them."""
    for seq in range(1, LINES):
        folder = damaged()
        place = places_of(folder)[seq - 1]
        if places_of(folder)[seq][0] != place[0]:
            continue
        at(folder, seq, lambda lines: [lines[1], lines[0], *lines[2:]])
        problem = only_problem(verify([folder]))
        assert problem.place == place
        assert problem.what == f"line seq {seq + 1} stands in the wrong place: seq {seq} belongs here"


def test_lines_swapped_far_apart_are_found(damaged: Callable[[], Path]) -> None:
    """Two lines that changed places are told at both, also across files, and nothing between them is."""
    for one, other in [(1, 4), (2, 20), (5, LINES), (1, LINES), (9, 11)]:
        folder = damaged()
        places = places_of(folder)
        lines = [line for path in files_of(folder) for line in path.read_bytes().splitlines(keepends=True)]
        at(folder, one, in_place(lines[other - 1]))
        at(folder, other, in_place(lines[one - 1]))
        report = verify([folder])
        told = [(problem.place, problem.seq) for problem in report.problems]
        assert told == [(places[one - 1], other), (places[other - 1], one)], describe_report(report)


def test_moved_and_repeated_lines_are_found(damaged: Callable[[], Path]) -> None:
    """A line moved or copied to another place is one problem, where it stands now."""
    for seq, target, copied in [(2, 20, False), (20, 2, False), (20, 2, True), (2, 20, True), (LINES, 9, False)]:
        folder = damaged()
        line = [one for path in files_of(folder) for one in path.read_bytes().splitlines(keepends=True)][seq - 1]
        place = at(folder, target, in_front(line))
        if not copied:
            for path in files_of(folder):
                kept = path.read_bytes().splitlines(keepends=True)
                for number, one in enumerate(kept):
                    if one == line and (path, number + 1) != place:
                        edit(path, without(number))
        told = {(problem.place, problem.seq) for problem in verify([folder]).problems}
        assert told == {(place, seq)}, (seq, target, copied)


def test_inserted_line_is_found(damaged: Callable[[], Path]) -> None:
    """A line that is none of the log's, good JSON or not, is one problem where it stands."""
    for seq in seqs_to_damage(damaged()):
        for new in (b"{}\n", b"\n", b"hello\n", b"\xff\xfe\0\n"):
            folder = damaged()
            place = at(folder, seq, in_front(new))
            assert only_problem(verify([folder])).place == place


def test_line_written_anew_with_its_hash_is_found(damaged: Callable[[], Path]) -> None:
    """A line that was changed together with its hash breaks the chain at the next one; the last one at the head."""
    for seq in seqs_to_damage(damaged()):
        folder = damaged()
        place = at(folder, seq, lambda lines: [forge(lines[0], Z=b"0"), *lines[1:]])
        problem = only_problem(verify([folder]))
        assert problem.seq == seq
        assert problem.place == place


def test_end_written_anew_is_found_by_the_head_or_a_noted_hash(damaged: Callable[[], Path]) -> None:
    """Who makes all lines from one on anew is betrayed by head.json; with a new head, by a hash noted elsewhere."""
    folder = damaged()
    noted = last_link(folder)
    (path, number) = places_of(folder)[LINES - 3]

    def anew(lines: list[bytes]) -> list[bytes]:
        new = lines[: number - 1]
        for line in lines[number - 1 :]:
            new.append(forge(line, prev=hash_of(new[-1]) if new else None, team=b"teem"))
        return new

    edit(path, anew)
    assert not verify([folder]).whole
    end = path.read_bytes().splitlines(keepends=True)[-1]
    (folder / "head.json").write_bytes(b'{"seq":%d,"hash":"%b"}\n' % (LINES, hash_of(end)))
    report = verify([folder], after=noted[1])
    assert any(noted[1] in problem.what for problem in report.problems)


def test_noted_hash_of_any_line_is_found(damaged: Callable[[], Path]) -> None:
    """A hash noted long ago, or the one that the oldest kept line goes on from, is enough."""
    folder = damaged()
    for line in lines_of(folder):
        assert verify([folder], after=str(line["hash"])).whole
    assert not verify([folder], after="1" * 64).whole


def test_many_damages_do_not_hide_each_other(damaged: Callable[[], Path]) -> None:
    """Damages far enough from each other are told one by one, in their order."""
    folder = damaged()
    first = at(folder, 3, lambda lines: [lines[0].replace(b"team", b"teem"), *lines[1:]])
    second = at(folder, 10, lambda lines: lines[1:])
    third = at(folder, 20, lambda lines: [b"junk\n", *lines])
    told = [(problem.place, problem.seq) for problem in verify([folder]).problems]
    assert told == [(first, 3), (second, 10), (third, None)]


def test_files_that_changed_names_make_no_cascade(damaged: Callable[[], Path]) -> None:
    """Two files under each other's names are few problems, not one for each line."""
    folder = damaged()
    one, other = files_of(folder)[1:3]
    one.rename(folder / "other")
    other.rename(one)
    (folder / "other").rename(other)
    problems = verify([folder]).problems
    assert 1 <= len(problems) <= 2
    assert problems[0].place in {(one, 1), (other, 1)}


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_cut_end_stays_visible_after_the_log_went_on(folder: Path, kept: int) -> None:
    """Lines cut off at a line's border are told by verify, and still are when the service has written again."""
    make_log(folder, 5)
    path = files_of(folder)[0]
    edit(path, lambda lines: lines[:kept])
    assert any("cut at its end" in problem.what for problem in verify([folder]).problems)
    make_log(folder, 3)
    problem = only_problem(verify([folder]))
    assert problem.seq == kept + 1
    assert f"{kept + 1} to 5 are missing" in problem.what
    line = next(line for line in lines_of(folder) if line["event"] == "lines-missing")
    assert (line["seq"], line["first"], line["last"]) == (6, kept + 1, 5)


def test_end_cut_while_the_service_runs_is_noticed(folder: Path, log: AuditLog) -> None:
    """What this process has written is known to it, also before the head is."""
    for number in range(5):
        log.write("admitted", number=number)
    edit(files_of(folder)[0], lambda lines: lines[:3])
    log.write("admitted", number=5)
    log.sync()
    assert "4 to 6 are missing" in only_problem(verify([folder])).what


def test_changed_end_stays_visible_after_the_log_went_on(folder: Path) -> None:
    """A last line written anew is not made good by the lines that follow it."""
    make_log(folder, 5)
    path = files_of(folder)[0]
    edit(path, lambda lines: [*lines[:4], forge(lines[4], team=b"teem")])
    make_log(folder, 3)
    problem = only_problem(verify([folder]))
    assert (problem.place, problem.seq) == ((path, 5), 5)
    assert "lines-missing" in events_of(folder)


def test_file_replaced_while_the_service_runs_is_noticed(folder: Path, log: AuditLog) -> None:
    """An editor that saves under the same name makes another file: lines go there, not into the one that is gone."""
    log.write("admitted", number=1)
    path = files_of(folder)[0]
    content = path.read_bytes()
    path.rename(folder / "backup~")
    path.write_bytes(content)
    log.write("admitted", number=2)
    log.sync()
    assert verify([folder]).whole
    assert lines_of(folder)[-1]["number"] == 2


def test_folder_replaced_while_the_service_runs_is_refused(folder: Path, log: AuditLog) -> None:
    """A folder that is gone, or another one in its place, ends the writing: its lock is nobody else's."""
    folder.rename(folder.with_name("gone"))
    with pytest.raises(AuditUnwritable):
        log.write("admitted")
    folder.mkdir()
    with pytest.raises(AuditUnwritable, match="another folder"):
        log.write("admitted")
    folder.rmdir()
    folder.with_name("gone").rename(folder)
    log.write("admitted")


def test_file_of_a_far_number_is_not_followed(folder: Path) -> None:
    """A planted file with a high number does not lead the service astray, and verify tells it."""
    make_log(folder, 4)
    planted = folder / "audit-999999999999.jsonl"
    planted.write_bytes(b"")
    make_log(folder, 4, rotate_bytes=300)
    planted.write_bytes(b"planted\n")
    assert only_problem(verify([folder])).place == (planted, 1)


def test_old_head_does_not_lead_astray(damaged: Callable[[], Path]) -> None:
    """With a head of long ago in its place, the log still goes on at its own end."""
    folder = damaged()
    (folder / "head.json").write_bytes(b'{"seq":2,"hash":"%b"}\n' % str(lines_of(folder)[1]["hash"]).encode())
    make_log(folder, 3)
    assert verify([folder]).whole
    assert lines_of(folder)[-1]["seq"] == LINES + 2


# Several nodes


def test_chain_goes_on_from_another_node(tmp_path: Path) -> None:
    """A new node's chain begins from the old one's last hash; given together in any order, the link is told."""
    old = make_log(tmp_path / "old")
    new = make_log(tmp_path / "new", begin=last_link(old)[1])
    for paths in ([old, new], [new, old], [*files_of(new), *files_of(old)]):
        report = verify(paths)
        assert report.whole
        assert (len(report.chains), report.lines) == (2, 2 * LINES)
        chain = next(chain for chain in report.chains if chain.node == "new")
        assert f"of {files_of(old)[-1]} line" in chain.begins
        assert f"(seq {LINES})" in chain.begins
    alone = verify([new])
    assert alone.whole
    assert "in none of the given files" in alone.chains[0].begins
    assert verify([new], after=last_link(old)[1]).whole


def test_chain_goes_on_from_the_middle_of_another(tmp_path: Path) -> None:
    """An old node that wrote its last lines after the new one had begun is no damage."""
    old = make_log(tmp_path / "old", 5)
    new = make_log(tmp_path / "new", 5, begin=last_link(old)[1])
    make_log(old, 3)
    report = verify([new, old])
    assert report.whole
    assert "line 5 (seq 5)" in next(chain for chain in report.chains if chain.node == "new").begins


def test_problem_of_one_node_is_told_of_that_node_only(tmp_path: Path) -> None:
    """Damage in one chain does not touch the others."""
    old = make_log(tmp_path / "old", 9)
    new = make_log(tmp_path / "new", 9, begin=last_link(old)[1])
    place = at(new, 4, lambda lines: lines[1:])
    assert only_problem(verify([old, new])).place == place


def test_file_given_twice_counts_once(tmp_path: Path) -> None:
    """A folder and a file in it, or a file named in two ways, are the same lines."""
    folder = make_log(tmp_path / "a", 4)
    (path,) = files_of(folder)
    assert verify([folder, path, folder / ".." / "a"]).lines == 4
    assert verify([path, path]).lines == 4


def test_older_files_in_an_archive_are_linked(tmp_path: Path) -> None:
    """Files moved elsewhere and given too are what the folder's oldest line goes on from."""
    folder = make_log(tmp_path / "a")
    archive = tmp_path / "archive"
    archive.mkdir()
    moved = files_of(folder)[0]
    moved.rename(archive / moved.name)
    assert not verify([folder]).whole
    report = verify([folder, archive / moved.name])
    assert report.whole, describe_report(report)
    assert report.lines == LINES


# Hostile files


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n" * 5000,
        b"\0" * 300_000,
        b"\xff\xfe\n\x80",
        b"[" * 60_000 + b"\n",
        b'{"seq":' + b"9" * 50_000 + b"}\n",
        b"x" * 1_000_000,
        b"x" * 200_000 + b"\n" + b'{"seq":1}\n',
        b'{"seq":1,"time":"' + b"y" * 200_000,
        make_line(b'"seq":99999999999999999999', b'"event":"begin"'),
        make_line(b'"seq":1', b'"event":"begin","node":"\xff"'),
        make_line(b'"seq":1', b'"event":"begin",' + b"[" * 60_000),
        make_line(b'"seq":1', b'"event":"begin","node":' + b"9" * 60_000),
        make_line(b'"seq":5', b'"event":"dropped","last":1e999'),
    ],
    ids=range(14),
)
def test_hostile_content_never_raises(folder: Path, content: bytes) -> None:
    """Whatever a file holds, verify returns a report that can be told, and opening goes on or says why not."""
    folder.mkdir()
    (folder / "audit-000000000001.jsonl").write_bytes(content)
    (folder / "head.json").write_bytes(content)
    for paths in ([folder], files_of(folder)):
        assert describe_report(verify(paths))
    make_log(folder, 3)
    report = verify([folder])
    assert report.lines >= 2
    assert len(report.problems) <= 3


def test_hostile_names_and_kinds_of_paths(tmp_path: Path) -> None:
    """Paths that are missing, pipes, empty folders or broken links are problems, never exceptions or waits."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    paths = [tmp_path / name for name in ("pipe", "empty", "link", "missing", "x" * 300)]
    report = verify([*paths, Path("/dev/zero")])
    assert len(report.problems) == 6
    assert not report.whole
    with pytest.raises(ServiceError, match="no audit log"):
        last_link(tmp_path / "empty")
    with pytest.raises(ServiceError, match="cannot be read"):
        last_link(tmp_path / "missing")


def test_control_characters_do_not_reach_the_terminal(folder: Path) -> None:
    """Names from files are shown escaped."""
    folder.mkdir()
    escaped = make_line(b'"seq":1', b'"event":"begin","node":"\\u001b[2J"')
    lines = escaped, make_line(b'"seq":2', b'"event":"begin","node":"\x1b[2J"')
    (folder / "audit-000000000001.jsonl").write_bytes(b"".join(lines))
    assert all(text.isprintable() for text in describe_report(verify([folder])))


def test_thousands_of_problems_are_counted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A report stays small; what it does not tell is counted and it is not whole."""
    monkeypatch.setattr(audit_verify, "MAX_TOLD", 5)
    make_log(folder, 60, rotate_bytes=10**6)
    edit(files_of(folder)[0], lambda lines: [one for line in lines for one in (b"junk\n", line)])
    report = verify([folder])
    assert (len(report.problems), report.untold) == (5, 55)
    assert "NOT whole: 60 problems" in describe_report(report)


def test_report_is_told_in_lines(folder: Path) -> None:
    """The command line shows counts, each chain with its ends, each problem with its place, and the verdict."""
    make_log(folder, 4)
    (path,) = files_of(folder)
    assert describe_report(verify([folder])) == [
        "4 lines in 1 files",
        'chain of "audit": 4 lines in 1 files, seq 1 to 4',
        "  begins zeros",
        f"  ends with hash {last_link(folder)[1]}",
        f'note: {path}:1 (seq 1): "event":"begin","node":"audit"',
        "whole",
    ]
    edit(path, lambda lines: [lines[0], *lines[2:]])
    told = describe_report(verify([folder]))
    assert f"problem: {path}:2: line seq 2 is missing" in told
    assert told[-1] == "NOT whole: 1 problems"


def test_notes_are_written_when_there_is_room_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has happened while the disk was full comes into the log before the next line, with the time it happened."""
    log = AuditLog(folder, clock=Clock())
    log.write("admitted", id=1)

    def full(descriptor: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        assert not log.note("ended", id=1)
        with pytest.raises(AuditUnwritable):
            log.write("admitted", id=2)
    log.write("admitted", id=3)
    assert log.note("ended", id=3)
    log.close()
    *_, admitted, late, third, last = lines_of(folder)
    assert [line["id"] for line in (admitted, late, third, last)] == [1, 1, 3, 3]
    assert "happened" in late
    assert verify([folder]).whole


def test_writers_in_turn_read_only_what_is_new(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two services on one folder do not read the log anew for each other's lines."""
    first, second = AuditLog(folder), AuditLog(folder)
    monkeypatch.setattr(audit, "read_tail", lambda *arguments: pytest.fail("the whole tail was read"))
    for number in range(20):
        first.write("admitted", number=number)
        second.write("admitted", number=number)
        second.write("admitted", number=number)
    first.close()
    second.close()
    assert verify([folder]).whole
    assert len(lines_of(folder)) == 61
