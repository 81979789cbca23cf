"""Lowerings of FLASH_ATTN_EXT and FLASH_ATTN_BACK."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from protocol.ggml.ops import Op
from protocol.ggml.types import CACHE_TYPES, FLOATS, GgmlType, activation_type
from protocol.tensor import Tensor
from rpc_server.devices.cuda.kernels import (
    ATTENTION_SIZES,
    CudaKernel,
    attention_by_matrices,
    attention_kernel,
    attention_of_few_rows,
    kernel,
)
from rpc_server.devices.cuda.lower.matmul import columns_for_next
from rpc_server.devices.cuda.lower.walk import as_floats, dense
from rpc_server.devices.cuda.planner import COUNTERS, MAX_GRID, CudaPlanner, lowers
from rpc_server.ops.table import source

_THREADS = 128
# What a block of every card has without asking for more, less what kernels declare themselves.
_SHARED = (48 << 10) - 512

# What attention.cu is written with.
_ROWS, _TILE, _CHUNK = 16, 32, 64
# The same of attention_matrices.cu, and how many blocks of it a multiprocessor has registers for,
# by what it is compiled for: rows of values of so many times 32 elements.
_MATRIX_ROWS = 64
MATRIX_BLOCKS = {2: 3, 4: 3, 8: 2}
# From so many rows on tensor cores are the faster, though most of a block's rows are not there.
_MATRICES_FROM = 16
# What attention_few.cu is compiled for: rows, and units of a lane, of which a row has 256 elements.
# Their product says how many registers a thread has, and so how many blocks a multiprocessor has.
_FEW_ROWS = (1, 2, 4, 8)
_UNIT_ELEMENTS = 256
BLOCKS = {1: 5, 2: 4, 4: 3, 8: 2}
# Types of keys and values that tensor cores multiply, as half precision.
_HELD = (GgmlType.F16, *CACHE_TYPES)
# Bytes that attention_matrices.cu declares itself beyond what _SHARED leaves.
_BIASES = 64 * 16
# Its warps have tiles of their own.
_WARPS = 4

# Fewer positions than this aren't worth a block of their own.
_LEAST_PART = 128
# What attention_join has room for.
_MOST_PARTS = 128

_JOIN = kernel("attention_steps", "attention_join", 128)
_ROUND = kernel("attention_steps", "round_queries", 256)


@dataclass(frozen=True, slots=True)
class _Way:
    """A kernel for a node, and what it is launched with."""

    kernel: CudaKernel
    # Rows of a block, and how many blocks a multiprocessor has room for.
    rows: int
    blocks: int
    # Parts of the positions are whole numbers of so many.
    positions: int
    shared: int
    extra: tuple[int, ...]
    # Whether parts are put together by the kernel itself.
    joins: bool = False


def _in_units(t: Tensor) -> bool:
    """Return whether eight elements at a time can be loaded: 16 bytes of floats, or parts of
    blocks.
    """
    if t.quantized:
        return True
    strides = (nb for nb, n in zip(t.nb[1:], t.ne[1:], strict=True) if n > 1)
    return t.ne[0] % 8 == 0 and all(n % 16 == 0 for n in (t.address, *strides))


def _lanes(n: int) -> int:
    """Lanes that share a row of ``n`` elements: a power of two."""
    return min(max(1 << (n // 8 - 1).bit_length(), 4), 32)


def _few_rows(rows: int, k: Tensor, v: Tensor) -> _Way | None:
    """The kernel that reads each key and value once, into registers; None if it can't be used."""
    units = -(-max(k.ne[0], v.ne[0]) // _UNIT_ELEMENTS)
    count = next((n for n in _FEW_ROWS if rows <= n), None)
    if count is None or units > 2 or count * units not in BLOCKS:
        return None
    if not (_in_units(k) and _in_units(v)):
        return None
    lanes = _lanes(k.ne[0]), _lanes(v.ne[0])
    return _Way(
        kernel=attention_of_few_rows(k.type, v.type, units, count),
        rows=count,
        blocks=BLOCKS[count * units],
        positions=_TILE * _WARPS,
        shared=4 * count * max(8 * units * lanes[0], v.ne[0]),
        extra=lanes,
        joins=True,
    )


def _many_rows(k: Tensor, v: Tensor) -> _Way:
    """The kernel that shares tiles of keys and values among rows."""
    size = next(n for n in ATTENTION_SIZES if v.ne[0] <= 32 * n)
    padded = -(-k.ne[0] // _CHUNK) * _CHUNK
    tile = _TILE * (_CHUNK + 1)
    # Queries that don't fit are read again for each tile.
    whole = 4 * (_ROWS * padded + tile) <= _SHARED
    shared = 4 * (_ROWS * (padded if whole else _CHUNK) + tile)
    return _Way(
        kernel=attention_kernel(size),
        rows=_ROWS,
        blocks=min((96 << 10) // shared, 4),
        positions=_TILE,
        shared=shared,
        extra=(int(_in_units(k)), int(_in_units(v)), int(whole)),
    )


def _matrices(rows: int, k: Tensor, v: Tensor, capability: int) -> bool:
    """Return whether tensor cores are to multiply keys and values."""
    fit = all(t.type in _HELD and _in_units(t) for t in (k, v))
    return capability >= 75 and rows >= _MATRICES_FROM and fit


def _by_matrices(k: Tensor, v: Tensor) -> _Way:
    """The kernel that multiplies by tensor cores."""
    size = next(n for n in MATRIX_BLOCKS if v.ne[0] <= 32 * n)
    # Queries, or a chunk of each, as half precision; then a chunk of keys or values.
    chunk = 16 * max(_TILE * (_CHUNK // 8 + 1), _CHUNK * (_TILE // 8 + 1))
    of_queries = [
        16 * _MATRIX_ROWS * (n // 8 + 1) for n in (-(-k.ne[0] // _CHUNK) * _CHUNK, _CHUNK)
    ]
    whole = of_queries[0] + chunk <= _SHARED - _BIASES
    shared = of_queries[not whole] + chunk
    return _Way(
        kernel=attention_by_matrices(size),
        rows=_MATRIX_ROWS,
        blocks=min((96 << 10) // shared, MATRIX_BLOCKS[size]),
        positions=_TILE,
        shared=shared,
        extra=(int(whole),),
    )


def _rounded(q: Tensor, keys: GgmlType, planner: CudaPlanner) -> tuple[Tensor, GgmlType]:
    """Queries, and the type that the kernel rounds them to: as ggml's CPU backend rounds them."""
    if keys in FLOATS:
        return q, keys
    if activation_type(keys) is not GgmlType.Q8_K:
        return q, GgmlType.Q8_0
    to = dense(q, GgmlType.F32, planner.scratch(4 * q.nelements))
    planner.launch(_ROUND, to, (min(q.nrows, MAX_GRID[0]),), 256, slots=(to, q))
    return to, GgmlType.F32


def _readable(t: Tensor, planner: CudaPlanner) -> Tensor:
    """Keys or values of a type that kernels read: others as F32 in scratch."""
    if t.empty:
        # No positions: nothing is read.
        return dense(t, GgmlType.F32, 0)
    return t if t.type in CACHE_TYPES else as_floats(t, planner)


def _slices(t: Tensor, v: Tensor, most: int) -> list[tuple[Tensor, Tensor]]:
    """Results and values in pieces of up to ``most`` elements."""
    pieces = []
    for first in range(0, v.ne[0], most):
        n = min(most, v.ne[0] - first)
        offset = first // v.block_size * v.type_size
        pieces.append(
            (
                replace(t, ne=(n, *t.ne[1:]), address=t.address + 4 * first),
                replace(v, ne=(n, *v.ne[1:]), address=v.address + offset),
            )
        )
    return pieces


def _heads_of_group(q: Tensor, k: Tensor, v: Tensor) -> int:
    """Heads that share both their keys and their values; they needn't be equally many."""
    return math.gcd(q.ne[2] // k.ne[2], q.ne[2] // v.ne[2])


def _columns(t: Tensor, planner: CudaPlanner) -> tuple[int, ...]:
    """Return where the result goes as columns, as of columns_for_next, if the kernel can do it."""
    q, k, v = source(t, 0), source(t, 1), source(t, 2)
    if any(s.empty or (s.quantized and s.type not in CACHE_TYPES) for s in (k, v)):
        return ()
    heads = _heads_of_group(q, k, v)
    rows = heads * q.ne[1]
    few = None if _matrices(rows, k, v, planner.capability) else _few_rows(rows, k, v)
    # All heads of a group have to be in one block.
    if few is None or (few.rows % heads and rows > few.rows):
        return ()
    planner.absorb([t])
    return columns_for_next(t, planner, v.ne[0] * q.ne[2], heads * v.ne[0])


@lowers(Op.FLASH_ATTN_EXT)
def lower_attention(t: Tensor, planner: CudaPlanner) -> bool:
    q, keys = source(t, 0), source(t, 1)
    if q.nrows > MAX_GRID[0]:
        return False
    columns = _columns(t, planner)
    q, rounding = _rounded(q, keys.type, planner)
    k, values = _readable(keys, planner), _readable(source(t, 2), planner)
    heads = _heads_of_group(q, k, values)
    rows = heads * q.ne[1]
    matrices = _matrices(rows, k, values, planner.capability)
    most = max(MATRIX_BLOCKS) if matrices else ATTENTION_SIZES[-1]
    for to, v in _slices(t, values, 32 * most):
        few = None if matrices else _few_rows(rows, k, v)
        way = few or (_by_matrices(k, v) if matrices else _many_rows(k, v))
        blocks = -(-rows // way.rows) * (q.ne[2] // heads) * q.ne[3]
        # As many as fill the card at once. Parts are whole tiles; the last one may be smaller, and
        # none is empty.
        wanted = way.blocks * planner.multiprocessors // blocks
        if way.joins and blocks > COUNTERS:
            wanted = 1
        parts = max(1, min(wanted, k.ne[1] // _LEAST_PART, _MOST_PARTS))
        tiles = -(-k.ne[1] // way.positions)
        per_part = max(-(-tiles // parts), 1) * way.positions
        parts = max(-(-k.ne[1] // per_part), 1)
        left = planner.scratch(4 * (v.ne[0] + 2) * q.nrows * parts) if parts > 1 else 0
        slots = (to, q, k, v, *t.src[3:5])
        extra = (per_part, left, heads, rounding, *way.extra, *columns)
        planner.launch(
            way.kernel, t, (blocks, parts), _THREADS, slots=slots, extra=extra, shared=way.shared
        )
        if parts > 1 and not way.joins:
            planner.launch(_JOIN, t, (q.nrows,), _THREADS, slots=slots, extra=(parts, left))
    return True


_SCORES_BACK = kernel("attention_back", "attention_scores_back", _THREADS)
_GRADIENTS = kernel("attention_back", "attention_gradients", _THREADS)

# In the result gradients start at multiples of so many elements.
_ALIGNED = 4


@lowers(Op.FLASH_ATTN_BACK)
def lower_attention_back(t: Tensor, planner: CudaPlanner) -> bool:
    q, k = source(t, 0), source(t, 1)
    size = 4 * q.nrows * k.ne[1]
    scratch = (planner.scratch(size), planner.scratch(size))
    planner.each_row(_SCORES_BACK, t, q.nrows, k.ne[1], extra=scratch)
    of_keys = -(-q.nelements // _ALIGNED) * _ALIGNED
    of_values = of_keys + -(-k.nelements // _ALIGNED) * _ALIGNED
    grid = (min(-(-t.nelements // _THREADS), MAX_GRID[0]),)
    extra = (*scratch, t.nelements, of_keys, of_values)
    planner.launch(_GRADIENTS, t, grid, _THREADS, extra=extra)
    return True
