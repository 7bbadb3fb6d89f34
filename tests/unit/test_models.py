"""Names and paths of models, and the proof that an opened file is the expected one."""

import errno
import fcntl
import hashlib
import io
import json
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from service import models
from service.errors import ModelRefused
from service.models import Entry, load_catalogue, open_verified, resolve

CONTENT = b"the content of a model file" * 1000
DIGEST = hashlib.sha256(CONTENT).hexdigest()
LONG_AGO_NS = 10_000_000_000  # 10 s, well beyond the bound for racy timestamps


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def stamps(tmp_path: Path) -> Path:
    return tmp_path / "stamps"


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the files of the test be older than they are, for stamps are only written for files at rest."""
    now_ns = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: now_ns() + LONG_AGO_NS)


def verify(path: Path, stamps: Path, sha256: str | None = None) -> bool:
    """Open and close again; return whether the file had to be hashed."""
    verified = open_verified(path, sha256, stamps)
    verified.file.close()
    assert verified.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    return verified.hashed


def only_stamp(stamps: Path) -> Path:
    (stamp,) = stamps.iterdir()
    return stamp


# Catalogue


def test_catalogue_is_sound() -> None:
    """Every entry has a digest of the right length, an HTTPS address that ends in its file, and a size."""
    catalogue = load_catalogue()
    assert "llama-3-8b-instruct" in catalogue
    for name, entry in catalogue.items():
        assert name == entry.name == name.lower()
        assert entry.url.startswith("https://")
        assert entry.url.endswith("/" + entry.file)
        assert entry.file.endswith(".gguf")
        assert entry.size_bytes > 500_000_000
        assert entry.ram_gb * 1e9 > entry.size_bytes
        assert (len(entry.md5 or ""), len(entry.sha256 or "")) in {(32, 0), (0, 64)}
    assert len({entry.file for entry in catalogue.values()}) == len(catalogue)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"url": "http://example.org/a.gguf"}, "not HTTPS"),
        ({"md5": None}, "no digest"),
        ({"file": "../a.gguf"}, "holds a folder"),
    ],
)
def test_unsound_catalogue_is_an_error(change: dict[str, str], problem: str, tmp_path: Path) -> None:
    """An entry without HTTPS or digest, or that leaves the folder, is a mistake in the catalogue."""
    entry = {"name": "a", "file": "a.gguf", "url": "https://example.org/a.gguf", "size_bytes": 1, "ram_gb": 1}
    path = tmp_path / "models.json"
    path.write_text(json.dumps([entry | {"md5": "0" * 32} | change]))
    with pytest.raises(ValueError, match=problem):
        load_catalogue(path)


def test_name_means_a_file_in_the_cache(tmp_path: Path) -> None:
    """A name of the catalogue gives its place in the cache and, if published, its SHA-256."""
    known = resolve("deepseek-r1-distill-llama-8b", tmp_path)
    assert known.path == tmp_path / "DeepSeek-R1-Distill-Llama-8B-Q4_0.gguf"
    assert known.entry is not None
    assert known.sha256 == known.entry.sha256 is not None


def test_recorded_digest_stands_in_for_an_unpublished_one(tmp_path: Path) -> None:
    """For a model published with an MD5 only, the SHA-256 recorded beside the file is expected later."""
    first = resolve("llama-3.2-1b-instruct", tmp_path)
    assert first.sha256 is None
    first.path.with_name(first.path.name + ".sha256").write_text(f"{DIGEST}  {first.path.name}\n")
    assert resolve("llama-3.2-1b-instruct", tmp_path).sha256 == DIGEST


@pytest.mark.parametrize("record", ["", "not a digest\n", "\u00e4" * 64])
def test_unreadable_record_is_no_digest(record: str, tmp_path: Path) -> None:
    """A record that holds no SHA-256 is taken as none."""
    path = resolve("llama-3.2-1b-instruct", tmp_path).path
    path.with_name(path.name + ".sha256").write_text(record, encoding="utf-8")
    assert resolve("llama-3.2-1b-instruct", tmp_path).sha256 is None


@pytest.mark.parametrize("text", ["models/a.gguf", "a.gguf", "/absolute/a", "./starter"])
def test_path_means_that_file(text: str, tmp_path: Path) -> None:
    """A text with a folder or with the suffix .gguf is a path, whether or not the file is there."""
    assert resolve(text, tmp_path) == models.ModelFile(Path(text), None, None)


def test_existing_file_needs_no_suffix(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file in the working folder is found by its bare name."""
    model.rename(tmp_path / "mymodel")
    monkeypatch.chdir(tmp_path)
    assert resolve("mymodel", tmp_path).path == Path("mymodel")


