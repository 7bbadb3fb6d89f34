"""Owns the demo: from an empty machine to a rollout under load, with real parts, on a cloud of this machine's own.

``make demo`` runs it, as root; ``KEEP=1`` leaves everything up until Ctrl-C. What stands in for the world outside is
said where it is used. Nothing of it is left afterwards; what a killed one has left goes at the start of the next.
"""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import requests
from hcloud import APIException

from scripts.bake.answers import given
from scripts.bake.errors import BakeError
from scripts.handover_key import make_pair
from scripts.local_cloud.machine_interface import MachineFailed
from scripts.local_cloud.machines.host import HostUnfit, check_host, check_image_tools, check_pool_tools
from scripts.local_cloud.machines.network import tag_of, transfer_addresses
from tests.image.acme import AcmeServer, running_acme_server
from tests.image.bakery import Bakery, running_bakery
from tests.image.harness import DOMAIN, ROOT
from tests.image.kept import keep_layers, put_kept_layers
from tests.image.launch import KEYS, Deployment, api_key, deployment, find_program
from tests.image.launch_by_api import ApiDeployment, api_deployment
from tests.image.load import Load, Way
from tests.local_cloud.harness import make_key, traces
from tests.programs import ProgramMissing

_FOLDER = ROOT / ".cache" / "demo"
_REGISTRY = "https://registry-1.docker.io/v2/"
_NEEDED_GB, _NEEDED_MEMORY_GB = 15, 3.5
_END_WITHIN_S = 20.0
_MARK = f"MINI_LLM_DEMO={_FOLDER}"  # in the environment of all that a demo begins
_KEY = {name: value for name, value in api_key("alice").items() if name != "limits"}
_INSTEAD = "`make serve` runs the service alone, without root and without a cloud"


class CannotRun(Exception):
    """This machine cannot show it; the message says why, in one line."""


