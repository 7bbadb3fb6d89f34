"""The page's files and how they are served: caching, the policy, nothing from outside, labels and contrast."""

import re
from html.parser import HTMLParser
from pathlib import Path

import falcon
import falcon.testing
import pytest

from service.resources import page
from service.resources.page import add_page

FOLDER = Path(page.__file__).parents[1] / "page"
PATHS = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.svg": ("page.svg", "image/svg+xml"),
}


@pytest.fixture(scope="module")
def client() -> falcon.testing.TestClient:
    app = falcon.App()
    add_page(app)
    return falcon.testing.TestClient(app)


class Elements(HTMLParser):
    """All elements of a document with their attributes, and the text inside scripts and styles."""

    def __init__(self, text: str):
        super().__init__()
        self.found: list[tuple[str, dict[str, str]]] = []
        self.code = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        if self.cdata_elem is not None:
            self.code += data.strip()


@pytest.fixture(scope="module")
def elements() -> Elements:
    return Elements((FOLDER / "index.html").read_text())


def test_all_files_are_served() -> None:
    """Every file in the folder has a path here, so no file is left out of the tests below."""
    assert {file for file, _ in PATHS.values()} == {path.name for path in FOLDER.iterdir()}


@pytest.mark.parametrize("path", PATHS)
def test_files(client: falcon.testing.TestClient, path: str) -> None:
    """Each file comes as it is, with its type, and must be asked for again each time."""
    file, media_type = PATHS[path]
    result = client.simulate_get(path)
    assert result.status_code == 200
    assert result.content == (FOLDER / file).read_bytes()
    assert result.headers["content-type"] == media_type
    assert result.headers["cache-control"] == "no-cache"


@pytest.mark.parametrize("path", PATHS)
def test_head(client: falcon.testing.TestClient, path: str) -> None:
    """HEAD gives GET's headers and no body."""
    head, get = client.simulate_head(path), client.simulate_get(path)
    assert head.content == b""
    assert dict(head.headers) == dict(get.headers)


@pytest.mark.parametrize("path", PATHS)
def test_unchanged_files_are_not_sent_again(client: falcon.testing.TestClient, path: str) -> None:
    """A known strong ETag gets a 304 that carries the policy; another one gets the file."""
    etag = client.simulate_get(path).headers["etag"]
    assert re.fullmatch('"[0-9a-f]{32}"', etag)
    for known in (etag, f'"other", {etag}', f"W/{etag}", "*"):
        result = client.simulate_get(path, headers={"If-None-Match": known})
        assert (result.status_code, result.content) == (304, b"")
        assert result.headers["etag"] == etag
        assert "default-src 'none'" in result.headers["content-security-policy"]
    # One that is not there, and more than any browser knows, which it would take long to look through.
    for unknown in ('"other"', '"other", ' * 200 + etag):
        assert client.simulate_get(path, headers={"If-None-Match": unknown}).status_code == 200


@pytest.mark.parametrize("path", PATHS)
def test_policy(client: falcon.testing.TestClient, path: str) -> None:
    """Nothing is allowed but the service's own files and API; no frame, no form, no markup out of text."""
    headers = client.simulate_get(path).headers
    policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
    own = dict.fromkeys(("script-src", "style-src", "connect-src", "img-src"), "'self'")
    none = dict.fromkeys(("default-src", "base-uri", "form-action", "frame-ancestors", "trusted-types"), "'none'")
    assert policy == {**own, **none, "require-trusted-types-for": "'script'"}
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["x-frame-options"] == "DENY"
    assert headers["cross-origin-opener-policy"] == "same-origin"


def test_nothing_from_outside(elements: Elements) -> None:
    """No file names another host, and what the document refers to is served here, relative to the page."""
    for path in FOLDER.iterdir():
        text = path.read_text().replace('xmlns="http://www.w3.org/2000/svg"', "")
        assert not re.search(r"""https?://|["'`(]//|@import|\burl\(["'a-z]""", text), path.name
    known = {path.removeprefix("/") for path in PATHS} | {"ready", "version", "metrics"}
    assert {value for _, attributes in elements.found for name, value in attributes.items() if name in ("src", "href")}
    for _, attributes in elements.found:
        assert attributes.get("src", "page.js") in known
        assert attributes.get("href", "page.css") in known


def test_nothing_inline(elements: Elements) -> None:
    """The document holds no script, no style and no handler of its own, which the policy would not run anyway."""
    assert elements.code == ""
    assert not [name for _, attributes in elements.found for name in attributes if name == "style" or name[:2] == "on"]


def test_the_script_neither_stores_nor_parses_markup() -> None:
    """Answers become text nodes and the key stays in its field: the script does not even name the other ways."""
    script = re.sub("(?m)^.*import (json|os|urllib).*$", "", (FOLDER / "page.js").read_text())  # its Python sample
    ways = "innerHTML|outerHTML|insertAdjacentHTML|document.write|eval|Storage|cookie|indexedDB|history|import"
    assert re.findall(rf"\b\w*({ways})\b", script) == []


def test_every_field_has_a_label(elements: Elements) -> None:
    """Each field is named by a label, and every reference from one element to another finds it."""
    ids = [attributes["id"] for _, attributes in elements.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    labelled = {attributes["for"] for tag, attributes in elements.found if tag == "label"}
    assert {attributes["id"] for tag, attributes in elements.found if tag in ("input", "textarea")} == labelled
    for _, attributes in elements.found:
        for name in ("aria-labelledby", "aria-describedby"):
            assert attributes.get(name, ids[0]) in ids


def _luminance(colour: str) -> float:
    """Relative luminance as WCAG 2 defines it."""
    parts = [int(colour[index : index + 2], 16) / 255 for index in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(scheme: str) -> None:
    """In both schemes text has the contrast of WCAG AA (4.5), and edges of fields and signs have 3."""
    light, dark = re.findall(r":root \{(.*?)\}", (FOLDER / "page.css").read_text(), re.DOTALL)
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", light if scheme == "light" else dark))
    texts = [(text, ground) for text in ("text", "quiet", "accent", "error") for ground in ("ground", "surface")]
    texts += [("error", "error-ground"), ("text", "note-ground"), ("on-accent", "accent")]
    signs = [("edge", "ground"), ("edge", "surface"), ("good", "ground"), ("warn", "ground")]
    for pairs, least in ((texts, 4.5), (signs, 3.0)):
        for pair in pairs:
            dim, bright = sorted(_luminance(colours[name]) for name in pair)
            assert (bright + 0.05) / (dim + 0.05) >= least, pair
