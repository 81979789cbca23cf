"""Lowerings of FLASH_ATTN_EXT and FLASH_ATTN_BACK."""

from __future__ import annotations

from protocol.ggml_ops import Op
from rpc_server.devices.cuda.kernels import ATTENTION_SIZES, attention_kernel, kernel
from rpc_server.devices.cuda.lower.copy import ENCODED
from rpc_server.devices.cuda.planner import MAX_GRID, CudaPlanner, lowers
from rpc_server.graph.tensor import Tensor
from rpc_server.ops.checks import FLOATS, source

# What attention.cu is written with.
_ROWS, _TILE, _CHUNK, _THREADS = 16, 32, 64, 128
# What a block of every card has without asking for more.
_SHARED = 48 << 10

# What keys and values may be kept in.
KEPT_IN = FLOATS | ENCODED

# Fewer positions than this aren't worth a block of their own.
_LEAST_PART = 128


def _parts(blocks: int, positions: int, multiprocessors: int) -> int:
    """How many blocks share the positions of each row: the card should be full."""
    wanted = -(-2 * multiprocessors // blocks)
    return max(1, min(wanted, positions // _LEAST_PART, MAX_GRID[2]))


@lowers(Op.FLASH_ATTN_EXT)
def lower_attention(t: Tensor, planner: CudaPlanner) -> bool:
    q, k, v = source(t, 0), source(t, 1), source(t, 2)
    size = next((n for n in ATTENTION_SIZES if v.ne[0] <= 32 * n), None)
    padded = -(-k.ne[0] // _CHUNK) * _CHUNK
    shared = 4 * (_ROWS * padded + _TILE * (_CHUNK + 1))
    same_heads = k.ne[2] == v.ne[2] and k.ne[3] == v.ne[3]
    if size is None or shared > _SHARED or not same_heads:
        return False
    for s in (k, v):
        if s.type not in KEPT_IN or not s.contiguous_rows:
            return False
        if s.quantized and s.ne[0] % 32:
            return False
    rows = q.ne[1] * (q.ne[2] // k.ne[2])
    grid = (-(-rows // _ROWS), k.ne[2] * q.ne[3])
    if grid[1] > MAX_GRID[1]:
        return False
    parts = _parts(grid[0] * grid[1], k.ne[1], planner.multiprocessors)
    # Parts are whole tiles; the last one may be smaller, and none is empty.
    tiles = -(-k.ne[1] // _TILE)
    per_part = max(-(-tiles // parts), 1) * _TILE
    parts = max(-(-k.ne[1] // per_part), 1)
    left = planner.scratch(4 * (v.ne[0] + 2) * q.nrows * parts) if parts > 1 else 0
    attend, join = (attention_kernel(size, name) for name in ("attention", "attention_join"))
    planner.launch(attend, t, (*grid, parts), _THREADS, extra=(per_part, left), shared=shared)
    if parts > 1:
        planner.each_row(join, t, q.nrows, _THREADS, extra=(parts, left))
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