@dataclass
class Story:
    """What was done, one line a step: what, how long, what was seen; and what should not have been."""

    lines: list[tuple[str, float, str]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    @contextmanager
    def step(self, title: str) -> Iterator[Callable[[str], None]]:
        """Shows a step and its time; what it is told was seen goes into the table."""
        print(f"\n=== {title}", flush=True)
        begin_s, seen = time.monotonic(), list[str]()
        yield seen.append
        took_s = time.monotonic() - begin_s
        self.lines.append((title, took_s, "; ".join(seen)))
        print(f"    {'; '.join(seen)} ({took_s:.1f} s)", flush=True)

    def print_table(self) -> None:
        width = max(len(title) for title, _, _ in self.lines)
        print("\nWhat was seen:\n")
        for title, took_s, seen in self.lines:
            print(f"{title:{width}}  {took_s:7.1f} s  {seen}")


def check_machine() -> None:
    """Raises CannotRun unless this machine can run it."""
    try:
        check_host()
        check_image_tools()
        check_pool_tools()
    except HostUnfit as error:
        raise CannotRun(str(error)) from error
    # The checkout's disk holds the cloud, the home's what is built, /var the base image.
    for place in (ROOT, Path.home(), Path("/var")):
        free_gb = shutil.disk_usage(place).free / 1e9
        if free_gb < _NEEDED_GB:
            raise CannotRun(f"it needs {_NEEDED_GB} GB of disk, {free_gb:.0f} are free at {place}")
    memory_gb = psutil.virtual_memory().available / 1e9
    if memory_gb < _NEEDED_MEMORY_GB:
        raise CannotRun(f"it needs {_NEEDED_MEMORY_GB} GB of memory, {memory_gb:.1f} are free")


def has_registry() -> bool:
    """Whether the registry of the pinned images answers."""
    try:
        return requests.get(_REGISTRY, timeout=5).status_code == 401  # it wants a token, as ever
    except requests.RequestException:
        return False


def show(command: str, said: str) -> None:
    """A command as somebody would type it, and what it said."""
    print(f"$ {command}")
    print("".join(f"    {line}\n" for line in said.strip().splitlines()), end="", flush=True)


def bake(bakery: Bakery) -> tuple[dict[str, Any], list[str]]:
    """What bake.py told of the image, which is verified and promoted now, and its lines, shown as they come."""
    print("$ python scripts/bake.py build --promote", flush=True)
    process = bakery.start("build", "--promote", "--json")
    assert process.stderr is not None
    assert process.stdout is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        print(f"    {line.rstrip()}", flush=True)
    told, code = process.stdout.read(), process.wait(120)
    if code:
        raise CannotRun(f"bake.py ended with {code}: {lines[-1].strip() if lines else 'it said nothing'}")
    return json.loads(told), lines


def keep_for_the_next(bakery: Bakery) -> None:
    """The layers below the service, where there is room for them; without them the next demo takes longer, no more."""
    try:
        keep_layers(bakery)
    except (MachineFailed, OSError) as error:
        print(f"The layers below the service are not kept for the next demo: {error}")


def find_baked(lines: list[str]) -> str:
    """The layers that bake.py said it bakes."""
    [told] = [line for line in lines if ": layers " in line]
    return told.partition(": layers ")[2].partition(";")[0]


def ask(made: Deployment | ApiDeployment, path: str, *words: str) -> dict[str, Any]:
    """What the service answers by its name, its certificate verified."""
    address = made.outputs()["ipv4_address"]
    command = ["curl", "-sS", "--fail-with-body", "--cacert", str(made.authority)]
    command += ["--resolve", f"{DOMAIN}:443:{address}", "-H", f"Authorization: Bearer {KEYS['alice']}", *words]
    done = subprocess.run([*command, f"https://{DOMAIN}{path}"], capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise CannotRun(f"the service did not answer: {done.stdout}{done.stderr}")
    return dict(json.loads(done.stdout))


def read_version(made: Deployment | ApiDeployment) -> str:
    """Of the image that serves."""
    return str(ask(made, "/version")["image"]["version"])


def answer(made: Deployment | ApiDeployment) -> str:
    """The text of a generation."""
    body = json.dumps({"prompt": "What is mini-llm?"})
    told = ask(made, "/generate", "-H", "Content-Type: application/json", "-d", body)
    text = str(told["response"]).strip()
    show(f"curl https://{DOMAIN}/generate -H 'Authorization: Bearer …' -d '{body}'", text)
    return text


@contextmanager
def launching(
    bakery: Bakery, program: str | None, server: AcmeServer, acme: dict[str, str], image_id: int
) -> Iterator[tuple[Deployment | ApiDeployment, Callable[[int], str]]]:
    """A deployment with nothing in it yet, and what makes an image the one that serves; it says what was said."""
    folder, client = _FOLDER / "launch", bakery.cloud.client()
    folder.mkdir()
    public_key = make_key(folder).with_suffix(".pub").read_text()
    facts: dict[str, Any] = {"acme": acme, "handover": make_pair(datetime.now(UTC)), "api_keys": [_KEY]}

    def point() -> None:
        addresses = {each.type: each.ip for each in client.floating_ips.get_all()}
        server.point(DOMAIN, given(addresses["ipv4"]))

    root = folder / "root.pem"
    server.write_root(root)
    if program is None:
        with api_deployment(folder, bakery.cloud, root, image_id, public_key, **facts) as by_api:
            point()

            def roll_out(image: int) -> str:
                by_api.image_id = image
                return by_api.roll_out().said

            yield by_api, roll_out
        return
    more = {"ssh_public_keys": {"demo": public_key}, "ready_timeout_s": 400}
    with deployment(folder, bakery.cloud, program, root, image_id=image_id, **facts, **more) as made:
        name = Path(program).name
        code, said = made.run("apply", "-auto-approve", "-input=false", "-target=hcloud_floating_ip.service")
        if code:
            raise CannotRun(said)
        point()

        def apply(image: int) -> str:
            print(f"$ {name} apply", flush=True)
            return made.apply(image_id=image)

        yield made, apply


def prove_lines(said: str) -> str:
    """Of what an apply said, what tells of the node's proof."""
    wanted = [line for line in said.splitlines() if "serves after" in line or "Apply complete" in line]
    return "\n".join(line.rpartition("local-exec): ")[2].strip() for line in wanted)


def run_story(story: Story, ends: ExitStack) -> None:
    """All steps. Raises CannotRun, ProgramMissing, AssertionError with the reason if one did not work."""
    with story.step("What this machine has") as saw:
        own_registry = not has_registry()
        if own_registry:
            print("No container registry answers: Traefik, Prometheus and Alertmanager are built from their Go modules")
            print("(once, some minutes); Grafana cannot be had so, and a page that says so stands in its place.")
        saw("containers " + ("built here, Grafana stood in for" if own_registry else "as pinned, from their registry"))
        program, why = find_program(_FOLDER)
        way = f"{Path(program).name} apply" if program else "the API"
        if program is None:
            print(f"{why}: the same calls are made through the API instead.")
        saw(f"launched by {way}")

    with story.step("A Hetzner Cloud of this machine's own") as saw:
        bakery = ends.enter_context(running_bakery(_FOLDER, stand_ins=own_registry))
        host, _ = transfer_addresses(tag_of(bakery.cloud.state))  # where servers reach this machine
        server = ends.enter_context(running_acme_server(_FOLDER, host))
        acme = {"email": "demo@example.org", "server": server.directory, "authority": server.authority.read_text()}
        saw("real Debian servers in system containers, Packer and hcloud talk to it; Pebble signs certificates")

    with story.step("Bake the image") as saw:
        kept = put_kept_layers(bakery)
        if kept:
            print("Model, Debian and containers are those of an earlier demo: nothing of them has changed since.")
        told, lines = bake(bakery)
        first = told["image"]
        if not kept:
            keep_for_the_next(bakery)
        saw(f"image {first['id']}, version {first['version']}, proved by booting it; baked: {find_baked(lines)}")

    made, roll_out = ends.enter_context(launching(bakery, program, server, acme, first["id"]))
    with story.step(f"Launch a node by {way}") as saw:
        show("the node's proof", prove_lines(roll_out(first["id"])))
        saw(f"https://{DOMAIN} at {made.outputs()['ipv4_address']}, its certificate ordered")

    with story.step("A generation over HTTPS") as saw:
        saw(f"“{answer(made)[:60]}”")

    with story.step("Bake a second version") as saw:
        bakery.change("service/page/page.css", "\n/* the second version */\n")
        told, lines = bake(bakery)
        second = told["image"]
        saw(f"image {second['id']}, version {second['version']}; baked: {find_baked(lines)}")

    with story.step("Roll it out while clients stream") as saw:
        address = made.outputs()["ipv4_address"]
        load = Load(DOMAIN, KEYS["alice"], made.authority)
        same, new = Way(address, False, True), Way(address, False, False)
        before = server.log.read_text().count("Issued certificate serial")
        with load.running(100, {"stream": [(same, 0.0), (new, 0.2)], "look": [(same, 0.5), (new, 0.5)]}):
            show("the node's proof", prove_lines(roll_out(second["id"])))
        print(load.describe())
        load.print_failed(0.0)
        for kind in ("stream", "look"):
            if not any(one.kind == kind and one.end == "ok" for one in load.seen):
                story.wrong.append(f"no request of kind {kind} was answered in the rollout")
        serves = read_version(made)
        if serves != second["version"]:
            story.wrong.append(f"{serves} serves, not {second['version']}")
        ordered = server.log.read_text().count("Issued certificate serial") - before
        if load.failed():
            story.wrong.append(f"{len(load.failed())} requests failed in the rollout")
        if ordered:
            story.wrong.append("a certificate was ordered, which should have been taken over")
        saw(f"{len(load.seen)} requests, {len(load.failed())} failed, {ordered} certificates ordered; {serves} serves")

    if isinstance(made, Deployment):
        with story.step("Has anything drifted?") as saw:
            command = [sys.executable, str(ROOT / "scripts" / "drift.py"), "--folder", str(made.folder)]
            command += ["--deployment", "launch", "--program", made.program]
            (made.folder / "image.auto.tfvars.json").write_text(json.dumps({"image_id": second["id"]}))
            done = subprocess.run(command, env=made.environment, capture_output=True, text=True, timeout=300)
            show("python scripts/drift.py", done.stdout + done.stderr)
            if done.returncode:
                story.wrong.append("something has drifted")
            saw("nothing has" if done.returncode == 0 else f"exit code {done.returncode}")
    else:
        story.lines.append(("Has anything drifted?", 0.0, "did not run: drift.py asks Terraform"))

    if os.environ.get("KEEP") == "1":
        print(f"\nAll of it stays up until Ctrl-C. {made.outputs()['ipv4_address']} is {DOMAIN}:")
        print(f"  curl --cacert '{made.authority}' --resolve {DOMAIN}:443:{made.outputs()['ipv4_address']} \\")
        print(f"    -H 'Authorization: Bearer {KEYS['alice']}' -H 'Content-Type: application/json' \\")
        print(f'    -d \'{{"prompt": "What is mini-llm?"}}\' https://{DOMAIN}/generate')
        hcloud = shutil.which("hcloud") or "hcloud"
        print(f"  HCLOUD_ENDPOINT={bakery.cloud.endpoint} HCLOUD_TOKEN=local {hcloud} server list")
        with suppress(KeyboardInterrupt):
            signal.pause()


def find_marked(processes: Path = Path("/proc")) -> list[int]:
    """Processes that a demo of this checkout began, this one apart: they have its mark in their environment."""
    found = []
    for folder in processes.glob("[0-9]*"):
        try:
            marked = _MARK.encode() in (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue  # it ended meanwhile
        if marked and int(folder.name) != os.getpid():
            found.append(int(folder.name))
    return found


def clean() -> None:
    """Ends and removes what a demo that was killed has left; only for who holds the lock. Raises CannotRun."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in find_marked():
            with suppress(ProcessLookupError):
                os.kill(process, number)
        end_s = time.monotonic() + _END_WITHIN_S
        while find_marked() and time.monotonic() < end_s:
            time.sleep(0.2)
    if _FOLDER.exists() or traces(_FOLDER / "cloud"):
        command = [sys.executable, "-m", "scripts.local_cloud", "clean", "--state", str(_FOLDER / "cloud")]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        if done.returncode:
            raise CannotRun(f"what an earlier demo has left cannot be removed: {done.stderr.strip()}")
        shutil.rmtree(_FOLDER, ignore_errors=True)


@contextmanager
def locked() -> Iterator[None]:
    """Nobody else runs a demo in this checkout meanwhile. Raises CannotRun."""
    _FOLDER.parent.mkdir(exist_ok=True)
    with _FOLDER.with_suffix(".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CannotRun("another demo runs in this checkout; wait for its end") from error
        yield


def _stop(number: int, frame: FrameType | None) -> None:
    """What has begun to clean up is not to be interrupted again."""
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
    print("\nstopping; what was made is removed …", file=sys.stderr, flush=True)
    raise KeyboardInterrupt


def find_left() -> list[str]:
    """What of a demo is still on this machine."""
    left = [f"{kind}: {', '.join(names)}" for kind, names in traces(_FOLDER / "cloud").items()]
    processes = find_marked()
    return left + ([f"processes: {', '.join(map(str, processes))}"] if processes else [])


def tell_story(story: Story) -> None:
    """The story from its beginning to a clean machine. Raises what `run_story` raises."""
    clean()
    _FOLDER.mkdir(parents=True)
    begin_s = time.monotonic()
    try:
        with ExitStack() as ends:
            run_story(story, ends)
            print("\n=== Tear it down", flush=True)
            begin_s = time.monotonic()
    finally:
        left = find_left()
        if left:
            story.wrong.append(f"left behind, and removed by the next demo: {'; '.join(left)}")
        else:
            shutil.rmtree(_FOLDER, ignore_errors=True)
    story.lines.append(("Tear it down", time.monotonic() - begin_s, f"left behind: {'; '.join(left) or 'nothing'}"))


def main() -> int:
    """Exit code 0 if all was seen, 1 with the reason if not, 130 if interrupted; what is left then is told."""
    name, _, value = _MARK.partition("=")
    os.environ[name] = value
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, _stop)
    story, code, begin_s = Story(), 0, time.monotonic()
    try:
        check_machine()
        with locked():
            tell_story(story)
        story.print_table()
        print(f"\nAll of it took {(time.monotonic() - begin_s) / 60:.1f} minutes.")
    except (CannotRun, ProgramMissing) as error:
        print(f"error: {error}\n  {_INSTEAD}", file=sys.stderr)
        code = 1
    # An AssertionError is the harness's word for what went wrong.
    except (
        AssertionError,
        OSError,
        subprocess.SubprocessError,
        requests.RequestException,
        APIException,
        BakeError,
        MachineFailed,
    ) as error:
        print(f"error: {error}", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        code = 130
        if not story.wrong:
            print("interrupted; nothing of it is left", file=sys.stderr)
    for problem in story.wrong:
        print(f"error: {problem}", file=sys.stderr)
    return code or (1 if story.wrong else 0)


if __name__ == "__main__":
    sys.exit(main())
