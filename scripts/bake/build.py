"""Owns the way from a tree to a verified image: what is there already, Packer layer by layer, the probe, the label."""

import logging
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from hcloud.ssh_keys import BoundSSHKey

from scripts.bake import packer
from scripts.bake.answers import given
from scripts.bake.checks import Proof, prove
from scripts.bake.cloud import NO_ROOM, Cloud, describe_code
from scripts.bake.console import Console, log_to
from scripts.bake.errors import (
    BakeError,
    ChecksFailed,
    CloudFailed,
    ImageGone,
    Interrupted,
    LayerFailed,
    Refused,
    Unavailable,
)
from scripts.bake.inputs import STARTER, Model, Tree, read_tree
from scripts.bake.leftovers import Leftovers, describe, find_leftovers, remove, servers_of, take_back
from scripts.bake.packer import PackerEnded
from scripts.bake.preflight import (
    Place,
    Places,
    check_tree,
    find_places,
    forget_limit,
    price_of_bake,
    project_id,
    remember_limit,
    warn_of_limit,
)
from scripts.bake.probe import Probe, make_facts, make_public_key
from scripts.bake.relay import Relay
from scripts.bake.report import carry_over, find_report, keep_report, make_report
from scripts.bake.runs import Run, is_over, new_run, stop_orphans
from scripts.bake.snapshots import LAYERS, Snapshot, format_time, shorten

_log = logging.getLogger(__name__)
_TRIES = 4  # of a layer whose bake failed in passing, for each call at which it did
_SNAPSHOT_LOOK_S = 1.0
_OUTSIDE = "a mirror, package index or registry did not answer as it should"
_OUTSIDE_PAUSE_S = 5.0  # before a layer is tried again for that; doubled each time
_LEAST_FREE_BYTES = 64 << 20  # for logs and the report
_CREATE_PATIENCE_S = 120.0  # from the create's end to the first process: the disk is filled on the first reads


@dataclass(frozen=True)
class Wishes:
    """What ``build`` was told."""

    tree: Path
    model: str = STARTER
    model_file: Path | None = None
    version: str = ""
    dirty: bool = False
    locations: tuple[str, ...] = ()
    server_type: str = ""
    node_type: str = ""
    again: str = ""
    pins_file: Path | None = None
    extra_ca_file: Path | None = None


@dataclass(frozen=True)
class Baked:
    """An image that is verified; ``reused`` if it was there already."""

    snapshot: Snapshot
    reused: bool
    report: Path | None
    log: Path | None
    times_s: dict[str, float]


@dataclass(frozen=True)
class _Bake:
    """What every step of a bake needs."""

    wishes: Wishes
    tree: Tree
    cloud: Cloud
    state: Path
    console: Console
    run: Run
    version: str
    places: Places
    packer: str  # its version


def build(wishes: Wishes, cloud: Cloud, state: Path, console: Console) -> Baked:
    """Finds or bakes the image of a tree, and verifies it. Raises BakeError."""
    tree = read_tree(wishes.tree, wishes.model, wishes.model_file, wishes.pins_file, wishes.version, state)
    check_tree(tree, wishes.dirty)
    if not wishes.again and (found := _find_finished(cloud.snapshots(), tree, LAYERS[-1])):
        console.say(f"nothing has changed: image {found.id}, {found.version}, is verified")
        return Baked(found, True, None, None, console.times_s)
    with started_run(cloud, state, console) as run:
        with console.phase("preflight"):
            bake = _prepare(wishes, tree, cloud, state, console, run)
        for last_try in (False, False, True):
            try:
                return _bake(bake)
            except ImageGone as error:
                if last_try:
                    raise
                console.say(f"{error}; it is baked again")
    raise AssertionError("the last try returns or raises")


