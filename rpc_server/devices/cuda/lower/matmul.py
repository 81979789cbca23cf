"""Lowerings of matrix products.

A few columns: each weight is read once (matvec.cu). More: tiles of the result, in whole numbers
where weights are blocks, by tensor cores where there are any (tiles.cu). Where a card multiplies
floats faster than that, and weights of floats that it has no tensor cores for: cuBLAS.
"""

from __future__ import annotations

from collections.abc import Sequence

from protocol.ggml.ops import Op
from protocol.ggml.types import FLOATS, TYPE_INFO, GgmlType, activation_type
from protocol.tensor import Tensor
from rpc_server.devices.cuda.kernels import CudaKernel, kernel, kernel_of_weights
from rpc_server.devices.cuda.lower.library import by_library, of_capability
from rpc_server.devices.cuda.planner import COUNTERS, MAX_GRID, CudaPlanner, is_valid, lowers
from rpc_server.ops.table import source

_QUANTIZE = kernel("columns", "quantize_columns", 128)
_TAKE = kernel("columns", "take_columns", 128)
_WIDEN = kernel("columns", "widen_columns", 256)
_SHORTEN = kernel("columns", "shorten_columns", 256)
_ROUTE = kernel("columns", "route_columns", 256)
_THREADS = 128

# Elements of GLU's result that matvec.cu rounds together, and has a counter for.
_ROUNDED_AT_ONCE = 256

# What route_columns has shared memory for.
_MOST_EXPERTS = 4096

# Runs of 32 that a lane multiplies at once, where it is more than one (spans.cuh).
RUNS_OF_SPAN = {
    GgmlType.Q4_0: 2,
    GgmlType.Q4_1: 2,
    GgmlType.Q5_0: 4,
    GgmlType.Q5_1: 2,
    GgmlType.Q8_0: 4,
    GgmlType.Q4_K: 2,
    GgmlType.Q5_K: 2,
    GgmlType.Q6_K: 4,
    GgmlType.IQ4_NL: 2,
    GgmlType.IQ4_XS: 4,
    GgmlType.MXFP4: 4,
}

# Columns that a kernel multiplies a weight with while it has it; their number is in its name.
_GROUPS = (1, 2, 4, 8)
TILES = (16, 32, 64)
TILES_OF_FLOATS = (*TILES, 128)
# Rows of a tile.
_TILE_ROWS = 64
# Decoding the weights of a tile takes about as long as this many columns of it, by capability:
# tensor cores, which are there from 7.5 on, are done with a column in a quarter of the time.
_COLUMNS_OF_DECODING = {60: 8, 75: 32}
# The same for reading floats from memory.
_COLUMNS_OF_READING = 64
# From which capability on tensor cores multiply weights of floats.
_TENSOR_CORES_FROM = {GgmlType.F16: 75, GgmlType.BF16: 80}

# From so many columns on cuBLAS is faster, by capability, each for what comes up to the next. These
# are figures on paper, see docs/gpu.md, "On paper: reading a prompt".
_LIBRARY_FROM = {
    60: 24,
    61: None,
    70: 160,
    75: None,
    80: 320,
    86: None,
    90: 128,
    100: 64,
    120: None,
}
# The same for weights of floats: where tensor cores multiply them here, and elsewhere.
_LIBRARY_FROM_OF_TILED_FLOATS = {75: None, 80: 129, 86: None, 90: 129, 100: 65, 120: None}
_LIBRARY_FROM_OF_FLOATS = 24

# What activations are rounded to, here or by clients themselves, and the numbers of rounding.cuh.
ROUNDED_AS = {GgmlType.Q8_0: 0, GgmlType.Q8_1: 1, GgmlType.Q8_K: 2}


