"""Products with many columns, by cuBLAS: weights are decoded a tile at a time, never whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

from protocol.ggml.types import GgmlType
from protocol.tensor import Tensor
from rpc_server.devices.cuda.kernels import kernel
from rpc_server.devices.cuda.lower.walk import as_floats, decoded, dense
from rpc_server.devices.cuda.planner import CudaPlanner, Product
from rpc_server.ops.table import source

_T = TypeVar("_T")

_CONVERT = kernel("copy", "copy_rows")
_LARGEST = kernel("columns", "largest_of_rows")
_HALVE = kernel("columns", "halve_columns")

# Bytes of weights that are decoded at a time, by capability, each for what comes up to the next.
# Where the second-level cache holds so many (A100, RTX 40 and newer) they stay in it until they are
# multiplied; other cards read them from memory anyway, so that fewer launches are all that counts:
# any matrix of an 8B but the last goes as one.
_TILE_BYTES = {60: 128 << 20, 80: 32 << 20, 86: 128 << 20, 89: 32 << 20}


def of_capability(table: Mapping[int, _T], capability: int) -> _T:
    """Return what a table has for a card (61 for 6.1): an entry is for all up to the next one."""
    return table[max(c for c in table if c <= capability)]


def product_type(weights: GgmlType, capability: int) -> GgmlType:
    """Return the type that a card multiplies with weights in; sums are F32 whatever it is.

    Cards of capability 6.1 have next to no half precision, those before 8.0 no BF16.
    """
    if weights is GgmlType.F32 or capability == 61:
        return GgmlType.F32
    if weights is GgmlType.BF16:
        return GgmlType.BF16 if capability >= 80 else GgmlType.F32
    return GgmlType.F16


def _columns(x: Tensor, type_: GgmlType, planner: CudaPlanner) -> tuple[int, int, int]:
    """(address, bytes of a row, factor) of the columns, dense and of ``type_``.

    At the address ``factor`` is what products with them are to be multiplied with: activations of
    some models are larger than half precision holds, in prompts as in decoding. 0: nothing.
    """
    if x.type is type_ and x.contiguous:
        return x.address, x.nb[1], 0
    to = dense(x, type_, 0)
    key = ("dense", type_, x.type, x.ne, x.nb)
    halved = type_ is GgmlType.F16 and x.type is not type_
    size = -(-to.nb[1] * x.nrows // 64) * 64
    address, fresh = planner.shared_scratch(key, (x,), size + (4 * x.nrows + 8 if halved else 0))
    to = replace(to, address=address)
    if not halved:
        if fresh:
            with planner.filling():
                _convert(to, x, planner)
        return address, to.nb[1], 0
    factor, tops = address + size, address + size + 8
    if fresh:
        with planner.filling():
            floats = as_floats(x, planner)
            planner.each_row(_LARGEST, to, x.nrows, x.ne[0], extra=(tops,), slots=(None, floats))
            planner.rows(_HALVE, to, x.nrows, x.ne[0], extra=(tops, factor), slots=(to, floats))
    return address, to.nb[1], factor


def by_library(t: Tensor, planner: CudaPlanner) -> bool:
    """Emit a product of many columns; False where this isn't the way to do it."""
    weights, x = source(t, 0), source(t, 1)
    if not t.contiguous_rows or t.nb[1] % 4:
        return False
    type_ = product_type(weights.type, planner.capability)
    columns, row, factor = _columns(x, type_, planner)
    size = 4 if type_ is GgmlType.F32 else 2
    as_they_are = weights.type is type_ and weights.nb[1] % size == 0
    rows = weights.ne[1]
    if not as_they_are:
        at_once = of_capability(_TILE_BYTES, planner.capability)
        rows = min(rows, max(at_once // (size * weights.ne[0]), 1))
    tile = 0 if as_they_are else planner.scratch(size * weights.ne[0] * rows)
    repeat2, repeat3 = t.ne[2] // weights.ne[2], t.ne[3] // weights.ne[3]
    for w3 in range(weights.ne[3]):
        for w2 in range(weights.ne[2]):
            matrix = weights.address + w2 * weights.nb[2] + w3 * weights.nb[3]
            for first in range(0, weights.ne[1], rows):
                count = min(rows, weights.ne[1] - first)
                a, a_row = matrix + first * weights.nb[1], weights.nb[1]
                if not as_they_are:
                    part = replace(weights, ne=(weights.ne[0], count, 1, 1), address=a)
                    _convert(dense(part, type_, tile), part, planner)
                    a, a_row = tile, size * weights.ne[0]
                for i3 in range(w3 * repeat3, (w3 + 1) * repeat3):
                    i2 = w2 * repeat2
                    planner.product(
                        Product(
                            m=count,
                            n=x.ne[1],
                            k=weights.ne[0],
                            type=type_,
                            a=a,
                            lda=a_row // size,
                            b=columns + row * x.ne[1] * (i2 + x.ne[2] * i3),
                            ldb=row // size,
                            stride_b=row * x.ne[1] // size,
                            c=t.address + 4 * first + i2 * t.nb[2] + i3 * t.nb[3],
                            ldc=t.nb[1] // 4,
                            stride_c=t.nb[2] // 4,
                            batch=repeat2,
                            factor=factor,
                        )
                    )
    return True


def _convert(to: Tensor, t: Tensor, planner: CudaPlanner) -> None:
    """Rows of ``t``, blocks or floats, as those of ``to``, floats."""
    if t.quantized:
        decoded(to, t, planner)
    else:
        planner.rows(_CONVERT, to, t.nrows, t.ne[0], slots=(to, t))
