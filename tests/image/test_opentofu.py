"""OpenTofu applies and destroys the deployment with an encrypted state; the examples for the state hold what they say.

What cannot run here: Hetzner's own object storage. Its example is initialised and applied against a stand-in that keeps
what is put there and honours If-None-Match, which the lock needs; whether Hetzner's does was not seen.
"""

import json
import os
import platform
import re
import secrets
import shutil
import subprocess
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import md5
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from hcloud.images import BoundImage

from tests.absent import did_not_run
from tests.image.harness import DOMAIN, ROOT
from tests.image.launch import KEYS, deployment
from tests.image.registry import make_certificate
from tests.local_cloud.harness import LocalCloud
from tests.programs import OPENTOFU, ProgramMissing, obtain

EXAMPLES = ROOT / "terraform" / "examples"
_TIMEOUT_S = 120
_SECRET = 'resource "terraform_data" "kept" {\n  input = "in-clear-nowhere"\n}\n'


@pytest.fixture(scope="session")
def tofu() -> Path:
    """OpenTofu, or a word that the tests did not run."""
    try:
        return obtain(OPENTOFU)
    except ProgramMissing as error:
        did_not_run(error)


@pytest.fixture
def passphrase(monkeypatch: pytest.MonkeyPatch) -> str:
    """As the example has it."""
    made = secrets.token_hex(24)
    monkeypatch.setenv("TF_VAR_state_passphrase", made)
    return made


def terraform_mirror() -> Path | None:
    """The folder of providers that Terraform's own configuration names, as a machine without its registry has it."""
    named = os.environ.get("TF_CLI_CONFIG_FILE")
    if not named or not Path(named).is_file():
        return None
    found = re.search(r'filesystem_mirror\s*{[^}]*path\s*=\s*"([^"]+)"', Path(named).read_text())
    return Path(found.group(1)) if found else None


def mirror_for_opentofu(folder: Path) -> Path | None:
    """A configuration with the same providers under the name that OpenTofu looks for; None where there is no mirror.

    Both registries hand out the same provider, whose place alone differs.
    """
    known = terraform_mirror()
    theirs = None if known is None else known / "registry.terraform.io" / "hetznercloud" / "hcloud"
    if theirs is None or not theirs.is_dir():
        return None
    ours = folder / "mirror" / "registry.opentofu.org" / "hetznercloud"
    ours.mkdir(parents=True)
    shutil.copytree(theirs, ours / "hcloud", symlinks=False)
    configuration = folder / "tofurc"
    configuration.write_text(
        f'provider_installation {{\n  filesystem_mirror {{\n    path = "{folder / "mirror"}"\n  }}\n}}\n'
    )
    return configuration


def run(program: Path | str, folder: Path, *words: str) -> tuple[int, str]:
    """Exit code of a command in a folder, and all that it said."""
    done = subprocess.run(
        [program, *words, "-no-color"],
        cwd=folder,
        env={**os.environ, "TF_IN_AUTOMATION": "1", "CHECKPOINT_DISABLE": "1"},
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
    )
    return done.returncode, done.stdout + done.stderr


def files_with(folder: Path, secret: str) -> list[str]:
    """Names of files anywhere in a folder that hold a text."""
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and ".terraform" not in path.parts and secret.encode() in path.read_bytes()
    )