def products_of(weights: GgmlType, capability: int) -> list[CudaKernel]:
    """Return a kernel of each unit that products with such weights need on a card."""
    units = [("matvec", "multiply_1")]
    if TYPE_INFO[weights].quantized or _multiplied_by_tensor_cores(weights, capability):
        units.append(("tiles", f"tiles_{TILES[-1]}"))
    return [kernel_of_weights(unit, name, weights, _THREADS) for unit, name in units]


def _multiplied_by_tensor_cores(floats: GgmlType, capability: int) -> bool:
    return capability >= _TENSOR_CORES_FROM.get(floats, capability + 1)


def has_tiles(weights: Tensor, capability: int) -> bool:
    """Return whether a card multiplies weights with many columns in tiles (tiles.cu).

    Floats have to be such as tensor cores take, in rows that can be loaded by 16 bytes.
    """
    if weights.quantized:
        return True
    whole = weights.ne[0] % 8 == 0 and _alignment(weights) == 16
    return whole and _multiplied_by_tensor_cores(weights.type, capability)


def library_from(weights: Tensor, capability: int) -> int | None:
    """Return from how many columns on a product is best left to cuBLAS; None: never."""
    if weights.quantized:
        return of_capability(_LIBRARY_FROM, capability)
    if has_tiles(weights, capability):
        return of_capability(_LIBRARY_FROM_OF_TILED_FLOATS, capability)
    return _LIBRARY_FROM_OF_FLOATS


