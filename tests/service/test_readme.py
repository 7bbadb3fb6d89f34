"""The README's commands for the service, typed as they are printed by somebody who has just cloned the project.

Only ports and the place of a model are others, so that nothing else on the machine is in the way.
"""

import http.client
import json
import os
import pty
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import pytest

from scripts.bake.certificates import sign_own
from tests.absent import did_not_run
from tests.commands import blocks, find_command, list_commands
from tests.model_hub import point_entry, running_hub
from tests.ports import free_port
from tests.service.harness import ROOT, write_small_model
from tests.service.test_serve import Terminal

README = (ROOT / "README.md").read_text()
_PORT = 8080  # what the README's lines have
_SET_UP_S = 240.0  # with what a package index sends
_PATIENCE_S = 90.0  # a host may be busy with other tests


@dataclass(frozen=True)
class Clone:
    """A clean clone, and where its service keeps what it has to keep."""

    folder: Path
    state: Path

    def environment(self, **more: str) -> dict[str, str]:
        """A person's, without settings of their own; the same Python that runs the tests."""
        own = {k: v for k, v in os.environ.items() if not k.startswith("LLM_")}
        own |= {"PYTHON": os.path.realpath(sys.executable), "NO_PROXY": "localhost,127.0.0.1"}
        return {**own, "LLM_STATE_DIR": str(self.state), "LLM_CACHE_DIR": str(self.state / "cache"), **more}

    def run(self, command: str, code: int = 0, /, **more: str) -> "subprocess.CompletedProcess[str]":
        """A command as it is typed, which ends with this code."""
        done = subprocess.run(
            ["sh", "-c", command],
            cwd=self.folder,
            env=self.environment(**more),
            capture_output=True,
            text=True,
            timeout=_SET_UP_S,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done

    @contextmanager
    def typed(self, command: str, **more: str) -> Iterator[Terminal]:
        """A command that goes on, at a terminal; all that it has started is gone afterwards."""
        ours, theirs = pty.openpty()
        try:
            process = subprocess.Popen(
                ["sh", "-c", command],
                cwd=self.folder,
                env=self.environment(**more),
                stdin=subprocess.DEVNULL,
                stdout=theirs,
                stderr=theirs,
                start_new_session=True,
            )
        finally:
            os.close(theirs)
        terminal = Terminal(process, os.fdopen(ours, encoding="utf-8", newline=""))
        try:
            yield terminal
        finally:
            family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                process.wait(30)
            _, alive = psutil.wait_procs(family, timeout=20)
            terminal.close()
            assert not alive


def at(port: int, text: str) -> str:
    """A text of the README for a service at another port."""
    assert str(_PORT) in text
    return text.replace(f":{_PORT}", f":{port}")


def get(port: int, path: str) -> http.client.HTTPResponse:
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
        connection.request("GET", path)
        answer = connection.getresponse()
        answer.read()
        return answer


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """Of this tree as it is, with what is not committed yet, and without what git ignores."""
    for tool in ("curl", "git", "make"):
        if shutil.which(tool) is None:
            did_not_run(f"{tool} is not installed (Debian: sudo apt-get install {tool})")
    folder = tmp_path_factory.mktemp("newcomer")
    origin = folder / "origin"
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-coz", "--exclude-standard"], capture_output=True, text=True
    )
    if listed.returncode:
        did_not_run("this tree is no git repository")
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (origin / name).parent.mkdir(parents=True, exist_ok=True)
            (origin / name).write_bytes((ROOT / name).read_bytes())
            (origin / name).chmod((ROOT / name).stat().st_mode)
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@example.org"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "all"]):
        subprocess.run([*git, "-C", str(origin), *words], check=True, capture_output=True)
    subprocess.run(["git", "clone", "-q", str(origin), str(folder / "mini-llm")], check=True, capture_output=True)
    return Clone(folder / "mini-llm", folder / "state")


@pytest.fixture(scope="module")
def set_up(clone: Clone) -> Clone:
    """The clone with what ``make serve`` gets from a package index, which may be out of reach."""
    begun = clone.run("make serve LLM_PORT=none; true")  # set up first, then refused
    if "check the network" in begun.stderr:
        did_not_run("no Python package index could be reached")
    assert "LLM_PORT='none'" in begun.stderr, begun.stderr
    return clone


