"""The overlap generator's child with a SET_ROWS that checks its indices and then reads them again.

    python -m tests.guard.planted --overlap-child FILE

What it does is right for every graph whose rows don't lie over their indices.
"""

from __future__ import annotations

import sys
from typing import Any

import numba
from numba import types

from rpc_server.devices.cpu.catalog import Kernel
from rpc_server.devices.cpu.kernels.intrinsics import (
    DST,
    SRC0,
    SRC1,
    data,
    load_i64,
    memory_copy,
    nb,
    ne,
)
from rpc_server.devices.cpu.kernels.typed import share_rows
from rpc_server.devices.cpu.plan import CpuPlanBuilder
from tests.guard.__main__ import main

_WORDS = types.int64(types.int64, types.int64, types.int64)


@numba.cfunc(_WORDS, error_model="numpy")
def _set_rows(rec, ith, nth):  # type: ignore[no-untyped-def]
    """Rows of F32, and indices of 64 bits for one plane."""
    n, at, step = ne(rec, SRC1, 0), data(rec, SRC1), nb(rec, SRC1, 0)
    for i in range(n):
        index = load_i64(at + i * step)
        if index < 0 or index >= ne(rec, DST, 1):
            return 1
    row, end = share_rows(n, ith, nth)
    while row < end:
        index = load_i64(at + row * step)
        to = data(rec, DST) + index * nb(rec, DST, 1)
        memory_copy(to, data(rec, SRC0) + row * nb(rec, SRC0, 1), ne(rec, SRC0, 0) * 4)
        row += 1
    return 0


def _planted(self: CpuPlanBuilder, users: Any) -> dict[Kernel, int]:
    found = _ADDRESSES(self, users)
    return {k: _set_rows.address if k.name == "set_rows_kernel" else a for k, a in found.items()}


_ADDRESSES = CpuPlanBuilder._addresses

if __name__ == "__main__":
    CpuPlanBuilder._addresses = _planted  # type: ignore[method-assign]
    sys.exit(main())
