"""What runs programs of 64-bit ARM here: QEMU, a root with Python, and a plugin that counts.

All of it lies in the cache of ``tools.upstream``. The root is made of Debian's packages for arm64,
unpacked and not installed, and of PyPI's wheels; nothing has to be mounted or registered. QEMU
looks for a program's files there first (its option ``-L``), so a folder beside the root gives each
processor a /proc/cpuinfo of its own.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tools import upstream
from tools.aarch64.processors import Processor
from tools.serving.processes import PROJECT

QEMU = "qemu-aarch64"
# What is needed of Debian, beside pip and a compiler.
HOST_PACKAGES = ("qemu-user", "g++-aarch64-linux-gnu")
_PACKAGES = ("python3", "libstdc++6", "libgomp1")
_WHEELS = ("construct", "gguf", "numba", "rich", "uvloop")
# Wheels for Python of Debian 12 on any Linux with its C library.
_PLATFORMS = [f"manylinux_2_{minor}_aarch64" for minor in (36, 35, 34, 31, 28, 27, 17)]
_PLATFORMS.append("manylinux2014_aarch64")
_PYTHON = "3.11"


def folder() -> Path:
    """Return where all that belongs to the emulation is kept."""
    return upstream.cache_root() / "aarch64"


class MissingError(RuntimeError):
    """Something has to be installed first; the message says what."""


def check() -> None:
    """Raise MissingError unless the programs are there that this needs."""
    missing = [n for n in (QEMU, "aarch64-linux-gnu-g++", "cc", "apt-get") if not shutil.which(n)]
    if missing:
        packages = " ".join(HOST_PACKAGES)
        raise MissingError(f"no {', '.join(missing)}: on Debian, apt-get install {packages}")


def _run(*command: str | Path) -> str:
    done = subprocess.run([str(word) for word in command], check=True, capture_output=True)
    return done.stdout.decode()


# -- the root --------------------------------------------------------------------------------------


def ensure_root() -> Path:
    """Return the folder with Python and the server's packages for arm64, made if need be."""
    root = folder() / "root"
    folder().mkdir(parents=True, exist_ok=True)
    with upstream.locked(folder() / "root.lock", "download"):
        if root.is_dir():
            return root
        with tempfile.TemporaryDirectory(prefix="root-", dir=folder()) as scratch:
            work = Path(scratch)
            staged = work / "root"
            staged.mkdir()
            _unpack_packages(work, staged)
            _install_wheels(staged / "site")
            staged.rename(root)
    return root


def _unpack_packages(work: Path, root: Path) -> None:
    """Download Debian's packages and what they depend on, by an apt that knows of arm64 alone."""
    for name in ("state/lists/partial", "cache/archives/partial"):
        (work / name).mkdir(parents=True)
    status = work / "state/status"
    status.touch()
    settings = {
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "APT::Install-Recommends": "false",
        "APT::Sandbox::User": "root",
        "Dir::State": work / "state",
        "Dir::State::status": status,
        "Dir::Cache": work / "cache",
    }
    apt = ["apt-get", *(word for k, v in settings.items() for word in ("-o", f"{k}={v}"))]
    _run(*apt, "update")
    _run(*apt, "install", "--yes", "--download-only", *_PACKAGES)
    for package in sorted((work / "cache/archives").glob("*.deb")):
        _run("dpkg-deb", "-x", package, root)


def _install_wheels(target: Path) -> None:
    platforms = [word for name in _PLATFORMS for word in ("--platform", name)]
    python = ("--python-version", _PYTHON, "--implementation", "cp", "--only-binary", ":all:")
    _run(
        *(sys.executable, "-m", "pip", "install", "--quiet", "--target", target),
        *(*python, *platforms, *_WHEELS),
    )


def _prefix(processor: Processor) -> Path:
    """A folder like the root, with this processor's /proc/cpuinfo."""
    root, prefix = ensure_root(), folder() / f"root-{processor.name}"
    (prefix / "proc").mkdir(parents=True, exist_ok=True)
    (prefix / "proc/cpuinfo").write_text(processor.cpuinfo)
    for name in ("bin", "lib", "usr"):
        if not (prefix / name).exists():
            (prefix / name).symlink_to(root / name)
    return prefix


