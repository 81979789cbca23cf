"""Products with many columns, by cuBLAS: weights are decoded a tile at a time, never whole."""

from __future__ import annotations

from dataclasses import replace

from protocol.ggml_types import GgmlType
from rpc_server.devices.cuda.kernels import kernel, kernel_of_weights
from rpc_server.devices.cuda.planner import MAX_GRID, CudaPlanner, Product
from rpc_server.graph.tensor import Tensor

_CONVERT = kernel("copy", "copy_rows")

# Bytes of weights that are decoded at a time: few launches, and little beside the weights.
_TILE_BYTES = 32 << 20

_FLOATS = (GgmlType.F32, GgmlType.F16, GgmlType.BF16)


def product_type(weights: GgmlType, capability: int) -> GgmlType:
    """The type that a card multiplies with weights in; sums are F32 whatever it is.

    Cards of capability 6.1 have next to no half precision, those before 8.0 no BF16.
    """
    if weights is GgmlType.F32 or capability == 61:
        return GgmlType.F32
    if weights is GgmlType.BF16:
        return GgmlType.BF16 if capability >= 80 else GgmlType.F32
    return GgmlType.F16


def _matrix(t: Tensor, type_: GgmlType, rows: int, address: int) -> Tensor:
    """A dense matrix of ``type_`` with rows as long as those of ``t``."""
    size = 2 if type_ in (GgmlType.F16, GgmlType.BF16) else 4
    row = size * t.ne[0]
    nb = (size, row, row * rows, row * rows)
    return replace(
        t, type=type_, ne=(t.ne[0], rows, 1, 1), nb=nb, address=address, src=(None,) * 10
    )


def _columns(x: Tensor, type_: GgmlType, planner: CudaPlanner) -> tuple[int, int]:
    """(address, bytes of a row) of the columns, dense and of ``type_``."""
    if x.type is type_ and x.contiguous:
        return x.address, x.nb[1]
    dense = _matrix(x, type_, x.nrows, 0)
    key = ("dense", type_, x.address, x.type, x.ne, x.nb)
    address, fresh = planner.kept(key, (x,), dense.nb[1] * x.nrows)
    if fresh:
        # Rows of all dimensions, one after the other.
        to = replace(dense, address=address, ne=x.ne)
        to = replace(to, nb=(dense.nb[0], dense.nb[1], dense.nb[1] * x.ne[1], 0))
        to = replace(to, nb=(*to.nb[:3], to.nb[2] * x.ne[2]))
        planner.rows(_CONVERT, to, x.nrows, x.ne[0], slots=(to, x))
    return address, dense.nb[1]


def by_library(t: Tensor, planner: CudaPlanner) -> bool:
    """Emit a product of many columns; False where this isn't the way to do it."""
    weights, x = t.src[0], t.src[1]
    assert weights is not None
    assert x is not None
    if not t.contiguous_rows or t.nb[1] % 4 or x.type not in _FLOATS:
        return False
    type_ = product_type(weights.type, planner.capability)
    columns, row = _columns(x, type_, planner)
    size = 4 if type_ is GgmlType.F32 else 2
    as_they_are = weights.type is type_ and weights.nb[1] % size == 0
    rows = weights.ne[1]
    if not as_they_are:
        rows = min(rows, max(_TILE_BYTES // (size * weights.ne[0]), 1))
    tile = 0 if as_they_are else planner.scratch(size * weights.ne[0] * rows)
    repeat2, repeat3 = t.ne[2] // weights.ne[2], t.ne[3] // weights.ne[3]
    for w3 in range(weights.ne[3]):
        for w2 in range(weights.ne[2]):
            matrix = weights.address + w2 * weights.nb[2] + w3 * weights.nb[3]
            for first in range(0, weights.ne[1], rows):
                count = min(rows, weights.ne[1] - first)
                a, a_row = matrix + first * weights.nb[1], weights.nb[1]
                if not as_they_are:
                    _decode(
                        replace(weights, ne=(weights.ne[0], count, 1, 1), address=a),
                        tile,
                        type_,
                        planner,
                    )
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
                        )
                    )
    return True


def _decode(weights: Tensor, tile: int, type_: GgmlType, planner: CudaPlanner) -> None:
    """Rows of one matrix of weights into the tile."""
    to = _matrix(weights, type_, weights.ne[1], tile)
    if not weights.quantized:
        planner.rows(_CONVERT, to, weights.ne[1], weights.ne[0], slots=(to, weights))
        return
    chosen = kernel_of_weights("dequantize", "dequantize", weights.type)
    grid = (min(weights.ne[1], MAX_GRID[0]), min(-(-weights.ne[0] // 32 // 128), MAX_GRID[1]))
    planner.launch(chosen, to, grid, 128, slots=(to, weights))