def test_unknown_name_lists_the_known_ones(tmp_path: Path) -> None:
    """A text that is neither is refused with every name that could be served, and with no other."""
    with pytest.raises(ModelRefused) as refusal:
        resolve("lama-3", tmp_path)
    listed = str(refusal.value).rpartition(": ")[2].split(", ")
    servable = [name for name, entry in load_catalogue().items() if entry.unloadable is None]
    assert listed == ["starter", *servable]


def test_model_that_the_engine_cannot_load_says_why(tmp_path: Path) -> None:
    """A published model that this engine cannot load is refused before gigabytes are fetched."""
    with pytest.raises(ModelRefused, match="pre-tokenizer"):
        resolve("deepseek-r1-distill-qwen-1.5b", tmp_path)


def test_starter_is_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedded model and its digest are described beside it."""
    (tmp_path / "starter.json").write_text(json.dumps({"file": "starter.gguf", "sha256": DIGEST, "size_bytes": 1}))
    monkeypatch.setattr(models, "STARTER_DIR", tmp_path)
    assert resolve("starter", tmp_path / "cache") == models.ModelFile(tmp_path / "starter.gguf", DIGEST, None)


@pytest.mark.parametrize("description", [None, "{", "[]", "{}"])
def test_starter_without_description_is_refused(
    description: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy of the service without the starter model says so in one line."""
    if description is not None:
        (tmp_path / "starter.json").write_text(description)
    monkeypatch.setattr(models, "STARTER_DIR", tmp_path)
    with pytest.raises(ModelRefused, match="starter model"):
        resolve("starter", tmp_path)


def test_importing_the_module_does_not_import_requests() -> None:
    """The web server's process stays small: only a fetch imports the HTTP client."""
    source = Path(models.__file__).read_text(encoding="utf-8")
    top_level = [line for line in source.splitlines() if line.startswith(("import ", "from "))]
    assert not [line for line in top_level if any(name in line for name in ("requests", "urllib3", "tqdm"))]


# Verification


def test_file_is_opened_once_and_hashed(model: Path, stamps: Path) -> None:
    """The file comes back open at its beginning, with digest and size, and closes in a child program."""
    verified = open_verified(model, DIGEST.upper(), stamps)
    with verified.file as file:
        assert (verified.sha256, verified.size_bytes, verified.hashed) == (DIGEST, len(CONTENT), True)
        assert fcntl.fcntl(file.fileno(), fcntl.F_GETFD) & fcntl.FD_CLOEXEC
        assert os.get_blocking(file.fileno())
        assert file.read() == CONTENT


def test_swap_after_the_check_changes_nothing(model: Path, stamps: Path) -> None:
    """What is put at the path after the check is not what the descriptor's path in /proc leads to."""
    with open_verified(model, DIGEST, stamps).file as file:
        other = model.with_name("other")
        other.write_bytes(b"something else")
        other.replace(model)
        assert Path(f"/proc/self/fd/{file.fileno()}").read_bytes() == CONTENT


def test_wrong_digest_is_refused(model: Path, stamps: Path) -> None:
    """Another content is refused with both digests, shortened."""
    with pytest.raises(ModelRefused) as refusal:
        open_verified(model, "ab" * 32, stamps)
    assert DIGEST[:12] in str(refusal.value)
    assert "abababababab..." in str(refusal.value)
    assert DIGEST not in str(refusal.value)