# -- QEMU ------------------------------------------------------------------------------------------


def ensure_plugin() -> Path:
    """Return the plugin that counts, compiled for the QEMU that is here."""
    source = Path(__file__).with_name("counting.c")
    version = re.search(r"version (\d+)", _run(QEMU, "--version"))
    # From 9 on QEMU takes no plugin that says it is for an older interface than the second.
    interface = 2 if version and int(version[1]) >= 9 else 1
    plugin = folder() / f"counting-{interface}.so"
    if not plugin.exists() or plugin.stat().st_mtime < source.stat().st_mtime:
        folder().mkdir(parents=True, exist_ok=True)
        options = ("-O2", "-Wall", "-Werror", "-shared", "-fPIC", f"-DINTERFACE={interface}")
        _run("cc", *options, "-o", plugin, source)
    return plugin


def command(
    processor: Processor, program: Sequence[str | Path], counter: Path | None = None
) -> list[str]:
    """Return what runs a program for arm64, with its instructions counted in a file or not."""
    counting = ("-plugin", f"{ensure_plugin()},count={counter}") if counter else ()
    words = (QEMU, "-cpu", processor.name, "-L", _prefix(processor), *counting, *program)
    return [str(word) for word in words]


# -- this server -----------------------------------------------------------------------------------

# Python starts compilers by its own name, which is to be a program of this machine.
_START = """
import runpy, sys
sys.executable = sys.argv.pop(1)
runpy.run_module("rpc_server", run_name="__main__", alter_sys=True)
"""


def own_command(
    processor: Processor,
    counter: Path | None,
    options: Sequence[str],
    *,
    own_compiler: bool = False,
) -> list[str]:
    """Return what starts this project's server in emulation.

    Kernels are compiled for it by ``tools.aarch64.cross``, or in emulation too (``own_compiler``:
    a minute or more each).
    """
    python = ensure_root() / f"usr/bin/python{_PYTHON}"
    compiler = folder() / f"compiler-{processor.name}{'-own' if own_compiler else ''}"
    if own_compiler:
        text = f'exec {" ".join(command(processor, [python]))} "$@"'
    else:
        # Called as: -m rpc_server.native.compiler FOLDER [OPTION].
        words = f"{sys.executable} -m tools.aarch64.cross {processor.name}"
        text = f'cd {PROJECT} && shift 2 && PYTHONPATH= exec {words} "$@"'
    compiler.write_text(f"#!/bin/sh\n{text}\n")
    compiler.chmod(0o755)
    return command(processor, [python, "-c", _START, compiler, *options], counter)


def own_environment(processor: Processor) -> dict[str, str]:
    """Return the variables that such a server is started with."""
    path = os.pathsep.join(map(str, (PROJECT, ensure_root() / "site")))
    caches = folder() / f"kernels-{processor.name}"
    return {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "XDG_CACHE_HOME": str(caches)}


# -- upstream's server -----------------------------------------------------------------------------

_SERVER = "ggml-rpc-server"


def ensure_upstream(processor: Processor, jobs: int | None = None) -> Path:
    """Return upstream's server compiled for a processor, as its own CMake would there.

    Raises UpstreamError where a step fails.
    """
    target = folder() / f"{upstream.DEFAULT_BUILD}-{processor.name}"
    target.mkdir(parents=True, exist_ok=True)
    with upstream.locked(target / "lock", "build"):
        if not (target / _SERVER).is_file():
            options = [
                *upstream.CMAKE_OPTIONS,
                "-DCMAKE_BUILD_TYPE=Release",
                "-DBUILD_SHARED_LIBS=OFF",
                "-DGGML_NATIVE=OFF",
                "-DCMAKE_SYSTEM_NAME=Linux",
                "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
            ]
            for language, compiler in (("C", "gcc"), ("CXX", "g++")):
                options.append(f"-DCMAKE_{language}_COMPILER=aarch64-linux-gnu-{compiler}")
                options.append(f"-DCMAKE_{language}_FLAGS={processor.gcc}")
            upstream.build_programs(target, [_SERVER], options, jobs or os.cpu_count() or 1)
    return target / _SERVER
