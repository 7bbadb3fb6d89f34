"""Owns the list of what is pinned and where each pin lives, and whether the world still has it."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import requests

from scripts.bake.runs import read_json

_TIMEOUT_S = 20
_MANIFESTS = ", ".join(
    f"application/vnd.{kind}"
    for kind in (
        "oci.image.index.v1+json",
        "oci.image.manifest.v1+json",
        "docker.distribution.manifest.list.v2+json",
        "docker.distribution.manifest.v2+json",
    )
)
_HUB = ("docker.io", "registry-1.docker.io")  # what people write, and where it is


@dataclass(frozen=True)
class Pin:
    """A pinned thing: what fixes it, and its home; ``seen`` is what was found of it outside, empty if nobody looked."""

    kind: str
    name: str
    version: str
    fixed_by: str
    home: str
    source: str = ""
    seen: str = ""
    problem: str = ""

    def line(self) -> str:
        """For a person."""
        told = f"  {self.problem or self.seen}" if self.problem or self.seen else ""
        return f"{self.kind:11}{self.name:32}{self.version:12}{self.fixed_by[:19]:21}{self.home}{told}"

    def render(self) -> dict[str, str]:
        """As JSON."""
        return asdict(self)


def find_pins(tree: Path, pins: Mapping[str, Any]) -> list[Pin]:
    """Every pin of the image, from its one home."""
    found = [Pin("base", pins["base_image"], "", "Hetzner's image of this name", "image/pins.json")]
    found += [
        Pin("container", name, pin["version"], pin["digest"], "image/pins.json", pin["image"])
        for name, pin in pins["images"].items()
    ]
    starter = read_json(tree / "service/starter/starter.json") or {}
    found.append(Pin("model", "starter", "", f"sha256:{starter.get('sha256', '')}", "service/starter/starter.json"))
    found += [
        Pin(
            "model",
            entry["name"],
            "",
            f"sha256:{entry['sha256']}" if "sha256" in entry else f"md5:{entry['md5']} ",
            "service/models.json",
            entry["url"],
        )
        for entry in read_json(tree / "service/models.json") or []
    ]
    requirements = tree / "service/requirements.txt"
    if requirements.exists():
        found += [
            Pin("python", match[1], match[2], "hashes of its files", "service/requirements.txt")
            for match in re.finditer(r"^([A-Za-z0-9._-]+)==([^ ;\\]+)", requirements.read_text(), re.MULTILINE)
        ]
    return found


def look_up(pin: Pin) -> Pin:
    """The same pin, with what its registry or host says. Packages are checked by pip when they are installed."""
    try:
        if pin.kind == "container":
            return replace(pin, **_look_up_image(pin))
        if pin.kind == "model" and pin.source:
            answer = requests.head(pin.source, timeout=_TIMEOUT_S, allow_redirects=True)
            answer.raise_for_status()
            return replace(pin, seen=f"there, {answer.headers.get('Content-Length', '?')} bytes")
    except requests.RequestException as error:
        return replace(pin, problem=f"cannot be looked up: {type(error).__name__}: {str(error)[:120]}")
    return pin


def _look_up_image(pin: Pin) -> dict[str, str]:
    """By the registry's own protocol (https://distribution.github.io/distribution/spec/api/)."""
    host, _, path = pin.source.partition("/")
    base = f"https://{dict([_HUB]).get(host, host)}/v2/{path}/manifests/"
    with requests.Session() as session:
        session.headers["Accept"] = _MANIFESTS
        by_digest = _get_manifest(session, base + pin.fixed_by)
        if by_digest.status_code == 404:
            return {"problem": "the registry does not have this digest any more"}
        by_digest.raise_for_status()
        if f"sha256:{hashlib.sha256(by_digest.content).hexdigest()}" != pin.fixed_by:
            return {"problem": "the registry answers with something else than the digest says"}
        by_tag = _get_manifest(session, base + pin.version)
    if by_tag.ok and f"sha256:{hashlib.sha256(by_tag.content).hexdigest()}" != pin.fixed_by:
        return {"seen": f"there; but {pin.version} is another image by now"}
    return {"seen": "there"}


def _get_manifest(session: requests.Session, url: str) -> requests.Response:
    answer = session.get(url, timeout=_TIMEOUT_S)
    if answer.status_code != 401:
        return answer
    told = dict(re.findall(r'(\w+)="([^"]*)"', answer.headers.get("WWW-Authenticate", "")))
    if "realm" not in told:
        return answer
    token = session.get(
        told["realm"], params={name: told[name] for name in ("service", "scope") if name in told}, timeout=_TIMEOUT_S
    )
    token.raise_for_status()
    told = token.json()
    # Either may be there (https://distribution.github.io/distribution/spec/auth/token/).
    session.headers["Authorization"] = f"Bearer {told.get('token') or told.get('access_token')}"
    return session.get(url, timeout=_TIMEOUT_S)
