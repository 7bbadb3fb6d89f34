"""Owns what the tests of the bake share: a small tree to bake, the program itself, and a look at what was left."""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests
from hcloud import APIException
from hcloud.images import BoundImage

from scripts.bake.answers import given
from scripts.local_cloud.api.app import pad_token
from tests.local_cloud.harness import TOKEN, LocalCloud, running_cloud
from tests.programs import PACKER, PACKER_PLUGIN_HCLOUD, obtain

ROOT = Path(__file__).resolve().parents[2]
LAYERS_KEPT = ("stack", "service")  # of which a bake leaves a snapshot each
_SMALL = Path(__file__).with_name("small")
# What the small tree has from the checkout: the bake itself, and what tells a node's state in its one shape.
_COPIED = (
    *("image/mini-llm.pkr.hcl", "image/variables.pkr.hcl", "image/pins.json", "cloud-init"),
    *("image/rootfs/usr/lib/mini-llm/report.py", "image/provision/place_model.py", "image/provision/write_settings.py"),
    *("service/starter/starter.json", "service/models.json", "service/requirements.txt"),
)
_LONGEST_S = 300.0
_PROGRAM = ("scripts/bake.py",)


def parse_pattern(text: str) -> re.Pattern[str]:
    """What ``--only`` of a fault plan takes; argparse would not tell what is wrong with it."""
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from error


def make_tree(folder: Path) -> Path:
    """A folder as the checkout has it, whose layers do next to nothing and whose node is a stand-in."""
    tree = folder / "tree"
    shutil.copytree(_SMALL, tree, ignore=shutil.ignore_patterns("__pycache__"))
    for name in _COPIED:
        source, target = ROOT / name, tree / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target)
        else:
            shutil.copy(source, target)
    git(tree, "init", "-q", "-b", "main")
    commit(tree, "A small tree")
    return tree


def commit(tree: Path, message: str) -> None:
    """Commits all that is there."""
    git(tree, "add", "-A")
    git(tree, "commit", "-q", "-m", message)


