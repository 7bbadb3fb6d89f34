"""Owns the proof of the audit log: whether its chains are whole, where they begin, and where they were changed.

Nobody can tell from a folder alone that all of it, with its head, was made anew; ``last_link``, noted elsewhere and
given to ``verify`` as ``after``, can.
"""

import contextlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from service.audit_lines import (
    FILE_NAME,
    ZEROS,
    Line,
    first_seq,
    is_torn,
    lock,
    log_files,
    raw_lines,
    read_head,
    read_line,
    read_tail,
)
from service.errors import ServiceError

MAX_TOLD = 1000  # problems and notes of a report; more are counted
_TOLD_EVENTS = (b"begin", b"dropped", b"recovered", b"lines-missing", b"head-missing")


class Place(NamedTuple):
    """Where in the files something is; lines count from 1."""

    file: Path
    line: int


@dataclass(frozen=True)
class Problem:
    """One damage that no power cut explains, where it begins."""

    place: Place | None
    seq: int | None
    what: str


@dataclass(frozen=True)
class Torn:
    """A line that a power cut, or the end of its writer, has left unfinished; the next opening puts it right."""

    place: Place
    size_bytes: int


@dataclass(frozen=True)
class Chain:
    """The lines of one node; ``begins`` says what they go on from."""

    node: str | None
    begins: str
    files: int
    lines: int
    first_seq: int
    last_seq: int
    last_hash: str


@dataclass(frozen=True)
class Report:
    """What was found in all files given; ``untold`` counts the problems beyond the first thousand."""

    files: int
    lines: int
    chains: tuple[Chain, ...]
    problems: tuple[Problem, ...]
    torn: tuple[Torn, ...]
    notes: tuple[str, ...]
    untold: int

    @property
    def whole(self) -> bool:
        return not self.problems


class _Source(NamedTuple):
    """Files of one node in order, with the sizes they had when nobody wrote; a folder's come with its head."""

    path: Path
    files: list[tuple[Path, int]]
    head: tuple[int, str] | None
    folder: bool


