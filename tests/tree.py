"""Owns the list of the project's own files, which tests look through for strays, dead links and what does not parse."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[1]
# All other folders, and files at the top, that begin with a dot are somebody's own: .git, .venv, caches.
_HIDDEN = {".ci", ".gitignore"}


def _walk(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        own = path.name.startswith(".") and path.name not in _HIDDEN and (path.is_dir() or folder == ROOT)
        if own or path.name == "__pycache__":
            continue
        if path.is_dir():
            yield from _walk(path)
        else:
            yield path


@cache
def list_files() -> dict[str, Path]:
    """Every file that belongs to the project, by its path from the root; what git is told to ignore does not."""
    patterns = (ROOT / ".gitignore").read_text().splitlines()

    def belongs(name: str) -> bool:
        # The last pattern that matches decides, and one that begins with ! takes back what was said before.
        said = [one for one in patterns if PurePosixPath(name).match(one.lstrip("!/"))]
        return not said or said[-1].startswith("!")

    named = {path.relative_to(ROOT).as_posix(): path for path in _walk(ROOT)}
    return {name: path for name, path in named.items() if belongs(name)}


@cache
def read_texts() -> dict[str, str]:
    """The text of each of them that is one."""
    texts = {}
    for name, path in list_files().items():
        try:
            texts[name] = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # the model
    return texts
