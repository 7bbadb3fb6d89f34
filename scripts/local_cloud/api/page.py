"""Owns ``GET /``: a page on which a person watches servers, images and actions."""

import base64
import hashlib
import html
from collections.abc import Iterable
from typing import Any

import falcon

from scripts.local_cloud.api.images import read_images
from scripts.local_cloud.api.primary_ips import find_of_server
from scripts.local_cloud.api.project import Project

Document = dict[str, Any]

_REFRESH_S = 2
_ACTIONS_SHOWN = 25
_IMAGE_FIELDS = ("type", "status", "image_size", "created")
_COLOURED = ("running", "success", "available", "error", "unavailable")
_STYLE = """
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif; }
body { max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid #8884; }
.running, .success, .available { color: #178a3c; } .error, .unavailable { color: #c62828; }
.none { opacity: .7; }
"""
_STYLE_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()


def _render_table(title: str, columns: tuple[str, ...], rows: Iterable[tuple[object, ...]]) -> str:
    heading = "".join(f'<th scope="col">{column}</th>' for column in columns)
    body = "".join(f"<tr>{''.join(map(_render_cell, row))}</tr>" for row in rows)
    if not body:
        return f'<h2>{title}</h2><p class="none">None.</p>'
    return f"<h2>{title}</h2><table><thead><tr>{heading}</tr></thead><tbody>{body}</tbody></table>"


def _render_cell(value: object) -> str:
    text = html.escape("" if value is None else str(value))
    return f'<td class="{text}">{text}</td>' if text in _COLOURED else f"<td>{text}</td>"


def _describe_resources(action: Document) -> str:
    return ", ".join(f"{each['type']} {each['id']}" for each in action["resources"])


def render_page(project: Project) -> str:
    """The whole page, with the present state in it."""
    servers = []
    for record in project.store.read_all("server"):
        ips = find_of_server(project, record["id"])
        addresses = " ".join(ips[kind]["ip"] for kind in ("ipv4", "ipv6") if kind in ips)
        place = f"{record['server_type']}, {record['location']}"
        servers.append((record["id"], record["name"], record["status"], place, addresses, record["created"]))
    images = [
        (image["id"], image["name"] or image["description"], *(image[field] for field in _IMAGE_FIELDS))
        for image in read_images(project)
    ]
    actions = [
        (each["id"], each["command"], each["status"], _describe_resources(each), (each["error"] or {}).get("message"))
        for each in reversed(project.store.read_latest("action", _ACTIONS_SHOWN))
    ]
    return "".join(
        (
            '<!doctype html><html lang="en"><meta charset="utf-8"><title>Local cloud</title>',
            f'<meta http-equiv="refresh" content="{_REFRESH_S}">',
            f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style><h1>Local cloud</h1>',
            _render_table("Servers", ("ID", "Name", "Status", "Type", "Addresses", "Created"), servers),
            _render_table("Images", ("ID", "Name", "Type", "Status", "GB", "Created"), images),
            _render_table("Latest actions", ("ID", "Command", "Status", "Resources", "Error"), actions),
            "</html>",
        )
    )


class PageResource:
    """``GET /``; needs no token, for who is here already sees the servers."""

    def __init__(self, project: Project):
        self._project = project

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        resp.content_type = falcon.MEDIA_HTML
        resp.text = render_page(self._project)
        resp.set_header(
            "Content-Security-Policy",
            f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; base-uri 'none'; form-action 'none'; "
            "frame-ancestors 'none'",
        )
        resp.set_header("Referrer-Policy", "no-referrer")
