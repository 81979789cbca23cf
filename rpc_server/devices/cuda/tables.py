"""The tables that kernels look values up in, as a header: ``tables.cuh``.

They are made from the same Python tables that the array references use; none is kept as CUDA text.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from protocol.ggml.tables import E8M0_VALUES, FP4_VALUES, IQ4_VALUES, UE4M3_VALUES

_GRIDS = {
    "IQ2XXS_GRID": "IQ2_XXS",
    "IQ2XS_GRID": "IQ2_XS",
    "IQ2S_GRID": "IQ2_S",
    "IQ3XXS_GRID": "IQ3_XXS",
    "IQ3S_GRID": "IQ3_S",
    "IQ1S_GRID": "IQ1_S",
}


def _grid(name: str) -> Any:
    """The rows of a grid of the gguf package, each as one word: its values as signed bytes."""
    from gguf import quants

    kind: Any = getattr(quants, name)
    kind.init_grid()
    rows = np.ascontiguousarray(kind.grid.reshape(-1, kind.grid.shape[-1]).astype(np.int8))
    return rows.view(np.uint64 if rows.shape[1] == 8 else np.uint32).ravel()


_C_TYPES = {"u8": "u64", "u4": "u32", "i1": "i8", "f4": "float"}


def _declaration(name: str, values: Any) -> str:
    kind = _C_TYPES[values.dtype.str[1:]]
    if kind == "float":
        text = ", ".join(f"{float(v).hex()}f" for v in values)
    else:
        text = ", ".join(f"{int(v)}{'ull' if kind == 'u64' else ''}" for v in values)
    return f"__device__ static const {kind} {name}[{len(values)}] = {{{text}}};\n"


@functools.cache
def tables_header() -> str:
    """Return the text of tables.cuh."""
    tables: dict[str, Any] = {
        "IQ4_VALUES": IQ4_VALUES.astype(np.int8),
        "FP4_VALUES": FP4_VALUES.astype(np.int8),
        # The same, four to a word.
        "IQ4_WORDS": IQ4_VALUES.astype(np.int8).view(np.uint32),
        "FP4_WORDS": FP4_VALUES.astype(np.int8).view(np.uint32),
        "E8M0_VALUES": E8M0_VALUES,
        "UE4M3_VALUES": UE4M3_VALUES,
    }
    tables |= {name: _grid(kind) for name, kind in _GRIDS.items()}
    return "#pragma once\n" + "".join(_declaration(*table) for table in tables.items())
