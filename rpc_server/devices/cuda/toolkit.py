"""CuPy and the libraries that it loads: whether they are here, and fit for a card.

Nothing is imported before somebody asks: a machine may have neither a GPU nor CuPy.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from rpc_server.native.folder import cache_base

# What CUDA 12 and 13 still compile for, as capabilities (61 is 6.1). Kernels need 6.0.
OLDEST = 60
_OLDEST_OF_CUDA13 = 75

INSTALL = (
    "pip install 'ggml-rpc-server[cuda12]' (any card from GTX 10 and P100 on; "
    "[cuda13] takes RTX 20, T4 and newer only)"
)


class CardError(Exception):
    """There is no such card, or CuPy can't be had or used; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Libraries:
    """CuPy's own modules for cuBLAS and for the compiler of kernels, NVRTC."""

    cublas: Any
    nvrtc: Any


def _writable_cache() -> str:
    """Return a folder for compiled kernels; CuPy can't even be imported without one."""
    import tempfile

    folder = cache_base() / "cupy"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=folder):
            return str(folder)
    except OSError:
        return tempfile.mkdtemp(prefix="ggml-rpc-server-cupy-")


@functools.cache
def _keep_kernels() -> None:
    """Have CuPy keep kernels beside those for the CPU, not in a home that may be absent."""
    if not os.environ.get("CUPY_CACHE_DIR"):
        os.environ["CUPY_CACHE_DIR"] = _writable_cache()


def cupy() -> Any:
    """Return the module. Raises CardError where it is missing or broken."""
    _keep_kernels()
    try:
        import cupy
    except ImportError as error:
        raise CardError(f"CuPy is not installed ({error}): {INSTALL}") from None
    except Exception as error:
        raise CardError(f"CuPy can't be imported ({error}); install it anew: {INSTALL}") from None
    return cupy


def libraries() -> Libraries:
    """Return cuBLAS and NVRTC, both loaded. Raises CardError."""
    try:
        from cupy_backends.cuda.libs import cublas, nvrtc

        nvrtc.getVersion()
    except Exception as error:
        raise CardError(f"CuPy finds no cuBLAS or NVRTC ({error}): {INSTALL}") from None
    return Libraries(cublas, nvrtc)


def driver() -> Any:
    """Return the driver's own library, None where it can't be loaded."""
    try:
        return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None


def card_count() -> int:
    """Return how many GPUs CuPy can use. Raises CardError, which says why there are none."""
    module = cupy()
    try:
        return int(module.cuda.runtime.getDeviceCount())
    except Exception as error:
        raise CardError(f"no CUDA GPU can be used here: {error}") from None


def check_capability(name: str, capability: int, compiled_for: Collection[int]) -> None:
    """Raise CardError if no kernel can run on a card: ``name``, ``capability`` (61 is 6.1).

    ``compiled_for`` are the capabilities that the NVRTC at hand knows. CUDA 13 has given up those
    before 7.5 although the last driver for such cards calls itself 13.0.
    """
    told = f"{name} has compute capability {capability // 10}.{capability % 10}"
    if capability < OLDEST:
        raise CardError(f"{told}, and kernels need {OLDEST // 10}.{OLDEST % 10} or newer")
    if capability >= min(compiled_for):
        return
    fix = f"{INSTALL}, in an environment without [cuda13]"
    if capability >= _OLDEST_OF_CUDA13:
        fix = f"a newer NVRTC: {INSTALL}"
    raise CardError(
        f"{told}, and the compiler that is installed makes code for "
        f"{min(compiled_for) // 10}.{min(compiled_for) % 10} and newer only: {fix}"
    )
