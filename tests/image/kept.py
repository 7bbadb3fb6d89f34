"""Owns the snapshots that runs of the tests share: baked once per content and week, kept in the user's cache."""

import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path

from hcloud.images import BoundImage, Image
from hcloud.server_types import ServerType

from scripts.bake.answers import given
from scripts.bake.inputs import read_tree
from scripts.local_cloud.machines.base_image import current_name
from scripts.local_cloud.machines.host import run
from scripts.local_cloud.machines.pool import Pool
from tests.image.harness import CONTAINERS, ROOT, bake, disk_of
from tests.local_cloud.harness import LocalCloud
from tests.programs import PACKER, PACKER_PLUGIN_HCLOUD, keep

_REGISTRY = Path(__file__).with_name("registry.py")
_KEPT = 4  # each is more than a GB
_TAR_TIMEOUT_S = 300.0
_TAR = ("tar", "--numeric-owner", "--xattrs", "--xattrs-include=*")


def kept_image(cloud: LocalCloud, folder: Path, version: str, model: str, model_file: Path | None = None) -> BoundImage:
    """The snapshot of a whole bake, or one with the same disk where that was baked before. Raises ProgramMissing."""
    baked: list[BoundImage] = []

    def build(draft: Path) -> None:
        own = {} if model_file is None else {"model_file": str(model_file)}
        baked.append(bake(cloud, folder, image_version=version, model=model, **own))
        disk = disk_of(cloud, baked[0])
        run([*_TAR, "--create", "--file", draft, "--directory", disk, "."], timeout_s=_TAR_TIMEOUT_S)

    tar = keep(f"image-{_name_content(folder, version, model, model_file)}.tar", build)
    if baked:
        _forget_old_ones(tar)
        return baked[0]
    return _put_into(cloud, tar, version)


def _name_content(folder: Path, version: str, model: str, model_file: Path | None) -> str:
    """What a bake is made of, in 12 hex digits; the week is in it, for Debian's packages are those of the day."""
    layers = read_tree(ROOT, model, model_file, None, version, folder).digests
    programs = sorted(f"{each.name}-{each.version}" for each in (*CONTAINERS.values(), PACKER, PACKER_PLUGIN_HCLOUD))
    packed = _REGISTRY.read_text()  # how a program becomes a container
    week = datetime.now(UTC).strftime("%G-%V")
    return hashlib.sha256(json.dumps([layers, programs, packed, current_name(), week]).encode()).hexdigest()[:12]


def _put_into(cloud: LocalCloud, tar: Path, version: str) -> BoundImage:
    """A snapshot of plain Debian, whose disk is then replaced: an account's API takes no disk from outside."""
    made = cloud.client().servers.create(
        "kept-image", ServerType(name="cx23"), Image(name="debian-13"), start_after_create=False
    )
    made.action.wait_until_finished()
    labels = {"product": "mini-llm", "version": version, "layer": "service"}
    taken = made.server.create_image(description=f"mini-llm {version}, kept", labels=labels, type="snapshot")
    taken.action.wait_until_finished()
    made.server.delete().wait_until_finished()
    name = str(disk_of(cloud, taken.image).relative_to(cloud.state / "pool"))
    pool = Pool(cloud.state, print)
    pool.open()
    pool.delete(name)
    pool.unpack(tar, name)
    return cloud.client().images.get_by_id(given(taken.image.id))


def _forget_old_ones(tar: Path) -> None:
    for old in sorted(tar.parent.glob("image-*.tar"), key=lambda each: each.stat().st_mtime)[:-_KEPT]:
        old.unlink(missing_ok=True)
