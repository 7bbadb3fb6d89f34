"""What a bake is made of: a digest changes with what it stands for, and with nothing else."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scripts.bake import inputs
from scripts.bake.errors import Refused
from scripts.bake.inputs import Tree, read_pins, read_tree
from scripts.bake.snapshots import LAYERS

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The checkout's own inputs, to change."""
    monkeypatch.setattr(inputs, "_ask_git", lambda folder: ("c0ffee", []))
    folder = tmp_path / "tree"
    hidden = shutil.ignore_patterns("__pycache__", "text", "*.gguf")
    for name in ("image", "cloud-init", "service"):
        shutil.copytree(ROOT / name, folder / name, ignore=hidden)
    return folder


def digests(tree: Path, model: str = "starter", version: str = "", pins: Path | None = None) -> dict[str, str]:
    return dict(read_tree(tree, model, None, pins, version, tree).digests)


def changed(before: dict[str, str], after: dict[str, str]) -> list[str]:
    return [layer for layer in LAYERS if before[layer] != after[layer]]


def append(path: str) -> Callable[[Path], None]:
    def change(tree: Path) -> None:
        with (tree / path).open("a") as file:
            file.write("\n")

    return change


@pytest.mark.parametrize(
    ("change", "layers"),
    [
        (append("service/app.py"), ["service"]),
        (append("image/rootfs/etc/nftables.conf"), ["service"]),
        (append("image/mini-llm.pkr.hcl"), ["service"]),
        (append("cloud-init/facts.schema.json"), ["service"]),
        (append("service/requirements.txt"), ["stack", "service"]),
        (append("image/provision/stack.sh"), ["stack", "service"]),
        (append("image/provision/base.sh"), ["base", "stack", "service"]),
        (append("image/provision/model.sh"), list(LAYERS)),
        (append("image/real-machine.md"), []),
        (append("cloud-init/node.yaml"), []),
        (lambda tree: (tree / "service/new.py").write_text(""), ["service"]),
        (lambda tree: (tree / "service/app.py").chmod(0o755), ["service"]),
        (lambda tree: (tree / "service/app.py").rename(tree / "service/apq.py"), ["service"]),
        (lambda tree: (tree / "service/__pycache__").mkdir() or append("service/__pycache__/x.pyc")(tree), []),
    ],
)
def test_a_change_reaches_its_layer_and_those_above(
    tree: Path, change: Callable[[Path], None], layers: list[str]
) -> None:
    """And no other: a fix to the service must never fetch a model again."""
    before = digests(tree)
    assert digests(tree) == before
    change(tree)
    assert changed(before, digests(tree)) == layers


def test_pins_models_and_versions_count(tree: Path) -> None:
    """A digest does, where it is fetched from does not; a version only if somebody asked for it."""
    before = digests(tree)
    pins = json.loads((tree / "image/pins.json").read_text())
    other = tree / "pins.json"
    pins["images"]["traefik"]["image"] = "registry.example.org/traefik"
    other.write_text(json.dumps(pins))
    assert digests(tree, pins=other) == before
    pins["images"]["traefik"]["digest"] = "sha256:" + "0" * 64
    other.write_text(json.dumps(pins))
    assert changed(before, digests(tree, pins=other)) == ["stack", "service"]
    assert changed(before, digests(tree, model="llama-3-8b-instruct")) == list(LAYERS)
    assert changed(before, digests(tree, version="7")) == ["service"]


def test_a_file_of_ones_own_counts_by_its_content(tree: Path) -> None:
    """It is hashed once, as long as it does not change."""
    file = tree / "own.gguf"
    file.write_bytes(b"GGUF" + bytes(1000))
    known = read_tree(tree, "own", file, None, "", tree)
    assert read_tree(tree, "own", file, None, "", tree) == known
    file.write_bytes(b"GGUF" + bytes(1001))
    assert changed(dict(known.digests), dict(read_tree(tree, "own", file, None, "", tree).digests)) == list(LAYERS)
    with pytest.raises(Refused, match="cannot be read"):
        read_tree(tree, "own", tree / "none.gguf", None, "", tree)


