"""Owns what of Debian's packages this checkout wants on its host: says what is missing, and gets it when it may.

Used by the Makefile as ``python3 scripts/setup_host.py test``; needs nothing but Python itself. It installs as root
only, and only after a yes, ``YES=1`` or in CI. A registry and promtool are not installed but unpacked below
``.cache``: installed, they would start with the host.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from scripts.local_cloud.machines import host  # noqa: E402 - the path comes first

UNPACKED = ROOT / ".cache" / "debian"
# program -> Debian package that brings it
CLOUD = {**host.TOOLS, **host.POOL_TOOLS, **host.IMAGE_TOOLS}
IMAGE = {
    "curl": "curl",
    "docker-registry": "docker-registry",
    "git": "git",
    "openssl": "openssl",
    "pebble": "pebble",
    "pebble-challtestsrv": "pebble",
    "ssh": "openssh-client",
}
_BUILD = {"go": "golang-go"}  # of the programs that tests/programs pins
_JUDGES = {
    "chromium": "chromium",
    "chromedriver": "chromium-driver",
    "hcloud": "hcloud-cli",
    "mkfs.ext4": "e2fsprogs",
    "promtool": "promtool",
    "shellcheck": "shellcheck",
}
# What has nothing to show without servers: a demo, and what measures or tries servers alone.
_BENCHES = ("bench-cloud", "bench-image", "bench-bake", "bench-rollout")
_WITH_SERVERS = ("demo", "test-faults", "test-launch-faults", *_BENCHES)
_NEEDS = {
    **{goal: {**CLOUD, **IMAGE, **_BUILD, "hcloud": "hcloud-cli"} for goal in _WITH_SERVERS},
    "test": {**CLOUD, **IMAGE, **_BUILD, **_JUDGES},
}
_TO_UNPACK = ("docker-registry", "promtool")  # their programs need nothing but libc
_ONCE_IN = {"promtool": "prometheus"}  # where Debian before 13, and Ubuntu 24.04, have it
_OLDEST_GO = (1, 21)  # the first that fetches the version that a module asks for


def find(program: str) -> bool:
    """Whether a program is there, installed or unpacked."""
    return host.find_tool(program) is not None or os.access(UNPACKED / "usr" / "bin" / program, os.X_OK)


def find_missing(needs: dict[str, str]) -> list[str]:
    """Packages of the programs that are not there, sorted, and what brings no program."""
    missing = {package for program, package in needs.items() if not find(program)}
    if not host.KEYRING.exists():
        missing.add("debian-archive-keyring")
    if importlib.util.find_spec("ensurepip") is None:
        missing.add("python3-venv")
    return sorted(missing)


def is_ci() -> bool:
    """Whether this is CI: some set the variable to false."""
    return os.environ.get("CI") in ("1", "true")


def is_yes() -> bool:
    """Whether it may install: it was told, or somebody at a terminal says so now."""
    if os.environ.get("YES") == "1" or is_ci():
        return True
    if not sys.stdin.isatty():
        return False
    try:
        return input("Do that now? [Y/n] ").strip().lower() in ("", "y", "yes")
    except (EOFError, KeyboardInterrupt):
        sys.exit("\nnothing was installed")


def run(*words: str, cwd: Path = ROOT) -> bool:
    """Whether a command worked; what it says of errors is shown."""
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    return subprocess.call(words, cwd=cwd, env=environment, stdout=subprocess.DEVNULL) == 0


def is_package(name: str) -> bool:
    """Whether this system's package lists have it."""
    return subprocess.run(["apt-cache", "show", name], capture_output=True).stdout != b""


def unpack(package: str) -> bool:
    """Whether a package now lies below ``.cache``, without being installed."""
    if package in _ONCE_IN and not is_package(package):
        package = _ONCE_IN[package]
    folder = UNPACKED / f"{package}.draft"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    worked = run("apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", package, cwd=folder)
    for file in folder.glob("*.deb"):
        worked = run("dpkg-deb", "-x", str(file), str(folder)) and worked
    if worked:
        (UNPACKED / "usr" / "bin").mkdir(parents=True, exist_ok=True)
        for program in (folder / "usr" / "bin").iterdir():
            program.replace(UNPACKED / "usr" / "bin" / program.name)  # each is there whole, or not at all
    shutil.rmtree(folder)
    return worked


def go_is_too_old() -> bool:
    """Whether Debian's Go, which would be installed, cannot fetch the one that the modules ask for."""
    told = subprocess.run(["apt-cache", "policy", "golang-go"], capture_output=True, text=True).stdout
    candidate = next((line.split()[-1] for line in told.splitlines() if "Candidate:" in line), "")
    numbers = candidate.rpartition(":")[2].partition("~")[0].partition("-")[0].split(".")[:2]
    return not all(each.isdigit() for each in numbers) or tuple(int(each) for each in numbers) < _OLDEST_GO


def main(goals: list[str]) -> int:
    """0 if all is there, or could be had; 1 if something is missing without which there is nothing to run."""
    if len(goals) != 1 or goals[0] not in _NEEDS:
        sys.exit(f"error: say what for: {' or '.join(_NEEDS)}")
    [goal] = goals
    if goal in _WITH_SERVERS and os.geteuid() != 0:
        print(f"error: servers are system containers, which only root can start: sudo make {goal}", file=sys.stderr)
        print("  `make serve` runs the service alone, without root and without a cloud", file=sys.stderr)
        return 1
    missing = find_missing(_NEEDS[goal])
    if not missing:
        return 0
    # Tests that lack something say by name that they did not run.
    code = 1 if goal in _WITH_SERVERS else 0
    unpacked = [each for each in missing if each in _TO_UNPACK]
    installed = [each for each in missing if each not in _TO_UNPACK]
    print(f"Not here, and wanted by `make {goal}`, of Debian's packages:", file=sys.stderr)
    for what, names in (("to install on this system", installed), ("to unpack below .cache", unpacked)):
        if names:
            print(f"  {what}: {', '.join(names)}", file=sys.stderr)
    if shutil.which("apt-get") is None or os.geteuid() != 0:
        where = "on Debian or Ubuntu" if shutil.which("apt-get") is None else "as root"
        print(f"They can be had {where}: sudo make {goal}", file=sys.stderr)
        return code
    if not is_yes():
        print(f"Without them, then; `make {goal} YES=1` gets them", file=sys.stderr)
        return code
    if not run("apt-get", "-qq", "update"):
        print("error: Debian's package lists cannot be had; check the network", file=sys.stderr)
    if "golang-go" in installed and go_is_too_old():
        installed.remove("golang-go")
        print("This system's Go is too old; install Go 1.26 from go.dev by hand", file=sys.stderr)
    # One by one: one that this system does not have keeps no other away.
    apt_get = ["apt-get", "-qq", "install", "-y", "--no-install-recommends"]
    try:
        failed = [each for each in unpacked if not unpack(each)]
        failed += [each for each in installed if not run(*apt_get, each)]
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; if a package was cut off, `sudo dpkg --configure -a` mends it")
    if failed:
        print(f"Could not be had: {', '.join(failed)}", file=sys.stderr)
    return code if find_missing(_NEEDS[goal]) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
