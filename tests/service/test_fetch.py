"""Fetching a model over real HTTP: cut, resumed, swapped, too large for the disk, killed, never trusted."""

import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests

from service import models
from service.errors import FetchFailed, FetchGaveUp, ModelRefused
from service.models import Entry, fetch, open_verified

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
CONTENT = random.Random("model").randbytes(600_000)
OTHER = random.Random("another model").randbytes(len(CONTENT))


@dataclass
class Site:
    """What the server offers and how it misbehaves; it notes every request it got."""

    content: bytes = CONTENT
    etag: str | None = '"first"'
    ranges: bool = True
    content_length: bool = True
    answers: list[int] = field(default_factory=list)  # status codes of the next requests, 200 afterwards
    cuts: list[int] = field(default_factory=list)  # bytes of body after which the next requests are cut
    content_range: str | None = None
    pause_s: float = 0.0  # between pieces of 20,000 bytes
    asked: list[tuple[str | None, str | None]] = field(default_factory=list)  # Range and If-Range
    sent_bytes: int = 0
    url: str = ""

    def entry(self, **changes: Any) -> Entry:
        sha256 = hashlib.sha256(CONTENT).hexdigest()
        entry = Entry("small", "small.gguf", self.url, len(CONTENT), ram_gb=1, sha256=sha256)
        return replace(entry, **changes)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    site: Site

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        site = self.site
        asked, condition = self.headers.get("Range"), self.headers.get("If-Range")
        site.asked.append((asked, condition))
        status = site.answers.pop(0) if site.answers else 200
        cut = site.cuts.pop(0) if site.cuts else None
        self.close_connection = True
        if cut == -1:  # before a single byte of the answer
            return
        if status != 200:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.send_header("Retry-After", "7")
            self.end_headers()
            return
        start = 0
        if site.ranges and asked is not None and condition == site.etag:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
        self.send_response(206 if start else 200)
        if start:
            size = len(site.content)
            self.send_header("Content-Range", site.content_range or f"bytes {start}-{size - 1}/{size}")
        if site.etag is not None:
            self.send_header("ETag", site.etag)
        if site.content_length:
            self.send_header("Content-Length", str(len(site.content) - start))
        self.end_headers()
        self.send_body(site.content[start:][:cut])

    def send_body(self, body: bytes) -> None:
        for position in range(0, len(body), 20_000):
            piece = body[position : position + 20_000]
            self.site.sent_bytes += len(piece)  # before: who has it all looks at once
            try:
                self.wfile.write(piece)
            except OSError:
                self.site.sent_bytes -= len(piece)
                return  # the client is gone, which is what some tests are about
            time.sleep(self.site.pause_s)


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    site = Site()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"site": site}))
    server.daemon_threads = False  # so that closing the server waits for the last answer
    site.url = f"http://127.0.0.1:{server.server_port}/small.gguf"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield site
    server.shutdown()
    thread.join()
    server.server_close()


def get(entry: Entry, cache: Path) -> tuple[str, list[float]]:
    """Fetch without waiting between tries; return what was shown, and the waits that were asked for."""
    shown = io.StringIO()
    waits: list[float] = []
    path = fetch(entry, cache, shown, pause=waits.append)
    assert path == cache / entry.file
    assert hashlib.sha256(path.read_bytes()).hexdigest() == hashlib.sha256(CONTENT).hexdigest()
    assert {file.name for file in cache.iterdir()} - {"small.gguf", "small.gguf.lock"} <= {"small.gguf.sha256"}
    return shown.getvalue(), waits


def start_part(cache: Path, content: bytes, etag: str | None) -> None:
    cache.mkdir(exist_ok=True)
    (cache / "small.gguf.part").write_bytes(content)
    if etag is not None:
        (cache / "small.gguf.part.etag").write_text(etag)


def test_file_is_fetched_once(site: Site, tmp_path: Path) -> None:
    """A model is fetched in one request, and a second call asks nobody."""
    shown, waits = get(site.entry(), tmp_path / "cache")
    assert "verified" in shown
    assert waits == []
    get(site.entry(), tmp_path / "cache")
    assert site.asked == [(None, None)]


