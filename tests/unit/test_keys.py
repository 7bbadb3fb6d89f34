"""The key file and the credentials that it proves."""

import base64
import json
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from service.errors import KeysUnusable, Unauthenticated
from service.keys import (
    KeyFile,
    Limits,
    add_key,
    describe_key,
    hash_key,
    parse_credential,
    parse_expiry,
    read_keys,
    revoke_key,
)

NOW = datetime(2026, 11, 25, 12, tzinfo=UTC)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "keys.json"


def bearer(secret: str) -> str:
    return f"Bearer {secret}"


def basic(name: str, secret: str) -> str:
    return "Basic " + base64.b64encode(f"{name}:{secret}".encode()).decode()


def test_key_is_random_and_only_its_hash_is_kept(path: Path) -> None:
    """A key has at least 160 random bits; the file, readable by its owner alone, holds its SHA-256 and not the key."""
    first, second = add_key(path, "a"), add_key(path, "b")
    assert first != second
    assert len(base64.urlsafe_b64decode(first.removeprefix("mllm_"))) * 8 >= 160
    text = path.read_text()
    assert first not in text
    assert first.removeprefix("mllm_") not in text
    assert hash_key(first) in text
    assert path.stat().st_mode & 0o777 == 0o600


def test_key_is_proved_by_bearer_and_basic(path: Path) -> None:
    """Bearer, Basic with the key as password, and Basic with the key as user name and no password."""
    secret = add_key(path, "alice")
    keys = KeyFile(path)
    for header in (bearer(secret), f"bearer  {secret} ", basic("alice", secret), basic(secret, ""), basic("", secret)):
        assert keys.authenticate(header).name == "alice", header


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Bearer nonsense-key",
        "Basic",
        "Basic !!!",
        "Basic " + base64.b64encode(b"\xff\xfe:\xff").decode(),
        "Basic " + base64.b64encode(b":").decode(),
        "Basic " + base64.b64encode(b"nothing").decode(),
        "Digest username=x",
        "Bearer mllm_\u00e9",
        "x" * 8000,
    ],
)
def test_what_proves_nothing(path: Path, header: str | None) -> None:
    """No, half and wrong credentials are refused, and the refusal repeats nothing of them."""
    add_key(path, "alice")
    with pytest.raises(Unauthenticated) as caught:
        KeyFile(path).authenticate(header)
    assert header is None or len(header) < 12 or header[7:] not in str(caught.value)


def test_name_must_be_the_keys_own(path: Path) -> None:
    """With Basic, a key under another name than its own is refused: a name that is ignored would be a lie."""
    secret = add_key(path, "alice")
    with pytest.raises(Unauthenticated):
        KeyFile(path).authenticate(basic("bob", secret))


def test_expired_key_is_told_so(path: Path) -> None:
    """A key past its time is refused with the reason, at the very second."""
    secret = add_key(path, "alice", expires=datetime.now(UTC) - timedelta(seconds=1))
    with pytest.raises(Unauthenticated, match="expired"):
        KeyFile(path).authenticate(bearer(secret))
    later = add_key(path, "bob", expires=datetime.now(UTC) + timedelta(hours=1))
    assert KeyFile(path).authenticate(bearer(later)).name == "bob"


def test_changes_are_seen_at_once(path: Path) -> None:
    """The same object sees keys come and go."""
    first = add_key(path, "first")
    keys = KeyFile(path)
    assert keys.authenticate(bearer(first)).name == "first"
    second = add_key(path, "second", limits=Limits(parallel=2))
    assert keys.authenticate(bearer(second)).limits == Limits(parallel=2)
    revoke_key(path, "first")
    with pytest.raises(Unauthenticated):
        keys.authenticate(bearer(first))
    assert keys.authenticate(bearer(second)).name == "second"


def test_what_was_revoked_stays_so(path: Path) -> None:
    """Also if somebody writes the key file anew, with the key in it; a damaged list lets nobody in."""
    revoked = path.with_name("revoked")
    first, second = add_key(path, "first"), add_key(path, "second")
    before, keys = path.read_text(), KeyFile(path, revoked)
    assert keys.authenticate(bearer(first)).name == "first"
    revoke_key(path, "first", revoked)
    path.write_text(before)
    with pytest.raises(Unauthenticated):
        keys.authenticate(bearer(first))
    assert keys.authenticate(bearer(second)).name == "second"
    revoke_key(path, "second", revoked)
    assert revoked.read_text().split() == sorted((hash_key(first), hash_key(second)))
    assert revoked.stat().st_mode & 0o777 == 0o600
    revoked.write_text("nonsense\n")
    path.write_text(before)
    with pytest.raises(KeysUnusable):
        keys.authenticate(bearer(second))


