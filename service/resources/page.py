"""Owns the page at ``/``: its files, read once, and the headers that keep anything else from running in it."""

import hashlib
from pathlib import Path

import falcon

_FOLDER = Path(__file__).parents[1] / "page"

# Each path with its file and media type; the page names its parts relative to itself, so that a proxy may move it.
FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.svg": ("page.svg", "image/svg+xml"),
}

_POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "connect-src": "'self'",
    "img-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
    # An answer may hold anything: with these no text becomes markup or code, even by a mistake in the page.
    "require-trusted-types-for": "'script'",
    "trusted-types": "'none'",
}

_HEADERS = {
    "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in _POLICY.items()),
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    # Kept, but asked for each time: after an update no old script meets a new page.
    "Cache-Control": "no-cache",
}

# A browser sends the one that it was given; of half a megabyte, which 64 fields hold, the parser takes 0.2 s.
_LONGEST_KNOWN = 1024


class PageResource:
    """``GET`` and ``HEAD`` of one file of the page."""

    def __init__(self, file: str, media_type: str):
        self._media_type = media_type
        self._data = (_FOLDER / file).read_bytes()
        self._etag = falcon.ETag(hashlib.sha256(self._data).hexdigest()[:32])

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        resp.set_headers(_HEADERS)
        resp.etag = self._etag
        few = len(req.get_header("If-None-Match") or "") <= _LONGEST_KNOWN
        if few and any(known in ("*", self._etag) for known in req.if_none_match or ()):
            resp.status = 304
            return
        resp.content_type = self._media_type
        resp.data = self._data

    on_head = on_get


def add_page(app: falcon.App[falcon.Request, falcon.Response]) -> None:
    """Adds the page's routes."""
    for path, (file, media_type) in FILES.items():
        app.add_route(path, PageResource(file, media_type))
