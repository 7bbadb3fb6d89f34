"""Owns what a bake is made of: the digest of each layer's inputs, the pins, the model, and the commit of the tree.

A layer's digest holds those of the layers below it, so that a snapshot whose label has the wanted digest holds just
what would be baked. Where container images are fetched from does not count, only their digests do.
"""

import hashlib
import json
import os
import re
import subprocess
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.bake.errors import Refused
from scripts.bake.runs import read_json, write_json
from scripts.bake.snapshots import LAYERS, shorten

STARTER = "starter"
_STARTER_MEMORY_GB = 2
# Beyond the model's own: Debian, containers, service.
_SYSTEM_DISK_GB = 8
# Which files each layer is made of, below the tree; the model's own code is left out, since what it places is known by
# its digest.
_FILES = {
    "model": (
        "image/provision/begin.sh",
        "image/provision/model.sh",
        "image/provision/place_model.py",
        "image/provision/seal.sh",
    ),
    "base": ("image/provision/base.sh", "cloud-init/bake.yaml"),
    "stack": ("image/provision/stack.sh", "service/requirements.txt"),
    "service": (
        *("image/mini-llm.pkr.hcl", "image/variables.pkr.hcl", "image/provision/service.sh"),
        *("image/provision/write_settings.py", "image/rootfs", "service", "cloud-init/facts.schema.json"),
    ),
}
# As image/variables.pkr.hcl has them; a label's value ends with a letter or digit.
_MODEL_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?")
_MODEL_PATH = re.compile(r"[A-Za-z0-9/._-]+[.]gguf")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True)
class Model:
    """The model to bake: its name, how it is known, and what it takes; ``file`` is an operator's own."""

    name: str
    digest: str
    size_bytes: int
    memory_gb: int
    file: Path | None = None

    @property
    def is_starter(self) -> bool:
        return self.name == STARTER and self.file is None

    @property
    def disk_gb(self) -> int:
        """What the baking server's disk must hold: a file of one's own lies there twice for a while."""
        return _SYSTEM_DISK_GB + -(-self.size_bytes * (1 if self.file is None else 2) // 10**9)


@dataclass(frozen=True)
class Tree:
    """A tree to bake, and what its version control says; ``digests`` is of each layer's inputs, as a label holds it."""

    folder: Path
    commit: str
    dirty: list[str]
    pins: Mapping[str, Any]
    model: Model
    digests: Mapping[str, str]


def read_tree(
    folder: Path, model: str, model_file: Path | None, pins_file: Path | None, version: str, state: Path
) -> Tree:
    """All that a bake depends on; a version that somebody asked for is part of it. Raises Refused."""
    for name in ("image", "service", "cloud-init"):
        if not (folder / name).is_dir():
            raise Refused(
                f"{folder} is no tree of mini-llm: it has no {name}/", "run it in a checkout, or name one: --tree"
            )
    pins = read_pins(pins_file or folder / "image" / "pins.json")
    known = _find_model(folder, model, model_file, state)
    commit, dirty = _ask_git(folder)
    return Tree(folder, commit, dirty, pins, known, _digest_layers(folder, pins, known, version))


def read_pins(path: Path) -> dict[str, Any]:
    """The pins, whole. Raises Refused with every one that is not."""
    try:
        pins = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise Refused(f"{path} cannot be read: {error}") from error
    pins = pins if isinstance(pins, dict) else {}
    images = pins["images"] if isinstance(pins.get("images"), dict) else {}
    wrong = [] if isinstance(pins.get("base_image"), str) else ["base_image is missing"]
    for name, told in images.items():
        pin = told if isinstance(told, dict) else {}
        if not _DIGEST.fullmatch(str(pin.get("digest"))):
            wrong.append(f"{name}: its digest is not sha256: and 64 hexadecimal digits")
        if not pin.get("image") or str(pin.get("version")) in ("", "None", "latest"):
            wrong.append(f"{name}: image and version must be told, and latest is no version")
    if not images:
        wrong.append("images are missing")
    if wrong:
        raise Refused(
            f"{path} is not whole: {'; '.join(wrong)}", "mend it; a digest is what the registry tells of a tag"
        )
    return dict(pins)


def _find_model(folder: Path, name: str, file: Path | None, state: Path) -> Model:
    if file is not None:
        _check_own_model(name, file.resolve())
        try:
            size = file.stat().st_size
            digest = _digest_once(file, state)
        except OSError as error:
            raise Refused(f"{file} cannot be read: {error.strerror}") from error
        return Model(name, digest, size, -(-size * 13 // 10**10) + 1, file.resolve())
    if name == STARTER:
        told = read_json(folder / "service" / "starter" / "starter.json") or {}
        return Model(name, str(told.get("sha256", "")), int(told.get("size_bytes", 0)), _STARTER_MEMORY_GB)
    catalogue = read_json(folder / "service" / "models.json") or []
    for entry in catalogue:
        if entry["name"] == name:
            if reason := entry.get("unloadable"):
                raise Refused(f"{name} cannot be served: {reason}", "take another one")
            return Model(name, entry.get("sha256") or f"md5-{entry['md5']}", entry["size_bytes"], entry["ram_gb"])
    known = ", ".join([STARTER, *(entry["name"] for entry in catalogue if "unloadable" not in entry)])
    raise Refused(f"{name} is no model of the catalogue", f"known are {known}; a file of your own: --model-file PATH")


def _check_own_model(name: str, path: Path) -> None:
    """What Packer's template would refuse as well, but only after a key was made. Raises Refused."""
    if name == STARTER:
        raise Refused(f"{path} is not the starter", "give it a name of its own: --model NAME")
    if not _MODEL_NAME.fullmatch(name):
        raise Refused(
            f"a model cannot be called {name!r}", "1 to 63 small letters, digits, dots or dashes: it is a label"
        )
    if not _MODEL_PATH.fullmatch(str(path)):
        raise Refused(
            f"{path} cannot be baked under this name", "its path may have letters, digits, ._- and ends with .gguf"
        )


def _digest_once(file: Path, state: Path) -> str:
    """SHA-256 of a file that may have gigabytes; kept beside what tells that it is still the same."""
    told = file.stat()
    stamp = [str(file.resolve()), told.st_ino, told.st_size, told.st_mtime_ns]
    kept = read_json(state / "model_file.json") or {}
    if kept.get("stamp") == stamp:
        return str(kept["sha256"])
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    with suppress(OSError):  # it spares time, no more
        write_json(state / "model_file.json", {"stamp": stamp, "sha256": digest})
    return digest


def _digest_layers(folder: Path, pins: Mapping[str, Any], model: Model, version: str) -> dict[str, str]:
    told: dict[str, object] = {
        "model": [pins["base_image"], model.name, model.digest, str(model.file is not None)],
        "base": None,
        "stack": {name: [pin["version"], pin["digest"]] for name, pin in pins["images"].items()},
        "service": version,
    }
    digests: dict[str, str] = {}
    below = ""
    for layer in LAYERS:
        digest = hashlib.sha256(f"{below}\n{json.dumps(told[layer], sort_keys=True)}\n".encode())
        for name, content in _read_files(folder, _FILES[layer]):
            digest.update(f"{name}\0{len(content)}\0".encode())
            digest.update(content)
        below = digests[layer] = shorten(digest.hexdigest())
    return digests


def _read_files(folder: Path, names: Iterable[str]) -> Iterable[tuple[str, bytes]]:
    for name in names:
        path = folder / name
        every = [path, *path.rglob("*")]
        if linked := next((each for each in every if each.is_symlink() and each.is_dir()), None):
            raise Refused(
                f"{linked} is a link to a folder: what is in it would be baked, but be in no digest",
                "put the folder itself there",
            )
        found = [each for each in every if each.is_file()]
        if not found:
            raise Refused(f"{path} is missing", "look after the checkout: git status")
        for each in sorted(found):
            if "__pycache__" not in each.parts:
                # Whether it may be executed is part of it: Packer uploads that as well.
                mode = "x" if each.stat().st_mode & 0o100 else "-"
                yield f"{each.relative_to(folder)} {mode}", each.read_bytes()


def _ask_git(folder: Path) -> tuple[str, list[str]]:
    """The commit, and what differs from it in what a bake takes; without git or a repository the commit is ``none``.

    What git is told to ignore is uploaded as well, and so is what somebody's settings hide. Raises Refused.
    """
    status = ["status", "--porcelain", "--ignored", "--untracked-files=all", "--", "image", "service", "cloud-init"]
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        if commit.returncode and not (folder / ".git").exists():
            return "none", []
        told = commit if commit.returncode else _git(folder, *status)
    except (OSError, subprocess.TimeoutExpired):
        return "none", []
    if told.returncode:
        why = next(iter(told.stderr.splitlines()), "it does not say why")
        raise Refused(f"git does not tell what {folder} holds: {why}", f"look at it: git -C {folder} status")
    return commit.stdout.strip(), [line[3:] for line in told.stdout.splitlines() if "__pycache__/" not in line]


def _git(folder: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    # A repository may name programs for git to start (core.fsmonitor): the token is none of theirs.
    environment = {name: value for name, value in os.environ.items() if name != "HCLOUD_TOKEN"}
    command = ["git", "-C", str(folder), *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
