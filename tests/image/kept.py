"""Owns the snapshots that tests and demos share: baked once per content and week, kept in the user's cache."""

import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hcloud.images import BoundImage, Image
from hcloud.server_types import ServerType

from scripts.bake.answers import given
from scripts.bake.inputs import read_tree
from scripts.local_cloud.machines.base_image import current_name
from scripts.local_cloud.machines.host import run
from scripts.local_cloud.machines.pool import Pool
from tests.image.bakery import Bakery
from tests.image.harness import CONTAINERS, ROOT, bake, disk_of
from tests.local_cloud.harness import LocalCloud
from tests.programs import PACKER, PACKER_PLUGIN_HCLOUD, find_kept, forget_old, keep

_REGISTRY = Path(__file__).with_name("registry.py")
_KEPT, _KEPT_LAYERS = 4, 2  # each is about a GB; another checkout may be using the one before
_TAR_TIMEOUT_S = 300.0
_TAR = ("tar", "--numeric-owner", "--xattrs", "--xattrs-include=*")


def kept_image(cloud: LocalCloud, folder: Path, version: str, model: str, model_file: Path | None = None) -> BoundImage:
    """The snapshot of a whole bake, or one with the same disk where that was baked before. Raises ProgramMissing."""
    baked: list[BoundImage] = []

    def build(draft: Path) -> None:
        own = {} if model_file is None else {"model_file": str(model_file)}
        baked.append(bake(cloud, folder, image_version=version, model=model, **own))
        _pack(disk_of(cloud, baked[0]), draft)

    tar = keep(f"image-{_name_content(folder, version, model, model_file)}.tar", build)
    if baked:
        forget_old("image-*", _KEPT)
        return baked[0]
    labels = {"product": "mini-llm", "version": version, "layer": "service"}
    return _put_into(cloud, tar, f"mini-llm {version}, kept", labels)


def put_kept_layers(bakery: Bakery) -> bool:
    """Gives a bakery all layers below the starter's service as an earlier bake has left them; whether there are any."""
    kept = find_kept(_name_layers(bakery))
    if kept is None:
        return False
    labels = json.loads((kept / "labels.json").read_text())
    _put_into(bakery.cloud, kept / "disk.tar", "layers of an earlier bake", labels)
    return True


def keep_layers(bakery: Bakery) -> None:
    """Keeps the layers below the service that a bakery has baked; whoever has the same inputs starts from them."""

    def export(draft: Path) -> None:
        [image] = bakery.cloud.client().images.get_all(type=["snapshot"], label_selector="layer=stack")
        draft.mkdir()
        (draft / "labels.json").write_text(json.dumps(image.labels))
        _pack(disk_of(bakery.cloud, image), draft / "disk.tar")

    keep(_name_layers(bakery), export)
    forget_old("layers-*", _KEPT_LAYERS)


def _name_layers(bakery: Bakery) -> str:
    """By the label that bake.py finds them by, the base image's content, and the week."""
    pins_file = Path(bakery.more[1]) if bakery.more else None
    digests = read_tree(bakery.tree, "starter", None, pins_file, "", bakery.state).digests
    return f"layers-{_digest([digests['stack'], current_name(), _week()])}"


def _name_content(folder: Path, version: str, model: str, model_file: Path | None) -> str:
    """What a bake is made of, in 12 hex digits; the week is in it, for Debian's packages are those of the day."""
    layers = read_tree(ROOT, model, model_file, None, version, folder).digests
    programs = sorted(f"{each.name}-{each.version}" for each in (*CONTAINERS.values(), PACKER, PACKER_PLUGIN_HCLOUD))
    packed = _REGISTRY.read_text()  # how a program becomes a container
    return _digest([layers, programs, packed, current_name(), _week()])


def _week() -> str:
    return datetime.now(UTC).strftime("%G-%V")


def _digest(content: list[Any]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]


def _pack(disk: Path, tar: Path) -> None:
    run([*_TAR, "--create", "--file", tar, "--directory", disk, "."], timeout_s=_TAR_TIMEOUT_S)


def _put_into(cloud: LocalCloud, tar: Path, description: str, labels: dict[str, str]) -> BoundImage:
    """A snapshot of plain Debian, whose disk is then replaced: an account's API takes no disk from outside."""
    made = cloud.client().servers.create(
        "kept-image", ServerType(name="cx23"), Image(name="debian-13"), start_after_create=False
    )
    made.action.wait_until_finished()
    taken = made.server.create_image(description=description, labels=labels, type="snapshot")
    taken.action.wait_until_finished()
    made.server.delete().wait_until_finished()
    name = str(disk_of(cloud, taken.image).relative_to(cloud.state / "pool"))
    pool = Pool(cloud.state, print)
    pool.open()
    pool.delete(name)
    pool.unpack(tar, name)
    return cloud.client().images.get_by_id(given(taken.image.id))