@contextmanager
def started_run(cloud: Cloud, state: Path, console: Console) -> Iterator[Run]:
    """A run with its log, whose servers and keys are gone at its end, whatever ends it."""
    if (free := shutil.disk_usage(state).free) < _LEAST_FREE_BYTES:
        raise Refused(f"{state} has only {free >> 20} MB left", "make room, or set MINI_LLM_STATE_DIR")
    with new_run(state) as run:
        log_to(run.log, cloud.access.token)
        console.say(f"run {run.id}, log {run.log}")
        try:
            yield run
        except BaseException as error:
            if isinstance(error, (BakeError, Interrupted)):
                error.log = run.log
            if isinstance(error, Interrupted):
                console.say("stopping: taking back what this run has made (once more to leave it to the next run)")
            if problems := take_back(cloud, run):  # tells what it can, and never hides the first error
                console.say(describe(problems))
            raise
        else:
            console.left = take_back(cloud, run)


def _find_finished(snapshots: list[Snapshot], tree: Tree, layer: str) -> Snapshot | None:
    """The newest whole snapshot of just these inputs, of those that start on the smallest disk."""
    found = [
        each for each in snapshots if each.layer == layer and each.input == tree.digests[layer] and each.is_finished
    ]
    return max(found, key=lambda each: (-each.disk_gb, each.id), default=None)


def _prepare(wishes: Wishes, tree: Tree, cloud: Cloud, state: Path, console: Console, run: Run) -> _Bake:
    """Looks at all that can be known beforehand, and clears away what dead runs left."""
    program = packer.require_packer(tree.folder / "image", os.environ)
    stop_orphans(state)
    places = find_places(cloud.server_types(), tree, list(wishes.locations), wishes.server_type, wishes.node_type)
    snapshots = cloud.snapshots()
    version = _find_version(wishes, tree, snapshots)
    leftovers = find_leftovers(cloud, state, () if wishes.again else tuple(tree.digests.values()))
    for line in leftovers.lines():
        console.say(f"left by a dead run, removed: {line}")
    if problems := remove(cloud, leftovers):
        console.say(describe(problems))
    project = project_id(cloud.access.token)
    if warning := warn_of_limit(state, project, len(cloud.servers())):
        console.say(warning)
    bake = _Bake(wishes, tree, cloud, state, console, run, version, places, program)
    segments = _plan(bake, snapshots)[1]
    sizes = [each.size_gb for each in snapshots if each.is_image and each.model == tree.model.name]
    expected_gb = sizes[-1] if sizes else tree.model.size_bytes / 1e9 + 2
    price = price_of_bake(places, len(segments), expected_gb, cloud.pricing())
    layers = [layer for first, last in segments for layer in _between(first, last)]
    console.say(
        f"{tree.model.name} as {version}: layers {', '.join(layers)}"
        f"; about {price['once_eur']:.2f} euros for this bake, {price['monthly_eur']:.2f} a month for the snapshot"
    )
    return bake


def _find_version(wishes: Wishes, tree: Tree, snapshots: list[Snapshot]) -> str:
    """The one that was asked for, if it is free. Raises Refused. Otherwise date and digest, with seconds if need be."""
    taken = {each.version: each.id for each in snapshots if each.is_image and each.is_finished}
    if wishes.version in taken:
        raise Refused(
            f"image {taken[wishes.version]} is called {wishes.version} already", "give another --version, or none"
        )
    now, digest = datetime.now(UTC), tree.digests[LAYERS[-1]][:8]
    version = f"{now:%Y%m%d-%H%M}-{digest}"
    return wishes.version or (version if version not in taken else f"{now:%Y%m%d-%H%M%S}-{digest}")


def _between(first: str, last: str) -> tuple[str, ...]:
    return LAYERS[LAYERS.index(first) : LAYERS.index(last) + 1]


def _cuts(model: Model) -> tuple[str, ...]:
    """After which layers a snapshot is kept: what changes most starts from one, and no model is fetched twice.

    The starter comes with the service and is not worth a server of its own.
    """
    return ("stack", "service") if model.is_starter else ("model", "stack", "service")


