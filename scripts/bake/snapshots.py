"""Owns what the labels of a snapshot say, and what follows from all of them: who holds a channel, what may go."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

from hcloud.images import BoundImage

from scripts.bake.answers import given

PRODUCT = "mini-llm"
SELECTOR = f"product={PRODUCT}"
LAYERS = ("model", "base", "stack", "service")  # from the rarest to change to the most frequent
DEFAULT_CHANNEL = "stable"
_OWN_LABELS = (
    *("product", "layer", "version", "parent", "input", "model", "model-digest", "commit", "dirty", "run"),
    *("deadline", "verified-at", "withdrawn"),
)
_TIME = "%Y%m%dT%H%M%SZ"  # a label's value has no colons
_SHORT_DIGEST = 40  # of 64 hexadecimal digits; 63 characters fit into a label


@dataclass(frozen=True)
class Snapshot:
    """A snapshot that this product made; ``channels`` holds its sequence number in each that it was promoted to.

    ``deadline_s`` is Unix time: as long as it is there, nobody has finished with the snapshot.
    """

    id: int
    layer: str
    version: str
    description: str
    created: datetime
    status: str
    size_gb: float
    disk_gb: int
    parent: str
    input: str
    model: str
    commit: str
    run: str
    deadline_s: int | None
    verified_at: datetime | None
    withdrawn: str
    channels: Mapping[str, int] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_image(self) -> bool:
        """Whether it holds all layers."""
        return self.layer == LAYERS[-1]

    @property
    def is_finished(self) -> bool:
        """Whether somebody has said that it is whole: an image by its checks, a layer by its bake."""
        return self.status == "available" and (
            self.verified_at is not None if self.is_image else self.deadline_s is None
        )


def shorten(digest: str) -> str:
    """A digest as a label can hold it."""
    return digest[:_SHORT_DIGEST]


def format_time(time: datetime) -> str:
    """A time as a label can hold it, in UTC."""
    return time.astimezone(UTC).strftime(_TIME)


def read_snapshot(image: BoundImage) -> Snapshot:
    """What an image of the API says; labels that somebody wrote by hand and that make no sense count as missing."""
    labels = dict(image.labels or {})
    return Snapshot(
        id=given(image.id),
        layer=labels.get("layer", ""),
        version=labels.get("version", ""),
        description=image.description or "",
        created=given(image.created),
        status=given(image.status),
        size_gb=float(image.image_size or 0),
        disk_gb=int(image.disk_size or 0),
        parent=labels.get("parent", ""),
        input=labels.get("input", ""),
        model=labels.get("model", ""),
        commit=labels.get("commit", "") + ("-dirty" if "dirty" in labels else ""),
        run=labels.get("run", ""),
        deadline_s=int(labels["deadline"]) if labels.get("deadline", "").isdigit() else None,
        verified_at=_read_time(labels.get("verified-at")),
        withdrawn=labels.get("withdrawn", ""),
        channels={
            name: int(value) for name, value in labels.items() if name not in _OWN_LABELS and _is_sequence(value)
        },
        labels=labels,
    )


def _is_sequence(value: str) -> bool:
    return value.isascii() and value.isdigit()


def _read_time(text: str | None) -> datetime | None:
    try:
        return datetime.strptime(text or "", _TIME).replace(tzinfo=UTC)
    except ValueError:
        return None


def is_channel_name(name: str) -> bool:
    """Whether a channel can be called so: it becomes a label beside the others."""
    return (
        name not in _OWN_LABELS
        and name.isascii()
        and name.replace("-", "").isalnum()
        and name[:1].isalpha()
        and name[-1:].isalnum()
        and len(name) <= 32
    )


def holders(snapshots: Iterable[Snapshot], channel: str) -> list[Snapshot]:
    """Who holds a channel, who held it before, and so on. Of two promoted at the same time the newer holds."""
    promoted = [each for each in snapshots if each.verified_at is not None and channel in each.channels]
    return sorted(promoted, key=lambda each: (each.channels[channel], each.id), reverse=True)


def channels(snapshots: Iterable[Snapshot]) -> list[str]:
    """Every channel that any snapshot was promoted to."""
    return sorted({name for each in snapshots for name in each.channels})


def with_labels(snapshot: Snapshot, /, *without: str, **more: str) -> dict[str, str]:
    """Its labels, changed; underscores in names stand for dashes."""
    kept = {name: value for name, value in snapshot.labels.items() if name not in without}
    return {**kept, **{name.replace("_", "-"): value for name, value in more.items()}}


def keep_reasons(
    snapshots: Iterable[Snapshot], running: Iterable[int], newest: int, wanted_inputs: Iterable[str]
) -> dict[int, str]:
    """Why each snapshot that must stay does so, by id; what is not in it may go.

    ``running`` are ids of images that servers were made from, ``newest`` how many verified images stay in any case,
    and ``wanted_inputs`` the digests that the next bake from this tree would look for.
    """
    every = list(snapshots)
    reasons: dict[int, str] = {}

    def keep(snapshot: Snapshot, reason: str) -> None:
        reasons.setdefault(snapshot.id, reason)

    in_use = set(running)
    for each in every:
        if each.id in in_use:
            keep(each, "a server runs it")
        if each.deadline_s is not None or not each.is_finished:
            keep(each, "a bake is at work on it, or sweep will take it")
        if each.layer not in LAYERS:
            keep(each, "its label says no layer")
    for channel in channels(every):
        for holder, reason in zip(
            holders(every, channel), (f"holds {channel}", f"{channel} goes back to it"), strict=False
        ):
            keep(holder, reason)
    images = sorted((each for each in every if each.is_image and each.is_finished), key=_age)
    for each in images[:newest]:
        keep(each, f"one of the newest {newest}")
    wanted = set(wanted_inputs)
    kept = [each for each in every if each.id in reasons]
    # One that is not finished may still fail, and is no reason for its elder twin to go.
    layers = sorted((each for each in every if not each.is_image and each.is_finished), key=_age)
    newest_of: set[tuple[str, str]] = set()
    for each in layers:
        if each.input in wanted:
            keep(each, "the next bake starts from it")
            wanted.discard(each.input)  # an older twin is of no use
        elif (each.layer, each.model) not in newest_of:
            keep(each, "the newest of its layer and model")
        elif any(other.parent == str(each.id) and other.layer != each.layer for other in kept if other.is_image):
            keep(each, "an image that stays was baked on it")
        newest_of.add((each.layer, each.model))
    return reasons


def _age(snapshot: Snapshot) -> tuple[float, int]:
    return (-snapshot.created.timestamp(), -snapshot.id)
