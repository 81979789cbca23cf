"""What lowerings of kernels with a thread for each element have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from protocol.ggml.types import GgmlType
from protocol.tensor import NO_PARAMS, Dims, Tensor
from rpc_server.devices.cuda.kernels import CudaKernel, kernel_of_weights
from rpc_server.devices.cuda.planner import MAX_GRID, CudaPlanner
from rpc_server.devices.planning.shapes import is_flat

# Numbers of strides, paddings and dilations are of 32 bits; times such sizes they fit 64.
_MOST_PLACES = 1 << 31


def elements(
    chosen: CudaKernel,
    t: Tensor,
    planner: CudaPlanner,
    *extra: int,
    n: int | None = None,
    slots: Sequence[Tensor | None] | None = None,
    params: Sequence[int] | None = None,
) -> bool:
    """Emit a launch of a kernel of FOR_ELEMENTS.

    Its first extra word is ``n``: elements of ``t``.
    """
    n = t.nelements if n is None else n
    grid = (min(-(-n // chosen.threads), MAX_GRID[0]),)
    planner.launch(chosen, t, grid, chosen.threads, extra=(n, *extra), slots=slots, params=params)
    return True


def small(*tensors: Tensor) -> bool:
    """Return whether all dimensions are below 2^31: products with numbers of 32 bits don't
    overflow.
    """
    return all(n < _MOST_PLACES for t in tensors for n in t.ne)


def as_row(t: Tensor) -> Tensor:
    """Return a dense tensor as one row; others as they are."""
    return replace(t, ne=(t.nelements, 1, 1, 1)) if is_flat(t) and not t.quantized else t


def dense(t: Tensor, type_: GgmlType, address: int, ne: Dims | None = None) -> Tensor:
    """Return a dense tensor of ``type_`` and of ``t``'s shape at ``address``.

    It stands for ``t``, whatever that was computed by.
    """
    ne = t.ne if ne is None else ne
    size = 4 if type_ in (GgmlType.F32, GgmlType.I32) else 2
    nb = (size, size * ne[0], size * ne[0] * ne[1], size * ne[0] * ne[1] * ne[2])
    return replace(t, type=type_, ne=ne, nb=nb, address=address, op_params=NO_PARAMS)


def decode_grid(rows: int, n: int) -> tuple[int, int]:
    """Return the blocks of threads that decode rows of ``n`` elements.

    Each does 128 runs of 32 at a time.
    """
    return min(rows, MAX_GRID[0]), min(-(-n // 32 // 128), MAX_GRID[1])


def decoded(to: Tensor, blocks: Tensor, planner: CudaPlanner) -> None:
    """Emit a launch that decodes rows of blocks to floats; both have the same shape."""
    chosen = kernel_of_weights("dequantize", "dequantize", blocks.type)
    grid = decode_grid(blocks.nrows, blocks.ne[0])
    planner.launch(chosen, to, grid, 128, slots=(to, blocks))


def as_floats(t: Tensor, planner: CudaPlanner) -> Tensor:
    """Return ``t`` if its elements can be loaded one by one, else its values as F32 in scratch."""
    if not t.quantized or t.empty:
        return t
    to = dense(t, GgmlType.F32, planner.scratch(4 * t.nelements))
    decoded(to, t, planner)
    return to