def _plan(bake: _Bake, snapshots: list[Snapshot]) -> tuple[Snapshot | None, list[tuple[str, str]]]:
    """The snapshot to start from, if there is one, and what Packer bakes on it: first and last layer of each run."""
    cuts = _cuts(bake.tree.model)
    newest = LAYERS.index(bake.wishes.again) if bake.wishes.again else len(LAYERS)
    # One that was baked on a larger disk, for lack of room elsewhere, starts on no smaller one.
    largest_gb = max(place.disk_gb for place in bake.places.bake)
    snapshots = [each for each in snapshots if each.disk_gb <= largest_gb]
    start = None
    for layer in cuts[:-1]:
        if LAYERS.index(layer) < newest:
            start = _find_finished(snapshots, bake.tree, layer) or start
    first = 0 if start is None else LAYERS.index(start.layer) + 1
    segments = []
    for cut in cuts:
        if LAYERS.index(cut) >= first:
            segments.append((LAYERS[first], cut))
            first = LAYERS.index(cut) + 1
    return start, segments


def _bake(bake: _Bake) -> Baked:
    cloud, console = bake.cloud, bake.console
    with console.phase("key"):
        # The first call that writes: a token that may only read is told here, before anything costs money.
        key = cloud.add_key(bake.run.key_name, make_public_key(), bake.run.labels)
    candidate = _adopt(bake) or _bake_layers(bake)
    proof, place = prove_image(
        cloud, console, bake.run, candidate, bake.tree.model, bake.tree.folder, bake.places.probe, key
    )
    if proof.problems:
        report = keep_report(
            bake.state, make_report(candidate, bake.tree, bake.run, console.times_s, proof, place, bake.packer)
        )
        # Looked at once more: somebody may have promoted it by its id meanwhile.
        if problems := remove(cloud, Leftovers([], [], [candidate])):
            console.say(describe(problems))
        stays = cloud.snapshot(candidate.id) is not None
        became = "it stays, for somebody else has finished it" if stays else "it was not labelled verified and is gone"
        raise ChecksFailed(
            f"the image is not what it should be: {'; '.join(proof.problems)}",
            f"{became}; what the node said is in {report}",
        )
    with console.phase("label"):
        verified = cloud.relabel(candidate, "deadline", verified_at=format_time(datetime.now(UTC)))
    report = keep_report(
        bake.state, make_report(verified, bake.tree, bake.run, console.times_s, proof, place, bake.packer)
    )
    console.say(f"image {verified.id}, {verified.version}, is verified: {len(proof.checks)} checks passed")
    return Baked(verified, False, report, bake.run.log, console.times_s)


def _adopt(bake: _Bake) -> Snapshot | None:
    """The whole but unproved image of a dead run, if it is just what is wanted; layers of such runs are finished."""
    if bake.wishes.again:
        return None
    wanted = bake.tree.digests
    for each in bake.cloud.snapshots():
        if each.status != "available" or each.deadline_s is None or each.run == bake.run.id:
            continue
        if each.input != wanted.get(each.layer) or not is_over(bake.state, each.run):
            continue
        if not each.is_image:
            bake.cloud.relabel(each, "deadline")
            bake.console.say(f"layer {each.layer} of a dead run is whole: snapshot {each.id}")
        else:
            bake.console.say(f"an image of a dead run is taken on: snapshot {each.id}")
            return bake.cloud.relabel(each, run=bake.run.id, deadline=str(bake.run.deadline_s))
    return None


def _bake_layers(bake: _Bake) -> Snapshot:
    """The candidate: an image that nobody has seen boot."""
    made, segments = _plan(bake, bake.cloud.snapshots())
    if made is not None:
        bake.console.say(f"starting from layer {made.layer}, snapshot {made.id}")
    for first, last in segments:
        with bake.console.phase(f"layer {last}" if first == last else f"layers {first} to {last}"):
            made = _bake_segment(bake, first, last, made)
            if last != LAYERS[-1]:
                made = bake.cloud.relabel(made, "deadline")
    assert made is not None  # the last segment always is one
    return made