def test_a_digest_that_cannot_be_kept_is_no_file_that_cannot_be_read(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a full disk it is only taken anew the next time."""

    def fail(path: Path, document: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(inputs, "write_json", fail)
    (tree / "own.gguf").write_bytes(b"GGUF")
    assert len(read_tree(tree, "own", tree / "own.gguf", None, "", tree).model.digest) == 64


@pytest.mark.parametrize(
    ("name", "file", "problem"),
    [
        ("starter", "own.gguf", "is not the starter"),
        ("Own", "own.gguf", "cannot be called 'Own'"),
        ("own-", "own.gguf", "cannot be called"),
        ("o" * 64, "own.gguf", "cannot be called"),
        ("own", "my own.gguf", "cannot be baked under this name"),
        ("own", "own.bin", "cannot be baked under this name"),
    ],
)
def test_a_file_of_ones_own_that_packer_would_refuse(tree: Path, name: str, file: str, problem: str) -> None:
    """Before anything is made, and in one line."""
    (tree / file).write_bytes(b"GGUF")
    with pytest.raises(Refused, match=problem):
        read_tree(tree, name, tree / file, None, "", tree)


def test_what_cannot_be_baked_is_refused(tree: Path) -> None:
    """With what there is instead."""
    with pytest.raises(Refused, match="no model of the catalogue") as told:
        digests(tree, model="gpt-5")
    assert "llama-3-8b-instruct" in told.value.hint
    with pytest.raises(Refused, match="no tree of mini-llm"):
        digests(tree / "image")
    (tree / "image/provision/stack.sh").unlink()
    with pytest.raises(Refused, match=r"stack.sh is missing"):
        digests(tree)


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        ({"digest": "sha256:abc"}, "traefik: its digest"),
        ({"version": "latest"}, "latest is no version"),
        ({"version": ""}, "image and version must be told"),
        ({"image": ""}, "image and version must be told"),
    ],
)
def test_pins_must_be_whole(tree: Path, damage: dict[str, str], problem: str) -> None:
    """Every mistake is told."""
    path = tree / "image/pins.json"
    pins = json.loads(path.read_text())
    pins["images"]["traefik"] |= damage
    path.write_text(json.dumps(pins))
    with pytest.raises(Refused, match=problem):
        read_pins(path)
    path.write_text("{")
    with pytest.raises(Refused, match="cannot be read"):
        read_pins(path)


@pytest.mark.parametrize("told", ["[]", '{"images": []}', '{"images": {"traefik": "3"}}', '"x"'])
def test_pins_of_another_shape_are_refused(tmp_path: Path, told: str) -> None:
    """As somebody writes them by hand, for registries of their own."""
    path = tmp_path / "pins.json"
    path.write_text(told)
    with pytest.raises(Refused, match="base_image is missing"):
        read_pins(path)


def test_this_trees_pins_are_whole() -> None:
    """As they are committed."""
    assert set(read_pins(ROOT / "image/pins.json")["images"]) >= {"traefik", "prometheus", "alertmanager", "grafana"}


def test_needs_follow_the_model(tree: Path) -> None:
    """Memory from the catalogue, disk from its size; a file of one's own lies twice on the baking server."""
    known: Tree = read_tree(tree, "llama-3-8b-instruct", None, None, "", tree)
    assert (known.model.memory_gb, known.model.disk_gb) == (8, 13)
    file = tree / "own.gguf"
    with file.open("wb") as content:
        content.truncate(4_000_000_000)
    own = inputs.Model("own", "x", 4_000_000_000, 7, file)
    assert own.disk_gb == 16
    assert not own.is_starter


@pytest.mark.parametrize(
    ("head", "status", "said"),
    [
        ((0, "c0ffee\n", ""), (0, "", ""), ("c0ffee", [])),
        (
            (0, "c0ffee\n", ""),
            (0, "?? service/x\n M service/a b.py\n!! service/notes.txt\n!! service/__pycache__/x.pyc\n", ""),
            ("c0ffee", ["service/x", "service/a b.py", "service/notes.txt"]),
        ),
        ((128, "", "fatal: detected dubious ownership\n"), None, "dubious ownership"),
        ((0, "c0ffee\n", ""), (128, "", "fatal: index file corrupt\n"), "index file corrupt"),
    ],
)
def test_what_git_says_of_the_tree(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    head: tuple[int, str, str],
    status: tuple[int, str, str] | None,
    said: Any,
) -> None:
    """A tree is clean only if git says so, of all that is uploaded, whatever somebody has set; it gets no token."""
    monkeypatch.setenv("HCLOUD_TOKEN", "secret")

    def run(command: list[str], env: dict[str, str], **more: Any) -> "subprocess.CompletedProcess[str]":
        assert "PATH" in env
        assert "HCLOUD_TOKEN" not in env
        told = head if "rev-parse" in command else status
        assert told is not None
        assert "rev-parse" in command or {"--ignored", "--untracked-files=all"} <= set(command)
        return subprocess.CompletedProcess(command, *told)

    monkeypatch.setattr(inputs.subprocess, "run", run)
    (tmp_path / ".git").mkdir()
    if isinstance(said, str):
        with pytest.raises(Refused, match=said):
            inputs._ask_git(tmp_path)
    else:
        assert inputs._ask_git(tmp_path) == said
    if head[0]:
        (tmp_path / ".git").rmdir()
        assert inputs._ask_git(tmp_path) == ("none", [])


def test_a_link_to_a_folder_is_refused(tree: Path) -> None:
    """Packer uploads what is behind it, and its changes would reach no digest."""
    (tree / "service/more").symlink_to(tree / "cloud-init")
    with pytest.raises(Refused, match="service/more is a link to a folder"):
        digests(tree)