@pytest.mark.parametrize(
    "content",
    [
        None,
        "",
        "{",
        "[]",
        "null",
        '{"keys": []}',
        '{"keys": 5}',
        '{"keys": [{}]}',
        '{"keys": [], "more": 1}',
        '{"keys": [null]}',
        "[" * 100_000,
    ],
)
def test_unusable_file_refuses_everything(path: Path, content: str | None) -> None:
    """Missing, empty, damaged: nobody gets in, also not with a key that was good before."""
    secret = add_key(path, "alice")
    keys = KeyFile(path)
    assert keys.authenticate(bearer(secret)).name == "alice"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(KeysUnusable):
        keys.authenticate(bearer(secret))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", ""),
        ("name", "a:b"),
        ("name", 5),
        ("sha256", "00"),
        ("sha256", None),
        ("scopes", ["root"]),
        ("scopes", 5),
        ("created", "yesterday"),
        ("created", "2026-01-01T00:00:00"),
        ("expires", "soon"),
        ("limits", {"parallel": 0}),
        ("limits", {"parallel": "2"}),
        ("limits", {"parallel": True}),
        ("limits", {"speed": 1}),
        ("colour", "red"),
    ],
)
def test_one_wrong_entry_makes_the_file_unusable(path: Path, field: str, value: object) -> None:
    """Nothing in the file is passed over: a limit that is misspelt would be no limit."""
    add_key(path, "alice")
    document = json.loads(path.read_text())
    document["keys"][0][field] = value
    path.write_text(json.dumps(document))
    with pytest.raises(KeysUnusable):
        read_keys(path)


def test_two_keys_of_one_name_are_refused(path: Path) -> None:
    """A name is given once, by the command and in the file."""
    add_key(path, "alice")
    with pytest.raises(ValueError, match="already"):
        add_key(path, "alice")
    document = json.loads(path.read_text())
    path.write_text(json.dumps({"keys": document["keys"] * 2}))
    with pytest.raises(KeysUnusable):
        read_keys(path)


def test_failed_write_keeps_the_old_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk leaves the keys as they were and no draft behind."""
    add_key(path, "alice")
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(KeysUnusable, match="No space"):
        add_key(path, "bob")
    assert path.read_bytes() == before
    assert sorted(file.name for file in path.parent.iterdir()) == ["keys.json", "keys.json.lock"]


@pytest.mark.parametrize("name", ["", "a b", "a:b", "-a", "ä", "x" * 65, "a/b", "a\n"])
def test_names_that_are_none(path: Path, name: str) -> None:
    """A name is short and plain, for it stands in headers and logs."""
    with pytest.raises(ValueError, match="must be 1 to 64 letters"):
        add_key(path, name)
    assert not path.exists()


@pytest.mark.parametrize(
    ("text", "expires"),
    [
        ("30d", NOW + timedelta(days=30)),
        ("12h", NOW + timedelta(hours=12)),
        ("2026-11-25", datetime(2026, 11, 26, tzinfo=UTC)),
        ("2027-01-31T12:00Z", datetime(2027, 1, 31, 12, tzinfo=UTC)),
        ("2027-01-31T12:00+02:00", datetime(2027, 1, 31, 10, tzinfo=UTC)),
    ],
)
def test_expiry(text: str, expires: datetime) -> None:
    """A span from now, a day up to its end, or a time."""
    assert parse_expiry(text, NOW) == expires


@pytest.mark.parametrize("text", ["", "0d", "30", "d", "never", "2026-11-24", "2026-13-01", "99999d1", "9999-12-31x"])
def test_expiries_that_are_none(text: str) -> None:
    """What is no time, or in the past, is refused."""
    with pytest.raises(ValueError, match=r"must be like|is in the past"):
        parse_expiry(text, NOW)


def test_description_holds_no_hash(path: Path) -> None:
    """What is listed of a key is all but its hash."""
    secret = add_key(path, "alice", limits=Limits(tokens_per_day=5))
    described = describe_key(read_keys(path)[0])
    assert described["name"] == "alice"
    assert described["limits"] == {"tokens_per_day": 5}
    assert hash_key(secret) not in json.dumps(described)


def test_credential_without_a_separator_is_refused() -> None:
    """Basic needs the colon."""
    with pytest.raises(Unauthenticated):
        parse_credential("Basic " + base64.b64encode(b"abc").decode())


@pytest.mark.parametrize("kind", ["symbolic", "hard"])
def test_a_link_where_the_lock_should_be_is_refused(tmp_path: Path, kind: str) -> None:
    """Root would give the file behind it to the service's user, who laid the link."""
    victim, folder = tmp_path / "shadow", tmp_path / "state"
    victim.write_text("root's")
    folder.mkdir()
    lock = folder / "keys.json.lock"
    (lock.symlink_to if kind == "symbolic" else lock.hardlink_to)(victim)
    before = victim.stat()
    with pytest.raises(KeysUnusable, match="cannot be written"):
        add_key(folder / "keys.json", "a", frozenset({"generate"}), None, Limits())
    assert victim.read_text() == "root's"
    assert (victim.stat().st_uid, victim.stat().st_mode) == (before.st_uid, before.st_mode)
    assert not (folder / "keys.json").exists()