def test_the_deployment_with_an_encrypted_state(
    tofu: Path,
    cloud: LocalCloud,
    image: BoundImage,
    passphrase: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Applied, at rest, not to be read without the passphrase, destroyed; no secret stands in clear beside it."""
    if (configuration := mirror_for_opentofu(tmp_path)) is not None:
        monkeypatch.setenv("TF_CLI_CONFIG_FILE", str(configuration))
    chain, key = make_certificate(tmp_path, f"DNS:{DOMAIN}", f"DNS:monitoring.{DOMAIN}")
    certificate = {"chain": chain.read_text(), "key": key.read_text()}
    work = tmp_path / "deployment"
    work.mkdir()
    with deployment(work, cloud, str(tofu), chain, certificate=certificate, image_id=image.id) as made:
        shutil.copy(EXAMPLES / "encrypted_state.tofu", made.folder)
        assert made.run("init", "-input=false")[0] == 0
        made.apply()
        told = made.outputs()
        assert made.generate(told["ipv4_address"], KEYS["alice"]) == 200
        assert made.changes() == ""
        raw = (made.folder / "terraform.tfstate").read_text()
        assert set(json.loads(raw)) >= {"encrypted_data", "meta"}
        code, clear = made.run("state", "pull")
        assert code == 0, clear
        [proof, *_] = re.findall(r'"secret":"([^"]+)"', clear.replace('": "', '":"'))
        line_of_key = certificate["key"].splitlines()[1]
        assert line_of_key not in clear  # the provider keeps a digest of the user-data
        code, said = made.run("plan", "-input=false", "-out=saved", "-replace=terraform_data.node")
        assert code == 0, said
        assert not zipfile.is_zipfile(made.folder / "saved")  # as which a plan in clear, with all variables, is saved
        assert files_with(made.folder, proof) == []
        # The file of values is the test's own.
        assert files_with(made.folder, line_of_key) == ["test.auto.tfvars.json"]
        assert files_with(made.folder, passphrase) == []
        with monkeypatch.context() as wrong:
            wrong.setenv("TF_VAR_state_passphrase", secrets.token_hex(24))
            code, said = made.run("state", "pull")
            assert code != 0
            assert "decryption failed" in " ".join(said.split())
    assert cloud.client().servers.get_all(label_selector="deployment=launch") == []


def test_the_files_are_as_opentofu_formats_them(tofu: Path) -> None:
    """Also those that Terraform does not look at."""
    code, said = run(tofu, ROOT / "terraform", "fmt", "-check", "-recursive")
    assert code == 0, said


def test_the_encrypted_state_by_itself(tofu: Path, passphrase: str, tmp_path: Path) -> None:
    """Needs neither cloud nor provider; a short passphrase is none, and a state in clear is not taken."""
    (tmp_path / "main.tf").write_text(_SECRET)
    shutil.copy(EXAMPLES / "encrypted_state.tofu", tmp_path)
    for words in (("init",), ("apply", "-auto-approve"), ("plan", "-detailed-exitcode")):
        code, said = run(tofu, tmp_path, *words, "-input=false")
        assert code == 0, said
    assert files_with(tmp_path, "in-clear-nowhere") == ["main.tf"]
    clear = tmp_path / "clear"
    clear.mkdir()
    (clear / "main.tf").write_text(_SECRET)
    assert run(tofu, clear, "init", "-input=false")[0] == 0
    assert run(tofu, clear, "apply", "-auto-approve", "-input=false")[0] == 0
    shutil.copy(EXAMPLES / "encrypted_state.tofu", clear)
    code, said = run(tofu, clear, "plan", "-input=false")
    assert code == 1
    assert "unencrypted" in said
    assert run(tofu, clear, "plan", "-input=false", "-var=state_passphrase=short")[0] == 1
    # As the example says: what is there in clear is taken over once.
    example = (clear / "encrypted_state.tofu").read_text()
    open_once = example.replace('method "aes_gcm"', 'method "unencrypted" "clear" {}\n\n    method "aes_gcm"')
    fallback = "fallback {\n        method = method.unencrypted.clear\n      }"
    open_once = open_once.replace("enforced = true", fallback, 1)
    (clear / "encrypted_state.tofu").write_text(open_once)
    code, said = run(tofu, clear, "apply", "-auto-approve", "-input=false")
    assert code == 0, said
    (clear / "encrypted_state.tofu").write_text(example)
    assert run(tofu, clear, "plan", "-detailed-exitcode", "-input=false")[0] == 0


class _Bucket(BaseHTTPRequestHandler):
    """As much of S3 as a state needs: objects by path, a list by prefix, and a put that leaves alone what is there."""

    protocol_version = "HTTP/1.1"
    objects: dict[str, bytes]
    calls: list[str]

    def _answer(self, status: int, body: bytes = b"") -> None:
        self.calls.append(f"{self.command} {urlsplit(self.path).path} {status}")
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{md5(body).hexdigest()}"')
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        told = urlsplit(self.path)
        query = parse_qs(told.query)
        if "list-type" in query or "prefix" in query:
            prefix = query.get("prefix", [""])[0]
            bucket = told.path.strip("/")
            names = [name.removeprefix(f"/{bucket}/") for name in self.objects]
            keys = "".join(f"<Contents><Key>{name}</Key></Contents>" for name in names if name.startswith(prefix))
            self._answer(200, f"<ListBucketResult><Name>{bucket}</Name>{keys}</ListBucketResult>".encode())
        elif told.path in self.objects:
            self._answer(200, self.objects[told.path])
        else:
            self._answer(404, b"<Error><Code>NoSuchKey</Code><Message>not here</Message></Error>")

    do_HEAD = do_GET  # noqa: N815 - http.server's name

    def do_PUT(self) -> None:
        path, body = urlsplit(self.path).path, self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("If-None-Match") == "*" and path in self.objects:
            self._answer(412, b"<Error><Code>PreconditionFailed</Code><Message>it is there</Message></Error>")
            return
        self.objects[path] = body
        self._answer(200)

    def do_DELETE(self) -> None:
        self.objects.pop(urlsplit(self.path).path, None)
        self._answer(204)

    def log_message(self, *words: object) -> None:
        """The calls are kept."""


@contextmanager
def bucket() -> Iterator[tuple[str, type[_Bucket]]]:
    """An object storage on loopback: where it is, and what it holds."""
    handler = type("Bucket", (_Bucket,), {"objects": {}, "calls": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", handler
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.parametrize("which", ["program", "tofu", "tofu, encrypted"])
def test_the_state_in_an_object_storage(
    which: str, request: pytest.FixtureRequest, passphrase: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state lies there, encrypted if the other example is beside it; a lock of somebody else keeps an apply out."""
    chosen, encrypted = request.getfixturevalue(which.partition(",")[0]), which.endswith("encrypted")
    if encrypted:
        shutil.copy(EXAMPLES / "encrypted_state.tofu", tmp_path)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    shutil.copy(EXAMPLES / "object_storage.tf", tmp_path)
    (tmp_path / "main.tf").write_text(_SECRET)
    with bucket() as (address, held):
        # A bucket's own name in front of the storage's leads nowhere here.
        here = (f'-backend-config=endpoints={{s3="{address}"}}', "-backend-config=use_path_style=true")
        code, said = run(chosen, tmp_path, "init", "-input=false", *here)
        assert code == 0, said
        code, said = run(chosen, tmp_path, "apply", "-auto-approve", "-input=false")
        assert code == 0, said
        state, lock = "/mini-llm-state/mini-llm/terraform.tfstate", "/mini-llm-state/mini-llm/terraform.tfstate.tflock"
        assert list(held.objects) == [state]
        assert (b"in-clear-nowhere" in held.objects[state]) is not encrypted
        assert ("encrypted_data" in json.loads(held.objects[state])) is encrypted
        assert f"PUT {lock} 200" in held.calls
        assert f"DELETE {lock} 204" in held.calls
        assert not (tmp_path / "terraform.tfstate").exists()
        held.objects[lock] = json.dumps({"ID": "1", "Who": "somebody else"}).encode()
        code, said = run(chosen, tmp_path, "plan", "-input=false")
        assert code == 1
        assert "somebody else" in said


def test_the_mirror_is_terraforms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found in Terraform's own configuration, and laid where OpenTofu looks."""
    place = tmp_path / "theirs" / "registry.terraform.io" / "hetznercloud" / "hcloud" / "1.0.0" / platform.machine()
    place.mkdir(parents=True)
    (place / "terraform-provider-hcloud_v1.0.0").write_text("a program")
    path = f"{tmp_path}/theirs"
    (tmp_path / "rc").write_text(f'provider_installation {{\n  filesystem_mirror {{\n    path = "{path}"\n  }}\n}}\n')
    monkeypatch.setenv("TF_CLI_CONFIG_FILE", str(tmp_path / "rc"))
    made = mirror_for_opentofu(tmp_path)
    assert made is not None
    assert list((tmp_path / "mirror" / "registry.opentofu.org").rglob("terraform-provider-*"))
    monkeypatch.setenv("TF_CLI_CONFIG_FILE", str(tmp_path / "none"))
    assert terraform_mirror() is None