@pytest.fixture(scope="module")
def served(set_up: Clone) -> Iterator[tuple[int, Terminal]]:
    """``make serve``, ready."""
    port = free_port()
    with set_up.typed(find_command("make serve"), LLM_PORT=str(port)) as terminal:
        terminal.wait_line("curl ", _PATIENCE_S)
        yield port, terminal


def test_a_fresh_clone_serves(served: tuple[int, Terminal]) -> None:
    """One command, and it prints the README's first request; the page is there."""
    port, terminal = served
    assert terminal.wait_line("curl ", _PATIENCE_S).strip() == at(port, find_command("curl -sS http"))
    assert get(port, "/").getheader("Content-Type", "").startswith("text/html")


def test_the_first_request(clone: Clone, served: tuple[int, Terminal]) -> None:
    """The curl line of the README gets the answer; at a wrong port it says that nobody is there."""
    told = json.loads(clone.run(at(served[0], find_command("curl -sS http"))).stdout)
    assert told["response"].startswith("mini-llm ")
    assert told["finish_reason"] == "stop"
    assert "onnect" in clone.run(at(free_port(), find_command("curl -sS http")), 7).stderr


def test_openai_s_client(served: tuple[int, Terminal]) -> None:
    """The Python block of the README, with a line behind it that shows the answer."""
    [block] = blocks(README, "python")
    script = at(served[0], block) + "print(answer.choices[0].message.content)\n"
    own = {**os.environ, "NO_PROXY": "127.0.0.1"}
    done = subprocess.run([sys.executable, "-c", script], env=own, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("mini-llm "), done.stderr


def test_a_taken_port(clone: Clone, served: tuple[int, Terminal]) -> None:
    """A second ``make serve`` says what to type, and that works although the first port was set otherwise."""
    done = clone.run(find_command("make serve"), 2, LLM_PORT=str(served[0]))
    told = done.stderr.partition("for example: ")[2].splitlines()[0]
    assert told == "make serve PORT=8081"
    port = free_port()
    with clone.typed(told.replace("8081", str(port)), LLM_PORT=str(served[0])) as terminal:
        assert f"http://127.0.0.1:{port} " in terminal.wait_line("Serving on ", _PATIENCE_S)
        terminal.wait_line("curl ", _PATIENCE_S)


def test_a_wrong_model(set_up: Clone) -> None:
    """A name that is none is told with those there are."""
    said = set_up.run("make serve MODEL=llama", 2, LLM_PORT=str(free_port())).stderr
    assert "there is no model 'llama'; give the path of a GGUF file or one of: starter, " in said
    assert "llama-3.2-1b-instruct" in said


def test_a_model_of_ones_own(set_up: Clone, tmp_path: Path) -> None:
    """Any GGUF file, at the port that is typed; its golden answer is recorded, once."""
    model, port = write_small_model(tmp_path), free_port()
    typed = find_command("make serve MODEL=/models/").replace("/models/my-model.gguf", shlex.quote(str(model)))
    with set_up.typed(typed.replace("9000", str(port))) as terminal:
        terminal.wait_line("recording its golden answer, once", _PATIENCE_S)
        assert f":{port}/generate" in terminal.wait_line("curl ", _PATIENCE_S)


def test_a_model_of_the_catalogue(set_up: Clone, tmp_path: Path) -> None:
    """Fetched, verified, kept and served by its name; a small file at a hub of our own stands for the large one."""
    typed = find_command("make serve MODEL=llama")
    content, catalogue = write_small_model(tmp_path).read_bytes(), set_up.folder / "service" / "models.json"
    kept, name = catalogue.read_text(), typed.partition("MODEL=")[2]
    now = datetime.now(UTC)
    certificate, key = sign_own("hub", now - timedelta(days=1), now + timedelta(days=1), ["localhost"])
    authority = tmp_path / "hub.pem"
    authority.write_text(certificate + key)
    with running_hub(tmp_path, "localhost", authority, authority) as place:
        entries = json.loads(kept)
        entry = point_entry(entries, name, f"{place}/small.gguf", content)
        catalogue.write_text(json.dumps(entries))
        own = {"REQUESTS_CA_BUNDLE": str(authority), "LLM_PORT": str(free_port()), "LLM_STATE_DIR": str(tmp_path / "s")}
        try:
            with set_up.typed(typed, **own) as terminal:
                terminal.wait_line("recording its golden answer, once", _PATIENCE_S)
                terminal.wait_line("curl ", _PATIENCE_S)
        finally:
            catalogue.write_text(kept)
    assert (set_up.state / "cache" / "models" / entry["file"]).read_bytes() == content


def test_keys_on_a_network(set_up: Clone, tmp_path: Path) -> None:
    """Where others can ask, a first key is shown; keys are made, listed and revoked, and the audit log tells of it."""
    port, own = free_port(), {"LLM_STATE_DIR": str(tmp_path / "state")}

    def ask(key: str) -> int:
        curl = find_command("curl -u").replace("KEY", key)
        words = f"{curl} -s -o {tmp_path}/answer -w '%{{http_code}}' http://127.0.0.1:{port}/v1/models"
        return int(set_up.run(words, **own).stdout)

    # Whoever reads the log of a service without a terminal is told what can be typed just so.
    refused = set_up.run(find_command("make serve HOST="), 2, LLM_PORT=str(port), **own).stderr
    told = refused.partition("make one with: ")[2].splitlines()[0]
    assert set_up.run(told.replace("NAME", "first"), **own).stdout.startswith("mllm_")
    set_up.run(told.replace("keys add NAME", "keys revoke first"), **own)

    with set_up.typed(find_command("make serve HOST="), LLM_PORT=str(port), **own) as terminal:
        first = terminal.wait_line("export LLM_KEY=", _PATIENCE_S).strip().partition("=")[2]
        terminal.wait_line("curl ", _PATIENCE_S)
        assert ask(first) == 401  # it is not alice's
        key = set_up.run(find_command(".venv/bin/python -m service keys add"), **own).stdout.strip()
        assert ask(key) == 200
        listed = set_up.run(find_command(".venv/bin/python -m service keys list"), **own).stdout
        assert "alice" in listed
        assert "requests_per_minute 60, tokens_per_day 100000, parallel 2" in listed
        assert key not in listed
        set_up.run(find_command(".venv/bin/python -m service keys revoke"), **own)
        assert ask(key) == 401
    verify = f".venv/bin/{find_command('python -m service audit verify')}"
    assert set_up.run(verify, **own).stdout.endswith("whole\n")
    digest = set_up.run(verify.replace("verify", "head"), **own).stdout.split()[1]
    assert set_up.run(f"{verify} --after {digest}", **own).stdout.endswith("whole\n")
    set_up.run(f"{verify} --after {'0' * 63}1", 1, **own)


def test_running_it_by_hand(set_up: Clone) -> None:
    """Settings are shown; gunicorn alone serves; a drain ends it in order."""
    own = {"LLM_PORT": str(free_port()), "LLM_AUTH": "off"}
    check, drain = (f".venv/bin/{find_command(f'python -m service {verb}')}" for verb in ("check", "drain"))
    assert f"LLM_PORT={own['LLM_PORT']} " in set_up.run(check, **own).stdout
    with set_up.typed(f".venv/bin/{find_command('gunicorn')}", LLM_ANNOUNCE="1", **own) as terminal:
        terminal.wait_line("curl ", _PATIENCE_S)
        assert get(int(own["LLM_PORT"]), "/ready").status == 200
        assert "drained; 0 cancelled" in set_up.run(drain, **own).stderr
        assert get(int(own["LLM_PORT"]), "/ready").status == 503


def test_a_deployment_begins(set_up: Clone, served: tuple[int, Terminal]) -> None:
    """Variables from the example, and a handover key, which stays when the command is typed again.

    It needs more of the package index, and gets that beside a service which runs from the same environment.
    """
    set_up.run(find_command("cp "))
    assert "api_keys" in (set_up.folder / "terraform" / "terraform.tfvars").read_text()
    for said in ("is made", "is there already"):
        assert said in set_up.run(find_command("make handover-key")).stdout
    assert "PRIVATE KEY" in (set_up.folder / "terraform" / "handover.auto.tfvars.json").read_text()


def test_an_upgrade_begins(clone: Clone) -> None:
    """What a person's clone holds of its own is in nobody's way: nothing of it is git's."""
    [pull] = [each for each in list_commands((ROOT / "OPERATING.md").read_text()) if each.startswith("git ")]
    clone.run(pull)
    assert clone.run("git status --porcelain").stdout == ""