def _bake_segment(bake: _Bake, first: str, last: str, start: Snapshot | None) -> Snapshot:
    """Runs Packer until it has made a snapshot, again on what passes, elsewhere where there is no room."""
    places = [each for each in bake.places.bake if start is None or each.disk_gb >= start.disk_gb]
    tried = Counter[str]()
    while True:
        for server in servers_of(bake.cloud, bake.run):  # its name must be free, whatever became of the one before
            bake.cloud.delete_server(server, bake.run.deadline_s)
        relay = Relay(bake.cloud.access, bake.run.labels)
        environment = {**os.environ, "HCLOUD_ENDPOINT": relay.endpoint, "HCLOUD_TOKEN": relay.token}
        ended: PackerEnded | None = None
        with relay.opened():
            try:
                packer.build(
                    bake.run,
                    bake.tree.folder / "image",
                    _variables(bake, first, last, start, places[0]),
                    environment,
                    bake.console.show,
                )
            except PackerEnded as error:
                ended = error
        made = _find_made(bake, last, any(each.code == "action_failed" for each in relay.failures))
        if made is not None:
            forget_limit(bake.state, project_id(bake.cloud.access.token))
            return made
        cause = relay.failures[0] if relay.failures else None
        if cause is not None and cause.code in NO_ROOM:
            bake.console.say(f"no room for {places[0].server_type} at {places[0].location}")
            if len(places) == 1:
                raise Unavailable(
                    "there is no room for a server to bake on", "name others (--location, --server-type), or try later"
                )
            places = places[1:]
            continue
        what = re.sub(r"\d+", "*", cause.call) if cause else "packer"
        tried[what] += 1
        passes = ended is not None and (ended.passes or (cause.passes if cause else ended.script_status is None))
        if not passes or tried[what] == _TRIES:
            raise _failure(bake, first, last, start, ended, relay)
        if ended is not None and ended.passes:
            pause_s = _OUTSIDE_PAUSE_S * 2 ** (tried[what] - 1)
            bake.console.say(
                f"layer {last} is tried again in {pause_s:.0f} s: {_OUTSIDE}; it said: {_last_word(ended)}"
            )
            time.sleep(pause_s)
        else:
            bake.console.say(f"layer {last} is tried again: {cause.message if cause else 'Packer has failed'}")


def _last_word(ended: PackerEnded) -> str:
    """The last line that names an error and is not Packer's own summary of it."""
    said = [line for line in ended.lines if "error" in line.lower() and not line.startswith(("Build ", "-->", "==>"))]
    return (said or ended.lines or ["nothing"])[-1][:200]


def _failure(
    bake: _Bake, first: str, last: str, start: Snapshot | None, ended: PackerEnded | None, relay: Relay
) -> BakeError:
    """Why a layer could not be baked."""
    cause = relay.failures[0] if relay.failures else None
    if start is not None and bake.cloud.snapshot(start.id) is None:
        return ImageGone(f"layer {start.layer}, snapshot {start.id}, is gone")
    if cause is not None and (ended is None or ended.script_status is None):
        if cause.code == "resource_limit_exceeded":
            remember_limit(bake.state, project_id(bake.cloud.access.token), len(bake.cloud.servers()), time.time())
        correlation = f", correlation id {cause.correlation_id}" if cause.correlation_id else ""
        return CloudFailed(f"{cause.call}: {cause.message} ({cause.code}{correlation})", describe_code(cause.code))
    lines = "\n".join(
        f"  | {line}" for line in (ended.lines if ended else ["Packer ended well, but there is no snapshot"])
    )
    hint = "mend what these lines say; the log has all"
    if ended is not None and ended.passes:
        hint = f"{_OUTSIDE}: try again later; in a network that inspects TLS name its authority: --extra-ca-file"
    return LayerFailed(f"the layers {first} to {last} could not be baked:\n{lines}", hint)


