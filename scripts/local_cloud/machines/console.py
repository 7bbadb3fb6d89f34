"""Owns the consoles' files: what a container says is copied there, and no disk that is full ends who says it."""

from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

_LONGEST_BYTES = 16 << 20
_LAST_WORDS_BYTES = 64 << 10


def copy_console(source: BinaryIO, path: Path, on_long: Callable[[], None]) -> None:
    """Appends to the file whatever comes from an unbuffered pipe, until its end, and closes the pipe.

    A file that has become too long begins anew, and ``on_long`` is called. What cannot be written is lost: were the
    file the container's own, a full disk would end the container.
    """
    with source:
        while chunk := source.read(_LAST_WORDS_BYTES):
            try:
                with path.open("ab") as file:
                    if file.tell() > _LONGEST_BYTES:
                        file.truncate(0)
                        on_long()
                    file.write(chunk)
            except OSError:
                continue


def last_line(path: Path) -> str:
    """The last line with something in it, or words that say that there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _LAST_WORDS_BYTES))
            lines = [line.strip() for line in file.read(_LAST_WORDS_BYTES).decode(errors="replace").splitlines()]
    except FileNotFoundError:
        lines = []
    return next((line for line in reversed(lines) if line), "it ended without a word")