class _Findings:
    """What the sources' lines have shown so far; ``wanted`` are hashes whose lines are to be found."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self.torn: list[Torn] = []
        self.notes: list[str] = []
        self.wanted: set[str] = set()
        self.found: dict[str, tuple[Place, int]] = {}
        self.untold = 0

    def problem(self, place: Place | None, seq: int | None, what: str) -> None:
        if len(self.problems) < MAX_TOLD:
            self.problems.append(Problem(place, seq, what))
        else:
            self.untold += 1


class _Follower:
    """Follows one source line by line and tells each damage once, however many lines do not fit because of it.

    A line with another number than expected decides nothing yet: the next line shows whether it stands in the wrong
    place itself, or lines before it are missing.
    """

    def __init__(self, source: _Source, findings: _Findings):
        self._findings = findings
        self._head = source.head or (0, ZEROS)
        self._expected = (first_seq(source.files[0][0]) if source.files else None) or 0  # 0: any
        self._link: str | None = None  # the hash to go on from; None: unknown
        self._last = Place(source.files[0][0] if source.files else source.path, 0)
        self._stray: tuple[Place, Line] | None = None
        self._damage: tuple[Place, str] | None = None
        self._damaged_lines = 0
        self._early: dict[int, str] = {}  # lines that stood before their place
        self._resume: tuple[int, str | None] | None = None  # where a block that stands too late is over
        self._gaps: list[tuple[int, int, Place]] = []
        self.begin: Line | None = None
        self.lines, self.dropped = 0, 0

    @property
    def next_seq(self) -> int:
        return self._stray[1].seq + 1 if self._stray else max(1, self._expected) + self._damaged_lines

    @property
    def last(self) -> tuple[int, str]:
        return self._expected - 1, self._link or "unknown"

    def good(self, place: Place, line: Line) -> None:
        self._expected = self._expected or max(1, line.seq - self._damaged_lines)
        if self._damage is not None:
            if line.seq >= self._expected:
                self._close_damage(line.seq - 1)
            else:
                self._close_damage(self._expected + self._damaged_lines - 1)
        stray, self._stray = self._stray, None
        if stray is None:
            self._take(place, line)
        elif self._fits(line):
            self._misplaced(*stray)
            self._accept(place, line)
        elif line.prev == stray[1].hash:
            self._jump(*stray)
            self._accept(place, line)
        elif self._expected < line.seq < stray[1].seq or stray[1].seq < self._expected == line.seq - 1:
            self._misplaced(*stray)
            self._jump(place, line)
        else:
            self._jump(*stray)
            self._take(place, line)

    def bad(self, place: Place, why: str) -> None:
        self._settle()
        self._damage = self._damage or (place, why)
        self._damaged_lines += 1

    def end(self) -> None:
        self._settle()
        while self._expected in self._early:
            self._expected, self._link = self._expected + 1, self._early.pop(self._expected)
        if self._damage is not None:
            self._close_damage(max(max(1, self._expected) + self._damaged_lines - 1, self._head[0]))
        elif self._head[0] >= max(1, self._expected):
            self._findings.problem(
                Place(self._last.file, self._last.line + 1),
                max(1, self._expected),
                f"the log is cut at its end: head.json knows of lines up to seq {self._head[0]}",
            )
        for first, last, place in self._gaps:
            what = f"line seq {first} is" if first == last else f"lines seq {first} to {last} are"
            self._findings.problem(place, first, f"{what} missing")

    def _fits(self, line: Line) -> bool:
        while line.seq != self._expected and self._expected in self._early:
            self._expected, self._link = self._expected + 1, self._early.pop(self._expected)
        if self._resume == (line.seq, line.prev):
            self._expected, self._link, self._resume = line.seq, line.prev, None
        return line.seq == self._expected and self._link in (None, line.prev)

    def _take(self, place: Place, line: Line) -> None:
        if self._fits(line):
            self._accept(place, line)
        elif line.seq == self._expected:
            what = "this line was written anew, with its hash: the next line goes on from another one"
            self._findings.problem(self._last, line.seq - 1, what)
            self._accept(place, line)
        else:
            self._stray = (place, line)

    def _accept(self, place: Place, line: Line) -> None:
        if self.begin is None:
            self.begin = line
        self._see(place, line)
        self._expected, self._link, self._last = line.seq + 1, line.hash, place
        if line.facts.startswith(b'"event":"dropped"'):
            self.dropped = max(self.dropped, _number(_facts(line).get("last")))

    def _misplaced(self, place: Place, line: Line) -> None:
        what = f"line seq {line.seq} stands in the wrong place: seq {self._expected} belongs here"
        self._findings.problem(place, line.seq, what)
        self._see(place, line)
        self._last = place
        if line.seq >= self._expected and len(self._early) < MAX_TOLD:
            self._early[line.seq] = line.hash

    def _jump(self, place: Place, line: Line) -> None:
        """Goes on from a line with another number than expected."""
        if line.seq > self._expected:
            at_border = place.line == 1 and first_seq(place.file) == line.seq and self._last.line > 0
            gap = Place(self._last.file, self._last.line + 1) if at_border else place
            if len(self._gaps) < MAX_TOLD:
                self._gaps.append((self._expected, line.seq - 1, gap))
            else:
                self._findings.untold += 1
        elif line.seq < self._expected:
            what = f"line seq {line.seq} and what follows stand in the wrong place: seq {self._expected} belongs here"
            self._findings.problem(place, line.seq, what)
            self._resume = (self._expected, self._link)
        self._accept(place, line)

    def _settle(self) -> None:
        stray, self._stray = self._stray, None
        if stray is not None and stray[1].seq > self._expected:
            self._jump(*stray)
        elif stray is not None:
            self._misplaced(*stray)

    def _close_damage(self, last: int) -> None:
        assert self._damage is not None
        (place, why), first = self._damage, max(1, self._expected)
        if last < first:
            self._findings.problem(place, None, f"a line that does not belong here {why}")
        elif last == first:
            self._findings.problem(place, first, f"line seq {first} {why}")
        else:
            self._findings.problem(place, first, f"line seq {first} {why}; up to seq {last} all are damaged or missing")
        if last >= first:
            self._expected, self._link = last + 1, None
        self._last = Place(place.file, place.line + self._damaged_lines - 1)
        self._damage, self._damaged_lines = None, 0

    def _see(self, place: Place, line: Line) -> None:
        self.lines += 1
        if line.seq == self._head[0] and line.hash != self._head[1]:
            what = "head.json remembers another hash: it was changed, or the lines up to here were written anew"
            self._findings.problem(place, line.seq, what)
        if line.hash in self._findings.wanted:
            self._findings.found.setdefault(line.hash, (place, line.seq))
        if line.seq < self._expected:
            for number, (first, last, gap) in enumerate(self._gaps):
                if first <= line.seq <= last:
                    rest = [(first, line.seq - 1, gap), (line.seq + 1, last, gap)]
                    self._gaps[number : number + 1] = [one for one in rest if one[0] <= one[1]]
                    break
        if line.event in _TOLD_EVENTS and len(self._findings.notes) < MAX_TOLD:
            facts = json.dumps(line.facts.decode("utf-8", "replace"))[1:-1].replace('\\"', '"')  # no control characters
            self._findings.notes.append(f"{place.file}:{place.line} (seq {line.seq}): {facts}")


def _facts(line: Line) -> dict[str, Any]:
    try:
        return dict(json.loads(b"{" + line.facts + b"}"))
    except (ValueError, TypeError, RecursionError):
        return {}


def _number(value: Any) -> int:
    return value if type(value) is int else 0


def _snapshot(folder: Path) -> _Source:
    """Which files there are, taken while nobody writes, so that no line is half there."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):  # its holder was stopped, so nobody writes
            lock(descriptor)
        files = [(path, path.stat().st_size) for path in log_files(folder)]
        return _Source(folder, files, read_head(folder), True)
    finally:
        os.close(descriptor)  # and the lock with it


