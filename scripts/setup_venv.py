"""Owns the virtual environment of a checkout: makes it and installs hashed requirement files, or says what is missing.

Used by the Makefile as ``python3 scripts/setup_venv.py service/requirements.txt …``; needs nothing but Python itself,
and runs (to say so) on Pythons that are too old for the rest.
"""

import hashlib
import os
import platform
import re
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VENV = os.path.join(ROOT, ".venv")
OLDEST_PYTHON = (3, 11)
_PIPS = 2  # beside each other: each unpacks on one CPU, and more would wait for the disk
_NEVER_USED = r"/tests/"  # of packages: a third of what there would be to compile


def fail(problem: str, remedy: str) -> None:
    """Ends with one line that says what is wrong and one that says what to do."""
    sys.exit("error: %s\n  %s" % (problem, remedy))


def check_host() -> None:
    """Refuses hosts on which the engine's package does not exist or no environment can be made."""
    if sys.version_info < OLDEST_PYTHON:
        fail(
            "Python %d.%d is too old, %d.%d or newer is needed" % (sys.version_info[:2] + OLDEST_PYTHON),
            "install it and name it: make serve PYTHON=python3.13",
        )
    if platform.machine() not in ("x86_64", "AMD64") or not sys.platform.startswith("linux"):
        fail(
            "gpt4all, the engine, exists for Linux on x86-64 only; this is %s on %s"
            % (sys.platform, platform.machine()),
            "run this on such a machine",
        )
    libc, version = platform.libc_ver()
    if libc == "glibc" and tuple(int(part) for part in version.split(".")[:2]) < (2, 34):
        fail("glibc %s is too old for gpt4all, 2.34 is needed" % version, "use Debian 12, Ubuntu 24.04 or newer")
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        fail(
            "this Python has no venv module",
            "on Debian and Ubuntu: sudo apt-get install python3-venv",
        )


def fingerprint(requirement_files: "list[str]") -> str:
    """Digest of all that the environment depends on: a change of any of it installs again."""
    digest = hashlib.sha256(("%s %s" % (sys.version, sys.executable)).encode())
    for path in requirement_files:
        with open(path, "rb") as file:
            digest.update(file.read())
    return digest.hexdigest()


def is_ours(python: str) -> bool:
    """Whether an environment's Python starts and is a copy of this very one: two of 3.11 do not mix either."""
    question = "import sys; sys.exit((sys.version, sys.base_prefix) != %r)" % ((sys.version, sys.base_prefix),)
    return os.path.exists(python) and subprocess.call([python, "-c", question], stderr=subprocess.DEVNULL) == 0


def has_pip(python: str) -> bool:
    """Whether an environment was made to its end: of what is used here, pip comes last."""
    done = subprocess.run([python, "-m", "pip", "--version"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return done.returncode == 0


def split_requirements(texts: "list[str]", parts: int) -> "list[str]":
    """The requirements of several files as so many other ones, all that is said of a package in one of them alone.

    Of one package there may be several: for other Pythons, and in one file for other systems than in another.
    """
    by_name: "dict[str, list[str]]" = {}
    for text in texts:
        for requirement in re.findall(r"^\w(?:\\\n|.)*", text, re.MULTILINE):
            told = by_name.setdefault(requirement.split("==")[0], [])
            if requirement not in told:
                told.append(requirement)
    # Those with many hashes are large by themselves.
    largest_first = sorted(("\n".join(told) + "\n" for told in by_name.values()), key=len, reverse=True)
    return ["".join(largest_first[part::parts]) for part in range(parts)]


def install(python: str, requirement_files: "list[str]") -> None:
    """Installs what the files pin; a failure ends the run with what to do."""
    remedy = "check the network (a Python package index is needed) and the disk, then run the same again"
    # Errors alone are told: each would warn of packages that the other one is about to put there.
    options = ["-qq", "--disable-pip-version-check", "--require-hashes", "--no-deps", "--only-binary", ":all:"]
    options.append("--no-compile")  # which one CPU would do; below all of them do
    running = []
    try:
        texts = []
        for path in requirement_files:
            with open(path) as file:
                texts.append(file.read())
        for part, text in enumerate(split_requirements(texts, _PIPS)):
            path = os.path.join(VENV, "requirements-%d.txt" % part)
            with open(path, "w") as file:
                file.write(text)
            running.append(subprocess.Popen([python, "-m", "pip", "install"] + options + ["-r", path], cwd=ROOT))
        code = max([each.wait() for each in running])
    except KeyboardInterrupt:
        for each in running:
            each.wait()  # the terminal has interrupted it as well
        sys.exit("interrupted; the next run goes on from here")
    except OSError as error:
        for each in running:
            each.wait()
        fail("what is to be installed cannot be written down: %s" % error, remedy)
    if code != 0:
        fail("pip failed with exit code %d (its words are above)" % code, remedy)


def remove_cuda_libraries() -> None:
    """Deletes gpt4all's CUDA libraries: 210 of its 218 MB, for graphics cards that such a server does not have."""
    site = subprocess.check_output(
        [os.path.join(VENV, "bin", "python"), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    )
    folder = os.path.join(site.decode().strip(), "gpt4all", "llmodel_DO_NOT_MODIFY", "build")
    for name in os.listdir(folder) if os.path.isdir(folder) else []:
        if "cuda" in name:
            os.unlink(os.path.join(folder, name))


def main(requirement_files: "list[str]") -> None:
    stamp = os.path.join(VENV, ".installed-" + "-".join(path.split("/")[-2] for path in requirement_files))
    check_host()
    wanted = fingerprint(requirement_files)
    try:
        with open(stamp) as file:
            if file.read() == wanted:
                return
    except OSError:
        pass
    python = os.path.join(VENV, "bin", "python")
    print("Setting up .venv (once; about 130 MB to fetch) …", file=sys.stderr)
    import venv

    ours = is_ours(python)
    try:
        # One that is there stays as it is: its Python may be running, and cannot be written then.
        if not (ours and has_pip(python)):
            # In this process: an interrupted child would show its traceback.
            venv.create(VENV, with_pip=True, clear=not ours)
    except KeyboardInterrupt:
        sys.exit("interrupted; the next run goes on from here")
    except (OSError, subprocess.CalledProcessError) as error:
        fail("the virtual environment cannot be made: %s" % error, "see that the folder is writable, the disk not full")
    install(python, requirement_files)
    remove_cuda_libraries()
    # What does not compile, of other versions' files that some packages bring, is nobody's concern, as it is not pip's.
    compiling = [python, "-m", "compileall", "-qq", "-j", "0", "-x", _NEVER_USED, "lib"]
    try:
        subprocess.run(compiling, cwd=VENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    except KeyboardInterrupt:
        sys.exit("interrupted; the next run goes on from here")
    try:
        with open(stamp, "w") as file:
            file.write(wanted)
    except OSError as error:
        fail("%s cannot be written: %s" % (stamp, error), "see that the folder is writable, the disk not full")


if __name__ == "__main__":
    main(sys.argv[1:])
