"""Owns a bakery: a local cloud, a copy of this tree to change, and bake.py with all that it needs there."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests

from scripts.bake.answers import given
from tests.image.harness import ROOT, packer_environment, stand_in_registry
from tests.local_cloud.harness import TOKEN, LocalCloud, running_cloud

# As long as Hetzner's, and taken by the local cloud as well: so that it can be looked for in what a bake leaves.
LONG_TOKEN = "local".ljust(64, "0")
_PATIENCE_S, _STOP_PATIENCE_S = 600, 120


@dataclass(frozen=True)
class Bakery:
    """A tree to change, and bake.py with all that it needs."""

    cloud: LocalCloud
    tree: Path
    state: Path
    environment: dict[str, str]
    more: list[str]  # of ``build``'s options
    authorities: Path  # of those whom servers trust while they bake; a file only with stand-ins
    begun: list["subprocess.Popen[str]"] = field(default_factory=list)

    def start(self, verb: str, *words: str) -> "subprocess.Popen[str]":
        """A verb in a process; ``build`` finds the stand-ins of the registries."""
        own = self.more if verb == "build" else []
        process = subprocess.Popen(
            [sys.executable, "scripts/bake.py", verb, "--tree", str(self.tree), *own, *words],
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # a terminal's Ctrl-C reaches it once, through who started it
        )
        self.begun.append(process)
        return process

    def stop(self) -> None:
        """Ends what still runs, while there is a cloud to take back from: a test was interrupted, or has failed."""
        for process in self.begun:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                try:
                    process.communicate(timeout=_STOP_PATIENCE_S)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.communicate()

    def run(self, verb: str, *words: str) -> tuple[int, str, str]:
        """Exit code, standard output, standard error."""
        process = self.start(verb, *words)
        out, err = process.communicate(timeout=_PATIENCE_S)
        return process.returncode, out, err

    def tell(self, verb: str, *words: str) -> dict[str, Any]:
        """What a verb that works says as JSON."""
        code, out, err = self.run(verb, "--json", *words)
        assert code == 0, err + out
        return dict(json.loads(out))

    def change(self, path: str, text: str) -> None:
        """Adds to a file of the tree, and commits it."""
        with (self.tree / path).open("a") as file:
            file.write(text)
        git(self.tree, "commit", "-qam", f"changed {path}")

    def lay_faults(self, *faults: dict[str, Any]) -> None:
        """Replaces the cloud's plan."""
        url = self.cloud.endpoint.removesuffix("/v1") + "/_local/faults"
        headers = {"Authorization": f"Bearer {TOKEN}"}
        requests.put(url, json={"faults": list(faults)}, headers=headers, timeout=10).raise_for_status()

    def leftovers(self) -> list[str]:
        """Every server and SSH key, and every snapshot that nobody has finished with: all of it is left over here."""
        client = self.cloud.client()
        return [
            *(f"server {each.name}" for each in client.servers.get_all()),
            *(f"key {each.name}" for each in client.ssh_keys.get_all()),
            *(
                f"snapshot {each.description}"
                for each in client.images.get_all(type=["snapshot"])
                if "deadline" in given(each.labels)
            ),
        ]


def git(folder: Path, *words: str) -> None:
    who = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    subprocess.run(["git", *who, "-C", str(folder), *words], check=True, capture_output=True)


@contextmanager
def running_bakery(folder: Path, *, stand_ins: bool = True) -> Iterator[Bakery]:
    """A cloud with nothing in it, and this tree as one commit. Raises ProgramMissing.

    ``stand_ins`` are a registry of our own in the place of those that cannot be reached.
    """
    tree, state = folder / "tree", folder / "state"
    for name in ("image", "service", "cloud-init"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "text"))
    git(tree, "init", "-q")
    git(tree, "add", "-A")
    git(tree, "commit", "-qm", "all")
    (folder / "packer").mkdir()
    own = packer_environment(folder / "packer")
    arguments = ("--old-clients", "--requests-per-hour", "100000")
    with ExitStack() as ends:
        cloud = ends.enter_context(running_cloud(folder, *arguments))
        more, authorities = [], folder / "none"
        if stand_ins:
            pins_file, authorities = ends.enter_context(stand_in_registry(cloud, folder / "packer"))
            more = ["--pins-file", str(pins_file), "--extra-ca-file", str(authorities)]
        told = {"HCLOUD_TOKEN": LONG_TOKEN, "MINI_LLM_STATE_DIR": str(state)}
        bakery = Bakery(cloud, tree, state, {**cloud.environment, **own, **told}, more, authorities)
        ends.callback(bakery.stop)
        yield bakery