def _sources(paths: Iterable[Path], findings: _Findings) -> list[_Source]:
    """Folders, and files by the folder they lie in, since several files of one node follow each other."""
    folders: dict[Path, _Source] = {}
    loose: dict[Path, dict[Path, int]] = {}
    for path in paths:
        try:
            if path.is_dir():
                folders[path.resolve()] = source = _snapshot(path)
                if not source.files:
                    findings.problem(Place(path, 0), None, "this folder holds no audit log")
            elif path.is_file():
                size = path.stat().st_size
                loose.setdefault((path.parent if FILE_NAME.fullmatch(path.name) else path).resolve(), {})[path] = size
                if not size:
                    findings.problem(Place(path, 0), None, "this file is empty")
            else:
                findings.problem(Place(path, 0), None, "this is neither a file nor a folder")
        except OSError as error:
            findings.problem(Place(path, 0), None, f"this cannot be read: {error.strerror}")
    files = [
        _Source(key, sorted(of_folder.items(), key=lambda file: file[0].name), None, False)
        for key, of_folder in loose.items()
        if key not in folders and key.parent not in folders
    ]
    return [*folders.values(), *files]


def _follow(source: _Source, findings: _Findings) -> _Follower:
    follower = _Follower(source, findings)
    for path, size in source.files:
        torn: tuple[Place, int] | None = None
        try:
            for raw in raw_lines(path, 0, size):
                place, line = Place(path, raw.number), read_line(raw.data)
                if torn is not None:  # not the last one, and no head to say that it is a power cut's
                    follower.bad(torn[0], "is damaged")
                    torn = None
                if isinstance(line, Line):
                    follower.good(place, line)
                elif (
                    path == source.files[-1][0]
                    and follower.next_seq > (source.head or (0, ""))[0]
                    and is_torn(raw, follower.next_seq)
                ):
                    torn = (place, size - raw.offset)
                    if source.head:
                        break  # as the opening does
                else:
                    follower.bad(place, line)
        except OSError as error:
            findings.problem(Place(path, 0), None, f"this cannot be read: {error.strerror}")
        if torn is not None:
            findings.torn.append(Torn(*torn))
    follower.end()
    return follower