def _variables(bake: _Bake, first: str, last: str, start: Snapshot | None, place: Place) -> dict[str, object]:
    """What the template is told."""
    tree, wishes = bake.tree, bake.wishes
    labels = {
        "deadline": str(bake.run.deadline_s),
        "parent": str(start.id) if start else str(tree.pins["base_image"]),
        "input": tree.digests[last],
        "model": tree.model.name,
        "model-digest": shorten(tree.model.digest),
        "commit": shorten(tree.commit),  # of SHA-256 it has 64 characters, one more than a label
        **({"dirty": "true"} if tree.dirty else {}),
    }
    files = {
        "model_file": tree.model.file,
        "pins_file": None if wishes.pins_file is None else wishes.pins_file.resolve(),
        "extra_ca_file": None if wishes.extra_ca_file is None else wishes.extra_ca_file.resolve(),
    }
    return {
        "image_version": bake.version,
        "model": tree.model.name,
        "first_layer": first,
        "last_layer": last,
        "from_image": str(start.id) if start else "",
        "location": place.location,
        "server_type": place.server_type,
        "run_id": bake.run.id,
        "snapshot_labels": labels,
        **{name: str(path) for name, path in files.items() if path is not None},
    }


def _find_made(bake: _Bake, layer: str, failed: bool) -> Snapshot | None:
    """The snapshot that Packer has made, once it is whole, also if Packer never heard of it."""
    while True:
        found = [each for each in bake.cloud.snapshots() if each.run == bake.run.id and each.layer == layer]
        for each in found:
            if each.status == "available":
                return each
            if failed or each.status == "unavailable":
                bake.cloud.delete_snapshot(each)  # what a failed action leaves behind
        if failed or not any(each.status == "creating" for each in found):
            return None
        if time.time() > bake.run.deadline_s:
            raise CloudFailed(f"snapshot {found[0].id} is not done by the run's deadline")
        time.sleep(_SNAPSHOT_LOOK_S)


def prove_image(
    cloud: Cloud,
    console: Console,
    run: Run,
    image: Snapshot,
    model: Model,
    tree: Path,
    places: list[Place],
    key: BoundSSHKey,
) -> tuple[Proof, str]:
    """Boots a node from the image and checks it; what it found, and where it stood. The node is gone afterwards."""
    fitting = [(each.server_type, each.location) for each in places if each.disk_gb >= image.disk_gb]
    if not fitting:
        raise Refused(f"the image needs a disk of {image.disk_gb} GB", "name a larger type for the node (--node-type)")
    facts = make_facts(run.folder)
    with console.phase("probe"):
        server = cloud.create_server(
            run.probe_name, image.id, fitting, key, facts.user_data, run.labels, run.deadline_s
        )
    try:
        with console.phase("checks"):
            probe = Probe(str(given(given(server.public_net).ipv4).ip), facts)
            proof = prove(probe, model, tree, image.version, _CREATE_PATIENCE_S, console.show)
    finally:
        # Whatever it has shown counts; what cannot be removed now is tried once more at the run's end, and by sweep.
        if problems := remove(cloud, Leftovers([server], [key], [])):
            console.say(describe(problems))
    return proof, f"{given(server.server_type).name} at {given(server.location).name}"


def verify(number: int, wishes: Wishes, cloud: Cloud, state: Path, console: Console) -> tuple[Snapshot, Proof, Path]:
    """Proves an image that is there, and labels it verified if it is not yet. Raises BakeError."""
    image = require_image(cloud, number)
    tree = read_tree(wishes.tree, image.model or wishes.model, wishes.model_file, wishes.pins_file, "", state)
    with started_run(cloud, state, console) as run:
        with console.phase("preflight"):
            places = find_places(cloud.server_types(), tree, list(wishes.locations), "", wishes.node_type)
            key = cloud.add_key(run.key_name, make_public_key(), run.labels)
        proof, place = prove_image(cloud, console, run, image, tree.model, tree.folder, places.probe, key)
        if not proof.problems:
            image = cloud.relabel(image, "deadline", verified_at=format_time(datetime.now(UTC)))
        document = make_report(image, None, run, console.times_s, proof, place)
        report = keep_report(state, carry_over(document, find_report(state, image.id)))
    return image, proof, report


def require_image(cloud: Cloud, number: int) -> Snapshot:
    """An image of this product, whole. Raises Refused."""
    image = cloud.snapshot(number)
    if image is None:
        raise Refused(f"there is no image {number} of mini-llm in this project", "bake.py list shows them")
    if not image.is_image or image.status != "available":
        raise Refused(f"snapshot {number} is layer {image.layer}, {image.status}: no image that a node could run")
    return image
