"""Owns the audit log as it lies on the disk: its files, the form of a line, the head, and how they are read.

A line is a JSON object. Its last member ``hash`` is the SHA-256 of the bytes before that member, and ``prev`` is the
hash of the line before. ``head.json`` remembers the last line that is surely on the disk: what is missing up to it was
taken away, what is torn after it was lost with the power.
"""

import errno
import fcntl
import hashlib
import json
import re
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

ZEROS = "0" * 64  # what the first line of all goes on from
LINE_BYTES = 64 * 1024
LOCK_TIMEOUT_S = 2.0  # the lock is held for microseconds, unless its holder was stopped
_TAIL_BYTES = 4 * 1024 * 1024  # more than is ever written between two syncs

FILE_NAME = re.compile(r"audit-(\d{12})\.jsonl")
HASH = re.compile(r"[0-9a-f]{64}")
# Read as they were written, byte by byte: there is no second way to write the same, and hostile JSON costs nothing.
_HEAD = re.compile(rb'\{"seq":([1-9]\d{0,11}),"hash":"([0-9a-f]{64})"\}\n')
_BODY = re.compile(
    rb'\{"seq":([1-9]\d{0,11}),"time":"[0-9TZ:.-]{24}",("event":"([^"]*)".*),"prev":"([0-9a-f]{64})"', re.DOTALL
)
_END = re.compile(rb',"hash":"([0-9a-f]{64})"\}\n')
_END_BYTES = 76
_MORE_THAN_A_LINE = re.compile(rb'.*,"prev":"[0-9a-f]{64}","hash":"[0-9a-f]{64}"\}.', re.DOTALL)


class RawLine(NamedTuple):
    """One line of a file as it stands there; ``data`` holds its first ``LINE_BYTES`` at most."""

    number: int
    offset: int
    data: bytes
    ended: bool
    nul: bool


class Line(NamedTuple):
    """One line whose hash fits; ``facts`` is JSON without its braces."""

    seq: int
    event: bytes
    facts: bytes
    prev: str
    hash: str


def log_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if FILE_NAME.fullmatch(path.name) and path.is_file())


def first_seq(path: Path) -> int | None:
    """The sequence number that a file's name promises for its first line."""
    name = FILE_NAME.fullmatch(path.name)
    return int(name[1]) if name else None


def read_head(folder: Path) -> tuple[int, str] | None:
    try:
        with (folder / "head.json").open("rb") as file:
            head = _HEAD.fullmatch(file.read(256))
    except FileNotFoundError:
        return None
    return (int(head[1]), head[2].decode()) if head else None


def raw_lines(path: Path, start: int, end: int) -> Iterator[RawLine]:
    """The lines of one file between two offsets, in bounded memory."""
    with path.open("rb") as file:
        file.seek(start)
        number = 0
        while start < end and (data := file.readline(min(LINE_BYTES, end - start))):
            piece, size, nul = data, len(data), b"\0" in data
            while not piece.endswith(b"\n") and (piece := file.readline(min(LINE_BYTES, end - start - size))):
                size, nul = size + len(piece), nul or b"\0" in piece
            number += 1
            yield RawLine(number, start, data, (piece or data).endswith(b"\n"), nul)
            start += size


def read_line(data: bytes) -> Line | str:
    """The line, or what is wrong with it."""
    end = _END.fullmatch(data, max(0, len(data) - _END_BYTES))
    if end is not None and hashlib.sha256(data[:-_END_BYTES]).hexdigest().encode() == end[1]:
        body = _BODY.fullmatch(data, 0, len(data) - _END_BYTES)
        if body is not None:
            return Line(int(body[1]), body[3], body[2], body[4].decode(), end[1].decode())
        return "has another form than the log's lines"
    try:
        json.loads(data)
    except (ValueError, RecursionError):
        return "is not JSON"
    return "is changed: its hash does not fit"


def is_torn(raw: RawLine, seq: int) -> bool:
    """Whether this is what a power cut leaves of the line ``seq``: its first bytes, then nothing, or NULs."""
    start, first = raw.data.partition(b"\0")[0], b'{"seq":%d,"time":"' % seq
    return (
        (raw.nul or not raw.ended)
        and len(start) < LINE_BYTES
        and start[: len(first)] == first[: len(start)]
        and not _MORE_THAN_A_LINE.match(start)
    )


def belongs(path: Path, known_seq: int) -> bool:
    """Whether a file can be of this log: it is begun when the head knows all lines before it, or the head was changed.

    A file that somebody has put there under a high number must not be taken for the newest.
    """
    first = first_seq(path) or 0
    if first <= known_seq + 1:
        return True
    raw = next(raw_lines(path, 0, LINE_BYTES), None)
    line = read_line(raw.data) if raw else None
    return isinstance(line, Line) and line.seq == first


class Tail(NamedTuple):
    """How a file ends: its last whole line, where a torn one begins, and whether the head's line is another one."""

    seq: int
    hash: str | None
    torn_at: int | None
    differs: bool


def read_tail(path: Path, size: int, known: tuple[int, str]) -> Tail:
    """Reads back as far as the line that is ``known``; sequence number 0 stands for none."""
    for start in (max(0, size - _TAIL_BYTES), 0):
        tail, oldest = Tail((first_seq(path) or 1) - 1, None, None, False), None
        for raw in islice(raw_lines(path, start, size), 1 if start else 0, None):  # the first one may be half
            line = read_line(raw.data)
            if isinstance(line, Line):
                oldest = oldest or line.seq
                differs = tail.differs or (line.seq == known[0] and line.hash != known[1])
                tail = Tail(line.seq, line.hash, None, differs)
            elif tail.torn_at is None and tail.seq >= known[0] and is_torn(raw, tail.seq + 1):
                tail = tail._replace(torn_at=raw.offset)
                if known[0]:
                    break  # blocks may reach the disk out of order: whole lines after a hole are lost with it
        if oldest is not None and oldest <= known[0]:
            break
    return tail


def hash_bytes(path: Path, start: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(start)
        while chunk := file.read(LINE_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def lock(descriptor: int) -> None:
    """Takes the lock between processes. Raises TimeoutError, because a stopped process must not stop the service."""
    deadline_s = 0.0
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            deadline_s = deadline_s or time.monotonic() + LOCK_TIMEOUT_S
            if time.monotonic() > deadline_s:
                raise TimeoutError(errno.ETIMEDOUT, "another process holds the log for too long") from None
            time.sleep(0.0005)
