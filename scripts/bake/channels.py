"""Owns promote and rollback: which image a channel names, and the file from which Terraform reads it.

Each is one write of labels: the holder is the verified image with the highest sequence number, so no kill in between
leaves a channel with two holders or with none.
"""

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from scripts.bake.cloud import Cloud
from scripts.bake.errors import BakeError, ImageGone, Refused
from scripts.bake.runs import read_json, write_json
from scripts.bake.snapshots import DEFAULT_CHANNEL, LAYERS, Snapshot, format_time, holders


@dataclass(frozen=True)
class Moved:
    """A channel's holder before and now, and the file that Terraform reads."""

    channel: str
    before: Snapshot | None
    now: Snapshot
    file: Path
    file_before: int | None

    def lines(self) -> list[str]:
        """The difference, and what to type next."""
        if self.before is not None and self.before.id == self.now.id:
            moved = [f"{self.channel} names image {_describe(self.now)}, as before"]
        else:
            old = "nobody" if self.before is None else _describe(self.before)
            moved = [f"{self.channel}: {old} → {_describe(self.now)}"]
        more = "" if self.channel == DEFAULT_CHANNEL else f" -var-file={self.file.name}"
        return [
            *moved,
            f"{self.file}: image_id {self.file_before or 'none'} → {self.now.id}",
            "next:",
            f"  terraform -chdir=terraform plan{more}",
            f"  terraform -chdir=terraform apply{more}",
        ]


def _describe(image: Snapshot) -> str:
    return f"{image.id}, {image.version}, {image.model}"


def tfvars_file(folder: Path, channel: str) -> Path:
    """Where Terraform reads the image of a channel: by itself for the default one, when told for others."""
    name = "image.auto.tfvars.json" if channel == DEFAULT_CHANNEL else f"image.{channel}.tfvars.json"
    return folder / name


def promote(cloud: Cloud, image: Snapshot, channel: str, tree: Path, unverified: bool = False) -> Moved:
    """Makes an image the holder of a channel. Raises Refused if it is not verified and nobody said so by name."""
    snapshots = cloud.snapshots()
    if image.verified_at is None:
        if not unverified:
            raise Refused(
                f"image {image.id} is not verified",
                f"bake.py verify {image.id}, or, if you know better: --unverified {image.id}",
            )
        # Only verified images hold channels; who says so by name vouches for it.
        image = cloud.relabel(image, "deadline", verified_at=format_time(datetime.now(UTC)))
    before = next(iter(holders(snapshots, channel)), None)
    if before is None or before.id != image.id:
        number = (before.channels[channel] if before else 0) + 1
        image = _write(cloud, image, channel, number)
    return _record(channel, before, image, tree)


def _write(cloud: Cloud, image: Snapshot, channel: str, number: int) -> Snapshot:
    """Writes the label and looks whether it is the highest: somebody else may have promoted meanwhile."""
    written = cloud.relabel(image, "withdrawn", **{channel: str(number)})
    holder = next(iter(holders(cloud.snapshots(), channel)), None)
    if holder is None or holder.id != written.id:
        if cloud.snapshot(image.id) is None:
            raise ImageGone(f"image {image.id} was removed meanwhile")
        raise BakeError(
            f"somebody else has promoted image {holder.id if holder else '?'} to {channel} at the same time",
            f"if {image.id} is meant: bake.py promote {image.id}",
        )
    return holder


def rollback(cloud: Cloud, channel: str, tree: Path) -> Moved:
    """Gives a channel back to who held it before, by taking its holder's number away. Raises Refused if nobody did."""
    held = holders(cloud.snapshots(), channel)
    if not held:
        raise Refused(f"nobody holds the channel {channel}", "bake.py promote ID")
    if len(held) == 1:
        raise Refused(
            f"image {held[0].id} is the only one that {channel} ever named", "bake.py promote ID names another"
        )
    cloud.relabel(held[0], channel, withdrawn=channel)
    return _record(channel, held[0], held[1], tree)


def refuse_withdrawn(image: Snapshot, channel: str) -> None:
    """A bake must not bring back by itself what somebody has rolled back. Raises Refused."""
    if image.withdrawn == channel:
        raise Refused(
            f"image {image.id}, {image.version}, was rolled back from {channel}, and the tree is still the same",
            f"change the tree, or bake it anew (--again {LAYERS[-1]}), or bring it back: bake.py promote {image.id}",
        )


def _record(channel: str, before: Snapshot | None, now: Snapshot, tree: Path) -> Moved:
    path = tfvars_file(tree / "terraform", channel)
    kept = read_json(path)
    old = kept.get("image_id") if isinstance(kept, dict) else None
    document = {**(kept if isinstance(kept, dict) else {}), "image_id": now.id, "image_version": now.version}
    try:
        path.parent.mkdir(exist_ok=True)
        if kept != document:
            write_json(path, document)
    except OSError as error:
        raise BakeError(
            f"{channel} names image {now.id}, but {path} cannot be written: {error.strerror}",
            f"write {json.dumps(document)} to where Terraform reads it",
        ) from error
    return Moved(channel, before, now, path, old)
