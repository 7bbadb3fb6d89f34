"""Owns the stand-in of a model hub: files of a folder over HTTPS, for what fetches a model by its address."""

import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import md5
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


@contextmanager
def running_hub(folder: Path, host: str, certificate: Path, key: Path) -> Iterator[str]:
    """Serves a folder at an address or name of this machine, with this certificate; yields the URL of its files."""

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *words: Any) -> None:
            super().__init__(*words, directory=str(folder))

        def log_message(self, *words: object) -> None:
            """Nobody reads it."""

    server = ThreadingHTTPServer((host, 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"https://{host}:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def point_entry(catalogue: list[dict[str, Any]], name: str, url: str, content: bytes) -> dict[str, Any]:
    """Has a model of the catalogue be this content, known by its MD5 as the large ones are; the entry."""
    [entry] = [each for each in catalogue if each["name"] == name]
    entry |= {"url": url, "size_bytes": len(content), "md5": md5(content, usedforsecurity=False).hexdigest()}
    return entry
