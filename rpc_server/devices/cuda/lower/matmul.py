"""Lowerings of matrix products: few columns by kernels of our own, many by cuBLAS."""

from __future__ import annotations

from protocol.ggml_ops import Op
from protocol.ggml_types import GgmlType
from rpc_server.devices.cuda.kernels import kernel, kernel_of_weights
from rpc_server.devices.cuda.lower.library import by_library
from rpc_server.devices.cuda.planner import MAX_GRID, CudaPlanner, lowers
from rpc_server.graph.tensor import Tensor
from rpc_server.ops.checks import FLOATS, source
from rpc_server.ops.rounding import activation_type

_QUANTIZE = kernel("columns", "quantize_columns", 128)
_QUANTIZE_K = kernel("columns", "quantize_columns_k", 128)
_WIDEN = kernel("columns", "widen_columns", 256)
_ROUTE = kernel("columns", "route_columns", 256)
_THREADS = 128

# From so many columns on weights are better decoded once, for cuBLAS.
_MANY_COLUMNS = 24
# What route_columns has shared memory for.
_MOST_EXPERTS = 4096

# Columns that a kernel multiplies a weight with while it has it; their number is in its name.
_GROUPS = (1, 2, 4, 8)


def codes_stride(k: int) -> int:
    """Bytes of a column of ``k`` elements as codes, see columns.cu; 16 bytes aligned."""
    return -(-(k + k // 32 * 4 + k // 16 * 4) // 16) * 16


def floats_stride(k: int) -> int:
    """Bytes of a column of ``k`` floats."""
    return -(-4 * k // 16) * 16


def columns_in_scratch(weights: Tensor, x: Tensor, planner: CudaPlanner) -> tuple[int, int]:
    """(address, stride) of the columns as products with ``weights`` read them.

    They are made once for all products of the graph that share them.
    """
    k = x.ne[0]
    form = activation_type(weights.type) if weights.quantized else GgmlType.F32
    stride = codes_stride(k) if weights.quantized else floats_stride(k)
    key = ("columns", form, x.address, x.type, x.ne, x.nb)
    address, fresh = planner.shared_scratch(key, (x,), stride * x.nrows)
    if fresh:
        # How many elements a block of threads does, and of how many threads.
        each, threads, chosen = {
            GgmlType.F32: (256, 256, _WIDEN),
            GgmlType.Q8_K: (1024, _THREADS, _QUANTIZE_K),
        }.get(form, (128, _THREADS, _QUANTIZE))
        grid = (min(x.nrows, MAX_GRID[0]), min(-(-k // each), MAX_GRID[1]))
        extra = (address, stride, int(form is GgmlType.Q8_1))
        planner.launch(chosen, x, grid, threads, slots=(None, x), extra=extra)
    return address, stride


def lanes_of_a_row(weights: Tensor) -> int:
    """How many lanes share a row: fewer where it is too short for a warp."""
    steps = weights.ne[0] // 32 if weights.quantized else weights.ne[0] * weights.type_size // 16
    return 8 if steps <= 8 else 16 if steps <= 16 else 32


def _aligned_rows(weights: Tensor) -> bool:
    return all(n % 16 == 0 for n in (weights.address, *weights.nb[1:]))


def _supported(t: Tensor) -> bool:
    weights, x = source(t, 0), source(t, 1)
    return (
        (weights.quantized or weights.type in FLOATS)
        and x.type in FLOATS
        and weights.contiguous_rows
        and t.type is GgmlType.F32
    )


def _launch(
    t: Tensor, planner: CudaPlanner, name: str, grid: tuple[int, int, int], *routing: int
) -> None:
    """``columns_in_scratch`` comes before any other scratch of the node."""
    weights, x = source(t, 0), source(t, 1)
    address, stride = columns_in_scratch(weights, x, planner)
    planner.launch(
        kernel_of_weights("matvec", name, weights.type, _THREADS),
        t,
        grid,
        _THREADS,
        extra=(address, stride, lanes_of_a_row(weights), _aligned_rows(weights), *routing),
    )


def _row_blocks(weights: Tensor) -> int:
    return -(-weights.ne[1] // (_THREADS // lanes_of_a_row(weights)))


def _lower_few_columns(t: Tensor, planner: CudaPlanner) -> bool:
    weights = source(t, 0)
    group = next((n for n in _GROUPS if t.ne[1] <= n), _GROUPS[-1])
    grid = (_row_blocks(weights), -(-t.ne[1] // group), t.ne[2] * t.ne[3])
    if grid[1] > MAX_GRID[1] or grid[2] > MAX_GRID[2]:
        return False
    _launch(t, planner, f"multiply_{group}", grid)
    return True


@lowers(Op.MUL_MAT)
def lower_mul_mat(t: Tensor, planner: CudaPlanner) -> bool:
    if not _supported(t):
        return False
    if t.ne[1] >= _MANY_COLUMNS and by_library(t, planner):
        return True
    return _lower_few_columns(t, planner)


@lowers(Op.MUL_MAT_ID)
def lower_mul_mat_id(t: Tensor, planner: CudaPlanner) -> bool:
    weights, x = source(t, 0), source(t, 1)
    if not _supported(t):
        return False
    experts, pairs = weights.ne[2], t.ne[1] * t.ne[2]
    if pairs <= 2 * experts or experts > _MOST_EXPERTS:
        # Hardly any expert is asked twice.
        grid = (_row_blocks(weights), t.ne[1], t.ne[2])
        if grid[1] > MAX_GRID[1] or grid[2] > MAX_GRID[2]:
            return False
        _launch(t, planner, "multiply_routed", grid)
        return True
    groups = pairs // 8 + experts
    if groups > MAX_GRID[1]:
        return False
    columns_in_scratch(weights, x, planner)
    routing = planner.scratch(4 * (1 + 3 * groups))
    sorted_pairs = planner.scratch(4 * pairs)
    planner.launch(_ROUTE, t, (1,), 256, extra=(routing, sorted_pairs), shared=max(4 * experts, 4))
    grid = (_row_blocks(weights), groups, 1)
    _launch(t, planner, "multiply_grouped", grid, routing, sorted_pairs)
    return True
