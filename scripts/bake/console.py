"""Owns what a person sees of a run: phases with elapsed and expected time on standard error, and the log of all."""

import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median

from scripts.bake.runs import read_json, write_json

_KEPT = 5  # earlier times of a phase
_WIDTH = 100


class Console:
    """Lines for a person; on a terminal the last one tells the phase that runs and what it says."""

    def __init__(self, state: Path, kind: str):
        """``kind`` is what makes times comparable: the cloud and the model."""
        self._path, self._kind = state / "times.json", kind
        self._live = sys.stderr is not None and sys.stderr.isatty()
        self._phase: tuple[str, float, float | None] | None = None
        self._drawn_s, self._text = 0.0, ""
        self.times_s: dict[str, float] = {}
        self.left: list[str] = []  # what a run that went well could not take back

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A part of the run; its time is kept if it ends well, for the next run to expect."""
        expected_s = self._expected_s(name)
        begin_s = time.monotonic()
        self._phase, self._text = (name, begin_s, expected_s), ""
        logging.info("phase %s", name)
        if not self._live:
            self._print(f"phase {name} …" + (f" (expected {expected_s:.0f} s)" if expected_s else ""))
        try:
            self.show("")
            yield
        except BaseException:
            self._clear()
            took_s = time.monotonic() - begin_s
            self._print(f"phase {name} failed after {took_s:.1f} s")
            raise
        finally:
            self._phase = None
        took_s = time.monotonic() - begin_s
        self.times_s[name] = round(took_s, 2)
        self._clear()
        self._print(f"phase {name} done in {took_s:.1f} s" + (f" (expected {expected_s:.0f} s)" if expected_s else ""))
        logging.info("phase %s done in %.2f s", name, took_s)
        self._keep(name, took_s)

    def show(self, text: str) -> None:
        """What the phase is at; gone with the next one. Without a text only its time goes on."""
        if not self._live or self._phase is None:
            return
        name, begin_s, expected_s = self._phase
        now_s = time.monotonic()
        if not text and now_s - self._drawn_s < 0.5:
            return
        self._drawn_s, self._text = now_s, text or self._text
        of = f" of about {expected_s:.0f}" if expected_s else ""
        line = f"{name} {now_s - begin_s:.0f}{of} s  {self._text}"[: _width()]
        write_aside(f"\r\x1b[K{line}")

    def say(self, text: str) -> None:
        """A line that stays."""
        self._clear()
        logging.info("%s", text)
        self._print(text)

    def _clear(self) -> None:
        if self._live:
            write_aside("\r\x1b[K")

    def _print(self, text: str) -> None:
        write_aside(f"{text}\n")

    def _expected_s(self, name: str) -> float | None:
        earlier = (read_json(self._path) or {}).get(self._kind, {}).get(name)
        expected_s = median(earlier) if earlier else 0
        return expected_s if expected_s >= 1 else None  # what is over at once needs no announcement

    def _keep(self, name: str, took_s: float) -> None:
        kept = read_json(self._path) or {}
        times = kept.setdefault(self._kind, {}).setdefault(name, [])
        times[:] = [*times, round(took_s, 1)][-_KEPT:]
        try:
            write_json(self._path, kept)
        except OSError as error:  # the times are a comfort, no more
            logging.info("times cannot be kept: %s", error)


def table(rows: Sequence[Sequence[object]]) -> list[str]:
    """Lines with their cells in columns; the first row is the headings, without rows below it there is no table."""
    if len(rows) < 2:
        return []
    texts = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in texts) for column in range(len(texts[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in texts]


def _width() -> int:
    """Less than the terminal has: a line that goes on in the next one cannot be wiped away."""
    try:
        return min(_WIDTH, (os.get_terminal_size(2).columns or _WIDTH) - 1)
    except OSError:
        return _WIDTH


def write_aside(text: str) -> None:
    """To standard error; a terminal or a reader that is gone keeps no run from ending well, for the log has all."""
    with suppress(OSError, ValueError):
        if sys.stderr is not None:
            sys.stderr.write(text)
            sys.stderr.flush()


class _Redacted(logging.Formatter):
    """Lines without the token, wherever it may come from."""

    def __init__(self, secret: str):
        super().__init__("%(asctime)s %(message)s")
        self._secret = secret

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text.replace(self._secret, "…") if len(self._secret) >= 8 else text


def log_to(path: Path, secret: str) -> None:
    """From here on the log goes to this file, without ``secret``. Raises OSError."""
    handler = logging.FileHandler(path)
    handler.setFormatter(_Redacted(secret))
    logging.raiseExceptions = False  # no traceback for each line that a full disk does not take
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    shown = logging.StreamHandler()
    shown.setLevel(logging.WARNING)
    root.addHandler(shown)
    logging.getLogger("urllib3").setLevel(logging.WARNING)
