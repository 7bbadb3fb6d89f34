"""Owns the command line: verbs, options, what is printed, exit codes, and what a signal does."""

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from scripts.bake.build import Wishes, build, require_image, verify
from scripts.bake.channels import promote, refuse_withdrawn, rollback
from scripts.bake.cloud import Access, Cloud, find_access
from scripts.bake.console import Console, write_aside
from scripts.bake.errors import BakeError, ChecksFailed, Exit, Interrupted, Refused
from scripts.bake.housekeeping import NEWEST_KEPT, cost, plan_pruning, prune
from scripts.bake.inputs import STARTER, read_pins, read_tree
from scripts.bake.leftovers import describe as describe_left
from scripts.bake.leftovers import find_leftovers, remove
from scripts.bake.packer import kill_running
from scripts.bake.pins import find_pins, look_up
from scripts.bake.report import compare, describe, find_report, report_path
from scripts.bake.runs import state_folder, stop_orphans
from scripts.bake.snapshots import DEFAULT_CHANNEL, LAYERS, Snapshot, channels, holders, is_channel_name

_SAME_SIGNAL_S = 1.0  # wrappers such as timeout send one both to the process and to its group
_ROOT = Path(__file__).resolve().parents[2]
_OS_HINT = "make room and look after the rights, then run the same command again: it goes on where it can"
_ABOUT = """From this repository to a verified, promoted snapshot at Hetzner, or on a local cloud.

The token comes from HCLOUD_TOKEN or the active context of the hcloud command; HCLOUD_ENDPOINT names another cloud
(`make cloud` prints both lines). What runs leave on this machine lies in MINI_LLM_STATE_DIR, by default
~/.local/state/mini-llm/bake."""
_CODES = """exit codes: 0 done; 1 a layer could not be baked, or the image failed its checks; 2 wrong usage; 3 refused
before anything was made; 4 the cloud said no, cannot be reached, or keeps what should be gone; 130 interrupted"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(Exit.USAGE, f"error: {message}\n  {self.prog} --help shows what there is\n")


def main(words: list[str]) -> int:
    """Runs one verb; the boundary where errors become lines and exit codes."""
    options = _parse(words)
    _handle_signals(_interrupt)
    try:
        document, lines = options.run(options)
    except (BakeError, Interrupted) as error:
        return _fail(options, error)
    except KeyboardInterrupt:  # between two handlers
        return _fail(options, Interrupted("interrupted"))
    except OSError as error:
        return _fail(options, BakeError(f"{error.filename or 'this machine'}: {error.strerror or error}", _OS_HINT))
    if not _tell([json.dumps(document, indent=1)] if options.json else lines):
        return Exit.FAILED
    if left := document.get("left"):
        print(f"error: {describe_left(left)}", file=sys.stderr)
        return Exit.CLOUD
    return Exit.FAILED if document.get("problems") else Exit.DONE


def _tell(lines: list[str]) -> bool:
    """Prints to standard output; False if not all of it could be, as of a reader that has seen enough."""
    try:
        for line in lines:
            print(line)
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        _leave_stdout()
        if not isinstance(error, BrokenPipeError):
            write_aside(f"error: standard output: {error.strerror}\n")
        return False
    return True


def _leave_stdout() -> None:
    """Or Python would try once more when it ends, and complain."""
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _fail(options: argparse.Namespace, error: BakeError | Interrupted) -> int:
    if options.json:
        _tell([json.dumps({"error": str(error), "hint": error.hint, "exit": int(error.exit)})])
    more = [error.hint] if error.hint else []
    more += [] if error.log is None else [f"the full log: {error.log}"]
    write_aside("\n  ".join([f"error: {error}", *more]) + "\n")
    return int(error.exit)


def _handle_signals(handler: Callable[[int, object], None]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup has it; without, the terminal is gone
        signal.signal(signal.SIGHUP, handler)


def _interrupt(number: int, frame: object) -> None:
    """The first signal ends what runs and takes back what it made; a later one leaves that to the next run."""
    begin_s = time.monotonic()

    def leave(number: int, frame: object) -> None:
        if time.monotonic() - begin_s < _SAME_SIGNAL_S:
            return
        kill_running()
        with suppress(OSError):  # the terminal may be gone
            os.write(2, b"left as it is; the next build, or bake.py sweep, clears it away\n")
        os._exit(int(Exit.INTERRUPTED))

    _handle_signals(leave)
    raise Interrupted(f"interrupted by {signal.Signals(number).name}", "the next build goes on from what is whole")


def _parse(words: list[str]) -> argparse.Namespace:
    parser = _Parser(
        prog="bake.py", description=_ABOUT, epilog=_CODES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    def verb(name: str, run: Callable[..., Any], about: str, example: str) -> argparse.ArgumentParser:
        added = verbs.add_parser(
            name,
            help=about,
            description=about,
            epilog=f"example: {example}\n\n{_CODES}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.add_argument("--json", action="store_true", help="print the result as JSON, for programs")
        added.add_argument("--tree", type=_folder, default=_ROOT, help="the tree to bake; this checkout without it")
        added.set_defaults(run=run)
        return added

    baking = verb(
        "build",
        _build,
        "bake the image, prove it by booting it, and label it verified; nothing is baked that is there already",
        "bake.py build --promote --model llama-3-8b-instruct",
    )
    baking.add_argument(
        "--model",
        help="a name of service/models.json, or starter; without it, with --promote, the model that the channel has",
    )
    baking.add_argument(
        "--model-file", type=_file, metavar="FILE", help="a GGUF file of your own, under the name --model"
    )
    baking.add_argument("--version", type=_label, help="what to call the image; without it date and digest")
    baking.add_argument("--promote", action="store_true", help="then make it the image of the channel")
    baking.add_argument("--dirty", action="store_true", help="also from a tree that differs from its commit")
    baking.add_argument(
        "--again", choices=LAYERS, default="", help="bake this layer and those above anew, as for updates: base"
    )
    baking.add_argument("--server-type", default="", help="to bake on; without it the cheapest that fits")
    baking.add_argument(
        "--pins-file", type=_file, metavar="FILE", help="pins of your own registries, with the same digests"
    )
    baking.add_argument("--extra-ca-file", type=_file, metavar="FILE", help="PEM of authorities to trust while baking")

    proving = verb(
        "verify", _verify, "boot an image and check it, and label it verified if it is", "bake.py verify 123"
    )
    proving.add_argument("image", type=int, metavar="ID")
    proving.add_argument("--model-file", type=_file, metavar="FILE", help="the GGUF file of your own that it serves")
    for each in (baking, proving):
        each.add_argument("--node-type", default="", help="that nodes will have, for the proof; the cheapest that fits")
        each.add_argument(
            "--location",
            type=lambda text: tuple(filter(None, text.split(","))),
            default=(),
            metavar="A,B",
            help="where, in this order; without it fsn1,nbg1,hel1",
        )

    promoting = verb(
        "promote", _promote, "make a verified image the one that Terraform launches", "bake.py promote 123"
    )
    promoting.add_argument("image", type=int, metavar="ID")
    promoting.add_argument("--unverified", type=int, metavar="ID", help="say the id again to promote it unproved")
    going_back = verb("rollback", _rollback, "give a channel back to who held it before", "bake.py rollback")
    for each in (baking, promoting, going_back):
        each.add_argument("--channel", type=_channel, default=DEFAULT_CHANNEL, help=f"{DEFAULT_CHANNEL} without it")

    verb("list", _list, "show every snapshot, and who holds which channel", "bake.py list --json")
    showing = verb("show", _show, "show an image's report", "bake.py show 123 --diff 122")
    showing.add_argument("image", type=int, metavar="ID")
    showing.add_argument("--diff", type=int, metavar="ID", help="what has changed since this image")
    showing.add_argument("--sbom", action="store_true", help="print the list of its parts as CycloneDX")

    pruning = verb(
        "prune",
        _prune,
        "delete snapshots that nothing runs, no channel names or goes back to, and no bake starts from",
        "bake.py prune --keep 5",
    )
    pruning.add_argument(
        "--keep", type=_count, default=NEWEST_KEPT, metavar="N", help=f"newest images that stay ({NEWEST_KEPT})"
    )
    sweeping = verb("sweep", _sweep, "delete what dead runs have left, and nothing else", "bake.py sweep --yes")
    for each in (pruning, sweeping):
        each.add_argument("--yes", action="store_true", help="do not ask")

    pinning = verb("pins", _pins, "show everything that is pinned, and whether it is whole", "bake.py pins --online")
    pinning.add_argument("--online", action="store_true", help="ask the registries whether they have what is pinned")
    verb("cost", _cost, "what is kept at the cloud costs, in euros net a month", "bake.py cost")
    return parser.parse_args(words)


def _folder(text: str) -> Path:
    path = Path(text).resolve()
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is no folder")
    return path


def _file(text: str) -> Path:
    path = Path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"{text} is no file")
    return path


def _count(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError("must be a number, 0 or more")
    return int(text)


def _label(text: str) -> str:
    if (
        not text
        or len(text) > 63
        or not (text.replace("-", "").replace("_", "").replace(".", "")).isalnum()
        or not (text.isascii() and text[0].isalnum() and text[-1].isalnum())
    ):
        raise argparse.ArgumentTypeError("must be 1 to 63 letters, digits, dots, dashes or underscores: it is a label")
    return text


def _channel(text: str) -> str:
    if not is_channel_name(text):
        raise argparse.ArgumentTypeError(
            "must be 1 to 32 letters, digits or dashes, begin with a letter, and be no label of bake's"
        )
    return text


def _open() -> tuple[Cloud, Path]:
    return Cloud(find_access()), state_folder()


def _console(access: Access, state: Path, model: str) -> Console:
    return Console(state, f"{access.endpoint} {model}")


_Told = tuple[dict[str, Any], list[str]]


def _model(options: argparse.Namespace, cloud: Cloud) -> str:
    """What is named; else what the channel has that gets it, so that an update is none to another model."""
    if options.model or not options.promote or options.model_file:  # a file of one's own has a name of its own
        return options.model or STARTER
    holder = next(iter(holders(cloud.snapshots(), options.channel)), None)
    return (holder.model if holder else "") or STARTER


def _wishes(options: argparse.Namespace, model: str) -> Wishes:
    return Wishes(
        tree=options.tree,
        model=model,
        model_file=options.model_file,
        version=options.version or "",
        dirty=options.dirty,
        locations=options.location,
        server_type=options.server_type,
        node_type=options.node_type,
        again=options.again,
        pins_file=options.pins_file,
        extra_ca_file=options.extra_ca_file,
    )


def _build(options: argparse.Namespace) -> _Told:
    cloud, state = _open()
    model = _model(options, cloud)
    console = _console(cloud.access, state, model)
    baked = build(_wishes(options, model), cloud, state, console)
    document = {
        "image": describe(baked.snapshot),
        "reused": baked.reused,
        "times_s": baked.times_s,
        "report": None if baked.report is None else str(baked.report),
        "log": None if baked.log is None else str(baked.log),
        "left": console.left,
    }
    lines = [f"log {baked.log}", f"report {baked.report}"] if baked.log else []
    if options.promote:
        if baked.reused:
            refuse_withdrawn(baked.snapshot, options.channel)
        moved = promote(cloud, baked.snapshot, options.channel, options.tree)
        document |= {"image": describe(moved.now), "terraform": str(moved.file)}
        return document, [*lines, *moved.lines()]
    return document, [*lines, f"next: bake.py promote {baked.snapshot.id}"]


def _verify(options: argparse.Namespace) -> _Told:
    cloud, state = _open()
    wishes = Wishes(
        options.tree, model_file=options.model_file, locations=options.location, node_type=options.node_type
    )
    console = _console(cloud.access, state, "verify")
    image, proof, report = verify(options.image, wishes, cloud, state, console)
    if proof.problems:
        raise ChecksFailed(
            f"image {image.id} is not what it should be: {'; '.join(proof.problems)}",
            f"what the node said is in {report}",
        )
    checks = [each.name for each in proof.checks]
    document = {"image": describe(image), "checks": checks, "report": str(report), "left": console.left}
    return document, [f"image {image.id} is verified: {len(proof.checks)} checks passed", f"report {report}"]


def _promote(options: argparse.Namespace) -> _Told:
    cloud, _ = _open()
    if options.unverified not in (None, options.image):
        raise Refused(
            f"--unverified names {options.unverified}, not {options.image}", "say the same id twice, or leave it out"
        )
    moved = promote(
        cloud, require_image(cloud, options.image), options.channel, options.tree, options.unverified is not None
    )
    return {"image": describe(moved.now), "terraform": str(moved.file)}, moved.lines()


def _rollback(options: argparse.Namespace) -> _Told:
    cloud, _ = _open()
    moved = rollback(cloud, options.channel, options.tree)
    return {"image": describe(moved.now), "terraform": str(moved.file)}, moved.lines()


def _list(options: argparse.Namespace) -> _Told:
    cloud, _ = _open()
    snapshots = sorted(cloud.snapshots(), key=lambda each: each.id)
    held = {name: holders(snapshots, name)[0].id for name in channels(snapshots) if holders(snapshots, name)}
    document = {"images": [describe(each) for each in snapshots], "channels": held}
    lines = (
        [f"{'id':12}{'layer':9}{'version':30}{'model':24}{'GB':>6}  state"]
        if snapshots
        else ["there is no snapshot yet"]
    )
    for each in snapshots:
        state = _state_of(each, [name for name, holder in held.items() if holder == each.id])
        lines.append(f"{each.id:<12}{each.layer:9}{each.version:30}{each.model:24}{each.size_gb:6.2f}  {state}")
    return document, lines


def _state_of(snapshot: Snapshot, held: list[str]) -> str:
    if not snapshot.is_finished:
        return f"not finished ({snapshot.status}), of run {snapshot.run}"
    words = [f"holds {', '.join(held)}"] if held else []
    words += [f"withdrawn from {snapshot.withdrawn}"] if snapshot.withdrawn else []
    words += [f"verified {snapshot.verified_at:%Y-%m-%d %H:%M}"] if snapshot.verified_at else []
    return ", ".join(words) or "a layer to start from"


def _show(options: argparse.Namespace) -> _Told:
    state = state_folder()
    report = _require_report(state, options.image)
    if options.sbom:
        return report["sbom"], json.dumps(report["sbom"], indent=1).splitlines()
    if options.diff is not None:
        changes = compare(_require_report(state, options.diff), report)
        return {"changes": changes}, changes or ["no difference"]
    image, checks = report["image"], report["checks"]
    sizes = report["sizes_bytes"] or {}
    lines = [
        f"image {image['id']}, {image['version']}: {image['description']}",
        f"  commit {image['commit']}, model {image['model']}",
        f"  {image['size_gb']:.2f} GB, needs a disk of {image['disk_gb']} GB",
        f"  verified {image['verified_at']}" if image["verified_at"] else "  not verified",
        f"checks, on {report['probe']}:",
        *(f"  {each['name']:12}{each['problem'] or 'passed'} ({each['took_s']:.1f} s)" for each in checks),
        "times:",
        *(f"  {name:24}{took_s:8.1f} s" for name, took_s in report["times_s"].items()),
        "boot, since the first process:",
        *(
            f"  {name.removesuffix('_s'):24}{at_s:8.2f} s"
            for name, at_s in (report["boot"] or {}).items()
            if at_s is not None
        ),
        "sizes:",
        *(f"  {name:24}{size / 1e6:8.0f} MB" for name, size in sizes.items()),
        f"parts: {len(report['sbom']['components'])}, as CycloneDX with --sbom",
    ]
    return report, lines


def _require_report(state: Path, image: int) -> dict[str, Any]:
    report = find_report(state, image)
    if report is None:
        raise Refused(
            f"there is no report of image {image} on this machine ({report_path(state, image)})",
            f"it lies where the image was baked; bake.py verify {image} makes one here, bake.py list shows its labels",
        )
    return report


def _wanted_inputs(options: argparse.Namespace, state: Path, snapshots: list[Snapshot]) -> set[str]:
    """What the next bake from this tree would look for, for each model that there are snapshots of."""
    wanted: set[str] = set()
    for model in {each.model for each in snapshots}:
        try:
            wanted |= set(read_tree(options.tree, model, None, None, "", state).digests.values())
        except Refused:  # a file of somebody's own, or a model that is not in the catalogue any more
            continue
    return wanted


def _prune(options: argparse.Namespace) -> _Told:
    cloud, state = _open()
    wanted = _wanted_inputs(options, state, cloud.snapshots())
    plan = plan_pruning(cloud, options.keep, wanted)
    if not plan.going:
        return {"gone": [], "saves_eur_per_month": 0.0}, [*plan.lines()[:-1], "nothing to prune"]
    _ask(options, plan.lines(), f"delete {len(plan.going)} snapshots?")
    gone = prune(cloud, plan, options.keep, wanted)
    document = {"gone": [each.id for each in gone], "saves_eur_per_month": plan.saves_eur_per_month}
    return document, [f"{len(gone)} snapshots are gone"]


def _sweep(options: argparse.Namespace) -> _Told:
    cloud, state = _open()
    stop_orphans(state)
    leftovers = find_leftovers(cloud, state)
    if not len(leftovers):
        return {"gone": []}, ["nothing was left by dead runs"]
    _ask(options, leftovers.lines(), "delete all of it?")
    problems = remove(cloud, leftovers)
    document = {"gone": leftovers.lines(), "problems": problems}
    return document, [f"{len(leftovers) - len(problems)} things are gone", *problems]


def _ask(options: argparse.Namespace, lines: list[str], question: str) -> None:
    """Shows what goes and waits for a yes. Raises Refused."""
    for line in lines:
        print(line, file=sys.stderr)
    if options.yes:
        return
    if not sys.stdin.isatty():
        raise Refused("nobody is there to say yes", "say it beforehand: --yes")
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise Refused("nothing was deleted")


def _pins(options: argparse.Namespace) -> _Told:
    pins = read_pins(options.tree / "image" / "pins.json")
    found = find_pins(options.tree, pins)
    if options.online:
        found = [look_up(each) for each in found]
    document = {
        "pins": [each.render() for each in found],
        "problems": [f"{each.name}: {each.problem}" for each in found if each.problem],
    }
    return document, [each.line() for each in found]


def _cost(options: argparse.Namespace) -> _Told:
    cloud, state = _open()
    document = cost(cloud, state)
    lines = [
        (" unknown" if row["eur_per_month"] is None else f"{row['eur_per_month']:8.2f}")
        + f"  {row['what']:40}{row['version']}"
        + ("" if row["size_gb"] is None else f"  {row['size_gb']:.2f} GB")
        for row in document["rows"]
    ]
    lines.append(f"{document['eur_per_month']:8.2f}  euros a month, net")
    if document["left_by_dead_runs"]:
        lines.append(f"{len(document['left_by_dead_runs'])} things were left by dead runs: bake.py sweep")
    return document, lines