def git(tree: Path, *words: str) -> str:
    """What git says, by its defaults and not by somebody's settings."""
    own = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    own |= {f"GIT_{who}_{what}": "test" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    done = subprocess.run(
        ["git", *words], cwd=tree, env={**os.environ, **own}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def install_packer(folder: Path) -> dict[str, str]:
    """Packer under its own name and its plugin in a folder; the environment that finds both. Raises ProgramMissing."""
    program, plugin = obtain(PACKER), obtain(PACKER_PLUGIN_HCLOUD)
    (folder / "bin").mkdir()
    (folder / "bin" / "packer").symlink_to(program)
    own = {
        "PACKER_PLUGIN_PATH": str(folder / "plugins"),
        "PACKER_CONFIG_DIR": str(folder),
        "CHECKPOINT_DISABLE": "1",
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
    }
    subprocess.run(
        ["packer", "plugins", "install", "--path", str(plugin), "github.com/hetznercloud/hcloud"],
        env={**os.environ, **own},
        check=True,
        capture_output=True,
        timeout=60,
    )
    return own


@dataclass(frozen=True)
class Done:
    """How a run of the program ended."""

    code: int
    output: str
    said: str  # on stderr
    took_s: float

    def document(self) -> dict[str, Any]:
        """What it printed, as JSON."""
        return dict(json.loads(self.output))

    def __str__(self) -> str:
        return f"exit code {self.code} after {self.took_s:.1f} s\n{self.output}{self.said}"


@dataclass
class Running:
    """A run of the program that is not over; ``said`` grows."""

    process: "subprocess.Popen[str]"
    said: list[str] = field(default_factory=list)
    begun_s: float = field(default_factory=time.monotonic)

    def lines(self) -> Iterator[str]:
        """What it says on stderr, as it comes, until it has ended."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line)
            yield line.rstrip("\n")

    def kill(self) -> None:
        """Ends it at once, itself alone."""
        self.process.send_signal(signal.SIGKILL)

    def finish(self, patience_s: float = _LONGEST_S) -> Done:
        """Waits for its end, and kills it if that does not come."""
        try:
            output, said = self.process.communicate(timeout=patience_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            output, said = self.process.communicate()
            said += f"\nkilled by the test after {patience_s:.0f} s\n"
        took_s = time.monotonic() - self.begun_s
        return Done(self.process.returncode, output, "".join(self.said) + said, took_s)


@dataclass(frozen=True)
class Bench:
    """Where bakes are tried: a cloud, a tree, a state folder, and the environment that finds Packer."""

    cloud: LocalCloud
    tree: Path
    state: Path
    packer: dict[str, str]

    @property
    def token(self) -> str:
        """The local cloud's, as long as a real one: what is as short as ``local`` stands everywhere."""
        return pad_token(TOKEN)

    def start(self, *words: str, program: tuple[str, ...] = _PROGRAM) -> Running:
        """Begins a verb of the program, for the small tree."""
        told = [*words, "--tree", str(self.tree)]
        own = {"HCLOUD_TOKEN": self.token, "MINI_LLM_STATE_DIR": str(self.state)}
        environment = {**self.cloud.environment, **self.packer, **own}
        process = subprocess.Popen(
            [sys.executable, *program, *told],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        return Running(process)

    def run(self, *words: str, patience_s: float = _LONGEST_S, program: tuple[str, ...] = _PROGRAM) -> Done:
        """A verb of the program, to its end."""
        return self.start(*words, program=program).finish(patience_s)

    def local(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """A call of the local cloud's own paths."""
        url = f"{self.cloud.endpoint.removesuffix('/v1')}/_local/{path}"
        answer = requests.request(method, url, json=body, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=30)
        answer.raise_for_status()
        return answer.json() if answer.content else None

    def plan(self, *faults: dict[str, Any]) -> None:
        """Puts these faults in place of those before."""
        self.local("PUT", "faults", {"faults": list(faults)})

    def calls(self, after: int = 0) -> list[dict[str, Any]]:
        """All calls with numbers above this one, in order."""
        return list(self.local("GET", f"calls?after={after}")["calls"])

    def snapshots(self, **labels: str) -> list[BoundImage]:
        """The snapshots that have these labels."""
        every = self.cloud.client().images.get_all(type=["snapshot"])
        return [one for one in every if labels.items() <= given(one.labels).items()]

    def verified(self) -> list[BoundImage]:
        """Images that have passed their checks."""
        return [one for one in self.snapshots(layer="service") if "verified-at" in given(one.labels)]

    def left(self) -> list[str]:
        """What a bake should not have left: servers, keys, snapshots that nobody has finished."""
        client = self.cloud.client()
        found = [f"server {one.name}" for one in client.servers.get_all()]
        found += [f"SSH key {one.name}" for one in client.ssh_keys.get_all()]
        found += [f"primary IP {one.name}" for one in client.primary_ips.get_all()]
        unfinished = [one for one in self.snapshots() if "deadline" in given(one.labels) or one.status != "available"]
        found += [f"snapshot {one.id} {one.status} {one.labels}" for one in unfinished]
        return found + [f"process {words}" for words in self.find_processes().values()]

    def find_processes(self) -> dict[int, str]:
        """Programs that were told of the state folder, as Packer is, by their ids."""
        found = {}
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):  # it ended meanwhile
                words = path.read_text().replace("\0", " ")
                if str(self.state) in words:
                    found[int(path.parent.name)] = words
        return found

    def find_secrets(self) -> list[str]:
        """Where the state folder holds what it must not: the token, a private key, a key of the service."""
        secret = re.compile(rb"%b|PRIVATE KEY-----|\bmllm_[0-9a-f]{32}" % self.token.encode())
        every = [path for path in self.state.rglob("*") if path.is_file()]
        return [str(path.relative_to(self.state)) for path in every if secret.search(path.read_bytes())]

    def twice(self) -> list[str]:
        """What a bake has made more than once: verified images, and layers of the same input."""
        found = [] if len(self.verified()) == 1 else [f"{len(self.verified())} verified images"]
        for layer in LAYERS_KEPT:
            count = len(self.snapshots(layer=layer))
            found += [] if count == 1 else [f"{count} snapshots of layer {layer}"]
        return found

    def clear(self) -> None:
        """Removes whatever there is, at the cloud and in the state folder, so that the next bake is a first one."""
        self.plan()
        client = self.cloud.client()
        for server in client.servers.get_all():
            _insist(lambda server=server: server.delete().wait_until_finished())
        for key in client.ssh_keys.get_all():
            _insist(key.delete)
        for image in client.images.get_all(type=["snapshot"]):
            _insist(image.delete)
        shutil.rmtree(self.state, ignore_errors=True)
        self.state.mkdir()


def _insist(delete: Any, patience_s: float = 400.0) -> None:
    """Deletes, also while an action still works on it."""
    end_s = time.monotonic() + patience_s
    while True:
        try:
            delete()
            return
        except APIException as error:
            if error.code == "not_found":
                return
            if error.code not in ("locked", "conflict") or time.monotonic() > end_s:
                raise
            time.sleep(0.1)


@contextmanager
def running_bench(folder: Path) -> Iterator[Bench]:
    """A bench with a cloud of its own, in a folder; nothing of it is left afterwards. Raises ProgramMissing."""
    packer = install_packer(folder)
    tree, state = make_tree(folder), folder / "state"
    state.mkdir()
    with running_cloud(folder, "--old-clients", "--requests-per-hour", "100000") as cloud:
        yield Bench(cloud, tree, state, packer)
