"""The CPU device: numba kernels over ggml tensors in host memory.

Compiled kernels are kept on disk. numba decides by a source file's own time stamp whether a cached
kernel is still good and does not look at the helpers it calls in other files, so the folder is
named by a digest of all that is compiled: a changed source starts a fresh folder.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

_HERE = Path(__file__).parent
# Beside the kernels; the last has tables that they hold as constants.
_COMPILED = ("abi.py", "executor.py", "schedule.py", "../../types/tables.py")


def _source_digest() -> str:
    digest = hashlib.sha256()
    compiled = [*(_HERE / "kernels").glob("*.py"), *(_HERE / name for name in _COMPILED)]
    for source in sorted(compiled):
        digest.update(source.name.encode())
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def kernel_cache_dir() -> Path:
    """Folder of compiled kernels for this version of the sources (``NUMBA_CACHE_DIR`` wins)."""
    chosen = os.environ.get("NUMBA_CACHE_DIR")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "ggml-rpc-server" / f"kernels-{_source_digest()}"


# Read by numba when it is first imported, hence here, above every import of a kernel.
os.environ["NUMBA_CACHE_DIR"] = str(kernel_cache_dir())
