"""`packer init image`: Packer finds the plugin that the template names where it looks for it, and takes it.

GitHub cannot be reached; a proxy of ours answers in its place with the three documents that Packer asks for: tags,
checksums, archive (getter.go of packer/plugin-getter/github in https://github.com/hashicorp/packer).
"""

import json
import os
import ssl
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.absent import did_not_run
from tests.commands import find_command
from tests.image.registry import make_certificate
from tests.programs import PACKER, PACKER_PLUGIN_HCLOUD, ProgramMissing, obtain
from tests.typed import type_command

_TAG = f"v{PACKER_PLUGIN_HCLOUD.version}"
_PLUGIN = f"packer-plugin-hcloud_{_TAG}_x5.0_linux_amd64"
_REPOSITORY = "hetznercloud/packer-plugin-hcloud"


def lay_out(folder: Path, plugin: Path) -> None:
    """What GitHub has of a release of the plugin, by the paths of its addresses."""
    tags = folder / "repos" / _REPOSITORY / "git" / "matching-refs" / "tags"
    release = folder / _REPOSITORY / "releases" / "download" / _TAG
    for each in (tags.parent, release):
        each.mkdir(parents=True)
    tags.write_text(json.dumps([{"ref": f"refs/tags/{_TAG}"}]))
    archive = release / f"{_PLUGIN}.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        packed.write(plugin, _PLUGIN)
    sums = release / f"packer-plugin-hcloud_{_TAG}_SHA256SUMS"
    sums.write_text(f"{sha256(archive.read_bytes()).hexdigest()}  {archive.name}\n")


@contextmanager
def stand_in_github(folder: Path, certificate: Path, key: Path) -> Iterator[str]:
    """A proxy that is itself whoever is to be reached through it; yields its URL."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)

    class Handler(SimpleHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def __init__(self, *words: Any) -> None:
            super().__init__(*words, directory=str(folder))

        def do_CONNECT(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.connection = context.wrap_socket(self.connection, server_side=True)
            self.rfile, self.wfile = self.connection.makefile("rb"), self.connection.makefile("wb", buffering=0)
            self.close_connection = False

        def finish(self) -> None:
            super().finish()
            self.connection.close()  # the server knows that one alone from which it was made

        def log_message(self, *words: object) -> None:
            """Nobody reads it."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True  # connections are kept by who asked
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_the_plugin_is_fetched(tmp_path: Path) -> None:
    """Into the folder of plugins, whole and by its checksum; afterwards the template is valid."""
    try:
        program, plugin = obtain(PACKER), obtain(PACKER_PLUGIN_HCLOUD)
    except ProgramMissing as error:
        did_not_run(error)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "packer").symlink_to(program)
    lay_out(tmp_path / "github", plugin)
    certificate, key = make_certificate(tmp_path, "DNS:github.com", "DNS:api.github.com")
    with stand_in_github(tmp_path / "github", certificate, key) as proxy:
        own = {
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "HTTPS_PROXY": proxy,
            "SSL_CERT_FILE": str(certificate),
            "PACKER_PLUGIN_PATH": str(tmp_path / "plugins"),
            "PACKER_CONFIG_DIR": str(tmp_path),
            "CHECKPOINT_DISABLE": "1",
        }
        said = type_command(find_command("packer init image"), 60, environment={**os.environ, **own})
    assert f"Installed plugin github.com/hetznercloud/hcloud {_TAG}" in said
    [installed] = (tmp_path / "plugins").rglob(_PLUGIN)
    assert installed.read_bytes() == plugin.read_bytes()