@pytest.mark.parametrize("sha256", ["", "abc", "g" * 64, DIGEST + "0", "md5:" + "0" * 60])
def test_expected_digest_must_be_one(sha256: str, model: Path, stamps: Path) -> None:
    """A text that is no SHA-256 cannot be what is expected."""
    with pytest.raises(ModelRefused, match="not a SHA-256"):
        open_verified(model, sha256, stamps)


@pytest.mark.usefixtures("later")
def test_stamp_spares_hashing(model: Path, stamps: Path) -> None:
    """A file is hashed the first time, and not again while it stays as it is."""
    assert verify(model, stamps) is True
    assert verify(model, stamps) is False
    assert verify(model, stamps, DIGEST) is False
    assert stat.S_IMODE(only_stamp(stamps).stat().st_mode) == 0o600
    assert stat.S_IMODE(stamps.stat().st_mode) == 0o700
    with pytest.raises(ModelRefused, match="not the expected one"):
        verify(model, stamps, "0" * 64)


def _append_byte(model: Path) -> None:
    with model.open("ab") as file:
        file.write(b"x")


def _change_keeping_times(model: Path) -> None:
    before = model.stat()
    with model.open("r+b") as file:
        file.write(b"T")
    os.utime(model, ns=(before.st_atime_ns, before.st_mtime_ns))


def _replace_keeping_times(model: Path) -> None:
    before = model.stat()
    other = model.with_name("other")
    other.write_bytes(CONTENT.upper())
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(model)


@pytest.mark.usefixtures("later")
@pytest.mark.parametrize("change", [_append_byte, _change_keeping_times, _replace_keeping_times, Path.touch])
def test_changed_file_is_hashed_again(change: Callable[[Path], None], model: Path, stamps: Path) -> None:
    """Any change is noticed, even one of equal length whose times were set back."""
    verify(model, stamps)
    time.sleep(0.02)  # beyond the granularity of the file system's clock
    change(model)
    assert verify(model, stamps) is True


def test_file_changed_a_moment_ago_gets_no_stamp(model: Path, stamps: Path) -> None:
    """Within two seconds of a change another could leave the same times, so nothing is remembered yet."""
    assert verify(model, stamps) is True
    assert verify(model, stamps) is True
    assert not stamps.exists()


