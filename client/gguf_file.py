"""The tensors of a GGUF file, uploaded to a backend straight from the mapped file.

The package ``gguf`` reads a file's metadata, and where each tensor is described. Types and sizes
are those of ``protocol.ggml.types``: the package's own table lags behind ggml's (0.19 has no Q2_0,
and a Q8_1 that is 4 bytes too long), and its reader gives up on a file with a type it doesn't know.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from os import PathLike
from typing import Any, NamedTuple

import gguf
import numpy as np

from client.backend import Backend
from client.tensors import Array
from protocol.ggml.types import TYPE_INFO, GgmlType, row_size
from protocol.tensor import Tensor

MAX_DIMS = 4


class FileTensor(NamedTuple):
    """One tensor of a file: its ``ne`` (innermost first), and its bytes as mapped uint8."""

    type: GgmlType
    ne: tuple[int, ...]
    data: Array


class GgufFile(gguf.GGUFReader):  # type: ignore[misc]  # the package is untyped
    """A GGUF file: the package's ``fields`` for metadata, ``tensors`` by their names.

    Raises OSError, and ValueError for a file that is no GGUF or is cut short.
    """

    tensors: dict[str, FileTensor]

    def __init__(self, path: str | PathLike[str]) -> None:
        try:
            super().__init__(path)
        except (IndexError, KeyError, OverflowError) as error:
            # What the package meets where a file ends within its header, or repeats a key.
            raise ValueError(f"{path} is not a sound GGUF file: {error}") from error

    def _build_tensors(self, start_offs: int, fields: list[gguf.ReaderField]) -> None:
        """Replaces the package's step from descriptions of tensors to the tensors."""
        self.tensors = {}
        for field in fields:
            if field.name in self.tensors:
                raise ValueError(f"two tensors are named {field.name}")
            self.tensors[field.name] = self._tensor(start_offs, field)

    def _tensor(self, start: int, field: gguf.ReaderField) -> FileTensor:
        _, _, _, dims, number, offset = field.parts
        name, ne = field.name, tuple(int(n) for n in dims)
        if int(number[0]) not in TYPE_INFO:
            raise ValueError(f"{name} has type {int(number[0])}, which ggml doesn't have")
        type_ = GgmlType(int(number[0]))
        block = TYPE_INFO[type_].block_size
        if not 1 <= len(ne) <= MAX_DIMS or ne[0] % block:
            raise ValueError(f"{name} has {ne} elements, in blocks of {block} ({type_.name})")
        size = row_size(type_, ne[0]) * math.prod(ne[1:])
        begin = int(start) + int(offset[0])
        if begin + size > len(self.data):
            raise ValueError(f"{name} ends {begin + size - len(self.data)} bytes behind the file")
        return FileTensor(type_, ne, np.asarray(self.data[begin : begin + size]))


def read_tensors(path: str | PathLike[str]) -> dict[str, FileTensor]:
    """Return the tensors of a file by their names. Raises as GgufFile does."""
    return GgufFile(path).tensors


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
        name: backend.graph.new_tensor(entry.type, entry.ne, name) for name, entry in found.items()
    }
    await backend.allocate(leaves.values())
    for name, entry in found.items():
        await backend.upload(leaves[name], entry.data.data, cache=cache)
    return leaves
