"""The tensors of a GGUF file, uploaded to a backend straight from the mapped file."""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from typing import Any

import gguf
import numpy as np

from client.backend import Backend
from client.tensors import Array, Tensor
from protocol.ggml_types import GgmlType


def read_tensors(path: str | PathLike[str]) -> dict[str, tuple[GgmlType, tuple[int, ...], Array]]:
    """Type, ne (innermost first) and bytes (uint8, mapped) of each tensor by its name."""
    reader = gguf.GGUFReader(path)
    return {
        str(t.name): (
            GgmlType(int(t.tensor_type)),
            tuple(int(n) for n in t.shape),
            np.asarray(t.data).reshape(-1).view(np.uint8),
        )
        for t in reader.tensors
    }


async def load_gguf(
    backend: Backend,
    path: str | PathLike[str],
    *,
    wanted: Callable[[str], Any] = lambda name: True,
    cache: bool = False,
) -> dict[str, Tensor]:
    """Upload the tensors whose name is ``wanted``; the leaves by their names.

    ``cache`` as of Backend.upload. Raises AllocationFailed, OSError, ValueError for a file that is
    no GGUF.
    """
    found = {name: entry for name, entry in read_tensors(path).items() if wanted(name)}
    leaves = {
        name: backend.graph.new_tensor(type, ne, name) for name, (type, ne, _) in found.items()
    }
    await backend.allocate(leaves.values())
    for name, (_, _, data) in found.items():
        await backend.upload(leaves[name], data.data, cache=cache)
    return leaves
