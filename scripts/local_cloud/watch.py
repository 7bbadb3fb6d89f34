"""Owns what a person sees in the terminal while a cloud runs: servers, images and actions as they change."""

from typing import Any

from scripts.local_cloud.api.images import read_images
from scripts.local_cloud.api.primary_ips import find_of_server
from scripts.local_cloud.api.project import Project

# What changes between two looks is among the newest; a cloud that has run for weeks has thousands.
_ACTIONS_SHOWN = 200


def describe(project: Project) -> dict[tuple[str, int], str]:
    """Each thing that there is, by kind and id, with one line that says how it is."""
    lines = {}
    for server in project.store.read_all("server"):
        address = find_of_server(project, server["id"]).get("ipv4", {}).get("ip", "no IPv4 address")
        lines["server", server["id"]] = f"{server['name']}: {server['status']}, {server['server_type']}, {address}"
    for image in read_images(project):
        if image["type"] == "snapshot":
            size = "" if image["image_size"] is None else f", {image['image_size']:.2f} GB"
            lines["image", image["id"]] = f"{image['description']}: {image['status']}{size}"
    for action in project.store.read_latest("action", _ACTIONS_SHOWN):
        error = f": {action['error']['message']}" if action.get("error") else ""
        about = ", ".join(f"{each['type']} {each['id']}" for each in action["resources"])
        lines["action", action["id"]] = f"{action['command']} of {about}: {action['status']}{error}"
    return lines


def changes(before: dict[tuple[str, int], str], now: dict[tuple[str, int], str]) -> list[str]:
    """The lines that tell what has changed between two looks."""
    told: list[Any] = [(key, line) for key, line in now.items() if before.get(key) != line]
    told += [(key, "gone") for key in before if key not in now and key[0] != "action"]
    return [_printable(f"{kind} {number}  {line}") for (kind, number), line in told]


def _printable(line: str) -> str:
    """Without what would steer the terminal: descriptions are anybody's text."""
    return "".join(character if character.isprintable() else "\ufffd" for character in line)
