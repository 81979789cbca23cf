"""SOLVE_TRI: systems of linear equations with triangular matrices."""

from __future__ import annotations

from protocol.ggml.ops import Op
from protocol.tensor import Tensor
from rpc_server.ops import checks
from rpc_server.ops.arrays import ArrayContext
from rpc_server.ops.checks import F32_ONLY
from rpc_server.ops.table import contract, reference, source


@contract(Op.SOLVE_TRI)
def _solve_tri_contract(t: Tensor) -> None:
    """A X = B: src0 is A (n, n, ...), of which the lower triangle counts, src1 is B (k, n, ...).

    ggml has names for other variants, and no node of them.
    """
    checks.result(t, F32_ONLY)
    _, n, *batches = t.ne
    a = checks.source(t, 0, F32_ONLY)
    checks.shape(a, (n, n, *batches), "source 0")
    checks.distinct(a, "source 0")
    checks.shape(checks.source(t, 1, F32_ONLY), t.ne, "source 1")


@reference(Op.SOLVE_TRI)
def _solve_tri(ctx: ArrayContext, t: Tensor) -> None:
    """Row by row: what the rows above contribute is subtracted, then the diagonal divides."""
    a, b, x = ctx.f32(source(t, 0)), ctx.f32(source(t, 1)), ctx.view(t)
    for row in range(t.ne[1]):
        ctx.look()
        this = slice(row, row + 1)
        known = ctx.xp.matmul(a[:, :, this, :row], x[:, :, :row])
        x[:, :, this] = (b[:, :, this] - known) / a[:, :, this, this]
