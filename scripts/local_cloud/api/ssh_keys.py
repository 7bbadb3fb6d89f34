"""Owns SSH keys."""

import base64
import binascii
import hashlib
import re
from typing import Any

import falcon

from scripts.local_cloud.api.bodies import read_fields
from scripts.local_cloud.api.clock import render_now
from scripts.local_cloud.api.listing import answer_list, filter_equal, filter_labels
from scripts.local_cloud.api.project import Project

Document = dict[str, Any]

_KINDS = re.compile(
    r"ssh-(rsa|ed25519|dss)|ecdsa-sha2-nistp(256|384|521)|sk-(ssh-ed25519|ecdsa-sha2-nistp256)@openssh\.com"
)
_NAME_USED = "SSH key name is already used"


def compute_fingerprint(public_key: str) -> str | None:
    """The MD5 fingerprint of an OpenSSH line, bytes parted by colons; None if it is no such line."""
    words = public_key.split(None, 2)
    if "\n" in public_key.strip() or len(words) < 2 or not _KINDS.fullmatch(words[0]):
        return None
    try:
        blob = base64.b64decode(words[1], validate=True)
    except binascii.Error:
        return None
    kind = words[0].encode()
    if not blob.startswith(len(kind).to_bytes(4, "big") + kind) or len(blob) < len(kind) + 8:
        return None
    return hashlib.md5(blob, usedforsecurity=False).digest().hex(":")


class SshKeys:
    """``/ssh_keys`` and its members."""

    def __init__(self, project: Project):
        self._project, self._store = project, project.store

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        found = filter_equal(req, self._store.read_all("ssh_key"), "name")
        found = filter_labels(req, filter_equal(req, found, "fingerprint"))
        answer_list(req, resp, "ssh_keys", found, ("id", "name", "created"))

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        fields = read_fields(req)
        name = fields.name(required=True)
        # Kept as it came: Terraform compares it, its end of line too.
        public_key = fields.text("public_key", required=True) or ""
        labels = fields.labels() or {}
        fingerprint = compute_fingerprint(public_key)
        if fingerprint is None and fields.has("public_key"):
            fields.blame("public_key", "must be a public key in OpenSSH format")
        fields.check()
        with self._store.transaction():
            key: Document = {"name": name, "fingerprint": fingerprint, "public_key": public_key, "labels": labels}
            others = self._store.read_all("ssh_key")
            same = "SSH key with the same fingerprint already exists"
            self._project.require_unique(others, key, "fingerprint", same)
            self._project.require_unique(others, key, "name", _NAME_USED)
            key = {"id": self._store.next_id(), **key, "created": render_now()}
            self._store.put("ssh_key", key)
        resp.status = falcon.HTTP_201
        resp.media = {"ssh_key": key}

    def on_get_member(self, req: falcon.Request, resp: falcon.Response, key_id: int) -> None:
        resp.media = {"ssh_key": self._project.find("ssh_key", key_id)}

    def on_put_member(self, req: falcon.Request, resp: falcon.Response, key_id: int) -> None:
        fields = read_fields(req)
        name, labels = fields.name(), fields.labels()
        fields.check()
        with self._store.transaction():
            key = self._project.find("ssh_key", key_id)
            key.update(name=name or key["name"], labels=key["labels"] if labels is None else labels)
            self._project.require_unique(self._store.read_all("ssh_key"), key, "name", _NAME_USED)
            self._store.put("ssh_key", key)
        resp.media = {"ssh_key": key}

    def on_delete_member(self, req: falcon.Request, resp: falcon.Response, key_id: int) -> None:
        with self._store.transaction():
            self._project.find("ssh_key", key_id)
            self._store.delete("ssh_key", key_id)
        resp.status = falcon.HTTP_204


def add_routes(app: falcon.App[falcon.Request, falcon.Response], prefix: str, project: Project) -> None:
    """Adds the routes."""
    resource = SshKeys(project)
    app.add_route(f"{prefix}/ssh_keys", resource)
    app.add_route(f"{prefix}/ssh_keys/{{key_id:int}}", resource, suffix="member")
