"""Ops that read or write rows named by indices in another tensor.

Indices are data: contracts can't see them, so the references check them when they run. They copy
them first: the result may lie over the indices, and what is used has to be what was checked.
"""

from __future__ import annotations

from typing import Any

from protocol.ggml.ops import Op
from protocol.ggml.types import DECODABLE, GgmlType
from protocol.tensor import Tensor
from rpc_server.ops import checks
from rpc_server.ops.arrays import ArrayContext
from rpc_server.ops.checks import F32_ONLY, I32_ONLY
from rpc_server.ops.table import contract, reference, refuse, require, source
from rpc_server.types import ENCODABLE, from_f32, to_f32

_INDICES = frozenset({GgmlType.I32, GgmlType.I64})


def checked_indices(ctx: ArrayContext, t: Tensor, limit: int) -> Any:
    """Copy the indices in ``t``: int64 (ne3, ne2, ne1, ne0), all of them rows.

    Raises ContractError for one that is not below ``limit``.
    """
    indices = ctx.xp.array(ctx.view(t), dtype=ctx.xp.int64, copy=True)
    outside = (indices < 0) | (indices >= limit)
    if outside.any():
        refuse(f"index {int(indices[outside][0])} is out of range, there are {limit} rows")
    return indices


# -- GET_ROWS --------------------------------------------------------------------------------------


@contract(Op.GET_ROWS)
def _get_rows_contract(t: Tensor) -> None:
    table = checks.source(t, 0, DECODABLE | I32_ONLY)
    ids = checks.source(t, 1, I32_ONLY, dense=False)
    checks.result(t, I32_ONLY if table.type is GgmlType.I32 else F32_ONLY)
    checks.shape(ids, (ids.ne[0], table.ne[2], table.ne[3], 1), "source 1")
    checks.shape(t, (table.ne[0], *ids.ne[:3]), "the result")


@reference(Op.GET_ROWS)
def _get_rows(ctx: ArrayContext, t: Tensor) -> None:
    table, xp = source(t, 0), ctx.xp
    ids = checked_indices(ctx, source(t, 1), table.ne[1])[0]
    i3 = xp.arange(table.ne[3])[:, None, None]
    i2 = xp.arange(table.ne[2])[:, None]
    rows = xp.ascontiguousarray(ctx.view(table)[i3, i2, ids])
    if table.type is not GgmlType.I32:
        rows = to_f32(table.type, rows.view(xp.uint8), xp)
    ctx.view(t)[...] = rows


@contract(Op.GET_ROWS_BACK)
def _get_rows_back_contract(t: Tensor) -> None:
    gradients = checks.source(t, 0, {GgmlType.F32, GgmlType.F16})
    ids = checks.source(t, 1, I32_ONLY)
    checks.result(t, F32_ONLY)
    checks.contiguous(t, "the result")
    checks.shape(ids, (gradients.ne[1], 1, 1, 1), "source 1")
    checks.shape(gradients, (t.ne[0], gradients.ne[1], 1, 1), "source 0")
    checks.shape(t, (*t.ne[:2], 1, 1), "the result")


@reference(Op.GET_ROWS_BACK)
def _get_rows_back(ctx: ArrayContext, t: Tensor) -> None:
    ids = checked_indices(ctx, source(t, 1), t.ne[1])[0, 0, 0]
    total = ctx.xp.zeros((t.ne[1], t.ne[0]), ctx.xp.float32)
    ctx.xp.add.at(total, ids, ctx.f32(source(t, 0))[0, 0])
    ctx.view(t)[...] = total


# -- SET_ROWS --------------------------------------------------------------------------------------


@contract(Op.SET_ROWS)
def _set_rows_contract(t: Tensor) -> None:
    # Source 2, where a client sends it, is the tensor that the node is a view of.
    values = checks.source(t, 0, {GgmlType.F32, GgmlType.F16})
    ids = checks.source(t, 1, _INDICES, dense=False)
    checks.result(t, ENCODABLE | I32_ONLY)
    checks.distinct(values, "source 0")
    checks.shape(values, (t.ne[0], values.ne[1], *t.ne[2:]), "source 0")
    checks.shape(ids, (values.ne[1], *ids.ne[1:3], 1), "source 1")
    for dim in (1, 2):
        # Indices repeat over the dimensions of planes, which must be whole copies of them.
        n, m = values.ne[dim + 1], ids.ne[dim]
        require(n % m == 0 if m else n == 0, f"{m} index planes don't divide {n}")


@reference(Op.SET_ROWS)
def _set_rows(ctx: ArrayContext, t: Tensor) -> None:
    values, ids, xp = source(t, 0), source(t, 1), ctx.xp
    if values.empty:
        return
    indices = checked_indices(ctx, ids, t.ne[1])[0]
    i3 = xp.arange(t.ne[3])[:, None, None]
    i2 = xp.arange(t.ne[2])[:, None]
    target = ctx.view(t)
    rows = ctx.f32(values)
    if t.type is not GgmlType.I32:
        rows = from_f32(t.type, rows, xp).view(target.dtype)
    planes = indices[i3[..., 0] % ids.ne[2], i2[:, 0] % ids.ne[1]]
    # Rows of I32 are cut off to whole numbers here.
    target[i3, i2, planes] = rows


# -- ADD_ID ----------------------------------------------------------------------------------------


@contract(Op.ADD_ID)
def _add_id_contract(t: Tensor) -> None:
    a = checks.source(t, 0, F32_ONLY)
    b = checks.source(t, 1, F32_ONLY)
    ids = checks.source(t, 2, I32_ONLY, dense=False)
    checks.result(t, F32_ONLY)
    checks.shape(a, t.ne, "source 0")
    checks.shape(b, (a.ne[0], b.ne[1], 1, 1), "source 1")
    checks.shape(ids, (*a.ne[1:3], 1, 1), "source 2")


@reference(Op.ADD_ID)
def _add_id(ctx: ArrayContext, t: Tensor) -> None:
    a, b = source(t, 0), source(t, 1)
    ids = checked_indices(ctx, source(t, 2), b.ne[1])[0, 0]
    ctx.store(t, ctx.f32(a) + ctx.f32(b)[0, 0][ids])