def verify(paths: Iterable[Path], after: str | None = None) -> Report:
    """Follows all chains in files and folders, of one node or several, in any order; nothing in them makes it raise.

    ``after`` is a hash that was noted elsewhere, and that the log must go on from or hold.
    """
    findings = _Findings()
    sources = _sources([Path(path) for path in paths], findings)
    for source in sources:
        with contextlib.suppress(OSError):  # told when it is followed
            for raw in islice(raw_lines(*source.files[0][:1], 0, source.files[0][1]), 3) if source.files else ():
                line = read_line(raw.data)
                findings.wanted |= {line.prev} if isinstance(line, Line) else set()
    findings.wanted |= {after} if after else set()
    followers = []
    for source in sources:
        told = len(findings.problems)
        followers.append(follower := _follow(source, findings))
        if source.folder and not source.head and follower.lines > 1:
            what = "head.json is missing or was changed: whether the log is cut at its end cannot be told"
            findings.problem(Place(source.path / "head.json", 0), None, what)
        findings.problems[told:] = sorted(findings.problems[told:], key=lambda one: one.place or Place(source.path, 0))
    chains = []
    for source, follower in zip(sources, followers, strict=True):
        if follower.begin is not None:
            chains.append(_chain(source, follower, findings))
    if after and after not in findings.found and after not in {one.begin.prev for one in followers if one.begin}:
        findings.problem(None, None, f"no line has, or goes on from, the hash {after}: the log was written anew or cut")
    return Report(
        files=sum(len(source.files) for source in sources),
        lines=sum(follower.lines for follower in followers),
        chains=tuple(chains),
        problems=tuple(findings.problems),
        torn=tuple(findings.torn),
        notes=tuple(findings.notes),
        untold=findings.untold,
    )


def _chain(source: _Source, follower: _Follower, findings: _Findings) -> Chain:
    begin = follower.begin
    assert begin is not None
    first = first_seq(source.files[0][0]) or begin.seq
    if begin.prev == ZEROS:
        begins = "zeros"
    elif begin.prev in findings.found:
        place, seq = findings.found[begin.prev]
        begins = f"after hash {begin.prev} of {place.file} line {place.line} (seq {seq})"
    else:
        begins = f"after hash {begin.prev}, which is in none of the given files"
        if source.folder and first > 1 and follower.dropped < first - 1:
            what = f"lines seq {follower.dropped + 1} to {first - 1} are missing"
            findings.problem(Place(source.files[0][0], 1), follower.dropped + 1, f"{what}; no line says: dropped")
    node = _facts(begin).get("node") if begin.event == b"begin" else None
    last_seq, last_hash = follower.last
    return Chain(
        node=node if isinstance(node, str) else None,
        begins=begins,
        files=len(source.files),
        lines=follower.lines,
        first_seq=begin.seq,
        last_seq=last_seq,
        last_hash=last_hash,
    )


def describe_report(report: Report) -> list[str]:
    """The report for the command line, one finding a line."""
    lines = [f"{report.lines} lines in {report.files} files"]
    for chain in report.chains:
        node = f" of {json.dumps(chain.node)}" if chain.node else ""
        seqs = f"seq {chain.first_seq} to {chain.last_seq}"
        lines.append(f"chain{node}: {chain.lines} lines in {chain.files} files, {seqs}")
        lines += [f"  begins {chain.begins}", f"  ends with hash {chain.last_hash}"]
    lines += [f"note: {note}" for note in report.notes]
    for torn in report.torn:
        where = f"{torn.place.file}:{torn.place.line}"
        lines.append(f"torn: {where}: {torn.size_bytes} bytes of an unfinished line, as a power cut leaves it")
    for problem in report.problems:
        where = f"{problem.place.file}:{problem.place.line}: " if problem.place else ""
        lines.append(f"problem: {where}{problem.what}")
    if report.untold:
        lines.append(f"problem: {report.untold} more")
    lines.append("whole" if report.whole else f"NOT whole: {len(report.problems) + report.untold} problems")
    return lines


def last_link(folder: Path) -> tuple[int, str]:
    """Sequence number and hash of the last line: to be noted elsewhere, or for another node to begin from."""
    try:
        source = _snapshot(folder)
        known = source.head or (0, ZEROS)
        if source.files:
            path, size = source.files[-1]
            tail = read_tail(path, size, known)
            if tail.hash is not None and tail.seq >= known[0]:
                return tail.seq, tail.hash
    except OSError as error:
        raise ServiceError(f"the audit log in {folder} cannot be read: {error.strerror}") from error
    if not known[0]:
        raise ServiceError(f"{folder} holds no audit log")
    return known