def at_once(n: int, weights: Tensor, matrices: int, multiprocessors: int, capability: int) -> int:
    """Return how many of ``n`` columns a block of threads should multiply (_GROUPS or tiles).

    ``matrices`` is how many have so many columns. Wide tiles decode and read weights less often,
    narrow ones leave less of the card without work.
    """
    if n <= _GROUPS[-1] or not has_tiles(weights, capability):
        return next((group for group in _GROUPS if n <= group), _GROUPS[-1])

    tiles: tuple[int, ...] = TILES_OF_FLOATS
    once = _COLUMNS_OF_READING
    if weights.quantized:
        tiles, once = TILES, of_capability(_COLUMNS_OF_DECODING, capability)

    def time(tile: int) -> int:
        blocks = -(-n // tile) * -(-weights.ne[1] // _TILE_ROWS) * matrices
        return -(-blocks // multiprocessors) * (tile + once)

    return min(tiles, key=lambda tile: (time(tile), -tile))


def _is_tile(columns: int) -> bool:
    """Return whether what :func:`at_once` returned is a tile's."""
    return columns > _GROUPS[-1]


def codes_stride(k: int) -> int:
    """Return the bytes of a column of ``k`` elements as codes, see columns.cuh."""
    return k + k // 32 * 16


def floats_stride(k: int, form: GgmlType) -> int:
    """Return the bytes of a column of ``k`` floats, in tiles with a factor; see columns.cuh."""
    return -(-4 * k // 16) * 16 if form is GgmlType.F32 else 2 * k + 16


def column_form(weights: Tensor, x: Tensor, *, in_tiles: bool = False) -> GgmlType:
    """Return what products with ``weights`` read columns as: floats, or codes of this type."""
    if not weights.quantized:
        return weights.type if in_tiles else GgmlType.F32
    return x.type if x.quantized else activation_type(weights.type)


def place_columns(
    weights: Tensor, x: Tensor, planner: CudaPlanner, *, in_tiles: bool = False
) -> tuple[int, int, bool]:
    """Return (address, stride, fresh) of the columns as products with ``weights`` read them.

    They are kept for all products of the graph that share them; ``fresh``: nobody has made them.
    """
    form = column_form(weights, x, in_tiles=in_tiles)
    k = x.ne[0]
    stride = codes_stride(k) if weights.quantized else floats_stride(k, form)
    key = ("columns", form, x.type, x.ne, x.nb)
    address, fresh = planner.shared_scratch(key, (x,), stride * x.nrows)
    return address, stride, fresh


def columns_in_scratch(
    weights: Tensor, x: Tensor, planner: CudaPlanner, *, in_tiles: bool = False
) -> tuple[int, int]:
    """Return (address, stride) of the columns as products with ``weights`` read them.

    They are made if need be.
    """
    address, stride, fresh = place_columns(weights, x, planner, in_tiles=in_tiles)
    form = column_form(weights, x, in_tiles=in_tiles)
    if fresh and form in _TENSOR_CORES_FROM:
        as_floats = (address, stride, int(form))
        planner.each_row(_SHORTEN, x, x.nrows, x.ne[0], slots=(None, x), extra=as_floats)
    elif fresh:
        # How many elements a block of threads does, and of how many threads.
        if form is GgmlType.F32:
            each, threads, chosen = 256, 256, _WIDEN
        else:
            # A warp rounds a block at once, and takes a run of one that is there.
            at_once = 32 if x.quantized else TYPE_INFO[form].block_size
            each, threads = _THREADS // 32 * at_once, _THREADS
            chosen = _TAKE if x.quantized else _QUANTIZE
        grid = (min(x.nrows, MAX_GRID[0]), min(-(-x.ne[0] // each), MAX_GRID[1]))
        extra = (address, stride, ROUNDED_AS.get(form, 0))
        with planner.filling():
            planner.launch(chosen, x, grid, threads, slots=(None, x), extra=extra, params=())
    return address, stride


def columns_for_next(
    x: Tensor, planner: CudaPlanner, width: int | None = None, part: int = 0
) -> tuple[int, ...]:
    """Return where ``x`` goes as columns, their stride and form, if the next node reads them.

    Columns are rows of ``x``, or ``width`` elements each, of which ``part`` are rounded by
    themselves. That ``x`` is written must be known (:meth:`CudaPlanner.absorb`): what is kept of
    it is kept from now on.
    """
    reader = next(planner.ahead(), None)
    if reader is None or reader.op not in (Op.MUL_MAT, Op.MUL_MAT_ID) or not is_valid(reader):
        return ()
    weights, columns = source(reader, 0), source(reader, 1)
    same = columns.address == x.address and columns.nelements == x.nelements
    dense = columns.contiguous and x.contiguous and columns.ne[0] == (width or x.ne[0])
    floats = columns.type is x.type is GgmlType.F32
    if not (same and dense and floats and reads_codes(reader, planner)):
        return ()
    form = column_form(weights, columns)
    if part % TYPE_INFO[form].block_size:
        return ()
    address, stride, _ = place_columns(weights, columns, planner)
    return address, stride, ROUNDED_AS[form]


def _power_of_lanes(weights: Tensor) -> int:
    """Return how many lanes share a row, as a power of two: fewer where it is short."""
    steps = weights.ne[0] * weights.type_size // 16
    if weights.quantized:
        steps = weights.ne[0] // (32 * RUNS_OF_SPAN.get(weights.type, 1))
    return 3 if steps <= 8 else 4 if steps <= 16 else 5


def _alignment(weights: Tensor) -> int:
    """Return the largest power of two, up to 16, that divides the addresses of all rows.

    1 unless 8 divides the first: kernels may read what lies around a row by words of 8 bytes.
    """
    if weights.address % 8:
        return 1
    addresses = weights.address | weights.nb[1] | weights.nb[2] | weights.nb[3] | 16
    return addresses & -addresses


def _reciprocal(n: int) -> int:
    """Return what stands for a division of numbers below 2^16, see columns.cuh."""
    return -(-(1 << 32) // n)


def _divisors(t: Tensor) -> tuple[int, ...]:
    """Return the reciprocals by which a block of a product finds its matrices."""
    weights = source(t, 0)
    by = (t.ne[2], t.ne[2] // weights.ne[2], t.ne[3] // weights.ne[3])
    return tuple(map(_reciprocal, by))


def _supported(t: Tensor) -> bool:
    weights, x = source(t, 0), source(t, 1)
    return (
        (weights.quantized or weights.type in FLOATS)
        and x.type in (ROUNDED_AS.keys() | FLOATS if weights.quantized else FLOATS)
        and weights.contiguous_rows
        and (x.contiguous_rows or not x.quantized)
        and t.type is GgmlType.F32
    )


def _launch(
    t: Tensor, planner: CudaPlanner, unit: str, name: str, grid: Sequence[int], *routing: int
) -> None:
    """``columns_in_scratch`` comes before any other scratch of the node."""
    weights, x = source(t, 0), source(t, 1)
    address, stride = columns_in_scratch(weights, x, planner, in_tiles=unit == "tiles")
    planner.launch(
        kernel_of_weights(unit, name, weights.type, _THREADS),
        t,
        grid,
        _THREADS,
        extra=(
            address,
            stride,
            _power_of_lanes(weights),
            _alignment(weights),
            *(routing or (0, 0)),
            *(_divisors(t) if t.op is Op.MUL_MAT else ()),
        ),
    )


def _row_blocks(weights: Tensor, columns: int) -> int:
    """Blocks of threads for all rows of a matrix, ``columns`` columns at once."""
    rows = _TILE_ROWS if _is_tile(columns) else _THREADS >> _power_of_lanes(weights)
    return -(-weights.ne[1] // rows)


def _fits(grid: Sequence[int]) -> bool:
    return all(n <= most for n, most in zip(grid, MAX_GRID, strict=True))


def _by_kernel(t: Tensor, planner: CudaPlanner) -> bool:
    weights = source(t, 0)
    matrices = t.ne[2] * t.ne[3]
    columns = at_once(t.ne[1], weights, matrices, planner.multiprocessors, planner.capability)
    grid = (_row_blocks(weights, columns), -(-t.ne[1] // columns), matrices)
    if not _fits(grid):
        return False
    unit, name = ("tiles", "tiles") if _is_tile(columns) else ("matvec", "multiply")
    _launch(t, planner, unit, f"{name}_{columns}", grid)
    return True


def _is_for_library(t: Tensor, planner: CudaPlanner) -> bool:
    many = library_from(source(t, 0), planner.capability)
    return many is not None and t.ne[1] >= many


def reads_codes(t: Tensor, planner: CudaPlanner) -> bool:
    """Return whether a valid product reads activations that are floats as codes."""
    as_codes = _supported(t) and source(t, 0).quantized and not source(t, 1).quantized
    return as_codes and (t.op is Op.MUL_MAT_ID or not _is_for_library(t, planner))


@lowers(Op.MUL_MAT)
def lower_mul_mat(t: Tensor, planner: CudaPlanner) -> bool:
    if not _supported(t):
        return False
    if _is_for_library(t, planner) and by_library(t, planner):
        return True
    return _by_kernel(t, planner)


def is_one_column(t: Tensor) -> bool:
    """Return whether a valid MUL_MAT is one that :func:`multiply_one_column` can do."""
    weights = source(t, 0)
    # Blocks for the rows of three such fit a grid.
    few = 3 * weights.ne[1] <= MAX_GRID[0]
    return _supported(t) and t.nrows == 1 and weights.ne[2:] == (1, 1) and few


def multiply_one_column(
    products: Sequence[Tensor],
    planner: CudaPlanner,
    columns: tuple[int, int],
    glu: Tensor | None = None,
    rounded: Sequence[int] = (),
) -> None:
    """Emit one launch for up to three products of the same column with weights of one type.

    ``columns`` are its address and stride in scratch. ``glu`` is made of the results of two, in
    either order; ``rounded`` is where it goes as columns, as of :func:`columns_for_next`. Results
    are F32, and independent of one another.
    """
    if glu is not None:
        products = [source(glu, 0), source(glu, 1)]
    weights, x = [source(t, 0) for t in products], source(products[0], 1)
    blocks = [_row_blocks(w, 1) for w in weights]
    rest = [s for t, w in zip(products[1:], weights[1:], strict=True) for s in (t, w)]
    slots: list[Tensor | None] = [products[0], weights[0], x, *rest]
    if glu is not None:
        slots += [None, None, glu]
    planner.launch(
        kernel_of_weights(
            "matvec",
            "multiply_joint" if glu is None else "multiply_gated",
            weights[0].type,
            _THREADS,
        ),
        products[0],
        (sum(blocks) if glu is None else blocks[0],),
        _THREADS,
        extra=(
            *columns,
            _power_of_lanes(weights[0]),
            min(map(_alignment, weights)),
            # Of a product that isn't there no block is the first.
            *((blocks[0], sum(blocks[:2])) if glu is None else (0, 0, *rounded)),
        ),
        slots=slots,
        params=None if glu is None else glu.op_params,
    )


def multiply_both_experts(
    planner: CudaPlanner, columns: tuple[int, int], glu: Tensor, rounded: Sequence[int] = ()
) -> None:
    """Emit one launch for two products by experts, as :func:`is_of_few` says, and GLU of them.

    The products are GLU's sources; what else is given is as of :func:`multiply_one_column`.
    """
    first, second = source(glu, 0), source(glu, 1)
    weights = [source(t, 0) for t in (first, second)]
    planner.launch(
        kernel_of_weights("matvec", "multiply_routed_gated", weights[0].type, _THREADS),
        first,
        _blocks_of_few(first),
        _THREADS,
        extra=(
            *columns,
            _power_of_lanes(weights[0]),
            min(map(_alignment, weights)),
            *(0, 0, *rounded),
        ),
        slots=(*[first, *first.src[:3]], second, weights[1], None, glu),
        params=glu.op_params,
    )


def may_be_rounded(glu: Tensor) -> bool:
    """Return whether there are counters for rounding what GLU makes of products."""
    return -(-glu.ne[0] // _ROUNDED_AT_ONCE) * glu.nrows <= COUNTERS


def is_of_few(t: Tensor) -> bool:
    """Return whether a MUL_MAT_ID is one whose experts are hardly asked twice: column by column."""
    experts = source(t, 0).ne[2]
    few = t.ne[1] * t.ne[2] <= 2 * experts or experts > _MOST_EXPERTS
    return few and _supported(t) and _fits(_blocks_of_few(t))


def _blocks_of_few(t: Tensor) -> tuple[int, int, int]:
    return _row_blocks(source(t, 0), 1), t.ne[1], t.ne[2]


@lowers(Op.MUL_MAT_ID)
def lower_mul_mat_id(t: Tensor, planner: CudaPlanner) -> bool:
    weights, x = source(t, 0), source(t, 1)
    if not _supported(t):
        return False
    if is_of_few(t):
        _launch(t, planner, "matvec", "multiply_routed", _blocks_of_few(t))
        return True
    experts, pairs = weights.ne[2], t.ne[1] * t.ne[2]
    if experts > _MOST_EXPERTS:
        return False
    # As if all experts were asked equally often.
    each = -(-pairs // experts)
    columns = at_once(each, weights, experts, planner.multiprocessors, planner.capability)
    columns = max(columns, _GROUPS[-1])
    groups = pairs // columns + experts
    grid = (_row_blocks(weights, columns), groups, 1)
    if not _fits(grid):
        return False
    tiles = _is_tile(columns)
    columns_in_scratch(weights, x, planner, in_tiles=tiles)
    routing = planner.scratch(4 * (1 + 3 * groups))
    sorted_pairs = planner.scratch(4 * pairs)
    extra = (routing, sorted_pairs, columns, planner.scratch(4 * pairs))
    planner.launch(_ROUTE, t, (1,), 256, extra=extra, shared=max(4 * experts, 4))
    unit, name = ("tiles", f"tiles_{columns}") if tiles else ("matvec", "multiply_grouped")
    _launch(t, planner, unit, name, grid, routing, sorted_pairs)
    return True