def test_progress_is_shown_in_lines(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no terminal the progress comes in lines, not more often than wanted."""
    monkeypatch.setattr(models, "PROGRESS_INTERVAL_S", 0.0)
    shown, _ = get(site.entry(), tmp_path)
    shares = [int(line.rpartition("(")[2].removesuffix(" %)")) for line in shown.splitlines() if "%" in line]
    assert shares == sorted(shares)
    assert len(shares) > 5
    assert shares[-1] == 100


def test_progress_is_shown_as_a_bar_on_a_terminal(site: Site, tmp_path: Path) -> None:
    """On a terminal there is a bar that begins where the last try ended."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    start_part(tmp_path, CONTENT[:300_000], '"first"')
    terminal = Terminal()
    fetch(site.entry(), tmp_path, terminal)
    assert "small:  50%" in terminal.getvalue()
    assert "\r" in terminal.getvalue()


@pytest.mark.parametrize("cuts", [[0], [1], [70_000], [599_999], [-1], [-1, 0, 10, 130_000, 1, 100_000]])
def test_cut_download_goes_on_where_it_was(cuts: list[int], site: Site, tmp_path: Path) -> None:
    """After each cut the next request asks for the rest only, provided that the file is still the same."""
    site.cuts = list(cuts)
    _, waits = get(site.entry(), tmp_path)
    assert len(site.asked) == len(cuts) + 1
    assert len(waits) == len(cuts)
    expected: list[tuple[str | None, str | None]] = []
    have = 0
    for cut in [*cuts, 0]:
        expected.append((f"bytes={have}-", '"first"') if have else (None, None))
        have += max(cut, 0)
    assert site.asked == expected
    assert site.sent_bytes == len(CONTENT)


def test_waits_grow_while_nothing_comes(site: Site, tmp_path: Path) -> None:
    """Tries that bring nothing are further and further apart, and one that brings something starts anew."""
    site.cuts = [-1, -1, -1, 300_000, -1]
    _, waits = get(site.entry(), tmp_path)
    assert waits == [2.0, 4.0, 8.0, 1.0, 2.0]


def test_tries_are_bounded_and_the_part_is_kept(site: Site, tmp_path: Path) -> None:
    """A server that only ever cuts is given up, and what was there before is still there."""
    start_part(tmp_path, CONTENT[:200_000], '"first"')
    site.cuts = [0] * 100
    with pytest.raises(FetchGaveUp, match="the next try goes on from there"):
        fetch(site.entry(), tmp_path, io.StringIO(), pause=lambda wait_s: None)
    assert len(site.asked) == models.MAX_BARREN_TRIES
    assert (tmp_path / "small.gguf.part").read_bytes() == CONTENT[:200_000]


def test_server_that_is_not_there_is_given_up(tmp_path: Path, site: Site) -> None:
    """Refused connections are retried and then told in one line."""
    entry = site.entry(url="http://127.0.0.1:9/small.gguf")
    with pytest.raises(FetchFailed, match="the connection failed") as failure:
        fetch(entry, tmp_path, io.StringIO(), pause=lambda wait_s: None)
    assert len(str(failure.value).splitlines()) == 1


def test_server_without_ranges_starts_anew(site: Site, tmp_path: Path) -> None:
    """A server that ignores the range sends everything again, and that replaces what was there."""
    site.ranges = False
    site.cuts = [250_000]
    get(site.entry(), tmp_path)
    assert site.asked == [(None, None), ("bytes=250000-", '"first"')]
    assert site.sent_bytes == 250_000 + len(CONTENT)


def test_changed_file_starts_anew(site: Site, tmp_path: Path) -> None:
    """A part of what the address held earlier is not joined with what it holds now."""
    start_part(tmp_path, OTHER[:300_000], '"earlier"')
    get(site.entry(), tmp_path)
    assert site.asked == [("bytes=300000-", '"earlier"')]


@pytest.mark.parametrize("etag", [None, 'W/"weak"'])
def test_without_a_strong_etag_a_cut_starts_anew(etag: str | None, site: Site, tmp_path: Path) -> None:
    """Without a validator that promises equal bytes no range is asked for."""
    site.etag = etag
    site.cuts = [250_000]
    get(site.entry(), tmp_path)
    assert site.asked == [(None, None), (None, None)]


def test_another_range_than_asked_for_is_not_appended(site: Site, tmp_path: Path) -> None:
    """An answer for the wrong range is thrown away and the download starts anew."""
    start_part(tmp_path, CONTENT[:100], '"first"')
    site.content_range = f"bytes 50-{len(CONTENT) - 1}/{len(CONTENT)}"
    get(site.entry(), tmp_path)
    assert site.asked == [("bytes=100-", '"first"'), (None, None)]


def test_range_that_the_server_lacks_starts_anew(site: Site, tmp_path: Path) -> None:
    """After 416 the part is given up."""
    start_part(tmp_path, CONTENT[:100], '"first"')
    site.answers = [416]
    get(site.entry(), tmp_path)
    assert site.asked == [("bytes=100-", '"first"'), (None, None)]


def test_complete_part_needs_no_request(site: Site, tmp_path: Path) -> None:
    """A download that was complete but not yet verified when it was stopped is verified and used."""
    start_part(tmp_path, CONTENT, '"first"')
    get(site.entry(), tmp_path)
    assert site.asked == []


def test_part_that_is_too_long_is_replaced(site: Site, tmp_path: Path) -> None:
    """A part larger than the file cannot be a beginning of it."""
    start_part(tmp_path, CONTENT + b"x", '"first"')
    get(site.entry(), tmp_path)
    assert site.asked == [(None, None)]


@pytest.mark.parametrize("kind", ["sha256", "md5"])
def test_wrong_content_is_deleted_and_refused(kind: str, site: Site, tmp_path: Path) -> None:
    """Content with another digest than the published one never gets the name of the model."""
    site.content = OTHER
    md5 = hashlib.md5(CONTENT, usedforsecurity=False).hexdigest()
    entry = site.entry() if kind == "sha256" else site.entry(sha256=None, md5=md5)
    with pytest.raises(ModelRefused, match=f"not the published file: its {kind.upper()}"):
        fetch(entry, tmp_path, io.StringIO())
    assert {path.name for path in tmp_path.iterdir()} == {"small.gguf.lock"}


def test_beginning_of_other_content_is_found_out(site: Site, tmp_path: Path) -> None:
    """A part with wrong bytes under the right ETag is told by the digest, and the next call is right."""
    start_part(tmp_path, OTHER[:1000], '"first"')
    with pytest.raises(ModelRefused):
        fetch(site.entry(), tmp_path, io.StringIO())
    get(site.entry(), tmp_path)


def test_sha256_of_a_model_with_only_an_md5_is_recorded(site: Site, tmp_path: Path) -> None:
    """Such a model is verified by size and MD5, and its SHA-256 is known from then on."""
    entry = site.entry(sha256=None, md5=hashlib.md5(CONTENT, usedforsecurity=False).hexdigest())
    get(entry, tmp_path)
    record = (tmp_path / "small.gguf.sha256").read_text()
    assert record == f"{hashlib.sha256(CONTENT).hexdigest()}  small.gguf\n"
    get(entry, tmp_path)
    assert len(site.asked) == 1
    open_verified(tmp_path / "small.gguf", record[:64], tmp_path / "stamps").file.close()


def test_file_put_there_by_hand_is_used_if_it_is_right(site: Site, tmp_path: Path) -> None:
    """A file that somebody copied into the cache is verified, not fetched, and replaced if it is wrong."""
    entry = site.entry(sha256=None, md5=hashlib.md5(CONTENT, usedforsecurity=False).hexdigest())
    (tmp_path / "small.gguf").write_bytes(CONTENT)
    get(entry, tmp_path)
    assert site.asked == []
    (tmp_path / "small.gguf.sha256").unlink()
    (tmp_path / "small.gguf").write_bytes(OTHER)
    get(entry, tmp_path)
    assert len(site.asked) == 1


def test_larger_file_than_published_is_refused(site: Site, tmp_path: Path) -> None:
    """A body that does not end where it should is stopped there, not written to the end of the disk."""
    site.content, site.content_length = CONTENT + bytes(5_000_000), False
    with pytest.raises(ModelRefused, match="larger than the published file"):
        fetch(site.entry(), tmp_path, io.StringIO())
    assert not (tmp_path / "small.gguf.part").exists()


def test_other_size_than_published_is_told_at_once(site: Site, tmp_path: Path) -> None:
    """A page that says something else, such as an error in HTML, is told by its size before it is read."""
    site.content = b"<html>not here</html>"
    with pytest.raises(FetchFailed, match="the server offers 21 bytes"):
        fetch(site.entry(), tmp_path, io.StringIO())


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_final_answers_are_not_retried(status: int, site: Site, tmp_path: Path) -> None:
    """An answer that says no for good ends the fetch with its number."""
    site.answers = [status]
    with pytest.raises(FetchFailed, match=f"the server answered {status}"):
        fetch(site.entry(), tmp_path, io.StringIO())
    assert len(site.asked) == 1


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_passing_answers_are_retried_when_the_server_says(status: int, site: Site, tmp_path: Path) -> None:
    """An answer that may pass is tried again, not before the time that the server asked for."""
    site.answers = [status]
    _, waits = get(site.entry(), tmp_path)
    assert waits == [7.0]


def test_redirect_away_from_https_is_refused(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An HTTPS address that leads to plain HTTP is not followed into the cache."""
    real = requests.get
    monkeypatch.setattr(requests, "get", lambda url, **options: real(site.url, **options))
    with pytest.raises(FetchFailed, match="not HTTPS"):
        fetch(site.entry(url="https://example.org/small.gguf"), tmp_path, io.StringIO())


def test_too_small_disk_is_told_with_figures(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is asked for, the free space is compared with what is missing."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=12_345_678))
    with pytest.raises(FetchFailed, match=r"needs 0\.07 GB more in .*, 0\.01 GB is free"):
        fetch(site.entry(), tmp_path, io.StringIO())
    assert site.asked == []


def test_folder_that_cannot_be_written_is_told(site: Site, tmp_path: Path) -> None:
    """A cache folder that cannot be made is a failed fetch in one line."""
    (tmp_path / "file").write_text("")
    with pytest.raises(FetchFailed, match="cannot be kept in"):
        fetch(site.entry(), tmp_path / "file" / "cache", io.StringIO())


SCRIPT = """
import json, resource, signal, sys
from pathlib import Path
from service.errors import FetchFailed
from service.models import Entry, fetch
signal.signal(signal.SIGINT, signal.default_int_handler)
limit = int(sys.argv[3])
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    fetch(Entry(**json.loads(sys.argv[1])), Path(sys.argv[2]), sys.stderr)
except FetchFailed as error:
    sys.exit(f"FetchFailed: {error}")
"""


def start_process(entry: Entry, cache: Path, file_limit_bytes: int = 0) -> subprocess.Popen[str]:
    arguments = [json.dumps(asdict(entry)), str(cache), str(file_limit_bytes)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *arguments], stderr=subprocess.PIPE, text=True, env=environment
    )


def wait_until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline_s, "what was waited for did not happen within 20 s"
        time.sleep(0.01)


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def test_write_error_keeps_what_arrived(site: Site, tmp_path: Path) -> None:
    """When the system refuses to write on, the reason is told and the part goes on growing next time."""
    process = start_process(site.entry(), tmp_path, file_limit_bytes=200_000)
    _, shown = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "FetchFailed: small could not be written" in shown
    assert "what has arrived is kept" in shown
    kept = size_of(tmp_path / "small.gguf.part")
    assert 0 < kept <= 200_000
    get(site.entry(), tmp_path)
    assert site.asked[-1] == (f"bytes={kept}-", '"first"')


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_killed_fetch_goes_on_next_time(number: signal.Signals, site: Site, tmp_path: Path) -> None:
    """Neither kill -9 nor Ctrl-C in the middle costs what has arrived."""
    site.pause_s = 0.02
    process = start_process(site.entry(), tmp_path)
    wait_until(lambda: size_of(tmp_path / "small.gguf.part") > 150_000)
    process.send_signal(number)
    _, shown = process.communicate(timeout=30)
    assert process.returncode != 0
    assert ("the next try goes on from there" in shown) is (number == signal.SIGINT)
    kept = size_of(tmp_path / "small.gguf.part")
    assert 150_000 < kept < len(CONTENT)
    assert not (tmp_path / "small.gguf").exists()
    site.pause_s = 0.0
    get(site.entry(), tmp_path)
    assert site.asked == [(None, None), (f"bytes={kept}-", '"first"')]


def test_two_at_once_fetch_once(site: Site, tmp_path: Path) -> None:
    """Of two processes that want the same file one fetches, the other waits and finds it there."""
    site.pause_s = 0.02
    first = start_process(site.entry(), tmp_path)
    wait_until(lambda: size_of(tmp_path / "small.gguf.part") > 0)
    second = start_process(site.entry(), tmp_path)
    shown = [process.communicate(timeout=30)[1] for process in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], shown
    assert "another process fetches small" in shown[1]
    assert site.asked == [(None, None)]
    assert (tmp_path / "small.gguf").read_bytes() == CONTENT


def test_waiting_fetch_takes_over_when_the_other_is_killed(site: Site, tmp_path: Path) -> None:
    """If the fetching process is killed the waiting one goes on from where it was."""
    site.pause_s = 0.02
    first = start_process(site.entry(), tmp_path)
    wait_until(lambda: size_of(tmp_path / "small.gguf.part") > 100_000)
    second = start_process(site.entry(), tmp_path)
    assert second.stderr is not None
    assert "another process" in second.stderr.readline()
    first.kill()
    first.communicate(timeout=30)
    second.communicate(timeout=30)
    assert second.returncode == 0
    assert len(site.asked) == 2
    assert site.asked[1][0] is not None
    assert (tmp_path / "small.gguf").read_bytes() == CONTENT