def test_file_from_the_future_gets_no_stamp(model: Path, stamps: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that seems younger than now, after the clock was set back, is hashed every time."""
    now_ns = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: now_ns() - LONG_AGO_NS)
    assert verify(model, stamps) is True
    assert verify(model, stamps) is True


def _corrupt(stamp: Path, **changes: object) -> None:
    stamp.write_text(json.dumps(json.loads(stamp.read_text()) | changes))


@pytest.mark.usefixtures("later")
@pytest.mark.parametrize(
    "spoil",
    [
        lambda stamps: only_stamp(stamps).write_text("{"),
        lambda stamps: only_stamp(stamps).write_text("[]"),
        lambda stamps: only_stamp(stamps).write_text("[" * 3000),
        lambda stamps: only_stamp(stamps).write_bytes(b"\xff" * 10),
        lambda stamps: only_stamp(stamps).chmod(0o620),
        lambda stamps: only_stamp(stamps).chmod(0o602),
        lambda stamps: stamps.chmod(0o770),
        lambda stamps: stamps.chmod(0o707),
        lambda stamps: _corrupt(only_stamp(stamps), device=0),
        lambda stamps: _corrupt(only_stamp(stamps), inode=0),
        lambda stamps: _corrupt(only_stamp(stamps), size_bytes=0),
        lambda stamps: _corrupt(only_stamp(stamps), mtime_ns=0),
        lambda stamps: _corrupt(only_stamp(stamps), ctime_ns=0),
        lambda stamps: _corrupt(only_stamp(stamps), extra=0),
        lambda stamps: _corrupt(only_stamp(stamps), sha256="short"),
        lambda stamps: _corrupt(only_stamp(stamps), sha256=5),
    ],
)
def test_stamp_that_cannot_be_believed_is_ignored(spoil: Callable[[Path], None], model: Path, stamps: Path) -> None:
    """A stamp that is damaged, differs in any field, or could be another's work spares nothing."""
    verify(model, stamps)
    spoil(stamps)
    assert verify(model, stamps) is True


@pytest.mark.usefixtures("later")
def test_stamp_behind_a_symlink_is_ignored(model: Path, stamps: Path, tmp_path: Path) -> None:
    """Neither the stamp nor its folder may be a symbolic link."""
    verify(model, stamps)
    stamp = only_stamp(stamps)
    moved = stamp.rename(tmp_path / "moved")
    stamp.symlink_to(moved)
    assert verify(model, stamps) is True
    assert verify(model, stamps) is False  # the link was replaced by a stamp
    stamps.rename(tmp_path / "elsewhere")
    stamps.symlink_to(tmp_path / "elsewhere")
    assert verify(model, stamps) is True
    assert verify(model, stamps) is True


@pytest.mark.usefixtures("later")
def test_stamp_of_somebody_else_is_ignored(model: Path, stamps: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stamp or folder that belongs to another user is not believed, and nothing is written there."""
    verify(model, stamps)
    before = only_stamp(stamps).read_bytes()
    own = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: own + 1)
    assert verify(model, stamps) is True
    assert only_stamp(stamps).read_bytes() == before


@pytest.mark.usefixtures("later")
def test_no_place_for_stamps_is_no_error(model: Path, tmp_path: Path) -> None:
    """Where no stamp can be written the file is hashed every time."""
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where the folder would be")
    assert verify(model, blocked) is True
    assert verify(model, blocked) is True


def test_file_that_changes_while_it_is_hashed_is_refused(
    model: Path, stamps: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer at work during the check is found out."""
    real = hashlib.file_digest

    def digest_slowly(file: io.BufferedReader, kind: str) -> object:
        digest = real(file, kind)
        _append_byte(model)
        return digest

    monkeypatch.setattr(hashlib, "file_digest", digest_slowly)
    with pytest.raises(ModelRefused, match="changed while it was verified"):
        open_verified(model, None, stamps)


def test_file_that_cannot_be_read_is_refused(model: Path, stamps: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of the disk in the middle of the file is told in one line."""

    def fail(file: object, kind: str) -> object:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(hashlib, "file_digest", fail)
    with pytest.raises(ModelRefused, match="cannot be read: Input/output error"):
        open_verified(model, None, stamps)


def test_file_without_permission_is_refused(model: Path, stamps: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that this user may not read is told in one line; root may, so the refusal is simulated."""

    def deny(path: Path, flags: int) -> int:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", deny)
    with pytest.raises(ModelRefused, match=r"cannot be opened: Permission denied$"):
        open_verified(model, None, stamps)


@pytest.mark.parametrize("text", ["/nowhere/model.gguf", "/dev/null", "/tmp", "a\0b"])
def test_what_is_no_regular_file_is_refused(text: str, stamps: Path) -> None:
    """A missing file, a device, a folder and an impossible path are refused, and none is waited for."""
    with pytest.raises(ModelRefused):
        open_verified(Path(text), None, stamps)


def test_nothing_stays_open_after_a_refusal(model: Path, stamps: Path) -> None:
    """A refused file leaves no descriptor behind."""
    before = set(Path("/proc/self/fd").iterdir())
    for sha256 in ("0" * 64, "nonsense"):
        with pytest.raises(ModelRefused):
            open_verified(model, sha256, stamps)
    assert set(Path("/proc/self/fd").iterdir()) == before


def test_entry_of_the_catalogue_is_typed() -> None:
    """An unknown field in the catalogue is a mistake, not silently ignored."""
    with pytest.raises(TypeError):
        Entry(name="a", file="a", url="https://a", size_bytes=1, ram_gb=1, sha265="typo")  # type: ignore[call-arg]  # on purpose
