"""Owns the system image: how a Debian 13 server's disk is built from packages, and the cache that keeps it."""

import fcntl
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from scripts.local_cloud.machines.host import check_image_tools, run

NAME = "debian-13"
_SUITE = "trixie"
_PACKAGES = (
    "ca-certificates",
    "cloud-init",
    "curl",
    "dbus",
    "iproute2",
    "iputils-ping",
    "less",
    "libpam-systemd",
    "netbase",
    "nftables",
    "openssh-server",
    "openssh-sftp-server",
    "procps",
    "sudo",
    "systemd",
    "systemd-sysv",
    "tzdata",
    "udev",
    "vim-tiny",
)
_HERE = Path(__file__).parent
_ROOT_FILES = _HERE / "image_root"
_SCRIPT = _HERE / "customise_image.sh"
_SOURCES = Path("/etc/apt")
_BUILD_TIMEOUT_S = 1800.0


@dataclass(frozen=True)
class Mirror:
    """Where packages come from, as the host says it; None leaves the choice to mmdebstrap."""

    main: str | None
    security: str | None

    def lines(self) -> list[str]:
        """The apt source lines of a server; none if the choice is mmdebstrap's."""
        if self.main is None:
            return []
        lines = [f"deb {self.main} {_SUITE} main", f"deb {self.main} {_SUITE}-updates main"]
        if self.security is not None:
            lines.append(f"deb {self.security} {_SUITE}-security main")
        return lines


def current_name() -> str:
    """What the image is called that this host would build now; another content has another name."""
    return f"{NAME}-{content_key(host_mirror(_SOURCES))}"


def cached_tar(cache: Path, log: Callable[[str], None]) -> Path:
    """The image's tar, built first if the cache has none of this content; raises MachineFailed or HostUnfit."""
    tar = cache / f"{current_name()}.tar"
    if tar.exists():
        return tar
    check_image_tools()
    cache.mkdir(parents=True, exist_ok=True)
    with _locked(cache / f"{NAME}.lock", log) as lock:
        if not tar.exists():  # another process may have built it while this one waited
            log(f"building the image {NAME} from packages, once (a minute or two)")
            _build(tar, host_mirror(_SOURCES), lock)
            log(f"the image {NAME} is kept as {tar}")
    return tar


def content_key(mirror: Mirror) -> str:
    """Names what the image is made of, in 12 hex digits."""
    digest = hashlib.sha256()
    for part in (_SUITE, *_PACKAGES, *mirror.lines()):
        digest.update(part.encode() + b"\0")
    for path in [_SCRIPT, *sorted(path for path in _ROOT_FILES.rglob("*") if path.is_file())]:
        digest.update(str(path.relative_to(_HERE)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def host_mirror(sources: Path) -> Mirror:
    """The Debian mirror that the host itself uses, from its apt settings (``/etc/apt``)."""
    texts = [sources / "sources.list", *sorted((sources / "sources.list.d").glob("*"))]
    urls = list(_urls(path.read_text(errors="replace") for path in texts if path.is_file()))
    return Mirror(
        main=next((url for url in urls if url.endswith("/debian")), None),
        security=next((url for url in urls if url.endswith("/debian-security")), None),
    )


def _urls(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in text.splitlines():
            if re.match(r"\s*(deb\s|URIs:)", line):
                yield from (word.rstrip("/") for word in line.split() if re.match(r"https?://", word))


def _build(tar: Path, mirror: Mirror, lock: int) -> None:
    unfinished = tar.with_suffix(".unfinished.tar")
    workplace = tar.parent / "building"  # what a killed build left there is found again
    run(["rm", "-rf", "--one-file-system", unfinished, workplace])
    workplace.mkdir()
    run(
        [
            # Its mounts go with its namespace when it is killed: nothing that sweeps up may walk into the host's /sys.
            *("unshare", "--mount", "--propagation", "slave", "env", f"TMPDIR={workplace}"),
            "mmdebstrap",
            "--mode=root",
            "--variant=minbase",
            f"--include={','.join(_PACKAGES)}",
            f"--customize-hook=sync-in {_ROOT_FILES} /",
            f"--customize-hook={_SCRIPT}",
            _SUITE,
            unfinished,
            *mirror.lines(),
        ],
        timeout_s=_BUILD_TIMEOUT_S,
        keep_open=[lock],  # a build may go on when who ordered it is killed, and must not meet the next one
    )
    workplace.rmdir()
    unfinished.rename(tar)


@contextmanager
def _locked(path: Path, log: Callable[[str], None]) -> Iterator[int]:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log("waiting for another build of the image")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()
