"""SSH keys: fingerprints, uniqueness, changes."""

import pytest

from scripts.local_cloud.api.ssh_keys import compute_fingerprint
from tests.unit.local_cloud.conftest import PUBLIC_KEY, Cloud


def test_the_fingerprint_is_the_md5_of_the_key(cloud: Cloud) -> None:
    """As ``ssh-keygen -l -E md5`` shows it, whatever the comment is."""
    fingerprint = compute_fingerprint(PUBLIC_KEY)
    assert fingerprint is not None
    assert fingerprint == compute_fingerprint(" ".join(PUBLIC_KEY.split()[:2]))
    assert len(fingerprint.split(":")) == 16


@pytest.mark.parametrize(
    "line",
    [
        "",
        "ssh-ed25519",
        "ssh-ed25519 !!!!",
        "ssh-ed25519 AAAA",
        PUBLIC_KEY.replace("ssh-ed25519", "ssh-rsa", 1),
        f"{PUBLIC_KEY}\n{PUBLIC_KEY}",
        "-----BEGIN OPENSSH PRIVATE KEY-----",
    ],
)
def test_what_is_no_public_key_is_refused(cloud: Cloud, line: str) -> None:
    """Two lines too: a second one could smuggle in options."""
    assert compute_fingerprint(line) is None
    assert cloud.refuse("POST", "/ssh_keys", {"name": "k", "public_key": line}) == (422, "invalid_input")


def test_names_and_keys_are_unique(cloud: Cloud) -> None:
    """409 uniqueness_error for either; a deleted key frees both. A key is given back with its end of line."""
    key = cloud.post("/ssh_keys", {"name": "k", "public_key": f" {PUBLIC_KEY}\n"})["ssh_key"]
    assert key["public_key"] == f" {PUBLIC_KEY}\n"
    assert cloud.refuse("POST", "/ssh_keys", {"name": "l", "public_key": PUBLIC_KEY}) == (409, "uniqueness_error")
    assert cloud.get("/ssh_keys", fingerprint=key["fingerprint"])["ssh_keys"] == [key]
    assert cloud.call("DELETE", f"/v1/ssh_keys/{key['id']}").status_code == 204
    assert cloud.refuse("GET", f"/ssh_keys/{key['id']}") == (404, "not_found")
    assert cloud.post("/ssh_keys", {"name": "k", "public_key": PUBLIC_KEY})["ssh_key"]["id"] > key["id"]


def test_name_and_labels_can_be_changed(cloud: Cloud) -> None:
    """What is not sent stays."""
    key = cloud.post("/ssh_keys", {"name": "k", "public_key": PUBLIC_KEY, "labels": {"a": "b"}})["ssh_key"]
    changed = cloud.call("PUT", f"/v1/ssh_keys/{key['id']}", {"name": "l"}).json["ssh_key"]
    assert changed == {**key, "name": "l"}
    assert cloud.call("PUT", f"/v1/ssh_keys/{key['id']}", {"labels": {}}).json["ssh_key"]["labels"] == {}
