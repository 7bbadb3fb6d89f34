"""Owns a container registry for tests: Debian's docker-registry over TLS, and images made of one static program.

What a bake fetches by digest on Docker Hub it fetches here, by the same commands: the images hold programs built from
their Go modules instead, under digests of their own. They are pushed once, and kept in the user's cache.
"""

import gzip
import hashlib
import io
import json
import os
import subprocess
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

from tests.ports import free_port
from tests.programs import Program, forget_old, keep, obtain

_CONFIG = """version: 0.1
storage: {{filesystem: {{rootdirectory: {storage}}}, maintenance: {{readonly: {{enabled: {readonly}}}}}}}
http:
  addr: {address}
  tls: {{certificate: {certificate}, key: {key}}}
log: {{level: error}}
"""
_START_TIMEOUT_S = 20.0
_KEPT = 2  # somebody may be using the one before
_MANIFEST = "application/vnd.oci.image.manifest.v1+json"


@dataclass(frozen=True)
class Registry:
    """A registry that runs; ``authority`` is the PEM file of who signed its certificate: itself."""

    address: str
    authority: Path

    def push_program(self, name: str, program: Path) -> None:
        """Makes an image that holds this one file, as ``/bin/name``, and starts it."""
        layer = _tar_of(name, program)
        blob = gzip.compress(layer, compresslevel=1, mtime=0)
        config = {
            "architecture": "amd64",
            "os": "linux",
            "config": {"Entrypoint": [f"/bin/{name}"]},
            "rootfs": {"type": "layers", "diff_ids": [_digest(layer)]},
        }
        configured = json.dumps(config).encode()
        for content in (blob, configured):
            self._push_blob(name, content)
        manifest = {
            "schemaVersion": 2,
            "mediaType": _MANIFEST,
            "config": _descriptor("application/vnd.oci.image.config.v1+json", configured),
            "layers": [_descriptor("application/vnd.oci.image.layer.v1.tar+gzip", blob)],
        }
        content = json.dumps(manifest).encode()
        self._send("PUT", self._manifest_of(name), data=content, headers={"Content-Type": _MANIFEST})

    def digest_of(self, name: str) -> str:
        """Of the manifest of an image that was pushed."""
        answer = self._send("HEAD", self._manifest_of(name), headers={"Accept": _MANIFEST})
        return answer.headers["Docker-Content-Digest"]

    def _manifest_of(self, name: str) -> str:
        return f"https://{self.address}/v2/{name}/manifests/test"

    def _push_blob(self, name: str, content: bytes) -> None:
        begun = self._send("POST", f"https://{self.address}/v2/{name}/blobs/uploads/")
        self._send("PUT", begun.headers["Location"], params={"digest": _digest(content)}, data=content)

    def _send(self, method: str, url: str, **more: Any) -> requests.Response:
        answer = requests.request(method, url, verify=str(self.authority), timeout=60, **more)
        answer.raise_for_status()
        return answer


def _digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def _descriptor(media_type: str, content: bytes) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": _digest(content), "size": len(content)}


def _tar_of(name: str, program: Path) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        entry = tar.gettarinfo(program, f"bin/{name}")
        entry.mode, entry.uid, entry.gid, entry.uname, entry.gname = 0o755, 0, 0, "", ""
        with program.open("rb") as file:
            tar.addfile(entry, file)
        temporary = tarfile.TarInfo("tmp")
        temporary.type, temporary.mode = tarfile.DIRTYPE, 0o1777
        tar.addfile(temporary)
    return buffer.getvalue()


def make_certificate(folder: Path, *names: str, days: int = 30) -> tuple[Path, Path]:
    """A certificate that signs itself, for names (``DNS:…``, ``IP:…``), and its key: two PEM files."""
    chain, key = folder / "chain.pem", folder / "key.pem"
    words = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    words += ["-days", f"{days}", "-subj", "/CN=test"]
    words += ["-addext", f"subjectAltName={','.join(names)}", "-keyout", f"{key}", "-out", f"{chain}"]
    subprocess.run(words, check=True, capture_output=True)
    return chain, key


def kept_storage(programs: dict[str, Program]) -> Path:
    """What a registry with an image for each of the programs keeps, made once. Raises ProgramMissing."""
    files = {name: obtain(program) for name, program in programs.items()}

    def build(draft: Path) -> None:
        draft.mkdir()
        with running_registry(draft.parent, "127.0.0.1", free_port(), draft, readonly=False) as registry:
            for name, file in files.items():
                registry.push_program(name, file)

    versions = sorted(f"{name}-{program.version}" for name, program in programs.items())
    content = json.dumps([versions, Path(__file__).read_text()])  # and how a program becomes an image
    storage = keep(f"registry-{hashlib.sha256(content.encode()).hexdigest()[:12]}", build)
    forget_old("registry-*", _KEPT)
    return storage


@contextmanager
def running_registry(folder: Path, host: str, port: int, storage: Path, *, readonly: bool = True) -> Iterator[Registry]:
    """A registry on an address of this host, with what ``storage`` holds; gone afterwards."""
    chain, key = make_certificate(folder, f"IP:{host}")
    config = folder / "config.yml"
    address = f"{host}:{port}"
    told = {"storage": storage, "readonly": json.dumps(readonly), "certificate": chain, "key": key}
    config.write_text(_CONFIG.format(address=address, **told))
    with (folder / "registry.log").open("wb") as log:
        environment = {**os.environ, "OTEL_TRACES_EXPORTER": "none"}  # it would look for a collector
        process = subprocess.Popen(["docker-registry", "serve", config], env=environment, stdout=log, stderr=log)
    try:
        end_s = time.monotonic() + _START_TIMEOUT_S
        while True:
            try:
                requests.get(f"https://{address}/v2/", verify=str(chain), timeout=5).raise_for_status()
                break
            except requests.ConnectionError:
                assert process.poll() is None, (folder / "registry.log").read_text()
                assert time.monotonic() < end_s, "the registry does not answer"
                time.sleep(0.1)
        yield Registry(address, chain)
    finally:
        process.terminate()
        process.wait(10)
